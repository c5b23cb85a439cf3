"""Gradients compressed by PowerSGD between replicas: each matrix of a resblock travels as two thin factors.

Source: DALL·E paper, §2.5 and App. E.2; Vogels et al. 2019, arXiv 1905.13727. The gradient E of a matrix, with what
earlier updates did not send, goes as P = E Q0, whose mean over replicas is orthogonalised, and Q = E^T P, whose mean
completes the gradient P Q^T; what that lacks of E stays behind for the next update (error feedback). As in the
paper Q0 is a Gaussian drawn once, P gets 1e-6 of the identity before it is orthogonalised by Householder reflections
(`torch.linalg.qr`), and a block's factors travel together. Gains, biases, embeddings and heads are sent as they are.

When it pays: where replicas are joined by a slow link. Over one 100 Gb/s port a machine, averaging the paper's 12 billion
parameters takes 3.9 s an update, compressed 0.7 s, as `dalle plan --preset paper` reckons; at 400 Gb/s for each GPU the
plain sum hides behind the backward pass, and compression only costs. It is off unless a recipe sets it.

PyTorch's own hook (`ddp_comm_hooks.powerSGD_hook`) is for DDP alone, keeps its state by buckets, which DDP lays out
anew after a restart, and knows no fixed Q0: so one implementation serves both DDP and the shards of FSDP2 here, with
its state by parameter. settled: P and Q are both means over replicas. settled: 1e-6 is relative to P's root mean
square. differs: the factors travel in fp32; the paper sends 1-6-9 through a kernel of its own.

Shapes: a parameter's gradient is S matrices of M rows and N columns, M <= N (transposed if need be); R rank.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from dalle.training.precision import ResblockScaling, resblocks
from dalle.training.recipe import Compression
from dalle.training.small_floats import SIGNED
from dalle.transformer import AttentionResblock, MLPResblock

IDENTITY_SHARE = 1e-6  # App. E.2.5: keeps the columns of P independent


@dataclass(frozen=True, eq=False)
class Part:
    """What a process holds of the gradient of one parameter."""

    name: str
    n_matrices: int  # S: 3 for queries, keys and values, 0 for what is sent as it is
    factor: Tensor | None  # the gradient scale that it comes under; None: it is as it should be


class Compressor:
    """Averages gradients over replicas, those of the resblocks' matrices by their factors."""

    def __init__(self, replicas: dist.ProcessGroup, settings: Compression) -> None:
        self.replicas, self.settings = replicas, settings
        self.is_last = True  # micro-batch of an update: before it, shards are only summed up
        self.n_sent = self.n_plain = 0  # numbers that were sent, and that would have been sent uncompressed
        self._errors: dict[str, Tensor] = {}  # (S, M, N), or their 1-6-9 codes
        self._starts: dict[tuple[int, int], Tensor] = {}  # Q0 of each shape
        self._held: dict[str, Tensor] = {}  # sums of the micro-batches before the last

    @property
    def ratio(self) -> float:
        """Numbers sent for each number of the gradients, so far."""
        return self.n_sent / max(self.n_plain, 1)

    @torch.no_grad()
    def mean_(self, gradients: dict[Part, Tensor]) -> None:
        """Put into each gradient its mean over the replicas, or what its factors tell of it; NaN if it is not finite."""
        thin = {part: gradient for part, gradient in gradients.items() if self.pays(part, gradient)}
        plain = [gradient for part, gradient in gradients.items() if part not in thin]
        self.n_plain += sum(gradient.numel() for gradient in gradients.values())
        if plain:
            self.average_(plain)
        if thin:
            self._approximate_(thin)

    def tensors(self) -> dict[str, Tensor]:
        """This process's error buffers, which a checkpoint needs to go on exactly on as many processes."""
        return dict(self._errors)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `tensors` of a checkpoint."""
        self._errors = {name: tensor.clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def summed(self) -> dict[str, Tensor]:
        """The sums of the error buffers over replicas, fp32 or wider: enough to go on (App. E.2, optimisation 4)."""
        sums = {name: self._decoded(error).clone() for name, error in self._errors.items()}
        for error in sums.values():
            dist.all_reduce(error, group=self.replicas)
        return sums

    def restore_summed(self, sums: dict[str, Tensor]) -> None:
        """Give each of any number of replicas its share of `summed`: the same sum, and so the same next update."""
        n = self.replicas.size()
        self._errors = {name: self._encoded(error / n) for name, error in sums.items()}

    def hold_(self, key: str, flat: Tensor) -> bool:
        """Whether `flat` is complete and may be averaged; micro-batches before the last are taken out of it and kept."""
        if not self.is_last:
            self._held[key] = self._held[key] + flat if key in self._held else flat.clone()
            flat.zero_()
            return False
        if key in self._held:
            flat += self._held.pop(key)
        return True

    def pays(self, part: Part, gradient: Tensor) -> bool:
        """Whether the factors of a gradient are sent in its place."""
        if part.n_matrices == 0 or gradient.numel() == 0:
            return False
        is_thin = numbers_sent(gradient.shape, part.n_matrices, self.settings.rank) < gradient.numel()
        return is_thin or self.settings.always

    def average_(self, tensors: list[Tensor]) -> None:
        """One all-reduce for all of them."""
        if len(tensors) == 1 and tensors[0].is_contiguous():
            flat = tensors[0]
        else:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
        self.n_sent += flat.numel()
        dist.all_reduce(flat, op=dist.ReduceOp.AVG, group=self.replicas)
        if flat is tensors[0]:
            return
        for tensor, mean in zip(
            tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True
        ):
            tensor.copy_(mean.view_as(tensor))

    def _approximate_(self, gradients: dict[Part, Tensor]) -> None:
        pending, firsts = [], []
        for part, gradient in gradients.items():
            e, is_finite = self._pending(part, gradient)  # (S, M, N)
            pending.append(e)
            firsts.append(torch.where(is_finite, e @ self._start(e), torch.nan))  # P (S, M, R)
        self.average_(firsts)
        are_finite = torch.stack([p.isfinite().all() for p in firsts]).all()  # in any replica
        bases = [orthogonal(torch.where(are_finite, p, 0.0)) for p in firsts]  # (S, M, R)
        seconds = [e.mT @ p for e, p in zip(pending, bases, strict=True)]  # Q (S, N, R)
        self.average_(seconds)
        are_finite &= torch.stack([q.isfinite().all() for q in seconds]).all()
        for (part, gradient), e, p, q in zip(gradients.items(), pending, bases, seconds, strict=True):
            mean = p @ q.mT  # (S, M, N)
            if self.settings.error_feedback:
                self._errors[part.name] = self._encoded(torch.where(are_finite, e - mean, e))
            if part.factor is not None:
                mean *= part.factor
            matrices = _matrices(gradient, part.n_matrices)
            matrices.copy_(torch.where(are_finite, mean, torch.nan))

    def _pending(self, part: Part, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """What there is to send, (S, M, N), and whether this update's gradient is finite; if not, it is left out."""
        matrices = _matrices(gradient, part.n_matrices)
        matrices = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
        if part.factor is not None:
            matrices = matrices / part.factor
        is_finite = matrices.isfinite().all()
        before = self._errors.get(part.name)
        rest = torch.zeros_like(matrices) if before is None else self._decoded(before)
        return torch.where(is_finite, rest + matrices, rest), is_finite

    def _start(self, e: Tensor) -> Tensor:
        """Q0: the same in all updates and all processes, (N, R)."""
        m, n = e.shape[1:]
        rank = min(self.settings.rank, m)
        if (n, rank) not in self._starts:
            generator = torch.Generator().manual_seed(n * 2**20 + rank)
            self._starts[n, rank] = torch.randn(n, rank, generator=generator).to(e.device, e.dtype)
        return self._starts[n, rank]

    def _encoded(self, error: Tensor) -> Tensor:
        return SIGNED.encode(SIGNED.clamp(error)) if self.settings.errors == "1-6-9" else error

    def _decoded(self, error: Tensor) -> Tensor:
        return SIGNED.decode(error) if self.settings.errors == "1-6-9" else error


