"""What all layouts share: which columns and suffixes count, how captions are checked, how a pair is made.

Source: none in the paper (section 2.3: 250M pairs from the internet, in a private format).
"""

import ast
import io
import json
import os
import posixpath
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Literal

from dalle import picture_files
from dalle.data.pair import BadSample, Pair, Rejected
from dalle.data.places import normal

PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"}
)
# Pictures that people keep and that are not read: said by name, so that nobody has to guess.
OTHER_PICTURES = frozenset(
    {".svg", ".psd", ".jxl", ".jp2", ".tga", ".ico", ".cr2", ".nef", ".arw", ".dng", ".eps", ".ppm"}
)
CAPTION_SUFFIXES = (".txt", ".caption")  # the first that is there is read
# The first that is there is read; the usual names of public data sets.
CAPTION_COLUMNS = (
    "captions", "text", "caption", "prompt", "sentences_raw", "sentences", "title", "description", "alt_text",
)  # fmt: skip
PICTURE_COLUMNS = (
    "file_name", "image", "filepath", "file_path", "image_path", "img_path", "filename", "image_file", "img", "path",
)  # fmt: skip
DOCUMENTS = frozenset({"readme", "license", "licence", "copying", "notice", "attribution", "requirements"})
MAX_PICTURE_BYTES = 256 * 2**20
MAX_CAPTION_BYTES = 2**20  # a caption file or the JSON of one sample
MAX_CAPTION_CHARACTERS = 32_000
NOT_UTF8 = "the row holds text that is not valid UTF-8"

Samples = Iterator[Pair | BadSample]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How the samples of a data set are read where it does not say so itself."""

    image_column: str | None = None  # of tables; None: the first of PICTURE_COLUMNS
    caption_column: str | None = (
        None  # of tables and of the .json in shards; None: the first of CAPTION_COLUMNS
    )
    captions_from: Literal["folder", "name"] | None = None  # of a picture without a caption file


# --- columns ---


def column_of(columns: Iterable[str], known: Iterable[str], wanted: str | None = None) -> str | None:
    """The column `wanted`, else the first of `known` that is there, in any case; None where there is none."""
    there = {
        str(column).strip().casefold(): column for column in reversed(list(columns)) if column is not None
    }
    for name in (wanted,) if wanted is not None else known:
        if name.casefold() in there:
            return there[name.casefold()]
    return None


def caption_column(columns: Iterable[str], options: ReadOptions) -> str | None:
    """The column whose captions are read; others among CAPTION_COLUMNS stay fields."""
    return column_of(columns, CAPTION_COLUMNS, options.caption_column)


def no_caption_column(options: ReadOptions) -> str:
    """Why a row without a caption column is skipped."""
    return f"no caption column; looked for {options.caption_column or ', '.join(CAPTION_COLUMNS)}"


# --- captions ---


def checked_captions(value: object) -> tuple[str, ...]:
    """One caption or a list of them, stripped, without the empty ones and the nulls of a list."""
    given = [value] if isinstance(value, str) else value
    if given is None:
        raise Rejected("empty caption")
    if isinstance(given, list):
        given = [caption for caption in given if caption is not None]
    if not isinstance(given, list) or not all(isinstance(caption, str) for caption in given):
        raise Rejected("the caption is neither text nor a list of texts")
    captions = tuple(caption.strip() for caption in given if caption.strip())
    if not captions:
        raise Rejected("empty caption")
    for caption in captions:
        if not is_unicode(caption):
            raise Rejected("the caption is not valid UTF-8")
        if len(caption) > MAX_CAPTION_CHARACTERS:
            raise Rejected(
                f"the caption has {len(caption)} characters; at most {MAX_CAPTION_CHARACTERS} are read"
            )
    return captions


def captions_of_text(data: bytes) -> tuple[str, ...]:
    """The captions in the bytes of a file, one a line."""
    try:
        text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except UnicodeDecodeError:
        raise Rejected("the caption is not valid UTF-8") from None
    return checked_captions(text.replace("\r", "\n").split("\n"))


def captions_of_cell(cell: str, is_list: bool) -> object:
    """The caption or the list of captions in a cell of text: JSON, or a list as Python or numpy prints it.

    Rejected for a list that cannot be read where the column is one of lists (`is_list`).
    """
    text = cell.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return cell
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _printed_list(text)
    if isinstance(value, list) and all(entry is None or isinstance(entry, str) for entry in value):
        return value
    if is_list:
        raise Rejected(f"the cell {text[:40]!r} is no list of texts")
    return cell


def _printed_list(text: str) -> list[str | None] | None:
    """The texts of ['a', 'b'] or, as numpy prints them, ['a' 'b']; None for anything else."""
    layout = (tokenize.NEWLINE, tokenize.NL, tokenize.ENDMARKER, tokenize.INDENT, tokenize.DEDENT)
    entries: list[str | None] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.STRING:
                entry = ast.literal_eval(token.string)
                if not isinstance(entry, str):
                    return None
                entries.append(entry)
            elif token.type == tokenize.NAME and token.string in ("None", "nan"):
                entries.append(None)
            elif token.type not in layout and token.string not in ("[", "]", ","):
                return None
    except (tokenize.TokenError, SyntaxError, ValueError):
        return None
    return entries


def captions_of_name(key: str, source: Literal["folder", "name"]) -> tuple[str, ...]:
    """The caption that a picture's folder or file name spells: 10_red-apple -> "red apple", blueCar_003 -> "blue Car"."""
    path = PurePosixPath(key)
    name = path.parent.name if source == "folder" else path.stem
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", re.sub(r"[\s_+.-]+", " ", name)).split()
    while len(words) > 1 and re.fullmatch(r"\(?\d+\)?", words[-1]):
        words.pop()
    while len(words) > 1 and words[0].isdigit():
        words.pop(0)  # kohya's number of repeats: 10_dog
    caption = " ".join(words)
    if not caption or caption.isdigit():
        raise Rejected(f"no caption: the {source} {name!r} says nothing")
    return (caption,)


