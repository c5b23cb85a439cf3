"""Plots of a report as SVG text: curves with error bars, two scales, no library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 30, 42  # margins
COLOURS = ("#2f6fdb", "#d1792b", "#2f9e63", "#9a5bd0")
N_TICKS = 4


class Curve(NamedTuple):
    """Points with error bars."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float]


def plot(title: str, x_title: str, curves: Sequence[Curve], is_log: bool = False) -> str:
    """Return curves as an SVG element; `is_log`: x in powers of two."""
    xs = sorted({x for curve in curves for x in curve.x})
    lows = [y - e for curve in curves for y, e in zip(curve.y, curve.error, strict=True)]
    highs = [y + e for curve in curves for y, e in zip(curve.y, curve.error, strict=True)]
    low, high = min(lows), max(highs)
    high = high if high > low else low + 1

    def place_x(x: float) -> float:
        first, last = (math.log2(xs[0]), math.log2(xs[-1])) if is_log else (xs[0], xs[-1])
        value = math.log2(x) if is_log else x
        return LEFT + (value - first) / ((last - first) or 1) * (WIDTH - LEFT - RIGHT)

    def place_y(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text x="{LEFT}" y="18">{escape(title)}</text>']
    for tick in range(N_TICKS + 1):
        value = low + (high - low) * tick / N_TICKS
        y = place_y(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    parts += [
        f'<text x="{place_x(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>' for x in xs
    ]
    parts.append(
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>'
    )
    for place, curve in enumerate(curves):
        colour = COLOURS[place % len(COLOURS)]
        points = [(place_x(x), place_y(y)) for x, y in zip(curve.x, curve.y, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), value, error in zip(points, curve.y, curve.error, strict=True):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
            if error:
                ends = f'y1="{place_y(value - error):.1f}" y2="{place_y(value + error):.1f}"'
                parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" {ends} stroke="{colour}"/>')
        if len(curves) > 1:
            parts.append(
                f'<text x="{LEFT + 8}" y="{TOP + 14 + 15 * place}" style="fill:{colour}">{escape(curve.name)}</text>'
            )
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}"'
    return f'<svg {size} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
