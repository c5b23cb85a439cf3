"""A scene as a picture: things in fixed places on a plain ground.

Places are fixed on purpose: a model with a small grid of tokens sees each thing cut into tokens the same way.
"""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from dalle.data.scenes.colours import GROUND_COLOURS
from dalle.data.scenes.lettering import letter_word
from dalle.data.scenes.library import picture_of, picture_of_shape
from dalle.data.scenes.objects import Source
from dalle.data.scenes.scene import Scene, Thing

Place = tuple[float, float, float]  # centre x, centre y and longer side, as shares of the picture's side

_SINGLE: Place = (0.5, 0.5, 0.74)
_BIG: Place = (0.5, 0.5, 0.9)
_SMALL: Place = (0.5, 0.5, 0.32)
_SIDE = 0.4  # of things in a row: what is left between two survives the blur of 64 pixels
_ROW = ((0.25, 0.5, _SIDE), (0.75, 0.5, _SIDE))
_COLUMN = ((0.5, 0.25, _SIDE), (0.5, 0.75, _SIDE))
_COUNTED = 0.35  # of counted things: they must not touch
_COUNTS: dict[int, tuple[Place, ...]] = {
    1: ((0.5, 0.5, 0.6),),
    2: ((0.25, 0.5, _COUNTED), (0.75, 0.5, _COUNTED)),
    3: ((0.5, 0.25, _COUNTED), (0.25, 0.75, _COUNTED), (0.75, 0.75, _COUNTED)),
    4: ((0.25, 0.25, _COUNTED), (0.75, 0.25, _COUNTED), (0.25, 0.75, _COUNTED), (0.75, 0.75, _COUNTED)),
}


def places(scene: Scene) -> tuple[Place, ...]:
    """Return where the things of a scene stand, in their order; a counted thing has several places."""
    if scene.kind == "count":
        return _COUNTS[scene.count]
    if scene.kind == "position":
        row = _ROW if scene.relation in ("left", "right") else _COLUMN
        return row if scene.relation in ("left", "above") else row[::-1]
    if scene.kind == "top_bottom":
        return _COLUMN
    if scene.kind == "size":
        sizes = [thing.size for thing in scene.things]
        if len(sizes) == 1:
            return (_BIG if sizes[0] == "big" else _SMALL,)
        if sizes[0] == "big":
            return ((0.32, 0.5, 0.58), (0.82, 0.5, 0.26))
        return ((0.18, 0.5, 0.26), (0.68, 0.5, 0.58))
    return (_SINGLE,)


def draw_scene(
    scene: Scene, sources: Mapping[tuple[str, str], Source], fonts: Mapping[str, Path], size: int
) -> Image.Image:
    """Return the picture, RGB, (size, size).

    sources: drawings by object and style, those of the scene at least. fonts: files by font name.
    """
    picture = Image.new("RGBA", (size, size), (*GROUND_COLOURS[scene.ground], 255))
    if scene.word is not None:
        assert scene.font is not None and scene.color is not None
        letters = letter_word(scene.word, scene.font, fonts[scene.font], scene.color, size)
        picture.alpha_composite(letters)
        return picture.convert("RGB")
    spots = places(scene)
    things = scene.things * len(spots) if scene.kind == "count" else scene.things
    for thing, (x, y, side) in zip(things, spots, strict=True):
        cut = _cut_out(thing, sources)
        scale = side * size / max(cut.size)
        fitted = cut.resize(
            (max(1, round(cut.width * scale)), max(1, round(cut.height * scale))), Image.Resampling.LANCZOS
        )
        picture.alpha_composite(
            fitted, (round(x * size - fitted.width / 2), round(y * size - fitted.height / 2))
        )
    return picture.convert("RGB")


def _cut_out(thing: Thing, sources: Mapping[tuple[str, str], Source]) -> Image.Image:
    if thing.style is not None:
        return picture_of(sources[thing.object, thing.style], thing.color)
    assert thing.color is not None
    return picture_of_shape(thing.object, thing.color)
