"""A model laid out over the processes of a run, from outside: the model files know nothing of it.

one process -> DDP (each process holds all) -> FSDP2 (each holds a shard) -> a 2-D mesh (shards within a group of
processes, usually a machine's, and a replica in every group): one config field. Source: DALL·E paper, §2.5 and
App. E (parameters sharded over a machine's 8 GPUs, gradients averaged over machines); PyTorch's DDP and FSDP2.

Each process computes on its own part of every micro-batch (`dalle.training.order.Order`) and its loss is the mean over
that part, so the mean of the processes' gradients is the gradient of the whole micro-batch.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dalle import weights
from dalle.clip import CLIP, Bottleneck, ResidualAttentionBlock
from dalle.dvae import DiscreteVAE, LightBlock, PaperBlock
from dalle.training.compression import Compressor, compress_replicas, compress_shards, shard_placement
from dalle.training.precision import ResblockScaling
from dalle.training.processes import ALONE, World
from dalle.training.recipe import IN_ONE_PIECE, Compression, DistributedConfig
from dalle.transformer import Layer, Transformer

# What is sharded, recomputed and compiled one by one.
BLOCKS = (Layer, ResidualAttentionBlock, Bottleneck, PaperBlock, LightBlock)
# How the stages enter a model other than by calling it.
ENTRANCES = {
    Transformer: ("loss",),
    DiscreteVAE: ("loss", "encode", "decode"),
    CLIP: ("encode_image", "encode_text"),
}
Placement = Callable[[nn.Parameter], Shard | None]  # the axis along which a parameter is split
Result = TypeVar("Result")


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model in its order; none holds another."""
    return [module for module in model.modules() if isinstance(module, BLOCKS)]


