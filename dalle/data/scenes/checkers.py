"""Does a picture show what its scene says? One pure function for each attribute, no model.

Every checker reads a picture (H, W, 3) uint8 of any size at 64 x 64. Ink is what differs from the ground, and the
ground is what the border shows. They say nothing of *which* object is shown: `a red apple` passes for colour with
any red thing. Words are read by reader.py; top and bottom are compared with other pictures, not checked here.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from dalle.data.art.captions import to_lab
from dalle.data.scenes.colours import colour_shares, ground_word, ranked_words, word_index
from dalle.data.scenes.components import Mask, label_regions, region_sizes
from dalle.data.scenes.scene import Relation, Scene, Size

Pixels = npt.NDArray[np.uint8]

_SIDE = 64
_INK = 18.0  # distance in Lab from the ground, above which a pixel is ink
_FAINT = 0.3  # and at least this share of the 95th percentile: a stained ground is no ink
_MIN_INK = 40  # pixels of 64 x 64: less is no thing but a stain
_MIN_PART = 0.08  # of the ink: less of a colour is no thing of that colour
_MIN_REGION = 0.35  # of the largest region: a smaller one is a splinter and is not counted
_NEAREST = 3  # a thing's colour is among this many words nearest to its pixels: small things come out murky
_OFFSET = 0.12  # of the side: the least distance of two centres along an axis
_BIG, _SMALL = 0.64, 0.50  # extents of ink: big is at least, small at most this share of the side
_SIZE_RATIO = 1.6  # areas of a big and a small thing


@dataclass(frozen=True)
class Reading:
    """A picture as the checkers see it: its ground, and which of its pixels are ink."""

    pixels: Pixels  # (64, 64, 3)
    ground: Pixels  # (3,): median of the border
    distance: npt.NDArray[np.float64]  # (64, 64) of each pixel from the ground, in Lab

    @property
    def ink(self) -> Mask:
        """The pixels (64, 64) that are not ground."""
        found: Mask = self.distance > max(_INK, _FAINT * float(np.percentile(self.distance, 95)))
        return found


def read(picture: Pixels) -> Reading:
    """Return a picture (H, W, 3), uint8, as the checkers see it."""
    small = Image.fromarray(picture).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    pixels = np.asarray(small)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])  # (256, 3)
    ground = np.median(border, axis=0).astype(np.uint8)
    lab = to_lab(pixels.reshape(-1, 3)) - to_lab(ground[None])
    distance = np.sqrt((lab**2).sum(axis=1)).reshape(_SIDE, _SIDE)
    return Reading(pixels, ground, distance)


def has_colour(picture: Pixels, color: str) -> bool:
    """Return whether most of the ink that has a colour is of this colour word."""
    seen = read(picture)
    if seen.ink.sum() < _MIN_INK:
        return False
    shares = colour_shares(seen.pixels[seen.ink])
    del shares["white"]
    return max(shares, key=lambda word: shares[word]) == color


def has_ground(picture: Pixels, ground: str) -> bool:
    """Return whether the border is of this ground word."""
    return ground_word(read(picture).ground) == ground


def has_count(picture: Pixels, count: int) -> bool:
    """Return whether the picture holds this many separate things of similar size."""
    sizes = region_sizes(read(picture).ink)
    return bool(sizes) and sizes[0] >= _MIN_INK and sum(n >= _MIN_REGION * sizes[0] for n in sizes) == count


def has_size(picture: Pixels, size: Size) -> bool:
    """Return whether the ink of a picture of one thing spans much of it (big) or little (small)."""
    labels = label_regions(read(picture).ink)
    names, counts = np.unique(labels[labels > 0], return_counts=True)
    if not len(names) or counts.max() < _MIN_INK / 2:
        return False
    rows, columns = np.nonzero(np.isin(labels, names[counts >= _MIN_REGION * counts.max()]))
    extent = max(_spread(rows), _spread(columns)) / _SIDE
    return extent >= _BIG if size == "big" else extent <= _SMALL


def _spread(places: npt.NDArray[np.intp]) -> float:
    """Return the length that all but the outermost hundredth of the ink spans."""
    low, high = np.percentile(places, (0.5, 99.5))
    return float(high - low + 1)


def has_bigger(picture: Pixels, big: str, small: str) -> bool:
    """Return whether the thing of colour `big` is larger than the one of colour `small`, and both are there."""
    seen = read(picture)
    first, second = (mask.sum() for mask in _parts(seen, big, small))
    return bool(second >= _MIN_INK / 2 and first >= _SIZE_RATIO * second)


def has_relation(picture: Pixels, first: str, relation: Relation, second: str) -> bool:
    """Return whether the thing of colour `first` is left or right of, above or below that of colour `second`."""
    seen = read(picture)
    masks = _parts(seen, first, second)
    if seen.ink.sum() < _MIN_INK or any(mask.sum() < _MIN_PART * seen.ink.sum() for mask in masks):
        return False
    (y1, x1), (y2, x2) = (_middle(mask) for mask in masks)
    along = {"left": x2 - x1, "right": x1 - x2, "above": y2 - y1, "below": y1 - y2}[relation]
    across = y2 - y1 if relation in ("left", "right") else x2 - x1
    return along >= _OFFSET * _SIDE and along > abs(across)


def _parts(seen: Reading, first: str, second: str) -> tuple[Mask, Mask]:
    """Return the ink (64, 64) of two colours: what is nearer to the one than to the other, and near enough."""
    ranks = ranked_words(seen.pixels.reshape(-1, 3)).reshape(_SIDE, _SIDE, -1)
    one, other = ranks[..., word_index(first)], ranks[..., word_index(second)]
    return seen.ink & (one < _NEAREST) & (one < other), seen.ink & (other < _NEAREST) & (other < one)


def _middle(mask: Mask) -> tuple[float, float]:
    """Return the medians of row and column: a few stray pixels do not move them."""
    rows, columns = np.nonzero(mask)
    return float(np.median(rows)), float(np.median(columns))


def shows(picture: Pixels, scene: Scene) -> bool:
    """Return whether a picture shows what its scene is about: the attribute that the scene's kind names.

    ValueError for a word, which takes a reader, and for top and bottom, which takes other pictures.
    """
    if scene.kind == "color":
        return has_colour(picture, _colour(scene, 0))
    if scene.kind == "count":
        return has_count(picture, scene.count)
    if scene.kind == "ground":
        return has_ground(picture, scene.ground)
    if scene.kind == "position":
        assert scene.relation is not None
        return has_relation(picture, _colour(scene, 0), scene.relation, _colour(scene, 1))
    if scene.kind == "size":
        sizes = [thing.size for thing in scene.things]
        if len(sizes) == 2:
            big = sizes.index("big")
            return has_bigger(picture, _colour(scene, big), _colour(scene, 1 - big))
        assert sizes[0] is not None
        return has_size(picture, sizes[0])
    raise ValueError(f"a {scene.kind} scene has no checker of its own: words need a reader, pairs a gallery")


def _colour(scene: Scene, i: int) -> str:
    color = scene.things[i].color
    assert color is not None
    return color
