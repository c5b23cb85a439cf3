"""The manifest: sha256 and size of every weight, config and tokenizer file of a model folder, checked at every load.

Each file is hashed once a load: `VerifiedFolder` checks all of them, then hands out components that need no check.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import Field

from dalle.config import Config, validate
from dalle.files import existing_file, file_sha256, parse_json, write_json

MANIFEST = "manifest.json"
CONFIG = "config.json"
INDEX = "model_index.json"
TOKENIZER_FILES = ("tokenizer.json", "merges.txt")


class ManifestEntry(Config):
    """What a file must be."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)  # size of the file


class Manifest(Config):
    """The files of a model folder, by their path below it with forward slashes."""

    format: Literal[1]
    files: dict[str, ManifestEntry]


@dataclass(frozen=True)
class Component(os.PathLike[str]):
    """The folder of a component whose files were checked just now; usable as a path."""

    path: Path
    sha256: Mapping[str, str]  # of its files by name; empty where no manifest says so

    def __fspath__(self) -> str:
        return str(self.path)


class VerifiedFolder:
    """A model folder, every file of which agrees with its manifest.

    Raises:
        ValueError: a file is missing or changed, or there is no manifest.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        manifest, self.sha256 = _read_manifest(self.path)  # the hash of manifest.json itself
        _verify(self.path, manifest.files)
        self._files = manifest.files

    def component(self, name: str) -> Component:
        """Return the folder of a component; ValueError when the manifest lists no file of it."""
        return Component(self.path / name, _hashes(_below(self.path, self._files, name), name))


def checked_component(folder: str | os.PathLike[str], files: Sequence[str]) -> Component:
    """Check the files of a component against a manifest.json beside its folder, unless that was done already.

    Raises:
        ValueError: there is no such folder, or a file is missing, changed or not listed.
    """
    if isinstance(folder, Component):
        return folder
    path = Path(folder)
    path = Path(os.path.abspath(path)) if path.name in ("", "..") else path
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    model = path.parent
    if not (model / MANIFEST).exists():
        return Component(path, {})
    manifest, _ = _read_manifest(model)
    for name in files:
        if f"{path.name}/{name}" not in manifest.files:
            raise ValueError(f"{path / name}: not listed in {model / MANIFEST}: write the manifest again")
    entries = _below(model, manifest.files, path.name)
    _verify(model, entries)
    return Component(path, _hashes(entries, path.name))


def manifest_entry(path: str | Path) -> ManifestEntry:
    """Return what a manifest says of a file; ValueError for a missing one."""
    path = existing_file(path)
    return ManifestEntry(sha256=file_sha256(path), bytes=path.stat().st_size)


def write_manifest(
    folder: str | Path, files: Iterable[str] | None = None, known: Mapping[str, ManifestEntry] | None = None
) -> None:
    """Write manifest.json: sha256 and size of `files` (paths below `folder`), and what is `known` already.

    The default is model_index.json and every weight, config and tokenizer file, save those of the training run under
    `run/`. Raises ValueError for a file that is missing or outside the folder. Errors of `write_bytes`.
    """
    folder = Path(folder)
    entries: dict[str, ManifestEntry] = dict(known or {})
    for name in sorted(_model_files(folder) if files is None else files):
        _check_inside(name, f"{folder / MANIFEST}")
        entries[name] = manifest_entry(folder / name)
    write_json(folder / MANIFEST, Manifest(format=1, files=entries).model_dump())


def _verify(folder: Path, entries: Mapping[str, ManifestEntry]) -> None:
    """Check every file of `entries`; ValueError names the first that is missing or changed."""
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path}: missing, but listed in {MANIFEST}: copy the model again")
        damage = f"differs from {MANIFEST} (the file was changed or damaged): copy the model again"
        if path.stat().st_size != entry.bytes:
            raise ValueError(f"{path}: size of {path.stat().st_size} bytes, not {entry.bytes}, {damage}")
        if file_sha256(path) != entry.sha256:
            raise ValueError(f"{path}: sha256 {damage}")


def _below(folder: Path, entries: Mapping[str, ManifestEntry], component: str) -> dict[str, ManifestEntry]:
    found = {name: entry for name, entry in entries.items() if name.startswith(f"{component}/")}
    if not found:
        raise ValueError(f"{folder / MANIFEST}: lists no file of {component}: write the manifest again")
    return found


def _hashes(entries: Mapping[str, ManifestEntry], component: str) -> dict[str, str]:
    return {name.removeprefix(f"{component}/"): entry.sha256 for name, entry in entries.items()}


def _model_files(folder: Path) -> Iterator[str]:
    for where, folders, files in os.walk(folder):
        is_top = Path(where) == folder
        folders[:] = [name for name in folders if not name.startswith(".") and not (is_top and name == "run")]
        for name in files:
            is_weight = name.endswith(".safetensors") and not name.startswith(".")
            if is_weight or name in (CONFIG, *TOKENIZER_FILES) or (is_top and name == INDEX):
                yield Path(where, name).relative_to(folder).as_posix()


def _read_manifest(folder: Path) -> tuple[Manifest, str]:
    """Read manifest.json once -> its entries, and its own sha256."""
    path = existing_file(folder / MANIFEST)
    data = path.read_bytes()
    manifest = validate(Manifest, parse_json(data, str(path)), str(path))
    for name in manifest.files:
        _check_inside(name, str(path))
    return manifest, hashlib.sha256(data).hexdigest()


def _check_inside(name: str, source: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.as_posix() != name:
        raise ValueError(f"{source}: {json.dumps(name)} is not a path below the model folder")
