"""AdamW as the paper runs it: the running variance clipped at 5, the moments of most weights in 16 bits.

Source: DALL·E paper, App. B.2 and D.2. "Most weights" are the matrices of the resblocks; gains, biases, embeddings and
unembeddings keep fp32 moments. The running mean is stored as 1-6-9, the running variance as 0-6-10: 4 bytes a weight
in place of 8. settled: an update computes in fp32 from what is stored and rounds once, after the weights have moved.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dalle.training.small_floats import SIGNED, UNSIGNED

MAX_VARIANCE = 5.0  # App. B.2: clipped by value before it moves the weights or is stored


class AdamW16(torch.optim.Optimizer):
    """AdamW whose groups with `is_small` store their moments in 16 bits; weights may be sharded (DTensor)."""

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float = 1e-8
    ) -> None:
        super().__init__(
            groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "is_small": False}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move all weights that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move_(parameter, parameter.grad, group)

    def _move_(self, parameter: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            dtype = torch.int16 if group["is_small"] else torch.float32
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)  # code 0 is 0
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
        state["step"] += 1
        mean, variance = local_part(state["exp_avg"]), local_part(state["exp_avg_sq"])
        weight, gradient = local_part(parameter), local_part(grad).float()
        if group["is_small"]:
            new_mean, new_variance = SIGNED.decode(mean), UNSIGNED.decode(variance)
        else:
            new_mean, new_variance = mean, variance
        beta1, beta2 = group["betas"]
        new_mean.lerp_(gradient, 1 - beta1)
        new_variance.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2).clamp_(max=MAX_VARIANCE)
        deviation = (new_variance / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(new_mean / deviation * (group["lr"] / (1 - beta1 ** state["step"])))
        if group["is_small"]:
            mean.copy_(SIGNED.encode(SIGNED.clamp(new_mean)))
            variance.copy_(UNSIGNED.encode(new_variance))


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
