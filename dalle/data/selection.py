"""A data set by reference: which pairs of another one are kept, and where their pictures lie; no picture is copied.

Layout: `selection.json` (format, source, sizes of its shards and tables) and `pairs.jsonl`, one pair a line.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from dalle import files
from dalle.data import places
from dalle.data.pair import BadSample, Pair, Rejected
from dalle.data.samples import Samples, is_unsafe, json_object, make_pair, printable

FORMAT = 2  # 2: with the samples' own keys
HEADER, PAIRS = "selection.json", "pairs.jsonl"


def is_selection(folder: Path) -> bool:
    """Whether a folder holds a selection."""
    return (folder / HEADER).is_file()


def write_selection(folder: Path, pairs: Iterable[Pair], source: Path, home: Path) -> int:
    """Write `pairs`, whose pictures lie below `source`; returns their number.

    `home` is the folder's place once it is finished: the source is written relative to it, so that both can move.
    """
    containers: dict[str, int] = {}
    n_pairs = 0
    with (folder / PAIRS).open("w", encoding="utf-8") as file:
        for pair in pairs:
            path = Path(pair.path).relative_to(source).as_posix()
            if pair.offset is not None or pair.cell is not None:
                containers.setdefault(path, 0)
            record = {
                "key": pair.key, "captions": pair.captions, "split": pair.split, "fields": dict(pair.fields),
                "path": path, "offset": pair.offset, "n_bytes": pair.n_bytes, "cell": pair.cell,
                "sample": pair.sample, "column": pair.column,
            }  # fmt: skip
            file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
            n_pairs += 1
    sizes = {path: (source / path).stat().st_size for path in containers}
    origin = Path(os.path.relpath(source, os.path.abspath(home))).as_posix()
    files.write_json(folder / HEADER, {"format": FORMAT, "source": origin, "sizes": sizes})
    return n_pairs


def read_selection(folder: Path) -> Samples:
    """The pairs of a selection; those whose picture or shard is gone or has another size now are bad.

    ValueError for a selection of another format, or without its source.
    """
    header = files.read_json(folder / HEADER)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{folder / HEADER} is no selection of format {FORMAT}: filter the data again")
    source = Path(os.path.normpath(folder / str(header["source"])))
    if not source.is_dir():
        raise ValueError(
            f"{folder} selects pairs of {source}, which does not exist: put it back, or filter again"
        )
    has_changed = {path: not _has_size(source / path, size) for path, size in header["sizes"].items()}
    with (folder / PAIRS).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            record = json_object(line)
            yield _pair(source, record, has_changed) if record else BadSample(f"{PAIRS}:{number}", "not JSON")


def _pair(source: Path, record: dict[str, object], has_changed: dict[str, bool]) -> Pair | BadSample:
    key = str(record.get("key"))
    try:
        path, offset, n_bytes, cell = (record.get(name) for name in ("path", "offset", "n_bytes", "cell"))
        fields = record.get("fields")
        if not isinstance(path, str) or is_unsafe(path) or not isinstance(n_bytes, int):
            raise Rejected("a damaged line: filter the data again")
        is_whole = offset is None and cell is None
        if has_changed.get(path, False) or (is_whole and not _has_size(source / path, n_bytes)):
            raise Rejected(f"{source / path} is gone or has changed since the data were filtered")
        others = {**fields} if isinstance(fields, dict) else {}
        pair = make_pair(key, record.get("captions"), others, str(source / path), n_bytes)
        split, sample, column = (record.get(name) for name in ("split", "sample", "column"))
        return replace(
            pair,
            split=split if isinstance(split, str) else "",
            offset=offset if isinstance(offset, int) else None,
            cell=(int(cell[0]), int(cell[1])) if isinstance(cell, list) else None,
            sample=sample if isinstance(sample, str) else pair.sample,
            column=column if isinstance(column, str) else None,
        )
    except Rejected as error:
        return BadSample(printable(key), str(error))


def _has_size(path: Path, n_bytes: int) -> bool:
    found = places.state_of(str(path))
    return found is not None and found.n_bytes == n_bytes


def common_folder(paths: Iterable[str]) -> Path:
    """The lowest folder that holds all files; ValueError for files at an address."""
    found = set(paths)
    remote = next((path for path in found if places.is_address(path)), None)
    if remote is not None:
        raise ValueError(
            f"{remote} is at an address; a selection names pictures on this machine: copy them first"
        )
    return Path(os.path.commonpath({os.path.dirname(os.path.abspath(path)) for path in found}))
