"""Parquet tables with embedded pictures: splits, keys, lazy reading, damage."""

import io
import os
import pickle
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from dalle.data import row_groups
from dalle.data.inspect import inspect
from dalle.data.pair import BadSample, Pair
from dalle.data.pairs import read_pairs
from dalle.data.splits import names_of_homes

pyarrow = pytest.importorskip("pyarrow")
arrow_parquet = pytest.importorskip("pyarrow.parquet")

IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def picture(shade: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (6, 4), (shade, shade, shade)).save(data, "PNG")
    return data.getvalue()


def embedded(n: int, start: int = 0) -> list[dict[str, object]]:
    return [{"bytes": picture(start + i), "path": f"{start + i}.png"} for i in range(n)]


def write_table(path: Path, pictures: Sequence[object], row_group_size: int = 2, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"image": pyarrow.array(pictures, IMAGE), **columns})
    arrow_parquet.write_table(table, path, row_group_size=row_group_size)
    return path


def shades(pairs: Sequence[object]) -> list[int]:
    return [pair.open().getpixel((0, 0))[0] for pair in pairs]  # type: ignore[attr-defined]


def test_tables_of_the_hub_give_pairs_in_the_order_of_the_file(tmp_path: Path) -> None:
    texts = [f"picture {i}" for i in range(12)]
    write_table(tmp_path / "data" / "train-00000-of-00001.parquet", embedded(12), text=texts, label=range(12))
    write_table(
        tmp_path / "data" / "test-00000-of-00001.parquet", embedded(1, 50), text=["held out"], label=[9]
    )
    pairs = read_pairs(tmp_path)
    assert pairs.counts == {"test": 1, "train": 12}
    train = pairs.of_split("train")
    assert train[0].key == "data/train-00000-of-00001.parquet/00/0.png"
    assert [pair.captions[0] for pair in train] == texts
    assert shades(train) == list(range(12))
    assert train[3].fields == {"label": 3}
    assert train[3].cell == (1, 1)
    assert len(pickle.dumps(train[3])) < 1000
    assert shades([pickle.loads(pickle.dumps(train[3]))]) == [3]
    assert pairs.bad == []


@pytest.mark.parametrize("column", ["captions", "text", "caption", "prompt", "sentences_raw"])
@pytest.mark.parametrize("is_list", [False, True])
def test_captions_are_texts_or_lists_of_texts(tmp_path: Path, column: str, is_list: bool) -> None:
    captions = [["one", "uno"], ["two"]] if is_list else ["one", "two"]
    table = write_table(tmp_path / "0000.parquet", embedded(2), **{column: captions})
    expected = [("one", "uno"), ("two",)] if is_list else [("one",), ("two",)]
    assert [pair.captions for pair in read_pairs(tmp_path)] == expected
    assert read_pairs(table).fingerprint == read_pairs(tmp_path).fingerprint


def test_other_columns_are_fields_unless_they_hold_bytes(tmp_path: Path) -> None:
    other = pyarrow.array(embedded(2, 70), IMAGE)
    raw = pyarrow.array([b"text", b"as bytes"], pyarrow.binary())
    tags = [["x"], ["y", "z"]]
    table = pyarrow.table(
        {"mask": other, "image": pyarrow.array(embedded(2), IMAGE), "captions": raw, "several": [[b"1"], []]}
        | {"text": ["a", "b"], "caption": ["c", "d"], "tags": tags}
    )
    arrow_parquet.write_table(table, tmp_path / "all.parquet")
    pairs = read_pairs(tmp_path)
    assert [pair.fields for pair in pairs] == [
        {"caption": "c", "tags": ["x"]},
        {"caption": "d", "tags": ["y", "z"]},
    ]
    assert [pair.captions for pair in pairs] == [("a",), ("b",)]
    assert shades(pairs) == [0, 1]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], [None, None]),
        (
            ["data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"],
            ["train", "validation"],
        ),
        (["train.parquet", "dev.parquet", "TEST-00000-of-00009.parquet"], ["train", "validation", "test"]),
        (["default/train/0000.parquet", "default/val/0000.parquet"], ["train", "validation"]),
        (["test_small.parquet"], ["test"]),
        (["train-00000-of-00001.parquet", "testA-00000-of-00001.parquet"], ["train", "testA"]),
        (["data-00000-of-00002.parquet", "trainer.parquet"], [None, None]),
    ],
)
def test_splits_are_those_of_the_names_unless_train_is_the_only_one(
    names: list[str], splits: list[str | None]
) -> None:
    homes = [Pair(f"{name}/0", ("a caption",), "", home=name) for name in names]
    assert list(names_of_homes(homes).values()) == splits


