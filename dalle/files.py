"""Files: writes that are whole or not at all, and reads that name what is wrong.

A write goes to a temporary sibling, is synced and renamed over the old file, then the folder is synced: a crash leaves
the old or the new file.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_JSON = 64 * 1024 * 1024  # bytes of a JSON file that is read: far above any of ours, far below any memory

# Atomic writes


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file atomically, with the mode that the umask gives, making the folders above it.

    Raises ValueError where `path` is anything but a regular file; OSError where the disk refuses, the old
    file kept.
    """
    path = Path(path)
    is_replacing = _check_replaceable(path)
    temporary = _temporary(path)
    try:
        _make_folder(path.parent)
        # 0o666 less the umask, as for any new file; O_EXCL refuses a link that somebody put there.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _write_error(path, error, "the old file is kept" if is_replacing else "") from error
        raise
    _sync_parent(path)


def write_json(path: str | Path, tree: object) -> None:
    """Write `tree` as indented JSON; ValueError for NaN and infinity, and the errors of `write_bytes`."""
    text = json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False)
    # UTF-8 has no lone surrogates; Python's escape of one is JSON's.
    write_bytes(path, (text + "\n").encode(errors="backslashreplace"))


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `path`, synced, when the block ends; an error removes it.

    Raises ValueError where `path` exists and is not an empty folder, OSError where the disk refuses.
    """
    path = Path(path)
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"cannot write {path}: it exists already: remove it or choose another folder")
    temporary = _temporary(path)
    try:
        _make_folder(path.parent)
        temporary.mkdir()
    except OSError as error:
        raise _write_error(path, error) from error
    try:
        yield temporary
        _rename_synced(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_parent(path)


def publish_folder(temporary: str | Path, path: str | Path) -> None:
    """Give a folder that several processes have filled its name, synced. Raises OSError where the disk refuses."""
    _rename_synced(Path(temporary), Path(path))
    _sync_parent(Path(path))


# Checked reads


def read_json(path: str | Path) -> Any:
    """Read a JSON file of at most `MAX_JSON` bytes; ValueError names one that is missing, larger, or not JSON."""
    path = existing_file(path)
    with path.open("rb") as file:
        data = file.read(MAX_JSON + 1)
    return parse_json(data, str(path))


def parse_json(data: bytes, source: str) -> Any:
    """Parse UTF-8 JSON of at most `MAX_JSON` bytes; ValueError, one line that begins with `source`."""
    if len(data) > MAX_JSON:
        raise ValueError(f"{source}: larger than {MAX_JSON} bytes: not a JSON file of ours")
    try:
        return json.loads(data.decode(), parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not valid JSON: line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{source}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{source}: not valid JSON: {error}") from None


def file_sha256(path: str | Path) -> str:
    """Hash a file's bytes: 64 hex digits; ValueError for a missing file."""
    with existing_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def existing_file(path: str | Path) -> Path:
    """Return the path of a regular file; ValueError for anything else."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    return path


# Parts of the above


def _check_replaceable(path: Path) -> bool:
    """Say whether there is a file to replace."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _write_error(path, error) from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symbolic link"}
        kind = kinds.get(stat.S_IFMT(mode), "a device, pipe or socket")
        raise ValueError(f"cannot write {path}: it is {kind}, not a regular file: choose another path")
    return True


def _temporary(path: Path) -> Path:
    """Name a sibling for unfinished work: `.NAME.RANDOM.tmp`; only a killed process leaves one behind."""
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.tmp")


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:  # one call writes 2 GiB at most
        view = view[os.write(descriptor, view) :]


def _rename_synced(temporary: Path, path: Path) -> None:
    try:
        for folder, _, files in os.walk(temporary, topdown=False):
            for name in files:
                _sync(Path(folder, name))
            _sync(Path(folder))
        os.rename(temporary, path)
    except OSError as error:
        raise _write_error(path, error) from error


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync folders; a file's own sync must not fail.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _sync_parent(path: Path) -> None:
    try:
        _sync(path.parent)
    except OSError as error:
        raise _write_error(path, error, "the new one is in place, but a power cut may undo it") from error


def _write_error(path: Path, error: OSError, outcome: str = "") -> OSError:
    reason = error.strerror or str(error)
    again = OSError(f"cannot write {path}: {reason}{'; ' if outcome else ''}{outcome}")
    again.errno = error.errno  # set by hand, for with it in the constructor the text begins "[Errno 28]"
    return again


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
