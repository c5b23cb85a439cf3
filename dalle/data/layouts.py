"""The layouts in which people keep captioned pictures, one reader each.

Source: none in the paper (section 2.3: 250M pairs from the internet, in a private format). The layouts are
those of kohya and Automatic1111 folders, Hugging Face imagefolder and COCO captions; for tar shards see
shards.py, for tables with the pictures in them parquet.py.
Every reader yields a Row for a usable sample and a BadSample for one that is skipped: none is dropped unseen.
"""

import csv
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
CAPTION_SUFFIXES = (".txt", ".caption")  # the first that is there is read
CAPTION_COLUMNS = (
    "captions",
    "text",
    "caption",
    "prompt",
    "sentences_raw",
)  # the first that is there is read
LIST_COLUMNS = ("captions", "sentences_raw")  # whose cells may hold a JSON list in .csv and .tsv
METADATA_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
DOCUMENTS = frozenset({"readme", "license", "licence", "copying", "notice", "attribution", "requirements"})
MAX_PICTURE_BYTES = 256 * 2**20
MAX_CAPTION_BYTES = 2**20  # a caption file or the JSON of one sample
MAX_CAPTION_CHARACTERS = 32_000
NOT_UTF8 = "the row holds text that is not valid UTF-8"


class BadSample(NamedTuple):
    """A sample that was skipped, and why; the key may also name a file or a line of one."""

    key: str
    reason: str


class Row(NamedTuple):
    """A usable sample as its layout describes it; nothing of the picture has been read."""

    key: str  # "/"-separated path below the source, unique
    captions: tuple[str, ...]
    split: str | None  # None: the layout does not say
    fields: Mapping[str, object]  # the other columns
    path: str  # the picture file, or the tar shard or parquet table that holds it
    offset: int | None  # first byte within the shard; None: the whole file
    n_bytes: int
    cell: tuple[int, int] | None = None  # row group and row of it, within a parquet table


Rows = Iterator[Row | BadSample]


class Rejected(Exception):
    """Why one sample is skipped; the readers turn it into a BadSample."""


# --- what all layouts share ---


def list_files(root: Path) -> dict[str, int]:
    """Sizes in bytes of the files below a folder, by "/"-separated relative path, sorted.

    Hidden files are left out. Links are followed (a Hub snapshot consists of them), each folder once.
    OSError for a folder that cannot be read.
    """
    sizes: dict[str, int] = {}
    entered = {os.path.realpath(root)}
    for folder, subfolders, names in os.walk(root, onerror=_raise, followlinks=True):
        visible = sorted(name for name in subfolders if not name.startswith("."))
        subfolders.clear()
        for name in visible:
            target = os.path.realpath(os.path.join(folder, name))
            if target not in entered:  # else its pictures would come twice, perhaps held out and trained on
                entered.add(target)
                subfolders.append(name)
        for name in names:
            path = os.path.join(folder, name)
            n_bytes = _file_size(path)
            if n_bytes is not None and not name.startswith("."):
                sizes[Path(path).relative_to(root).as_posix()] = n_bytes
    return dict(sorted(sizes.items()))


def printable(key: str) -> str:
    """The key with bytes that are not UTF-8 shown as escapes, so that it can be written anywhere."""
    return key.encode("utf-8", "backslashreplace").decode("utf-8")


def _raise(error: OSError) -> None:
    raise error


def _file_size(path: str) -> int | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL character in the name
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def is_unsafe(name: str) -> bool:
    """Whether a path written in a data set could point outside its folder, on any system."""
    windows = PureWindowsPath(name)
    return name.startswith(("/", "\\")) or bool(windows.drive) or ".." in windows.parts or "\0" in name


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _checked_captions(value: object) -> tuple[str, ...]:
    """One caption or a list of them, stripped, the empty ones left out."""
    given = [value] if isinstance(value, str) else value
    if given is None:
        raise Rejected("empty caption")
    if not isinstance(given, list) or not all(isinstance(caption, str) for caption in given):
        raise Rejected("the caption is neither text nor a list of texts")
    captions = tuple(caption.strip() for caption in given if caption.strip())
    if not captions:
        raise Rejected("empty caption")
    for caption in captions:
        if not _is_unicode(caption):
            raise Rejected("the caption is not valid UTF-8")
        if len(caption) > MAX_CAPTION_CHARACTERS:
            raise Rejected(
                f"the caption has {len(caption)} characters; at most {MAX_CAPTION_CHARACTERS} are read"
            )
    return captions


def caption_column(columns: Iterable[str]) -> str | None:
    """The column whose captions are read: the first of CAPTION_COLUMNS; others among them stay fields."""
    there = set(columns)
    return next((column for column in CAPTION_COLUMNS if column in there), None)


