"""One set of pairs in every layout that is read, with flaws where a layout can hold them."""

import csv
import io
import json
import struct
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

N_PAIRS = 60


class Sample(NamedTuple):
    """What a layout is to hold; `caption` as bytes is written as it is."""

    name: str
    picture: bytes | None
    caption: str | bytes | None
    has_caption: bool = True
    has_picture: bool = True


def picture(number: int, shade: int = 0) -> bytes:
    """An 8 x 8 BMP, all of one size, unlike those of other numbers."""
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 4, shade, 255 - number * 4)).save(data, "BMP")
    return data.getvalue()


def good_samples() -> list[Sample]:
    return [Sample(f"p{i:02d}", picture(i), f"thing {i}") for i in range(N_PAIRS)]


def _oversized() -> bytes:
    bomb = bytearray(picture(0))
    bomb[18:26] = struct.pack("<ii", 9_000, 9_000)  # width and height of the header
    return bytes(bomb)


# Each flaw, one sample that has it, and how the reason begins or what it holds.
FLAWS: dict[str, tuple[Sample, str]] = {
    "missing picture": (Sample("f01", None, "a caption"), "missing image file"),
    "empty picture": (Sample("f02", b"", "a caption"), "the image file has 0 bytes"),
    "truncated picture": (Sample("f03", picture(3)[:100], "a caption"), "truncated or corrupt"),
    "oversized picture": (Sample("f04", _oversized(), "a caption"), "81000000 pixels"),
    "undecodable format": (
        Sample("f05", b"%PDF-1.7 no picture", "a caption"),
        "not a picture of a known kind",
    ),
    "empty caption": (Sample("f06", picture(6), " "), "empty caption"),
    "null caption": (Sample("f07", picture(7), None), "empty caption"),
    "caption not UTF-8": (Sample("f08", picture(8), b"caf\xe9"), "not valid UTF-8"),
    "unsafe path": (Sample("../f09", picture(9), "a caption"), "unsafe path"),
    "duplicate key": (Sample("p00", picture(60), "another caption"), "duplicate key"),
    "picture without caption": (Sample("f11", picture(11), None, has_caption=False), "no caption"),
    "caption without picture": (Sample("f12", None, "a caption", has_picture=False), ""),
}


class Layout(NamedTuple):
    """How a layout is written, and which flaws it cannot hold, with the reason."""

    write: Callable[[Path, Sequence[Sample]], None]
    cannot: dict[str, str]


def _bytes(caption: str | bytes | None) -> bytes:
    return caption if isinstance(caption, bytes) else (caption or "").encode()


