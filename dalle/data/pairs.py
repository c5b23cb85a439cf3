"""Captioned pictures: one reader for all common layouts, with the same splits, order and checks.

Source: section 2.3 of the paper (pairs of text and image); splits and file formats are not in it.
A pair is cheap: the picture stays in its file, tar shard or parquet table until `Pair.open` reads it.
"""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import overload

from PIL.Image import Image

from dalle import images
from dalle.data import layouts, parquet, selection, shards
from dalle.data.layouts import BadSample

HELD_OUT_FRACTION = 0.02  # of the pairs whose layout names no split
MIN_HELD_OUT = 8
MAX_HELD_OUT_FRACTION = 0.25
MAX_BAD_FRACTION = 0.01

LOOKED_FOR = (
    f"looked for metadata.jsonl, .csv, .tsv or .parquet (file_name and one of {', '.join(layouts.CAPTION_COLUMNS)}), "
    "*.tar shards (x.jpg with x.txt, x.caption or x.json), *.parquet tables with the pictures in them (image with "
    "bytes, and a caption column as above), a COCO captions .json (images and annotations), "
    "pictures (jpg, png, webp, gif, bmp) with a .txt of the same name beside each, "
    "and what `dalle data filter` wrote"
)


@dataclass(frozen=True, slots=True)
class Pair:
    """A picture and its captions (at least one, none empty)."""

    key: str  # "/"-separated path below the source, unique in its set
    captions: tuple[str, ...]
    split: str  # train, validation, or what the data set itself says
    fields: Mapping[str, object] = field(default_factory=dict, hash=False)  # the other metadata columns
    path: str = ""  # the picture file, or the tar shard or parquet table that holds it
    offset: int | None = None  # first byte within the shard; None: the whole file
    n_bytes: int = 0  # of the picture file; within a parquet table its share of the row group's bytes
    cell: tuple[int, int] | None = None  # row group and row of it, within a parquet table

    def open(self) -> Image:
        """Read the picture as RGB; ValueError when it is missing, corrupt or too large."""
        try:
            if self.cell is not None:
                return images.open_image(parquet.read_picture(self.path, self.cell))
            if self.offset is None:
                return images.open_image(Path(self.path))
            with open(self.path, "rb") as shard:
                shard.seek(self.offset)
                data = shard.read(self.n_bytes)
            if len(data) != self.n_bytes:
                raise ValueError(f"{self.path} ended early")
            return images.open_image(data)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.key}: {error}") from error


@dataclass(frozen=True)
class PairSet:
    """Pairs sorted by key, and the samples that were skipped."""

    pairs: tuple[Pair, ...]
    bad: list[BadSample] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> "PairSet": ...
    def __getitem__(self, index: int | slice) -> "Pair | PairSet":
        return PairSet(self.pairs[index]) if isinstance(index, slice) else self.pairs[index]

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 of all keys, captions, splits and file sizes; the same wherever the set lies."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            line = json.dumps([pair.key, pair.captions, pair.split, pair.n_bytes], ensure_ascii=True)
            digest.update(line.encode() + b"\n")
        return digest.hexdigest()

    @cached_property
    def counts(self) -> dict[str, int]:
        """Pairs per split, by name."""
        return dict(sorted(Counter(pair.split for pair in self.pairs).items()))

    def of_split(self, name: str) -> "PairSet":
        """The pairs of one split; empty when there is none of that name."""
        return PairSet(tuple(pair for pair in self.pairs if pair.split == name))

    def require_mostly_good(self, limit: float = MAX_BAD_FRACTION) -> None:
        """Raise ValueError, with counts and first reasons, when more than the fraction `limit` was skipped.

        One bad sample is always let pass, unless the limit is 0: a small set would allow none.
        """
        total = len(self.pairs) + len(self.bad)
        if _is_too_many(len(self.bad), total, limit):
            raise ValueError(
                f"{len(self.bad)} of {total} samples are bad; at most {limit:.1%} may be: "
                f"repair or remove them. First: {_first_reasons(self.bad)}"
            )


class BadSampleLog:
    """Samples that turn out bad while a run reads them: written to a .jsonl file, counted and limited.

    A key counts once. What an earlier run wrote into the file counts too: a resumed run meets the same limit.
    """

    def __init__(
        self,
        path: Path,
        total: int,
        limit: float = MAX_BAD_FRACTION,
        keys: Collection[str] | None = None,
    ) -> None:
        """`total` is the number of samples of the run; `limit` the fraction of them that may be bad.

        With `keys`, what the file says of other samples does not count: it is of another data set.
        """
        self.path = Path(path)
        self._lock = threading.Lock()
        self.total = total
        self.limit = limit
        self._reasons: dict[str, str] = {}
        self._ends_torn = False
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8", errors="replace")
            self._ends_torn = bool(text) and not text.endswith("\n")  # killed within a line
            for line in text.splitlines():
                record = layouts.json_object(line)
                if record and isinstance(record.get("key"), str) and (keys is None or record["key"] in keys):
                    self._reasons[record["key"]] = str(record.get("reason", ""))

    def __len__(self) -> int:
        return len(self._reasons)

    def __contains__(self, key: object) -> bool:
        return key in self._reasons

    def add(self, key: str, reason: str) -> None:
        """Write one bad sample; ValueError when more than max(1, limit * total) samples are bad by now."""
        with self._lock:  # pictures are read by several threads
            if key not in self._reasons:
                self._reasons[key] = reason
                self.path.parent.mkdir(parents=True, exist_ok=True)
                line = json.dumps({"key": key, "reason": reason}) + "\n"
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("\n" + line if self._ends_torn else line)
                self._ends_torn = False
        if _is_too_many(len(self), self.total, self.limit):
            bad = [BadSample(*item) for item in list(self._reasons.items())]
            raise ValueError(
                f"{len(self)} of {self.total} samples are bad; at most {self.limit:.1%} may be: "
                f"repair or remove those listed in {self.path}. First: {_first_reasons(bad)}"
            )


