"""Muon: steps that are nearly orthogonal matrices, for matrices that one process holds or that FSDP2 has sharded.

Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the size of a step is matched to AdamW's as in Liu et
al. 2025 (arXiv 2502.16982, eq. 4). Where the device computes natively in bfloat16, steps equal those of
`torch.optim.Muon` to the bit. differs: elsewhere the iteration runs in float32, because a CPU that emulates bfloat16
takes about 25 times as long (256 x 1024, one iteration, one thread: 168 ms against 7).

A step orthogonalizes a whole matrix, and its rounding depends on how a product is cut up. So a sharded matrix is
gathered on one process of its group, which orthogonalizes it for all of them: the group does the work of one process,
split evenly, and takes the same steps. Momentum stays sharded.

Shapes: a matrix is (M, N); a process holds some of its rows, or columns.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from dalle.generation.precision import has_native_bfloat16

MOMENTUM, EPSILON = 0.95, 1e-7  # PyTorch's defaults, as are the next two
COEFFICIENTS, N_ITERATIONS = (3.4445, -4.775, 2.0315), 5
RMS_OF_ADAMW = 0.2  # root mean square of AdamW's usual update over its learning rate (Liu et al. 2025, §2.2)


def orthogonalized(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return U S' V^T in `dtype` for the matrix (M, N) = U S V^T, with singular values S' between about 0.5 and 1.5.

    Five Newton-Schulz iterations X <- aX + (bA + cA²)X, A = XX^T, on the shorter side. One matrix at a time: a batched
    product of equal shapes is no faster on a CPU, and rounds differently on two threads.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype)
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=EPSILON)
    for _ in range(N_ITERATIONS):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon for matrices of one device, all whole or all sharded; its state has the names of PyTorch's."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = _agreed_dtype(matrices[0].device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            if moving and isinstance(moving[0], DTensor):
                n_sharers = moving[0].device_mesh.get_group("shard").size()
                for start in range(0, len(moving), n_sharers):  # one for each process to orthogonalize
                    self._move_sharded_(moving[start : start + n_sharers], group)
                continue
            for matrix in moving:
                direction = orthogonalized(self._update(matrix, matrix.grad), self.dtype)
                _move_(matrix, direction, matrix.shape, group)

    def _move_sharded_(self, matrices: list[Any], group: dict[str, Any]) -> None:
        sharers = matrices[0].device_mesh.get_group("shard")
        directions = []
        for owner, matrix in enumerate(matrices):
            whole = self._sharded_update(matrix).full_tensor()  # (M, N)
            if owner == sharers.rank():
                directions.append(orthogonalized(whole, self.dtype).contiguous())
            else:
                directions.append(torch.empty_like(whole, dtype=self.dtype))
        for owner, (matrix, direction) in enumerate(zip(matrices, directions, strict=True)):
            dist.broadcast(direction, group=sharers, group_src=owner)
            part = distribute_tensor(direction, matrix.device_mesh, matrix.placements, src_data_rank=None)
            _move_(matrix.to_local(), part.to_local(), matrix.shape, group)

    def _update(self, matrix: Any, gradient: Tensor) -> Tensor:
        """Return Nesterov's momentum of what this process holds of a matrix, once `gradient` has moved the buffer."""
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix, memory_format=torch.preserve_format)
        buffer = state["momentum_buffer"]
        held: Tensor = buffer.to_local() if isinstance(buffer, DTensor) else buffer
        held.lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(held, MOMENTUM)

    def _sharded_update(self, matrix: Any) -> DTensor:
        """`_update`, sharded as the matrix is."""
        return DTensor.from_local(
            self._update(matrix, matrix.grad.to_local()),
            matrix.device_mesh,
            matrix.placements,
            run_check=False,
            shape=matrix.shape,
            stride=matrix.stride(),
        )


def _move_(held: Tensor, direction: Tensor, shape: torch.Size, group: dict[str, Any]) -> None:
    """Decay and move what a process holds of a matrix (M, N) by its part of the direction."""
    held.mul_(1 - group["lr"] * group["weight_decay"])
    held.add_(direction, alpha=-group["lr"] * (RMS_OF_ADAMW * math.sqrt(max(shape))))


def _agreed_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 if the devices of all processes compute in it natively, else float32: replicas take the same steps."""
    is_native = torch.tensor(int(has_native_bfloat16(device)))
    if dist.is_initialized():
        dist.all_reduce(is_native, dist.ReduceOp.MIN)
    return torch.bfloat16 if is_native else torch.float32
