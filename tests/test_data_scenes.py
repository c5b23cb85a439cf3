"""Composed scenes: built from a small made-up art set and one font file, with neither npm nor network."""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from dalle.cli import main
from dalle.data.pairs import read_pairs
from dalle.data.scenes import build_scenes
from dalle.data.scenes.build import known_words
from dalle.data.scenes.captions import make_captions
from dalle.data.scenes.checkers import shows
from dalle.data.scenes.colours import GROUND_COLOURS, THING_COLOURS, are_distinct, is_legible
from dalle.data.scenes.components import flood, label_regions, region_sizes
from dalle.data.scenes.cutouts import cut_out, paint, painted_share
from dalle.data.scenes.drawing import draw_scene
from dalle.data.scenes.lettering import FONTS, letter_word
from dalle.data.scenes.objects import Source, find_sources, load_objects
from dalle.data.scenes.scene import KINDS, Kind, Scene, Thing, named_kinds
from dalle.data.scenes.shapes import SHAPES
from dalle.data.scenes.splits import TEST_SHARE, VALIDATION_SHARE, split_of, split_of_combination
from dalle.data.scenes.swaps import SWAPPED_KINDS, make_swaps
from dalle.images import open_image
from dalle.serving.routes.templates import load_templates

STYLES = ("noto", "twemoji", "fluent-emoji")
# noun: code point, colour of its body
OBJECTS = {
    "apple": ("1F34E", (220, 40, 50)),
    "lemon": ("1F34B", (250, 205, 60)),
    "frog": ("1F438", (90, 170, 70)),
    "book": ("1F4D5", (190, 30, 60)),
    "fish": ("1F41F", (50, 120, 220)),
}
N = 300


