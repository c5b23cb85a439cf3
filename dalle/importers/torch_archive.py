"""Reads what `torch.save` and `torch.jit.save` wrote without running any of it, one tensor at a time.

The formats read: torch's zip archive (data.pkl + data/KEY) and the older stream of pickles before torch 1.6. The code
inside a TorchScript archive is never opened. Sizes, overlaps and offsets are compared with the file's own size before
anything is allocated.
"""

import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeGuard

import torch
from torch import Tensor

from dalle.importers.restricted_pickle import (
    MAX_KEY,
    MAX_PICKLE_BYTES,
    Lookup,
    RestrictedUnpickler,
    Storage,
    TensorRecord,
    kind_of,
)

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of torch's older format
MAX_DIRECTORY = 2**21  # bytes of a zip archive's list of entries: 20,000 of them or more
LOCAL_HEADER = 30  # bytes before an entry's name, whose length and that of the extra field are the last four
MAX_DIMENSIONS = 8
MAX_ALIASING = 32  # times the file's size that its tensors may add up to: layers that share weights


class Extent(NamedTuple):
    """Where in the file a storage lies."""

    start: int
    n_bytes: int
    crc: int | None  # of all of it; None: not recorded


class Archive:
    """An open file of `torch.save`: its root record, and its tensors to be read one by one."""

    def __init__(self, file: BinaryIO, path: Path, root: object, extents: dict[str, Extent]) -> None:
        self.path, self.root = path, root
        self._file, self._extents = file, extents

    def shape(self, record: TensorRecord) -> tuple[int, ...]:
        """Return a tensor's shape; ValueError when it reaches outside its storage."""
        return self._locate(record)[1]

    def dtype(self, record: TensorRecord) -> torch.dtype:
        """Return a tensor's dtype; ValueError for a damaged record."""
        return self._storage(record).dtype

    def read(self, record: TensorRecord) -> Tensor:
        """Read a tensor of its own; ValueError when it reaches outside its storage, or the file is damaged."""
        extent, size, stride, offset, n_read = self._locate(record)
        storage = self._storage(record)
        itemsize = storage.dtype.itemsize
        data = bytearray(n_read * itemsize)
        self._file.seek(extent.start + offset * itemsize)
        if self._file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise ValueError(f"{self.path} is damaged or cut short at storage {storage.key}")
        if extent.crc is not None and len(data) == extent.n_bytes and zlib.crc32(data) != extent.crc:
            raise ValueError(
                f"{self.path} is damaged: storage {storage.key} does not agree with its checksum"
            )
        tensor = torch.frombuffer(data, dtype=storage.dtype).as_strided(size, stride)
        return tensor if tensor.is_contiguous() else tensor.contiguous()

    def check_total(self, records: list[TensorRecord]) -> None:
        """Raise ValueError where tensors add up to far more than the file holds."""
        total = sum(math.prod(self.shape(record)) * self.dtype(record).itemsize for record in records)
        n_held = sum(extent.n_bytes for extent in self._extents.values())
        if total > MAX_ALIASING * n_held:
            raise ValueError(
                f"{self.path}: its tensors would take {total:,} bytes; the file holds {n_held:,}"
            )

    def _storage(self, record: TensorRecord) -> Storage:
        if not isinstance(record.storage, Storage):
            raise ValueError(f"{self.path} holds a damaged tensor")
        return record.storage

    def _locate(self, record: TensorRecord) -> tuple[Extent, tuple[int, ...], tuple[int, ...], int, int]:
        """Find the extent, shape, strides, offset and number of stored numbers that a tensor spans."""
        storage, size, stride, offset = self._storage(record), record.size, record.stride, record.offset
        if not (_are_counts(size) and _are_counts(stride) and len(size) == len(stride)):
            raise ValueError(f"{self.path} holds a damaged tensor")
        extent = self._extents.get(storage.key)
        if extent is None or type(offset) is not int or offset < 0 or 0 in size:
            raise ValueError(f"{self.path} holds a damaged tensor: storage {storage.key}")
        span = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        n_stored = extent.n_bytes // storage.dtype.itemsize
        # a stride of zero would make a large tensor out of a small file
        if offset + span > n_stored or math.prod(size) > n_stored:
            raise ValueError(
                f"{self.path} is damaged or cut short: storage {storage.key} has {n_stored} numbers"
            )
        return extent, size, stride, offset, span


@contextmanager
def open_archive(path: Path, lookup: Lookup, kind: str) -> Iterator[Archive]:
    """Open a file of `torch.save`; ValueError, one line, for anything else.

    `lookup` says what a name beyond `COMMON` stands for; `kind` is what the file should be, for the error.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    with file:
        try:
            n_bytes = file.seek(0, 2)
            is_zip = zipfile.is_zipfile(file)
            root, extents = (_read_zip if is_zip else _read_legacy)(file, n_bytes, path, lookup, kind)
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
        except ValueError as error:
            if str(path) in str(error):
                raise
            raise ValueError(f"{path} is not a file of torch.save, or is damaged: {error}") from error
        except Exception as error:  # a hostile file can make the readers raise anything
            raise ValueError(
                f"{path} is not a file of torch.save, or is damaged: {kind_of(error)}"
            ) from error
        yield Archive(file, path, root, extents)


class _Directory:
    """A zip archive's file while its list of entries is read: no read larger than a list may be."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_DIRECTORY:
            if size < 0:  # the search for the end record, in the last 64 kB
                return self._file.read(2**17)
            raise ValueError(f"{self._path}: a list of entries of {size:,} bytes; at most {MAX_DIRECTORY:,}")
        return self._file.read(size)


