"""Evaluation: figures worked out by hand, the retrieval test at its two ends, and the whole report."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dalle import images
from dalle.data.pair import Pair
from dalle.data.pairs import PairSet, read_pairs
from dalle.data.shapes import write_shapes
from dalle.evaluation.metrics import (
    MAX_PSNR,
    PixelErrors,
    Reconstruction,
    perplexity,
    psnr,
    rank_of_first,
    retrieval,
    retrieval_by_chance,
    thumbnails,
)
from dalle.evaluation.protocols import (
    PictureReader,
    distractors,
    draw,
    first_captions,
    measure_losses,
    nearest_of_100,
)
from dalle.evaluation.report import evaluate
from dalle.evaluation.sheets import pairs_sheet, spread
from dalle.pipeline import DallePipeline
from tests.tiny import GRID, LARGE, N_CODES, N_TEXT, tiny_dvae, tiny_pipe

SIZE = 32
NO_TOKENS = torch.zeros(1, 1, 1, dtype=torch.int64)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> PairSet:
    """48 shapes: 12 held out, of which half are marked as hard combinations."""
    pairs = read_pairs(write_shapes(tmp_path_factory.mktemp("shapes"), 48, seed=0, size=SIZE))
    marked = [
        replace(pair, split="combo" if i < 12 else "train", fields={"style": "flat", "combo_hard": i < 6})
        for i, pair in enumerate(pairs)
    ]
    return PairSet(tuple(marked))


@pytest.fixture(scope="module")
def pipe(shapes: PairSet) -> DallePipeline:
    """A tiny model with random weights."""
    return tiny_pipe(caption for pair in shapes for caption in pair.captions)


def sums_of(*pairs_of_values: tuple[list[int], list[int]]) -> Reconstruction:
    """Sums over grey 2 x 2 pictures, given as 8-bit values before and after."""
    sums = Reconstruction(4, 2)
    for before, after in pairs_of_values:
        originals, copies = (
            torch.tensor(values).view(1, 1, 2, 2).expand(1, 3, 2, 2) / 255 for values in (before, after)
        )
        sums.add_(originals, copies, NO_TOKENS)
    return sums


def test_psnr_of_two_pictures_is_the_one_worked_out_by_hand() -> None:
    # squared errors: 100 at one pixel of four, and 4 at each of four -> mean (100 + 16) / 8 = 14.5
    sums = sums_of(([0, 0, 0, 0], [10, 0, 0, 0]), ([100] * 4, [102] * 4))
    assert sums.seen.psnr == pytest.approx(10 * math.log10(255**2 / 14.5))
    assert sums.n_pictures == 2


def test_pooled_psnr_is_of_the_pooled_error_not_the_mean_of_the_splits() -> None:
    good, poor = sums_of(([0] * 4, [1] * 4)), sums_of(([0] * 4, [100] * 4), ([0] * 4, [100] * 4))
    assert good.seen.psnr is not None and poor.seen.psnr is not None
    pooled = (good + poor).seen.psnr
    assert pooled == pytest.approx(10 * math.log10(255**2 / ((1 + 2 * 10000) / 3)))
    assert pooled != pytest.approx((good.seen.psnr + poor.seen.psnr) / 2, abs=1)


def test_equal_pictures_give_the_highest_psnr_and_not_infinity() -> None:
    assert psnr(0, 12) == MAX_PSNR
    assert sums_of(([7] * 4, [7] * 4)).seen.psnr == MAX_PSNR


def test_ink_psnr_looks_only_where_the_original_is_not_white() -> None:
    # 249 is ink, 250 is not: only the first two pixels count, with squared errors 16 and 0
    sums = sums_of(([249, 0, 250, 255], [245, 0, 0, 0]))
    assert sums.seen.ink_psnr == pytest.approx(10 * math.log10(255**2 / 8))
    assert sums_of(([255] * 4, [0] * 4)).seen.ink_psnr is None


def test_a_pixel_with_one_dark_channel_is_ink() -> None:
    sums = Reconstruction(4, 1)
    yellow = torch.tensor([1.0, 1.0, 0.0]).view(1, 3, 1, 1)
    sums.add_(yellow, torch.ones(1, 3, 1, 1), NO_TOKENS)
    assert sums.seen.n_ink_values == 3


def test_perplexity_of_equally_used_codes_is_their_number() -> None:
    assert perplexity(torch.full((7,), 3)) == pytest.approx(7)
    assert perplexity(torch.tensor([5, 5, 0, 0])) == pytest.approx(2)
    assert perplexity(torch.zeros(4, dtype=torch.int64)) == 0


def test_codes_used_is_the_share_of_the_codebook() -> None:
    sums = Reconstruction(4, 2)
    sums.add_(torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2), torch.tensor([[[0, 2], [2, 2]]]))
    assert sums.codes_used == 0.5
    assert sums.histogram.tolist() == [1, 0, 3, 0]


def test_true_pictures_are_always_nearest_and_noise_is_so_by_chance() -> None:
    rng = np.random.default_rng(0)
    galleries = rng.random((300, 100, 48), dtype=np.float32)
    perfect = retrieval([rank_of_first(gallery[0], gallery) for gallery in galleries])
    assert perfect["recall_at_1"] == perfect["recall_at_5"] == perfect["median_rank"] == 1
    assert perfect["recall_at_1_standard_error"] == 0
    noise = [rank_of_first(rng.random(48, dtype=np.float32), gallery) for gallery in galleries]
    blind, chance = retrieval(noise), retrieval_by_chance([100] * 300)
    assert chance == {"recall_at_1": 0.01, "recall_at_5": 0.05, "median_rank": 50.5}
    assert blind["recall_at_1"] == pytest.approx(0.01, abs=0.02)
    assert blind["recall_at_5"] == pytest.approx(0.05, abs=0.04)
    assert blind["median_rank"] == pytest.approx(50.5, abs=8)


def test_a_query_that_tells_nothing_gets_the_middle_rank() -> None:
    assert rank_of_first(np.zeros(3, dtype=np.float32), np.ones((100, 3), dtype=np.float32)) == 50.5


def test_thumbnails_are_area_averages_of_the_8_bit_picture() -> None:
    picture = torch.zeros(1, 3, 32, 32)
    picture[:, 0, 0, 0] = 1
    small = thumbnails(picture)
    assert small.shape == (1, 768)
    assert small[0, 0] == 0.25 and small.sum() == 0.25


def test_distractors_share_the_style_and_not_the_object_and_depend_on_the_key_alone() -> None:
    pairs = PairSet(tuple(Pair(f"{i:03d}", ("x",), "combo", {"okey": str(i % 150)}) for i in range(300)))
    pool = np.arange(300, dtype=np.int64)
    chosen = distractors(pairs, 7, pool)
    assert len(set(chosen)) == 99
    assert not {7, 157} & set(chosen)
    assert chosen == distractors(pairs, 7, pool)
    assert chosen != distractors(pairs, 8, pool)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_every_picture_of_a_sheet_stands_above_its_answer(n: int) -> None:
    shade = (torch.arange(n) + 1).view(n, 1, 1, 1).expand(n, 3, 4, 4) / 20
    sheet = np.asarray(pairs_sheet(shade, shade + 0.5, columns=3)).astype(int)[::6, ::6, 0]  # a pixel a cell
    expected = np.full((2 * math.ceil(n / 3), min(n, 3)), 255)
    for i in range(n):
        row, column = divmod(i, 3)
        expected[2 * row : 2 * row + 2, column] = [
            round(255 * (i + 1) / 20),
            round(255 * ((i + 1) / 20 + 0.5)),
        ]
    assert sheet == pytest.approx(expected, abs=1)


def test_spread_takes_evenly_and_never_more_than_there_are() -> None:
    assert spread(range(10), 5) == [0, 2, 4, 6, 8]
    assert spread(range(3), 5) == [0, 1, 2]


def test_draws_in_batches_use_seed_plus_row(
    pipe: DallePipeline, shapes: PairSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = [pair.captions[0] for pair in shapes][:5]
    whole, _ = draw(pipe, captions, 3, lambda n: None)
    monkeypatch.setattr("dalle.evaluation.protocols.BATCH", 2)
    parts, _ = draw(pipe, captions, 3, lambda n: None)
    assert torch.equal(whole, parts)
    assert torch.equal(whole[4], pipe(captions[4], seed=7, output_type="tokens").tokens[0])


def test_losses_in_batches_equal_those_of_one_batch_and_use_other_captions(
    pipe: DallePipeline, shapes: PairSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, n_cut = first_captions(shapes.pairs[:5], pipe.tokenizer)
    image = torch.randint(N_CODES, (5, GRID**2), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("dalle.evaluation.protocols.BATCH", 2)
    losses = measure_losses(pipe.transformer, text, image)
    with torch.no_grad():
        whole, wrong = pipe.transformer.loss(text, image), pipe.transformer.loss(text[[3, 4, 0, 1, 2]], image)
    assert n_cut == 0
    assert losses.text_loss == pytest.approx(float(whole.text), rel=1e-5)
    assert losses.image_loss == pytest.approx(float(whole.image), rel=1e-5)
    assert losses.image_loss_shuffled == pytest.approx(float(wrong.image), rel=1e-5)
    stream = (N_TEXT * losses.text_loss + GRID**2 * losses.image_loss) / (N_TEXT + GRID**2)
    assert losses.nats_per_token == pytest.approx(stream)


def test_drawing_the_true_tokens_scores_as_the_reconstructions_do(
    pipe: DallePipeline, shapes: PairSet
) -> None:
    rows = list(range(6))
    originals = images.to_tensor([images.center_crop(shapes[row].open(), SIZE) for row in rows])
    with torch.no_grad():
        tokens = pipe.dvae.encode(originals)
    figures = nearest_of_100(pipe, shapes, rows, tokens, PictureReader(SIZE), lambda n: None)
    assert figures["draws"] == figures["reconstructions"]
    assert figures["n"] == figures["n_with_fewer_than_99_others"] == 6
    assert figures["chance"] == {"recall_at_1": 1 / 48, "recall_at_5": 5 / 48, "median_rank": 24.5}


def test_report_holds_every_figure_and_two_runs_are_equal(
    pipe: DallePipeline, shapes: PairSet, tmp_path: Path
) -> None:
    steps: list[tuple[int, int]] = []
    first = evaluate(
        pipe, shapes, tmp_path / "a", seed=5, progress=lambda done, total: steps.append((done, total))
    )
    second = evaluate(pipe, shapes, tmp_path / "b", seed=5)
    written = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert written == first
    assert {**first, "speed": None} == {**second, "speed": None}
    assert steps[-1][0] == steps[-1][1] and steps == sorted(steps)
    assert first["command"] == "dalle evaluate unsaved DATA --seed 5"
    assert first["model"]["sha256"] == pipe.model_sha256
    assert first["data"]["measured"] == {"combo": 12}
    assert first["dvae"]["n_pictures"] == 12 and first["dvae"]["n_pictures_for_codes"] == 48
    assert first["dvae"]["psnr"] == first["dvae"]["splits"]["combo"]["psnr"]
    assert first["transformer"]["combo"]["n_pictures"] == 12
    assert first["nearest_of_100"]["rows"] == "combo_hard" and first["nearest_of_100"]["n"] == 6
    assert [row["seed"] for row in first["sheets"]["draws.png"]] == [5, 6, 7, 8, 9, 10]
    for sheet in ("reconstructions.png", "draws.png"):
        images.open_image(tmp_path / "a" / sheet)
        assert (tmp_path / "a" / sheet).read_bytes() == (tmp_path / "b" / sheet).read_bytes()


def test_a_larger_drawing_is_measured_at_its_size_and_averaged_to_that_of_the_tokens(
    shapes: PairSet, tmp_path: Path
) -> None:
    large = tiny_pipe((caption for pair in shapes for caption in pair.captions), tiny_dvae(**LARGE))
    figures = evaluate(large, shapes, tmp_path, limit=6)["dvae"]
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
    report = evaluate(pipe, shapes, tmp_path, splits=("combo", "train"), limit=4)
    assert report["data"]["measured"] == {"combo": 4, "train": 4}
    assert report["dvae"]["n_pictures"] == report["dvae"]["n_pictures_for_codes"] == 8
    assert report["nearest_of_100"]["n"] == report["speed"]["n_draws"] == 4
    assert report["command"] == "dalle evaluate unsaved DATA --splits combo,train --limit 4 --seed 0"


def test_unreadable_pictures_are_left_out_and_counted(
    pipe: DallePipeline, shapes: PairSet, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    pairs = PairSet((replace(shapes[0], path=str(broken)), *shapes.pairs[1:]))
    report = evaluate(pipe, pairs, tmp_path / "out")
    assert report["unreadable"]["n"] == 1 and shapes[0].key in report["unreadable"]["first"][0]
    assert report["dvae"]["n_pictures"] == report["transformer"]["combo"]["n_pictures"] == 11
    assert report["nearest_of_100"]["n"] == 5
    with pytest.raises(ValueError, match="none of the 1 pictures can be read"):
        evaluate(pipe, PairSet(pairs.pairs[:1]), tmp_path / "out")


def test_one_picture_alone_has_no_retrieval_figures(
    pipe: DallePipeline, shapes: PairSet, tmp_path: Path
) -> None:
    nearest = evaluate(pipe, shapes[:1], tmp_path)["nearest_of_100"]
    assert nearest["n"] == 0
    assert nearest["draws"]["recall_at_1"] is None and nearest["chance"]["recall_at_1"] is None


def test_mistakes_are_named_before_anything_is_measured(
    pipe: DallePipeline, shapes: PairSet, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"split 'tone' is not in the data, which have combo 12, train 36"):
        evaluate(pipe, shapes, tmp_path, splits=("tone",))
    with pytest.raises(ValueError, match="nothing is held out, the data have train 36"):
        evaluate(pipe, shapes.of_split("train"), tmp_path)
    with pytest.raises(ValueError, match="limit is 0"):
        evaluate(pipe, shapes, tmp_path, limit=0)
    with pytest.raises(ValueError, match="seed is -1"):
        evaluate(pipe, shapes, tmp_path, seed=-1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        evaluate(pipe, shapes, tmp_path / "file")
    assert not (tmp_path / "evaluation.json").exists()
