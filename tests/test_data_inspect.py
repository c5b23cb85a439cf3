"""inspect, and the synthetic shapes it is tried on."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from dalle.data.inspect import Range, inspect
from dalle.data.pairs import PairSet, read_pairs
from dalle.data.shapes import COLOURS, write_shapes


def test_inspection_counts_what_is_there(tmp_path: Path) -> None:
    write_shapes(tmp_path, n=40, seed=0)
    (tmp_path / "000000.txt").write_text("a red circle\nround and red, at a place of its own\n")
    (tmp_path / "orphan.txt").write_text("no picture")
    Image.new("RGB", (90, 30)).save(tmp_path / "000001.png")
    (tmp_path / "000002.png").write_bytes(b"not a picture")
    found = inspect(read_pairs(tmp_path))
    assert (found.n_pairs, found.splits) == (40, {"train": 32, "validation": 8})
    assert (found.n_captions, found.n_with_several_captions, found.n_repeated_captions) == (41, 1, 32)
    assert found.caption_words == Range(3, 3, 9)
    assert found.caption_characters == Range(12, 14, 36)
    assert (found.n_opened, found.width, found.height) == (39, Range(32, 32, 90), Range(30, 32, 32))
    assert found.n_bad == 1
    assert [problem.split(":")[0] for problem in found.problems] == [
        "1 skipped",
        "1 of 40 pictures opened are corrupt",
        "1 of 39 pictures opened are longer than 2",
    ]
    assert "pictures  40 (train 32, validation 8)" in found.lines()
    assert json.loads(json.dumps(found.to_json()))["width"] == {"min": 32, "median": 32, "max": 90}


def test_large_sets_are_sampled_and_empty_ones_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dalle.data.inspect.MAX_OPENED", 5)
    found = inspect(read_pairs(write_shapes(tmp_path, n=16, seed=0)))
    assert found.n_opened == 5 and "(of 5 pictures opened)" in "\n".join(found.lines())
    empty = inspect(PairSet(()))
    assert empty.width == Range(0, 0, 0)
    assert empty.problems[0] == "no pictures in split train: there is nothing"


def test_shapes_are_balanced_deterministic_and_say_what_they_show(tmp_path: Path) -> None:
    pairs = read_pairs(write_shapes(tmp_path / "a", n=24, seed=5))
    assert set(Counter(pair.captions[0] for pair in pairs).values()) == {3}
    for pair in pairs:
        _, colour, _ = pair.captions[0].split()
        assert {rgb for _, rgb in pair.open().getcolors()} == {(255, 255, 255), COLOURS[colour]}
    write_shapes(tmp_path / "b", n=24, seed=5)
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()
    assert read_pairs(write_shapes(tmp_path / "c", n=24, seed=6)).fingerprint != pairs.fingerprint


def test_shuffled_shapes_have_the_same_pictures_and_captions_in_another_order(tmp_path: Path) -> None:
    pairs = read_pairs(write_shapes(tmp_path / "a", n=24, seed=5))
    shuffled = read_pairs(write_shapes(tmp_path / "b", n=24, seed=5, shuffled=True))
    assert [pair.open().tobytes() for pair in pairs] == [pair.open().tobytes() for pair in shuffled]
    captions, other = ([pair.captions for pair in each] for each in (pairs, shuffled))
    assert captions != other and sorted(captions) == sorted(other)


def test_shapes_refuse_sizes_without_room(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size 4"):
        write_shapes(tmp_path, n=1, seed=0, size=4)
