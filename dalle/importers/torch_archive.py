"""Reads what `torch.save` and `torch.jit.save` wrote without running any of it.

A pickle names functions to call; here each name is looked up in a list, and stands for an inert record or a plain
container. The code inside a TorchScript archive is never opened.

The formats read: torch's zip archive (data.pkl + data/KEY) and the older stream of pickles before torch 1.6.
"""

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

import torch
from torch import Tensor

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of torch's older format
Lookup = Callable[
    [str, str], object | None
]  # a name in a pickle, as (module, name) -> its stand-in; None: refused


class Inert:
    """Stands for a named class or function: calling it keeps nothing and does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        # defined so that unpickling never writes attributes of its choice
        raise ValueError(f"unexpected state for {type(self).__name__}")


class Module(Inert):
    """A module of which only the attributes are kept, as data."""

    name = "Module"

    def __init__(self, *_: object) -> None:
        self.state: dict[str, Any] = {}

    def __new__(cls, *_: object) -> "Module":
        module = super().__new__(cls)
        module.state = {}  # unpickling skips __init__
        return module

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise ValueError(f"the state of a module is {kind_of(state)}, not a dict")
        self.state = state


class TensorRecord(Inert):
    """The arguments of `torch._utils._rebuild_tensor_v2`: where in which storage a tensor lies."""

    def __init__(self, storage: object, offset: object, size: object, stride: object, *_: object) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    def read(self, storages: Mapping[str, bytes], path: Path) -> Tensor:
        """A tensor of its own with these values; ValueError when it reaches outside its storage."""
        storage, size, stride = self.storage, self.size, self.stride
        if not isinstance(storage, Storage) or not (_are_counts(size) and _are_counts(stride)):
            raise ValueError(f"{path} holds a damaged tensor")
        data, offset = storages.get(storage.key), self.offset
        if data is None or not isinstance(offset, int) or offset < 0 or len(size) != len(stride) or 0 in size:
            raise ValueError(f"{path} holds a damaged tensor: storage {storage.key}, shape {size}")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        n_stored = len(data) // storage.dtype.itemsize
        # a stride of zero would make a large tensor out of a small file
        if last >= n_stored or math.prod(size) > n_stored:
            raise ValueError(f"{path} is damaged or cut short: storage {storage.key} has {n_stored} numbers")
        flat = torch.frombuffer(bytearray(data), dtype=storage.dtype)
        return flat.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)


class Parameter(Inert):
    """The arguments of `torch._utils._rebuild_parameter`."""

    def __init__(self, tensor: object, *_: object) -> None:
        self.tensor = tensor


class Storage(NamedTuple):
    """A named run of numbers outside the pickle; a tuple, because a pickle cannot alter one."""

    key: str
    dtype: torch.dtype


# What every such pickle may name. It cannot alter types written in C; all others are the records above.
COMMON: dict[tuple[str, str], object] = {
    ("torch._utils", "_rebuild_tensor_v2"): TensorRecord,
    ("torch._utils", "_rebuild_parameter"): Parameter,
    ("torch", "device"): type("device", (Inert,), {}),
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("collections", "OrderedDict"): OrderedDict,
}


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickles into records and plain containers only; ValueError names whatever else a pickle asks for."""

    def __init__(self, file: BinaryIO, path: Path, lookup: Lookup, kind: str) -> None:
        super().__init__(file, encoding="utf-8")
        self.path, self.lookup, self.kind = path, lookup, kind
        self.storages: dict[str, Storage] = {}  # those that were referred to

    def find_class(self, module: str, name: str) -> Any:
        found = COMMON.get((module, name)) or self.lookup(module, name)
        if found is None:
            raise ValueError(f"{self.path} names {module}.{name}, which no {self.kind} does: refused")
        return found

    def persistent_load(self, reference: Any) -> Any:
        if isinstance(reference, tuple) and reference[:1] == ("module",) and len(reference) == 4:
            return reference[
                1
            ]  # older format: a class, already looked up above, and its source code, ignored
        if isinstance(reference, tuple) and reference[:1] == ("storage",) and len(reference) in (5, 6):
            _, dtype, key, _, _ = reference[:5]
            is_whole = len(reference) == 5 or reference[5] is None
            if isinstance(dtype, torch.dtype) and isinstance(key, str) and is_whole:
                return self.storages.setdefault(key, Storage(key, dtype))
        raise ValueError(f"{self.path} refers to outside data in a way that torch.save does not")


# --- the two file formats ---


def read_archive(path: Path, lookup: Lookup, kind: str) -> tuple[object, dict[str, bytes]]:
    """The root record and the bytes of every storage; ValueError for anything that is not torch's.

    `lookup` says what a name beyond `COMMON` stands for; `kind` is what the file should be, for the error.
    """

    def unpickler(file: BinaryIO) -> RestrictedUnpickler:
        return RestrictedUnpickler(file, path, lookup, kind)

    try:
        with path.open("rb") as file:
            read = _read_zip if zipfile.is_zipfile(file) else _read_legacy
            return read(file, path, unpickler)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is not a file of torch.save, or is damaged: {error}") from error
    except Exception as error:  # a hostile pickle can make the unpickler raise anything
        raise ValueError(f"{path} is not a file of torch.save, or is damaged: {kind_of(error)}") from error


def _read_zip(
    file: BinaryIO, path: Path, unpickler: Callable[[BinaryIO], RestrictedUnpickler]
) -> tuple[object, dict[str, bytes]]:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        pickles = [e.filename for e in entries if e.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{path} is a zip archive, but not one of torch.save: it has no data.pkl")
        prefix = pickles[0].removesuffix("data.pkl")
        folder, order = prefix + "data/", prefix + "byteorder"
        read = {
            e.filename: e for e in entries if e.filename in (*pickles, order) or e.filename.startswith(folder)
        }
        # torch stores without compression (but for TorchScript's code): nothing read here is larger than the file
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in read.values()):
            raise ValueError(f"{path} is a compressed archive; torch.save does not compress")
        if order in read and archive.read(order) != b"little":
            raise ValueError(f"{path} was written on a big-endian machine; only little-endian files are read")
        root = unpickler(BytesIO(archive.read(pickles[0]))).load()
        return root, {name[len(folder) :]: archive.read(name) for name in read if name.startswith(folder)}


def _read_legacy(
    file: BinaryIO, path: Path, unpickler: Callable[[BinaryIO], RestrictedUnpickler]
) -> tuple[object, dict[str, bytes]]:
    file.seek(0)
    # five pickles on end: magic number, version, the writer's machine, the object, the storages' keys
    readers = [unpickler(file) for _ in range(5)]
    magic, _, machine, root, keys = (reader.load() for reader in readers)
    if magic != LEGACY_MAGIC:
        raise ValueError(f"{path} is not a file of torch.save")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError(f"{path} was written on a big-endian machine; only little-endian files are read")
    storages: dict[str, bytes] = {}
    n_bytes = {key: storage.dtype.itemsize for key, storage in readers[3].storages.items()}
    for key in keys:
        (n_numbers,) = struct.unpack("<q", file.read(8))
        if n_numbers < 0 or key not in n_bytes:
            raise ValueError(f"{path} is damaged at storage {key}")
        storages[key] = file.read(n_numbers * n_bytes[key])
    return root, storages


def _are_counts(values: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(values, tuple) and all(type(value) is int and value >= 0 for value in values)


def kind_of(value: object) -> str:
    """What a value is, for an error line."""
    return f"a {type(value).__name__}"
