"""read_pairs: six layouts, one meaning; what is bad is listed, never dropped unseen."""

import hashlib
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
from PIL import Image

from dalle.data.pair import BadSample
from dalle.data.pairs import PairSet, read_pairs
from dalle.data.reading import BadSampleLog
from dalle.data.samples import CAPTION_COLUMNS

COLOURS = {"a": "red", "b": "green", "c": "blue"}
CAPTIONS = {name: (f"a {colour} picture", f"{colour} only") for name, colour in COLOURS.items()}


def picture(colour: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(data, "PNG")
    return data.getvalue()


def write_pictures(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in COLOURS.items():
        (folder / f"{name}.png").write_bytes(picture(colour))


def write_folder(folder: Path) -> Path:
    write_pictures(folder)
    for name, captions in CAPTIONS.items():
        (folder / f"{name}.txt").write_text("\n".join(captions) + "\n")
    return folder


def write_jsonl(folder: Path) -> Path:
    write_pictures(folder)
    rows = [{"file_name": f"{name}.png", "captions": list(captions)} for name, captions in CAPTIONS.items()]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_csv(folder: Path) -> Path:
    write_pictures(folder)
    rows = [f'{name}.png,"{json.dumps(c).replace(chr(34), chr(34) * 2)}"' for name, c in CAPTIONS.items()]
    (folder / "metadata.csv").write_text("\n".join(["file_name,captions", *rows]))
    return folder


def write_parquet(folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    write_pictures(folder)
    columns = {
        "file_name": [f"{name}.png" for name in CAPTIONS],
        "captions": [list(c) for c in CAPTIONS.values()],
    }
    parquet.write_table(pyarrow.table(columns), folder / "metadata.parquet")
    return folder


def write_picture_table(folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (folder / "data").mkdir(parents=True)
    columns = {
        "image": [{"bytes": picture(colour), "path": f"{name}.png"} for name, colour in COLOURS.items()],
        "captions": [list(c) for c in CAPTIONS.values()],
    }
    parquet.write_table(
        pyarrow.table(columns), folder / "data" / "train-00000-of-00001.parquet", row_group_size=2
    )
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def write_shards(folder: Path) -> Path:
    for name, captions in CAPTIONS.items():
        members = [(f"{name}.png", picture(COLOURS[name])), (f"{name}.txt", "\n".join(captions).encode())]
        write_tar(folder / f"0000{name}.tar", members)
    return folder


def write_coco(folder: Path) -> Path:
    write_pictures(folder / "val2017")
    images = [
        {"id": number, "file_name": f"{name}.png", "license": 4} for number, name in enumerate(CAPTIONS)
    ]
    captions = [(number, c) for number, name in enumerate(CAPTIONS) for c in CAPTIONS[name]]
    tree = {"images": images, "annotations": [{"image_id": number, "caption": c} for number, c in captions]}
    (folder / "annotations").mkdir()
    (folder / "annotations" / "captions_val2017.json").write_text(json.dumps(tree))
    (folder / "annotations" / "instances_val2017.json").write_text('{"images": [], "annotations": []}')
    return folder


WRITERS = [write_folder, write_jsonl, write_csv, write_parquet, write_shards, write_picture_table, write_coco]


@pytest.mark.parametrize("write", WRITERS)
def test_every_layout_gives_the_same_captions_and_pictures(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    pairs = read_pairs(write(tmp_path / "data"))
    assert [pair.captions for pair in pairs] == list(CAPTIONS.values())
    assert [pair.open().getpixel((0, 0)) for pair in pairs] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    assert [pair.key[-5:] for pair in pairs] == ["a.png", "b.png", "c.png"]
    assert pairs.bad == []
    assert pickle.loads(pickle.dumps(pairs[0])) == pairs[0]


def test_a_table_a_shard_and_a_coco_file_can_be_named_themselves(tmp_path: Path) -> None:
    assert len(read_pairs(write_jsonl(tmp_path / "jsonl") / "metadata.jsonl")) == 3
    assert [pair.key for pair in read_pairs(write_shards(tmp_path / "tar") / "0000a.tar")] == [
        "0000a.tar/a.png"
    ]
    coco = write_coco(tmp_path / "coco")
    by_file = read_pairs(coco / "annotations" / "captions_val2017.json")
    assert by_file.fingerprint == read_pairs(coco).fingerprint
    assert by_file[0].fields == {"license": 4}


def test_nested_folders_give_unique_keys(tmp_path: Path) -> None:
    write_folder(tmp_path / "one")
    write_folder(tmp_path / "two" / "deep")
    keys = [pair.key for pair in read_pairs(tmp_path)]
    assert keys == [f"{f}/{name}.png" for f in ("one", "two/deep") for name in CAPTIONS]


def test_a_folder_that_links_lead_to_as_well_is_read_once(tmp_path: Path) -> None:
    write_folder(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "up").symlink_to("..")
    assert [pair.key for pair in read_pairs(tmp_path)] == [f"link/{name}.png" for name in CAPTIONS]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "open")
    write_folder(tmp_path / "shut")
    scandir = os.scandir

    def refused(path: str) -> object:  # permissions do not bind the superuser
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError, match="shut"):
        read_pairs(tmp_path)


def test_metadata_keeps_splits_and_other_columns(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    (tmp_path / "metadata.csv").write_text(
        "file_name,text,split,style\na.png,one,train,flat\nb.png,two,test,3d\nc.png,three,dev,flat\n"
    )
    pairs = read_pairs(tmp_path)
    assert pairs.counts == {"test": 1, "train": 1, "validation": 1}
    assert pairs.of_split("test")[0].fields == {"style": "3d"}
    assert len(pairs.of_split("nothing")) == 0


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet])
def test_rows_of_a_table_with_the_same_file_name_are_one_picture(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    write(tmp_path)
    (table,) = tmp_path.glob("metadata.*")
    rows = [
        (f"{name}.png", caption, name)
        for number in (0, 1)
        for name, c in CAPTIONS.items()
        for caption in [c[number]]
    ]
    if write is write_jsonl:
        lines = [json.dumps({"file_name": f, "text": text, "style": style}) for f, text, style in rows]
        table.write_text("\n".join([*lines, '{"file_name": "./a.png", "text": "a third", "style": "other"}']))
    elif write is write_csv:
        table.write_text(
            "\n".join(map(",".join, [("file_name", "text", "style"), *rows, ("./a.png", "a third", "z")]))
        )
    else:
        pyarrow = pytest.importorskip("pyarrow")
        columns = zip(*rows, ("./a.png", "a third", "z"), strict=True)
        named = dict(zip(("file_name", "text", "style"), map(list, columns), strict=True))
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(named), table)
    pairs = read_pairs(tmp_path)
    assert [pair.captions for pair in pairs] == [(*CAPTIONS["a"], "a third"), CAPTIONS["b"], CAPTIONS["c"]]
    assert [pair.fields for pair in pairs] == [{"style": name} for name in CAPTIONS]
    assert pairs.bad == []


def test_a_picture_in_two_splits_keeps_the_first_and_lists_the_other_row(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    (tmp_path / "metadata.csv").write_text(
        "file_name,text,split\na.png,one,train\na.png,two,test\na.png,three,\nb.png,four,\nb.png,five,test\n"
    )
    pairs = read_pairs(tmp_path)
    assert [(pair.captions, pair.split) for pair in pairs] == [
        (("one", "three"), "train"),
        (("four", "five"), "test"),
    ]
    reason = "another row of this picture is in split 'train', this one in 'test': choose one"
    assert pairs.bad == [BadSample("a.png", reason)]


def test_of_several_caption_columns_the_first_in_the_documented_order_is_read(tmp_path: Path) -> None:
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "a.png").write_bytes(picture("red"))
    record = {column: f"from {column}" for column in reversed(CAPTION_COLUMNS)}
    for column in CAPTION_COLUMNS:
        (tmp_path / "table" / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", **record}))
        (pair,) = read_pairs(tmp_path / "table")
        (sample,) = read_pairs(
            write_tar(
                tmp_path / "tar" / "s.tar",
                [("a.png", picture("red")), ("a.json", json.dumps(record).encode())],
            )
        )
        assert pair.captions == sample.captions == (f"from {column}",)
        del record[column]
        assert pair.fields == sample.fields == record


def test_shard_json_gives_captions_splits_and_fields(tmp_path: Path) -> None:
    record = {"caption": "from json", "split": "test", "width": 4}
    members = [("x/1.png", picture("red")), ("x/1.json", json.dumps(record).encode())]
    members += [("x/2.png", picture("red")), ("x/2.caption", b"from caption"), ("x/2.pkl", b"never read")]
    pairs = read_pairs(write_tar(tmp_path / "s.tar", members))
    assert [(p.key, p.captions, dict(p.fields)) for p in pairs] == [
        ("s.tar/x/1.png", ("from json",), {"width": 4}),
        ("s.tar/x/2.png", ("from caption",), {}),
    ]
    assert pairs[0].split == "test"


@pytest.mark.parametrize("write", [write_jsonl, write_picture_table])
def test_hub_data_set_is_read_from_the_local_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Path]
) -> None:
    home = tmp_path / "datasets--someone--pictures"
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    plain = write(tmp_path / "plain")
    for file in [path for path in plain.rglob("*") if path.is_file()]:
        blob = home / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(plain)
        link.parent.mkdir(exist_ok=True)
        os.symlink(os.path.relpath(blob, link.parent), link)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    pairs = read_pairs("someone/pictures")
    assert pairs.fingerprint == read_pairs(plain).fingerprint
    assert pairs[0].open().size == (4, 4)
    with pytest.raises(ValueError, match="someone/nothing is no folder here, and as a data set of the Hub"):
        read_pairs("someone/nothing")


@pytest.mark.parametrize("source", ["nothing", "pipe:cat shard.tar"])
def test_a_missing_folder_and_a_pipe_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        read_pairs(source)


@pytest.mark.parametrize("source", ["ftp://example.org/shard.tar", "simplecache::s3://bucket/shard.tar"])
def test_an_address_of_another_kind_is_an_error_that_says_which_are_read(source: str) -> None:
    with pytest.raises(ValueError, match=r"is not read: use s3, gs, gcs, http, https"):
        read_pairs(source)


def test_pictures_without_any_caption_are_told_of_captions_from_names(tmp_path: Path) -> None:
    for name in ("a red ball.png", "a blue ball.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    with pytest.raises(
        ValueError, match=r"holds 2 pictures and no captions: .* --captions-from name or folder$"
    ):
        read_pairs(tmp_path)


@pytest.mark.parametrize("name", ["notes.md", "odd.csv", "odd.json"])
def test_no_captions_is_an_error_that_says_what_was_looked_for(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"{}" if name == "odd.json" else picture("red"))
    with pytest.raises(ValueError, match=r"no captions found in .*metadata\.jsonl.*\.tar.*COCO.*\.txt"):
        read_pairs(tmp_path)


def test_a_table_without_a_caption_column_is_an_error_that_lists_its_columns(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,3\n")
    with pytest.raises(ValueError, match=r"no captions found: .* has columns file_name, label; it needs"):
        read_pairs(tmp_path)


def test_two_tables_in_one_folder_are_an_error(tmp_path: Path) -> None:
    write_jsonl(tmp_path)
    write_csv(tmp_path)
    with pytest.raises(ValueError, match="holds 2 metadata tables; keep one"):
        read_pairs(tmp_path)


def test_bad_samples_of_a_folder_are_listed(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "README.txt").write_text("not a caption")
    (tmp_path / "orphan.txt").write_text("no picture")
    for name, caption in {"empty": b" \n", "latin": b"caf\xe9", "long": b"x" * 40_000}.items():
        (tmp_path / f"{name}.png").write_bytes(picture("red"))
        (tmp_path / f"{name}.txt").write_bytes(caption)
    (tmp_path / "lonely.png").write_bytes(picture("red"))
    (tmp_path / "zero.png").touch()
    (tmp_path / "zero.txt").write_text("nothing in it")
    pairs = read_pairs(tmp_path)
    assert len(pairs) == 3
    assert {sample.key: sample.reason.split(";")[0] for sample in pairs.bad} == {
        "empty.png": "empty caption",
        "latin.png": "the caption is not valid UTF-8",
        "long.png": "the caption has 40000 characters",
        "lonely.png": "no caption file lonely.txt beside it",
        "orphan.txt": "missing image file beside this caption",
        "zero.png": "the image file has 0 bytes",
    }


def test_bad_rows_of_a_table_are_listed(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data")
    (tmp_path / "out.png").write_bytes(picture("red"))
    lines = [
        b'{"file_name": "a.png", "text": "good"}',
        b'{"file_name": "./a.png", "text": "again"}',
        b'{"file_name": "../out.png", "text": "outside"}',
        b'{"file_name": "/etc/hostname", "text": "absolute"}',
        b'{"file_name": "gone.png", "text": "gone"}',
        b'{"file_name": "b.png", "text": "caf\xe9"}',
        b'{"file_name": "c.png", "text": "half a pair \\ud800"}',
        b'{"file_name": "b.png", "text": null}',
        b'{"file_name": "b.png", "label": 3}',
        b'{"text": "no file name"}',
        b"[1, 2",
    ]
    (tmp_path / "data" / "metadata.jsonl").write_bytes(b"\n".join(lines))
    pairs = read_pairs(tmp_path / "data")
    assert [pair.captions for pair in pairs] == [("good", "again")]
    assert sorted(sample.reason.split(";")[0].split(":")[0] for sample in pairs.bad) == sorted(
        [
            "unsafe path '../out.png'",
            "unsafe path '/etc/hostname'",
            "missing image file",
            "the caption is not valid UTF-8",
            "the caption is not valid UTF-8",
            "empty caption",
            "no caption column",
            "no file_name",
            "not a JSON object",
        ]
    )
    assert BadSample("metadata.jsonl:11", "not a JSON object") in pairs.bad


def test_an_unquoted_comma_in_a_csv_caption_is_a_bad_sample_and_not_a_short_caption(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"red, round"\nb.png,green, round\n')
    pairs = read_pairs(tmp_path)
    assert [pair.captions for pair in pairs] == [("red, round",)]
    assert pairs.bad == [BadSample("metadata.csv:3", "more cells than columns: quote captions with commas")]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_quote_that_is_never_closed_is_an_error_and_not_a_long_caption(tmp_path: Path, suffix: str) -> None:
    write_pictures(tmp_path)
    rows = [("file_name", "text"), ("a.png", '"an open quote'), ("b.png", "green"), ("c.png", "blue")]
    comma = "\t" if suffix == "tsv" else ","
    (tmp_path / f"metadata.{suffix}").write_text("".join(comma.join(row) + "\n" for row in rows))
    with pytest.raises(
        ValueError, match=r"metadata\.[ct]sv cannot be read as a table: after line 1: unexpected"
    ):
        read_pairs(tmp_path)


def test_a_row_of_a_parquet_table_that_is_not_utf8_is_a_bad_sample(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    write_pictures(tmp_path)
    texts = pyarrow.array([b"red", b"caf\xe9", b"blue"], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"file_name": [f"{name}.png" for name in CAPTIONS], "text": texts})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "metadata.parquet")
    pairs = read_pairs(tmp_path)
    assert [pair.captions for pair in pairs] == [("red",), ("blue",)]
    assert pairs.bad == [BadSample("metadata.parquet:2", "the row holds text that is not valid UTF-8")]


def test_no_captioned_sample_of_a_shard_is_dropped_unseen(tmp_path: Path) -> None:
    caption = b'{"caption": "a caption"}'
    members = [("good.png", picture("red")), ("good.seg.png", picture("red")), ("good.json", caption)]
    members += [("alone.json", caption), ("info.json", b"{}"), ("x.cls", b"3")]
    members += [("photo.1.png", picture("red")), ("photo.1.txt", b"a caption")]
    pairs = read_pairs(write_tar(tmp_path / "s.tar", members))
    assert [pair.key for pair in pairs] == ["s.tar/good.png", "s.tar/photo.1.png"]
    assert pairs.bad == [BadSample("s.tar/alone.json", "missing image file beside this caption")]


def test_unsafe_irregular_and_repeated_members_of_a_shard_are_listed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as archive:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
            header = tarfile.TarInfo(name)
            header.size, header.type, header.linkname = len(data), kind, "/etc/passwd"
            archive.addfile(header, io.BytesIO(data))

        add("folder", kind=tarfile.DIRTYPE)
        for name in ("good", "../up", "good"):
            add(f"{name}.png", picture("red"))
            add(f"{name}.txt", b"a caption")
        add("link.png", kind=tarfile.SYMTYPE)
        add("link.txt", b"a caption")
        add("alone.txt", b"a caption")
    pairs = read_pairs(tmp_path)
    assert [pair.key for pair in pairs] == ["s.tar/good.png"]
    assert pairs.bad == [
        BadSample("s.tar/../up.png", "unsafe path"),
        BadSample("s.tar/alone.txt", "missing image file beside this caption"),
        BadSample("s.tar/good.png", "duplicate key"),
        BadSample("s.tar/link.png", "not a regular file"),
    ]


@pytest.mark.parametrize("member", [".png", ".txt", ".json"])
@pytest.mark.parametrize("within", ["header", "data", "before header"])
def test_a_truncated_shard_keeps_the_whole_samples_before_the_cut(
    tmp_path: Path, member: str, within: str
) -> None:
    parts = [(".png", picture("red")), (".txt", b"a caption"), (".json", b'{"width": 4}')]
    whole = write_tar(tmp_path / "whole.tar", [(f"{n}{end}", data) for n in range(6) for end, data in parts])
    with tarfile.open(whole) as archive:
        offset = archive.getmember(f"3{member}").offset
    cut = offset + {"header": 100, "data": 515, "before header": 0}[within]
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:cut])
    pairs = read_pairs(tmp_path / "cut.tar")
    n_whole = 4 if member == ".json" and within != "data" else 3  # picture and caption are there
    assert [pair.key for pair in pairs] == [f"cut.tar/{n}.png" for n in range(n_whole)]
    assert [sample.key for sample in pairs.bad] == ["cut.tar"]
    assert "truncated or damaged" in pairs.bad[0].reason


def test_a_damaged_shard_among_whole_ones_is_one_bad_sample(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "0000d.tar").write_bytes(b"\x1f\x8b no tar at all")
    (tmp_path / "0000e.tar").touch()
    pairs = read_pairs(tmp_path)
    assert len(pairs) == 3
    assert [sample.key for sample in pairs.bad] == ["0000d.tar", "0000e.tar"]


def test_coco_lists_missing_pictures_and_what_has_no_counterpart(tmp_path: Path) -> None:
    write_coco(tmp_path)
    path = tmp_path / "annotations" / "captions_val2017.json"
    tree = json.loads(path.read_text())
    tree["images"].append({"id": 7, "file_name": "gone.png"})
    tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] != 0]
    tree["annotations"] += [{"caption": "of nothing"}, {"image_id": 9, "caption": "of an image left out"}]
    path.write_text(json.dumps(tree))
    assert read_pairs(tmp_path).bad == [
        BadSample("captions_val2017.json", "an annotation without image_id"),
        BadSample("captions_val2017.json: image 9", "captions of an image that is not listed"),
        BadSample("gone.png", "missing image file"),
        BadSample("val2017/a.png", "no caption among the annotations"),
    ]


