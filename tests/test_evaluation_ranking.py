"""What a CLIP is worth: an oracle that reads a plain picture's colour gets every figure right, a wrong one none."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dalle.data.pair import Pair
from dalle.data.pairs import PairSet, read_pairs
from dalle.data.shapes import write_shapes
from dalle.evaluation.ranking import CaptionVectors, RankerReport, best_of
from dalle.evaluation.report import evaluate
from dalle.evaluation.subject import Settings
from dalle.evaluation.zero_shot import CLIPSCORE_PREFIX
from dalle.generation.rerank import Ranker
from dalle.model_folder import write_index
from dalle.pipeline import DallePipeline
from tests.tiny import tiny_clip, tiny_pipe

N_OBJECTS = 20
SHORT = Settings(networks=(), candidates=2, curve_candidates=2)
STYLES = ("flat", "dark")


class Oracle:
    """Reads a picture as its mean colour, a caption as the colour that it names, `off` objects away from the truth."""

    def __init__(self, colours: np.ndarray, off: int = 0) -> None:
        self.colours, self.off, self.asked = colours, off, list[str]()
        self.clip = SimpleNamespace(
            config=SimpleNamespace(image_size=8, d_embed=3), fit=lambda pictures: pictures
        )

    def encode_captions(self, captions: Sequence[str], truncate: bool = False) -> Tensor:
        self.asked += captions
        rows = []
        for caption in captions:
            thing, style = caption.removeprefix(CLIPSCORE_PREFIX).removeprefix("object ").split(", ")
            rows.append(self.colours[STYLES.index(style), (int(thing) + self.off) % N_OBJECTS])
        return F.normalize(torch.tensor(np.stack(rows)).float() - 128, dim=-1)

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        return F.normalize((pictures * 255 - 128).mean(dim=(2, 3)), dim=-1)


@pytest.fixture
def colours() -> np.ndarray:
    """A colour for every object in each of two styles, which share no hemisphere: flat is red, dark is not."""
    drawn = np.random.default_rng(0).integers(0, 256, (2, N_OBJECTS, 3))
    drawn[0, :, 0], drawn[1, :, 0] = 255, 0
    return cast(np.ndarray, drawn)


@pytest.fixture
def pairs(colours: np.ndarray, tmp_path: Path) -> PairSet:
    found = []
    for s, style in enumerate(STYLES):
        for thing in range(N_OBJECTS):
            path = tmp_path / f"{style}-{thing}.png"
            Image.new("RGB", (8, 8), tuple(colours[s, thing].tolist())).save(path)
            found.append((path, style, thing))
    return PairSet(
        tuple(
            Pair(
                key=path.stem,
                captions=(f"object {thing}, {style}", "another caption"),
                path=str(path),
                split="combo" if thing < 5 else "train",
                fields={
                    "style": style,
                    "okey": str(thing),
                    "combo_hard": style == "flat",
                    "group": "red" if style == "flat" else "blue",
                },
            )
            for path, style, thing in found
        )
    )


def report_of(ranker: Oracle, pairs: PairSet, done: list[int]) -> RankerReport:
    return RankerReport(cast(Ranker, ranker), pairs, done.append)


def test_an_oracle_finds_everything_and_chance_stands_beside_it(colours: np.ndarray, pairs: PairSet) -> None:
    done: list[int] = []
    members = {"combo": [i for i, pair in enumerate(pairs) if pair.split == "combo"]}
    hard = [i for i in members["combo"] if pairs[i].fields["combo_hard"]]
    figures = report_of(Oracle(colours), pairs, done).figures(members, hard)
    combo = figures["splits"]["combo"]
    assert combo["n_pictures"] == 10 and figures["combo_hard"]["n_pictures"] == 5
    assert combo["r_precision"] == {
        "share": 1.0,
        "standard_error": 0.0,
        "chance": pytest.approx(1 / N_OBJECTS),  # of each style, 19 other objects
        "n_captions": 100,
    }
    assert combo["retrieval"]["picture_to_caption"]["recall_at_1"] == 1.0
    assert combo["retrieval"]["caption_to_picture"]["recall_at_1"] == 1.0
    assert combo["style_accuracy"] == 1.0 and combo["style_chance"] == 0.5
    probe = figures["probe"]
    assert (probe["field"], probe["n_classes"], probe["n_train"], probe["n"]) == ("group", 2, 30, 10)
    assert probe["accuracy"] == 1.0 and probe["always_the_commonest"] == 0.5
    assert sum(done) == 10 + 30


def test_a_ranker_that_is_off_by_one_object_finds_no_object_but_the_style(
    colours: np.ndarray, pairs: PairSet
) -> None:
    members = {"combo": [i for i, pair in enumerate(pairs) if pair.split == "combo"]}
    combo = report_of(Oracle(colours, off=1), pairs, []).figures(members, [])["splits"]["combo"]
    assert combo["r_precision"]["share"] == 0.0
    assert combo["retrieval"]["picture_to_caption"]["recall_at_1"] == 0.0
    assert combo["style_accuracy"] == 1.0


def test_styles_are_told_apart_by_captions_of_the_same_objects(colours: np.ndarray, pairs: PairSet) -> None:
    few = PairSet(
        tuple(pair for pair in pairs if pair.fields["style"] == "flat" or int(str(pair.fields["okey"])) % 2)
    )
    report = report_of(Oracle(colours), few, [])
    shared = [thing for thing in range(5, N_OBJECTS) if thing % 2]
    for style, vector in report._styles.items():
        texts = report.ranker.encode_captions([f"object {thing}, {style}" for thing in shared])
        torch.testing.assert_close(vector, torch.nn.functional.normalize(texts.mean(0), dim=-1))


def test_draws_are_scored_beside_true_pictures_and_other_captions(
    colours: np.ndarray, pairs: PairSet
) -> None:
    rows = [i for i, pair in enumerate(pairs) if pair.split == "combo"]
    report = report_of(Oracle(colours), pairs, [])
    true = torch.stack([torch.tensor(np.asarray(pairs[row].open())).permute(2, 0, 1) / 255 for row in rows])
    figures = report.draws(rows, true)
    assert figures["n"] == 10 and figures["r_precision"]["share"] == 1.0
    score = figures["clip_score"]
    assert score["draws"] == pytest.approx(score["true_pictures"]) == pytest.approx(2.5, abs=1e-3)
    assert score["draws_with_other_captions"] < 2.0
    assert figures["clip_score_with_prefix"]["draws"] == score["draws"]  # the oracle reads past the prefix
    swapped = report.draws(rows, true.roll(1, dims=0))
    assert swapped["r_precision"]["share"] < 0.5
    assert swapped["clip_score"]["true_pictures"] == score["true_pictures"]


def test_each_caption_is_encoded_once(colours: np.ndarray, pairs: PairSet) -> None:
    oracle = Oracle(colours)
    captions = CaptionVectors(cast(Ranker, oracle), pairs)
    first = captions([3, 1, 3])
    assert torch.equal(first[0], first[2]) and torch.equal(captions([1, 3])[1], first[0])
    assert len(oracle.asked) == 2


def test_the_report_asks_the_judge_and_never_the_ranker_about_the_draws(tmp_path: Path) -> None:
    pairs = read_pairs(write_shapes(tmp_path / "shapes", 40, seed=0, size=32))
    plain = tiny_pipe(caption for pair in pairs for caption in pair.captions)
    pipe = DallePipeline(
        plain.tokenizer,
        plain.dvae,
        plain.transformer,
        ranker=Ranker(tiny_clip(plain.tokenizer), plain.tokenizer),
    )
    pipe.save_pretrained(tmp_path / "model")
    tiny_clip(plain.tokenizer, seed=5).save_pretrained(tmp_path / "model" / "judge")
    write_index(tmp_path / "model", pipe.defaults)
    loaded = DallePipeline.from_pretrained(tmp_path / "model")
    steps: list[tuple[int, int]] = []
    report = evaluate(loaded, pairs, tmp_path / "out", SHORT, progress=lambda *step: steps.append(step))
    assert report["clip"].keys() == {"splits"} and report["judge"].keys() == {"splits", "draws"}
    assert report["judge"]["splits"]["validation"]["n_pictures"] == 8 == report["judge"]["draws"]["n"]
    assert report["clip"]["splits"] != report["judge"]["splits"]
    assert steps == sorted(steps) and steps[-1][0] == steps[-1][1]
    loaded.save_pretrained(tmp_path / "copy")
    copy = DallePipeline.from_pretrained(tmp_path / "copy")
    judge = copy.load_judge()
    assert judge is not None and copy.ranker is not None and judge.sha256 != copy.ranker.sha256
    without = evaluate(plain, pairs, tmp_path / "plain", SHORT)
    assert "clip" not in without and "judge" not in without


def test_the_rerank_curve_is_the_judges_score_of_the_rankers_choice() -> None:
    chosen_by = torch.tensor([[0.1, 0.3, 0.2, 0.9], [0.5, 0.4, 0.6, 0.1]])
    judged = torch.tensor([[1.0, 2.0, 9.0, 4.0], [3.0, 9.0, 5.0, 9.0]])
    rows = best_of(chosen_by, judged, (1, 2, 4))
    assert [row["score"] for row in rows] == [5.25, 3.5, 4.5]  # (4, 6.5), ((2 + 4) / 2, (3 + 5) / 2), (4, 5)
    assert [row["gain"] for row in rows] == [0.0, -1.75, -0.75]
    assert [row["gain_standard_error"] for row in rows] == pytest.approx([0.0, 0.75, 0.75])
    three = best_of(chosen_by, judged, (3,))  # one group of the first three
    assert three[0]["score"] == (2.0 + 5.0) / 2
