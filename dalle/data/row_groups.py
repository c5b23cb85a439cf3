"""Pictures inside parquet and arrow tables: the row groups read last are kept.

Source: the Hub's `Image` feature, a struct of `bytes` and `path`. Arrow files are those of `datasets.save_to_disk`,
mapped into memory; one counts as a single row group.
"""

import threading
from collections import OrderedDict
from typing import Any, NamedTuple

from dalle.data import places

MAX_KEPT_BYTES = 256 * 2**20  # of row groups in memory
MIN_KEPT_GROUPS = 2  # readers in parallel meet at the border of two, however large these are
# pyarrow's errors are subclasses of these
UNREADABLE = (OSError, ValueError, NotImplementedError)


class PictureColumn(NamedTuple):
    """The column of pictures of a table."""

    name: str
    is_struct: bool  # of bytes and path; else the bytes themselves

    @property
    def leaf(self) -> str:
        """The column of bytes."""
        return f"{self.name}.bytes" if self.is_struct else self.name


def open_parquet(path: str) -> Any:
    """The pyarrow.parquet.ParquetFile of a table; ValueError when it cannot be read."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError("needs pyarrow to be read: pip install pyarrow") from None
    try:
        return parquet.ParquetFile(places.open_binary(path) if places.is_address(path) else path)
    except UNREADABLE as error:
        raise ValueError(f"cannot be read as parquet: {error}") from None


def open_arrow(path: str) -> Any:
    """The pyarrow.Table of an arrow file, mapped into memory; ValueError when it cannot be read."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError("needs pyarrow to be read: pip install pyarrow") from None
    try:
        source = places.open_binary(path) if places.is_address(path) else pyarrow.memory_map(path)
        return pyarrow.ipc.open_stream(source).read_all()
    except UNREADABLE as error:
        raise ValueError(f"cannot be read as an arrow file: {error}") from None


def is_arrow(path: str) -> bool:
    """Whether a table is an arrow file; else it is parquet."""
    return path.lower().endswith(".arrow")


def picture_column(schema: Any, wanted: str | None = None) -> PictureColumn | None:
    """The column of pictures: the one wanted, else `image`, else the first; None where there is none."""
    from pyarrow import types

    found = []
    for column in schema:
        if types.is_struct(column.type):
            if any(part.name == "bytes" and holds_bytes(part.type) for part in column.type):
                found.append(PictureColumn(column.name, True))
        elif column.name == wanted and holds_bytes(column.type):
            found.append(PictureColumn(column.name, False))
    by_name = {column.name: column for column in found}
    if wanted is not None:
        return by_name.get(wanted)
    return by_name.get("image") or next(iter(found), None)


def holds_bytes(kind: Any) -> bool:
    """Whether a type of column holds bytes at some depth."""
    from pyarrow import types

    if types.is_struct(kind):
        return any(holds_bytes(part.type) for part in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return holds_bytes(kind.value_type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


class RowGroups:
    """The pictures of the row groups used last; a row group is the least that can be read of a file."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # threads that want the same group wait for one to read it
        self._kept: OrderedDict[tuple[object, ...], Any] = OrderedDict()

    def pictures(self, path: str, group: int, column: str | None) -> Any:
        """The bytes of all pictures of a row group."""
        key = (path, places.state_of(path), group, column)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = read_pictures(path, group, column)
            self._kept.move_to_end(key)
            while len(self._kept) > MIN_KEPT_GROUPS and self._n_bytes() > MAX_KEPT_BYTES:
                self._kept.popitem(last=False)
            return self._kept[key]

    def _n_bytes(self) -> int:
        return sum(pictures.nbytes for pictures in self._kept.values())


_row_groups = RowGroups()


def read_pictures(path: str, group: int, column: str | None) -> Any:
    """The bytes of all pictures of a row group, read anew; ValueError when there are none."""
    if is_arrow(path):
        table = open_arrow(path)
        found = picture_column(table.schema, column)
        if found is None or group:
            raise ValueError(f"{path} has changed: it has no pictures in row group {group}")
        return leaf_column(table, found)
    with open_parquet(path) as file:
        found = picture_column(file.schema_arrow, column)
        if found is None or group >= file.num_row_groups:
            raise ValueError(f"{path} has changed: it has no pictures in row group {group}")
        return leaf_column(file.read_row_group(group, columns=[found.leaf]), found)


def leaf_column(table: Any, column: PictureColumn) -> Any:
    """The bytes of the pictures of a pyarrow table."""
    if not column.is_struct:
        return table.column(column.name)
    return table.select([column.name]).flatten().column(column.leaf)


def read_picture(path: str, cell: tuple[int, int], column: str | None = None) -> bytes:
    """The bytes of the picture in (row group, row of it) of a table; ValueError when there is none."""
    group, row = cell
    try:
        pictures = _row_groups.pictures(path, group, column)
    except UNREADABLE as error:
        raise ValueError(f"row group {group} of {path} cannot be read: {error}") from error
    picture = pictures[row].as_py() if row < len(pictures) else None
    if not isinstance(picture, bytes):
        raise ValueError(f"{path} has changed: it has no picture in row {row} of row group {group}")
    return picture
