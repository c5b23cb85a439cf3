"""Several data sets with weights, and the options that the commands share."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from dalle.cli import app
from dalle.data.contents import check_contents
from dalle.data.pair import Pair
from dalle.data.samples import ReadOptions
from dalle.data.source import Source
from dalle.training.order import Order
from tests.layouts import LAYOUTS, good_samples, picture


def write(folder: Path, first: int, last: int, layout: str = "folder") -> str:
    LAYOUTS[layout].write(folder, good_samples()[first:last])
    return str(folder)


def test_several_data_sets_are_one_with_the_name_of_each_before_its_keys(tmp_path: Path) -> None:
    data = (write(tmp_path / "cats", 0, 20), write(tmp_path / "dogs", 20, 60, "tar"))
    pairs = Source(data, weights=(2, 1)).read()
    assert len(pairs) == 60 and [pair.key for pair in pairs] == sorted(pair.key for pair in pairs)
    assert {(pair.key.split("/")[0], pair.weight) for pair in pairs} == {("cats", 2), ("dogs", 1)}
    alone = {pair.key: pair.split for pair in Source((data[0],)).read()}
    assert {p.key.removeprefix("cats/"): p.split for p in pairs if p.weight == 2} == alone, (
        "each is split by itself"
    )
    other = Source(data, weights=(3, 1)).read()
    assert other.fingerprint != pairs.fingerprint, "other weights are another order"
    checked = check_contents(pairs, tmp_path / "data.jsonl")
    assert [(p.key, p.split) for p in checked] == [(p.key, p.split) for p in pairs]


def test_data_sets_of_one_name_are_numbered(tmp_path: Path) -> None:
    data = (write(tmp_path / "a" / "set", 0, 10), write(tmp_path / "b" / "set", 10, 20))
    assert {pair.key.split("/")[0] for pair in Source(data).read()} == {"1-set", "2-set"}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0,), "1 numbers for 2 data sets"),
        ((1.0, 0.0), "have to be above 0"),
        ((1.0, float("inf")), "above 0"),
    ],
)
def test_weights_that_cannot_be_are_named(weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source(("a", "b"), weights)


def test_the_heaviest_set_is_seen_whole_each_epoch_and_the_others_in_part() -> None:
    pairs = [Pair(f"{n:03d}", ("x",), "train", weight=2.0 if n < 30 else 1.0) for n in range(70)]
    order = Order(pairs, seed=0)
    assert order.n_epoch == 30 + 20
    epochs = [order.epoch(number).tolist() for number in range(40)]
    for epoch in epochs:
        assert len(set(epoch)) == 50 and sorted(index for index in epoch if index < 30) == list(range(30))
    seen = Counter(index for epoch in epochs for index in epoch)
    assert all(seen[index] == 40 for index in range(30))
    assert all(8 <= seen[index] <= 32 for index in range(30, 70)), "about 20 times each"


def test_columns_captions_from_and_skip_bad_reach_every_command(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = ["pic,words"]
    for number in range(12):
        (tmp_path / "data" / f"{number}.bmp").write_bytes(picture(number))
        rows.append(f"{number}.bmp,a small red thing {number}")
    rows += [f"gone{number}.bmp,a thing" for number in range(6)]
    (tmp_path / "data" / "metadata.csv").write_text("\n".join(rows))
    columns = ["--image-column", "pic", "--caption-column", "words"]
    inspected = CliRunner().invoke(app, ["data", "inspect", str(tmp_path / "data"), *columns, "--json"])
    found = json.loads(inspected.stdout)
    assert (found["n_pairs"], found["n_bad"]) == (12, 6)
    assert found["trains"].startswith("no: 6 of 18 samples are bad")
    inspected = CliRunner().invoke(app, ["data", "inspect", str(tmp_path / "data"), *columns, "--skip-bad"])
    assert "train     yes: 9 pictures to learn from" in inspected.stdout
    assert "split by  a hash of each sample's own key: 12 pictures" in inspected.stdout
    clean = ["data", "filter", str(tmp_path / "data"), *columns, "--out", str(tmp_path / "clean"), "--json"]
    assert json.loads(CliRunner().invoke(app, clean).stdout)["read"] == 12
    train = ["train", str(tmp_path / "data"), *columns, "--out", str(tmp_path / "out"), "--preset", "tiny"]
    train += ["--stages", "tokenizer", "--set", "tokenizer.vocab_size=280"]
    refused = CliRunner().invoke(app, train)
    assert isinstance(refused.exception, ValueError) and "pass --skip-bad" in str(refused.exception)
    assert CliRunner().invoke(app, [*train, "--skip-bad"]).exit_code == 0
    assert len((tmp_path / "out" / "run" / "bad_samples.jsonl").read_text().splitlines()) == 6


def test_wrong_options_are_one_clear_error(tmp_path: Path) -> None:
    data = write(tmp_path / "data", 0, 10)
    for options, message in (
        (["--captions-from", "exif"], "--captions-from 'exif' is unknown: use folder or name"),
        (["--weight", "much"], "--weight much: give numbers with commas between them"),
        (["--weight", "2,1"], "--weight has 2 numbers for 1 data sets"),
    ):
        result = CliRunner().invoke(app, ["data", "inspect", data, *options])
        assert isinstance(result.exception, ValueError) and message in str(result.exception)


def test_inspect_tells_how_well_a_models_dvae_shows_the_pictures(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in range(8):
        Image.new("RGB", (64, 64), "white").save(tmp_path / "data" / f"{number}.png")
        (tmp_path / "data" / f"{number}.txt").write_text("nothing but white")
    command = ["data", "inspect", str(tmp_path / "data"), "--model", "bundled"]
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert found["psnr"] > 30, "white is easy"
    said = CliRunner().invoke(app, command).stdout
    assert f"PSNR of your pictures through this dVAE: {found['psnr']:.1f} dB" in said


def test_captions_from_names_are_the_samples_of_a_shard_too(tmp_path: Path) -> None:
    samples = [s._replace(name=f"red_apple_{i}", has_caption=False) for i, s in enumerate(good_samples()[:4])]
    LAYOUTS["tar"].write(tmp_path, samples)
    pairs = Source((str(tmp_path),), options=ReadOptions(captions_from="name")).read()
    assert [pair.captions for pair in pairs] == [("red apple",)] * 4
