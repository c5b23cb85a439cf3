"""Words as pictures: the fonts, from pinned npm packages, and letters set in equal cells.

Equal cells of 32 pixels (of 128) let every letter fall on whole image tokens, so that a small model can learn
letters and not words. Five or six letters share the width.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dalle.data.art.packages import install_packages, require_packages
from dalle.data.scenes.colours import THING_COLOURS

_CELL = 0.25  # of the picture's side
_GLYPH_WIDTH = 0.84  # of the cell, at most
_DRAWN = 256  # pixels a capital is high before it is fitted


@dataclass(frozen=True)
class Font:
    """A heavy font whose capitals stay readable at 64 pixels."""

    name: str  # what captions call the letters
    package: str
    version: str
    path: str  # the file inside the package
    height: float  # of capitals, as a share of the picture's side
    licence: str
    credit: str


def _google(name: str, family: str, version: str, path: str, height: float, credit: str) -> Font:
    package = f"@expo-google-fonts/{family}"
    return Font(name, package, version, path, height, "OFL-1.1", credit)


FONTS: tuple[Font, ...] = (
    _google(
        "tall",
        "anton",
        "0.4.2",
        "400Regular/Anton_400Regular.ttf",
        0.44,
        "Anton, The Anton Project Authors, https://github.com/googlefonts/AntonFont",
    ),
    _google(
        "bold",
        "archivo-black",
        "0.4.1",
        "400Regular/ArchivoBlack_400Regular.ttf",
        0.32,
        "Archivo Black, The Archivo Black Project Authors, https://github.com/Omnibus-Type/ArchivoBlack",
    ),
    _google(
        "rounded",
        "lilita-one",
        "0.4.1",
        "400Regular/LilitaOne_400Regular.ttf",
        0.36,
        "Lilita One, Juan Montoreano, https://fonts.google.com/specimen/Lilita+One",
    ),
    _google(
        "comic",
        "bangers",
        "0.4.1",
        "400Regular/Bangers_400Regular.ttf",
        0.38,
        "Bangers, The Bangers Project Authors, https://github.com/googlefonts/bangers",
    ),
    _google(
        "slab",
        "roboto-slab",
        "0.4.2",
        "900Black/RobotoSlab_900Black.ttf",
        0.34,
        "Roboto Slab, The Roboto Slab Project Authors, https://github.com/googlefonts/robotoslab",
    ),
)
FONTS_BY_NAME = {font.name: font for font in FONTS}


def fetch_fonts(npm_folder: Path | None, progress: Callable[[str], None] | None = None) -> dict[str, Path]:
    """Return the font files by name, installed by npm where no node_modules folder is given.

    Raises ValueError when a package is not there or npm fails.
    """
    packages = {font.package: font.version for font in FONTS}
    modules = (
        install_packages(packages, progress) if npm_folder is None else require_packages(npm_folder, packages)
    )
    return {font.name: modules / font.package / font.path for font in FONTS}


def letter_word(word: str, font: str, file: Path, colour: str, size: int) -> Image.Image:
    """Return a word in capitals on clear ground as an RGBA picture of (size, size), letters centred in cells."""
    cell = min(_CELL, 1 / len(word)) * size
    height = round(FONTS_BY_NAME[font].height * size)
    page = Image.new("L", (size, size), 0)
    left = (size - cell * len(word)) / 2
    for i, letter in enumerate(word):
        glyph, cap_height = _glyph(letter, str(file))
        scale = height / cap_height
        width = max(1, round(min(glyph.width * scale, _GLYPH_WIDTH * cell)))
        fitted = glyph.resize((width, round(glyph.height * scale)), Image.Resampling.LANCZOS)
        x, y = round(left + cell * (i + 0.5) - width / 2), round((size - height) / 2)
        page.paste(fitted, (x, y))
    picture = Image.new("RGBA", (size, size), (*THING_COLOURS[colour], 0))
    picture.putalpha(page)
    return picture


@functools.lru_cache(maxsize=256)
def _glyph(letter: str, file: str) -> tuple[Image.Image, int]:
    """Return one capital as a mask from cap height downward, a Q's tail included, and the cap height in pixels."""
    font = ImageFont.truetype(file, _DRAWN)
    _, top, _, baseline = font.getbbox("H")
    page = Image.new("L", (4 * _DRAWN, 2 * _DRAWN), 0)
    ImageDraw.Draw(page).text((_DRAWN, 0), letter, font=font, fill=255)
    ink = page.getbbox()
    assert ink is not None
    return page.crop((ink[0], int(top), ink[2], max(int(baseline), ink[3]))), int(baseline - top)
