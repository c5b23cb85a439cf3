"""What commands share: their common options, where their log goes, how they print."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # loading torch takes a second, which `--help` need not
    import torch
    from rich.console import Console

    from dalle.training.processes import World

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Model = Annotated[
    str | None, typer.Option("--model", help="Model folder or Hub id; the bundled model if left out.")
]
RankerFolder = Annotated[
    str | None,
    typer.Option("--ranker", help="Model folder or Hub id with a CLIP; the model's own if left out."),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16; to draw, int8 too.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or cuda:N; the first GPU if there is one.")
]


def log_to_stderr(quiet: bool = False) -> None:
    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO, format="%(message)s", stream=sys.stderr
    )
    for noisy in ("httpx", "httpx2", "httpcore", "huggingface_hub", "filelock", "PIL", "fontTools"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def device_named(name: str | None) -> torch.device:
    """Return the device of a name; None is the first GPU, or else the CPU. ValueError for one that is not there."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise ValueError(f"device {name!r} is unknown: use cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {name!r}: this machine has no CUDA GPU that torch can use: pass --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r}: this machine has {torch.cuda.device_count()} GPUs, from cuda:0")
    return device


def launched(device: str | None) -> tuple[World, torch.device]:
    """Return this process's place among those of a launcher such as torchrun, and its device; only the main one speaks."""
    from dalle.training.processes import ALONE, device_of, world_of_launcher

    world = world_of_launcher() or ALONE
    if not world.is_main:
        logging.disable(logging.WARNING)
    return world, device_of(world, device_named(device))


def training_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype to train in; ValueError for an unknown one, and for int8."""
    import torch

    from dalle.generation.precision import as_dtype

    dtype = as_dtype(name, device)
    if dtype == torch.int8:
        raise ValueError("dtype int8 is for drawing only: use auto, float32 or bfloat16")
    return dtype


@contextmanager
def trained_on(device: str | None) -> Iterator[tuple[World, torch.device]]:
    """Join the launcher's processes to train on a device; a stop by a signal ends with one line and its exit code."""
    from dalle.training.loop import Stopped
    from dalle.training.memory import keep_freed_memory
    from dalle.training.processes import joined

    world, place = launched(device)
    if place.type == "cpu":
        keep_freed_memory()
    try:
        with joined(world, place):
            yield world, place
    except Stopped as stop:
        if world.is_main:
            say(f"dalle: {stop}")
        raise typer.Exit(128 + stop.signal_number) from None


def print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=True))


def print_folder(folder: Path, as_json: bool) -> None:
    if as_json:
        print_json({"folder": str(folder)})
    else:
        print(folder)


def wide_console() -> Console:
    """Standard output for tables: as wide as the terminal; where there is none, wide enough that no line is folded."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def say(message: str) -> None:
    print(message, file=sys.stderr)


class RowsBar:
    """A progress bar on stderr for `progress(done, total)` callbacks; silent with --json."""

    def __init__(self, name: str, silent: bool) -> None:
        self.name, self.silent = name, silent

    def __enter__(self) -> Callable[[int, int], None]:
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), disable=self.silent or not sys.stderr.isatty())
        self._bar.start()
        task = self._bar.add_task(self.name, total=None)
        return lambda done, total: self._bar.update(task, completed=done, total=total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
