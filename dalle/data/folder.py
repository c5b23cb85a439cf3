"""Pictures with a caption file of the same stem beside each: the folders of kohya and Automatic1111."""

import os
from collections.abc import Collection
from pathlib import PurePosixPath

from dalle.data import places
from dalle.data.pair import BadSample, Rejected
from dalle.data.places import Files, normal
from dalle.data.samples import (
    CAPTION_SUFFIXES,
    DOCUMENTS,
    MAX_CAPTION_BYTES,
    OTHER_PICTURES,
    PICTURE_SUFFIXES,
    ReadOptions,
    Samples,
    captions_of_name,
    captions_of_text,
    has_suffix,
    make_pair,
    printable,
    require_format,
)

WRITTEN_BY_DALLE = b"tEXtSoftware\0dalle "  # see images.to_png

NO_CAPTION_FILE = "no caption file"  # how the reason of a picture without one begins


def read_folder(files: Files, options: ReadOptions, listed: Collection[str], is_alone: bool) -> Samples:
    """Pairs of the pictures that no table lists (`listed`, by normal name); one caption a line of the file beside.

    A picture without a caption file is bad, unless captions come from names. Beside other layouts (`is_alone` is
    false) and without a single caption file the pictures were left out on purpose: that is noted.
    """
    texts = _caption_files(files)
    captioned = set()
    n_drawn = 0
    pictures = [name for name in files.sizes if has_suffix(name, PICTURE_SUFFIXES | OTHER_PICTURES)]
    pictures = [name for name in pictures if normal(name) not in listed]
    if not (is_alone or options.captions_from or any(_stem(name) in texts for name in pictures)):
        if pictures:
            files.notes.append(f"{len(pictures)} pictures are in no table and have no caption file: not read")
        return
    for key in pictures:
        captioned.add(_stem(key))
        text = texts.get(_stem(key))
        if text is None and options.captions_from is None and _is_drawn(files, key):
            n_drawn += 1
            continue
        try:
            require_format(key)
            yield make_pair(key, _captions(files, key, text, options), {}, files.path(key), files.sizes[key])
        except (Rejected, OSError) as error:
            yield BadSample(printable(key), str(error))
    if n_drawn:
        files.notes.append(f"{n_drawn} pictures were written by dalle and have no caption file: not read")
    captioned |= {_stem(name) for name in listed}
    for stem, name in texts.items():
        if stem not in captioned and PurePosixPath(stem).name.lower() not in DOCUMENTS:
            yield BadSample(printable(name), "missing image file beside this caption")


def _captions(files: Files, key: str, text: str | None, options: ReadOptions) -> tuple[str, ...]:
    if text is None:
        if options.captions_from is not None:
            return captions_of_name(key, options.captions_from)
        raise Rejected(f"{NO_CAPTION_FILE} {PurePosixPath(key).stem}.txt beside it")
    if files.sizes[text] > MAX_CAPTION_BYTES:
        raise Rejected(
            f"the caption file has {files.sizes[text]} bytes; at most {MAX_CAPTION_BYTES} are read"
        )
    return captions_of_text(files.read(text))


def _is_drawn(files: Files, key: str) -> bool:
    """Whether this program wrote a picture: a draw, a grid or a sheet, by the text at the head of the PNG."""
    if places.is_address(files.root) or not has_suffix(key, (".png",)):
        return False
    with places.open_binary(files.path(key)) as file:
        return WRITTEN_BY_DALLE in file.read(128)


def _caption_files(files: Files) -> dict[str, str]:
    """The caption file of each stem; of several the first of CAPTION_SUFFIXES."""
    found: dict[str, str] = {}
    for suffix in CAPTION_SUFFIXES:
        for name in files.sizes:
            if has_suffix(name, (suffix,)):
                found.setdefault(_stem(name), name)
    return found


def _stem(name: str) -> str:
    return os.path.splitext(normal(name))[0]
