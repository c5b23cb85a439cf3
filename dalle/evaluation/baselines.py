"""What copying gives: the yardsticks that need no model, which every figure of a draw stands beside.

A row is a held-out picture of a known object in a style in which that object was never trained on. Whoever has the
training set can answer with a picture of the same object in another style: a random one, one from the donor style that
matches best on the training set, or their mean. A model that composes has to beat them.
Shapes: C pictures, D thumbnail values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dalle.evaluation.galleries import NAME_FIELD, Galleries, Thumbnails, field_of, style_of

MIN_DONOR_OBJECTS = 20  # of split train that two styles share: fewer choose no donor

Thumbnail = npt.NDArray[np.float32]
Query = Thumbnail | None  # (C, D): C equally likely answers to a row; None: no answer
RANDOM, MEAN, DONOR = "random_copy", "mean_copy", "donor_copy"
MEANING = {
    RANDOM: "a random training picture of the same object in another style (the mean over all of them)",
    MEAN: "the mean of those pictures",
    DONOR: "the same object from the style that matches this one best on the training set",
}


@dataclass(frozen=True)
class Donor:
    """How far a style's pictures are from another style's of the same objects, on split train."""

    style: str
    distance: float  # mean RMSE at 16 x 16 RGB, 0..1
    n: int  # objects


def copies(galleries: Galleries, rows: Sequence[int], small: Thumbnails) -> dict[str, list[Query]]:
    """Answer each row by copying, in three ways; None where no training picture shows the row's object.

    Reads the thumbnails of most of the training set: the donors are chosen on it.
    """
    found: dict[str, list[Query]] = {RANDOM: [], MEAN: [], DONOR: []}
    donors = choose_donors(galleries, {style_of(galleries.pairs[row]) for row in rows} - {None}, small)
    for row in rows:
        indices = galleries.copies(row)
        small.load_(set(indices))
        indices = [index for index in indices if small.is_readable(index)]
        chosen = _from_donor(galleries, row, indices, donors)
        found[RANDOM].append(small.of(indices) if indices else None)
        found[MEAN].append(small.of(indices).mean(axis=0, keepdims=True) if indices else None)
        found[DONOR].append(None if chosen is None else small.of([chosen]))
    return found


def choose_donors(
    galleries: Galleries, styles: set[str | None], small: Thumbnails
) -> dict[str | None, list[Donor]]:
    """For each style the others that share at least 20 objects with it on split train, the nearest first."""
    named = _training_pictures(galleries)
    donors: dict[str | None, list[Donor]] = {}
    for style in sorted(named.keys() & styles):
        tried = [
            _try_donor(named[style], named[other], other, small) for other in sorted(named) if other != style
        ]
        donors[style] = sorted(filter(None, tried), key=lambda donor: donor.distance)
    return donors


def _training_pictures(galleries: Galleries) -> dict[str, dict[str, int]]:
    """The first training picture of each object by style: style -> object -> pair."""
    found: dict[str, dict[str, int]] = {}
    for index, pair in enumerate(galleries.pairs):
        style, name = style_of(pair), field_of(pair, NAME_FIELD)
        if pair.split == "train" and style is not None and name is not None:
            found.setdefault(style, {}).setdefault(name, index)
    return found


def _try_donor(mine: dict[str, int], theirs: dict[str, int], other: str, small: Thumbnails) -> Donor | None:
    """Measure `other`'s pictures against a style's own on all objects that both have; None with too few."""
    shared = sorted(mine.keys() & theirs.keys())
    small.load_({found[name] for name in shared for found in (mine, theirs)})
    shared = [name for name in shared if small.is_readable(mine[name]) and small.is_readable(theirs[name])]
    if len(shared) < MIN_DONOR_OBJECTS:
        return None
    apart = small.of([mine[name] for name in shared]) - small.of([theirs[name] for name in shared])
    return Donor(other, float(np.sqrt((apart.astype(np.float64) ** 2).mean(axis=1)).mean()), len(shared))


def _from_donor(
    galleries: Galleries, row: int, indices: Sequence[int], donors: dict[str | None, list[Donor]]
) -> int | None:
    """The first of these pictures from the best donor that has one; of any style where no donor was tried."""
    by_style: dict[str | None, int] = {}
    for index in indices:
        by_style.setdefault(style_of(galleries.pairs[index]), index)
    order: list[str | None] = [donor.style for donor in donors.get(style_of(galleries.pairs[row]), [])]
    return next(
        (by_style[style] for style in order if style in by_style), next(iter(by_style.values()), None)
    )
