"""The galleries that a draw's true picture hides in: of its style, of its object in other styles, and its neighbours.

Source: retrieval among K candidates as in R-precision (Park et al. 2021), here by pictures. A model that draws the
object and forgets the style, or copies it from another style, wins in the first gallery and fails in the second.
Shapes: K candidates, D thumbnail values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dalle.data.pair import Pair
from dalle.data.pairs import PairSet
from dalle.evaluation.metrics import thumbnails
from dalle.evaluation.pictures import PictureReader

N_DISTRACTORS = 99
STYLE, STYLE_AND_OBJECT, NEIGHBOURS = "style", "style_and_object", "neighbours"
OBJECT_FIELD, NAME_FIELD = "okey", "object"  # of the art set: a drawn thing; with its skin tone and gender
MAX_THUMBNAILS = 2**16  # kept between rows: 200 MB


def zero_shot_rows(pairs: PairSet) -> list[int]:
    """The pairs marked `combo_hard`: known objects in a style in which nothing of them was trained on."""
    return [i for i, pair in enumerate(pairs) if str(pair.fields.get("combo_hard")).lower() in ("true", "1")]


def style_of(pair: Pair) -> str | None:
    """The field `style` of a pair."""
    return field_of(pair, "style")


def field_of(pair: Pair, name: str) -> str | None:
    """A field as text; None where the pair has none."""
    value = pair.fields.get(name)
    return None if value is None else str(value)


def pools_of(pairs: PairSet) -> dict[str | None, npt.NDArray[np.int64]]:
    """The pairs of each style; under None all pairs, for rows without one."""
    members: dict[str | None, list[int]] = {None: list(range(len(pairs)))}
    for index, pair in enumerate(pairs):
        if (style := style_of(pair)) is not None:
            members.setdefault(style, []).append(index)
    return {style: np.array(found, dtype=np.int64) for style, found in members.items()}


def distractors(pairs: PairSet, row: int, pool: npt.NDArray[np.int64]) -> list[int]:
    """Up to 99 of `pool`, none of them `row` or of its object (field `okey`); its key alone decides which."""
    digest = hashlib.sha256(pairs[row].key.encode()).digest()
    order = np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(pool)
    thing, chosen = pairs[row].fields.get(OBJECT_FIELD), []
    for index in order.tolist():
        if index != row and (thing is None or pairs[index].fields.get(OBJECT_FIELD) != thing):
            chosen.append(index)
            if len(chosen) == N_DISTRACTORS:
                break
    return chosen


class Galleries:
    """The candidates of a row, its own picture first."""

    def __init__(self, pairs: PairSet, neighbours: Mapping[int, Sequence[int]] | None = None) -> None:
        """`neighbours`: of each row, the pictures nearest to its own in some embedding."""
        self.pairs, self._pools, self._neighbours = pairs, pools_of(pairs), neighbours
        self._same_object: dict[str, list[int]] = {}
        self._same_name: dict[str, list[int]] = {}
        for index, pair in enumerate(pairs):
            for known, name in ((self._same_object, OBJECT_FIELD), (self._same_name, NAME_FIELD)):
                if (value := field_of(pair, name)) is not None:
                    known.setdefault(value, []).append(index)

    def members(self, row: int) -> dict[str, list[int]]:
        """Every gallery of a row, by name."""
        found = {STYLE: self.of_style(row), STYLE_AND_OBJECT: self.of_style_and_object(row)}
        return found if self._neighbours is None else found | {NEIGHBOURS: [row, *self._neighbours[row]]}

    def of_style(self, row: int) -> list[int]:
        """The row and 99 others of its style."""
        return [row, *distractors(self.pairs, row, self._pools[style_of(self.pairs[row])])]

    def of_style_and_object(self, row: int) -> list[int]:
        """As `of_style`, and all pictures of the row's object in other styles."""
        return self.of_style(row) + self._in_other_styles(row, self._same_object, OBJECT_FIELD)

    def copies(self, row: int) -> list[int]:
        """Training pictures of what the row shows, in other styles: with its tone and gender where there are such."""
        for known, field in ((self._same_name, NAME_FIELD), (self._same_object, OBJECT_FIELD)):
            others = self._in_other_styles(row, known, field)
            if found := [index for index in others if self.pairs[index].split == "train"]:
                return found
        return []

    def _in_other_styles(self, row: int, known: dict[str, list[int]], field: str) -> list[int]:
        pair = self.pairs[row]
        value, style = field_of(pair, field), style_of(pair)
        if value is None or style is None:
            return []
        return [index for index in known[value] if style_of(self.pairs[index]) not in (style, None)]


class Thumbnails:
    """Thumbnails of a set's pictures, each read once as long as memory allows."""

    def __init__(self, pairs: PairSet, reader: PictureReader) -> None:
        self._pairs, self._reader = pairs, reader
        self._known: dict[int, npt.NDArray[np.float32] | None] = {}  # None: not readable

    def load_(self, wanted: set[int]) -> None:
        """Read what is wanted and not known yet."""
        if len(self._known) + len(wanted) > MAX_THUMBNAILS:
            self._known.clear()
        missing = sorted(wanted - self._known.keys())
        self._known.update(dict.fromkeys(missing))
        for positions, pictures in self._reader.batches([self._pairs[index] for index in missing]):
            for position, small in zip(positions, thumbnails(pictures), strict=True):
                self._known[missing[position]] = small

    def is_readable(self, index: int) -> bool:
        """Whether a loaded picture could be read."""
        return self._known[index] is not None

    def of(self, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        """Those of readable pictures, in order, (K, D); at least one has to be."""
        return np.stack([small for index in indices if (small := self._known[index]) is not None])
