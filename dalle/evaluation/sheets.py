"""Sheets: pictures that tell a person what figures do not."""

from collections.abc import Sequence
from typing import TypeVar

from PIL.Image import Image, new
from torch import Tensor

from dalle import images

Item = TypeVar("Item")


def pairs_sheet(above: Tensor, below: Tensor, columns: int = 8) -> Image:
    """A grid: each row of pictures stands above the row that answers it; both (B, 3, H, W) in [0, 1]."""
    columns = min(columns, len(above))
    cells: list[Image] = []
    for start in range(0, len(above), columns):
        for pictures in (above[start : start + columns], below[start : start + columns]):
            row = images.to_images(pictures)
            cells += row + [new("RGB", row[0].size, "white")] * (columns - len(row))  # the last may be short
    return images.grid(cells, columns)


def spread(items: Sequence[Item], n: int) -> list[Item]:
    """At most `n` items, evenly from the whole sequence and in its order."""
    step = max(1, len(items) / n)
    return [items[int(index * step)] for index in range(min(n, len(items)))]