def _files(folder: Path, samples: Sequence[Sample]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        if sample.picture is not None and not sample.name.startswith(".."):
            (folder / f"{sample.name}.bmp").write_bytes(sample.picture)


def _folder(folder: Path, samples: Sequence[Sample]) -> None:
    _files(folder, samples)
    for sample in samples:
        if sample.has_caption:
            (folder / f"{sample.name}.txt").write_bytes(_bytes(sample.caption))


def _json_bytes(tree: Any) -> bytes:
    """JSON in which a caption given as bytes stands as it is."""
    text = json.dumps(tree, default=lambda caption: caption.decode("latin-1"), ensure_ascii=False)
    return text.encode("latin-1")


def _record(sample: Sample) -> dict[str, Any]:
    name = {"file_name": f"{sample.name}.bmp"} if sample.has_picture else {}
    return name | ({"text": sample.caption} if sample.has_caption else {})


def _jsonl(folder: Path, samples: Sequence[Sample]) -> None:
    _files(folder, samples)
    (folder / "metadata.jsonl").write_bytes(b"\n".join(_json_bytes(_record(sample)) for sample in samples))


def _csv(folder: Path, samples: Sequence[Sample]) -> None:
    _files(folder, samples)
    rows = [[record.get("file_name", ""), record["text"]] for record in map(_record, samples)]
    text = io.StringIO(newline="")
    csv.writer(text).writerows(
        [["file_name", "text"], *([n, c.decode("latin-1") if isinstance(c, bytes) else c] for n, c in rows)]
    )
    (folder / "metadata.csv").write_bytes(text.getvalue().encode("latin-1"))


def _text_column(captions: Sequence[str | bytes | None]) -> Any:
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.array([c if c is None else _bytes(c) for c in captions], pyarrow.binary()).view(
        pyarrow.string()
    )


def _table(folder: Path, samples: Sequence[Sample]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    _files(folder, samples)
    names = [f"{sample.name}.bmp" if sample.has_picture else None for sample in samples]
    table = pyarrow.table({"file_name": names, "text": _text_column([sample.caption for sample in samples])})
    pytest.importorskip("pyarrow.parquet").write_table(table, folder / "metadata.parquet")


def _embedded(samples: Sequence[Sample]) -> Any:
    pyarrow = pytest.importorskip("pyarrow")
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    cells = [{"bytes": s.picture, "path": f"{s.name}.bmp"} if s.has_picture else None for s in samples]
    return pyarrow.table(
        {"image": pyarrow.array(cells, kind), "text": _text_column([s.caption for s in samples])}
    )


def _parquet(folder: Path, samples: Sequence[Sample]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(2):
        path = folder / f"part-{part:05d}.parquet"
        pytest.importorskip("pyarrow.parquet").write_table(
            _embedded(samples[part::2]), path, row_group_size=16
        )


def _arrow(folder: Path, samples: Sequence[Sample]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True, exist_ok=True)
    table = _embedded(samples)
    (folder / "state.json").write_text("{}")
    with pyarrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table, max_chunksize=16)


def _shards(folder: Path, samples: Sequence[Sample]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(2):
        own = [s for i, s in enumerate(samples) if part == (0 if s.name == "p00" else i % 2)]  # doubles meet
        with tarfile.open(folder / f"{part:05d}.tar", "w") as archive:
            for sample in own:
                parts = [(".bmp", sample.picture)] if sample.has_picture else []
                parts += [(".txt", _bytes(sample.caption))] if sample.has_caption else []
                for suffix, data in parts:
                    header = tarfile.TarInfo(sample.name + suffix)
                    header.size = len(data or b"")
                    archive.addfile(header, io.BytesIO(data or b""))


def _coco(folder: Path, samples: Sequence[Sample]) -> None:
    _files(folder / "images", samples)
    named = [(number, sample) for number, sample in enumerate(samples)]
    images = [{"id": number, "file_name": f"{s.name}.bmp"} for number, s in named if s.has_picture]
    captions = [{"image_id": number, "caption": s.caption} for number, s in named if s.has_caption]
    (folder / "annotations").mkdir()
    tree = {"images": images, "annotations": captions}
    (folder / "annotations" / "captions_all.json").write_bytes(_json_bytes(tree))


def _karpathy(folder: Path, samples: Sequence[Sample]) -> None:
    _files(folder / "images", samples)
    images = [
        {
            "filename": f"{s.name}.bmp" if s.has_picture else None,
            "sentences": [{"raw": s.caption}] * s.has_caption,
        }
        for s in samples
    ]
    (folder / "dataset_own.json").write_bytes(_json_bytes({"images": images}))


MERGED = "rows of one picture are captions of it"
NO_REFERENCE = "it names no files: a caption without its picture is all there is"
NO_PATH = "the name leads to no file"
NO_NULL = "a file or cell of text has no null"

LAYOUTS: dict[str, Layout] = {
    "folder": Layout(
        _folder,
        {"missing picture": NO_REFERENCE, "null caption": NO_NULL, "unsafe path": NO_PATH,
         "duplicate key": "a folder holds a name once"},
    ),
    "jsonl": Layout(_jsonl, {"duplicate key": MERGED}),
    "csv": Layout(
        _csv,
        {"null caption": NO_NULL, "duplicate key": MERGED, "picture without caption": "it is an empty caption"},
    ),
    "table": Layout(
        _table, {"duplicate key": MERGED, "picture without caption": "it is a null caption"}
    ),
    "parquet": Layout(
        _parquet,
        {"missing picture": NO_REFERENCE, "unsafe path": NO_PATH, "duplicate key": "a row's number is its key",
         "picture without caption": "it is a null caption"},
    ),
    "arrow": Layout(
        _arrow,
        {"missing picture": NO_REFERENCE, "unsafe path": NO_PATH, "duplicate key": "a row's number is its key",
         "picture without caption": "it is a null caption"},
    ),
    "tar": Layout(_shards, {"missing picture": NO_REFERENCE, "null caption": NO_NULL}),
    "coco": Layout(_coco, {}),
    "karpathy": Layout(_karpathy, {}),
}  # fmt: skip
