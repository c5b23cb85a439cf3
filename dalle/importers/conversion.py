"""Published weights under this package's names, written one shard after another.

What a component is made of is a table: each of our tensors, from which of theirs, and how. The table is checked against
the model and the file, shapes too, before the first number is read. A shard that is written stays: the same command goes
on after it. At most one shard and the largest tensor are in memory.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dalle.config import Config
from dalle.files import write_json
from dalle.importers.tensor_files import TensorFile
from dalle.manifest import CONFIG
from dalle.published.saved import SavedModule, shard_name
from dalle.weights import WEIGHTS, save_tensors

logger = logging.getLogger(__name__)

# What trains with an image tokenizer reads it as one file; the largest takes 400 MB.
WHOLE = 2**62
SHARD_BYTES = 2**28  # of a shard's tensors; writing one takes twice that
Progress = Callable[[int, int], None]  # bytes written, of how many
Make = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Piece:
    """One of our tensors: from which of theirs, and how; the default takes the only one as it is."""

    sources: tuple[str, ...]
    make: Make = lambda tensors: tensors[0]


def transposed(name: str) -> Piece:
    """Take a matrix the other way round."""
    return Piece((name,), lambda tensors: tensors[0].T)


def rows(name: str, start: int | None, stop: int | None) -> Piece:
    """Take rows start .. stop - 1 of a tensor."""
    return Piece((name,), lambda tensors: tensors[0][start:stop])


def stacked(*names: str) -> Piece:
    """Lay tensors below each other."""
    return Piece(names, lambda tensors: torch.cat(list(tensors)))


def reshaped(name: str, *shape: int) -> Piece:
    """Take a tensor in another shape."""
    return Piece((name,), lambda tensors: tensors[0].reshape(shape))


@dataclass(frozen=True)
class Conversion:
    """How one component's weights come out of an open file."""

    file: TensorFile
    model: SavedModule  # on the meta device: only its names and shapes count
    pieces: Mapping[str, Piece]
    ignored: Callable[[str], bool] = lambda name: False  # their tensors that have no place here
    dtype: torch.dtype | None = None  # of the floating tensors; None: as stored

    def check(self) -> None:
        """Raise ValueError where names or shapes of file, table and model disagree; no number is read."""
        path = self.file.path
        own = self.model.state_dict()
        missing = [name for name in own if name not in self.pieces]
        assert not missing, f"no source for {missing[:4]}"
        used = {source for piece in self.pieces.values() for source in piece.sources}
        absent = sorted(name for name in used if name not in self.file.tensors)
        if absent:
            raise ValueError(f"{path} lacks {_listed(absent)}: it is another model, or cut short")
        extra = sorted(name for name in self.file.tensors if name not in used and not self.ignored(name))
        if extra:
            raise ValueError(f"{path} holds {_listed(extra)}, which no {type(self.model).__name__} has")
        for name, piece in self.pieces.items():
            try:
                shape = self._meta(piece).shape
            except (RuntimeError, IndexError) as error:
                raise ValueError(f"{path}: {', '.join(piece.sources)[:200]} are misshapen") from error
            if shape != own[name].shape:
                raise ValueError(
                    f"{path}: {piece.sources[0]} gives {list(shape)} where {list(own[name].shape)} is needed"
                )

    def sizes(self) -> dict[str, int]:
        """Return the bytes that each tensor will take."""
        return {name: (x := self._meta(piece)).numel() * x.itemsize for name, piece in self.pieces.items()}

    def make(self, name: str) -> Tensor:
        """Read and convert one tensor."""
        piece = self.pieces[name]
        return self._cast(piece.make([self.file[source].read() for source in piece.sources]))

    def _meta(self, piece: Piece) -> Tensor:
        entries = [self.file[source] for source in piece.sources]
        return self._cast(piece.make([torch.empty(e.shape, dtype=e.dtype, device="meta") for e in entries]))

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor if self.dtype is None or not tensor.is_floating_point() else tensor.to(self.dtype)


def on_meta(model: type[SavedModule], config: Config) -> SavedModule:
    """Build a model that has names and shapes but no numbers."""
    with torch.device("meta"):
        return model(config)


def write_converted(
    conversion: Conversion, folder: Path, progress: Progress | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a component's folder: config.json, and its weights in one file or in shards.

    Shards that are there already are kept, so that the same call goes on where another one stopped. Raises ValueError as
    `Conversion.check`, OSError where the disk refuses.
    """
    conversion.check()
    folder.mkdir(parents=True, exist_ok=True)
    sizes = conversion.sizes()
    shards = split_into_shards(sizes, shard_bytes)
    done, total = 0, sum(sizes.values())
    for number, names in enumerate(shards, start=1):
        path = folder / (WEIGHTS if len(shards) == 1 else shard_name(number, len(shards)))
        if not path.exists():  # written whole or not at all
            save_tensors(path, {name: conversion.make(name) for name in names})
        done += sum(sizes[name] for name in names)
        if progress is not None:
            progress(done, total)
    write_json(folder / CONFIG, conversion.model.config.model_dump(mode="json"))


def split_into_shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Split names into lists of at most `most` bytes each; a larger tensor stands alone."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > most:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def renamed(names: Iterable[str], rename: Callable[[str], str | None]) -> dict[str, Piece]:
    """Make a table of tensors that only change their names; None leaves one out."""
    table: dict[str, Piece] = {}
    for name in names:
        ours = rename(name)
        if ours is not None:
            table[ours] = Piece((name,))
    return table


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return json.dumps(list(names[:3]))[1:-1] + more
