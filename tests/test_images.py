"""Tests of opening, cropping and saving pictures."""

import io
import json
import math
import re
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from dalle import images

PACKAGE = Path(images.__file__).parent
RECIPE = {
    "caption": "a red apple, flat fluent style",
    "seed": 7,
    "options": {"temperature": 1.0, "top_k": 256, "top_p": None, "guidance": 3.0},
    "model": "some/folder/bundled",
    "model_sha256": "0123456789abcdef",
    "versions": {"dalle": "1.2.3"},
}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def coordinates(width: int, height: int) -> Image.Image:
    """Return a picture whose red is the column and green the row, so that a crop says where it was."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = (
        chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body


def slow_area(pixels: npt.NDArray[np.uint8], n_out: int, align_corners: bool) -> npt.NDArray[np.float64]:
    """Average a square picture pixel by pixel, in the four cases that TensorFlow's kernel spells out."""
    n_in = len(pixels)
    scale = (n_in - 1) / (n_out - 1) if align_corners else n_in / n_out

    def taps(i: int) -> list[tuple[int, float]]:
        low, high = i * scale, (i + 1) * scale
        found = []
        for p in range(math.floor(low), math.ceil(high)):
            if p < low:
                weight = scale if p + 1 > high else p + 1 - low
            else:
                weight = high - p if p + 1 > high else 1.0
            found.append((min(p, n_in - 1), weight))
        return found

    out = np.zeros((n_out, n_out, 3))
    for row in range(n_out):
        for column in range(n_out):
            for y, weight_y in taps(row):
                for x, weight_x in taps(column):
                    out[row, column] += weight_y * weight_x * pixels[y, x]
    return out / scale**2


# Opening


def test_only_this_module_opens_picture_files() -> None:
    opening = re.compile(r"\bImage\.open\(|from PIL\.Image import .*\bopen\b|imageio|cv2")
    found = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if opening.search(path.read_text())
    ]
    assert found == ["images.py"]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "JPEG", "WEBP"])
