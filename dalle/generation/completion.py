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

from dalle.generation.request import Completion, ImageRequest, InvalidRequest
from dalle.images import center_crop, to_mask


def complete(tokens: Tensor, region: Tensor, keep_rows: int | None) -> Completion:
    """Return the completion that draws a region (G, G) bool of a picture's tokens (G, G) anew."""
    known = torch.where(region, -1, tokens).flatten().tolist()
    return Completion(keep_rows=keep_rows, known=tuple(known))


def region_to_draw(request: ImageRequest, grid: int) -> Tensor | None:
    """Return the cells to draw anew, (G, G) bool: all below `keep_rows`, or what a mask marks; None: no completion.

    Raises:
        InvalidRequest: a picture without exactly one of the two, or the reverse; rows out of range; a mask that leaves
            everything.
    """
    keep_rows, mask = request.keep_rows, request.mask
    needs = f"a completion needs image and either keep_rows (1..{grid}) or mask"
    if request.image is None:
        if keep_rows is None and mask is None:
            return None
        raise InvalidRequest("image", f"image is missing; {needs}")
    if mask is not None:
        if keep_rows is not None:
            raise InvalidRequest("mask", "mask and keep_rows exclude each other: give one of them")
        cells = redrawn_cells(mask, grid)
        if not cells.any():
            raise InvalidRequest(
                "mask",
                "mask marks nothing to draw: make the region transparent, or white where it has no transparency",
            )
        return torch.from_numpy(cells)
    if keep_rows is None:
        raise InvalidRequest("keep_rows", f"keep_rows is missing; {needs}")
    if keep_rows > grid:
        raise InvalidRequest(
            "keep_rows", f"keep_rows is {keep_rows}; the model draws {grid} rows: choose 1..{grid}"
        )
    return (torch.arange(grid) >= keep_rows)[:, None].expand(grid, grid)


def square_on_white(image: Image.Image, side: int) -> Image.Image:
    """Return the central square of a picture at (side, side), on white where it is clear."""
    rgba = image.convert("RGBA")
    opaque = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return center_crop(opaque, side)


def redrawn_cells(mask: Image.Image, grid: int) -> npt.NDArray[np.bool_]:
    """Return the cells (G, G) of a picture's central square in which a mask of its shape marks a pixel, see `to_mask`."""
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
