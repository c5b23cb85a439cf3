"""Picture files in and out: one guarded opening, the paper's two crops, and PNGs that carry their recipe.

Source: DALL·E paper App. A.2, Listing 1 (dVAE crop) and App. C, Listing 2 (transformer crop); the
`parameters` chunk is the form that Stable Diffusion front ends write and read. Nothing else in the package
opens a picture file.

Shapes: B batch, H and W pixels; h and w the sides of a source picture, s its short side, t the side it is
resized to.
"""

import contextlib
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from dalle import __version__, files
from dalle.picture_files import FORMATS, installed, png_without_texts, to_srgb

MAX_PIXELS = 64_000_000  # a photograph has up to about 50 million; a bomb has billions
MAX_RECIPE = 1_000_000  # characters of the `dalle` chunk; PNG readers stop at 1 MiB of text
PIXELS_PER_TOKEN = 8  # side of the square that one image token stands for (paper §2.1)

Source = Path | str | bytes | BinaryIO
_SHADES = ((np.arange(65536) + 128) // 257).astype(np.uint8)  # 16-bit grey, rounded to 8 bits


# Opening


def open_image(
    source: Source, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS
) -> Image.Image:
    """Read a picture as sRGB: turned by its EXIF, on white where clear, first frame, without its ICC profile.

    The header is checked against `max_pixels` before any pixel is decoded. ValueError, one line with the
    path, when the file is missing, of a format that is not in `formats`, too large, truncated or corrupt.
    """
    name = _name(source)
    formats = installed(formats)
    try:
        return _read(source, name, formats, max_pixels)
    except ValueError as error:
        png = png_without_texts(source)
        if png is None:
            raise
        try:
            return _read(png[0], name, formats, max_pixels, png[1])
        except ValueError:
            raise error from None


def _read(
    source: Source, name: str, formats: tuple[str, ...], max_pixels: int, profile: bytes | None = None
) -> Image.Image:
    with _opened(source, name, formats, max_pixels) as image:
        image.load()
        if profile is not None:
            image.info["icc_profile"] = profile
        return _to_rgb(to_srgb(ImageOps.exif_transpose(image)))


def open_mask(source: Source, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture file as a mask, see `to_mask`, turned by its EXIF; errors as `open_image`."""
    name = _name(source)
    with _opened(source, name, FORMATS, max_pixels) as image:
        image.load()
        return to_mask(ImageOps.exif_transpose(image))


def has_transparency(source: Source, max_pixels: int = MAX_PIXELS) -> bool:
    """Whether a picture file can be clear somewhere, by its header; errors as `open_image`."""
    name = _name(source)
    with _opened(source, name, FORMATS, max_pixels) as image:
        return bool(image.has_transparency_data)


def to_mask(image: Image.Image) -> Image.Image:
    """Return what a picture marks, 255 of an 8-bit grey picture: what is fully transparent, as in OpenAI's API.

    In a picture without transparency, what is nearer to white than to black, as in most other programs.
    """
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        return alpha.point([255] + [0] * 255)
    return _to_rgb(image).convert("L").point([0] * 128 + [255] * 128)


@contextlib.contextmanager
def _opened(source: Source, name: str, formats: tuple[str, ...], max_pixels: int) -> Iterator[Image.Image]:
    """Read the header of a picture; whatever decoding raises inside the `with` becomes one ValueError."""
    with _stream(source, name) as stream:
        try:
            image = Image.open(stream, formats=formats)
        except Exception as error:
            raise _unreadable(error, name, formats) from error
        n_pixels = image.width * image.height
        if n_pixels > max_pixels:
            raise ValueError(
                f"{name}: picture is {_size(image)} = {n_pixels} pixels; at most {max_pixels} are allowed: "
                "make it smaller"
            )
        try:
            yield image
        except Exception as error:
            raise _unreadable(error, name, formats) from error


def _stream(source: Source, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not isinstance(source, (Path, str)):
        return contextlib.nullcontext(source)  # the caller's to close
    try:
        # Not a pipe or a device: opening one can block for ever.
        if not Path(source).is_file():
            raise ValueError(f"{name}: no such picture file: check the path")
        return Path(source).open("rb")
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror or error})") from error


def _unreadable(error: Exception, name: str, formats: tuple[str, ...]) -> ValueError:
    """Say in one line why a picture cannot be read; corrupt files make the decoders raise nearly anything."""
    if isinstance(error, UnidentifiedImageError):
        return ValueError(f"{name}: not a picture of a known kind: use {', '.join(formats)}")
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return ValueError(f"{name}: picture has far too many pixels (a decompression bomb?): make it smaller")
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{name}: picture is truncated or corrupt ({reason})")


def _name(source: Source) -> str:
    """Return what an error line calls a source."""
    if isinstance(source, (Path, str)):
        return str(source)
    name = "picture" if isinstance(source, bytes) else getattr(source, "name", "picture")
    return name if isinstance(name, str) else "picture"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; converting it directly would clip, not scale
        shades = _SHADES.copy()
        clear = image.info.get("transparency")
        if isinstance(clear, int) and 0 <= clear < len(shades):
            shades[clear] = 255
        grey = np.asarray(image)
        image = Image.fromarray(shades[grey if grey.dtype == np.uint16 else grey.clip(0, 65535)])
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


# Crops


def dvae_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Return a random (size, size) crop of an RGB picture to train the dVAE on, flipped half the time.

    Source: Listing 1. differs: a picture with a short side below `size`, where the listing fails, is
    enlarged.
    """
    s = min(image.size)
    square = _crop(image, int(rng.integers(image.width - s + 1)), int(rng.integers(image.height - s + 1)), s)
    smallest, largest = min(s, round(9 / 8 * size)), min(s, round(12 / 8 * size))
    t = max(size, int(rng.integers(smallest, largest + 1)))
    part = _random_crop(_resize(square, t, align_corners=True), size, rng)
    return ImageOps.mirror(part) if rng.random() < 0.5 else part


def transformer_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Return a random (size, size) crop near the middle of an RGB picture, not flipped: it may hold writing.

    Source: Listing 2. differs: a picture with a short side below `size`, where the listing fails, is
    enlarged.
    """
    s = min(image.size)
    left, top = (
        int(rng.integers(3 * (side - s) // 8, max(3 * (side - s) // 8 + 1, 5 * (side - s) // 8)))
        for side in image.size
    )
    largest = min(s, round(9 / 8 * size))
    t = int(rng.integers(size, max(size, largest) + 1))
    return _random_crop(_resize(_crop(image, left, top, s), t, align_corners=True), size, rng)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the central square of an RGB picture at (size, size): area-averaged down, bicubic up."""
    s = min(image.size)
    square = _crop(image, (image.width - s) // 2, (image.height - s) // 2, s)
    # Large photographs: Pillow first averages whole blocks, many times faster than the exact weights below.
    if s >= 4 * size:
        square = square.reduce(s // (2 * size))
    return _resize(square, size, align_corners=False)


def near_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Return nearly the whole central square of an RGB picture at (size, size): 15/16 of its side or more, anywhere.

    Not in the paper: small pictures that fill their frame would lose their edges to Listing 2.
    """
    s = min(image.size)
    side = s - int(rng.integers(s // 16 + 1))
    left, top = ((length - s) // 2 + int(rng.integers(s - side + 1)) for length in image.size)
    return center_crop(_crop(image, left, top, side), size)


def shifted(image: Image.Image, most: int, rng: np.random.Generator) -> Image.Image:
    """Move an RGB picture by up to `most` whole pixels each way; what comes in repeats the pixels of the edge.

    Not in the paper: unlike a crop it resamples nothing, and small pictures keep their sharp edges.
    """
    right, down = (int(rng.integers(-most, most + 1)) for _ in range(2))
    padding = ((max(down, 0), max(-down, 0)), (max(right, 0), max(-right, 0)), (0, 0))
    pixels = np.pad(np.asarray(image), padding, mode="edge")
    top, left = max(-down, 0), max(-right, 0)
    return Image.fromarray(np.ascontiguousarray(pixels[top : top + image.height, left : left + image.width]))


def resize_area(
    pixels: npt.NDArray[np.uint8], height: int, width: int, *, align_corners: bool
) -> npt.NDArray[np.float32]:
    """Average (h, w, C) pixels over the box of each output pixel -> (height, width, C), not rounded.

    `align_corners` gives TensorFlow's `resize_area`: boxes of side (h - 1) / (height - 1) starting at
    multiples of it, the last one reaching past the edge, where the edge pixel repeats. Without it the boxes
    tile the picture.
    """
    rows = _average_axis(pixels, 0, height, align_corners)  # (height, w, C)
    return _average_axis(rows, 1, width, align_corners)  # (height, width, C)


def box_filtered(pictures: Tensor, side: int) -> Tensor:
    """Average pictures (B, 3, H, H) in [0, 1] down to (B, 3, side, side), in 8 bits: as `center_crop` of their files.

    Raises ValueError when H is no multiple of `side`.
    """
    factor, rest = divmod(pictures.shape[-1], side)
    if rest or factor == 0:
        raise ValueError(f"pictures have {pictures.shape[-1]} px a side, which is no multiple of {side}")
    if factor == 1:
        return pictures
    values = (pictures.float().clamp(0, 1) * 255).round()
    return F.avg_pool2d(values, factor).round() / 255


def _average_axis(
    values: npt.NDArray[np.uint8] | npt.NDArray[np.float32], axis: int, n_out: int, align_corners: bool
) -> npt.NDArray[np.float32]:
    n_in = values.shape[axis]
    scale = (n_in - 1) / (n_out - 1) if align_corners and n_out > 1 else n_in / n_out
    start = np.arange(n_out) * scale  # (n_out,) of each box, in input pixels
    end = start + scale
    first = np.floor(start).astype(np.int64)
    along_axis = [n_out if i == axis else 1 for i in range(values.ndim)]
    shape = [n_out if i == axis else side for i, side in enumerate(values.shape)]
    total = np.zeros(shape, dtype=np.float32)
    for tap in range(math.ceil(scale) + 1):
        pixel = first + tap  # (n_out,)
        share = np.clip(np.minimum(pixel + 1, end) - np.maximum(pixel, start), 0.0, None) / scale
        if share.any():
            weight = share.astype(np.float32).reshape(along_axis)
            total += weight * values.take(np.minimum(pixel, n_in - 1), axis)
    return total


def _resize(square: Image.Image, side: int, *, align_corners: bool) -> Image.Image:
    if side > square.width:  # an area average would only repeat pixels
        return square.resize((side, side), Image.Resampling.BICUBIC)
    if side == square.width:
        return square
    averaged = resize_area(np.asarray(square), side, side, align_corners=align_corners)
    return Image.fromarray(np.rint(averaged.clip(0, 255)).astype(np.uint8))


def _crop(image: Image.Image, left: int, top: int, side: int) -> Image.Image:
    return image.crop((left, top, left + side, top + side))


def _random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    n_places = image.width - size + 1
    return _crop(image, int(rng.integers(n_places)), int(rng.integers(n_places)), size)


# Tensors


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Stack RGB pictures -> (B, 3, H, W) float32 in [0, 1]; ValueError when sizes or modes differ."""
    if not images:
        raise ValueError("there are 0 pictures; at least 1 is needed to make a batch")
    for image in images:
        if image.mode != "RGB" or image.size != images[0].size:
            raise ValueError(
                f"picture is {image.mode} {_size(image)}; a batch holds RGB pictures of one size, "
                f"here {_size(images[0])}: open them with open_image and crop them"
            )
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))  # (B, H, W, 3)
    return pixels.permute(0, 3, 1, 2).contiguous().float() / 255  # (B, 3, H, W)


def to_images(tensor: Tensor) -> list[Image.Image]:
    """Turn (B, 3, H, W) in [0, 1] into RGB pictures, clamped; ValueError for other shapes and for NaN."""
    if tensor.ndim != 4 or tensor.shape[1] != 3:
        raise ValueError(f"tensor has shape {tuple(tensor.shape)}; pictures are (B, 3, H, W)")
    if torch.isnan(tensor).any():
        raise ValueError("tensor holds NaN; pixels are numbers from 0 to 1: the model that made it is broken")
    pixels = (tensor.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.permute(0, 2, 3, 1).cpu()  # (B, H, W, 3)
    return [Image.fromarray(np.ascontiguousarray(image)) for image in pixels.numpy()]


def grid(images: Sequence[Image.Image], columns: int | None = None, pad: int = 2) -> Image.Image:
    """Lay RGB pictures of one size out on white, `pad` pixels apart; nearly square by default."""
    if not images:
        raise ValueError("there are 0 pictures; a grid needs at least 1")
    if columns is None:
        columns = math.ceil(math.sqrt(len(images)))
    if columns < 1 or pad < 0:
        raise ValueError(f"grid has {columns} columns and a pad of {pad}; at least 1 and 0 are needed")
    width, height = images[0].size
    n_rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + pad) - pad, n_rows * (height + pad) - pad), "white")
    for i, image in enumerate(images):
        if image.size != (width, height):
            raise ValueError(
                f"picture {i} of a grid is {_size(image)}; the first is {_size(images[0])}: crop them"
            )
        sheet.paste(image, (i % columns * (width + pad), i // columns * (height + pad)))
    return sheet


# PNGs with their recipe


def save_png(image: Image.Image, path: str | Path, recipe: Mapping[str, Any] | None) -> None:
    """Write a PNG atomically, with its recipe as JSON (chunk `dalle`) and as text (chunk `parameters`).

    ValueError when the recipe is not JSON or too long, or when `path` is not a file that can be replaced.
    """
    try:
        png = to_png(image, recipe)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    files.write_bytes(path, png)


def to_png(image: Image.Image, recipe: Mapping[str, Any] | None) -> bytes:
    """Return what `save_png` writes; ValueError when the recipe is not JSON or too long."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("Software", f"dalle {__version__}")
    if recipe is not None:
        try:
            recipe_json = json.dumps(dict(recipe), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"recipe cannot be stored as JSON ({error})") from error
        if len(recipe_json) > MAX_RECIPE:
            raise ValueError(
                f"recipe has {len(recipe_json)} characters; at most {MAX_RECIPE}: shorten captions"
            )
        chunks.add_text("parameters", parameters(recipe, image.size))
        chunks.add_text("dalle", recipe_json)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def read_recipe(source: Source) -> dict[str, Any]:
    """Return the recipe that `save_png` stored, decoding no pixel; ValueError when there is none."""
    name = _name(source)
    with _opened(source, name, ("PNG",), MAX_PIXELS) as image:
        text = image.info.get("dalle")
    if text is None:
        raise ValueError(f"{name}: PNG holds no recipe; only pictures drawn by dalle and not edited since do")
    if not isinstance(text, str) or len(text) > MAX_RECIPE:
        raise ValueError(f"{name}: recipe is too long; at most {MAX_RECIPE} characters are read")
    try:
        recipe = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: recipe is not JSON ({error})") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{name}: recipe is a {type(recipe).__name__}; it must be a JSON object")
    return recipe


def parameters(recipe: Mapping[str, Any], size: tuple[int, int]) -> str:
    """Return the caption and one line `Steps: 64, Sampler: ..., Size: 64x64, ...`, as front ends show it.

    Reads `caption`, `seed`, `model`, `model_sha256`, `options` (temperature, top_k, top_p, guidance) and
    `versions`; what a recipe lacks is left out. A step is one image token.
    """
    options, versions = recipe.get("options") or {}, recipe.get("versions") or {}
    sampler = [
        f"{key} {options[key]:g}" for key in ("temperature", "top_k", "top_p") if options.get(key) is not None
    ]
    width, height = size
    sha256, model = recipe.get("model_sha256"), recipe.get("model")
    fields: dict[str, object] = {
        "Steps": (width // PIXELS_PER_TOKEN) * (height // PIXELS_PER_TOKEN),
        "Sampler": ", ".join(sampler) or None,
        "CFG scale": None if options.get("guidance") is None else f"{options['guidance']:g}",
        "Seed": recipe.get("seed"),
        "Size": f"{width}x{height}",
        "Model hash": None if sha256 is None else str(sha256)[:10],
        "Model": "dalle" if model is None else Path(str(model)).name or "dalle",
        "Version": f"dalle {versions.get('dalle', __version__)}",
    }
    line = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in fields.items() if value is not None)
    # A text chunk holds neither lone surrogates nor NUL.
    return _printable(f"{recipe.get('caption', '')}\n{line}")


def _quoted(value: str) -> str:
    """Quote a value that would end early at a comma, a colon or a line end, as a JSON string."""
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def _printable(text: str) -> str:
    return re.sub("[\x00\ud800-\udfff]", "\ufffd", text)


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _size(image: Image.Image) -> str:
    return f"{image.width} x {image.height}"
