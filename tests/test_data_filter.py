"""`dalle data filter`: planted faults are found, everything else is kept, and what it writes is a data set."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance
from typer.testing import CliRunner

from dalle.cli import app
from dalle.config import validate
from dalle.data.duplicates import HASH_SIMILARITY, Known, hashes
from dalle.data.filters import FilterSettings, caption_problem, filter_pairs, is_boilerplate
from dalle.data.language import language_of
from dalle.data.pairs import PairSet, read_pairs
from dalle.data.shapes import write_shapes
from dalle.generation.rerank import Ranker
from tests.tiny import tiny_clip, tiny_tokenizer

SETTINGS = FilterSettings()


def scene(seed: int, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """A picture unlike those of other seeds: some coloured ellipses and boxes over a gradient."""
    rng = np.random.default_rng(seed)
    across = np.linspace(0, 1, size[0])[None, :, None] * rng.integers(0, 200, 3)
    down = np.linspace(0, 1, size[1])[:, None, None] * rng.integers(0, 55, 3)
    picture = Image.fromarray((across + down).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for number in range(6):
        x, y = rng.integers(0, size[0] - 20), rng.integers(0, size[1] - 20)
        box = [int(x), int(y), int(x + rng.integers(15, 60)), int(y + rng.integers(15, 60))]
        colour = tuple(int(c) for c in rng.integers(0, 255, 3))
        (draw.ellipse if number % 2 else draw.rectangle)(box, fill=colour)
    return picture


def as_jpeg(picture: Image.Image, quality: int = 60) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality)
    return Image.open(io.BytesIO(stream.getvalue())).convert("RGB")


def write_set(folder: Path, rows: Sequence[tuple[str, str, Image.Image]]) -> PairSet:
    """A folder with metadata.jsonl of (split, caption, picture)."""
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as table:
        for number, (split, caption, picture) in enumerate(rows):
            name = f"{number:03d}.png"
            picture.save(folder / name)
            table.write(json.dumps({"file_name": name, "text": caption, "split": split, "n": number}) + "\n")
    return read_pairs(folder)


def dropped(folder: Path) -> dict[str, str]:
    records = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    return {record["key"]: record["reason"] for record in records}


@pytest.mark.parametrize(
    ("caption", "problem"),
    [
        ("a dog in the snow", None),
        ("a dog", "caption too short"),
        ("un perro con una pelota en el parque", "caption in another language"),
        ("Kim Smith photographed on 2011-05-03", None),
        ("a dog in 1999", None),
        ("photographed on 2011-05-03", "caption is boiler-plate"),
        ("photograph taken at 10:45 am, May 3rd, 2011, uploaded", "caption is boiler-plate"),
        ("a wooden bridge over a river, photographed in May 2011", None),
        ("IMG_20110503.jpg uploaded picture of file", "caption is boiler-plate"),
        (
            "a photo of the picture on a wall of images",
            None,
        ),  # set phrases alone are no boiler-plate: no date
    ],
)
def test_captions_are_judged(caption: str, problem: str | None) -> None:
    assert caption_problem(caption, SETTINGS) == problem


@pytest.mark.parametrize(
    "date",
    ["2011-05-03", "2011/5/3", "3.5.2011", "5/3/11", "3 May 2011", "3rd of May, 2011", "May 3, 2011", "may 2011",
     "Sept. 3rd 2011", "2011"],
)  # fmt: skip
def test_every_date_format_is_boilerplate(date: str) -> None:
    assert is_boilerplate(f"photographed on {date}")
    assert not is_boilerplate(f"a very tall red tower, photographed on {date}")


@pytest.mark.parametrize(
    ("caption", "language"),
    [
        ("a red apple on a table", "en"),
        ("ein roter Apfel auf dem Tisch", "de"),
        ("une pomme rouge sur la table", "fr"),
        ("una manzana roja en la mesa", "es"),
        ("una mela rossa sul tavolo della cucina", "it"),
        ("uma maçã vermelha sobre a mesa do jardim", "pt"),
        ("een rode appel op de tafel van het huis", "nl"),
        ("ett rött äpple på ett bord med en duk", "sv"),
        ("czerwone jabłko leży na stole przy oknie i nie jest duże", "pl"),
        ("красное яблоко на столе", "ru"),
        ("桌子上的红苹果", "zh"),
        ("テーブルの上の赤いりんご", "ja"),
        ("탁자 위의 빨간 사과", "ko"),
        ("a pea pod, a van and no bicycles", "en"),  # words of other languages too
        ("a no piracy sign, mostly red, firefox os style", "en"),
        ("red apple, flat fluent style", None),
        ("café crème brûlée", None),
        ("1234 !!", None),
    ],
)
def test_languages_are_told_by_script_and_function_words(caption: str, language: str | None) -> None:
    assert language_of(caption) == language


def test_two_of_the_paper_s_own_captions_are_english() -> None:
    for caption in (
        "an illustration of a baby daikon radish in a tutu walking a dog",
        "a tapir made of accordion. a tapir with the texture of an accordion.",
        "a neon sign that reads backprop",
    ):
        assert caption_problem(caption, SETTINGS) is None and language_of(caption) == "en"


def test_copies_are_near_and_other_pictures_are_not() -> None:
    originals = [scene(seed) for seed in range(12)]
    known = Known()
    known.add([str(seed) for seed in range(12)], originals, hashes)
    copies = [
        as_jpeg(originals[0]),
        originals[1].resize((40, 40), Image.Resampling.LANCZOS),
        ImageEnhance.Brightness(originals[2]).enhance(1.06),
        originals[3].crop((1, 1, 95, 95)),
        as_jpeg(originals[4].resize((200, 200)), 30),
    ]
    assert known.nearest(copies, hashes, HASH_SIMILARITY) == ["0", "1", "2", "3", "4"]
    others = [scene(seed) for seed in range(100, 160)]
    assert known.nearest(others, hashes, HASH_SIMILARITY) == [None] * 60


def test_one_shape_in_two_colours_is_two_pictures(tmp_path: Path) -> None:
    def disc(colour: str) -> Image.Image:
        picture = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(picture).ellipse([8, 8, 56, 56], fill=colour)
        return picture

    known = Known()
    known.add(["red"], [disc("red")], hashes)
    assert known.nearest([disc("blue"), as_jpeg(disc("red"))], hashes, HASH_SIMILARITY) == [None, "red"]


def sprite(kind: int, colour: tuple[int, int, int], side: int = 32) -> Image.Image:
    """A small outlined drawing on much white: a key, a cup, a hat, a leaf."""
    picture = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(picture)
    if kind == 0:
        draw.ellipse([4, 12, 11, 19], outline="black", fill=colour)
        draw.line([11, 16, 26, 16], fill=colour, width=2)
        draw.line([22, 16, 22, 20], fill=colour, width=2)
    elif kind == 1:
        draw.rectangle([9, 10, 20, 22], outline="black", fill=colour)
        draw.arc([18, 12, 25, 19], 270, 90, fill=colour, width=2)
    elif kind == 2:
        draw.rectangle([10, 8, 21, 18], outline="black", fill=colour)
        draw.rectangle([6, 18, 25, 20], fill="black")
    else:
        draw.polygon([(6, 22), (16, 6), (26, 22)], outline="black", fill=colour)
    return picture


COLOURS = {
    "red": (215, 40, 40), "cyan": (30, 200, 210), "yellow": (235, 210, 40), "green": (50, 160, 60),
    "blue": (50, 80, 205), "purple": (140, 60, 170), "orange": (240, 140, 30), "pink": (240, 150, 190),
    "brown": (130, 85, 45), "black": (25, 25, 25),
}  # fmt: skip


@pytest.mark.parametrize("kind", range(4))
def test_sprites_of_one_shape_in_ten_colours_are_ten_pictures_and_copies_are_found(kind: int) -> None:
    """A cyan key was called a near-duplicate of a yellow one: mean colours were diluted by white."""
    for name in COLOURS:
        known = Known()
        known.add([name], [sprite(kind, COLOURS[name])], hashes)
        for other, colour in COLOURS.items():
            drawn = sprite(kind, colour)
            copies = [drawn, as_jpeg(drawn, 75), drawn.resize((64, 64), Image.Resampling.NEAREST)]
            expected = [name if other == name else None] * len(copies)
            assert known.nearest(copies, hashes, HASH_SIMILARITY) == expected, (name, other)


def test_dropped_pictures_are_shown_beside_those_that_they_equal(tmp_path: Path) -> None:
    rows = [("train", "a small yellow key", sprite(0, COLOURS["yellow"]))]
    rows += [("train", "a small cyan key", sprite(0, COLOURS["cyan"]))] * 2
    rows += [("validation", "a small cyan key", sprite(0, COLOURS["cyan"]))]
    found = filter_pairs(write_set(tmp_path / "raw", rows), tmp_path / "clean", SETTINGS)
    assert found.dropped == {"near-duplicate of an evaluation picture": 2}
    assert any("duplicates.png" in line for line in found.lines())
    with Image.open(tmp_path / "clean" / "duplicates.png") as sheet:
        assert sheet.size == (8 * 98 - 2, 96)
        assert sheet.crop((0, 0, 96, 96)).tobytes() == sheet.crop((98, 0, 194, 96)).tobytes()


def test_planted_faults_are_found_counted_and_nothing_else(tmp_path: Path) -> None:
    held_out = scene(0)
    rows = [("validation", "a picture with some shapes", held_out)]
    rows += [("train", "a picture with some shapes", scene(seed)) for seed in range(1, 9)]
    rows += [
        ("train", "a copy of what is held out", as_jpeg(held_out)),  # 9
        ("train", "shapes", scene(20)),  # 10
        ("train", "ein Bild mit einigen Formen und einer Farbe", scene(21)),  # 11
        ("train", "uploaded on May 3, 2011", scene(22)),  # 12
        ("train", "a panorama that is far too wide", scene(23, (200, 90))),  # 13
        ("train", "a picture just within two to one", scene(24, (180, 90))),  # 14
        ("train", "a picture that cannot be read", scene(25)),  # 15
        ("test", "a test picture that is a copy too", as_jpeg(held_out)),  # 16
    ]
    pairs = write_set(tmp_path / "raw", rows)
    (tmp_path / "raw" / "015.png").write_bytes(b"no picture")
    pairs = read_pairs(tmp_path / "raw")
    seen: list[tuple[int, int]] = []
    found = filter_pairs(pairs, tmp_path / "clean", SETTINGS, progress=lambda *at: seen.append(at))
    assert dropped(tmp_path / "clean") == {
        "009.png": "near-duplicate of an evaluation picture",
        "010.png": "caption too short",
        "011.png": "caption in another language",
        "012.png": "caption is boiler-plate",
        "013.png": "picture too long",
        "015.png": "picture unreadable",
    }
    assert (found.read, found.kept, found.splits) == (17, 11, {"test": 1, "train": 9, "validation": 1})
    assert sum(found.dropped.values()) == 6 and seen[-1] == (17, 17)
    record = json.loads((tmp_path / "clean" / "filter.json").read_text())
    assert record["settings"]["min_words"] == 3 and record["kept"] == 11


def test_what_is_written_is_the_same_set_without_the_dropped_and_without_copies(tmp_path: Path) -> None:
    rows = [("train", "a picture with some shapes", scene(seed)) for seed in range(6)]
    rows += [("validation", "a picture with some shapes", scene(7)), ("train", "no", scene(8))]
    pairs = write_set(tmp_path / "raw", rows)
    filter_pairs(pairs, tmp_path / "clean", SETTINGS)
    kept = read_pairs(tmp_path / "clean")
    expected = [pair for pair in pairs if pair.captions != ("no",)]
    assert [(p.key, p.captions, p.split, dict(p.fields), p.n_bytes) for p in kept] == [
        (p.key, p.captions, p.split, dict(p.fields), p.n_bytes) for p in expected
    ]
    assert np.array_equal(np.asarray(kept[0].open()), np.asarray(pairs[0].open()))
    assert {path.name for path in (tmp_path / "clean").iterdir()} == {
        "selection.json", "pairs.jsonl", "dropped.jsonl", "filter.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in (tmp_path / "clean").iterdir()) < 8000
    for name in ("raw", "clean"):  # both move together
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    assert read_pairs(tmp_path / "elsewhere" / "clean").fingerprint == kept.fingerprint


def test_pictures_in_tar_shards_stay_there(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    with tarfile.open(tmp_path / "raw" / "00000.tar", "w") as shard:
        for number in range(10):
            stream = io.BytesIO()
            scene(number).save(stream, "PNG")
            caption = b"a picture with some shapes" if number else b"shapes"
            for suffix, data in (("png", stream.getvalue()), ("txt", caption)):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    pairs = read_pairs(tmp_path / "raw")
    found = filter_pairs(pairs, tmp_path / "clean", SETTINGS)
    kept = read_pairs(tmp_path / "clean")
    assert found.kept == len(kept) == 9 and found.dropped == {"caption too short": 1}
    assert [(p.key, p.offset, p.split) for p in kept] == [(p.key, p.offset, p.split) for p in pairs][1:]
    assert kept[3].open().size == (96, 96)
    with (tmp_path / "raw" / "00000.tar").open("ab") as shard_file:
        shard_file.write(bytes(512))
    with pytest.raises(ValueError, match="has changed since the data were filtered"):
        read_pairs(tmp_path / "clean")


def test_a_picture_that_changed_is_a_bad_sample_and_a_missing_source_an_error(tmp_path: Path) -> None:
    pairs = write_set(tmp_path / "raw", [("train", "a picture with some shapes", scene(n)) for n in range(4)])
    filter_pairs(pairs, tmp_path / "clean", SETTINGS)
    scene(99).save(tmp_path / "raw" / "001.png")
    kept = read_pairs(tmp_path / "clean")
    assert [sample.key for sample in kept.bad] == ["001.png"] and len(kept) == 3
    (tmp_path / "raw").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="does not exist: put it back"):
        read_pairs(tmp_path / "clean")


def test_a_selection_of_a_selection_reaches_the_pictures(tmp_path: Path) -> None:
    pairs = write_set(tmp_path / "raw", [("train", "a picture with some shapes", scene(n)) for n in range(5)])
    filter_pairs(pairs, tmp_path / "once", SETTINGS)
    filter_pairs(read_pairs(tmp_path / "once"), tmp_path / "twice", SETTINGS)
    assert read_pairs(tmp_path / "twice").fingerprint == pairs.fingerprint
    assert read_pairs(tmp_path / "twice")[4].open().size == (96, 96)


def test_only_the_bad_captions_of_a_picture_go(tmp_path: Path) -> None:
    write_shapes(tmp_path / "raw", n=10, seed=0)
    (tmp_path / "raw" / "000000.txt").write_text("a red circle on white\nun círculo rojo en el papel\n")
    found = filter_pairs(
        read_pairs(tmp_path / "raw"), tmp_path / "clean", FilterSettings(drop_duplicates=False)
    )
    assert found.captions_dropped == {"caption in another language": 1} and found.kept == 10
    assert read_pairs(tmp_path / "clean")[0].captions == ("a red circle on white",)


def test_settings_decide(tmp_path: Path) -> None:
    rows = [("train", "rot", scene(0, (300, 96))), ("validation", "rot", scene(0, (300, 96)))]
    pairs = write_set(tmp_path / "raw", rows)
    lax = FilterSettings(min_words=0, languages=(), max_aspect_ratio=4, drop_duplicates=False)
    assert filter_pairs(pairs, tmp_path / "lax", lax).kept == 2
    with pytest.raises(ValueError, match="no pair is left of 2: 2 caption too short"):
        filter_pairs(pairs, tmp_path / "strict", SETTINGS)
    assert not (tmp_path / "strict").exists()
    german = lax.model_copy(update={"languages": ("de",), "drop_duplicates": True})
    assert filter_pairs(pairs, tmp_path / "german", german).splits == {"validation": 1}
    with pytest.raises(ValueError, match="max_aspect_ratio"):
        validate(FilterSettings, {"max_aspect_ratio": 0.5}, "filter")


def test_a_further_evaluation_set_is_looked_for_in_train(tmp_path: Path) -> None:
    pairs = write_set(tmp_path / "raw", [("train", "a picture with some shapes", scene(n)) for n in range(5)])
    other = write_set(tmp_path / "coco", [("validation", "x", as_jpeg(scene(3)))])
    found = filter_pairs(pairs, tmp_path / "clean", SETTINGS, against=[other])
    assert dropped(tmp_path / "clean") == {"003.png": "near-duplicate of an evaluation picture"}
    assert found.splits == {"train": 4}


def test_a_clip_can_tell_the_duplicates(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(["a picture with some shapes"])
    ranker = Ranker(tiny_clip(tokenizer), tokenizer)
    rows = [("train", "a picture with some shapes", scene(n)) for n in range(3)]
    pairs = write_set(tmp_path / "raw", [*rows, ("validation", "a picture with some shapes", scene(1))])
    exact = FilterSettings(similarity=0.9999)
    found = filter_pairs(pairs, tmp_path / "clean", exact, describe=ranker.describe)
    assert list(dropped(tmp_path / "clean")) == ["001.png"] and found.kept == 3


def test_the_command_prints_one_object_and_names_a_wrong_setting(tmp_path: Path) -> None:
    write_set(tmp_path / "raw", [("train", "a picture with some shapes", scene(n)) for n in range(4)])
    clean = str(tmp_path / "clean")
    command = ["data", "filter", str(tmp_path / "raw"), "--out", clean]
    result = CliRunner().invoke(app, [*command, "--set", "min_words=2", "--json"])
    tree = json.loads(result.stdout)
    assert (tree["kept"], tree["read"], tree["folder"]) == (4, 4, clean)
    again = CliRunner().invoke(app, command)
    assert isinstance(again.exception, ValueError) and "exists already" in str(again.exception)
    wrong = CliRunner().invoke(app, [*command, "--set", "min_word=2"])
    assert isinstance(wrong.exception, ValueError) and "did you mean min_words" in str(wrong.exception)
