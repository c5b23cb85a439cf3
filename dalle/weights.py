"""Weight files: safetensors under a manifest of sha256 sums; every read is checked, every write is atomic.

Source: the safetensors format (github.com/huggingface/safetensors). A write goes to a temporary sibling,
is synced and renamed over the old file, then the folder is synced: a crash leaves the old or the new file.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import safetensors.torch
import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn

from dalle.config import C, Config, validate

MANIFEST = "manifest.json"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
MAX_LISTED = 4  # names of wrong tensors that an error line repeats


class ManifestEntry(Config):
    """What a file must be."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)  # size of the file


class Manifest(Config):
    """The files of a model folder, by their path below it with forward slashes."""

    format: Literal[1]
    files: dict[str, ManifestEntry]


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


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors (any device, strides or sharing) as one safetensors file. Errors of `write_bytes`."""
    own: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        # The format has no sharing: tied tensors are written twice, and the library refuses shared memory.
        if copy.untyped_storage().data_ptr() in storages:
            copy = copy.clone()
        storages.add(copy.untyped_storage().data_ptr())
        own[name] = copy
    # The library's own file writer makes files of mode 0600 and does not sync them.
    write_bytes(path, safetensors.torch.save(own, metadata=dict(metadata) if metadata else None))


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
    """Read a JSON file; ValueError names a file that is missing, not UTF-8 or not JSON."""
    path = _existing(path)
    try:
        return json.loads(path.read_bytes().decode(), parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file to CPU tensors, dtypes as stored; ValueError for a missing or damaged file."""
    path = _existing(path)
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a whole safetensors file ({reason}): copy the file again") from None


def file_sha256(path: str | Path) -> str:
    """Hash a file's bytes: 64 hex digits; ValueError for a missing file."""
    with _existing(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes, in the order of the names: 64 hex digits, alike on any device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # bytes: numpy has no bfloat16
    return digest.hexdigest()


# Manifest


def manifest_entry(path: str | Path) -> ManifestEntry:
    """What a manifest says of a file; ValueError for a missing one."""
    path = _existing(path)
    return ManifestEntry(sha256=file_sha256(path), bytes=path.stat().st_size)


def write_manifest(
    folder: str | Path,
    files: Iterable[str] | None = None,
    known: Mapping[str, ManifestEntry] | None = None,
) -> None:
    """Write manifest.json: sha256 and size of `files` (paths below `folder`), and what is `known` already.

    The default is every weight, config and tokenizer file, save those of the training run under `run/`.
    Raises ValueError for a file that is missing or outside the folder. Errors of `write_bytes`.
    """
    folder = Path(folder)
    entries: dict[str, ManifestEntry] = dict(known or {})
    for name in sorted(_model_files(folder) if files is None else files):
        _check_inside(name, f"{folder / MANIFEST}")
        entries[name] = manifest_entry(folder / name)
    write_json(folder / MANIFEST, Manifest(format=1, files=entries).model_dump())


def verify_manifest(folder: str | Path, under: str | None = None) -> None:
    """Check every file that manifest.json lists, or only those below the component `under`.

    Raises ValueError naming the first file that is missing or changed, or a manifest that lists none there.
    """
    folder = Path(folder)
    entries = _read_manifest(folder).files
    if under is not None:
        entries = {name: entry for name, entry in entries.items() if name.startswith(f"{under}/")}
        if not entries:
            raise ValueError(f"{folder / MANIFEST}: lists no file of {under}: write the manifest again")
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path}: missing, but listed in {MANIFEST}: copy the model again")
        damage = f"differs from {MANIFEST} (the file was changed or damaged): copy the model again"
        if path.stat().st_size != entry.bytes:
            raise ValueError(f"{path}: size of {path.stat().st_size} bytes, not {entry.bytes}, {damage}")
        if file_sha256(path) != entry.sha256:
            raise ValueError(f"{path}: sha256 {damage}")


# Components


def save_component(folder: str | Path, config: Config, tensors: Mapping[str, Tensor]) -> None:
    """Write a component's config.json and model.safetensors; then write a manifest beside its folder anew."""
    folder = Path(folder)
    save_tensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, config.model_dump(mode="json"))


def load_component(folder: str | Path, schema: type[C]) -> tuple[C, dict[str, Tensor]]:
    """Read a component's config and tensors (as stored), checked against a manifest.json beside its folder.

    Raises ValueError, one line, for a missing, changed or damaged file and a config that `schema` refuses.
    """
    folder = Path(os.path.abspath(folder)) if Path(folder).name in ("", "..") else Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    model = folder.parent
    if (model / MANIFEST).exists():
        listed = _read_manifest(model).files
        for path in (folder / CONFIG, folder / WEIGHTS):
            if f"{folder.name}/{path.name}" not in listed:
                raise ValueError(f"{path}: not listed in {model / MANIFEST}: write the manifest again")
        verify_manifest(model, under=folder.name)
    config = validate(schema, read_json(folder / CONFIG), str(folder / CONFIG))
    return config, load_tensors(folder / WEIGHTS)


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Copy tensors into the module `name`, floating ones cast to its dtype; names and shapes must all agree.

    Raises ValueError that lists what is missing, unexpected, or of another shape or dtype; nothing is copied.
    """
    own = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    both = [key for key in own if key in tensors]
    shapes = [
        f"{key} {list(tensors[key].shape)}, not {list(own[key].shape)}"
        for key in both
        if own[key].shape != tensors[key].shape
    ]
    # Only floats are cast: a cast to or between integers can change a value without a word.
    kinds = [
        f"{key} {tensors[key].dtype}, not {own[key].dtype}"
        for key in both
        if own[key].dtype != tensors[key].dtype
        and not (own[key].is_floating_point() and tensors[key].is_floating_point())
    ]
    problems = [
        _listing("missing", [key for key in own if key not in tensors]),
        _listing("unexpected", [key for key in tensors if key not in own]),
        _listing("shape", shapes),
        _listing("dtype", kinds),
    ]
    if any(problems):
        raise ValueError(f"{name}: the weights do not fit the model: {'; '.join(filter(None, problems))}")
    module.load_state_dict(dict(tensors), strict=True)


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


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    return path


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _model_files(folder: Path) -> Iterator[str]:
    for where, folders, files in os.walk(folder):
        is_top = Path(where) == folder
        folders[:] = [name for name in folders if not name.startswith(".") and not (is_top and name == "run")]
        for name in files:
            is_weight = name.endswith(".safetensors") and not name.startswith(".")
            if is_weight or name in (CONFIG, "tokenizer.json"):
                yield Path(where, name).relative_to(folder).as_posix()


def _read_manifest(folder: Path) -> Manifest:
    source = str(folder / MANIFEST)
    manifest = validate(Manifest, read_json(folder / MANIFEST), source)
    for name in manifest.files:
        _check_inside(name, source)
    return manifest


def _check_inside(name: str, source: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.as_posix() != name:
        raise ValueError(f"{source}: {json.dumps(name)} is not a path below the model folder")


def _listing(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"{what}: {', '.join(names[:MAX_LISTED])}{more}"