def test_every_source_and_format_opens_as_rgb(kind: str, tmp_path: Path) -> None:
    data = encoded(Image.new("RGB", (9, 5), (200, 40, 0)), kind)
    path = tmp_path / "x"  # the kind is read from the contents, not the name
    path.write_bytes(data)
    with path.open("rb") as stream:
        opened = [images.open_image(source) for source in (data, path, str(path), io.BytesIO(data), stream)]
        assert not stream.closed
    for image in opened:
        assert (image.mode, image.size) == ("RGB", (9, 5))
        assert np.abs(np.asarray(image).astype(int) - (200, 40, 0)).max() <= 6


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "EPS"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="not a picture of a known kind: use PNG, JPEG, WEBP, GIF, BMP"):
        images.open_image(encoded(noise(16, 16), kind))


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_junk_is_a_one_line_error_with_the_path(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "junk.png"
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        images.open_image(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.png", "folder", "x\0y"])
def test_a_path_that_is_no_file_is_an_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"no such picture file|cannot be read"):
        images.open_image(tmp_path / name)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_truncated_picture_is_an_error(kind: str) -> None:
    data = encoded(noise(64, 64), kind)
    with pytest.raises(ValueError, match=r"truncated or corrupt|known kind"):
        images.open_image(data[: len(data) // 2])


@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]))
@settings(max_examples=80, deadline=None)
def test_damaged_pictures_open_or_raise_valueerror(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(encoded(noise(12, 12), kind))
    for _ in range(int(rng.integers(1, 6))):
        data[int(rng.integers(len(data)))] = int(rng.integers(256))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged metadata that the decoders step over
        try:
            assert images.open_image(bytes(data)).mode == "RGB"
        except ValueError as error:
            assert "\n" not in str(error)


def test_the_pixel_limit_is_checked_before_decoding() -> None:
    # No pixel data at all: an attempt to decode would say that the picture is truncated.
    header_only = png(9000, 9000, 8, 2, b"")
    with pytest.raises(ValueError, match="9000 x 9000 = 81000000 pixels; at most 64000000 are allowed"):
        images.open_image(header_only)
    assert images.open_image(encoded(noise(10, 10)), max_pixels=100).size == (10, 10)
    with pytest.raises(ValueError, match="at most 99"):
        images.open_image(encoded(noise(10, 10)), max_pixels=99)


@pytest.mark.parametrize("side", [10_000, 100_000])
def test_a_decompression_bomb_is_an_error(side: int) -> None:
    with pytest.raises(ValueError, match="too many pixels"):
        images.open_image(png(side, side, 1, 0, b""))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = coordinates(3, 2)
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = images.open_image(encoded(stored, exif=exif))
    assert np.array_equal(np.asarray(opened), np.asarray(upright))


def test_the_header_says_whether_a_picture_can_be_clear() -> None:
    clear = Image.new("RGBA", (2, 2))
    assert images.has_transparency(encoded(clear)) and images.has_transparency(encoded(clear, "WEBP"))
    assert not images.has_transparency(encoded(noise(2, 2)))
    with pytest.raises(ValueError, match="at most 3 are allowed"):
        images.has_transparency(encoded(clear), max_pixels=3)


def test_transparency_is_laid_on_white() -> None:
    half_red = encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 128)))
    assert images.open_image(half_red).getpixel((0, 0)) == (255, 127, 127)
    grey = encoded(Image.new("LA", (2, 2), (0, 0)))
    assert images.open_image(grey).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    opened = images.open_image(encoded(palette, transparency=0))
    assert [opened.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (40, 50, 60)]
    opened = images.open_image(encoded(palette, transparency=b"\xff\x00"))
    assert [opened.getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), (255, 255, 255)]
    webp = encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "WEBP", lossless=True)
    assert images.open_image(webp).getpixel((0, 0)) == (255, 255, 255)
    for mode, clear in (("L", 5), ("RGB", (5, 5, 5)), ("1", 0)):
        data = encoded(Image.new(mode, (2, 2), clear), transparency=clear)  # type: ignore[arg-type]
        assert images.open_image(data).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    rows = b"\0" + struct.pack(">4H", 0, 257, 257 * 128, 65535)
    opened = images.open_image(png(4, 1, 16, 0, rows))
    assert [opened.getpixel((x, 0)) for x in range(4)] == [(0,) * 3, (1,) * 3, (128,) * 3, (255,) * 3]
    clear = images.open_image(png(4, 1, 16, 0, rows, chunk(b"tRNS", struct.pack(">H", 257))))
    assert [clear.getpixel((x, 0))[0] for x in range(4)] == [0, 255, 128, 255]  # type: ignore[index]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode: str) -> None:
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    opened = images.open_image(encoded(Image.new("RGB", (8, 8), "white").convert(mode), kind))
    assert (opened.mode, opened.getpixel((4, 4))) == ("RGB", (255, 255, 255))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert images.open_image(data).getpixel((1, 1)) == (255, 0, 0)


# Crops


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("n_in", "n_out"), [(9, 4), (16, 8), (13, 12), (7, 7), (5, 2), (30, 11)])
def test_area_resize_equals_the_slow_loop(n_in: int, n_out: int, align_corners: bool) -> None:
    pixels = np.asarray(noise(n_in, n_in))
    fast = images.resize_area(pixels, n_out, n_out, align_corners=align_corners)
    np.testing.assert_allclose(fast, slow_area(pixels, n_out, align_corners), atol=1e-3)


def test_area_resize_keeps_flat_colour_and_first_pixel() -> None:
    flat = np.full((50, 50, 3), 77, dtype=np.uint8)
    np.testing.assert_allclose(images.resize_area(flat, 31, 17, align_corners=True), 77.0, atol=1e-3)
    assert images.resize_area(flat, 31, 17, align_corners=True).shape == (31, 17, 3)


