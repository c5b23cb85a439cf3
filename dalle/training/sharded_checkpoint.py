"""Checkpoints of a run, of one process or of many: each number of processes reads what any other wrote.

Many processes write with PyTorch's distributed checkpoint engine (DCP), each what it holds, as safetensors; the
promises are those of `dalle.training.checkpoint`: whole or not at all, checked when read, the last two kept.

CHECKPOINTS/step-N/  shard-R-….safetensors (one a process)  state.json  manifest.json
"""

import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.tensor import DTensor, distribute_tensor

from dalle import files, manifest, weights
from dalle.training import checkpoint
from dalle.training.adamw16 import local_part
from dalle.training.checkpoint import FILES
from dalle.training.distributed import Layout, part_like
from dalle.training.optim import MovingAverage
from dalle.training.processes import AgreedStop

STATE = FILES[3]
PARTS = {"weights": FILES[0], "average": FILES[1], "optimizer": FILES[2]}  # as one process names its files


class Checkpoints:
    """The checkpoints of one stage below `root`; use as a context manager, so that the last one is whole at the end."""

    def __init__(
        self, root: Path, layout: Layout, average: MovingAverage, optimizer: torch.optim.Optimizer
    ) -> None:
        self.root, self.layout, self.average, self.optimizer = root, layout, average, optimizer
        self._unfinished: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        # A group of its own: what is written in a thread must not mix with what the processes agree on meanwhile.
        self._group = dist.new_group(backend="gloo") if layout.world.size > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, AgreedStop):
            self._finish()

    def restore(self) -> dict[str, Any] | None:
        """Put everything back as the newest whole checkpoint holds it; its state, None where there is none.

        The main process chooses it: were each to look for itself, they could find different ones.
        """
        world = self.layout.world
        found = world.from_main(checkpoint.newest(self.root) if world.is_main else None)
        if found is None:
            return None
        if (found.folder / FILES[0]).is_file():
            if world.size == 1:
                return checkpoint.restore(found, self.layout.model, self.average, self.optimizer)
            self._load_whole(found.folder)
        else:
            self._load_sharded(found.folder)
        state = files.read_json(found.folder / STATE)
        if not isinstance(state, dict) or state.get("step") != found.step:
            raise ValueError(f"{found.folder / STATE}: not the state of step {found.step}")
        return state

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write `root/step-N`, then drop all but the last two; with async_checkpoints, while training goes on."""
        if self._group is None:
            checkpoint.save(self.root, step, self.layout.model, self.average, self.optimizer, state)
            return
        self._finish()  # the one before
        folder = self.root / f".step-{step}.tmp"
        if self.layout.world.is_main:
            checkpoint.cleared(self.root, step)
            folder.mkdir(parents=True)
        self.layout.world.wait()
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        tensors = self._tensors()
        if self.layout.config.async_checkpoints:
            written = async_save(tensors, storage_writer=writer, process_group=self._group)
            self._unfinished = self._thread.submit(
                self._seal, folder, step, state, cast(Future[Any], written)
            )
        else:
            save(tensors, storage_writer=writer, process_group=self._group)
            self._seal(folder, step, state)

    def _finish(self) -> None:
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is not None:
            unfinished.result()

    def _seal(
        self, folder: Path, step: int, state: dict[str, Any], written: Future[Any] | None = None
    ) -> None:
        """Give a checkpoint that every process has written its manifest, last, and its name."""
        if written is not None:
            written.result()
        world, group = self.layout.world, self._group
        own = sorted(folder.glob(f"shard-{world.rank + 1:05d}-*"))
        sums = {path.name: manifest.manifest_entry(path) for path in own}  # each process reads its own again
        gathered: list[dict[str, manifest.ManifestEntry]] = [{}] * world.size
        dist.all_gather_object(gathered, sums, group=group)
        if world.is_main:
            files.write_json(folder / STATE, {"step": step, **state})
            entries = {name: entry for part in gathered for name, entry in part.items()}
            manifest.write_manifest(folder, (STATE,), entries)
            files.publish_folder(folder, self.root / f"step-{step}")
            checkpoint.drop_old(self.root)
        dist.barrier(group=group)

    def _tensors(self) -> dict[str, Tensor]:
        """Everything to keep, by names that do not depend on the number of processes."""
        state = self.layout.model.state_dict()
        tensors = {f"weights/{name}": tensor for name, tensor in state.items()}
        for name, tensor in self.average.tensors.items():
            tensors[f"average/{name}"] = part_like(state[name], tensor)
        for name, parameter in self.layout.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{name}/{key}"] = torch.as_tensor(value)
        for name, error in (self.layout.compressor.tensors() if self.layout.compressor else {}).items():
            tensors[f"{self._own_errors}{name}"] = error
        return tensors

    @property
    def _own_errors(self) -> str:
        """Where this process's error buffers are: of use to as many processes only, in the same layout."""
        world, config = self.layout.world, self.layout.config
        return f"errors/{config.mode}-{config.shard_size}-{world.rank}-of-{world.size}/"

    def _load_sharded(self, folder: Path) -> None:
        """Read what DCP wrote, of it only what this process holds."""
        reader = HuggingFaceStorageReader(str(folder))
        stored = reader.read_metadata().state_dict_metadata
        device = next(self.layout.model.parameters()).device
        errors = {
            name.removeprefix(self._own_errors): torch.zeros(
                entry.size, dtype=entry.properties.dtype, device=device
            )
            for name, entry in stored.items()
            if name.startswith(self._own_errors) and isinstance(entry, TensorStorageMetadata)
        }
        if self.layout.compressor is not None:  # none with another number of processes: they start at zero
            self.layout.compressor.restore(errors)
        self._make_moments(
            {
                name: (entry.size, entry.properties.dtype)
                for name, entry in stored.items()
                if isinstance(entry, TensorStorageMetadata)
            }
        )
        tensors = self._tensors()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is, with one process
            load(tensors, storage_reader=reader, no_dist=self._group is None)
        self._take_average(tensors)

    def _load_whole(self, folder: Path) -> None:
        """Read what one process wrote: every process takes its part of each tensor."""
        found: dict[str, Tensor] = {}
        for part, file in PARTS.items():
            found |= {f"{part}/{name}": value for name, value in weights.load_tensors(folder / file).items()}
        self._make_moments({name: (value.shape, value.dtype) for name, value in found.items()})
        tensors = self._tensors()
        for name, tensor in tensors.items():
            whole = found[name].to(tensor.device)
            if isinstance(tensor, DTensor):
                mesh, placements = tensor.device_mesh, tensor.placements
                whole = distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()
            local_part(tensor).detach().copy_(whole)
        self._take_average(tensors)

    def _take_average(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.average.tensors.items():
            local_part(tensor).copy_(local_part(tensors[f"average/{name}"]))

    def _make_moments(self, stored: dict[str, tuple[torch.Size, torch.dtype]]) -> None:
        """Make the optimizer's state, of the sizes and dtypes that are stored."""
        parameters = dict(self.layout.model.named_parameters())
        for full_name, (size, dtype) in stored.items():
            part, _, rest = full_name.partition("/")
            if part == "optimizer":
                name, _, key = rest.rpartition("/")
                parameter = parameters[name].detach()
                is_shaped_alike = size == parameter.shape and size
                self.optimizer.state[parameters[name]][key] = (
                    torch.zeros_like(parameter, dtype=dtype)
                    if is_shaped_alike
                    else torch.zeros(size, dtype=dtype, device=parameter.device)
                )