def test_an_undivided_set_gets_a_validation_split_of_its_own(tmp_path: Path) -> None:
    write_table(tmp_path / "data" / "train-00000-of-00001.parquet", embedded(20), text=["x"] * 20)
    assert read_pairs(tmp_path).counts == {"train": 15, "validation": 5}


def test_a_split_column_goes_before_the_name(tmp_path: Path) -> None:
    write_table(tmp_path / "test.parquet", embedded(3), text=["x"] * 3, split=["train", None, "extra"])
    assert [pair.split for pair in read_pairs(tmp_path)] == ["train", "test", "extra"]


def test_bad_rows_are_listed(tmp_path: Path) -> None:
    pictures = [*embedded(2), None, {"bytes": None, "path": "far.png"}, {"bytes": b"", "path": None}]
    pictures += [
        {"bytes": picture(5), "path": path} for path in ("../up.png", "/home/me/5.png", "5.png", None)
    ]
    texts = pyarrow.array([b"a", b"", *[b"a"] * 5, b"caf\xe9", b"a"], pyarrow.binary()).view(pyarrow.string())
    write_table(tmp_path / "t.parquet", pictures, text=texts)
    pairs = read_pairs(tmp_path)
    assert [pair.key for pair in pairs] == [f"t.parquet/{key}" for key in ("0/0.png", "5", "6", "8")]
    assert {sample.key: sample.reason.split(";")[0] for sample in pairs.bad} == {
        "t.parquet/1/1.png": "empty caption",
        "t.parquet/2": "the row holds no picture",
        "t.parquet/3/far.png": "the row holds no picture",
        "t.parquet/4": "the image file has 0 bytes",
        "t.parquet/7": "the row holds text that is not valid UTF-8",
    }


def test_no_caption_column_is_an_error_that_lists_the_columns(tmp_path: Path) -> None:
    write_table(tmp_path / "train.parquet", embedded(1), label=[1])
    with pytest.raises(
        ValueError, match=r"no captions found: .* has columns image, label; .* one of captions, text"
    ):
        read_pairs(tmp_path)
    write_table(tmp_path / "test.parquet", embedded(1), text=["a"])
    pairs = read_pairs(tmp_path)
    assert len(pairs) == 1
    assert [sample.key for sample in pairs.bad] == ["train.parquet"]