class Layout:
    """A model over the processes of a world; alone, it is the model and nothing else.

    To be made before the optimizer: sharding replaces the parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World = ALONE,
        config: DistributedConfig = IN_ONE_PIECE,
        compression: Compression | None = None,
        scaling: ResblockScaling | None = None,
    ) -> None:
        """`compression` is for gradients between replicas; `scaling` tells it under which scales they come."""
        self.model, self.world, self.config = model, world, config
        self._kind: Any = type(model)  # FSDP2 gives the model another class
        self.mesh: DeviceMesh | None = None
        self.ddp: DistributedDataParallel | None = None
        self.compressor: Compressor | None = None
        for block in blocks(model):
            if config.compile_blocks:
                block.forward = torch.compile(block.forward)
            if config.checkpoint_blocks:  # outside the compiled part; keeps the state of dropout's generator
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        # FSDP2 cannot split a scalar, and a loss may reach it outside of DDP's forward: averaged by hand.
        self.scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
        if world.size == 1:
            return
        if config.mode == "ddp":
            self.ddp = _replicated(model)
            if compression is not None:
                self.compressor = compress_replicas(self.ddp, compression, scaling)
            return
        self.mesh = _mesh(world, config, next(model.parameters()).device)
        if compression is None or self.mesh.ndim == 1:  # without replicas there is nothing to compress
            _shard_(model, self.mesh, self.scalars)
            return
        _shard_(model, self.mesh["shard"], self.scalars, shard_placement(model))
        replicas = self.mesh.get_group("replicate")
        self.compressor = compress_shards(model, replicas, compression, scaling)

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds a part of the weights only."""
        return self.mesh is not None

    def __call__(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function that runs the model forwards, where DDP can see it."""
        result: Result = function(*arguments) if self.ddp is None else self.ddp(function, *arguments)
        return result

    @contextmanager
    def micro_batch(self, is_last: bool) -> Iterator[None]:
        """Around the forward and backward pass of one micro-batch: gradients are exchanged in the last one only.

        Shards are an exception: they are summed at once within their group, for a whole gradient would not fit.
        """
        if self.compressor is not None:
            self.compressor.is_last = is_last
        if self.ddp is not None and not is_last:
            with self.ddp.no_sync():
                yield
            return
        has_replicas = self.mesh is not None and self.mesh.ndim == 2
        if has_replicas and self.compressor is None and isinstance(self.model, FSDPModule):
            self.model.set_requires_all_reduce(is_last)
        yield

    def finish_gradients(self) -> None:
        """After the last micro-batch: average the gradients that neither DDP nor FSDP2 does."""
        _average_(
            [p.grad for p in self.model.parameters() if p in self.scalars and p.grad is not None], self.world
        )

    def average_buffers(self) -> None:
        """Give all processes the mean of the model's running statistics, which each took from its own samples."""
        _average_([buffer for buffer in self.model.buffers() if buffer.is_floating_point()], self.world)

    def clip(self, limit: float) -> float:
        """Scale the gradient so that its norm is `limit` at most; returns the norm before, of the whole gradient."""
        if self.mesh is None:
            return float(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        shards = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
        whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        square = nn.utils.get_total_norm(shards) ** 2
        dist.all_reduce(square, group=self.mesh.get_group("shard"))
        norm = math.sqrt(float(square) + float(nn.utils.get_total_norm(whole)) ** 2)
        factor = min(1.0, limit / (norm + 1e-6))  # as clip_grad_norm_
        for gradient in (*shards, *whole):
            gradient.mul_(factor)
        return norm

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The whole of each of the model's state tensors, on the main process and its CPU; nothing on the others."""
        if not self.is_sharded:
            return tensors if self.world.is_main else {}
        gathered, state = {}, self.model.state_dict()
        for name, tensor in tensors.items():
            part = part_like(state[name], tensor)
            full = part.full_tensor() if isinstance(part, DTensor) else part
            if self.world.is_main:
                gathered[name] = full.detach().cpu()
        return gathered

    @contextmanager
    def drawing(self, stage: Any, tensors: dict[str, Tensor]) -> Iterator[bool]:
        """Let `stage` hold a model that one process can draw with: whether this is that process.

        A model that is sharded is put together from `tensors`: the main process needs room for all of it.
        """
        if not self.is_sharded:
            yield self.world.is_main
            return
        gathered, sharded = self.whole(tensors), stage.model
        if not self.world.is_main:
            yield False
            return
        with torch.device("meta"):  # no time spent on weights that are overwritten
            stage.model = self._kind(sharded.config)
        stage.model.to_empty(device=next(sharded.parameters()).device)
        weights.load_strict(stage.model, gathered, stage.name)
        stage.model.eval()
        try:
            yield True
        finally:
            stage.model = sharded


def part_like(own: Tensor, held: Tensor) -> Tensor:
    """What this process holds of a tensor, as the part of a whole that `own`, of the same shape, is."""
    if not isinstance(own, DTensor) or isinstance(held, DTensor):
        return held
    return DTensor.from_local(
        held.to(own.device),
        own.device_mesh,
        own.placements,
        run_check=False,
        shape=own.shape,
        stride=own.stride(),
    )


class _Call(nn.Module):
    """Runs any function of a model inside the forward pass that DDP watches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def _replicated(model: nn.Module) -> DistributedDataParallel:
    call = _Call(model)
    scalars = [name for name, parameter in call.named_parameters() if parameter.ndim == 0]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(call, scalars)  # type: ignore[no-untyped-call]
    return DistributedDataParallel(call, gradient_as_bucket_view=True)


def _mesh(world: World, config: DistributedConfig, device: torch.device) -> DeviceMesh:
    if config.mode == "shard":
        return init_device_mesh(device.type, (world.size,), mesh_dim_names=("shard",))
    size = config.shard_size or world.local_size
    if size is None:
        raise ValueError(
            "distributed.mode hybrid: the launcher does not say how many processes a machine has: set shard_size"
        )
    if world.size % size:
        raise ValueError(f"distributed.shard_size is {size}, which does not divide {world.size} processes")
    names = ("replicate", "shard")
    return init_device_mesh(device.type, (world.size // size, size), mesh_dim_names=names)


def _shard_(
    model: nn.Module, mesh: DeviceMesh, scalars: set[nn.Parameter], placement: Placement | None = None
) -> None:
    """Split each block's parameters over the mesh, then all others; each pass gathers the next block's in time."""
    for block in blocks(model):
        fully_shard(block, mesh=mesh, shard_placement_fn=placement)
    fully_shard(model, mesh=mesh, shard_placement_fn=placement, ignored_params=scalars)
    for kind, names in ENTRANCES.items():
        for name in names if isinstance(model, kind) else ():
            register_fsdp_forward_method(model, name)


def _average_(tensors: list[Tensor], world: World) -> None:
    if world.size == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world.size
    for tensor, mean in zip(tensors, torch.split(flat, [x.numel() for x in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
