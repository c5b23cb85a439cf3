"""Runs a function in several processes that are joined as `torchrun` would join them, over gloo on this machine."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing import start_processes

from dalle.training.processes import World

# Imported once, by the process that all others are forks of: importing is most of what a short-lived process does.
IMPORTED = ("torch._dynamo", "tensorboard.compat.proto.event_pb2", "dalle.training.stages", "tests.tiny")


def spawn(n: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What `function(world, *arguments)` returns in each of `n` processes; it must be of a module's top level."""
    folder.mkdir(parents=True, exist_ok=True)
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(IMPORTED))
    start_processes(_one, (n, str(folder), function, arguments), nprocs=n, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(n)]


def learned(name: str, weight: Tensor) -> Tensor:
    """A weight without the biases of keys: softmax cancels them, so their gradient is rounding errors and nothing else.

    Adam makes whole steps of such errors, and in fp32 no two ways of summing have the same ones.
    """
    if not name.endswith(("qkv.bias", "in_proj_bias")):
        return weight
    queries, _, values = weight.chunk(3)
    return torch.cat([queries, values])


def _one(rank: int, n: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=n, store=dist.FileStore(f"{folder}/store", n))
    result = function(World(rank, n), *arguments)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()
