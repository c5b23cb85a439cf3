"""Sprites drawn by code: 20 objects in 10 colours, outlined and shaded, the small data set that a maker might have.

    python benchmarks/sprites.py OUT      # writes OUT/known and OUT/unseen, and OUT/sheet.png

`known` holds 160 captioned pictures, `unseen` the 40 other combinations: each object in two colours that it does not
have in `known`, and each colour on four objects.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from dalle import images

SIZE = 128  # pixels a side
SCALE = 2  # drawn larger, then averaged down
BACKGROUND = (222, 214, 190)
OUTLINE = (8, 8, 14)
COLOURS = {
    "red": (214, 40, 44),
    "orange": (244, 138, 30),
    "yellow": (246, 216, 44),
    "green": (48, 158, 64),
    "cyan": (50, 200, 214),
    "blue": (48, 86, 222),
    "purple": (140, 62, 190),
    "pink": (246, 136, 184),
    "brown": (132, 84, 48),
    "white": (232, 232, 236),
}
GOLD, WOOD, LEAF, GLASS = (226, 178, 62), (120, 78, 44), (60, 140, 60), (190, 220, 230)

Points = list[tuple[float, float]]
Colour = tuple[int, int, int]


class Pen:
    """Draws outlined, shaded parts of one sprite; coordinates are in 0..100, y downwards."""

    def __init__(self, colour: Colour) -> None:
        self.colour = colour
        self.side = SIZE * SCALE
        self.image = Image.new("RGB", (self.side, self.side), BACKGROUND)

    def polygon(self, points: Points, colour: Colour | None = None) -> None:
        """Fill a polygon."""
        self._part(lambda draw: draw.polygon([self._at(point) for point in points], fill=255), colour)

    def ellipse(self, box: tuple[float, float, float, float], colour: Colour | None = None) -> None:
        """Fill an ellipse in (left, top, right, bottom)."""
        corners = [self._at(box[:2]), self._at(box[2:])]
        self._part(lambda draw: draw.ellipse(corners, fill=255), colour)

    def ring(
        self, box: tuple[float, float, float, float], width: float, colour: Colour | None = None
    ) -> None:
        """Draw a ring of `width` whose outer edge is in (left, top, right, bottom)."""
        corners = [self._at(box[:2]), self._at(box[2:])]
        thickness = round(width * self.side / 100)
        self._part(lambda draw: draw.ellipse(corners, outline=255, width=thickness), colour)

    def _at(self, point: tuple[float, ...]) -> tuple[float, float]:
        return point[0] * self.side / 100, point[1] * self.side / 100

    def _part(self, draw: Callable[[ImageDraw.ImageDraw], None], colour: Colour | None) -> None:
        mask = Image.new("L", (self.side, self.side), 0)
        draw(ImageDraw.Draw(mask))
        self.image.paste(OUTLINE, mask=mask.filter(ImageFilter.MaxFilter(4 * SCALE + 1)))  # 2 pixels wide
        left, top, right, bottom = mask.getbbox() or (0, 0, 1, 1)
        y, x = np.mgrid[: self.side, : self.side].astype(np.float32)
        along = ((x - left) / (right - left) + 1.5 * (y - top) / (bottom - top)) / 2.5  # 0 at the light
        shade = np.select([along < 0.22, along < 0.55], [1.28, 1.0], 0.66)[..., None]  # three flat tones
        filled = np.clip(np.array(colour or self.colour) * shade, 0, 255).astype(np.uint8)
        self.image.paste(Image.fromarray(filled), mask=mask)


def _star(cx: float, cy: float, outer: float, inner: float, n: int) -> Points:
    angles = np.pi * np.arange(2 * n) / n - np.pi / 2
    radii = np.where(np.arange(2 * n) % 2 == 0, outer, inner)
    return [
        (float(cx + r * np.cos(a)), float(cy + r * np.sin(a))) for r, a in zip(radii, angles, strict=True)
    ]


def _key(pen: Pen) -> None:
    pen.polygon([(45, 46), (55, 46), (55, 90), (45, 90)])
    pen.polygon([(55, 68), (72, 68), (72, 76), (55, 76)])
    pen.polygon([(55, 80), (68, 80), (68, 88), (55, 88)])
    pen.ring((28, 8, 72, 52), 12)


def _heart(pen: Pen) -> None:
    angles = np.linspace(0, 2 * np.pi, 60)
    x = 16 * np.sin(angles) ** 3
    y = 13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles)
    pen.polygon([(float(50 + 2.4 * a), float(48 - 2.4 * b)) for a, b in zip(x, y, strict=True)])


def _sword(pen: Pen) -> None:
    pen.polygon([(44, 70), (56, 70), (56, 94), (44, 94)], WOOD)
    pen.polygon([(42, 20), (50, 5), (58, 20), (58, 64), (42, 64)])
    pen.polygon([(26, 62), (74, 62), (74, 71), (26, 71)], GOLD)


def _shield(pen: Pen) -> None:
    pen.polygon([(16, 12), (84, 12), (84, 50), (70, 76), (50, 92), (30, 76), (16, 50)])
    pen.polygon(
        [
            (45, 24),
            (55, 24),
            (55, 42),
            (70, 42),
            (70, 52),
            (55, 52),
            (55, 76),
            (45, 76),
            (45, 52),
            (30, 52),
            (30, 42),
            (45, 42),
        ],
        GOLD,
    )


def _potion(pen: Pen) -> None:
    pen.polygon([(41, 8), (59, 8), (59, 20), (41, 20)], WOOD)
    pen.polygon([(43, 20), (57, 20), (57, 44), (43, 44)], GLASS)
    pen.ellipse((20, 38, 80, 94))
    pen.ellipse((32, 52, 44, 66), GLASS)


def _gem(pen: Pen) -> None:
    pen.polygon([(28, 18), (72, 18), (92, 42), (50, 92), (8, 42)])
    pen.polygon([(36, 24), (64, 24), (70, 42), (30, 42)])


def _mushroom(pen: Pen) -> None:
    pen.polygon([(38, 50), (62, 50), (68, 90), (32, 90)], (226, 208, 176))
    pen.polygon([(8, 56), (12, 36), (26, 18), (50, 10), (74, 18), (88, 36), (92, 56)])
    pen.ellipse((24, 28, 42, 46), (240, 236, 224))
    pen.ellipse((58, 24, 76, 42), (240, 236, 224))


def _ghost(pen: Pen) -> None:
    pen.polygon(
        [
            (18, 90),
            (18, 44),
            (28, 18),
            (50, 8),
            (72, 18),
            (82, 44),
            (82, 90),
            (70, 78),
            (60, 90),
            (50, 78),
            (40, 90),
            (30, 78),
        ]
    )
    pen.ellipse((32, 34, 44, 52), (20, 20, 30))
    pen.ellipse((56, 34, 68, 52), (20, 20, 30))


def _fish(pen: Pen) -> None:
    pen.polygon([(66, 50), (94, 24), (94, 78)])
    pen.ellipse((6, 26, 76, 76))
    pen.ellipse((18, 40, 28, 50), (20, 20, 30))


def _house(pen: Pen) -> None:
    pen.polygon([(20, 46), (80, 46), (80, 92), (20, 92)], (214, 198, 166))
    pen.polygon([(6, 48), (50, 8), (94, 48)])
    pen.polygon([(42, 64), (58, 64), (58, 92), (42, 92)], WOOD)


def _tree(pen: Pen) -> None:
    pen.polygon([(43, 66), (57, 66), (57, 94), (43, 94)], WOOD)
    for top, width in ((40, 40), (24, 32), (8, 24)):
        pen.polygon([(50, top), (50 + width, top + 32), (50 - width, top + 32)])


def _flower(pen: Pen) -> None:
    pen.polygon([(47, 50), (53, 50), (53, 94), (47, 94)], LEAF)
    pen.ellipse((53, 70, 80, 84), LEAF)
    for angle in np.arange(6) * np.pi / 3:
        x, y = 50 + 20 * np.cos(angle), 34 + 20 * np.sin(angle)
        pen.ellipse((x - 13, y - 13, x + 13, y + 13))
    pen.ellipse((39, 23, 61, 45), GOLD)


def _cup(pen: Pen) -> None:
    pen.ring((54, 36, 92, 74), 9)
    pen.polygon([(14, 26), (70, 26), (64, 88), (20, 88)])
    pen.ellipse((14, 18, 70, 34), (70, 44, 30))


def _bell(pen: Pen) -> None:
    pen.ring((40, 4, 60, 24), 6, GOLD)
    pen.ellipse((40, 76, 60, 95), GOLD)
    pen.polygon([(30, 40), (38, 22), (50, 16), (62, 22), (70, 40), (74, 66), (88, 82), (12, 82), (26, 66)])


def _umbrella(pen: Pen) -> None:
    pen.polygon([(47, 40), (53, 40), (53, 92), (47, 92)], WOOD)
    pen.polygon([(34, 84), (53, 84), (53, 92), (34, 92)], WOOD)
    pen.polygon(
        [
            (5, 54),
            (12, 32),
            (28, 16),
            (50, 8),
            (72, 16),
            (88, 32),
            (95, 54),
            (80, 46),
            (65, 54),
            (50, 46),
            (35, 54),
            (20, 46),
        ]
    )


def _rocket(pen: Pen) -> None:
    pen.polygon([(40, 76), (60, 76), (50, 96)], (250, 170, 40))
    pen.polygon([(34, 52), (16, 84), (36, 78)])
    pen.polygon([(66, 52), (84, 84), (64, 78)])
    pen.polygon([(34, 78), (32, 44), (50, 5), (68, 44), (66, 78)], (220, 222, 230))
    pen.ellipse((40, 36, 60, 56))


def _crown(pen: Pen) -> None:
    pen.polygon([(12, 84), (8, 28), (30, 52), (50, 16), (70, 52), (92, 28), (88, 84)])
    for x in (28, 50, 72):
        pen.ellipse((x - 6, 64, x + 6, 76), GOLD)


def _apple(pen: Pen) -> None:
    pen.polygon([(48, 8), (55, 8), (53, 30), (47, 30)], WOOD)
    pen.ellipse((54, 8, 82, 24), LEAF)
    pen.ellipse((14, 26, 60, 90))
    pen.ellipse((40, 26, 86, 90))


def _boot(pen: Pen) -> None:
    pen.polygon([(30, 10), (62, 10), (62, 56), (90, 68), (90, 84), (30, 84)])
    pen.polygon([(26, 82), (92, 82), (92, 92), (26, 92)], WOOD)
    pen.polygon([(27, 10), (65, 10), (65, 24), (27, 24)], GLASS)


OBJECTS: dict[str, Callable[[Pen], None]] = {
    "apple": _apple,
    "bell": _bell,
    "boot": _boot,
    "crown": _crown,
    "cup": _cup,
    "fish": _fish,
    "flower": _flower,
    "gem": _gem,
    "ghost": _ghost,
    "heart": _heart,
    "house": _house,
    "key": _key,
    "mushroom": _mushroom,
    "potion": _potion,
    "rocket": _rocket,
    "shield": _shield,
    "star": lambda pen: pen.polygon(_star(50, 52, 46, 20, 5)),
    "sword": _sword,
    "tree": _tree,
    "umbrella": _umbrella,
}


def draw_sprite(thing: str, colour: str) -> Image.Image:
    """One sprite, RGB, 128 pixels a side; the same one each time."""
    pen = Pen(COLOURS[colour])
    OBJECTS[thing](pen)
    return pen.image.resize((SIZE, SIZE), Image.Resampling.BOX)


def is_unseen(thing: str, colour: str) -> bool:
    """Whether a combination is held out: of each object two colours, of each colour four objects."""
    place = list(OBJECTS).index(thing) - list(COLOURS).index(colour)
    return place % 10 in (0, 3)


def write_sprites(folder: Path) -> None:
    """Write `folder`/known and `folder`/unseen: each picture with its caption in a .txt beside it."""
    for thing in OBJECTS:
        for colour in COLOURS:
            part = folder / ("unseen" if is_unseen(thing, colour) else "known")
            part.mkdir(parents=True, exist_ok=True)
            images.save_png(draw_sprite(thing, colour), part / f"{thing}_{colour}.png", None)
            (part / f"{thing}_{colour}.txt").write_text(f"a {colour} {thing}\n", encoding="utf-8")


def main() -> None:
    """Write the sprites and a sheet of all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    write_sprites(out)
    cells = [draw_sprite(thing, colour) for thing in OBJECTS for colour in COLOURS]
    images.save_png(images.grid(cells, 20), out / "sheet.png", None)


if __name__ == "__main__":
    main()