@pytest.mark.parametrize(("n", "held_out"), [(3, 0), (4, 1), (20, 5), (100, 8), (1000, 20)])
def test_hash_holds_out_two_per_cent_but_eight_at_least_and_a_quarter_at_most(
    tmp_path: Path, n: int, held_out: int
) -> None:
    members = [(f"{i}{end}", data) for i in range(n) for end, data in ((".png", b"not read"), (".txt", b"x"))]
    pairs = read_pairs(write_tar(tmp_path / "s.tar", members))
    assert pairs.counts.get("validation", 0) == held_out
    assert sum(pairs.counts.values()) == n == len(pairs)
    again = read_pairs(write_tar(tmp_path / "other" / "s.tar", members[::-1]))
    assert again.of_split("validation").fingerprint == pairs.of_split("validation").fingerprint


def test_fingerprint_tells_captions_splits_and_sizes_apart(tmp_path: Path) -> None:
    write_folder(tmp_path)
    prints = [read_pairs(tmp_path).fingerprint]
    (tmp_path / "a.txt").write_text("another caption")
    prints.append(read_pairs(tmp_path).fingerprint)
    (tmp_path / "a.png").write_bytes(picture("red") + b"\0")
    prints.append(read_pairs(tmp_path).fingerprint)
    assert len(set(prints)) == 3
    assert read_pairs(tmp_path).fingerprint == prints[-1]


