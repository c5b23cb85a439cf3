"""Near-duplicates: pictures that are one picture saved twice, told by a perceptual hash or by a CLIP's vectors.

Source: paper §3.1 and 3.2: the nearest training picture of each evaluation picture under a contrastive model, and a
threshold chosen by hand so that few duplicates are missed. The hash: signs of the lowest frequencies of the grey
picture (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", §3.2), and its colours,
since drawings of one shape in two colours are two pictures. Colours are compared where either picture has ink: the
white around two drawings says nothing of them.

Shapes: n pictures, M pictures looked for, E width of a vector, P patches of a picture.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Vectors = NDArray[np.float32]  # (n, E), of unit length
Describe = Callable[[Sequence[Image.Image]], Vectors]

HASH_SIDE, HASH_BITS_SIDE, COLOUR_SIDE = 64, 16, 12
HASH_SIMILARITY = 1 - 2 * 32 / HASH_BITS_SIDE**2  # settled: at most 32 of 256 bits differ
CLIP_SIMILARITY = 0.95  # settled: the paper chose its threshold by eye and does not give it
LEAST_FREQUENCY = 0.01  # settled: of the greatest one
# settled: of 255, the channel that differs most; sprites saved as JPEG differ by up to 30, two colours by 36 or more
MAX_COLOUR_ERROR = 33
MIN_INK = 12  # of 255: a patch that differs less from the picture's border is background


@dataclass
class Known:
    """The pictures looked for, by their keys: vectors of unit length, and coarse colours."""

    keys: list[str] = field(default_factory=list)
    vectors: list[Vectors] = field(default_factory=list)
    colours: list[NDArray[np.float32]] = field(default_factory=list)

    def add(self, keys: Sequence[str], pictures: Sequence[Image.Image], describe: Describe) -> None:
        """Remember pictures."""
        self.keys += keys
        self.vectors.append(describe(pictures))
        self.colours.append(_colours(pictures))
        self.__dict__.pop("_stacked", None)

    def nearest(
        self, pictures: Sequence[Image.Image], describe: Describe, similarity: float
    ) -> list[str | None]:
        """For each picture the key of the remembered one that it nearly equals; None where there is none."""
        places = self.nearest_places(pictures, describe, similarity)
        return [None if place is None else self.keys[place] for place in places]

    def nearest_places(
        self, pictures: Sequence[Image.Image], describe: Describe, similarity: float
    ) -> list[int | None]:
        """For each picture the place in `keys` of the remembered one that it nearly equals; None: there is none."""
        if not self.keys or not pictures:
            return [None] * len(pictures)
        vectors, colours = self._stacked
        cosines = describe(pictures) @ vectors.T  # (n, M)
        own = _colours(pictures)
        found: list[int | None] = []
        for cosine, colour in zip(cosines, own, strict=True):
            alike = np.flatnonzero(cosine >= similarity)
            alike = alike[_colour_errors(colours[alike], colour) <= MAX_COLOUR_ERROR]
            found.append(int(alike[cosine[alike].argmax()]) if len(alike) else None)
        return found

    @functools.cached_property
    def _stacked(self) -> tuple[Vectors, NDArray[np.float32]]:
        return np.concatenate(self.vectors), np.concatenate(self.colours)


def hashes(pictures: Sequence[Image.Image]) -> Vectors:
    """Perceptual hashes as unit vectors: a cosine of 1 - 2 h / 256 says that h of 256 bits differ.

    A frequency that a picture hardly has gives 0, not a bit: half of those of a symmetric drawing are noise.
    """
    grey = np.stack(
        [
            np.asarray(picture.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX), np.float32)
            for picture in pictures
        ]
    )  # (n, 64, 64)
    transform = _cosines()
    low = (transform @ grey @ transform.T).reshape(len(grey), -1)  # (n, 256)
    above = low - np.median(low, axis=1, keepdims=True)
    least = LEAST_FREQUENCY * np.abs(above).max(axis=1, keepdims=True)
    signs = np.where(np.abs(above) > least, np.sign(above), 0)
    length = np.linalg.norm(signs, axis=1, keepdims=True)
    unit: Vectors = (signs / np.maximum(length, 1)).astype(np.float32)
    return unit


@functools.cache
def _cosines() -> NDArray[np.float32]:
    """Rows 1 .. 16 of the discrete cosine transform of 64 points; row 0, the mean, tells nothing of the shape."""
    frequency, place = np.arange(1, HASH_BITS_SIDE + 1)[:, None], np.arange(HASH_SIDE)[None, :]
    return np.cos(math.pi * frequency * (place + 0.5) / HASH_SIDE).astype(np.float32)  # (16, 64)


def _colours(pictures: Sequence[Image.Image]) -> NDArray[np.float32]:
    """Mean colours of 12 x 12 patches, 0..255: (n, P, 3)."""
    size = (COLOUR_SIDE, COLOUR_SIDE)
    patches = [
        np.asarray(picture.resize(size, Image.Resampling.BILINEAR), np.float32) for picture in pictures
    ]
    return np.stack(patches).reshape(len(patches), -1, 3)


def _colour_errors(known: NDArray[np.float32], colours: NDArray[np.float32]) -> NDArray[np.float32]:
    """How far the mean colour of the ink (P, 3) is from that of each of the known (n, P, 3): (n,), 0..255.

    Where either has ink. A patch that is half ink shows half of a difference, so the sum of differences is taken over
    the sum of ink; what a file format changes at edges takes itself away.
    """
    ink = np.maximum(_ink(known), _ink(colours[None]))  # (n, P)
    ink = np.maximum(ink, np.abs(_background(known) - _background(colours[None])).max(axis=-1))
    ink = np.where(ink < MIN_INK, 0, ink)
    difference = ((known - colours) * (ink > 0)[..., None]).sum(axis=1)  # (n, 3)
    amount = ink.sum(axis=1) / 255
    errors: NDArray[np.float32] = np.abs(difference).max(axis=-1) / np.maximum(amount, 1e-6)
    return errors


def _ink(colours: NDArray[np.float32]) -> NDArray[np.float32]:
    """How far each patch is from its picture's background, 0..255: (n, P, 3) -> (n, P)."""
    ink: NDArray[np.float32] = np.abs(colours - _background(colours)).max(axis=-1)
    return ink


def _background(colours: NDArray[np.float32]) -> NDArray[np.float32]:
    """The middle colour of the patches at the border: (n, P, 3) -> (n, 1, 3)."""
    at = np.arange(COLOUR_SIDE**2).reshape(COLOUR_SIDE, COLOUR_SIDE)
    border = np.concatenate([at[0], at[-1], at[1:-1, 0], at[1:-1, -1]])
    middle: NDArray[np.float32] = np.median(colours[:, border], axis=1, keepdims=True)
    return middle
