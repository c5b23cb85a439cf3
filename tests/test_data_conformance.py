"""The same 60 pairs and 12 flaws in every layout: the same pairs, splits and counts; changes are noticed in each."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from dalle.config import load_preset, override, validate
from dalle.data.contents import check_contents
from dalle.data.pairs import PairSet, read_pairs
from dalle.data.source import Source
from dalle.training.recipe import Recipe
from dalle.training.train import train
from tests.layouts import FLAWS, LAYOUTS, N_PAIRS, good_samples, picture

EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def write(layout: str, folder: Path, *flaws: str, changed: bool = False) -> Path:
    samples = good_samples()
    if changed:
        samples[7] = samples[7]._replace(picture=picture(7, shade=9))
    LAYOUTS[layout].write(folder, [*samples, *(FLAWS[flaw][0] for flaw in flaws)])
    return folder


def checked(folder: Path, tmp_path: Path) -> PairSet:
    return check_contents(read_pairs(folder), tmp_path / "record" / "data.jsonl")


@EVERY_LAYOUT
def test_the_same_pairs_pictures_and_splits_come_out_of_every_layout(layout: str, tmp_path: Path) -> None:
    pairs = checked(write(layout, tmp_path / "data"), tmp_path)
    assert pairs.bad == []
    assert sorted(pair.sample for pair in pairs) == [sample.name for sample in good_samples()]
    assert all(pair.captions == (f"thing {int(pair.sample[1:])}",) for pair in pairs)
    assert all(pair.read() == picture(int(pair.sample[1:])) for pair in pairs)
    held_out = {pair.sample for pair in pairs.of_split("validation")}
    by_hash = sorted(
        (s.name for s in good_samples()), key=lambda name: hashlib.sha256(name.encode()).hexdigest()
    )
    assert held_out == set(by_hash[:8]), "told by the samples' own keys"
    assert pairs.split_rules == {"a hash of each sample's own key": N_PAIRS}


@pytest.mark.parametrize("flaw", FLAWS)
@EVERY_LAYOUT
def test_each_flaw_is_one_bad_sample_with_its_reason(layout: str, flaw: str, tmp_path: Path) -> None:
    cannot = LAYOUTS[layout].cannot
    if flaw in cannot:
        assert cannot[flaw], "a layout that cannot hold a flaw says why"
        return
    pairs = checked(write(layout, tmp_path / "data", flaw), tmp_path)
    assert len(pairs) == N_PAIRS
    assert len(pairs.bad) == 1, pairs.bad
    assert FLAWS[flaw][1] in pairs.bad[0].reason or pairs.bad[0].reason == "empty caption"


@EVERY_LAYOUT
def test_all_flaws_together_give_the_same_pairs_and_as_many_bad_samples(layout: str, tmp_path: Path) -> None:
    flaws = [flaw for flaw in FLAWS if flaw not in LAYOUTS[layout].cannot]
    pairs = checked(write(layout, tmp_path / "data", *flaws), tmp_path)
    clean = checked(write(layout, tmp_path / "clean"), tmp_path / "other")
    assert len(pairs.bad) == len(flaws) >= 8
    assert [(pair.sample, pair.captions, pair.split) for pair in pairs] == [
        (pair.sample, pair.captions, pair.split) for pair in clean
    ]


# What a run makes of data that changed


def tokenizer_only(data: Path, out: Path, **options: bool) -> Path:
    recipe = validate(Recipe, override(load_preset("tiny"), ["tokenizer.vocab_size=280"]), "tiny")
    source = Source((str(data),), **options)  # type: ignore[arg-type]
    return train(source, out, recipe, stages=("tokenizer",), device=torch.device("cpu"), dtype=torch.float32)


@EVERY_LAYOUT
def test_a_run_is_refused_after_one_pictures_pixels_changed_at_the_same_size(
    layout: str, tmp_path: Path
) -> None:
    data = write(layout, tmp_path / "data")
    tokenizer_only(data, tmp_path / "out")
    shutil.rmtree(data)
    write(layout, data, changed=True)
    with pytest.raises(
        ValueError, match=r"the data have changed .*: 1 pictures changed \(.*\): put back what was"
    ):
        tokenizer_only(data, tmp_path / "out")
    shutil.rmtree(data)
    write(layout, data)  # put back, with other times
    assert tokenizer_only(data, tmp_path / "out")


@EVERY_LAYOUT
def test_a_run_goes_on_after_unrelated_files_were_added_and_files_were_touched(
    layout: str, tmp_path: Path
) -> None:
    data = write(layout, tmp_path / "data")
    tokenizer_only(data, tmp_path / "out")
    (data / "README.md").write_text("what this is")
    (data / "notes.json").write_text(json.dumps({"images": "many"}))
    for path in data.rglob("*.*"):
        os.utime(path, ns=(1, 1))
    assert tokenizer_only(data, tmp_path / "out")


@EVERY_LAYOUT
def test_unreadable_pictures_are_listed_at_once_and_may_be_removed_from_a_begun_run(
    layout: str, tmp_path: Path
) -> None:
    bad = ("truncated picture", "undecodable format", "oversized picture")
    data = write(layout, tmp_path / "data", *bad)
    tokenizer_only(data, tmp_path / "out")
    listed = (tmp_path / "out" / "run" / "bad_samples.jsonl").read_text().splitlines()
    assert len(listed) == 3
    shutil.rmtree(data)
    write(layout, data)
    assert tokenizer_only(data, tmp_path / "out")


@EVERY_LAYOUT
def test_files_that_did_not_change_are_not_read_again(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(layout, tmp_path / "data")
    first = checked(data, tmp_path)

    def fail(*_: object) -> bytes:
        raise AssertionError("read again")

    monkeypatch.setattr("dalle.data.pair.Pair.read", fail)
    assert checked(data, tmp_path).fingerprint == first.fingerprint


def test_a_changed_caption_and_a_new_pair_are_told_apart(tmp_path: Path) -> None:
    data = write("folder", tmp_path / "data")
    tokenizer_only(data, tmp_path / "out")
    (data / "p03.txt").write_text("another thing")
    (data / "p60.bmp").write_bytes(picture(60))
    (data / "p60.txt").write_text("thing 60")
    (data / "p05.bmp").write_bytes(b"no picture")
    expected = r"1 with other captions or weight \(p03.bmp\); .*1 added \(p60.bmp\); 1 unreadable now \(p05.bmp\): put back"
    with pytest.raises(ValueError, match=expected):
        tokenizer_only(data, tmp_path / "out")


# Splits by names, the same words in every layout


@pytest.mark.parametrize("word", ["validation", "valid", "VAL", "Dev", "val2017", "images_val"])
@EVERY_LAYOUT
def test_names_of_folders_and_files_decide_splits_in_every_layout(
    layout: str, word: str, tmp_path: Path
) -> None:
    samples = good_samples()
    parts = {"train": samples[:40], word: samples[40:50], "Test": samples[50:]}
    for name, part in parts.items():
        LAYOUTS[layout].write(tmp_path / "data" / name, part)
    pairs = read_pairs(tmp_path / "data")
    assert pairs.counts == {"test": 10, "train": 40, "validation": 10}
    assert {int(pair.sample.rpartition("/")[2][1:]) // 10 for pair in pairs.of_split("validation")} == {4}
    assert pairs.split_rules == {"names of folders and files": 60}


def test_resharding_moves_no_picture_to_another_split(tmp_path: Path) -> None:
    def shard(folder: str, n: int) -> PairSet:
        for part in range(n):
            LAYOUTS["tar"].write(tmp_path / folder / f"part{part}", good_samples()[part::n])
        return read_pairs(tmp_path / folder)

    sets = [shard("few", 1), shard("many", 7)]
    held_out = [sorted(pair.sample for pair in pairs.of_split("validation")) for pairs in sets]
    assert held_out[0] == held_out[1] and len(held_out[0]) == 8


@pytest.mark.parametrize("first", LAYOUTS)
def test_two_layouts_in_one_folder_are_both_read(first: str, tmp_path: Path) -> None:
    """A stray table or shard hides nothing."""
    LAYOUTS[first].write(tmp_path / "one", good_samples()[:30])
    LAYOUTS["folder"].write(tmp_path / "two", good_samples()[30:])
    pairs = read_pairs(tmp_path)
    assert len(pairs) == N_PAIRS and pairs.bad == []


def test_what_the_program_wrote_is_no_data(tmp_path: Path) -> None:
    data = write("folder", tmp_path / "data")
    out = tokenizer_only(data, data / "model")
    (out / "run" / "samples").mkdir()
    (out / "run" / "samples" / "sheet.png").write_bytes(picture(1))
    pairs = read_pairs(data)
    assert len(pairs) == N_PAIRS and pairs.bad == []
    assert pairs.notes == ("model/ was written by dalle: not read",)
    assert tokenizer_only(data, out) == out
    with pytest.raises(ValueError, match="is a model, a run or a token store of dalle, and no data set"):
        read_pairs(out)
    with pytest.raises(ValueError, match="is --out as well: choose another folder"):
        tokenizer_only(tmp_path / "data", tmp_path / "data")
