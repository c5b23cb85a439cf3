"""The files of a data set, on this machine or at an address: one way to list, find and read them.

Addresses such as s3://bucket/folder go through fsspec. Nothing is downloaded whole: tar shards and parquet tables are
read where they lie, a range of bytes at a time.
"""

import os
import posixpath
import stat
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

PROTOCOLS = ("s3", "gs", "gcs", "http", "https", "hf", "memory")
# Files by which a folder that this program wrote is known: a model, a finished or begun run, encoded tokens, a selection.
OWN_FILES = ("model_index.json", "run/config.json", "stages.json", "store.json", "selection.json")

T = TypeVar("T")


class State(NamedTuple):
    """What tells without reading whether a file was touched since."""

    n_bytes: int
    mark: str  # times of the last change in ns, or what the server gives (ETag); "": nothing


def is_address(path: str | Path) -> bool:
    """Whether a path is an address that fsspec reads."""
    return "://" in str(path)


def join(root: str, name: str) -> str:
    """The path of the file `name` ("/"-separated) below `root`."""
    return f"{root.rstrip('/')}/{name}" if is_address(root) else os.path.join(root, name)


def open_binary(path: str) -> BinaryIO:
    """Open a file for reading, seekable; OSError when it cannot be read."""
    if not is_address(path):
        return open(path, "rb")
    return cast(BinaryIO, _remotely(path, lambda system: system.open(path, "rb")))


def read_bytes(path: str, offset: int | None = None, n_bytes: int = 0) -> bytes:
    """A whole file, or `n_bytes` from `offset`; OSError when it cannot be read or ends early."""
    if is_address(path):
        end = None if offset is None else offset + n_bytes
        data: bytes = _remotely(path, lambda system: system.cat_file(path, start=offset, end=end))
    else:
        with open(path, "rb") as file:
            file.seek(offset or 0)
            data = file.read() if offset is None else file.read(n_bytes)
    if offset is not None and len(data) != n_bytes:
        raise OSError(f"{path} ended early")
    return data


def state_of(path: str) -> State | None:
    """Size and mark of a regular file; None where there is none."""
    if is_address(path):
        try:
            info = _remotely(path, lambda system: system.info(path))
        except OSError:
            return None
        if info.get("type") != "file":
            return None
        names = ("ETag", "etag", "blob_id", "LastModified", "mtime", "updated", "md5Hash", "created")
        return State(int(info.get("size") or 0), next((str(info[n]) for n in names if info.get(n)), ""))
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL character in the name
        return None
    # the time of the inode's last change too: a program that writes into a file may set the other one back
    mark = f"{status.st_mtime_ns}-{status.st_ctime_ns}"
    return State(status.st_size, mark) if stat.S_ISREG(status.st_mode) else None


def is_folder(path: str) -> bool:
    """Whether a path is a folder; OSError for an address that cannot be reached."""
    if not is_address(path):
        return os.path.isdir(path)
    if path.startswith(("http://", "https://")):
        return False  # a listing in HTML is no folder
    return bool(_remotely(path, lambda system: system.isdir(path)))


def _remotely(address: str, act: Callable[[Any], T]) -> T:
    """What `act` makes of the file system of an address; OSError or ValueError in place of the libraries' errors."""
    protocol = address.split("://", 1)[0]
    if protocol not in PROTOCOLS or "::" in address:
        raise ValueError(f"{address}: {protocol}:// is not read: use {', '.join(PROTOCOLS[:5])}, or a folder")
    import fsspec

    try:
        return act(fsspec.core.url_to_fs(address)[0])
    except ImportError as error:
        raise ValueError(f"{address} needs a library: pip install 'dalle[remote]' ({error})") from error
    except Exception as error:  # the clients raise errors of many libraries
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{address} cannot be read: {type(error).__name__}: {reason}") from error


def normal(name: str) -> str:
    """A name as it is compared: in Unicode's composed form, whatever form its file system keeps."""
    return unicodedata.normalize("NFC", name)


@dataclass
class Files:
    """The files below a root, by "/"-separated path; hidden ones and what this program wrote are left out."""

    root: str
    sizes: Mapping[str, int] = field(default_factory=dict)  # bytes; sorted by path
    is_listed: bool = False  # whether `sizes` are all files there are; else others are looked for one by one
    notes: list[str] = field(default_factory=list)  # what was left out, one line each
    _normal: dict[str, str] = field(default_factory=dict)

    def path(self, name: str) -> str:
        """Where a file lies."""
        return join(self.root, name)

    def read(self, name: str) -> bytes:
        """A whole file."""
        return read_bytes(self.path(name))

    def find(self, name: str) -> tuple[str, int] | None:
        """The name that a file really has, and its size in bytes, whatever Unicode form `name` is written in."""
        name = posixpath.normpath(name)
        if name in self.sizes:
            return name, self.sizes[name]
        if not self._normal and self.sizes:
            self._normal.update({normal(other): other for other in self.sizes})
        known = self._normal.get(normal(name))
        if known is not None:
            return known, self.sizes[known]
        if self.is_listed and is_address(self.root):
            return None
        forms = dict.fromkeys((name, normal(name), unicodedata.normalize("NFD", name)))
        for form in forms:
            found = state_of(self.path(form))
            if found is not None:
                return form, found.n_bytes
        return None


def list_files(root: str, exclude: tuple[str, ...] = ()) -> Files:
    """All files below a folder, sorted.

    Links are followed (a Hub snapshot consists of them), each folder once. Folders that this program wrote, and those
    in `exclude`, are not entered, and noted. OSError for a folder that cannot be read.
    """
    if is_address(root):
        return _list_address(root)
    sizes: dict[str, int] = {}
    notes: list[str] = []
    entered = {os.path.realpath(root)}
    left_out = {os.path.realpath(folder) for folder in exclude}
    for folder, subfolders, names in os.walk(root, onerror=_raise, followlinks=True):
        visible = sorted(name for name in subfolders if not name.startswith("."))
        subfolders.clear()
        for name in visible:
            path = os.path.join(folder, name)
            target = os.path.realpath(path)
            if target in entered:  # else its pictures would come twice, perhaps held out and trained on
                continue
            entered.add(target)
            if target in left_out or is_own(path):
                notes.append(f"{Path(path).relative_to(root).as_posix()}/ was written by dalle: not read")
            else:
                subfolders.append(name)
        for name in names:
            path = os.path.join(folder, name)
            found = state_of(path)
            if found is not None and not name.startswith("."):
                sizes[Path(path).relative_to(root).as_posix()] = found.n_bytes
    return Files(root, dict(sorted(sizes.items())), True, notes)


def is_own(folder: str) -> bool:
    """Whether this program wrote a folder: a model, a run, encoded tokens or a selection."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in OWN_FILES)


def _list_address(root: str) -> Files:
    found = _remotely(root, lambda system: (system, system.find(root, detail=True)))
    system, details = found
    base = str(system._strip_protocol(root)).rstrip("/")
    sizes = {
        str(path)[len(base) + 1 :]: int(info.get("size") or 0)
        for path, info in details.items()
        if info.get("type") == "file" and str(path).startswith(base + "/")
    }
    visible = {
        name: n for name, n in sizes.items() if not any(part.startswith(".") for part in name.split("/"))
    }
    return Files(root, dict(sorted(visible.items())), True)


def _raise(error: OSError) -> None:
    raise error
