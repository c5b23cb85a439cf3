"""Evaluation: figures worked out by hand, and what the protocols do with pictures and captions."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dalle.data.pairs import PairSet, read_pairs
from dalle.data.shapes import write_shapes
from dalle.evaluation.metrics import (
    MAX_PSNR,
    Reconstruction,
    perplexity,
    psnr,
    rank_of_first,
    retrieval_by_chance,
    thumbnails,
)
from dalle.evaluation.protocols import draw, first_captions, measure_losses
from dalle.evaluation.sheets import pairs_sheet, spread
from dalle.generation.rerank import Ranker
from dalle.pipeline import DallePipeline
from tests.tiny import GRID, N_CODES, N_TEXT, tiny_clip, tiny_pipe

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
    assert {rank_of_first(gallery[0], gallery) for gallery in galleries} == {1}
    noise = np.array([rank_of_first(rng.random(48, dtype=np.float32), gallery) for gallery in galleries])
    assert retrieval_by_chance([100] * 300) == {
        "recall_at_1": 0.01,
        "recall_at_5": 0.05,
        "median_rank": 50.5,
    }
    assert (noise <= 1).mean() == pytest.approx(0.01, abs=0.02)
    assert (noise <= 5).mean() == pytest.approx(0.05, abs=0.04)
    assert np.median(noise) == pytest.approx(50.5, abs=8)


def test_a_query_that_tells_nothing_gets_the_middle_rank() -> None:
    assert rank_of_first(np.zeros(3, dtype=np.float32), np.ones((100, 3), dtype=np.float32)) == 50.5


def test_thumbnails_are_area_averages_of_the_8_bit_picture() -> None:
    picture = torch.zeros(1, 3, 32, 32)
    picture[:, 0, 0, 0] = 1
    small = thumbnails(picture)
    assert small.shape == (1, 768)
    assert small[0, 0] == 0.25 and small.sum() == 0.25


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


def test_candidates_in_batches_use_seeds_in_the_order_of_captions(
    pipe: DallePipeline, shapes: PairSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = [pair.captions[0] for pair in shapes][:5]
    whole = draw(pipe, captions, 3, 2, lambda n: None)
    monkeypatch.setattr("dalle.evaluation.protocols.BATCH", 4)
    parts = draw(pipe, captions, 3, 2, lambda n: None)
    assert whole.tokens.shape == (5, 2, GRID, GRID) and whole.chosen is None and whole.of_choice is None
    assert torch.equal(whole.tokens, parts.tokens)
    alone = pipe(captions[4], seed=3 + 2 * 4 + 1, output_type="tokens").tokens[0]
    assert torch.equal(whole.tokens[4, 1], alone)


def test_the_chosen_candidate_is_the_one_that_the_pipeline_puts_first(shapes: PairSet) -> None:
    plain = tiny_pipe(caption for pair in shapes for caption in pair.captions)
    ranker = Ranker(tiny_clip(plain.tokenizer), plain.tokenizer)
    ranked = DallePipeline(plain.tokenizer, plain.dvae, plain.transformer, ranker=ranker)
    captions = [pair.captions[0] for pair in shapes][:3]
    draws = draw(ranked, captions, 7, 4, lambda n: None)
    for i, caption in enumerate(captions):
        best = ranked(caption, num_candidates=4, seed=7 + 4 * i, output_type="tokens")
        assert draws.of_choice is not None and torch.equal(draws.of_choice[i], best.tokens[0])


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
