"""Muon over sharded matrices: the steps of `torch.optim.Muon` to the bit, given the same gradients.

Source: Jordan et al. 2024; PyTorch's `torch.optim.Muon`. A step orthogonalises a whole matrix in bf16, whose rounding
depends on how a product is cut up, so PyTorch's optimizer on shards takes other steps. Here the momentum stays where
its shard is, and each matrix is put together on one process of its group, which orthogonalises it for all of them:
a group does the work of one process, split evenly.

Shapes: a matrix is (M, N); a process holds some of its rows, or columns.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

MOMENTUM, EPSILON = 0.95, 1e-7
COEFFICIENTS, N_ITERATIONS = (3.4445, -4.775, 2.0315), 5  # PyTorch's defaults
ADJUSTMENT = "match_rms_adamw"


class ShardedMuon(torch.optim.Optimizer):
    """Muon for matrices that FSDP2 has sharded; its state has the names of PyTorch's, so that checkpoints agree."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            if moving:
                n_sharers = moving[0].device_mesh.get_group("shard").size()
                for start in range(0, len(moving), n_sharers):  # one for each process to orthogonalise
                    self._move_(moving[start : start + n_sharers], group)

    def _move_(self, matrices: list[Any], group: dict[str, Any]) -> None:
        sharers = matrices[0].device_mesh.get_group("shard")
        directions = []
        for owner, matrix in enumerate(matrices):
            whole = self._update(matrix).full_tensor()  # (M, N)
            if owner == sharers.rank():
                direction = _zeropower_via_newtonschulz(whole, COEFFICIENTS, N_ITERATIONS, EPSILON)
                directions.append(direction.contiguous())
            else:
                directions.append(torch.empty_like(whole, dtype=torch.bfloat16))
        for owner, (matrix, direction) in enumerate(zip(matrices, directions, strict=True)):
            dist.broadcast(direction, group=sharers, group_src=owner)
            part = distribute_tensor(direction, matrix.device_mesh, matrix.placements, src_data_rank=None)
            held = matrix.to_local()
            held.mul_(1 - group["lr"] * group["weight_decay"])
            held.add_(part.to_local(), alpha=-_adjust_lr(group["lr"], ADJUSTMENT, matrix.shape))

    def _update(self, matrix: Any) -> DTensor:
        """Nesterov's momentum of a matrix, sharded as the matrix is."""
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix, memory_format=torch.preserve_format)
        buffer, gradient = state["momentum_buffer"].to_local(), matrix.grad.to_local()
        buffer.lerp_(gradient, 1 - MOMENTUM)
        update: Tensor = gradient.lerp(buffer, MOMENTUM)
        return DTensor.from_local(
            update,
            matrix.device_mesh,
            matrix.placements,
            run_check=False,
            shape=matrix.shape,
            stride=matrix.stride(),
        )
