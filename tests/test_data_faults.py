"""What went wrong on people's data in other projects, taken from public bug reports: each is read right, or said."""

import csv
import io
import json
import tarfile
import unicodedata
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image, ImageCms, PngImagePlugin

from dalle import images, picture_files
from dalle.data.inspect import inspect
from dalle.data.pairs import PairSet, read_pairs
from dalle.data.samples import ReadOptions


def paint(path: Path, number: int = 0, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), (number * 9 % 256, 80, 90)).save(path, **options)  # type: ignore[arg-type]


def write_pairs(folder: Path, n: int, start: int = 0) -> None:
    for number in range(start, start + n):
        paint(folder / f"{number}.png", number)
        (folder / f"{number}.txt").write_text(f"thing {number}")


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def jpeg(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 40), (number * 9 % 256, 0, 0)).save(stream, "JPEG")
    return stream.getvalue()


def open_all(pairs: PairSet) -> int:
    return sum(pair.open().size == (40, 40) for pair in pairs)


def test_folders_named_like_splits_are_splits(tmp_path: Path) -> None:
    for split, first, last in (("train", 0, 12), ("validation", 12, 16), ("test", 16, 20)):
        write_pairs(tmp_path / split, last - first, first)
    pairs = read_pairs(tmp_path)
    assert pairs.counts == {"test": 4, "train": 12, "validation": 4}
    assert {pair.captions[0] for pair in pairs.of_split("test")} == {f"thing {i}" for i in range(16, 20)}


@pytest.mark.parametrize("pictures", ["{}2017", "images/{}2017", "{}", "images"])
def test_the_two_files_of_coco_are_splits_wherever_the_pictures_lie(pictures: str, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    for split, first, last in (("train", 0, 9), ("val", 9, 12)):
        for number in range(first, last):
            paint(tmp_path / pictures.format(split) / f"{number}.jpg", number)
        tree = {
            "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(first, last)],
            "annotations": [{"image_id": i, "caption": f"thing {i}"} for i in range(first, last)],
        }
        (tmp_path / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(tree))
    pairs = read_pairs(tmp_path)
    assert pairs.counts == {"train": 9, "validation": 3}
    assert {pair.sample for pair in pairs.of_split("validation")} == {"9", "10", "11"}


def test_karpathys_splits_are_read(tmp_path: Path) -> None:
    splits = ["train", "restval", "val", "test"]
    rows = [
        {
            "filepath": "val2014",
            "filename": f"{i}.jpg",
            "split": split,
            "sentences": [{"raw": f"thing {i}"}, {"raw": "x"}],
        }
        for i, split in enumerate(splits)
    ]
    for number in range(4):
        paint(tmp_path / "val2014" / f"{number}.jpg", number)
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": rows, "dataset": "coco"}))
    pairs = read_pairs(tmp_path)
    assert [pair.split for pair in pairs] == ["train", "train", "validation", "test"]
    assert pairs[2].captions == ("thing 2", "x") and pairs.bad == []


def test_a_stray_table_hides_no_folder_of_pairs(tmp_path: Path) -> None:
    write_pairs(tmp_path, 200)
    paint(tmp_path / "old" / "x.jpg")
    (tmp_path / "old" / "metadata.csv").write_text("file_name,text\nx.jpg,one old thing\n")
    pairs = read_pairs(tmp_path)
    assert len(pairs) == 201 and pairs.bad == []


def test_names_with_dots_in_a_shard_are_samples_of_their_own(tmp_path: Path) -> None:
    names = [f"{i:05d}" for i in range(150)] + [f"v1.{i:02d}" for i in range(50)]
    members = [
        (n + end, data) for i, n in enumerate(names) for end, data in ((".jpg", jpeg(i)), (".txt", b"thing"))
    ]
    write_tar(tmp_path / "a.tar", members)
    pairs = read_pairs(tmp_path)
    assert len(pairs) == 200 and pairs.bad == []


@pytest.mark.parametrize(
    "written", ["['a cat', 'one cat']", "['a cat' 'one cat']", '["a cat", "one cat", null]']
)
def test_lists_in_the_cells_of_a_csv_are_lists(written: str, tmp_path: Path) -> None:
    for number in range(12):
        paint(tmp_path / f"{number}.jpg", number)
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "captions"], *([f"{i}.jpg", written] for i in range(12))])
    pairs = read_pairs(tmp_path)
    assert [pair.captions for pair in pairs] == [("a cat", "one cat")] * 12


def test_a_cell_that_is_no_list_is_rejected_among_lists_and_a_caption_elsewhere(tmp_path: Path) -> None:
    for number in range(2):
        paint(tmp_path / f"{number}.jpg", number)
    (tmp_path / "metadata.csv").write_text("file_name,captions\n0.jpg,[3 cats]\n1.jpg,a dog\n")
    assert [bad.reason for bad in read_pairs(tmp_path).bad] == ["the cell '[3 cats]' is no list of texts"]
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.jpg,[untitled]\n1.jpg,a dog\n")
    assert [pair.captions for pair in read_pairs(tmp_path)] == [("[untitled]",), ("a dog",)]


