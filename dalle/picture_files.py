"""Picture files: which formats are read, and what they carry besides pixels that decides how: ICC profiles, long texts.

Sources: PNG specification (third edition), §5.3 and §11.3 (chunks; iCCP, tEXt, zTXt, iTXt); ICC.1:2022.
"""

import functools
import io
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageCms

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # of pictures that strangers may send
DATA_FORMATS = (*FORMATS, "TIFF", "AVIF", "HEIF")  # of one's own data; HEIF with pillow-heif
MAX_PNG = 2**28  # bytes of a file that is read again without its texts
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
MAX_PROFILE = 16 * 2**20  # bytes of an ICC profile, decompressed
UNSEEN_ERROR = 2  # of 255: a profile whose colours differ by no more is sRGB, rounded otherwise


@functools.cache
def installed(formats: tuple[str, ...]) -> tuple[str, ...]:
    """Those of some formats that this Pillow reads: AVIF and HEIF are not in all of them."""
    if "HEIF" in formats:
        reads_heif()
    Image.init()
    return tuple(name for name in formats if name in Image.OPEN)


@functools.cache
def reads_heif() -> bool:
    """Whether HEIC pictures can be read: pillow-heif is installed, and Pillow knows it from now on."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def png_without_texts(source: Path | str | bytes | BinaryIO) -> tuple[bytes, bytes | None] | None:
    """A PNG without its texts and its ICC profile, and that profile; None for what is no PNG.

    Pillow refuses a PNG whose texts or profile take more than a megabyte, as those of some drawing programs do.
    """
    try:
        if isinstance(source, (Path, str)):
            is_large = Path(source).stat().st_size > MAX_PNG
            data = b"" if is_large else Path(source).read_bytes()
        elif isinstance(source, bytes):
            data = source
        else:
            source.seek(0)
            data = source.read()
    except (OSError, ValueError):
        return None
    return _without_texts(data)


def _without_texts(png: bytes) -> tuple[bytes, bytes | None] | None:
    if not png.startswith(PNG_SIGNATURE):
        return None
    kept, profile, at = [PNG_SIGNATURE], None, len(PNG_SIGNATURE)
    while at + 8 <= len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        end = at + 12 + length
        if kind == b"iCCP":
            profile = _profile(png[at + 8 : end - 4])
        elif kind not in TEXTS:
            kept.append(png[at:end])
        at = end
    return b"".join(kept), profile


def _profile(chunk: bytes) -> bytes | None:
    """The profile in an iCCP chunk: name, NUL, method, compressed profile; None when it is damaged or too long."""
    compressed = chunk[chunk.find(b"\0") + 2 :]
    stream = zlib.decompressobj()
    try:
        profile = stream.decompress(compressed, MAX_PROFILE)
    except zlib.error:
        return None
    return profile if stream.eof else None


def to_srgb(image: Image.Image) -> Image.Image:
    """The picture with the colours that its ICC profile means, in sRGB; itself where it has no profile that says more.

    A damaged profile is passed over, as browsers do.
    """
    profile = image.info.get("icc_profile")
    has_alpha = image.mode == "RGBA"
    mode = "RGB" if has_alpha else image.mode
    if not profile or mode not in ("RGB", "L", "CMYK"):
        return image
    transform = _transform(bytes(profile), mode)
    if transform is None:
        return image
    converted = ImageCms.applyTransform(image.convert(mode), transform)
    if converted is None:  # only where it works in place
        return image
    if has_alpha:
        converted.putalpha(image.getchannel("A"))
    return converted


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> Any:
    """From a profile to sRGB; None where it is damaged, of another kind of picture, or sRGB itself."""
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), mode, "RGB"
        )
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
    if mode == "RGB":
        levels = np.linspace(0, 255, 9).round().astype(np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
        seen = ImageCms.applyTransform(Image.fromarray(colours), transform)
        error = np.abs(np.asarray(seen).astype(int) - colours.astype(int)).max()
        if error <= UNSEEN_ERROR:
            return None
    return transform
