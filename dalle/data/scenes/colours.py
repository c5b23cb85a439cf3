"""The colour words of scenes: what a thing or a ground of that word looks like, and which word a pixel is.

Distances are Euclidean in CIE Lab.
"""

from itertools import combinations

import numpy as np
import numpy.typing as npt

from dalle.data.art.captions import to_lab

THING_COLOURS = {
    "red": (214, 38, 50),
    "orange": (247, 138, 20),
    "yellow": (253, 211, 50),
    "green": (66, 160, 62),
    "blue": (40, 110, 215),
    "purple": (132, 66, 190),
    "pink": (246, 130, 185),
    "brown": (126, 76, 42),
    "black": (38, 38, 42),
    "gray": (142, 148, 154),
}
GROUND_COLOURS = {
    "white": (255, 255, 255),
    "red": (232, 92, 88),
    "orange": (253, 180, 98),
    "yellow": (255, 234, 135),
    "green": (150, 212, 132),
    "blue": (128, 184, 245),
    "purple": (182, 152, 228),
    "pink": (252, 186, 212),
    "gray": (192, 196, 200),
    "black": (28, 28, 32),
}
# Words whose shades and blurred edges pass for each other: never two of them in one scene.
_ALIKE = (
    ("red", "orange", "brown"),
    ("red", "pink"),
    ("orange", "yellow"),
    ("brown", "black", "gray"),
    ("blue", "purple"),
    ("purple", "pink"),
    ("white", "gray"),
    ("white", "yellow"),
)
CONFUSABLE = frozenset(frozenset(pair) for words in _ALIKE for pair in combinations(words, 2))

_MIN_CONTRAST = 55.0  # in Lab, of a thing and its ground
_MIN_LIGHTNESS = 25.0  # of that, for letters: difference in lightness, 0 to 100

_THINGS_LAB = to_lab(np.array([*THING_COLOURS.values(), (255, 255, 255)]))
_GROUNDS_LAB = to_lab(np.array(list(GROUND_COLOURS.values())))
_THING_WORDS = (*THING_COLOURS, "white")
_GROUND_WORDS = tuple(GROUND_COLOURS)


def are_distinct(first: str, second: str) -> bool:
    """Return whether two colour words can be told apart in one small picture."""
    return first != second and frozenset((first, second)) not in CONFUSABLE


def stands_out(word: str, ground: str) -> bool:
    """Return whether a thing of a colour word is seen on a ground, and its colour told from the ground's."""
    return are_distinct(word, ground) and float(np.linalg.norm(_from_ground(word, ground))) >= _MIN_CONTRAST


def is_legible(word: str, ground: str) -> bool:
    """Return whether letters of a colour word stand out from a ground, by lightness too."""
    return stands_out(word, ground) and bool(abs(_from_ground(word, ground)[0]) >= _MIN_LIGHTNESS)


def _from_ground(word: str, ground: str) -> npt.NDArray[np.float64]:
    """Return the difference in Lab, (3,), of a thing's colour word and a ground's."""
    thing, behind = _THINGS_LAB[_THING_WORDS.index(word)], _GROUNDS_LAB[_GROUND_WORDS.index(ground)]
    difference: npt.NDArray[np.float64] = thing - behind
    return difference


def colour_shares(pixels: npt.NDArray[np.uint8]) -> dict[str, float]:
    """Return the share of each colour word among pixels (P, 3), the words nearest in Lab; white is one."""
    nearest = _distances(pixels, _THINGS_LAB).argmin(axis=1)  # (P,)
    counts = np.bincount(nearest, minlength=len(_THING_WORDS))
    return {word: float(n) / max(1, len(pixels)) for word, n in zip(_THING_WORDS, counts, strict=True)}


def ranked_words(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
    """Return for pixels (P, 3) the rank of each colour word by distance, 0 for the nearest, (P, words)."""
    ranks: npt.NDArray[np.intp] = _distances(pixels, _THINGS_LAB).argsort(axis=1).argsort(axis=1)
    return ranks


def word_index(word: str) -> int:
    """Return the column of a colour word in `ranked_words`."""
    return _THING_WORDS.index(word)


def ground_word(colour: npt.NDArray[np.uint8]) -> str:
    """Return the ground word nearest to a colour (3,)."""
    return _GROUND_WORDS[int(_distances(colour[None], _GROUNDS_LAB).argmin())]


def _distances(pixels: npt.NDArray[np.uint8], palette: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    distances: npt.NDArray[np.float64] = ((to_lab(pixels)[:, None] - palette[None]) ** 2).sum(axis=2)
    return distances  # (P, words), squared