def orthogonal(p: Tensor) -> Tensor:
    """Orthonormal columns that span those of `p`, (S, M, R) -> (S, M, R), by Householder reflections (App. E.2.5)."""
    size = p.square().mean(dim=(1, 2), keepdim=True).sqrt()
    p = p / size.clamp(min=torch.finfo(p.dtype).tiny)
    identity = torch.eye(p.shape[1], p.shape[2], dtype=p.dtype, device=p.device)
    basis: Tensor = torch.linalg.qr(p + IDENTITY_SHARE * identity).Q
    return basis


def numbers_sent(shape: tuple[int, ...], n_matrices: int, rank: int) -> int:
    """How many numbers the factors P and Q of a gradient (rows, columns) have: of `n_matrices` stacked ones (Table 2)."""
    n_matrices = n_matrices if shape[0] % n_matrices == 0 else 1
    rows, columns = shape[0] // n_matrices, shape[1]
    return n_matrices * (rows + columns) * min(rank, rows, columns)


def _matrices(gradient: Tensor, n_matrices: int) -> Tensor:
    """A gradient (rows, columns) as S matrices with no more rows than columns, (S, M, N): a view."""
    n_matrices = n_matrices if gradient.shape[0] % n_matrices == 0 else 1  # a shard may cut one
    stacked = gradient.view(n_matrices, -1, gradient.shape[1])
    return stacked if stacked.shape[1] <= stacked.shape[2] else stacked.mT


