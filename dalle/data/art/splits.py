"""The held-out splits of the emoji set, and how near a held-out picture is to what was trained on.

train   everything else
object  1 % of the objects, held out in every style: an object never seen
combo   2 % of the (object, style) pairs whose object is seen in at least three other styles, one style an
        object, all its skin tones and gender variants together: known concepts combined anew (paper sec. 3.3)
tone    2 % of the pictures with a skin tone

The splits hang on hashes of names and on the default styles alone: adding a style moves no picture.
"""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_OBJECT_SHARE = 0.01
_COMBO_SHARE = 0.02
_TONE_SHARE = 0.02
_MIN_OBJECT_STYLES = 3  # an object in fewer styles is a poor test
_MIN_COMBO_STYLES = 4  # the held-out one and three others
NEAR_RMSE = 0.05  # below this, at 16 x 16 RGB in [0, 1], a picture counts as a copy of a held-out one


@dataclass(frozen=True)
class Item:
    """What a split needs to know of one picture."""

    object_key: str
    style: str
    family: str
    name: str
    has_tone: bool


@dataclass(frozen=True)
class Split:
    """A picture's split, and for `combo` whether no other rendering of the same drawing is in train."""

    name: str
    is_hard: bool = False

    def is_hard_at(self, distance: float) -> bool:
        """Whether the picture still tests composition, `distance` (RMSE) from its nearest training picture."""
        return self.is_hard and distance >= NEAR_RMSE


def _rank(tag: str, *parts: str) -> bytes:
    return hashlib.sha256("\0".join((tag, *parts)).encode()).digest()


def assign_splits(items: Sequence[Item]) -> list[Split]:
    """Return the split of each picture of the default styles; the order of the items does not matter."""
    styles: dict[str, set[str]] = defaultdict(set)
    families: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for item in items:
        styles[item.object_key].add(item.style)
        families[item.object_key].add((item.family, item.style))
    objects = _choose_objects(styles)
    combos = _choose_combos(styles, objects)
    toned = [
        item
        for item in items
        if item.has_tone and item.object_key not in objects and combos.get(item.object_key) != item.style
    ]
    toned.sort(key=lambda item: _rank("tone", item.style, item.name))
    tones = {(item.style, item.name) for item in toned[: round(_TONE_SHARE * len(toned))]}
    splits = []
    for item in items:
        if item.object_key in objects:
            splits.append(Split("object"))
        elif combos.get(item.object_key) == item.style:
            is_hard = not any(f == item.family and s != item.style for f, s in families[item.object_key])
            splits.append(Split("combo", is_hard))
        else:
            splits.append(Split("tone" if (item.style, item.name) in tones else "train"))
    return splits


def _choose_objects(styles: dict[str, set[str]]) -> set[str]:
    """Return the objects that no style shows in train."""
    seen = sorted(key for key, found in styles.items() if len(found) >= _MIN_OBJECT_STYLES)
    n_held_out = max(1, round(_OBJECT_SHARE * len(seen))) if seen else 0
    return set(sorted(seen, key=lambda key: _rank("object", key))[:n_held_out])


def _choose_combos(styles: dict[str, set[str]], objects: Collection[str]) -> dict[str, str]:
    """Return object -> the one style in which it is held out."""
    pairs = [
        (key, style)
        for key, found in sorted(styles.items())
        if len(found) >= _MIN_COMBO_STYLES and key not in objects
        for style in sorted(found)
    ]
    n_held_out = max(1, round(_COMBO_SHARE * len(pairs))) if pairs else 0
    combos: dict[str, str] = {}
    for key, style in sorted(pairs, key=lambda pair: _rank("combo", *pair)):
        if len(combos) == n_held_out:
            break
        combos.setdefault(key, style)
    return combos


def nearest_rmse(
    queries: npt.NDArray[np.float32], references: npt.NDArray[np.float32], chunk: int = 4096
) -> npt.NDArray[np.float64]:
    """Return for each query (Q, D) the RMSE to the nearest reference (R, D); inf where there is none.

    The neighbour is found by one matrix product a chunk, its distance then computed anew: differences of
    large squares would lose the small distances, which are the ones that count.
    """
    best = np.full(len(queries), np.inf)
    for start in range(0, len(references), chunk):
        part = references[start : start + chunk]
        distance = (part**2).sum(axis=1)[None] - 2 * queries @ part.T  # (Q, chunk), short of |query|^2
        nearest = part[distance.argmin(axis=1)].astype(np.float64)
        best = np.minimum(best, np.sqrt(((queries - nearest) ** 2).mean(axis=1)))
    return best


def admit_extra(
    object_keys: Sequence[str],
    thumbnails: npt.NDArray[np.float32],
    held_out_objects: Collection[str],
    held_out_thumbnails: npt.NDArray[np.float32],
) -> list[bool]:
    """Return which added pictures may be trained on: no held-out object, no near copy of a held-out picture.

    thumbnails (M, D) and held_out_thumbnails (H, D): 16 x 16 RGB in [0, 1], flat.
    """
    near = nearest_rmse(thumbnails, held_out_thumbnails) < NEAR_RMSE
    return [key not in held_out_objects and not copy for key, copy in zip(object_keys, near, strict=True)]
