"""Flax's msgpack checkpoints, read without JAX: names, shapes and places of the arrays at once, their numbers one by one.

Source: flax.serialization (MIT): a map of maps, whose arrays are msgpack's extension 1: (shape, dtype, bytes) packed
again. Only what such files hold is read; sizes are compared with the file's before anything is allocated.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

MAX_ARRAYS = 20_000
MAX_NAME = 512
MAX_DEPTH = 16
ARRAY = 1  # the extension that holds an array
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int32": torch.int32,
    "int64": torch.int64,
}


@dataclass(frozen=True)
class FlaxArray:
    """An array's place in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    file: BinaryIO

    def read(self) -> Tensor:
        """Read the array as a tensor of its own."""
        data = bytearray(prod(self.shape) * self.dtype.itemsize)
        self.file.seek(self.start)
        if self.file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise ValueError("an array is cut short")
        return torch.frombuffer(data, dtype=self.dtype).view(self.shape)


def is_msgpack(head: bytes) -> bool:
    """Tell whether a file begins as a map of msgpack with a text key."""
    skipped = {0xDE: 3, 0xDF: 5}.get(head[0], 1 if 0x81 <= head[0] <= 0x8F else 0) if head else 0
    return (
        bool(skipped)
        and len(head) > skipped
        and (0xA1 <= head[skipped] <= 0xBF or head[skipped] in (0xD9, 0xDA))
    )


@contextmanager
def read_msgpack(path: Path) -> Iterator[dict[str, FlaxArray]]:
    """Open a checkpoint: its arrays by dotted name; ValueError, one line, for a damaged or foreign file."""
    with path.open("rb") as file:
        n_bytes = file.seek(0, 2)
        file.seek(0)
        arrays: dict[str, FlaxArray] = {}
        try:
            _read_map(file, "", arrays, n_bytes, 0)
        except (ValueError, struct.error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a Flax checkpoint, or is damaged: {error}") from None
        yield arrays


def _read_map(file: BinaryIO, prefix: str, arrays: dict[str, FlaxArray], n_bytes: int, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError("its maps are nested too deeply")
    for _ in range(_length(file, _byte(file), {0xDE: "H", 0xDF: "I"}, 0x80, 0x8F)):
        name = prefix + _text(file, _byte(file))
        tag = _byte(file)
        if 0x80 <= tag <= 0x8F or tag in (0xDE, 0xDF):
            file.seek(-1, 1)
            _read_map(file, f"{name}.", arrays, n_bytes, depth + 1)
        elif tag in (0xC7, 0xC8, 0xC9):
            arrays[name] = _read_array(file, tag, n_bytes)
            if len(arrays) > MAX_ARRAYS:
                raise ValueError(f"it has more than {MAX_ARRAYS} arrays")
        elif tag == 0xC0 or tag <= 0x7F:  # nothing, or a small number such as a step count
            continue
        else:
            raise ValueError(f"{name[:80]} is of msgpack's type {tag:#x}, which is not read")


def _read_array(file: BinaryIO, tag: int, n_bytes: int) -> FlaxArray:
    (size,) = _unpack(file, {0xC7: "B", 0xC8: "H", 0xC9: "I"}[tag])
    kind = _byte(file)
    end = file.tell() + size
    if kind != ARRAY or end > n_bytes:
        raise ValueError("an array is cut short, or of another kind")
    if _length(file, _byte(file), {}, 0x90, 0x9F) != 3:
        raise ValueError("an array is not a shape, a dtype and numbers")
    shape = tuple(_number(file) for _ in range(_length(file, _byte(file), {}, 0x90, 0x9F)))
    dtype = DTYPES.get(_text(file, _byte(file)))
    if dtype is None:
        raise ValueError("an array has a dtype that is not read")
    tag = _byte(file)
    if tag not in (0xC4, 0xC5, 0xC6):
        raise ValueError("an array has no numbers")
    (n_data,) = _unpack(file, {0xC4: "B", 0xC5: "H", 0xC6: "I"}[tag])
    start = file.tell()
    if n_data != prod(shape) * dtype.itemsize or start + n_data != end:
        raise ValueError(f"an array of shape {list(shape)} has {n_data} bytes")
    file.seek(end)
    return FlaxArray(shape, dtype, start, file)


def _number(file: BinaryIO) -> int:
    tag = _byte(file)
    if tag <= 0x7F:
        return tag
    if tag not in (0xCC, 0xCD, 0xCE):
        raise ValueError("a shape is not one of numbers")
    (number,) = _unpack(file, {0xCC: "B", 0xCD: "H", 0xCE: "I"}[tag])
    return int(number)


def _text(file: BinaryIO, tag: int) -> str:
    size = _length(file, tag, {0xD9: "B", 0xDA: "H"}, 0xA0, 0xBF)
    if size > MAX_NAME:
        raise ValueError(f"a name of {size} characters")
    return _take(file, size).decode()


def _length(file: BinaryIO, tag: int, wide: dict[int, str], low: int, high: int) -> int:
    """Return the length that a tag says, or the number behind it."""
    if low <= tag <= high:
        return tag - low
    if tag not in wide:
        raise ValueError(f"unexpected type {tag:#x}")
    (length,) = _unpack(file, wide[tag])
    return int(length)


def _unpack(file: BinaryIO, code: str) -> tuple[int, ...]:
    return struct.unpack(f">{code}", _take(file, struct.calcsize(code)))


def _byte(file: BinaryIO) -> int:
    return _take(file, 1)[0]


def _take(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise ValueError("it is cut short")
    return data