def captions_of_text(data: bytes) -> tuple[str, ...]:
    """One caption a line."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Rejected("the caption is not valid UTF-8") from None
    return _checked_captions(text.replace("\r", "\n").split("\n"))


def _split_of(value: object) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not _is_unicode(value):
        raise Rejected(f"split is {value!r}; it has to be a text such as train or validation")
    return value


def checked_row(
    key: str,
    captions: object,
    record: Mapping[str, object],
    path: str,
    n_bytes: int | None,
    offset: int | None = None,
) -> Row:
    """Check what all layouts have in common; `record` holds the split and the other fields."""
    if not _is_unicode(key):
        raise Rejected("the file name is not valid UTF-8")
    if n_bytes is None:
        raise Rejected("missing image file")
    if not 0 < n_bytes <= MAX_PICTURE_BYTES:
        raise Rejected(f"the image file has {n_bytes} bytes; 1 to {MAX_PICTURE_BYTES} are read")
    checked = captions if isinstance(captions, tuple) else _checked_captions(captions)
    fields = {name: value for name, value in record.items() if name != "split"}
    return Row(key, checked, _split_of(record.get("split")), fields, path, offset, n_bytes)


# --- x.jpg beside x.txt ---


def read_folder(root: Path, files: Mapping[str, int]) -> Rows:
    """Pictures with a caption file of the same stem beside each; one caption a line."""
    captioned = set()
    for key, n_bytes in files.items():
        stem, suffix = os.path.splitext(key)
        if suffix.lower() not in PICTURE_SUFFIXES:
            continue
        captioned.add(stem)
        try:
            name = next((stem + end for end in CAPTION_SUFFIXES if stem + end in files), None)
            if name is None:
                raise Rejected(f"no caption file {PurePosixPath(stem).name}.txt beside it")
            if files[name] > MAX_CAPTION_BYTES:
                raise Rejected(
                    f"the caption file has {files[name]} bytes; at most {MAX_CAPTION_BYTES} are read"
                )
            captions = captions_of_text((root / name).read_bytes())
            yield checked_row(key, captions, {}, str(root / key), n_bytes)
        except (Rejected, OSError) as error:
            yield BadSample(printable(key), str(error))
    for key in files:
        stem, suffix = os.path.splitext(key)
        if (
            suffix in CAPTION_SUFFIXES
            and stem not in captioned
            and PurePosixPath(stem).name.lower() not in DOCUMENTS
        ):
            yield BadSample(printable(key), "missing image file beside this caption")


# --- metadata.jsonl, .csv, .tsv, .parquet ---


def read_metadata(root: Path, table: Path) -> Rows:
    """Rows of a table: file_name (relative to the table), a caption column, perhaps split, other fields.

    Rows with the same file_name are one picture with the captions of all of them, in order.
    """
    label = table.relative_to(root).as_posix()
    above = PurePosixPath(label).parent
    rows: dict[str, Row] = {}
    for line, record in _table_records(table, label):
        place = f"{label}:{line}"
        if isinstance(record, BadSample):
            yield record
            continue
        try:
            name = record.pop("file_name", None)
            if not isinstance(name, str) or not name:
                raise Rejected("no file_name")
            place = (above / name).as_posix()
            if is_unsafe(name):
                raise Rejected(
                    f"unsafe path {printable(name)!r}: it has to lie below the folder of {table.name}"
                )
            column = caption_column(record)
            if column is None:
                raise Rejected(f"no caption column; looked for {', '.join(CAPTION_COLUMNS)}")
            captions = record.pop(column)
            path = str(table.parent / name)
            row = checked_row(place, captions, record, path, _file_size(path))
            rows[place] = _merged(rows[place], row) if place in rows else row
        except Rejected as error:
            yield BadSample(printable(place), str(error))
    yield from rows.values()


def _merged(first: Row, row: Row) -> Row:
    """The first row of a picture with the captions of a later one added."""
    if first.split is not None and row.split is not None and first.split != row.split:
        raise Rejected(
            f"another row of this picture is in split {first.split!r}, this one in {row.split!r}: choose one"
        )
    return first._replace(captions=first.captions + row.captions, split=first.split or row.split)


def _table_records(table: Path, label: str) -> Iterator[tuple[int, dict[str, Any] | BadSample]]:
    """The line number and the cells of each row."""
    suffix = table.suffix.lower()
    if suffix == ".parquet":
        for number, cells in enumerate(_parquet_records(table), start=1):
            yield number, BadSample(f"{label}:{number}", NOT_UTF8) if cells is None else cells
        return
    # bytes that are no UTF-8 become lone surrogates, which the checks find row by row
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        if suffix == ".jsonl":
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, json_object(line) or BadSample(f"{label}:{number}", "not a JSON object")
            return
        # strict: a quote that is never closed would silently make one caption of the rest of the table
        rows = csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
        try:
            _require_columns(table, rows.fieldnames or ())
            for cells in rows:
                number = rows.line_num
                if None in cells:  # an unquoted comma would silently cut the caption
                    yield (
                        number,
                        BadSample(f"{label}:{number}", "more cells than columns: quote captions with commas"),
                    )
                    continue
                record: dict[str, Any] = dict(cells)
                for column in LIST_COLUMNS:
                    if (cells.get(column) or "").startswith("["):
                        record[column] = _json_list(cells[column])
                yield number, record
        except csv.Error as error:
            raise ValueError(
                f"{table} cannot be read as a table: after line {rows.line_num}: {error}"
            ) from None


def open_parquet(table: Path) -> Any:
    """The pyarrow.parquet.ParquetFile of a table; Rejected when it cannot be read."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise Rejected("needs pyarrow to be read: pip install pyarrow") from None
    try:
        return parquet.ParquetFile(table)
    except (OSError, ValueError) as error:  # pyarrow's own errors among them
        raise Rejected(f"cannot be read as parquet: {error}") from None


