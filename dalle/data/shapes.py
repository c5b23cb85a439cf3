"""A synthetic data set in which captions decide pictures: coloured circles and squares on white.

Source: none in the paper; the smallest set that shows whether a model follows its captions.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dalle import images

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 220), "yellow": (240, 200, 20)}
SHAPES = ("circle", "square")


def write_shapes(folder: str | Path, n: int, seed: int, size: int = 32, shuffled: bool = False) -> Path:
    """Write `n` pictures of `size` pixels a side, each with a caption ("a red circle") in a .txt.

    The eight kinds take turns; places and sizes are random. With `shuffled` the same captions go to the same
    pictures in random order: the control from which nothing can be learned. Returns the folder.
    """
    if n < 1 or size < 8:
        raise ValueError(f"n is {n} and size {size}; n has to be >= 1, size >= 8")
    rng = np.random.default_rng(seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    captions = []
    for index in range(n):
        colour, shape = kinds[index % len(kinds)]
        images.save_png(_draw(colour, shape, size, rng), folder / f"{index:06d}.png", None)
        captions.append(f"a {colour} {shape}")
    order = rng.permutation(n) if shuffled else np.arange(n)
    for index, source in enumerate(order.tolist()):
        (folder / f"{index:06d}.txt").write_text(captions[source] + "\n", encoding="utf-8")
    return folder


def _draw(colour: str, shape: str, size: int, rng: np.random.Generator) -> Image.Image:
    side = int(rng.integers(3 * size // 8, 3 * size // 4 + 1))
    left, top = (int(offset) for offset in rng.integers(0, size - side + 1, size=2))
    image = Image.new("RGB", (size, size), "white")
    box = (left, top, left + side - 1, top + side - 1)
    pen = ImageDraw.Draw(image)
    draw = pen.ellipse if shape == "circle" else pen.rectangle
    draw(box, fill=COLOURS[colour])
    return image
