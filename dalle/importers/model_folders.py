"""The model folder that an import writes: resumable while it lasts, whole or absent afterwards.

`OUT.partial` holds the work; import.json in it says of which files, by sha256. The same command goes on with it, a file
that is no model removes it, and only the finished folder gets its name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dalle import __version__
from dalle.files import file_sha256, publish_folder, read_json, write_json
from dalle.generation.request import ModelDefaults
from dalle.manifest import write_manifest
from dalle.model_folder import write_index

PLAN = "import.json"


@dataclass(frozen=True)
class ImportedFolder:
    """The folder being written, and what it is made of."""

    path: Path
    sources: list[dict[str, object]]  # name, sha256 and size of each file


@contextmanager
def imported_folder(out: Path, sources: Sequence[Path]) -> Iterator[ImportedFolder]:
    """Yield the unfinished folder of `out`, which becomes `out` when the block ends.

    A ValueError inside removes it; any other end, a signal too, leaves it to be continued. Raises ValueError where `out`
    exists already.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"cannot write {out}: it exists already: remove it or choose another folder")
    record: list[dict[str, object]] = [
        {"file": path.name, "sha256": file_sha256(path), "bytes": path.stat().st_size} for path in sources
    ]
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists() and not _continues(partial, record):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    write_json(partial / PLAN, {"version": __version__, "sources": record})
    try:
        yield ImportedFolder(partial, record)
        (partial / PLAN).unlink()
        publish_folder(partial, out)
    except ValueError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_image_tokenizer_index(folder: ImportedFolder, kind: str) -> None:
    """Make the folder one of an image tokenizer: model_index.json, then the manifest."""
    index = {
        "_class_name": kind,
        "_dalle_version": __version__,
        "components": {"dvae": kind},
        "imported_from": folder.sources,
    }
    write_json(folder.path / "model_index.json", index)
    write_manifest(folder.path)


def write_pipeline_index(
    folder: ImportedFolder, kinds: Mapping[str, str], defaults: Mapping[str, object]
) -> None:
    """Make the folder one of a model that draws: model_index.json with its parts and settings, then the manifest."""
    components = {"tokenizer": "CaptionTokenizer", **kinds}
    write_index(folder.path, ModelDefaults.model_validate(dict(defaults)), components, folder.sources)


def _continues(partial: Path, record: list[dict[str, object]]) -> bool:
    try:
        plan = read_json(partial / PLAN)
    except ValueError:
        return False
    return bool(plan == json.loads(json.dumps({"version": __version__, "sources": record})))