def draw_object(number: int, colour: tuple[int, int, int], style: int) -> Image.Image:
    """Return a drawing that no other object and style share."""
    large = Image.new("RGB", (512, 512), "white")
    pen = ImageDraw.Draw(large)
    side = 300 + 20 * style
    box = (256 - side // 2, 256 - side // 3, 256 + side // 2, 256 + side // 3 + 12 * number)
    (pen.ellipse, pen.rectangle)[number % 2](box, fill=colour)
    pen.rectangle((240, 160 - 10 * style, 272, 250), fill=colour)
    return large.reduce(4)


@pytest.fixture(scope="module")
def art(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("art")
    rows = []
    for (number, (noun, (code, colour))), (i, style) in itertools.product(
        enumerate(OBJECTS.items()), enumerate(STYLES)
    ):
        name = f"images/{style}/{noun}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw_object(number, colour, i).save(folder / name)
        rows.append(
            {
                "file_name": name,
                "captions": [f"a {noun} toy, {style} style", f"an emoji of {noun}: no-one, won't, red"],
                "split": "combo" if (noun, style) == ("frog", "twemoji") else "train",
                "style": style,
                "codepoints": code,
                "license": "Apache-2.0" if style == "noto" else "CC-BY-4.0",
                "source": f"pack@1/{noun}",
            }
        )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node_modules folder in which every font is Pillow's own."""
    modules = tmp_path_factory.mktemp("node_modules")
    font = ImageFont.load_default(20)
    assert isinstance(font, ImageFont.FreeTypeFont) and not isinstance(font.path, str)
    data = font.path.getvalue()
    for wanted in FONTS:
        path = modules / wanted.package / wanted.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        (modules / wanted.package / "package.json").write_text(json.dumps({"version": wanted.version}))
    return modules


def build(art: Path, out: Path, fonts: Path, **settings: Any) -> list[dict[str, Any]]:
    build_scenes(art, out, npm_folder=fonts, **{"n": N, "n_workers": 1, **settings})
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def built(art: Path, fonts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "scenes"
    build(art, out, fonts)
    return out


@pytest.fixture(scope="module")
def rows(built: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (built / "metadata.jsonl").read_text().splitlines()]


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_two_builds_by_any_number_of_processes_are_the_same_bytes(
    art: Path, fonts: Path, built: Path, tmp_path: Path
) -> None:
    build(art, tmp_path / "again", fonts, n_workers=2)
    assert digests(tmp_path / "again") == digests(built)


def test_another_seed_gives_other_scenes(
    art: Path, fonts: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    others = build(art, tmp_path / "other", fonts, seed=1, n=60)
    known = {json.dumps(Scene.from_fields(row).to_fields()) for row in rows}
    assert any(json.dumps(Scene.from_fields(row).to_fields()) not in known for row in others)


def test_train_reads_the_set_with_its_splits_and_fields(built: Path, rows: list[dict[str, Any]]) -> None:
    pairs = read_pairs(built)
    assert len(pairs) == len(rows) and not pairs.bad
    assert {pair.split for pair in pairs} == {"train", "validation", "test"}
    assert Counter(row["scene"] for row in rows).keys() == set(KINDS)
    assert {pair.open().size for pair in pairs[:20]} == {(128, 128)}


def test_every_picture_shows_what_its_row_says(built: Path, rows: list[dict[str, Any]]) -> None:
    checked = [row for row in rows if row["scene"] not in ("word", "top_bottom")]
    wrong = [
        row["captions"][0]
        for row in checked
        if not shows(np.asarray(open_image(built / row["file_name"])), Scene.from_fields(row))
    ]
    assert len(wrong) <= 0.02 * len(checked), wrong


def test_a_picture_asked_for_the_other_attribute_of_a_swap_says_no(
    art: Path, rows: list[dict[str, Any]]
) -> None:
    sources = {(s.object, s.style): s for s in sources_of(art)}
    swaps = make_swaps([Scene.from_fields(row) for row in rows], 50, seed=0)
    assert Counter(swap.before.kind for swap in swaps) == dict.fromkeys(SWAPPED_KINDS, 10)
    own = other = 0
    for swap in swaps:
        picture = np.asarray(draw_scene(swap.after, sources, {}, 128))
        own += shows(picture, swap.after)
        other += shows(picture, swap.before)
        before, after = (caption.replace(" an ", " a ").split() for caption in swap.captions)
        # `one apple` has an `s` less than `two apples`.
        n_changed = sum(a != b for a, b in zip(before, after, strict=False) if a.rstrip("s") != b.rstrip("s"))
        assert n_changed in (1, 2, 4), swap.captions
    assert own >= 48 and other <= 2


def sources_of(art: Path, **changes: Any) -> list[Source]:
    rows = [json.loads(line) for line in (art / "metadata.jsonl").read_text().splitlines()]
    return find_sources(art, [row | changes for row in rows], load_objects(), frozenset(STYLES))


def test_no_drawing_of_a_held_out_split_is_cut(art: Path, rows: list[dict[str, Any]]) -> None:
    found = {(source.object, source.style) for source in sources_of(art)}
    assert ("frog", "twemoji") not in found and ("frog", "noto") in found
    assert sources_of(art, split="object") == []
    shown = {(thing["object"], thing["style"]) for row in rows for thing in row["things"]}
    assert ("frog", "twemoji") not in shown and ("frog", "noto") in shown


def test_an_object_that_is_held_out_somewhere_as_an_object_is_never_cut(art: Path) -> None:
    given = [json.loads(line) for line in (art / "metadata.jsonl").read_text().splitlines()]
    unseen = given[0] | {"split": "object"}  # an apple; the others are still called train
    found = find_sources(art, [unseen, *given], load_objects(), frozenset(STYLES))
    assert "apple" not in {source.object for source in found}


def test_no_held_out_combination_is_in_a_scene_of_train(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        scene = Scene.from_fields(row)
        primary, *others = scene.combinations()
        assert row["split"] == split_of(scene) == split_of_combination(primary)
        assert all(split_of_combination(other) == "train" for other in others)


def test_a_colour_held_out_for_an_object_is_seen_in_no_kind_of_scene() -> None:
    things = (Thing("apple", color, "noto") for color in THING_COLOURS)
    held_out = next(t for t in things if split_of_combination(("color", "apple", str(t.color))) != "train")
    other = Thing("circle", "black", None)
    assert split_of(Scene("position", (held_out, other), relation="left")) is None
    assert split_of(Scene("count", (held_out,), count=2)) is None
    assert split_of(Scene("color", (held_out,))) in ("validation", "test")


def test_a_scene_of_train_that_is_nearly_a_held_out_picture_is_dropped(
    art: Path, fonts: Path, tmp_path: Path
) -> None:
    kinds: tuple[Kind, ...] = ("color",)
    before = build(art, tmp_path / "before", fonts, kinds=kinds, n=40)
    copied = next(row for row in before if row["split"] == "train")
    tested = next(row for row in before if row["split"] != "train")
    shutil.copytree(art, tmp_path / "art")
    with (tmp_path / "art" / "metadata.jsonl").open("a") as table:
        for row in (copied, tested):
            name = row["file_name"].replace("/", "-")
            shutil.copy(tmp_path / "before" / row["file_name"], tmp_path / "art" / name)
            fields = {
                "file_name": name,
                "captions": ["x"],
                "split": "combo",
                "style": "noto",
                "codepoints": "1",
            }
            table.write(json.dumps(fields | {"license": "MIT", "source": "s"}) + "\n")
    after = build(tmp_path / "art", tmp_path / "after", fonts, kinds=kinds, n=40)
    names = {row["file_name"] for row in after}
    assert copied["file_name"] not in names and tested["file_name"] in names
    assert not (tmp_path / "after" / copied["file_name"]).exists()


def test_left_of_and_right_of_are_one_combination() -> None:
    a, b = Thing("apple", "red", "noto"), Thing("frog", "green", "noto")
    told = [
        Scene("position", (a, b), relation="left"),
        Scene("position", (b, a), relation="right"),
        Scene("position", (b, a), relation="left"),
    ]
    primaries = [scene.combinations()[0] for scene in told]
    assert primaries[0] == primaries[1] != primaries[2]


def test_the_shares_of_the_splits_are_those_that_are_stated() -> None:
    found = Counter(split_of_combination(("word", str(i))) for i in range(20_000))
    assert found["test"] / 20_000 == pytest.approx(TEST_SHARE, abs=0.01)
    assert found["validation"] / 20_000 == pytest.approx(VALIDATION_SHARE, abs=0.01)


def test_every_row_names_the_licences_of_all_it_shows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        styles = {thing["style"] for thing in row["things"]}
        wanted = {"Apache-2.0" for style in styles if style == "noto"}
        wanted |= {"CC-BY-4.0" for style in styles if style not in ("noto", None)}
        wanted |= {"MIT" for style in styles if style is None}
        wanted |= {"OFL-1.1" for _ in [row["word"]] if row["word"]}
        assert set(row["license"].split(" AND ")) == wanted
        assert bool(row["sources"]) == bool(wanted - {"MIT"})


def test_captions_hold_every_attribute(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert 3 <= len(row["captions"]) <= 5
        for caption in row["captions"]:
            for thing in row["things"]:
                assert thing["object"] in caption and (thing["color"] or "") in caption
            if row["ground"] != "white":
                assert f"{row['ground']} background" in caption
            if row["word"]:
                assert row["word"] in caption.replace(" ", "") and row["font"] in caption


def captions_of(*scenes: Scene) -> list[str]:
    return [make_captions(scene)[0] for scene in scenes]


def test_captions_are_english() -> None:
    apple, frog = Thing("apple", "orange", "noto"), Thing("frog", None, "noto")
    assert captions_of(
        Scene("color", (apple,)),
        Scene("count", (frog,), "blue", count=1),
        Scene("count", (Thing("cactus", None, "noto"),), count=3),
        Scene("count", (Thing("cross", "red", None),), count=2),
        Scene("position", (apple, Thing("frog", "green", "noto")), relation="right"),
        Scene("size", (Thing("apple", "red", "noto", "big"), Thing("star", "blue", None, "small"))),
        Scene("ground", (frog,), "orange"),
        Scene("word", (), "yellow", word="HI", font="tall", color="red"),
        Scene("top_bottom", (frog, Thing("frog", None, "twemoji"))),
    ) == [
        "an orange apple, noto style",
        "one frog on a blue background, noto style",
        "three cactuses, noto style",
        "two red crosses",
        "an orange apple to the right of a green frog, noto style",
        "a big red apple and a small blue star, noto style",
        "a frog on an orange background, noto style",
        'the word "HI" in tall red letters on a yellow background',
        "the exact same frog, noto style on top, twemoji style on the bottom",
    ]


def test_the_converse_caption_of_a_position_is_true_too() -> None:
    things = (Thing("apple", "red", "noto"), Thing("frog", "green", "noto"))
    captions = make_captions(Scene("position", things, relation="above"))
    assert captions[1] == "a green frog below a red apple, noto style"
    assert captions[2] == "a red apple at the top and a green frog at the bottom, noto style"


def test_every_template_says_what_scenes_say() -> None:
    file = Path(__file__).parents[1] / "dalle/data/scenes/templates.toml"
    templates = {t.id: t for t in load_templates(file) if t.id.startswith("scene-")}
    assert len(templates) == 8
    colours, nouns = list(THING_COLOURS), [obj.noun for obj in load_objects()]
    styles = ("twemoji", "noto", "fluent-emoji-flat", "fluent-emoji", "fluent-3d", "emojione", "fxemoji")
    styles += ("noto-v1", "fluent-emoji-high-contrast", "noto-mono")
    said = {
        caption
        for noun, color, style in itertools.product(nouns, colours, styles[:8])
        for caption in captions_of(
            Scene("color", (Thing(noun, color, style),)),
            *(Scene("size", (Thing(noun, color, style, size),)) for size in ("big", "small")),
            *(Scene("ground", (Thing(noun, color, style),), ground) for ground in GROUND_COLOURS),
            *(Scene("count", (Thing(noun, None, style),), count=n) for n in (1, 2, 3, 4)),
        )
    }
    said.update(
        caption
        for noun, top, bottom in itertools.product(nouns, styles, styles)
        for caption in captions_of(Scene("top_bottom", (Thing(noun, None, top), Thing(noun, None, bottom))))
    )
    for name in ("colours", "grounds", "counts", "sizes", "top-bottom"):
        assert set(templates[f"scene-{name}"].captions()) <= said, name
    words = templates["scene-words"]
    fonts, shades = (
        [font.name for font in FONTS],
        colours,
    )
    lettering = itertools.product(words.words("word"), fonts, shades)
    assert set(words.captions()) == set(
        captions_of(*(Scene("word", (), word=w, font=f, color=c) for w, f, c in lettering))
    )
    positions, shapes = templates["scene-positions"], templates["scene-shapes"]
    assert set(positions.words("object")) | set(positions.words("other")) <= set(nouns)
    assert set(shapes.words("shape")) == set(SHAPES)


def test_the_tail_of_a_q_is_not_cut_off(fonts: Path) -> None:
    file = fonts / FONTS[0].package / FONTS[0].path
    heights = {}
    for letter in "HQ":
        rows = np.nonzero(
            np.asarray(letter_word(letter, FONTS[0].name, file, "red", 128))[..., 3].max(axis=1)
        )[0]
        heights[letter] = rows.max() - rows.min()
    assert heights["Q"] > heights["H"]


# --- parts ---


def test_paint_changes_the_main_colour_and_nothing_else() -> None:
    picture = Image.new("RGB", (64, 64), "white")
    pen = ImageDraw.Draw(picture)
    pen.rectangle((10, 10, 50, 50), fill=(220, 40, 50))
    pen.rectangle((28, 2, 32, 9), fill=(70, 160, 60))
    cut = cut_out(picture, has_holes=False)
    assert painted_share(cut) > 0.9
    painted = paint(cut, "blue")
    assert np.abs(painted[30, 20, :3] * 255 - THING_COLOURS["blue"]).max() < 8
    assert np.allclose(painted[2, 20], cut[2, 20], atol=1e-3)  # the stem
    assert np.array_equal(painted[..., 3], cut[..., 3])


def test_a_cut_out_on_white_is_the_drawing_again() -> None:
    large = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(large).ellipse((60, 90, 450, 420), fill=(40, 90, 200))
    drawing = large.reduce(4)
    cut = cut_out(drawing, has_holes=False)
    whole = cut[..., :3] * cut[..., 3:] + 1 - cut[..., 3:]
    box = np.asarray(drawing, dtype=np.float32)[22:106, 15:113] / 255
    assert cut.shape[:2] == box.shape[:2]
    assert np.abs(whole - box).max() < 0.03


def test_holes_are_cut_only_where_the_object_has_them() -> None:
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).ellipse((4, 4, 60, 60), fill=(200, 30, 30))
    ImageDraw.Draw(picture).ellipse((24, 24, 40, 40), fill="white")
    assert cut_out(picture, has_holes=False)[28, 28, 3] == 1
    assert cut_out(picture, has_holes=True)[28, 28, 3] == 0


def test_a_blank_drawing_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="the drawing is blank"):
        cut_out(Image.new("RGB", (32, 32), "white"), has_holes=False)


def slow_regions(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> list[int]:
    """The twin of `region_sizes`, one pixel after another."""
    left, sizes = {(int(y), int(x)) for y, x in np.argwhere(mask)}, []
    while left:
        todo, size = [left.pop()], 0
        while todo:
            y, x = todo.pop()
            size += 1
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left:
                    left.remove(near)
                    todo.append(near)
        sizes.append(size)
    return sorted(sizes, reverse=True)


def test_regions_equal_those_of_a_slow_twin() -> None:
    rng = np.random.default_rng(0)
    for share in (0.2, 0.5, 0.6, 1.0):
        mask = rng.random((24, 31)) < share
        assert region_sizes(mask) == slow_regions(mask)
        assert len(np.unique(label_regions(mask)[mask])) == len(slow_regions(mask))
    assert region_sizes(np.zeros((4, 4), dtype=bool)) == []


def test_flood_reaches_what_is_connected_to_a_seed() -> None:
    mask = np.array([[1, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1]], dtype=bool)
    seeds = np.zeros_like(mask)
    seeds[0, 0] = True
    assert flood(mask, seeds).sum() == 3


def test_an_empty_picture_shows_nothing() -> None:
    blank = np.full((128, 128, 3), 255, dtype=np.uint8)
    red, blue = Thing("apple", "red", "noto"), Thing("star", "blue", None)
    scenes: Sequence[Scene] = (
        Scene("color", (red,)),
        Scene("count", (red,), count=1),
        Scene("position", (red, blue), relation="left"),
        Scene("size", (Thing("apple", "red", "noto", "small"),)),
        Scene("size", (Thing("apple", "red", "noto", "big"), Thing("star", "blue", None, "small"))),
    )
    assert not any(shows(blank, scene) for scene in scenes)


def test_words_and_pairs_have_no_checker_here() -> None:
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="words need a reader"):
        shows(picture, Scene("word", (), word="HI", font="tall", color="red"))


def test_colours_that_pass_for_each_other_are_not_distinct() -> None:
    assert are_distinct("red", "blue") and are_distinct("blue", "red")
    assert not are_distinct("red", "red") and not are_distinct("orange", "red")
    assert is_legible("black", "yellow") and is_legible("pink", "black")
    assert not is_legible("green", "red") and not is_legible("gray", "orange")


def test_words_of_the_art_set_are_whole_words() -> None:
    rows = [{"captions": ["a red no-one won't, EMOJI of toys: hi 3d x"]}]
    assert known_words(rows, 4) == ["HI", "OF", "RED", "TOYS"]
    assert known_words(rows, 6) == ["EMOJI", "HI", "OF", "RED", "TOYS"]


def test_a_scene_survives_its_row() -> None:
    scene = Scene(
        "size", (Thing("apple", "red", "noto", "big"), Thing("star", "blue", None, "small")), "pink"
    )
    fields = json.loads(json.dumps(scene.to_fields()))
    assert Scene.from_fields(fields) == scene
    with pytest.raises(ValueError, match="scene is 'sky'; it has to be one of color"):
        Scene.from_fields(fields | {"scene": "sky"})
    with pytest.raises(ValueError, match="the fields of a size scene are damaged"):
        Scene.from_fields(fields | {"things": [{"noun": "apple"}]})
    assert {field.name for field in dataclasses.fields(Scene)} - {"kind"} <= fields.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "number of scenes is 0"),
        ({"size": 40}, "picture size is 40"),
        ({"max_letters": 7}, "letters of a word are at most 7"),
        ({"kinds": ("top_bottom",), "n": 500}, "different top_bottom scenes; 500 were asked for"),
    ],
)
def test_bad_settings_are_one_clear_line(
    art: Path, fonts: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(art, tmp_path / "out", fonts, **settings)
    assert not (tmp_path / "out").exists()


def test_only_the_named_kinds_are_built_and_need_no_fonts(art: Path, tmp_path: Path) -> None:
    kinds: tuple[Kind, ...] = ("count", "size")
    rows = build(art, tmp_path / "out", tmp_path / "nothing", kinds=kinds, n=40)
    assert {row["scene"] for row in rows} == {"count", "size"}
    assert named_kinds(["size", "count"]) == kinds and named_kinds([]) == KINDS


def test_the_command_says_what_is_wrong_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["dalle", "data", "scenes", str(tmp_path), "--out", str(tmp_path / "o")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "holds no metadata.jsonl: build the art set first" in capsys.readouterr().err


def test_the_command_builds_the_set(
    art: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o"
    command = [
        "dalle",
        "data",
        "scenes",
        str(art),
        "--out",
        str(out),
        "--n",
        "30",
        "--kind",
        "color",
        "--json",
    ]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    report = json.loads(capsys.readouterr().out)
    assert sum(report["kinds"]["color"].values()) == 30 - report["n_too_near"]
    assert "CC-BY-4.0" in (out / "README.md").read_text()


def test_words_of_the_fonts_are_read_back(fonts: Path) -> None:
    if not os.environ.get("DALLE_CI"):  # there it has to be installed
        pytest.importorskip("rapidocr_onnxruntime", reason="the ocr extra is not installed")
    from dalle.data.scenes.reader import WordReader

    reader = WordReader()
    files = {font.name: fonts / font.package / font.path for font in FONTS}
    right = 0
    words = ("HI", "CAT", "MOON", "ZEBRA", "GO", "SUN", "KING", "APPLE", "RED", "BOOK")
    for i, word in enumerate(words):
        color = list(THING_COLOURS)[i]
        scene = Scene("word", (), "white", word=word, font=FONTS[i % len(FONTS)].name, color=color)
        picture = np.asarray(draw_scene(scene, {}, files, 128))
        right += reader.shows(picture, word)
        assert not reader.shows(picture, words[i - 1])
    assert right >= 9
    assert reader(np.full((64, 64, 3), 255, dtype=np.uint8)) == ""
