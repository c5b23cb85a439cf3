"""fp16 as the paper trains in it: every residual block computes under a gradient scale of its own.

Source: DALL·E paper, §2.4, figure 4, App. D.1 to D.3. The gradients of activations fall from the first resblock to the
last by more than fp16's exponent spans, so one scale for all of them (loss scaling) loses the last ones to
underflow or the first ones to overflow. bf16 has fp32's exponent and needs none of this (footnote 12): it is the
default; this is for hardware without it.

Forwards, x and y in fp32:     LayerNorm(x) -> fp16 -> resblock -> fp32 -> y, and y is added to the identity path
Backwards, gradients in fp32:  dy * scale, non-finite -> 0 -> fp16 -> resblock' -> fp32 -> LayerNorm' -> / scale,
                               non-finite -> 0 -> dx, which is added to the gradient of the identity path

So an overflow stays in its own block: its parameters' gradients are not finite, its scale goes down, and the blocks
before it see zeros. Embeddings, gains, biases, the last norm, both heads and the logits stay in fp32 (D.2).

differs: the weights are kept in fp32 and cast for each use, and their gradients are sent and summed in fp32; the
paper keeps both in 16 bits, and divides by hand-tuned constants before each sum (D.3). settled: DDP and FSDP2 hand
back the mean over replicas, where the paper divides the loss by the number M of replicas and multiplies all scales
by M; the two products are equal, so the scales here are the paper's divided by M.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle.training.adamw16 import local_part
from dalle.transformer import AttentionResblock, MLPResblock

# App. D.1, as whole steps of 1/1000 of a bit, so that any number of them adds up exactly.
STEPS_PER_BIT = 1000
FIRST, LOWEST, HIGHEST = 13 * STEPS_PER_BIT, 7 * STEPS_PER_BIT, 24 * STEPS_PER_BIT
GROWTH = 1  # an update whose gradients are finite: times 2^(1/1000)
BACK_OFF = STEPS_PER_BIT // 2  # one whose gradients are not: divided by sqrt(2)
BACK_OFF_EVERY = 125  # updates between two divisions of a scale, at least


class Scales:
    """One gradient scale per residual block, and the rules by which they move (App. D.1).

    A scale is M * 2^(steps / 1000), M being the number of replicas that the loss is divided by.
    """

    def __init__(self, n_blocks: int, n_replicas: int = 1) -> None:
        self.n_replicas = n_replicas
        self.n_updates = 0
        self.steps = [FIRST] * n_blocks
        self.backed_off_at = [-BACK_OFF_EVERY] * n_blocks  # update of the last division

    def values(self) -> list[float]:
        """What each block's gradients are multiplied by."""
        return [self.n_replicas * 2.0 ** (steps / STEPS_PER_BIT) for steps in self.steps]

    def update(self, are_finite: Sequence[bool]) -> None:
        """Move every scale by whether its block's gradients were finite in this update."""
        for block, is_finite in enumerate(are_finite):
            if is_finite:
                self.steps[block] = min(self.steps[block] + GROWTH, HIGHEST)
            elif self.n_updates - self.backed_off_at[block] >= BACK_OFF_EVERY:
                self.steps[block] = max(self.steps[block] - BACK_OFF, LOWEST)
                self.backed_off_at[block] = self.n_updates
        self.n_updates += 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {
            "n_updates": self.n_updates,
            "steps": list(self.steps),
            "backed_off_at": list(self.backed_off_at),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; ValueError if it is of another number of blocks."""
        if len(state["steps"]) != len(self.steps):
            raise ValueError(
                f"gradient scales of {len(state['steps'])} blocks; the model has {len(self.steps)}"
            )
        self.n_updates = int(state["n_updates"])
        self.steps, self.backed_off_at = list(state["steps"]), list(state["backed_off_at"])


class ResblockScaling:
    """Lets the resblocks of a `Transformer` compute in fp16, each under its own gradient scale.

    It works from outside, by hooks and a wrapped `forward`, before or after the model is compiled, checkpointed or
    sharded. An update is: backward, `unscale_`, and the optimizer's step only if that returned True.
    """

    def __init__(self, model: nn.Module) -> None:
        self.blocks = list(resblocks(model))
        if not self.blocks:
            raise ValueError("precision fp16_resblock: this model has no residual blocks: use bf16 or fp32")
        self.scales = Scales(len(self.blocks))
        device = next(model.parameters()).device
        self._factors = torch.tensor(
            self.scales.values(), device=device
        )  # (blocks,) fp32, read in the backward pass
        self._overflowed: list[int] = []  # steps of the scales whose blocks overflowed in the last update
        for index, block in enumerate(self.blocks):
            self._enclose(block, self._factors[index])

    def factor(self, module: nn.Module) -> Tensor | None:
        """The scale, a scalar, of what backward leaves in the parameters of a module; None where there is none."""
        for index, block in enumerate(self.blocks):
            if any(module is part for part in block.modules()):
                return self._factors[index]
        return None

    @torch.no_grad()
    def unscale_(self) -> bool:
        """Divide the gradients by their scales, and move the scales; False if the update must be skipped.

        All processes agree: a gradient that is not finite in one of them counts for all.
        """
        are_finite = self._are_finite()
        for index, block in enumerate(self.blocks):
            gradients = list(_gradients(block))
            if gradients:
                torch._foreach_div_(gradients, self._factors[index])
        self._overflowed = [
            steps for steps, is_finite in zip(self.scales.steps, are_finite, strict=True) if not is_finite
        ]
        self.scales.update(are_finite)
        self._factors.copy_(torch.tensor(self.scales.values()))
        return all(are_finite)

    def can_back_off(self) -> bool:
        """Whether a scale whose block overflowed in the last update has still room below it."""
        return any(steps > LOWEST for steps in self._overflowed)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return self.scales.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self.scales.restore(state)
        self._factors.copy_(torch.tensor(self.scales.values()))

    def figures(self) -> dict[str, float]:
        """What to log: the lowest and the highest scale, in bits."""
        return {
            "lowest_scale_bits": min(self.scales.steps) / STEPS_PER_BIT,
            "highest_scale_bits": max(self.scales.steps) / STEPS_PER_BIT,
        }

    def _are_finite(self) -> list[bool]:
        """Whether all parameter gradients of each block are finite, in all processes."""
        flags = []
        for block in self.blocks:
            gradients = list(_gradients(block))
            largest = torch._foreach_norm(gradients, float("inf")) if gradients else ()
            sound = [value.isfinite() for value in largest]
            flags.append(torch.stack(sound).all() if sound else torch.ones((), dtype=torch.bool))
        finite = torch.stack([flag.to(self._factors.device) for flag in flags]).to(torch.int32)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return cast(list[bool], finite.bool().tolist())

    def _enclose(self, block: AttentionResblock | MLPResblock, factor: Tensor) -> None:
        """Put a block's computation in fp16, and its gradients under `factor` on their way through."""
        first, last = _ends(block)
        first.register_forward_pre_hook(lambda _, inputs: (_leave(inputs[0], factor),))
        last.register_forward_hook(lambda _, __, output: _enter(output, factor))
        block.forward = _in_fp16(block.forward)  # type: ignore[method-assign]


def resblocks(model: nn.Module) -> Iterator[AttentionResblock | MLPResblock]:
    """The residual blocks of a transformer, in the order of the stream."""
    for module in model.modules():
        if isinstance(module, AttentionResblock | MLPResblock):
            yield module


def _ends(block: AttentionResblock | MLPResblock) -> tuple[nn.LayerNorm, nn.Linear]:
    """What a block's input and its branch's output pass through."""
    return block.norm, block.out if isinstance(block, AttentionResblock) else block.contract


def _gradients(block: nn.Module) -> Iterator[Tensor]:
    """The gradients of a block's parameters: what this process holds of them."""
    for parameter in block.parameters():
        if parameter.grad is not None:
            yield local_part(parameter.grad)


def _in_fp16(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`forward` under autocast to fp16; LayerNorm, fed by the fp32 identity path, stays in fp32."""

    @functools.wraps(forward)
    def cast_forward(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.float16):
            return forward(x.float())

    return cast_forward


def _enter(branch: Tensor, factor: Tensor) -> Tensor:
    """fp16 -> fp32 forwards; backwards, the gradient enters the block: times its scale, then fp32 -> fp16."""
    entered: Tensor = _Scale.apply(branch.float(), factor)  # type: ignore[no-untyped-call]
    return entered


def _leave(x: Tensor, factor: Tensor) -> Tensor:
    """Nothing forwards; backwards, the gradient leaves the block: divided by its scale."""
    left: Tensor = _Unscale.apply(x, factor)  # type: ignore[no-untyped-call]
    return left


class _Scale(torch.autograd.Function):
    """The identity; its gradient is multiplied by `factor`, and 0 where it is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        return _filtered(cotangents[0] * ctx.factor), None


class _Unscale(torch.autograd.Function):
    """The identity; its gradient is divided by `factor`, and 0 where it is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        return _filtered(cotangents[0] / ctx.factor), None


def _filtered(gradient: Tensor) -> Tensor:
    return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