def _parquet_records(table: Path) -> Iterator[dict[str, Any] | None]:
    try:
        with open_parquet(table) as file:
            _require_columns(table, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=4096):
                yield from parquet_rows(batch)
    except Rejected as error:
        raise ValueError(f"{table} {error}") from None
    except OSError as error:
        raise ValueError(f"{table} cannot be read as parquet: {error}") from None


def parquet_rows(cells: Any) -> Iterator[dict[str, Any] | None]:
    """The cells of each row of a pyarrow table or batch; None for a row with text that is not UTF-8."""
    try:
        yield from cells.to_pylist()
    except UnicodeDecodeError:  # raised before the first row
        for row in range(cells.num_rows):
            try:
                yield cells.slice(row, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None


def _require_columns(table: Path, columns: Sequence[str]) -> None:
    if "file_name" not in columns or caption_column(columns) is None:
        raise ValueError(
            f"no captions found: {table} has columns {', '.join(columns) or 'none'}; "
            f"it needs file_name and one of {', '.join(CAPTION_COLUMNS)}"
        )


def json_object(text: str | bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _json_list(text: str) -> list[Any] | str:
    """The list that a cell holds, or the cell itself as one caption."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, list) else text


# --- COCO captions ---


def coco_tree(source: Path) -> dict[str, Any] | None:
    """The JSON of a file when it has the shape of COCO captions: images[] and annotations[] with captions."""
    tree = json_object(source.read_bytes())
    if tree is None or not isinstance(tree.get("images"), list):
        return None
    annotations = tree.get("annotations")
    is_captions = isinstance(annotations, list) and any(
        isinstance(a, dict) and "caption" in a for a in annotations
    )
    return tree if is_captions else None


def read_coco(root: Path, source: Path, tree: Mapping[str, Any]) -> Rows:
    """Images of one COCO captions file with all their captions.

    Pictures lie beside the file or in a folder named like its split: captions_val2017.json -> val2017/; for a
    file in annotations/ the same places are looked at beside that folder.
    """
    captions: dict[object, list[object]] = {}
    for annotation in tree["annotations"]:
        if isinstance(annotation, dict) and isinstance(annotation.get("image_id"), int | str):
            captions.setdefault(annotation["image_id"], []).append(annotation.get("caption"))
        else:
            yield BadSample(source.name, "an annotation without image_id")
    split_name = source.stem.removeprefix("captions_")
    homes = [source.parent / split_name, source.parent]
    if source.parent.name == "annotations" and source.parent != root:
        homes += [source.parent.parent / split_name, source.parent.parent]
    listed: set[object] = set()
    for image in tree["images"]:
        record = dict(image) if isinstance(image, dict) else {}
        name, number = record.pop("file_name", None), record.pop("id", None)
        key = name if isinstance(name, str) else f"{source.name}: image {number}"
        try:
            if not isinstance(name, str) or not isinstance(number, int | str):
                raise Rejected("an image without file_name and id")
            listed.add(number)
            if is_unsafe(name):
                raise Rejected(f"unsafe path {printable(name)!r}")
            path = next((home / name for home in homes if _file_size(str(home / name)) is not None), None)
            if path is None:
                raise Rejected("missing image file")
            key = path.relative_to(root).as_posix()
            if number not in captions:
                raise Rejected("no caption among the annotations")
            yield checked_row(key, captions[number], record, str(path), _file_size(str(path)))
        except Rejected as error:
            yield BadSample(printable(key), str(error))
    for number in captions.keys() - listed:
        yield BadSample(
            printable(f"{source.name}: image {number}"), "captions of an image that is not listed"
        )
