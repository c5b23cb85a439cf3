"""The stages: what a batch holds is a function of (seed, number); bad pictures are listed, never replaced."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle.config import load_preset, override, validate
from dalle.data.pair import Pair
from dalle.data.pairs import read_pairs
from dalle.data.reading import BadSampleLog
from dalle.data.shapes import write_shapes
from dalle.dvae import L1_WEIGHT, DiscreteVAE, relaxed_pixels
from dalle.generation.request import GenerationOptions
from dalle.tokenizer import Tokenizer
from dalle.training.dvae import DVAEStage, ink_weights
from dalle.training.order import rng
from dalle.training.recipe import Recipe, transformer_config
from dalle.training.transformer import Sequences, TransformerStage, fitting_captions
from dalle.transformer import Losses, Transformer

N_TRAIN, N_HELD_OUT = 18, 6
SMALL = (
    "dvae.d_hidden=8",
    "dvae.d_code=8",
    "transformer.n_layers=1",
    "transformer.layers=['row']",
    "transformer.n_heads=2",
    "transformer.d_head=8",
    "dvae_training.batch_size=4",
    "transformer_training.batch_size=6",
    "tokenizer.vocab_size=300",
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread, and wait long for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(*settings: str) -> Recipe:
    return validate(Recipe, override(load_preset("tiny"), [*SMALL, *settings]), "tiny")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shapes(tmp_path / "data", N_TRAIN + N_HELD_OUT, seed=0)


def split(folder: Path) -> tuple[list[Pair], list[Pair]]:
    pairs = read_pairs(folder)
    train, held_out = (list(pairs.of_split(name)) for name in ("train", "validation"))
    assert (len(train), len(held_out)) == (N_TRAIN, N_HELD_OUT)
    return train, held_out


# The dVAE's stage


def dvae_stage(folder: Path, *settings: str, seed: int = 0, limit: float = 0.01) -> DVAEStage:
    found = recipe(*settings)
    torch.manual_seed(0)
    train, held_out = split(folder)
    bad = BadSampleLog(folder.parent / "bad_samples.jsonl", total=len(train) + len(held_out), limit=limit)
    return DVAEStage(
        DiscreteVAE(found.dvae), found.dvae_training, train, held_out, bad, seed=seed, balance=None
    )


@pytest.mark.parametrize("crop", ["center", "paper"])
def test_dvae_batches_depend_on_seed_and_number_only(folder: Path, crop: str) -> None:
    setting = f"dvae_training.crop={crop}"
    one, other = dvae_stage(folder, setting), dvae_stage(folder, setting)
    in_order = [one.batch(number) for number in range(6)]  # more than an epoch
    for number in (5, 0, 3):
        assert torch.equal(other.batch(number), in_order[number])
    assert in_order[0].shape == (4, 3, 32, 32)
    assert 0 <= float(in_order[0].min()) and float(in_order[0].max()) <= 1
    assert in_order[0].is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(dvae_stage(folder, setting, seed=1).batch(0), in_order[0])
    assert not torch.equal(in_order[0], in_order[1])


def test_the_papers_crop_is_drawn_anew_each_epoch_and_the_central_one_is_not(folder: Path) -> None:
    whole_epoch = f"dvae_training.batch_size={N_TRAIN}"
    for crop, is_same in (("center", True), ("paper", False)):
        stage = dvae_stage(folder, whole_epoch, f"dvae_training.crop={crop}")
        pictures = []
        for epoch in range(2):
            back = np.argsort(stage.order.epoch(epoch))
            pictures.append(stage.batch(epoch)[torch.from_numpy(back)])
        assert torch.equal(*pictures) is is_same


def test_the_gumbel_noise_of_a_loss_depends_on_seed_and_number_only(folder: Path) -> None:
    gumbel = ("dvae.quantizer=gumbel", "dvae.fsq_levels=[]", "dvae.likelihood=logit_laplace")
    one, other = dvae_stage(folder, *gumbel), dvae_stage(folder, *gumbel)
    batch = one.batch(0)
    with torch.no_grad():
        expected = one.loss(batch, 0, 7)[0]
        torch.manual_seed(99)  # the global generator plays no part
        assert torch.equal(other.loss(batch, 0, 7)[0], expected)
        assert not torch.equal(one.loss(batch, 0, 8)[0], expected)


def test_ink_weighs_more_by_the_patch_and_features_are_added(folder: Path) -> None:
    plain = dvae_stage(folder)
    batch, model = plain.batch(0), plain.model
    pictures = torch.ones(2, 3, 32, 32)
    pictures[0, 1, 3, 9] = 0.5
    found = ink_weights(pictures, 4.0)
    expected = torch.ones(2, 1, 32, 32)
    expected[0, :, :8, 8:16] = 4.0
    assert torch.equal(found, expected)
    with torch.no_grad():
        before = plain.loss(batch, 0, 0)[0]
        weights = ink_weights(batch, 4.0)
        error = (
            relaxed_pixels(model.decoder.blocks(model.encoder.fsq.quantize(model._latents(batch)))) - batch
        )
        by_hand = ((error.square() + L1_WEIGHT * error.abs()) * weights).sum() / (3 * weights.sum())
        assert torch.allclose(
            dvae_stage(folder, "dvae_training.ink_weight=4.0").loss(batch, 0, 0)[0], by_hand
        )
        total, metrics = dvae_stage(folder, "dvae_training.feature_weight=0.1").loss(batch, 0, 0)
    assert (
        float(total) == pytest.approx(float(before + metrics["distance"])) and float(metrics["distance"]) > 0
    )


def test_the_loss_follows_the_schedules_of_its_update(folder: Path) -> None:
    stage = dvae_stage(
        folder,
        "dvae.quantizer=gumbel",
        "dvae.fsq_levels=[]",
        "dvae_training.kl_weight=6.6",
        "dvae_training.kl_steps=100",
        "dvae_training.temperature_steps=100",
    )
    seen: list[tuple[float, float]] = []
    whole = stage.model.loss

    def watched(images: Tensor, **arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append((arguments["temperature"], arguments["kl_weight"]))
        return whole(images, **arguments)

    stage.model.loss = watched  # type: ignore[method-assign]
    for step in (0, 50, 100):
        stage.loss(stage.batch(0), step, 0)
    assert seen == [(1.0, 0.0), pytest.approx((0.53125, 3.3)), pytest.approx((0.0625, 6.6))]


def test_a_corrupt_picture_is_skipped_listed_once_and_its_neighbours_stay_in_place(folder: Path) -> None:
    before = dvae_stage(folder)
    whole = [before.batch(number) for number in range(10)]
    before._pictures._prefetch._pool.shutdown()  # it reads ahead, and would list the broken picture too
    stage = dvae_stage(folder)
    broken = stage.train[5]
    Path(broken.path).write_bytes(b"no picture")
    order = [index for number in range(10) for _, index in stage.order.batch(number, 4)]
    for number, expected in enumerate(whole):
        kept = [place for place in range(4) if order[4 * number + place] != 5]
        assert torch.equal(stage.batch(number), expected[kept])
    listed = [json.loads(line) for line in (folder.parent / "bad_samples.jsonl").read_text().splitlines()]
    assert [sample["key"] for sample in listed] == [broken.key]
    assert "not a picture" in listed[0]["reason"]


def test_more_than_five_corrupt_pictures_end_the_run(folder: Path) -> None:
    stage = dvae_stage(folder)
    for pair in stage.train[:9]:
        Path(pair.path).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"[6-9] of 24 samples are bad; at most max\(5, 1\.0%\)") as caught:
        for number in range(5):
            stage.batch(number)
    assert str(caught.value).isprintable()


def test_a_batch_without_a_readable_picture_ends_the_run(folder: Path) -> None:
    stage = dvae_stage(folder, limit=1.0)
    for pair in stage.train:
        Path(pair.path).unlink()
    with pytest.raises(ValueError, match="no picture of a whole batch can be read"):
        stage.batch(0)


def test_unreadable_held_out_pictures_are_listed_and_none_at_all_is_an_error(folder: Path) -> None:
    _, held_out = split(folder)
    Path(held_out[0].path).write_bytes(b"no picture")
    stage = dvae_stage(folder, limit=1.0)
    assert len(stage.held_out) == N_HELD_OUT - 1 and held_out[0].key in stage.bad
    for pair in held_out:
        Path(pair.path).write_bytes(b"no picture")
    with pytest.raises(ValueError, match="no held-out picture can be read"):
        dvae_stage(folder, limit=1.0)


def test_dvae_validation_gives_psnr_and_share_of_codes_and_the_sheet_pairs_pictures(folder: Path) -> None:
    stage = dvae_stage(folder)
    figures = stage.validate()
    assert figures.keys() == {"psnr", "codes_used"}
    assert 0 < figures["psnr"] < 60 and 0 < figures["codes_used"] <= 1
    assert stage.validate() == figures
    # 6 pictures of 32 pixels, 2 apart, above their 6 reconstructions
    assert stage.sheet().size == (6 * 34 - 2, 2 * 34 - 2)
    assert len(dvae_stage(folder, "dvae_training.n_validation=2").held_out) == 2


# The transformer's stage


def named(n: int, captions: tuple[str, ...] = ("a red circle", "a round red thing")) -> list[Pair]:
    return [Pair(key=f"{index:03d}", captions=captions, split="train") for index in range(n)]


def sequences(pairs: list[Pair], *, grid: int = 4, n_codes: int = 64) -> Sequences:
    tokens = np.stack([np.full((grid, grid), int(pair.key) % n_codes, dtype=np.uint16) for pair in pairs])
    return Sequences(pairs, [tokens])


TOKENIZER = Tokenizer.train(
    ["a red circle", "a round red thing", "a blue square"] * 3, recipe("tokenizer.vocab_size=280").tokenizer
)


def transformer_stage(*settings: str, train: list[Pair] | None = None, seed: int = 0) -> TransformerStage:
    found = recipe(*settings)
    torch.manual_seed(0)
    config = transformer_config(found.transformer, found.dvae, TOKENIZER.n_vocab, found.tokenizer.max_tokens)
    return TransformerStage(
        Transformer(config),
        found.transformer_training,
        TOKENIZER,
        DiscreteVAE(found.dvae).eval(),
        sequences(named(10) if train is None else train),
        sequences(named(6)),
        seed=seed,
        balance=None,
        sampling=GenerationOptions(),
    )


def null_rows(text: Tensor) -> int:
    return int((text == torch.from_numpy(TOKENIZER.pad([]))).all(dim=1).sum())


def test_transformer_batches_depend_on_seed_and_number_only() -> None:
    one, other = transformer_stage(), transformer_stage()
    in_order = [one.batch(number) for number in range(5)]
    for number in (4, 0, 2):
        for left, right in zip(other.batch(number), in_order[number], strict=True):
            assert torch.equal(left, right)
    text, image = in_order[0]
    assert (text.shape, image.shape) == ((6, 32), (6, 16))
    assert text.dtype == image.dtype == torch.int64
    assert not torch.equal(transformer_stage(seed=1).batch(0)[0], text)


def test_a_batch_pairs_each_caption_with_the_tokens_of_its_own_picture() -> None:
    captions = [f"a {word} circle" for word in ("red", "blue", "round")]
    train = [Pair(key=str(index), captions=(captions[index],), split="train") for index in range(3)]
    quiet = ("transformer_training.bpe_dropout=0.0", "transformer_training.caption_dropout=0.0")
    text, image = transformer_stage(*quiet, train=train).batch(0)
    for row in range(6):
        assert TOKENIZER.decode(text[row].tolist()) == captions[int(image[row, 0])]


def test_each_epoch_takes_one_of_a_pictures_encodings_by_seed_epoch_and_sample() -> None:
    def seen(train: list[Pair], seed: int = 0) -> dict[tuple[int, str], int]:
        stage = transformer_stage(train=train, seed=seed)
        first = stage.train.encodings[0]
        encoded = Sequences(train, [first, first + 20, first + 40])
        stage = TransformerStage(
            stage.model, stage.settings, TOKENIZER, stage.dvae, encoded, encoded, seed=seed, balance=None,
            sampling=GenerationOptions(),
        )  # fmt: skip
        found = {}
        for number in range(20):
            image = stage.batch(number)[1]
            for row, (epoch, index) in enumerate(stage.order.batch(number, stage.settings.batch_size)):
                place, token = train[index].key, int(image[row, 0])
                assert (token - int(place)) in (0, 20, 40)  # of its own picture, from one of the three
                found[epoch, place] = (token - int(place)) // 20
        return found

    one = seen(named(10))
    assert set(one.values()) == {0, 1, 2}
    assert len({one[epoch, "003"] for epoch in range(10)}) > 1  # it changes from epoch to epoch
    other = seen(named(10)[::-1])
    assert all(other[key] == one[key] for key in one.keys() & other.keys())
    assert seen(named(10), seed=1) != one


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.999, 30, 30), (0.5, 5, 25)])
def test_dropped_captions_are_all_pads_and_their_share_is_the_setting(
    share: float, low: int, high: int
) -> None:
    stage = transformer_stage(f"transformer_training.caption_dropout={share}")
    assert low <= sum(null_rows(stage.batch(number)[0]) for number in range(5)) <= high


def test_the_draw_of_a_caption_depends_on_seed_epoch_and_sample() -> None:
    settings = ("transformer_training.bpe_dropout=0.5", "transformer_training.caption_dropout=0.0")
    one = transformer_stage(*settings)
    other = transformer_stage(*settings, train=named(10)[::-1])  # at another place in the data
    for epoch in range(3):
        for index in range(10):
            assert np.array_equal(one._text(epoch, index), other._text(epoch, 9 - index))
    texts = {tuple(one._text(0, index).tolist()) for index in range(10)}
    assert len(texts) > 5, "samples draw for themselves"
    different = transformer_stage(*settings, seed=1)
    assert any(not np.array_equal(one._text(0, index), different._text(0, index)) for index in range(10))


def test_bpe_dropout_splits_a_caption_anew_each_epoch_and_never_changes_its_text() -> None:
    train = named(3, captions=("a red circle",))
    settings = ("transformer_training.bpe_dropout=0.5", "transformer_training.caption_dropout=0.0")
    stage = transformer_stage(*settings, train=train)
    texts = {tuple(stage._text(epoch, 0).tolist()) for epoch in range(10)}
    assert len(texts) > 3
    assert {TOKENIZER.decode(list(text)) for text in texts} == {"a red circle"}


def test_captions_take_turns_over_the_epochs() -> None:
    settings = ("transformer_training.bpe_dropout=0.0", "transformer_training.caption_dropout=0.0")
    stage = transformer_stage(*settings)
    seen = {TOKENIZER.decode(stage._text(epoch, 0).tolist()) for epoch in range(12)}
    assert seen == {"a red circle", "a round red thing"}


def test_captions_that_do_not_fit_are_left_out_and_a_pair_of_only_such_is_cut_and_counted() -> None:
    long, longer = "q" * 40, "q" * 50
    pairs = [
        Pair(key="0", captions=(longer, "a red circle"), split="train"),
        Pair(key="1", captions=(longer, long), split="train"),
    ]
    kept, n_truncated = fitting_captions(pairs, TOKENIZER)
    assert kept == [("a red circle",), (long,)]
    assert n_truncated == 1
    stage = transformer_stage("transformer_training.caption_dropout=0.0", train=pairs)
    assert stage.n_truncated == 1
    assert TOKENIZER.decode(stage._text(0, 1).tolist()) == "q" * 32


def test_transformer_validation_gives_its_losses_and_the_sheet_pairs_pictures() -> None:
    stage = transformer_stage()
    figures = stage.validate()
    assert figures.keys() == {"text_loss", "image_loss", "image_loss_shuffled", "nats_per_token"}
    assert stage.validate() == figures, "the same captions and pictures each time"
    n_text, n_image = 32, 16
    mean = (n_text * figures["text_loss"] + n_image * figures["image_loss"]) / (n_text + n_image)
    assert figures["nats_per_token"] == pytest.approx(mean)
    assert stage.sheet().size == (6 * 34 - 2, 2 * 34 - 2)


def test_the_loss_is_an_eighth_text_and_seven_eighths_image() -> None:
    stage = transformer_stage()
    with torch.no_grad():
        total, parts = stage.loss(stage.batch(0), 0, 0)
    expected = parts["text_loss"] / 8 + parts["image_loss"] * 7 / 8
    assert float(total) == pytest.approx(float(expected), rel=1e-6)


def test_noise_replaces_its_share_of_the_tokens_read_by_seed_and_number_and_never_a_target() -> None:
    stage = transformer_stage("transformer_training.token_noise=0.25", "transformer_training.dropout=0.2")
    image = stage.batch(0)[1].repeat(100, 1)
    seen = [stage._disturbed(image, rng(0, "noise", number)) for number in (3, 3, 4)]
    assert seen[0] is not None and seen[1] is not None and seen[2] is not None
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    share = float((seen[0] != image).float().mean())
    kept_by_luck = 1 / stage.model.config.n_image_vocab
    assert share == pytest.approx(0.25 * (1 - kept_by_luck), abs=0.02)
    calls: list[tuple[Tensor, Tensor]] = []
    losses = stage.model.loss

    def spy(text: Tensor, image: Tensor, read: Tensor | None = None) -> Losses:
        assert read is not None
        calls.append((image, read))
        return losses(text, image, read)

    stage.model.loss = spy  # type: ignore[method-assign]
    batch = stage.batch(0)
    stage.model.train()
    first, again = (float(stage.loss(batch, 0, 5)[0].detach()) for _ in range(2))
    other = float(stage.loss(batch, 0, 6)[0].detach())
    assert first == again != other
    assert all(torch.equal(target, batch[1]) and not torch.equal(read, target) for target, read in calls)


def test_without_noise_and_dropout_the_loss_is_the_models_own() -> None:
    stage = transformer_stage()
    text, image = stage.batch(0)
    stage.model.train()
    assert stage._disturbed(image, rng(0)) is None
    torch.testing.assert_close(stage.loss((text, image), 0, 0)[0], stage.model.loss(text, image).total)
