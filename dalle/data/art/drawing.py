"""Reading the pictures of each package and drawing them on a white square.

One scale holds for all pictures of a style, so that relative size inside the style is kept: a "small square"
stays small. The scale is such that 85 % of the style's pictures fill at most 84 % of the canvas.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dalle.data.art.names import Emoji, EmojiNames, code_key, read_openmoji
from dalle.data.art.packages import Style
from dalle.images import open_image

_FILL = 0.84  # share of the canvas that the 85th percentile of ink extents fills
_PERCENTILE = 85
_MAX_SCALE = 1.25  # a style of small drawings is not blown up beyond its view box by more
_N_MEASURED = 150  # pictures measured for a style's scale
_FONT_SIDE = 1.15  # side of a glyph's view box in em
_SKIN_TONES = re.compile("-1F3F[B-F]")


@dataclass(frozen=True)
class Drawing:
    """One picture before it is drawn: an SVG body with its view box, or the path of a picture file."""

    style: str
    name: str  # file name in the package, without suffix
    emoji: Emoji | None  # None: nothing is known about it
    svg: str = ""
    box: tuple[float, float, float, float] = (0, 0, 0, 0)  # left, top, width, height in SVG units
    path: Path | None = None
    oversampling: int = 1


def require_renderer(styles: Sequence[Style]) -> None:
    """Raise ValueError when a package that draws these styles is not installed."""
    try:
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise ValueError("the emoji set needs resvg_py to draw SVG: pip install 'dalle[art]'") from error
    if any(style.kind == "font" for style in styles):
        try:
            import fontTools  # noqa: F401
            import uharfbuzz  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "the emoji set needs uharfbuzz and fontTools to draw fonts: pip install 'dalle[art]'"
            ) from error


def read_drawings(style: Style, npm_folder: Path, names: EmojiNames, font: Path | None) -> list[Drawing]:
    """Return all pictures of a style in a fixed order; `font` is the file of a style without npm package."""
    if style.kind == "font":
        return list(
            _read_font(style, font if not style.package else npm_folder / style.package / style.path, names)
        )
    source = npm_folder / style.package / style.path
    if style.kind == "iconify":
        return list(_read_iconify(style, source, names))
    if style.kind == "webp":
        paths = sorted(source.glob("*.webp"))
        return [Drawing(style.name, p.stem, names.describe(p.stem, style.name), path=p) for p in paths]
    return list(_read_openmoji_svg(style, source, names, read_openmoji(npm_folder)))


def _read_iconify(style: Style, source: Path, names: EmojiNames) -> Iterator[Drawing]:
    icons = json.loads(source.read_text(encoding="utf-8"))
    width, height = icons.get("width", 16), icons.get("height", 16)
    for name, icon in icons["icons"].items():
        if icon.get("hidden"):  # retired by the artists
            continue
        box = (icon.get("left", 0), icon.get("top", 0), icon.get("width", width), icon.get("height", height))
        svg = icon["body"].replace("currentColor", "#000")
        emoji = names.describe(name, style.name)
        yield Drawing(style.name, name, emoji, svg, box, oversampling=style.oversampling)


def _read_openmoji_svg(
    style: Style, source: Path, names: EmojiNames, openmoji: dict[str, Emoji]
) -> Iterator[Drawing]:
    # Pictures without a skin tone first: the black set draws all tones alike and only the first one is kept.
    for path in sorted(source.glob("*.svg"), key=lambda p: (bool(_SKIN_TONES.search(p.stem)), p.stem)):
        text = path.read_text(encoding="utf-8")
        view_box = re.search('viewBox="([^"]+)"', text)
        body = re.search("<svg[^>]*>(.*)</svg>", text, re.DOTALL)
        if view_box is None or body is None:
            raise ValueError(f"{path} is no SVG with a view box: install the openmoji package again")
        left, top, width, height = (float(x) for x in re.split("[ ,]+", view_box[1].strip()))
        key = code_key(path.stem)
        emoji = names.emoji.get(key) or openmoji.get(key)
        yield Drawing(style.name, path.stem, emoji, body[1], (left, top, width, height))


def _read_font(style: Style, path: Path | None, names: EmojiNames) -> Iterator[Drawing]:
    """Yield the outline of every emoji that the font draws as one glyph, but for skin tones and flags."""
    import uharfbuzz
    from fontTools.pens.boundsPen import BoundsPen
    from fontTools.pens.svgPathPen import SVGPathPen
    from fontTools.ttLib import TTFont

    assert path is not None
    with TTFont(path) as font:
        glyphs, order = font.getGlyphSet(), font.getGlyphOrder()
        known, em = font.getBestCmap(), font["head"].unitsPerEm
        shaper = uharfbuzz.Font(uharfbuzz.Face(uharfbuzz.Blob.from_file_path(str(path))))
        for key, emoji in names.emoji.items():
            if emoji.tones or emoji.subgroup in ("country-flag", "subdivision-flag"):
                continue
            characters = [int(part, 16) for part in key.split("-")]
            if emoji.label.startswith("regional indicator") or any(c not in known for c in characters):
                continue
            buffer = uharfbuzz.Buffer()
            buffer.add_str("".join(map(chr, characters)))
            buffer.guess_segment_properties()
            uharfbuzz.shape(shaper, buffer)
            shaped = [order[info.codepoint] for info in buffer.glyph_infos]
            if len(shaped) != 1 or shaped[0] == ".notdef":
                continue
            outline, bounds = SVGPathPen(glyphs), BoundsPen(glyphs)
            glyphs[shaped[0]].draw(outline)
            glyphs[shaped[0]].draw(bounds)
            if bounds.bounds is None:
                continue
            x0, y0, x1, y1 = bounds.bounds
            side = em * _FONT_SIDE  # centred on the ink: fonts place emoji on a baseline
            svg = f'<g transform="scale(1,-1)"><path d="{outline.getCommands()}"/></g>'
            box = ((x0 + x1) / 2 - side / 2, -(y0 + y1) / 2 - side / 2, side, side)
            yield Drawing(style.name, key, emoji, svg, box)


def draw(drawing: Drawing, scale: float, size: int) -> Image.Image:
    """Return the picture as RGB on white, (size, size); its view box takes `scale` of the canvas.

    Raises ValueError when the picture cannot be drawn.
    """
    if drawing.path is None:
        return _draw_svg(drawing, scale, size * drawing.oversampling).reduce(drawing.oversampling)
    picture = open_image(drawing.path)
    side = size * scale / max(picture.size)
    picture = picture.resize(
        (round(picture.width * side), round(picture.height * side)), Image.Resampling.LANCZOS
    )
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return canvas


def _draw_svg(drawing: Drawing, scale: float, size: int) -> Image.Image:
    import resvg_py

    left, top, width, height = drawing.box
    side = max(width, height) / scale
    view = f"{left + width / 2 - side / 2} {top + height / 2 - side / 2} {side} {side}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{view}">{drawing.svg}</svg>'
    )
    # dpi: at resvg_py's default of 0 every length in pt, mm or cm is zero.
    png = resvg_py.svg_to_bytes(
        svg_string=svg, skip_system_fonts=True, width=size, height=size, dpi=96, background="#ffffff"
    )
    return open_image(bytes(png))


def measure_extent(drawing: Drawing) -> float | None:
    """Return how much of the view box the ink spans, measured from its centre; None for a blank picture."""
    size, scale = 96, 0.6  # ink outside the view box is seen too
    ink = np.asarray(draw(drawing, scale, size)).min(axis=2) < 240  # (size, size)
    if not ink.any():
        return None
    ys, xs = np.nonzero(ink)
    centre = (size - 1) / 2
    reach = max(
        abs(xs.min() - centre), abs(xs.max() - centre), abs(ys.min() - centre), abs(ys.max() - centre)
    )
    return float(2 * reach / (size * scale))


def choose_measured(drawings: Sequence[Drawing]) -> list[Drawing]:
    """Return the fixed sample of a style whose extents set its scale."""
    return sorted(drawings, key=lambda d: hashlib.sha256(d.name.encode()).digest())[:_N_MEASURED]


def scale_of(extents: Sequence[float]) -> float:
    """Return a style's scale from the extents of its sample."""
    if not extents:
        raise ValueError("every picture of a style is blank: install the npm packages again")
    return min(_MAX_SCALE, _FILL / float(np.percentile(extents, _PERCENTILE)))
