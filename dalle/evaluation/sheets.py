"""Sheets: pictures that tell a person what figures do not."""

from collections.abc import Sequence
from typing import TypeVar

from PIL.Image import Image
from torch import Tensor

from dalle import images

Item = TypeVar("Item")


def pairs_sheet(above: Tensor, below: Tensor, columns: int = 8) -> Image:
    """A grid: each row of pictures stands above the row that answers it; both (B, 3, H, W) in [0, 1]."""
    rows = []
    for start in range(0, len(above), columns):
        for pictures in (above[start : start + columns], below[start : start + columns]):
            rows += images.to_images(pictures)
    return images.grid(rows, columns=min(columns, len(above)))


def spread(items: Sequence[Item], n: int) -> list[Item]:
    """At most `n` items, evenly from the whole sequence and in its order."""
    step = max(1, len(items) / n)
    return [items[int(index * step)] for index in range(min(n, len(items)))]
