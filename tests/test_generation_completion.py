"""What is kept of a picture: its top rows, or what a mask leaves, cell by cell."""

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.generation.completion import complete, redrawn_cells, region_to_draw
from dalle.generation.request import Completion, ImageRequest, InvalidRequest


def completion_of(tokens: torch.Tensor, keep_rows: int | None, mask: Image.Image | None) -> Completion:
    request = ImageRequest("", image=Image.new("RGB", (8, 8)), keep_rows=keep_rows, mask=mask)
    region = region_to_draw(request, len(tokens))
    assert region is not None
    return complete(tokens, region, keep_rows)


def grey(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.astype(np.uint8))


def test_one_marked_pixel_marks_its_cell_at_any_size() -> None:
    for side in (8, 64, 1000, 4097):
        pixels = np.zeros((side, side))
        pixels[side // 8, side - 1] = 255
        cells = redrawn_cells(grey(pixels), 4)
        assert cells.sum() == 1 and cells[0, 3], side


def test_every_pixel_belongs_to_one_cell_and_cells_lie_in_raster_order() -> None:
    for side in (4, 5, 7, 30, 33):
        owners = np.zeros((4, 4), dtype=int)
        for y in range(side):
            for x in range(side):
                pixels = np.zeros((side, side))
                pixels[y, x] = 255
                cells = redrawn_cells(grey(pixels), 4)
                assert cells.sum() == 1 and cells[y * 4 // side, x * 4 // side]
                owners += cells
        assert owners.sum() == side**2 and owners.min() > 0


def test_a_mask_smaller_than_the_grid_is_blown_up() -> None:
    assert redrawn_cells(grey(np.array([[0, 255], [0, 0]])), 4).tolist() == [
        [False, False, True, True],
        [False, False, True, True],
        [False] * 4,
        [False] * 4,
    ]


def test_the_central_square_counts_as_it_does_of_the_picture() -> None:
    pixels = np.zeros((8, 24))
    pixels[:, :8] = 255  # left of the square
    pixels[0, 15] = 255
    assert np.argwhere(redrawn_cells(grey(pixels), 4)).tolist() == [[0, 3]]


def test_transparency_marks_where_there_is_any_and_white_where_there_is_none() -> None:
    mask = Image.new("RGBA", (8, 8), "white")
    mask.putpixel((0, 0), (255, 255, 255, 0))
    mask.putpixel((7, 7), (0, 0, 0, 1))  # nearly, but not fully transparent
    assert np.argwhere(redrawn_cells(mask, 4)).tolist() == [[0, 0]]
    assert redrawn_cells(Image.new("RGB", (8, 8), "white"), 4).all()
    assert not redrawn_cells(Image.new("RGB", (8, 8), (127, 127, 127)), 4).any()
    assert redrawn_cells(Image.new("1", (8, 8), 1), 4).all()


def test_kept_cells_keep_their_tokens_and_marked_ones_are_drawn() -> None:
    tokens = torch.arange(16).view(4, 4)
    pixels = np.zeros((8, 8))
    pixels[2:4, 2:6] = 255
    assert completion_of(tokens, None, grey(pixels)).known == (0, 1, 2, 3, 4, -1, -1, *range(7, 16))
    rows = completion_of(tokens, 1, None)
    assert (rows.keep_rows, rows.known) == (1, (0, 1, 2, 3, *[-1] * 12))


def test_mistakes_are_one_line_that_names_the_field() -> None:
    black, picture = Image.new("L", (8, 8)), Image.new("RGB", (8, 8))
    for arguments, field, message in (
        (
            {"image": picture},
            "keep_rows",
            r"keep_rows is missing; a completion needs image and either keep_rows \(1\.\.4\) or mask",
        ),
        ({"image": picture, "keep_rows": 2, "mask": black}, "mask", "mask and keep_rows exclude each other"),
        ({"image": picture, "mask": black}, "mask", "mask marks nothing to draw"),
        ({"image": picture, "keep_rows": 5}, "keep_rows", r"keep_rows is 5; .* choose 1\.\.4"),
        ({"keep_rows": 1}, "image", "image is missing"),
        ({"mask": black}, "image", "image is missing"),
    ):
        with pytest.raises(InvalidRequest, match=message) as caught:
            region_to_draw(ImageRequest("", **arguments), 4)  # type: ignore[arg-type]
        assert caught.value.field == field
    assert region_to_draw(ImageRequest(""), 4) is None
