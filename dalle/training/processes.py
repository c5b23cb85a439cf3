"""The processes of a run: who they are, what they agree on, and the one place that joins and parts them.

Source: PyTorch's `torchrun` and `torch.distributed`. Any launcher will do that sets RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT; without these a run is one process, and nothing here communicates.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Others wait while the main process trains a tokenizer or draws a sheet; a dead peer is noticed at once, not by this.
PATIENCE = timedelta(hours=1)
FAILED = "dalle/failed"  # key of the common store: the process that failed first
Value = TypeVar("Value")
logger = logging.getLogger(__name__)


class AgreedStop(Exception):
    """Raised by all processes of a run together: none has failed."""


class PeerLost(ConnectionError):
    """Another process is gone: killed, or on a machine that fell away."""


@dataclass(frozen=True)
class World:
    """The processes that train together, as one of them sees it; by default it is alone.

    What they agree on travels through main memory, so that no GPU waits for it.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int | None = None  # processes on this machine, where the launcher says

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes logs, sheets, records and models."""
        return self.rank == 0

    def means(self, values: Sequence[float]) -> list[float]:
        """Each value's mean over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        means: list[float] = (total / self.size).tolist()
        return means

    def largest(self, value: int) -> int:
        """The largest of all processes' values."""
        if self.size == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def weight(self, n: int) -> float:
        """What a mean over this process's `n` samples counts in the mean over processes: 1 where all have as many."""
        if self.size == 1:
            return 1.0
        total = torch.tensor(n)
        dist.all_reduce(total)
        return n * self.size / int(total)

    def part(self, n: int) -> slice:
        """This process's part of `n` samples, all parts alike; ValueError where `n` cannot be split so."""
        if n % self.size:
            raise ValueError(
                f"a batch of {n} cannot be split over {self.size} processes: set batch_size to a multiple of {self.size}"
            )
        share = n // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def from_main(self, value: Value) -> Value:
        """The main process's `value`, in all of them."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        return held[0]

    def wait(self) -> None:
        """Go on when all processes are here."""
        self.largest(0)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process run the block alone, and the others once it is done: they find its work."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()


ALONE = World()


def world_of_launcher() -> World | None:
    """What a launcher says of this process; None where there is none. ValueError where it says only half."""
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if "RANK" not in found and "WORLD_SIZE" not in found:
        return None
    missing = [name for name in VARIABLES if name not in found]
    if missing:
        raise ValueError(
            f"the launcher set {', '.join(found)} but not {', '.join(missing)}: use torchrun, or set them all"
        )
    local_size = os.environ.get("LOCAL_WORLD_SIZE")
    return World(
        rank=int(found["RANK"]),
        size=int(found["WORLD_SIZE"]),
        local_rank=int(found["LOCAL_RANK"]),
        local_size=int(local_size) if local_size else None,
    )


def device_of(world: World, device: torch.device) -> torch.device:
    """The process's own device: of several GPUs on a machine each process takes one."""
    if world.size == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise ValueError(f"device {device}: each of {world.size} processes takes a GPU of its own: pass cuda")
    return torch.device("cuda", world.local_rank)


@contextmanager
def joined(world: World, device: torch.device) -> Iterator[None]:
    """Join the processes of `world` for the block, and part them after it.

    When one fails, the others end too and say nothing: the error that a person sees is the first one.
    """
    if world.size == 1:
        yield
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend, store=_store(world), rank=world.rank, world_size=world.size, timeout=PATIENCE
    )
    try:
        yield
        world.wait()  # nobody leaves while another still talks to it
    except AgreedStop:
        raise
    except Exception as error:
        if not _is_first_to_fail(world):
            raise SystemExit(1) from None
        if _is_of_the_network(error):
            raise PeerLost(
                f"process {world.rank} lost another one of {world.size}: it was killed, or its machine"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def _store(world: World) -> Store:
    """What the processes tell each other their addresses by; torchrun's outlives those that it starts again."""
    store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=PATIENCE))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"attempt-{attempt}", store)  # or they would look for the dead ones' addresses


def _is_first_to_fail(world: World) -> bool:
    """Whether no other process failed before, as far as this one can tell: a store may be gone with its process."""
    try:
        store = dist.distributed_c10d._get_default_store()
        first: Any = store.compare_set(FAILED, "", str(world.rank))
    except RuntimeError:
        return True
    return bool(first.decode() == str(world.rank))


def _is_of_the_network(error: Exception) -> bool:
    # gloo's errors have no type of their own
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))