def test_a_null_among_captions_is_left_out(tmp_path: Path) -> None:
    for number in range(12):
        paint(tmp_path / f"{number}.jpg", number)
    rows = [
        {"file_name": f"{i}.jpg", "captions": ["a cat", None] if i == 0 else ["a cat"]} for i in range(12)
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [pair.captions for pair in read_pairs(tmp_path)] == [("a cat",)] * 12


def test_a_png_with_megabytes_of_text_is_read(tmp_path: Path) -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * 3_000_000, zip=True)
    write_pairs(tmp_path, 20)
    paint(tmp_path / "comfy.png", 1, pnginfo=texts)
    (tmp_path / "comfy.txt").write_text("x")
    pairs = read_pairs(tmp_path)
    assert len(pairs) == 21 == open_all(pairs)


def test_a_long_icc_profile_is_read_and_its_colours_are_kept(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    long = profile + bytes(3_000_000)
    paint(tmp_path / "a.png", 3, icc_profile=long)
    assert images.open_image(tmp_path / "a.png").getpixel((0, 0)) == (27, 80, 90)
    damaged = (tmp_path / "a.png").read_bytes().replace(zlib.compress(long)[:40], bytes(40))
    assert images.open_image(damaged, formats=("PNG",)).size == (40, 40)


def test_a_picture_in_another_colour_space_becomes_srgb() -> None:
    """Lab pictures are told by their mode; here red and green of an RGB profile are swapped."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 40, 10)).save(stream, "PNG", icc_profile=bytes(profile))
    seen = images.open_image(stream.getvalue()).getpixel((0, 0))
    assert isinstance(seen, tuple) and max(abs(a - b) for a, b in zip(seen, (40, 200, 10), strict=True)) <= 6
    plain = io.BytesIO()
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGBA", (4, 4), (200, 40, 10, 255)).save(plain, "PNG", icc_profile=own)
    assert images.open_image(plain.getvalue()).getpixel((0, 0)) == (200, 40, 10), "not one step off"


def test_suffixes_in_upper_case_are_read(tmp_path: Path) -> None:
    for number in range(12):
        paint(tmp_path / f"IMG_{number}.JPG", number)
        (tmp_path / f"IMG_{number}.TXT").write_text("thing")
    pairs = read_pairs(tmp_path)
    assert len(pairs) == 12 and pairs.bad == []


def test_a_cell_of_more_than_128_kb_is_read(tmp_path: Path) -> None:
    for number in range(12):
        paint(tmp_path / f"{number}.jpg", number)
    rows = [f'{i}.jpg,thing,"{"1 " * (70_000 if i == 3 else 1)}"' for i in range(12)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text,boxes", *rows]) + "\n")
    assert len(read_pairs(tmp_path)) == 12
    assert csv.field_size_limit() == 131072, "the module's own limit is put back"


def test_tiff_and_avif_are_read_and_what_is_not_is_counted_with_its_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture_files, "reads_heif", lambda: False)
    write_pairs(tmp_path, 20)
    for name in ("scan.tiff", "new.avif", "photo.jfif"):
        paint(tmp_path / name, format="JPEG" if name.endswith("jfif") else None)
        (tmp_path / name).with_suffix(".txt").write_text("a scan")
    (tmp_path / "IMG_1.HEIC").write_bytes(b"x" * 99)
    (tmp_path / "logo.svg").write_text("<svg/>")
    (tmp_path / "logo.txt").write_text("a logo")
    pairs = read_pairs(tmp_path)
    assert len(pairs) == 23 == open_all(pairs)
    reasons = {bad.key: bad.reason for bad in pairs.bad}
    assert reasons["IMG_1.HEIC"].startswith("format .heic needs a library: pip install 'dalle[heic]'")
    assert (
        reasons == reasons | {"logo.svg": "format .svg is not read: convert it to PNG or JPEG"}
        and len(reasons) == 2
    )
    assert any("format .heic" in problem for problem in inspect(pairs).problems)


def test_heic_is_read_with_its_library(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    assert picture_files.reads_heif()
    paint(tmp_path / "IMG_1.heic", format="HEIF", quality=100)
    (tmp_path / "IMG_1.txt").write_text("a photograph")
    (pair,) = read_pairs(tmp_path)
    assert pair.open().size == (40, 40)


@pytest.mark.parametrize("layout", ["table", "folder"])
def test_names_in_decomposed_form_are_found(layout: str, tmp_path: Path) -> None:
    for number in range(12):
        paint(tmp_path / unicodedata.normalize("NFD", f"café{number}.jpg"), number)
        if layout == "folder":
            (tmp_path / f"café{number}.txt").write_text("x")
    if layout == "table":
        rows = [json.dumps({"file_name": f"café{i}.jpg", "text": "x"}, ensure_ascii=False) for i in range(12)]
        (tmp_path / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    pairs = read_pairs(tmp_path)
    assert len(pairs) == 12 == open_all(pairs) and pairs.bad == []
    assert pairs[0].key == "café0.jpg", "composed, as in every other layout"


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    "columns", ["image,caption", "filepath,title", "Image,Description", "img_path,prompt"]
)
def test_tables_of_spreadsheets_and_the_usual_column_names_are_read(
    delimiter: str, encoding: str, columns: str, tmp_path: Path
) -> None:
    for number in range(4):
        paint(tmp_path / f"{number}.jpg", number)
    rows = [columns.split(","), *([f"{i}.jpg", f"größe {i}, groß"] for i in range(4))]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows(rows)
    (tmp_path / "labels.csv").write_text(text.getvalue(), encoding=encoding, newline="")
    pairs = read_pairs(tmp_path)
    assert [pair.captions for pair in pairs] == [(f"größe {i}, groß",) for i in range(4)]
    assert len(read_pairs(tmp_path / "labels.csv")) == 4


def test_columns_can_be_named(tmp_path: Path) -> None:
    paint(tmp_path / "a.jpg")
    (tmp_path / "metadata.csv").write_text("pic,words,text,file_name\na.jpg,chosen,other,gone.jpg\n")
    (pair,) = read_pairs(tmp_path, ReadOptions(image_column="pic", caption_column="words"))
    assert pair.captions == ("chosen",) and pair.fields == {"text": "other", "file_name": "gone.jpg"}
    with pytest.raises(ValueError, match=r"it needs pix .*--image-column"):
        read_pairs(tmp_path, ReadOptions(image_column="pix"))


@pytest.mark.parametrize(
    ("source", "path", "caption"),
    [
        ("folder", "10_red-apple/IMG_0001.png", "red apple"),
        ("folder", "green frog/a.png", "green frog"),
        ("name", "x/blue_car_003.png", "blue car"),
        ("name", "x/redApple (2).png", "red Apple"),
        ("name", "x/key.png", "key"),
    ],
)
def test_captions_come_from_folder_and_file_names(
    source: str, path: str, caption: str, tmp_path: Path
) -> None:
    paint(tmp_path / path)
    paint(tmp_path / "told" / "b.png")
    (tmp_path / "told" / "b.txt").write_text("its own caption")
    options = ReadOptions(captions_from=source)  # type: ignore[arg-type]
    captions = {pair.key: pair.captions[0] for pair in read_pairs(tmp_path, options)}
    assert captions == {path: caption, "told/b.png": "its own caption"}


def test_a_name_of_digits_captions_nothing(tmp_path: Path) -> None:
    write_pairs(tmp_path, 1)
    paint(tmp_path / "x" / "0007.png")
    bad = read_pairs(tmp_path, ReadOptions(captions_from="name")).bad
    assert [(b.key, b.reason) for b in bad] == [("x/0007.png", "no caption: the name '0007' says nothing")]


def test_pictures_of_tables_are_found_in_images_beside_them_and_addresses_are_no_pictures(
    tmp_path: Path,
) -> None:
    paint(tmp_path / "images" / "sub" / "a.jpg")
    rows = ["file_name,text", "sub\\a.jpg,a thing", "https://example.org/b.jpg,far away"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    pairs = read_pairs(tmp_path)
    assert [pair.key for pair in pairs] == ["images/sub/a.jpg"]
    assert "download the pictures first" in pairs.bad[0].reason


def test_a_table_of_its_own_name_without_pictures_is_no_data(tmp_path: Path) -> None:
    write_pairs(tmp_path, 3)
    (tmp_path / "results.csv").write_text("image,prompt\ngone.png,a prompt\n")
    pairs = read_pairs(tmp_path)
    assert len(pairs) == 3 and pairs.bad == []


def test_pictures_beside_a_table_that_lists_others_are_noted(tmp_path: Path) -> None:
    for number in range(3):
        paint(tmp_path / f"{number}.png", number)
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a thing\n")
    pairs = read_pairs(tmp_path)
    assert len(pairs) == 1 and pairs.bad == []
    assert pairs.notes == ("2 pictures are in no table and have no caption file: not read",)


def test_a_parquet_table_of_names_need_not_be_called_metadata(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    paint(tmp_path / "a.jpg")
    table = pyarrow.table({"image": ["a.jpg"], "caption": ["a thing"]})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "labels.parquet")
    (pair,) = read_pairs(tmp_path)
    assert (pair.key, pair.captions) == ("a.jpg", ("a thing",))


def test_archives_and_the_programs_own_draws_are_noted_and_not_read(tmp_path: Path) -> None:
    write_pairs(tmp_path, 3)
    (tmp_path / "pictures.zip").write_bytes(b"PK")
    images.save_png(
        Image.new("RGB", (8, 8)), tmp_path / "out" / "000_7.png", {"caption": "a draw", "seed": 7}
    )
    images.save_png(Image.new("RGB", (8, 8)), tmp_path / "out" / "grid.png", None)
    pairs = read_pairs(tmp_path)
    assert len(pairs) == 3 and pairs.bad == []
    assert pairs.notes == (
        "pictures.zip is an archive: not read; unpack it if it holds pictures",
        "2 pictures were written by dalle and have no caption file: not read",
    )
    (tmp_path / "out" / "000_7.txt").write_text("a draw that is to be learned")
    assert len(read_pairs(tmp_path)) == 4
