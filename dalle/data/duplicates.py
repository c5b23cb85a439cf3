"""Near-duplicates: pictures that are one picture saved twice, told by a perceptual hash or by a CLIP's vectors.

Source: paper §3.1 and 3.2: the nearest training picture of each evaluation picture under a contrastive model, and a
threshold chosen by hand so that few duplicates are missed. The hash: signs of the lowest frequencies of the grey
picture (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", §3.2), and its colours,
since drawings of one shape in two colours are two pictures.

Shapes: n pictures, M pictures looked for, E width of a vector.
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

HASH_SIDE, HASH_BITS_SIDE, COLOUR_SIDE = 64, 16, 4
HASH_SIMILARITY = 1 - 2 * 32 / HASH_BITS_SIDE**2  # settled: at most 32 of 256 bits differ
CLIP_SIMILARITY = 0.95  # settled: the paper chose its threshold by eye and does not give it
MAX_COLOUR_ERROR = (
    20  # of 255, mean over the patches: a saved copy keeps its colours, another drawing does not
)


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
        if not self.keys or not pictures:
            return [None] * len(pictures)
        vectors, colours = self._stacked
        cosines = describe(pictures) @ vectors.T  # (n, M)
        own = _colours(pictures)
        found: list[str | None] = []
        for cosine, colour in zip(cosines, own, strict=True):
            alike = np.flatnonzero(cosine >= similarity)
            alike = alike[np.abs(colours[alike] - colour).mean(axis=1) <= MAX_COLOUR_ERROR]
            found.append(self.keys[int(alike[cosine[alike].argmax()])] if len(alike) else None)
        return found

    @functools.cached_property
    def _stacked(self) -> tuple[Vectors, NDArray[np.float32]]:
        return np.concatenate(self.vectors), np.concatenate(self.colours)


def hashes(pictures: Sequence[Image.Image]) -> Vectors:
    """Perceptual hashes as unit vectors of +-1/16: a cosine of 1 - 2 h / 256 says that h of 256 bits differ."""
    grey = np.stack(
        [
            np.asarray(picture.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX), np.float32)
            for picture in pictures
        ]
    )  # (n, 64, 64)
    transform = _cosines()
    low = (transform @ grey @ transform.T).reshape(len(grey), -1)  # (n, 256)
    bits = low > np.median(low, axis=1, keepdims=True)
    signs = np.where(bits, 1, -1) / HASH_BITS_SIDE
    return signs.astype(np.float32)


@functools.cache
def _cosines() -> NDArray[np.float32]:
    """Rows 1 .. 16 of the discrete cosine transform of 64 points; row 0, the mean, tells nothing of the shape."""
    frequency, place = np.arange(1, HASH_BITS_SIDE + 1)[:, None], np.arange(HASH_SIDE)[None, :]
    return np.cos(math.pi * frequency * (place + 0.5) / HASH_SIDE).astype(np.float32)  # (16, 64)


def _colours(pictures: Sequence[Image.Image]) -> NDArray[np.float32]:
    """Mean colours of 4 x 4 patches, 0..255: (n, 48)."""
    size = (COLOUR_SIDE, COLOUR_SIDE)
    patches = [np.asarray(picture.resize(size, Image.Resampling.BOX), np.float32) for picture in pictures]
    return np.stack(patches).reshape(len(patches), -1)
