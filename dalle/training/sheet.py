"""Sample sheets: pictures that tell a person how a stage is going."""

from PIL.Image import Image
from torch import Tensor

from dalle import images


def pairs_sheet(above: Tensor, below: Tensor, columns: int = 8) -> Image:
    """A grid in which each row of pictures stands above the row that answers it; both (B, 3, H, W) in [0, 1]."""
    rows = []
    for start in range(0, len(above), columns):
        for pictures in (above[start : start + columns], below[start : start + columns]):
            rows += images.to_images(pictures)
    return images.grid(rows, columns=min(columns, len(above)))
