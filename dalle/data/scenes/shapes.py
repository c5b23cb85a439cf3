"""Plain shapes in one colour, drawn by formula."""

import math

import numpy as np
from PIL import Image, ImageDraw

from dalle.data.scenes.colours import THING_COLOURS
from dalle.data.scenes.cutouts import CutOut

# No diamond: the art set holds one out as an object.
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "hexagon")
PLURALS = {"cross": "crosses"}
_SIDE = 512  # drawn at four times the largest use, then averaged
SHAPE_LICENCE = "MIT"  # as this program


def draw_shape(name: str, colour: str) -> CutOut:
    """Return a shape as a cut-out of 128 pixels; KeyError for an unknown colour, ValueError for a shape."""
    mask = Image.new("L", (_SIDE, _SIDE), 0)
    pen = ImageDraw.Draw(mask)
    whole = (0, 0, _SIDE - 1, _SIDE - 1)
    if name in ("circle", "ring"):
        pen.ellipse(whole, fill=255)
        if name == "ring":
            inner = _SIDE * 0.27
            pen.ellipse((inner, inner, _SIDE - 1 - inner, _SIDE - 1 - inner), fill=0)
    elif name == "square":
        pen.rectangle((_SIDE * 0.06, _SIDE * 0.06, _SIDE * 0.94, _SIDE * 0.94), fill=255)
    elif name == "cross":
        for box in ((0.34, 0.0, 0.66, 1.0), (0.0, 0.34, 1.0, 0.66)):
            pen.rectangle(tuple(share * (_SIDE - 1) for share in box), fill=255)
    else:
        pen.polygon([(x * (_SIDE - 1), y * (_SIDE - 1)) for x, y in _outline(name)], fill=255)
    alpha = np.asarray(mask.reduce(4), dtype=np.float32) / 255  # (128, 128)
    rgb = np.broadcast_to(np.array(THING_COLOURS[colour], np.float32) / 255, (*alpha.shape, 3))
    return np.dstack([rgb, alpha]).astype(np.float32)


def _outline(name: str) -> list[tuple[float, float]]:
    """Return the corners of a shape in the unit square, y downward."""
    if name == "triangle":
        return [(0.5, 0.05), (1.0, 0.95), (0.0, 0.95)]
    if name == "hexagon":
        return _star([0.5] * 6, 30)
    if name == "star":
        return _star([0.5, 0.21] * 5, -90)
    if name != "heart":
        raise ValueError(f"shape is {name!r}; it has to be one of {', '.join(SHAPES)}")
    turns = [2 * math.pi * i / 120 for i in range(120)]
    xs = [16 * math.sin(t) ** 3 for t in turns]
    ys = [-13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t) for t in turns]
    return [(0.5 + x / 32, 0.08 + (y - min(ys)) / 32) for x, y in zip(xs, ys, strict=True)]


def _star(radii: list[float], start: float) -> list[tuple[float, float]]:
    angles = [math.radians(start + 360 * i / len(radii)) for i in range(len(radii))]
    return [(0.5 + r * math.cos(a), 0.5 + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]