def read_pairs(source: str | Path) -> PairSet:
    """Read a data set, finding out its layout; no picture is opened.

    `source` is a folder with a metadata table, tar shards, parquet tables with the pictures in them, a COCO
    captions file, or pictures with .txt beside them (the first of these that is there is read), or what
    `dalle data filter` wrote; or one such
    table, shard or COCO file; or the id of a data set on the Hugging Face Hub (`owner/name`; a path that exists
    goes first). Of several caption columns the first of `layouts.CAPTION_COLUMNS` is read. ValueError when the
    source is missing and when no captions are found. Bad samples are listed in `PairSet.bad`.
    """
    root = _local_path(source)
    found: list[layouts.Row] = []
    bad: list[BadSample] = []
    taken: set[str] = set()
    for row in _rows(root):
        if isinstance(row, BadSample):
            bad.append(row)
        elif row.key in taken:
            bad.append(BadSample(row.key, "duplicate key"))
        else:
            taken.add(row.key)
            found.append(row)
    if not found:
        skipped = f"; {len(bad)} bad samples, first: {_first_reasons(bad)}" if bad else ""
        raise ValueError(f"no captions found in {source}: {LOOKED_FOR}{skipped}")
    held_out = _held_out(row.key for row in found if row.split is None)
    pairs = [
        Pair(
            row.key,
            row.captions,
            row.split or ("validation" if row.key in held_out else "train"),
            row.fields,
            row.path,
            row.offset,
            row.n_bytes,
            row.cell,
        )
        for row in sorted(found, key=lambda row: row.key)
    ]
    return PairSet(tuple(pairs), sorted(bad))


def _local_path(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.exists():
        return path
    is_hub_id = isinstance(source, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source)
    if not is_hub_id:
        raise ValueError(
            f"{source} does not exist: give a folder, a table, a .tar, a COCO .json or a Hub id owner/name"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(source), repo_type="dataset"))
    except Exception as error:  # the Hub's client raises errors of many libraries
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"{source} is no folder here, and as a data set of the Hub it cannot be had: {reason}"
        ) from error


def _rows(path: Path) -> layouts.Rows:
    """The samples of a folder or a file, by the layout that it has."""
    if not path.is_dir():
        return _rows_of_file(path)
    if selection.is_selection(path):
        return selection.read_selection(path)
    files = layouts.list_files(path)
    metadata = [
        name
        for name in files
        if Path(name).stem == "metadata" and Path(name).suffix in layouts.METADATA_SUFFIXES
    ]
    if metadata:
        folders = Counter(str(Path(name).parent) for name in metadata)
        doubled, n_tables = folders.most_common(1)[0]
        if n_tables > 1:
            raise ValueError(f"{path / doubled} holds {n_tables} metadata tables; keep one")
        return chain.from_iterable(layouts.read_metadata(path, path / name) for name in metadata)
    tars = [name for name in files if name.endswith(".tar")]
    if tars:
        return chain.from_iterable(shards.read_shard(path, path / name) for name in tars)
    tables, unreadable = parquet.picture_tables(path, [name for name in files if name.endswith(".parquet")])
    if tables:
        return chain(unreadable, parquet.read_tables(tables))
    trees = [(path / name, layouts.coco_tree(path / name)) for name in _coco_sources(files)]
    coco = [layouts.read_coco(path, source, tree) for source, tree in trees if tree is not None]
    if coco:
        return chain(unreadable, *coco)
    return chain(unreadable, layouts.read_folder(path, files))


def _rows_of_file(path: Path) -> layouts.Rows:
    suffix = path.suffix.lower()
    if suffix == ".parquet" and path.stem != "metadata":
        tables, _ = parquet.picture_tables(path.parent, [path.name])
        if tables:
            return parquet.read_tables(tables)
    if suffix in layouts.METADATA_SUFFIXES:
        return layouts.read_metadata(path.parent, path)
    if suffix == ".tar":
        return shards.read_shard(path.parent, path)
    tree = layouts.coco_tree(path) if suffix == ".json" else None
    if tree is not None:
        root = path.parent.parent if path.parent.name == "annotations" else path.parent
        return layouts.read_coco(root, path, tree)
    raise ValueError(f"no captions found in {path}: {LOOKED_FOR}")


def _coco_sources(files: Iterable[str]) -> list[str]:
    """JSON files that may hold captions; beside captions_*.json no others (instances_*) are parsed."""
    near = [
        name for name in files if name.endswith(".json") and str(Path(name).parent) in (".", "annotations")
    ]
    return [name for name in near if Path(name).name.startswith("captions_")] or near


def _held_out(keys: Iterable[str]) -> frozenset[str]:
    """The keys with the smallest hashes: the same ones on every machine, and spread over the whole set."""
    ranked = sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())
    wanted = max(MIN_HELD_OUT, round(HELD_OUT_FRACTION * len(ranked)))
    return frozenset(ranked[: min(wanted, int(MAX_HELD_OUT_FRACTION * len(ranked)))])


def _is_too_many(n_bad: int, total: int, limit: float) -> bool:
    return n_bad > (max(1.0, limit * total) if limit > 0 else 0)


def _first_reasons(bad: Sequence[BadSample], n: int = 3) -> str:
    return "; ".join(f"{sample.key}: {sample.reason}" for sample in bad[:n])