def _read_zip(
    file: BinaryIO, n_bytes: int, path: Path, lookup: Lookup, kind: str
) -> tuple[object, dict[str, Extent]]:
    with zipfile.ZipFile(_Directory(file, path)) as archive:
        entries = archive.infolist()
    pickles = [e.filename for e in entries if e.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"{path} is a zip archive, but not one of torch.save: it has no data.pkl")
    prefix = pickles[0].removesuffix("data.pkl")
    folder, order = prefix + "data/", prefix + "byteorder"
    extents: dict[str, Extent] = {}
    ordered = sorted(entries, key=lambda entry: entry.header_offset)
    ends = [entry.header_offset for entry in ordered[1:]] + [n_bytes]
    for entry, end in zip(ordered, ends, strict=True):
        name = entry.filename
        if not (name in (pickles[0], order) or name.startswith(folder)):
            continue
        # torch stores without compression (but for TorchScript's code): nothing read here is larger than the file
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError(f"{path} is a compressed archive; torch.save does not compress")
        extents[name] = _stored(file, entry, end, path)
    if order in extents and _whole(file, extents.pop(order), 16) != b"little":
        raise ValueError(f"{path} was written on a big-endian machine; only little-endian files are read")
    data = _whole(file, extents.pop(pickles[0]), MAX_PICKLE_BYTES)
    root = RestrictedUnpickler(BytesIO(data), len(data), path, lookup, kind).load()
    return root, {name.removeprefix(folder): extent for name, extent in extents.items()}


def _stored(file: BinaryIO, entry: zipfile.ZipInfo, end: int, path: Path) -> Extent:
    """Find an entry's bytes; ValueError where they run into the next entry or past the file's end."""
    file.seek(entry.header_offset)
    header = file.read(LOCAL_HEADER)
    if len(header) < LOCAL_HEADER or header[:4] != b"PK\3\4":
        raise ValueError(f"{path} is damaged: entry {entry.filename[:80]} has no header")
    n_name, n_extra = struct.unpack("<HH", header[-4:])
    start = entry.header_offset + LOCAL_HEADER + n_name + n_extra
    if start + entry.file_size > end:
        raise ValueError(f"{path} is damaged: entry {entry.filename[:80]} overlaps another or the file's end")
    return Extent(start, entry.file_size, entry.CRC)


def _whole(file: BinaryIO, extent: Extent, most: int) -> bytes:
    if extent.n_bytes > most:
        raise ValueError(f"an entry of {extent.n_bytes:,} bytes; at most {most:,} are read")
    file.seek(extent.start)
    data = file.read(extent.n_bytes)
    if zlib.crc32(data) != extent.crc:
        raise ValueError("its pickle does not agree with its checksum")
    return data


def _read_legacy(
    file: BinaryIO, n_bytes: int, path: Path, lookup: Lookup, kind: str
) -> tuple[object, dict[str, Extent]]:
    file.seek(0)
    storages: dict[str, Storage] = {}

    def load() -> object:
        reader = RestrictedUnpickler(file, n_bytes - file.tell(), path, lookup, kind)
        loaded: object = reader.load()
        storages.update(reader.storages)
        return loaded

    # five pickles on end: magic number, version, the writer's machine, the object, the storages' keys
    magic, _, machine, root, keys = (load() for _ in range(5))
    if magic != LEGACY_MAGIC:
        raise ValueError(f"{path} is not a file of torch.save")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError(f"{path} was written on a big-endian machine; only little-endian files are read")
    if not isinstance(keys, list):
        raise ValueError(f"{path} is damaged: it has no list of storages")
    extents: dict[str, Extent] = {}
    for key in keys:
        (n_numbers,) = struct.unpack("<q", file.read(8))
        if not isinstance(key, str) or len(key) > MAX_KEY or key not in storages or key in extents:
            raise ValueError(f"{path} is damaged: its storages are not those that it names")
        size = n_numbers * storages[key].dtype.itemsize
        if not 0 <= size <= n_bytes - file.tell():
            raise ValueError(f"{path} is damaged or cut short at storage {key}")
        extents[key] = Extent(file.tell(), size, None)
        file.seek(size, 1)
    return root, extents


def _are_counts(values: object) -> TypeGuard[tuple[int, ...]]:
    return (
        isinstance(values, tuple)
        and len(values) <= MAX_DIMENSIONS
        and all(type(value) is int and 0 <= value < 2**48 for value in values)
    )
