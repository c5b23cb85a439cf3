"""Completing a picture: which token cells of it are kept, and which are drawn anew.

Source: DALL·E §3.3 and the blog post (any region that reaches the lower right corner can be drawn anew); a mask is this
with any region. The stream runs in raster order: a drawn cell sees the kept ones above and before it, and not those
after it, so candidates are best ranked on the whole picture.

Shapes: G grid side.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dalle.generation.request import Completion, is_count
from dalle.images import to_mask


def completion_of(tokens: Tensor, keep_rows: int | None, mask: Image.Image | None) -> Completion:
    """What stays of a picture's tokens (G, G): its top rows, or what a mask leaves.

    Raises:
        ValueError: as `region_to_draw`.
    """
    return complete(tokens, region_to_draw(len(tokens), keep_rows, mask), keep_rows)


def complete(tokens: Tensor, region: Tensor, keep_rows: int | None) -> Completion:
    """The completion that draws a region (G, G) bool of a picture's tokens (G, G) anew."""
    known = torch.where(region, -1, tokens).flatten().tolist()
    return Completion(keep_rows=keep_rows, known=tuple(known))


def region_to_draw(grid: int, keep_rows: int | None, mask: Image.Image | None) -> Tensor:
    """The cells to draw anew, (G, G) bool: all below `keep_rows`, or what a mask marks.

    Raises:
        ValueError: not exactly one of the two, rows out of range, or a mask that leaves everything.
    """
    if mask is not None:
        if keep_rows is not None:
            raise ValueError("mask and keep_rows exclude each other: give one of them")
        cells = redrawn_cells(mask, grid)
        if not cells.any():
            raise ValueError(
                "mask marks nothing to draw: make the region transparent, or white where it has no transparency"
            )
        return torch.from_numpy(cells)
    if keep_rows is None:
        raise ValueError(
            f"keep_rows is missing; a completion needs image and either keep_rows (1..{grid}) or mask"
        )
    if not is_count(keep_rows) or keep_rows > grid:
        raise ValueError(f"keep_rows is {keep_rows!r}; the model draws {grid} rows: choose 1..{grid}")
    return (torch.arange(grid) >= keep_rows)[:, None].expand(grid, grid)


def redrawn_cells(mask: Image.Image, grid: int) -> npt.NDArray[np.bool_]:
    """The cells (G, G) of a picture's central square in which a mask of its shape marks a pixel, see `to_mask`."""
    marked = to_mask(mask)
    side = min(marked.size)
    left, top = (marked.width - side) // 2, (marked.height - side) // 2
    square = marked.crop((left, top, left + side, top + side))
    if side < grid:
        side = grid
        square = square.resize((grid, grid), Image.Resampling.NEAREST)
    first = -(-np.arange(grid) * side // grid)  # row or column of pixels with which each cell begins
    pixels = np.asarray(square) > 0
    cells: npt.NDArray[np.bool_] = np.logical_or.reduceat(np.logical_or.reduceat(pixels, first, 0), first, 1)
    return cells
