"""Tables that name picture files beside them: metadata.jsonl, .csv, .tsv, .parquet (Hugging Face imagefolder)."""

import csv
import io
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from dalle.data import places
from dalle.data.pair import BadSample, Pair, Rejected
from dalle.data.places import Files, normal
from dalle.data.row_groups import open_parquet, picture_column
from dalle.data.samples import (
    CAPTION_COLUMNS,
    NOT_UTF8,
    PICTURE_COLUMNS,
    ReadOptions,
    Samples,
    caption_column,
    captions_of_cell,
    column_of,
    is_unsafe,
    json_object,
    make_pair,
    no_caption_column,
    printable,
)

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
DELIMITERS = (",", "\t", ";")
LIST_COLUMNS = ("captions", "sentences_raw", "sentences")  # whose cells hold lists where they look like one
PICTURE_FOLDERS = (
    "",
    "images/",
    "Images/",
    "imgs/",
    "pictures/",
    "photos/",
)  # beside the table, in this order
MAX_CELL = 2**27  # characters
N_TRIED = 100  # rows of a table with a name of its own, one of whose pictures has to be there

Record = tuple[int, dict[str, Any] | BadSample]  # line number, cells


def read_table(files: Files, label: str, options: ReadOptions) -> Samples:
    """Rows of a table: a picture column (relative to the table), a caption column, perhaps split, other fields.

    Rows with the same picture are one pair with the captions of all of them, in order. ValueError for a table without
    these columns, or one that cannot be read.
    """
    rows: dict[str, Pair] = {}
    for line, record in _records(files, label, options):
        if isinstance(record, BadSample):
            yield record
            continue
        place = f"{label}:{line}"
        try:
            name = _pop_picture(record, options)
            place = posixpath.normpath(posixpath.join(posixpath.dirname(label), name))
            pair = _pair(files, label, name, record, options)
            place = pair.key
            rows[place] = _merged(rows[place], pair) if place in rows else pair
        except Rejected as error:
            yield BadSample(printable(place), str(error))
    yield from rows.values()


def is_data_table(files: Files, label: str, options: ReadOptions) -> bool:
    """Whether a table with a name of its own holds pairs: it has both columns, and a picture of its first rows is there."""
    try:
        if label.lower().endswith(".parquet"):
            with open_parquet(files.path(label)) as file:
                if picture_column(file.schema_arrow, options.image_column) is not None:
                    return False  # it holds the pictures themselves
        for _, record in islice(_records(files, label, options), N_TRIED):
            if not isinstance(record, BadSample):
                name = _pop_picture(record, options)
                if caption_column(record, options) and not is_unsafe(name) and _find(files, label, name):
                    return True
    except (Rejected, ValueError, OSError):
        return False
    return False


def _pop_picture(record: dict[str, Any], options: ReadOptions) -> str:
    column = column_of(record, PICTURE_COLUMNS, options.image_column)
    name = record.pop(column) if column is not None else None
    if not isinstance(name, str) or not name:
        raise Rejected(f"no {column or options.image_column or PICTURE_COLUMNS[0]}")
    return name


def _pair(files: Files, label: str, name: str, record: dict[str, Any], options: ReadOptions) -> Pair:
    if "://" in name:
        raise Rejected("the picture is at an address: download the pictures first, as img2dataset does")
    if is_unsafe(name):
        raise Rejected(
            f"unsafe path {printable(name)!r}: it has to lie below the folder of {PurePosixPath(label).name}"
        )
    column = caption_column(record, options)
    if column is None:
        raise Rejected(no_caption_column(options))
    captions = record.pop(column)
    if isinstance(captions, str):
        captions = (
            captions_of_cell(captions, column in LIST_COLUMNS) if not label.endswith(".jsonl") else captions
        )
    found = _find(files, label, name)
    key = found[0] if found else posixpath.normpath(posixpath.join(posixpath.dirname(label), name))
    return make_pair(
        key, captions, record, files.path(key), found and found[1], sample=_below(label, key), home=label
    )


def _find(files: Files, label: str, name: str) -> tuple[str, int] | None:
    """The file that a row means, and its size."""
    for written in dict.fromkeys((name, name.replace("\\", "/"))):
        for folder in PICTURE_FOLDERS:
            found = files.find(posixpath.join(posixpath.dirname(label), folder + written))
            if found is not None:
                return found
    return None


