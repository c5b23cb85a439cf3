"""Other people's weight files, opened: names, shapes and dtypes at once, tensors one by one.

Formats: `torch.save` (see `torch_archive`), safetensors, and Flax's msgpack. Of a pickle, names of tensors' classes alone
are read; whatever else it names needs the caller's leave, and stands for nothing even then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dalle.importers.flax_msgpack import is_msgpack, read_msgpack
from dalle.importers.restricted_pickle import Opaque, Parameter, TensorRecord, kind_of
from dalle.importers.torch_archive import open_archive
from dalle.weights import DTYPES

MAX_DEPTH = 16  # of nested dicts
WRAPPERS = (
    "state_dict",
    "weights",
    "model",
    "module",
    "params",
)  # keys that checkpoints keep their tensors under


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file, not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class TensorFile:
    """An open file: its tensors by dotted name, and the plain data beside them."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    beside: Mapping[str, Any]  # what a checkpoint's dict holds besides its weights

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; ValueError where there is none of this name."""
        return self[name].shape

    def __getitem__(self, name: str) -> TensorEntry:
        try:
            return self.tensors[name]
        except KeyError:
            raise ValueError(
                f"{self.path} has no tensor {name}: it is of another model, or of another version"
            ) from None


@contextmanager
def open_tensors(path: Path, kind: str, allow_pickle: bool = False) -> Iterator[TensorFile]:
    """Open a weight file of any of the formats; `kind` is what it should be, for errors.

    Raises ValueError, one line, for a file that is damaged, of another format, or a pickle that names more than tensors
    while `allow_pickle` is False.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected the file of a {kind}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(16)
    if head[8:9] == b"{":
        with _open_safetensors(path) as opened:
            yield opened
    elif is_msgpack(head):
        with read_msgpack(path) as tree:
            entries = {name: TensorEntry(x.shape, x.dtype, x.read) for name, x in tree.items()}
            yield TensorFile(path, entries, {})
    else:
        with open_archive(path, _lookup(path, allow_pickle), kind) as archive:
            root, beside = archive.root, {}
            if isinstance(root, dict) and not any(
                isinstance(x, TensorRecord | Parameter) for x in root.values()
            ):
                key = next((key for key in WRAPPERS if key in root), None)
                if key is not None:
                    beside = {name: value for name, value in root.items() if name != key}
                    root = root[key]
                if isinstance(root, str):
                    raise ValueError(f"{path} is DeepSpeed's auxiliary file: the weights lie elsewhere")
            records = flatten(root, path, kind)
            archive.check_total(list(records.values()))
            entries = {
                name: TensorEntry(archive.shape(record), archive.dtype(record), partial(archive.read, record))
                for name, record in records.items()
            }
            yield TensorFile(path, entries, beside)


def flatten(root: object, path: Path, kind: str) -> dict[str, TensorRecord]:
    """Name the tensors of nested dicts by dotted paths; ValueError where there are none."""
    if not isinstance(root, dict):
        raise ValueError(f"{path} holds {kind_of(root)}; expected the weights of a {kind}")
    records: dict[str, TensorRecord] = {}
    waiting: list[tuple[str, dict[Any, Any], int]] = [("", root, 0)]
    seen = {id(root)}
    while waiting:
        prefix, owner, depth = waiting.pop()
        for name, value in owner.items():
            value = value.tensor if isinstance(value, Parameter) else value
            if isinstance(value, TensorRecord):
                records[f"{prefix}{name}"] = value
            elif isinstance(value, dict) and id(value) not in seen and depth < MAX_DEPTH:
                seen.add(id(value))
                waiting.append((f"{prefix}{name}.", value, depth + 1))
    if not records:
        raise ValueError(f"{path} holds no tensors; expected the weights of a {kind}")
    return records


@contextmanager
def _open_safetensors(path: Path) -> Iterator[TensorFile]:
    try:
        with safe_open(path, framework="pt") as file:
            entries = {}
            for name in file.keys():
                part = file.get_slice(name)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise ValueError(f"{path}: tensor {name} has dtype {part.get_dtype()}, which is not read")
                entries[name] = TensorEntry(tuple(part.get_shape()), dtype, partial(file.get_tensor, name))
            yield TensorFile(path, entries, {})
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({' '.join(str(error).split())})") from None


def _lookup(path: Path, allow_pickle: bool) -> Callable[[str, str], object | None]:
    def lookup(module: str, name: str) -> object | None:
        if allow_pickle:
            return Opaque
        raise ValueError(
            f"{path} names {module}.{name}: it holds more than tensors. Pass --allow-pickle to read its tensors alone"
            " (no code in it is run)"
        )

    return lookup
