"""Parquet tables with the pictures embedded in them, the usual form on the Hugging Face Hub, read in place.

Source: the Hub's `Image` feature, a struct of `bytes` and `path`; the Hub's rules for file names and splits
(huggingface.co/docs/hub/datasets-file-names-and-splits).
"""

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dalle.data.layouts import (
    CAPTION_COLUMNS,
    NOT_UTF8,
    BadSample,
    Rejected,
    Row,
    Rows,
    caption_column,
    checked_row,
    is_unsafe,
    open_parquet,
    parquet_rows,
    printable,
)

SPLIT_WORDS = {  # the Hub's words for its three splits
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
MAX_KEPT_BYTES = 256 * 2**20  # of row groups in memory
MIN_KEPT_GROUPS = 2  # readers in parallel meet at the border of two, however large these are

# pyarrow's errors are subclasses of these
UNREADABLE = (OSError, ValueError, NotImplementedError)


class PictureTable(NamedTuple):
    """A parquet file with a column of pictures."""

    path: Path
    label: str  # "/"-separated path below the source
    picture: str  # the column of structs with `bytes`
    caption: str | None  # the column of captions; None: there is none
    columns: tuple[str, ...]  # all of them
    read: tuple[str, ...]  # what is read with a row: neither the picture nor other columns of bytes


def picture_tables(root: Path, names: Iterable[str]) -> tuple[list[PictureTable], list[BadSample]]:
    """Those of the parquet files `names` below `root` that hold pictures, and those that cannot be read.

    Of several columns of pictures `image` is taken, else the first; of several caption columns the first of
    CAPTION_COLUMNS.
    """
    tables: list[PictureTable] = []
    unreadable: list[BadSample] = []
    for name in names:
        try:
            with open_parquet(root / name) as file:
                table = _picture_table(root / name, name, file.schema_arrow)
        except Rejected as error:
            unreadable.append(BadSample(printable(name), str(error)))
            continue
        if table is not None:
            tables.append(table)
    return tables, unreadable


def _picture_table(path: Path, label: str, schema: Any) -> PictureTable | None:
    from pyarrow import types

    pictures = [
        column.name
        for column in schema
        if types.is_struct(column.type)
        and any(f.name == "bytes" and _holds_bytes(f.type) for f in column.type)
    ]
    if not pictures:
        return None
    picture = "image" if "image" in pictures else pictures[0]
    read = [column.name for column in schema if not _holds_bytes(column.type)]
    if any(part.name == "path" for part in schema.field(picture).type):
        read.append(f"{picture}.path")
    return PictureTable(path, label, picture, caption_column(read), tuple(schema.names), tuple(read))


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(_holds_bytes(part.type) for part in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _holds_bytes(kind.value_type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


# --- rows ---


def read_tables(tables: Sequence[PictureTable]) -> Rows:
    """The rows of all tables; keys are table, row number and, where there is one, the picture's own path.

    The row number stands before the path so that the order of the keys is that of the file: whoever reads the
    pictures in order reads each row group once. ValueError when no table has captions.
    """
    if all(table.caption is None for table in tables):
        raise ValueError(
            f"no captions found: {tables[0].path} has columns {', '.join(tables[0].columns)}; "
            f"beside the pictures it needs one of {', '.join(CAPTION_COLUMNS)}"
        )
    splits = splits_of_names([table.label for table in tables])
    for table in tables:
        if table.caption is None:
            yield BadSample(
                printable(table.label), f"no caption column; looked for {', '.join(CAPTION_COLUMNS)}"
            )
        else:
            yield from _read_table(table, table.caption, splits[table.label])


def splits_of_names(labels: Iterable[str]) -> dict[str, str | None]:
    """The split of each table by its path, such as data/train-00000-of-00001.parquet or test/0000.parquet.

    All None when `train` is the only split named: so the Hub calls a set that is not divided at all.
    """
    named = {label: _named_split(label) for label in labels}
    names = set(named.values()) - {None}
    if names == {"train"} or names.isdisjoint(SPLIT_WORDS.values()):
        return dict.fromkeys(named)
    return named


def _named_split(label: str) -> str | None:
    path = PurePosixPath(label)
    for part in (path.name, *reversed(path.parent.parts)):  # the file name first, then the nearest folder
        word = re.match(r"[a-z]+", part.lower())
        if word and word.group() in SPLIT_WORDS:
            return SPLIT_WORDS[word.group()]
    other = re.fullmatch(r"(.+)-\d+-of-\d+", path.stem)  # testA-00000-of-00001: must not become train
    return other.group(1) if other else None


def _read_table(table: PictureTable, caption: str, split: str | None) -> Rows:
    with open_parquet(table.path) as file:
        n_digits = len(str(file.metadata.num_rows))
        start = 0
        for group in range(file.num_row_groups):
            n_rows = file.metadata.row_group(group).num_rows
            try:
                sizes = _picture_sizes(file, group, f"{table.picture}.bytes")
                cells = file.read_row_group(group, columns=list(table.read))
            except UNREADABLE as error:
                place = f"{table.label}/{start:0{n_digits}}"
                yield BadSample(printable(place), f"{n_rows} rows from here cannot be read: {error}")
            else:
                for row, record in enumerate(parquet_rows(cells)):
                    key = f"{table.label}/{start + row:0{n_digits}}"
                    yield _row(table, key, caption, split, record, sizes[row], (group, row))
            start += n_rows


def _row(
    table: PictureTable,
    key: str,
    caption: str,
    split: str | None,
    record: dict[str, Any] | None,
    n_bytes: int | None,
    cell: tuple[int, int],
) -> Row | BadSample:
    try:
        if record is None:
            raise Rejected(NOT_UTF8)
        picture: Mapping[str, Any] = record.pop(table.picture, None) or {}
        path = picture.get("path")
        if isinstance(path, str) and path and not is_unsafe(path):
            key = f"{key}/{path}"
        if n_bytes is None:
            raise Rejected("the row holds no picture; a path alone is not read")
        if record.get("split") in (None, ""):
            record["split"] = split
        row = checked_row(key, record.pop(caption), record, str(table.path), n_bytes)
        return row._replace(cell=cell)
    except Rejected as error:
        return BadSample(printable(key), str(error))


def _picture_sizes(file: Any, group: int, column: str) -> list[int | None]:
    """Bytes of the pictures of a row group; None where there is none.

    Lengths are known only by reading all pictures. Where none is missing or empty they are set to equal shares of the
    bytes that the group holds, so that a fingerprint over them still tells one content from another.
    """
    description = file.metadata.row_group(group)
    chunks = [description.column(index) for index in range(description.num_columns)]
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema == column)
    known = chunk.statistics if chunk.is_stats_set else None
    if known and known.has_null_count and known.null_count == 0 and known.has_min_max and known.min:
        share, rest = divmod(chunk.total_uncompressed_size, description.num_rows)
        return [share + (row < rest) for row in range(description.num_rows)]
    from pyarrow import compute

    pictures = file.read_row_group(group, columns=[column]).flatten().column(0)
    lengths: list[int | None] = compute.binary_length(pictures).to_pylist()
    return lengths


# --- pictures ---


class _RowGroups:
    """The pictures of the row groups used last; a row group is the least that can be read of a file."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # threads that want the same group wait for one to read it
        self._kept: OrderedDict[tuple[str, int, int, int], Any] = OrderedDict()

    def pictures(self, path: str, group: int) -> Any:
        status = os.stat(path)
        key = (path, status.st_size, status.st_mtime_ns, group)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = _read_pictures(Path(path), group)
            self._kept.move_to_end(key)
            while len(self._kept) > MIN_KEPT_GROUPS and self._n_bytes() > MAX_KEPT_BYTES:
                self._kept.popitem(last=False)
            return self._kept[key]

    def _n_bytes(self) -> int:
        return sum(pictures.nbytes for pictures in self._kept.values())


_row_groups = _RowGroups()


def _read_pictures(path: Path, group: int) -> Any:
    with open_parquet(path) as file:
        table = _picture_table(path, path.name, file.schema_arrow)
        if table is None or group >= file.num_row_groups:
            raise ValueError(f"{path} has changed: it has no pictures in row group {group}")
        return file.read_row_group(group, columns=[f"{table.picture}.bytes"]).flatten().column(0)


def read_picture(path: str, cell: tuple[int, int]) -> bytes:
    """The bytes of the picture in (row group, row of it) of a table; ValueError when there is none."""
    group, row = cell
    try:
        pictures = _row_groups.pictures(path, group)
    except (Rejected, *UNREADABLE) as error:
        raise ValueError(f"row group {group} of {path} cannot be read: {error}") from error
    picture = pictures[row].as_py() if row < len(pictures) else None
    if not isinstance(picture, bytes):
        raise ValueError(f"{path} has changed: it has no picture in row {row} of row group {group}")
    return picture