# --- Where gradients are averaged: DDP's hook, FSDP2's hook --------------------------------------------------


def compress_replicas(
    ddp: DistributedDataParallel, settings: Compression, scaling: ResblockScaling | None = None
) -> Compressor:
    """Let DDP average its gradients through a `Compressor`; the model's scales, if any, must be given."""
    compressor = Compressor(ddp.process_group, settings)
    parts = _parts(ddp, scaling)

    def hook(state: Compressor, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        held = {parts[p]: g for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)}
        if not any(state.pays(part, gradient) for part, gradient in held.items()):
            state.n_sent += bucket.buffer().numel()
            state.n_plain += bucket.buffer().numel()
            return allreduce_hook(state.replicas, bucket)  # as without a hook, to the bit
        state.mean_(held)
        device = bucket.buffer().device
        done: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=[device] if device.type == "cuda" else None
        )
        done.set_result(bucket.buffer())
        return done

    ddp.register_comm_hook(compressor, hook)
    return compressor


def compress_shards(
    model: nn.Module,
    replicas: dist.ProcessGroup,
    settings: Compression,
    scaling: ResblockScaling | None = None,
) -> Compressor:
    """Let the shards of a model be averaged over `replicas` through a `Compressor`.

    `model` went through `fully_shard` on the mesh of its shards alone: FSDP2 then sums gradients within a group of
    shards, and its all-reduce hook, which is this one, over groups. Its scales, if any, must be given.
    """
    compressor = Compressor(replicas, settings)
    parts = _parts(model, scaling)
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        for (
            group
        ) in module._get_fsdp_state()._fsdp_param_groups:  # the only place that knows the buffer's layout
            fields = [
                Field(
                    parts[held.sharded_param],
                    held.sharded_size,
                    held.contiguous_sharded_stride,
                    held.padded_sharded_param_size.numel(),
                )
                for held in group.fsdp_params
            ]
            module.set_all_reduce_hook(functools.partial(_average_shards, compressor, fields))
    return compressor


@dataclass(frozen=True)
class Field:
    """Where the gradient of one shard lies in the buffer of its FSDP2 group."""

    part: Part
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    n_padded: int  # numbers up to the next one


def _average_shards(compressor: Compressor, fields: list[Field], flat: Tensor) -> None:
    if not compressor.hold_(fields[0].part.name, flat):
        return
    gradients, offset = {}, 0
    for field in fields:
        gradients[field.part] = flat.as_strided(field.shape, field.stride, offset)
        offset += field.n_padded
    if offset != flat.numel():
        raise ValueError(f"{fields[0].part.name}: compression needs all weights trained, and some are frozen")
    if any(compressor.pays(part, gradient) for part, gradient in gradients.items()):
        compressor.mean_(gradients)
        return
    compressor.n_plain += flat.numel()
    compressor.average_([flat])  # as FSDP2's own mesh of replicas and shards, to the bit


def shard_placement(model: nn.Module) -> Callable[[nn.Parameter], Shard | None]:
    """Which axis `fully_shard` is to split: the second one of each second MLP matrix, so that it is no wider than long.

    Table 2; with its first axis split, its factors would be 2.75 times as large at the paper's sizes.
    """
    second = {block.contract.weight for block in resblocks(model) if isinstance(block, MLPResblock)}
    return lambda parameter: Shard(1) if parameter in second else None


def _parts(model: nn.Module, scaling: ResblockScaling | None) -> dict[Tensor, Part]:
    """Every parameter's part; the matrices of the resblocks are those that may be compressed."""
    n_matrices = {weight: n for block in resblocks(model) for weight, n in _weights(block)}
    return {
        parameter: Part(
            f"{path}.{name}", n_matrices.get(parameter, 0), scaling.factor(module) if scaling else None
        )
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }


def _weights(block: AttentionResblock | MLPResblock) -> Iterator[tuple[Tensor, int]]:
    """The matrices of a block, and how many are stacked in each."""
    if isinstance(block, AttentionResblock):
        yield block.qkv.weight, 3
        yield block.out.weight, 1
    else:
        yield block.expand.weight, 1
        yield block.contract.weight, 1