def test_plain_area_resize_by_a_whole_factor_is_the_block_mean() -> None:
    pixels = np.asarray(noise(12, 12))
    blocks = pixels.reshape(4, 3, 4, 3, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(images.resize_area(pixels, 4, 4, align_corners=False), blocks, atol=1e-3)


@pytest.mark.parametrize("crop", [images.dvae_crop, images.transformer_crop, images.near_crop])
@pytest.mark.parametrize("shape", [(8, 8), (40, 30), (16, 90), (5, 200), (1, 1), (1, 9)])
def test_crops_have_the_asked_size_and_repeat_with_the_seed(crop, shape: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    image = noise(*shape)
    first, second = (crop(image, 16, np.random.default_rng(3)) for _ in range(2))
    assert (first.mode, first.size) == ("RGB", (16, 16))
    assert np.array_equal(np.asarray(first), np.asarray(second))


def sides_and_places(monkeypatch: pytest.MonkeyPatch, crop, image: Image.Image, size: int):  # type: ignore[no-untyped-def]
    """Record, over many draws, the sides t, the corners of the square crop and those of the last crop."""
    sides, squares, parts = set(), set(), set()
    plain_crop, plain_resize = images._crop, images._resize

    def recording_resize(square: Image.Image, side: int, *, align_corners: bool) -> Image.Image:
        assert align_corners
        sides.add(side)
        return plain_resize(square, side, align_corners=align_corners)

    def recording_crop(source: Image.Image, left: int, top: int, side: int) -> Image.Image:
        (squares if source is image else parts).add((left, top))
        return plain_crop(source, left, top, side)

    monkeypatch.setattr(images, "_resize", recording_resize)
    monkeypatch.setattr(images, "_crop", recording_crop)
    rng = np.random.default_rng(0)
    for _ in range(600):
        crop(image, size, rng)
    return sides, squares, parts


def test_dvae_crop_draws_listing_1(monkeypatch: pytest.MonkeyPatch) -> None:
    sides, squares, parts = sides_and_places(monkeypatch, images.dvae_crop, noise(60, 40), 16)
    assert sides == set(range(18, 25))  # 9/8 to 12/8 of 16, both inclusive
    assert squares == {(left, 0) for left in range(21)}
    assert {left for left, _ in parts} == set(range(9)) == {top for _, top in parts}


def test_dvae_crop_never_resizes_above_the_short_side(monkeypatch: pytest.MonkeyPatch) -> None:
    sides, _, _ = sides_and_places(monkeypatch, images.dvae_crop, noise(20, 60), 16)
    assert sides == {18, 19, 20}


def test_transformer_crop_draws_listing_2(monkeypatch: pytest.MonkeyPatch) -> None:
    sides, squares, parts = sides_and_places(monkeypatch, images.transformer_crop, noise(40, 61), 16)
    assert sides == {16, 17, 18}  # 1 to 9/8 of 16, both inclusive
    assert squares == {(0, top) for top in range(3 * 21 // 8, 5 * 21 // 8)}  # the middle quarter: 7 to 12
    assert {left for left, _ in parts} == {0, 1, 2} == {top for _, top in parts}


def test_transformer_crop_has_one_place_where_the_middle_quarter_is_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, squares, _ = sides_and_places(monkeypatch, images.transformer_crop, noise(41, 40), 16)
    assert squares == {(0, 0)}


def test_dvae_crop_flips_half_the_time_and_transformer_crop_never() -> None:
    image = coordinates(32, 32)
    rng = np.random.default_rng(0)

    def is_flipped(part: Image.Image) -> bool:
        red = np.asarray(part)[0, :, 0].astype(int)
        return bool(red[0] > red[-1])

    assert 60 <= sum(is_flipped(images.dvae_crop(image, 16, rng)) for _ in range(200)) <= 140
    assert not any(is_flipped(images.transformer_crop(image, 16, rng)) for _ in range(50))
    assert np.asarray(images.transformer_crop(image, 16, rng))[0, 0, 1] < 16


def test_near_crop_keeps_fifteen_sixteenths_of_the_side_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[int] = []
    squares: list[tuple[int, int]] = []
    plain = images._crop

    def recording(source: Image.Image, left: int, top: int, side: int) -> Image.Image:
        if source.height == 64:  # the picture itself
            sides.append(side)
            squares.append((left, top))
        return plain(source, left, top, side)

    monkeypatch.setattr(images, "_crop", recording)
    rng = np.random.default_rng(0)
    for _ in range(300):
        assert images.near_crop(noise(48, 64), 16, rng).size == (16, 16)
    assert set(sides) == {45, 46, 47, 48}
    assert {left for left, _ in squares} == {0, 1, 2, 3} and {top for _, top in squares} == {8, 9, 10, 11}
    assert all(
        left + side <= 48 and top + side <= 56 for (left, top), side in zip(squares, sides, strict=True)
    )


@pytest.mark.parametrize(
    ("width", "height", "side"), [(48, 32, 32), (32, 48, 32), (33, 32, 32), (16, 16, 16)]
)
def test_center_crop_takes_the_central_square(width: int, height: int, side: int) -> None:
    image = coordinates(width, height)
    cropped = images.center_crop(image, side)
    left, top = (width - side) // 2, (height - side) // 2
    assert np.array_equal(np.asarray(cropped), np.asarray(image)[top : top + side, left : left + side])


@pytest.mark.parametrize("shape", [(1, 1), (9, 30), (64, 64), (65, 80), (300, 260), (999, 401)])
def test_center_crop_of_any_source_has_the_asked_size(shape: tuple[int, int]) -> None:
    cropped = images.center_crop(noise(*shape), 64)
    assert (cropped.mode, cropped.size) == ("RGB", (64, 64))


def test_center_crop_averages_so_that_fine_stripes_do_not_alias() -> None:
    stripes = np.zeros((640, 640, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    for side in (64, 128, 320):
        grey = np.asarray(images.center_crop(Image.fromarray(stripes), side)).astype(int)
        assert np.abs(grey - 127.5).max() <= 2


# Tensors


def test_a_shifted_picture_is_moved_by_whole_pixels_and_repeats_its_edge() -> None:
    picture, seen = np.asarray(noise(9, 7)), set()
    for seed in range(60):
        found = np.asarray(images.shifted(Image.fromarray(picture), 1, np.random.default_rng(seed)))
        rows, columns = np.arange(7)[:, None], np.arange(9)[None]
        moves = [
            (down, right)
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
            if np.array_equal(found, picture[np.clip(rows - down, 0, 6), np.clip(columns - right, 0, 8)])
        ]
        assert len(moves) == 1
        seen.update(moves)
    assert len(seen) == 9


def test_box_filtered_pictures_are_those_of_the_smaller_crop() -> None:
    large = [noise(64, 64, seed) for seed in range(3)]
    small = images.to_tensor([images.center_crop(image, 32) for image in large])
    assert torch.equal(images.box_filtered(images.to_tensor(large), 32), small)
    assert torch.equal(images.box_filtered(small, 32), small)
    with pytest.raises(ValueError, match="64 px a side, which is no multiple of 48"):
        images.box_filtered(images.to_tensor(large), 48)


def test_tensor_round_trip_is_exact() -> None:
    batch = [noise(5, 4, seed) for seed in range(3)]
    tensor = images.to_tensor(batch)
    assert (tuple(tensor.shape), tensor.dtype) == ((3, 3, 4, 5), torch.float32)
    assert 0 <= float(tensor.min()) and float(tensor.max()) <= 1
    assert float(tensor[1, 2, 3, 4]) == pytest.approx(batch[1].getpixel((4, 3))[2] / 255)  # type: ignore[index]
    for before, after in zip(batch, images.to_images(tensor), strict=True):
        assert np.array_equal(np.asarray(before), np.asarray(after))


def test_to_images_clamps_and_refuses_nan_and_wrong_shapes() -> None:
    tensor = torch.tensor([-1.0, 2.0, 0.5]).view(1, 3, 1, 1).to(torch.bfloat16)
    assert images.to_images(tensor)[0].getpixel((0, 0)) == (0, 255, 128)
    with pytest.raises(ValueError, match="NaN"):
        images.to_images(torch.full((1, 3, 2, 2), torch.nan))
    with pytest.raises(ValueError, match=r"shape \(3, 2, 2\)"):
        images.to_images(torch.zeros(3, 2, 2))


@pytest.mark.parametrize("batch", [[], [noise(2, 2), noise(3, 2)], [Image.new("L", (2, 2))]])
def test_to_tensor_refuses_what_is_no_batch(batch: list[Image.Image]) -> None:
    with pytest.raises(ValueError, match=r"0 pictures|pictures of one size"):
        images.to_tensor(batch)


def test_grid_lays_pictures_out_row_by_row() -> None:
    batch = [Image.new("RGB", (4, 3), (i, i, i)) for i in range(5)]
    sheet = images.grid(batch, columns=2)
    assert sheet.size == (2 * 4 + 2, 3 * 3 + 2 * 2)
    assert [sheet.getpixel((i % 2 * 6, i // 2 * 5)) for i in range(6)] == [
        *((i,) * 3 for i in range(5)),
        (255,) * 3,
    ]
    assert images.grid(batch).size == (3 * 4 + 4, 2 * 3 + 2)
    assert images.grid(batch[:1], pad=0).size == (4, 3)
    for wrong, columns in (([], None), (batch, 0), ([*batch, noise(5, 5)], 2)):
        with pytest.raises(ValueError):
            images.grid(wrong, columns)


# PNGs with their recipe


def test_recipe_round_trips_and_pixels_are_exact(tmp_path: Path) -> None:
    image, path = noise(64, 64), tmp_path / "x.png"
    images.save_png(image, path, RECIPE)
    assert images.read_recipe(path) == images.read_recipe(path.read_bytes()) == RECIPE
    assert np.array_equal(np.asarray(images.open_image(path)), np.asarray(image))
    with Image.open(path) as stored:
        assert stored.info["Software"].startswith("dalle ")
        assert json.loads(stored.info["dalle"]) == RECIPE
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]


def test_a_png_in_memory_is_the_one_on_disk(tmp_path: Path) -> None:
    images.save_png(noise(8, 8), tmp_path / "a.png", RECIPE)
    assert images.to_png(noise(8, 8), RECIPE) == (tmp_path / "a.png").read_bytes()


def test_parameters_are_golden() -> None:
    assert images.parameters(RECIPE, (64, 64)) == (
        "a red apple, flat fluent style\n"
        'Steps: 64, Sampler: "temperature 1, top_k 256", CFG scale: 3, Seed: 7, Size: 64x64, '
        "Model hash: 0123456789, Model: bundled, Version: dalle 1.2.3"
    )


def test_other_programs_read_the_parameters(tmp_path: Path) -> None:
    model = 'odd: "name", v2'
    images.save_png(noise(64, 64), tmp_path / "x.png", {**RECIPE, "model": model})
    with Image.open(tmp_path / "x.png") as stored:
        caption, line = stored.info["parameters"].rsplit("\n", 1)
    # The pattern by which Stable Diffusion front ends split the last line.
    fields = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', line))
    assert caption == RECIPE["caption"]
    assert (fields["Steps"], fields["Seed"], fields["Size"]) == ("64", "7", "64x64")
    assert json.loads(fields["Model"]) == model


@pytest.mark.parametrize("caption", ["caf\u00e9 \U0001f34e", "\ud800", "a\0b", "two\nlines", ""], ids=ascii)
def test_any_caption_is_stored(caption: str, tmp_path: Path) -> None:
    images.save_png(noise(8, 8), tmp_path / "x.png", {**RECIPE, "caption": caption})
    assert images.read_recipe(tmp_path / "x.png")["caption"] == caption
    with Image.open(tmp_path / "x.png") as stored:
        assert stored.info["parameters"].startswith(re.sub("[\0\ud800]", "\ufffd", caption))


def test_a_sparse_recipe_still_has_parameters() -> None:
    assert images.parameters({}, (32, 32)).startswith(
        "\nSteps: 16, Size: 32x32, Model: dalle, Version: dalle "
    )


def test_a_picture_without_a_recipe_is_an_error(tmp_path: Path) -> None:
    images.save_png(noise(8, 8), tmp_path / "grid.png", None)
    with pytest.raises(ValueError, match="holds no recipe"):
        images.read_recipe(tmp_path / "grid.png")
    with pytest.raises(ValueError, match="not a picture of a known kind: use PNG"):
        images.read_recipe(encoded(noise(8, 8), "JPEG"))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"seed": NaN}', "[" * 100_000, "x" * 1_000_001])
def test_a_junk_recipe_is_a_one_line_error(text: str) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("dalle", text)
    with pytest.raises(ValueError) as caught:
        images.read_recipe(encoded(noise(8, 8), pnginfo=chunks))
    assert "recipe" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_compressed_text_bomb_is_an_error() -> None:
    bomb = chunk(b"zTXt", b"dalle\0\0" + zlib.compress(b" " * 50_000_000))
    with pytest.raises(ValueError):
        images.read_recipe(png(1, 1, 8, 0, b"\0\0", bomb))


@pytest.mark.parametrize(
    "recipe", [{"seed": object()}, {"score": float("nan")}, {"caption": "x" * 1_000_000}]
)
def test_a_recipe_that_cannot_be_stored_is_an_error(recipe: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recipe"):
        images.save_png(noise(8, 8), tmp_path / "x.png", recipe)
    assert list(tmp_path.iterdir()) == []


def test_16_bit_grey_is_rounded_like_floats_and_takes_few_bytes_a_pixel() -> None:
    """It went through float64, 40 bytes a pixel: a picture of 31 kB took half a gigabyte."""
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(every / 257).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(every).save(buffer, format="PNG")
    assert np.array_equal(np.asarray(images.open_image(buffer.getvalue()))[..., 0], expected)
    side = 1000
    buffer = io.BytesIO()
    Image.new("I;16", (side, side)).save(buffer, format="PNG")
    tracemalloc.start()
    try:
        images.open_image(buffer.getvalue())
        _, peak = tracemalloc.get_traced_memory()  # numpy's arrays; Pillow's own memory is not counted
    finally:
        tracemalloc.stop()
    assert peak < 8 * side**2