def test_tables_without_pictures_leave_the_folder_to_the_other_layouts(tmp_path: Path) -> None:
    arrow_parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "statistics.parquet")
    with pytest.raises(
        ValueError, match=r"no captions found in .*\*\.parquet tables with the pictures in them"
    ):
        read_pairs(tmp_path)
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "a.txt").write_text("a caption")
    assert read_pairs(tmp_path).bad == []
    (tmp_path / "broken.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    pairs = read_pairs(tmp_path)
    assert [pair.key for pair in pairs] == ["a.png"]
    assert [sample.key for sample in pairs.bad] == ["broken.parquet"]
    assert pairs.bad[0].reason.startswith("cannot be read as parquet: ")


def test_a_damaged_row_group_is_as_many_bad_samples_as_it_has_rows(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.parquet", embedded(4), text=["a", "b", "c", "d"])
    file = arrow_parquet.ParquetFile(table)
    chunks = [file.metadata.row_group(1).column(i) for i in range(file.metadata.num_columns)]
    text = next(chunk for chunk in chunks if chunk.path_in_schema == "text")
    data = bytearray(table.read_bytes())
    data[text.dictionary_page_offset : text.dictionary_page_offset + text.total_compressed_size] = (
        b"\xff" * text.total_compressed_size
    )
    table.write_bytes(data)
    pairs = read_pairs(tmp_path)
    assert [pair.captions for pair in pairs] == [("a",), ("b",)]
    assert [sample.key for sample in pairs.bad] == ["t.parquet/2", "t.parquet/3"]
    assert pairs.bad[0].reason.startswith("its row group cannot be read: ")


def test_fingerprint_tells_pictures_of_other_sizes_apart(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.parquet", embedded(5), text=["x"] * 5)
    prints = [read_pairs(table).fingerprint]
    assert read_pairs(table).fingerprint == prints[0]
    pictures = embedded(5)
    pictures[3] = {"bytes": picture(3) + b"\0", "path": "3.png"}
    write_table(table, pictures, text=["x"] * 5)
    prints.append(read_pairs(table).fingerprint)
    write_table(table, [*pictures[:4], None], text=["x"] * 5)
    prints.append(read_pairs(table).fingerprint)
    assert len(set(prints)) == 3


def test_without_statistics_the_sizes_are_the_lengths(tmp_path: Path) -> None:
    table = pyarrow.table({"image": pyarrow.array([*embedded(2), None], IMAGE), "text": ["x"] * 3})
    arrow_parquet.write_table(table, tmp_path / "t.parquet", write_statistics=False)
    pairs = read_pairs(tmp_path)
    assert [pair.n_bytes for pair in pairs] == [len(picture(0)), len(picture(1))]
    assert [sample.key for sample in pairs.bad] == ["t.parquet/2"]


def test_a_row_group_is_read_once_by_threads_in_order_and_few_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    real = row_groups.read_pictures

    def counted(path: str, group: int, column: str | None) -> object:
        reads.append(group)
        return real(path, group, column)

    monkeypatch.setattr(row_groups, "read_pictures", counted)
    monkeypatch.setattr(row_groups, "_row_groups", row_groups.RowGroups())
    pairs = read_pairs(write_table(tmp_path / "t.parquet", embedded(40), row_group_size=10, text=["x"] * 40))
    together = threading.Barrier(4)

    def shade(index: int) -> int:
        together.wait()
        return shades([pairs[index]])[0]

    with ThreadPoolExecutor(4) as readers:
        assert list(readers.map(shade, range(40))) == list(range(40))
    assert sorted(reads) == [0, 1, 2, 3]
    assert shades([pairs[0]]) == [0] and len(reads) == 4  # all four are small enough to be kept
    monkeypatch.setattr(row_groups, "MAX_KEPT_BYTES", 0)
    shades(pairs[::10])
    assert len(row_groups._row_groups._kept) == row_groups.MIN_KEPT_GROUPS


def test_a_table_that_has_changed_is_read_anew_or_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.parquet", embedded(4), text=["x"] * 4)
    pairs = read_pairs(table)
    assert shades(pairs) == [0, 1, 2, 3]
    write_table(table, embedded(3, 100), text=["x"] * 3)
    os.utime(table, ns=(1, 1))
    assert shades(pairs[:3]) == [100, 101, 102]
    with pytest.raises(
        ValueError, match=r"^t\.parquet/3/3\.png: .* has changed: it has no picture in row 1 of"
    ):
        pairs[3].open()
    write_table(table, embedded(1), text=["x"])
    with pytest.raises(ValueError, match="has changed: it has no pictures in row group 1"):
        pairs[3].open()
    table.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"row group 0 of .* cannot be read"):
        pairs[0].open()
    table.unlink()
    with pytest.raises(ValueError, match=r"row group 0 of .* cannot be read"):
        pairs[0].open()


def test_a_corrupt_picture_is_found_on_opening(tmp_path: Path) -> None:
    write_table(tmp_path / "t.parquet", [{"bytes": b"no picture", "path": None}], text=["x"])
    with pytest.raises(ValueError, match=r"^t\.parquet/0: "):
        read_pairs(tmp_path)[0].open()


def test_inspection_describes_a_table_of_the_hub(tmp_path: Path) -> None:
    texts = [[f"picture {i}", "the same"] for i in range(8)]
    write_table(tmp_path / "data" / "train-00000-of-00001.parquet", embedded(8), captions=texts)
    write_table(
        tmp_path / "data" / "validation-00000-of-00001.parquet", [*embedded(1), None], captions=texts[:2]
    )
    found = inspect(read_pairs(tmp_path))
    assert found.splits == {"train": 8, "validation": 1}
    assert (found.n_captions, found.n_with_several_captions, found.n_opened) == (18, 9, 9)
    assert (found.width.min, found.height.max) == (6, 4)
    name = "data/validation-00000-of-00001.parquet/1"
    assert found.problems == (
        f"1 skipped: the row holds no picture; a path alone is not read (such as {name})",
    )
    assert list(read_pairs(tmp_path).bad) == [
        BadSample(name, "the row holds no picture; a path alone is not read")
    ]