# --- names and pairs ---


def printable(key: str) -> str:
    """The key with bytes that are not UTF-8 shown as escapes, so that it can be written anywhere."""
    return key.encode("utf-8", "backslashreplace").decode("utf-8")


def is_unsafe(name: str) -> bool:
    """Whether a path written in a data set could point outside its folder, on any system."""
    windows = PureWindowsPath(name)
    return name.startswith(("/", "\\")) or bool(windows.drive) or ".." in windows.parts or "\0" in name


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def json_object(text: str | bytes) -> dict[str, Any] | None:
    """The JSON object that a text is; None for anything else."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def has_suffix(name: str, suffixes: Iterable[str]) -> bool:
    """Whether a file's name ends in one of the suffixes, in any case."""
    return os.path.splitext(name)[1].lower() in suffixes


def require_format(name: str) -> None:
    """Rejected for a picture whose format is not read, by its suffix."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in OTHER_PICTURES:
        raise Rejected(f"format {suffix} is not read: convert it to PNG or JPEG")
    if suffix in (".heic", ".heif") and not picture_files.reads_heif():
        raise Rejected(f"format {suffix} needs a library: pip install 'dalle[heic]', or convert it to JPEG")


def make_pair(
    key: str,
    captions: object,
    record: Mapping[str, object],
    path: str,
    n_bytes: int | None,
    *,
    offset: int | None = None,
    sample: str | None = None,
    home: str = "",
) -> Pair:
    """Check what all layouts have in common; `record` holds the split and the other fields.

    `sample` is the picture's path within its container, the key where it has none.
    """
    if not is_unicode(key):
        raise Rejected("the file name is not valid UTF-8")
    require_format(key)
    if n_bytes is None:
        raise Rejected("missing image file")
    if not 0 < n_bytes <= MAX_PICTURE_BYTES:
        raise Rejected(f"the image file has {n_bytes} bytes; 1 to {MAX_PICTURE_BYTES} are read")
    checked = captions if isinstance(captions, tuple) else checked_captions(captions)
    column = column_of(record, ("split",))
    fields = {name: value for name, value in record.items() if name != column}
    split = _split_value(record[column]) if column is not None else ""
    own = os.path.splitext(posixpath.normpath(normal(key if sample is None else sample)))[0]
    return Pair(normal(key), checked, split, fields, path, offset, n_bytes, sample=own, home=home)


def _split_value(value: object) -> str:
    if value is None or value == "":
        return ""
    if not isinstance(value, str) or not is_unicode(value):
        raise Rejected(f"split is {value!r}; it has to be a text such as train or validation")
    return value
