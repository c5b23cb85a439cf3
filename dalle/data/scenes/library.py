"""What scenes can show: each drawing in its own colours and in those it can be painted in."""

import functools
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from dalle.data.scenes.checkers import has_count
from dalle.data.scenes.colours import THING_COLOURS, colour_shares
from dalle.data.scenes.cutouts import MIN_PAINTED, CutOut, cut_out, paint, painted_share, to_image
from dalle.data.scenes.objects import Source
from dalle.data.scenes.shapes import SHAPES, draw_shape
from dalle.images import open_image

_MEASURED_SIDE = 26  # pixels: the size at which things of a pair are seen by a model of 64 px
_MIN_SHARE = 0.6  # of the ink, for a drawing to be called by a colour
_NOTABLE_SHARE = 0.12  # of the ink, for a colour to matter beside others


@dataclass(frozen=True)
class Look:
    """A drawing of an object in one colour."""

    object: str
    style: str | None  # None: a shape
    color: str | None  # None: its own colours; else the word that it shows
    shown: frozenset[str]  # every colour word that is a notable part of it
    is_whole: bool  # one connected piece, so that things can be counted


def looks_of(source: Source) -> list[Look]:
    """Return every look of a drawing: its own colours, and each colour word that the painted one shows."""
    cut = load(source)
    unpainted = _look(source, None, cut)
    looks, own = [unpainted], _colour_of(cut)
    small = np.asarray(_fit(to_image(cut), 2 * _MEASURED_SIDE), dtype=np.float32) / np.float32(255)
    if own is not None:
        looks.append(replace(unpainted, color=own))
    if painted_share(cut) >= MIN_PAINTED:
        others = [word for word in THING_COLOURS if word != own]
        painted = {word: paint(small, word) for word in others}
        looks += [_look(source, word, cut) for word, cut in painted.items() if _colour_of(cut) == word]
    return looks


def shape_looks() -> list[Look]:
    """Return every shape in every colour."""
    return [Look(name, None, word, frozenset((word,)), True) for name in SHAPES for word in THING_COLOURS]


def _look(source: Source, word: str | None, cut: CutOut) -> Look:
    shares = _shares(cut)
    shown = frozenset(w for w, share in shares.items() if share > _NOTABLE_SHARE)
    return Look(source.object, source.style, word, shown, _is_whole(cut))


def _shares(cut: CutOut) -> dict[str, float]:
    small = np.asarray(_fit(to_image(cut), _MEASURED_SIDE))  # (h, w, 4)
    return colour_shares(small[small[..., 3] > 128][:, :3])


def _colour_of(cut: CutOut) -> str | None:
    word, share = max(_shares(cut).items(), key=lambda item: item[1])
    return word if share >= _MIN_SHARE and word in THING_COLOURS else None


def _is_whole(cut: CutOut) -> bool:
    """Return whether the checker of counts sees one piece, on a ground as bright as white."""
    small = _fit(to_image(cut), _MEASURED_SIDE)
    page = Image.new("RGB", (2 * _MEASURED_SIDE, 2 * _MEASURED_SIDE), "white")
    page.paste(small, (_MEASURED_SIDE // 2, _MEASURED_SIDE // 2), small)
    return has_count(np.asarray(page), 1)


def _fit(image: Image.Image, side: int) -> Image.Image:
    """Resize a picture so that its longer side is `side`."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)


def load(source: Source) -> CutOut:
    """Read a drawing and cut it out."""
    return cut_out(open_image(source.path), has_holes=source.holes)


@functools.lru_cache(maxsize=2000)
def picture_of(source: Source, color: str | None) -> Image.Image:
    """Return a drawing in its own colours, or in a colour word, as an RGBA cut-out cropped to its ink."""
    unpainted, own = _unpainted(source)
    if color in (None, own):
        return unpainted
    return to_image(paint(np.asarray(unpainted, dtype=np.float32) / np.float32(255), color))


@functools.lru_cache(maxsize=2000)
def _unpainted(source: Source) -> tuple[Image.Image, str | None]:
    """Return a drawing as a cut-out, and the colour word that it shows by itself."""
    cut = load(source)
    return to_image(cut), _colour_of(cut)


@functools.cache
def picture_of_shape(name: str, color: str) -> Image.Image:
    """Return a shape as an RGBA cut-out."""
    return to_image(draw_shape(name, color))