def _below(label: str, key: str) -> str:
    return posixpath.relpath(normal(key), normal(posixpath.dirname(label)) or ".")


def _merged(first: Pair, pair: Pair) -> Pair:
    """The first row of a picture with the captions of a later one added."""
    if first.split and pair.split and first.split != pair.split:
        raise Rejected(
            f"another row of this picture is in split {first.split!r}, this one in {pair.split!r}: choose one"
        )
    return replace(first, captions=first.captions + pair.captions, split=first.split or pair.split)


# --- the cells of each row ---


def _records(files: Files, label: str, options: ReadOptions) -> Iterator[Record]:
    suffix = PurePosixPath(label).suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_records(files, label, options)
        return
    with places.open_binary(files.path(label)) as file, _as_text(file) as lines:
        if suffix == ".jsonl":
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, json_object(line) or BadSample(f"{label}:{number}", "not a JSON object")
            return
        limit = csv.field_size_limit(MAX_CELL)  # the module's own is 128 kB
        try:
            yield from _csv_records(files, label, lines, options)
        finally:
            csv.field_size_limit(limit)


def _as_text(file: Any) -> io.TextIOWrapper:
    """The lines of a table in UTF-8 or, by its first two bytes, UTF-16 (spreadsheets' "Unicode text")."""
    is_utf16 = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    file.seek(0)
    if is_utf16:
        return io.TextIOWrapper(file, encoding="utf-16", newline="")
    # bytes that are no UTF-8 become lone surrogates, which the checks find row by row
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _csv_records(files: Files, label: str, lines: io.TextIOWrapper, options: ReadOptions) -> Iterator[Record]:
    header = next(lines, "")
    delimiter = _delimiter(label, header, options)
    columns = next(csv.reader([header], delimiter=delimiter), [])
    # strict: a quote that is never closed would silently make one caption of the rest of the table
    rows = csv.DictReader(lines, columns, delimiter=delimiter, strict=True)
    _require_columns(files.path(label), columns, options)
    try:
        for cells in rows:
            number = rows.line_num + 1  # the header was read apart
            if None in cells:  # an unquoted comma would silently cut the caption
                yield (
                    number,
                    BadSample(f"{label}:{number}", "more cells than columns: quote captions with commas"),
                )
            else:
                yield number, dict(cells)
    except csv.Error as error:
        raise ValueError(
            f"{files.path(label)} cannot be read as a table: after line {rows.line_num + 1}: {error}"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{files.path(label)} cannot be read as a table: {error}") from None


def _delimiter(label: str, header: str, options: ReadOptions) -> str:
    """The first delimiter that gives both columns; else the one that the suffix means."""
    own = "\t" if label.lower().endswith(".tsv") else ","
    for delimiter in dict.fromkeys((own, *DELIMITERS)):
        if _has_columns(next(csv.reader([header], delimiter=delimiter), []), options):
            return delimiter
    return own


def _parquet_records(files: Files, label: str, options: ReadOptions) -> Iterator[Record]:
    path = files.path(label)
    try:
        file = open_parquet(path)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    try:
        with file:
            _require_columns(path, file.schema_arrow.names, options)
            rows = (row for batch in file.iter_batches(batch_size=4096) for row in parquet_rows(batch))
            for number, cells in enumerate(rows, start=1):
                yield number, BadSample(f"{label}:{number}", NOT_UTF8) if cells is None else cells
    except OSError as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from None


def parquet_rows(cells: Any) -> Iterator[dict[str, Any] | None]:
    """The cells of each row of a pyarrow table or batch; None for a row with text that is not UTF-8."""
    try:
        yield from cells.to_pylist()
    except UnicodeDecodeError:  # raised before the first row
        for row in range(cells.num_rows):
            try:
                yield cells.slice(row, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None


def _has_columns(columns: Sequence[str], options: ReadOptions) -> bool:
    picture = column_of(columns, PICTURE_COLUMNS, options.image_column)
    return picture is not None and caption_column(columns, options) is not None


def _require_columns(table: str, columns: Sequence[str], options: ReadOptions) -> None:
    if not _has_columns(columns, options):
        raise ValueError(
            f"no captions found: {table} has columns {', '.join(columns) or 'none'}; it needs "
            f"{options.image_column or 'file_name'} (or name it with --image-column) and one of "
            f"{options.caption_column or ', '.join(CAPTION_COLUMNS)} (or name it with --caption-column)"
        )
