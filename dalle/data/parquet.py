"""Parquet and arrow tables with the pictures embedded in them, the usual forms on the Hugging Face Hub, read in place.

Source: the Hub's `Image` feature, a struct of `bytes` and `path`; arrow files as `datasets.save_to_disk` writes them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from dalle.data.pair import BadSample, Pair, Rejected
from dalle.data.places import Files
from dalle.data.row_groups import (
    UNREADABLE,
    PictureColumn,
    holds_bytes,
    is_arrow,
    leaf_column,
    open_arrow,
    open_parquet,
    picture_column,
)
from dalle.data.samples import (
    CAPTION_COLUMNS,
    NOT_UTF8,
    ReadOptions,
    Samples,
    caption_column,
    column_of,
    is_unsafe,
    make_pair,
    no_caption_column,
    printable,
)
from dalle.data.tables import parquet_rows

KEY_COLUMNS = ("__key__", "key", "id", "image_id", "uid")  # a sample's own key, where its picture has no path


class PictureTable(NamedTuple):
    """A parquet or arrow file with a column of pictures."""

    path: str
    label: str  # "/"-separated path below the source
    picture: PictureColumn
    caption: str | None  # the column of captions; None: there is none
    columns: tuple[str, ...]  # all of them
    read: tuple[str, ...]  # what is read with a row: neither the picture nor other columns of bytes


def picture_tables(
    files: Files, names: Iterable[str], options: ReadOptions
) -> tuple[list[PictureTable], list[BadSample]]:
    """Those of the tables `names` that hold pictures, and those that cannot be read.

    Of several columns of pictures `image` is taken, else the first; of several caption columns the first of
    CAPTION_COLUMNS; unless the options name others.
    """
    tables: list[PictureTable] = []
    unreadable: list[BadSample] = []
    for name in names:
        try:
            if is_arrow(name):
                table = _picture_table(files, name, open_arrow(files.path(name)).schema, options)
            else:
                with open_parquet(files.path(name)) as file:
                    table = _picture_table(files, name, file.schema_arrow, options)
        except (OSError, ValueError) as error:
            unreadable.append(BadSample(printable(name), str(error), is_container=True))
            continue
        if table is not None:
            tables.append(table)
    return tables, unreadable


def _picture_table(files: Files, label: str, schema: Any, options: ReadOptions) -> PictureTable | None:
    picture = picture_column(schema, options.image_column)
    if picture is None:
        return None
    read = [column.name for column in schema if not holds_bytes(column.type)]
    if picture.is_struct and any(part.name == "path" for part in schema.field(picture.name).type):
        read.append(f"{picture.name}.path")
    caption = caption_column(read, options)
    return PictureTable(files.path(label), label, picture, caption, tuple(schema.names), tuple(read))


# --- rows ---


def read_tables(tables: Sequence[PictureTable], options: ReadOptions) -> Samples:
    """The rows of all tables; keys are table, row number and, where there is one, the picture's own path.

    The row number stands before the path so that the order of the keys is that of the file: whoever reads the
    pictures in order reads each row group once. ValueError when no table has captions.
    """
    if all(table.caption is None for table in tables):
        raise ValueError(
            f"no captions found: {tables[0].path} has columns {', '.join(tables[0].columns)}; beside the pictures it "
            f"needs one of {options.caption_column or ', '.join(CAPTION_COLUMNS)} (or name it with --caption-column)"
        )
    seen: dict[tuple[str, ...], int] = {}  # how many samples without a key of their own have these captions
    for table in tables:
        if table.caption is None:
            yield BadSample(printable(table.label), no_caption_column(options), is_container=True)
            continue
        for found in _read_table(table, table.caption, options):
            if isinstance(found, Pair) and not found.sample:
                n = seen[found.captions] = seen.get(found.captions, -1) + 1
                found = replace(found, sample="\n".join((*found.captions, str(n))))
            yield found


def _read_table(table: PictureTable, caption: str, options: ReadOptions) -> Samples:
    if is_arrow(table.path):
        whole = open_arrow(table.path)
        lengths = _lengths(leaf_column(whole, table.picture))
        plain = [name for name in table.read if "." not in name or name in table.columns]
        cells = whole.select(plain)
        paths = [None] * whole.num_rows
        if f"{table.picture.name}.path" in table.read:
            struct = whole.select([table.picture.name]).flatten()
            paths = struct.column(f"{table.picture.name}.path").to_pylist()
        for row, record in enumerate(parquet_rows(cells)):
            if record is not None:
                record[table.picture.name] = {"path": paths[row]}
            key = f"{table.label}/{row:0{len(str(whole.num_rows))}}"
            yield _row(table, key, caption, record, lengths[row], (0, row), options)
        return
    with open_parquet(table.path) as file:
        n_digits = len(str(file.metadata.num_rows))
        start = 0
        for group in range(file.num_row_groups):
            n_rows = file.metadata.row_group(group).num_rows
            try:
                sizes = _picture_sizes(file, group, table.picture)
                cells = file.read_row_group(group, columns=list(table.read))
            except UNREADABLE as error:
                for row in range(start, start + n_rows):  # pictures are counted, not row groups
                    reason = f"its row group cannot be read: {error}"
                    yield BadSample(printable(f"{table.label}/{row:0{n_digits}}"), reason)
            else:
                for row, record in enumerate(parquet_rows(cells)):
                    key = f"{table.label}/{start + row:0{n_digits}}"
                    yield _row(table, key, caption, record, sizes[row], (group, row), options)
            start += n_rows


def _row(
    table: PictureTable,
    key: str,
    caption: str,
    record: dict[str, Any] | None,
    n_bytes: int | None,
    cell: tuple[int, int],
    options: ReadOptions,
) -> Pair | BadSample:
    try:
        if record is None:
            raise Rejected(NOT_UTF8)
        picture: Mapping[str, Any] = record.pop(table.picture.name, None) or {}
        path = picture.get("path")
        sample = ""
        if isinstance(path, str) and path:
            if not is_unsafe(path):
                key, sample = f"{key}/{path}", path
        elif (column := column_of(record, KEY_COLUMNS)) is not None and record[column] is not None:
            sample = str(record[column])
        if n_bytes is None:
            raise Rejected("the row holds no picture; a path alone is not read")
        pair = make_pair(
            key, record.pop(caption), record, table.path, n_bytes, sample=sample, home=table.label
        )
        return replace(pair, cell=cell, column=options.image_column, sample=pair.sample if sample else "")
    except Rejected as error:
        return BadSample(printable(key), str(error))


def _picture_sizes(file: Any, group: int, picture: PictureColumn) -> list[int | None]:
    """Bytes of the pictures of a row group; None where there is none.

    Lengths are known only by reading all pictures. Where none is missing or empty they are set to equal shares of the
    bytes that the group holds, so that a fingerprint over them still tells one content from another.
    """
    description = file.metadata.row_group(group)
    chunks = [description.column(index) for index in range(description.num_columns)]
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema == picture.leaf)
    known = chunk.statistics if chunk.is_stats_set else None
    if known and known.has_null_count and known.null_count == 0 and known.has_min_max and known.min:
        share, rest = divmod(chunk.total_uncompressed_size, description.num_rows)
        return [share + (row < rest) for row in range(description.num_rows)]
    return _lengths(leaf_column(file.read_row_group(group, columns=[picture.leaf]), picture))


def _lengths(pictures: Any) -> list[int | None]:
    from pyarrow import compute

    lengths: list[int | None] = compute.binary_length(pictures).to_pylist()
    return lengths