def test_a_corrupt_picture_is_found_on_opening(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "a.png").write_bytes(picture("red")[:40])
    pairs = read_pairs(tmp_path)
    with pytest.raises(ValueError, match=r"^a\.png: "):
        pairs[0].open()
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match=r"^b\.png: "):
        pairs[1].open()


def test_more_than_five_and_more_than_one_per_cent_of_bad_samples_is_an_error(tmp_path: Path) -> None:
    pairs = read_pairs(write_folder(tmp_path))
    bad = [BadSample(key, "empty caption") for key in "uvwxyz"]
    PairSet(pairs.pairs, bad[:5]).require_mostly_good()
    with pytest.raises(
        ValueError, match=r"6 of 9 samples are bad; at most max\(5, 1\.0%\).*u: empty caption; v: "
    ):
        PairSet(pairs.pairs, bad).require_mostly_good()
    PairSet(pairs.pairs * 300, bad).require_mostly_good()  # 6 of 906
    with pytest.raises(ValueError, match="1 of 4 samples are bad; at most none"):
        PairSet(pairs.pairs, bad[:1]).require_mostly_good(limit=0)
    PairSet(pairs.pairs, bad).require_mostly_good(limit=1)


def test_a_damaged_shard_is_refused_as_nobody_knows_what_it_held(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "0000d.tar").write_bytes(b"\x1f\x8b no tar at all")
    pairs = read_pairs(tmp_path)
    with pytest.raises(
        ValueError, match=r"1 shards or tables are damaged, .* pass --skip-bad\. First: 0000d\.tar"
    ):
        pairs.require_mostly_good()
    pairs.require_mostly_good(limit=1)


def test_bad_sample_log_counts_keys_once_and_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "run" / "bad_samples.jsonl"
    log = BadSampleLog(path, total=600)
    log.add("a", "truncated")
    log.add("a", "truncated")
    log.add_all([BadSample(key, "truncated") for key in "bcdef"])
    with path.open("a") as file:
        file.write('{"key": "torn')  # killed while writing
    log = BadSampleLog(path, total=600)
    assert len(log) == 6 and "b" in log
    with pytest.raises(
        ValueError, match=r"7 of 600 samples are bad; at most max\(5, 1\.0%\).*bad_samples\.jsonl"
    ):
        log.add("g", "no PNG")
    assert json.loads(path.read_text().splitlines()[-1]) == {"key": "g", "reason": "no PNG"}
    assert len(BadSampleLog(path, total=600)) == 7
