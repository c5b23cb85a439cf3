"""A captioned picture, and a sample that is none: the records that all of the data code speaks in.

A pair is cheap: the picture stays in its file, tar shard or table until `Pair.open` reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from PIL.Image import Image

from dalle import images
from dalle.data import places, row_groups
from dalle.picture_files import DATA_FORMATS


class BadSample(NamedTuple):
    """A sample that was skipped, and why; the key may also name a file or a line of one."""

    key: str
    reason: str
    is_container: bool = False  # a shard or table, with a number of pictures that nobody knows


class Rejected(Exception):
    """Why one sample is skipped; the readers turn it into a BadSample."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A picture and its captions (at least one, none empty)."""

    key: str  # "/"-separated path below the source, unique in its set
    captions: tuple[str, ...]
    split: str  # train, validation, test, or what the data set itself says; "" until it is decided
    fields: Mapping[str, object] = field(default_factory=dict, hash=False)  # the other metadata columns
    path: str = ""  # the picture file, or the tar shard or table that holds it; perhaps an address
    offset: int | None = None  # first byte within the shard; None: the whole file
    n_bytes: int = 0  # of the picture file; within a table its share of the row group's bytes
    cell: tuple[int, int] | None = None  # row group and row of it, within a table
    sample: str = ""  # the sample's own key, without container and suffix: the same in every layout
    home: str = ""  # the container, table or annotation file below the source; "": none
    column: str | None = None  # of pictures, where the table's own first one is not meant
    weight: float = 1.0  # of the data set that the pair comes from, relative to the others

    def read(self) -> bytes:
        """Read the picture file's bytes; ValueError when they are not there any more."""
        try:
            if self.cell is not None:
                return row_groups.read_picture(self.path, self.cell, self.column)
            return places.read_bytes(self.path, self.offset, self.n_bytes)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.key}: {error}") from error

    def open(self) -> Image:
        """Read the picture as RGB; ValueError when it is missing, corrupt or too large."""
        try:
            if self.cell is None and self.offset is None and not places.is_address(self.path):
                return images.open_image(self.path, formats=DATA_FORMATS)
        except ValueError as error:
            raise ValueError(f"{self.key}: {error}") from error
        return self.decode(self.read())

    def decode(self, data: bytes) -> Image:
        """The RGB picture in the bytes that `read` gave; ValueError when it is corrupt or too large."""
        try:
            return images.open_image(data, formats=DATA_FORMATS)
        except ValueError as error:
            raise ValueError(f"{self.key}: {str(error).removeprefix('picture: ')}") from error
