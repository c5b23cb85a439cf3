"""CLIP's stage: batches of different pictures, exact gradients, and a CLIP that learns what captions say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dalle.config import load_preset, override, validate
from dalle.data.pair import Pair
from dalle.data.pairs import read_pairs
from dalle.data.shapes import COLOURS, SHAPES, write_shapes
from dalle.generation.rerank import Ranker
from dalle.images import open_image
from dalle.training.clip import _fitting, is_even
from dalle.training.optim import OPTIMIZERS
from dalle.training.order import Order
from dalle.training.recipe import Balance, Recipe
from dalle.training.train import train

CLIP_SETTINGS = [
    'clip={d_embed=32, image_size=32, image_tower="vit", image_layers=1, image_width=64, patch_size=8, text_layers=1,'
    " text_width=64}",
    "clip_training={steps=60, batch_size=8, learning_rate=2e-3, final_learning_rate=1e-4, warmup_steps=5,"
    ' weight_decay=0.1, average_decay=0.9, validate_every=30, checkpoint_every=30, sheet_every=60, crop="near"}',
]


def recipe(*settings: str) -> Recipe:
    return validate(Recipe, override(load_preset("tiny"), [*CLIP_SETTINGS, *settings]), "tiny")


def run(data: Path, out: Path, found: Recipe, **more: Any) -> Path:
    return train(
        str(data),
        out,
        found,
        stages=("clip",),
        device=torch.device("cpu"),
        dtype=torch.float32,
        quiet=True,
        **more,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", 64, seed=0)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = recipe("clip_training.steps=400", "clip_training.batch_size=16")
    return run(data, tmp_path_factory.mktemp("clip") / "out", settings)


def test_a_trained_clip_finds_a_caption_with_the_colour_of_the_picture(trained: Path, tmp_path: Path) -> None:
    unseen = write_shapes(tmp_path / "unseen", 64, seed=9)
    ranker = Ranker.from_pretrained(trained)
    captions = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    pairs = list(read_pairs(unseen))
    vectors = ranker.encode_captions(captions)
    found = ranker.encode_files([Path(pair.path) for pair in pairs]) @ vectors.T
    named = [captions[int(row.argmax())].split()[1] for row in found]
    right = [colour == pair.captions[0].split()[1] for colour, pair in zip(named, pairs, strict=True)]
    assert sum(right) >= 60, "of 64; chance is a quarter"  # the shape takes longer


def test_what_it_logs_says_how_it_goes(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if "loss_over_ln_batch" in row]
    assert training[0]["loss_over_ln_batch"] > 0.7 and training[-1]["loss_over_ln_batch"] < 0.7
    assert all(1 <= row["scale"] <= 100 for row in training)
    assert [row["step"] for row in rows if "validation_recall_picture_to_caption" in row] == [
        *range(30, 400, 30),
        400,
    ]
    assert open_image(trained / "run" / "samples" / "clip" / "step-0000400.png").width > 32


def test_micro_batches_give_the_weights_of_one_batch(data: Path, tmp_path: Path) -> None:
    settings = ("clip_training.steps=4", "clip_training.warmup_steps=1", 'clip_training.crop="center"')
    whole = run(data, tmp_path / "whole", recipe(*settings, "clip_training.batch_size=16"))
    parts = run(
        data,
        tmp_path / "parts",
        recipe(*settings, "clip_training.batch_size=4", "clip_training.accumulation=4"),
    )
    images, text = torch.rand(3, 3, 32, 32), Ranker.from_pretrained(whole).read(["a red circle"] * 3)
    first, second = (Ranker.from_pretrained(folder).clip for folder in (whole, parts))
    with torch.no_grad():
        torch.testing.assert_close(first(images, text), second(images, text), rtol=1e-3, atol=1e-3)


def test_the_same_run_twice_is_the_same_to_the_last_bit(data: Path, tmp_path: Path) -> None:
    settings = recipe("clip_training.steps=3", "clip_training.warmup_steps=1")
    first, second = (run(data, tmp_path / name, settings) for name in ("a", "b"))
    files = [folder / "clip" / "model.safetensors" for folder in (first, second)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_frozen_image_tower_does_not_move_and_the_text_tower_does(
    trained: Path, data: Path, tmp_path: Path, accumulation: int
) -> None:
    settings = ["clip_training.steps=3", "clip_training.warmup_steps=1", 'clip_training.frozen="image"']
    settings.append(f"clip_training.accumulation={accumulation}")
    out = run(data, tmp_path / "out", recipe(*settings), init_from=trained)
    before, after = (Ranker.from_pretrained(folder).clip.state_dict() for folder in (trained, out))
    for name, tensor in before.items():
        if name.startswith("visual."):
            assert torch.equal(tensor, after[name]), name
    assert not torch.equal(before["text_projection"], after["text_projection"])


def test_a_given_clip_is_trained_on_at_another_picture_size(
    trained: Path, data: Path, tmp_path: Path
) -> None:
    settings = ["clip_training.steps=2", "clip_training.warmup_steps=1", "clip_training.image_size=48"]
    out = run(data, tmp_path / "out", recipe(*settings), init_from=trained)
    assert Ranker.from_pretrained(out).clip.config.image_size == 48
    assert Ranker.from_pretrained(trained).clip.config.image_size == 32


def test_the_scale_is_never_decayed(trained: Path) -> None:
    model = Ranker.from_pretrained(trained).clip
    settings = recipe().clip_training
    assert settings is not None
    groups = OPTIMIZERS["adamw"](model, settings).param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decay[id(model.logit_scale)] == 0
    assert decay[id(model.get_parameter("visual.proj"))] > 0


def test_no_picture_comes_twice_in_an_update() -> None:
    pairs = [Pair(key=str(i), captions=("x",), split="train", fields={"okey": i // 3}) for i in range(50)]
    for balance in (None, Balance(fields=("okey",), cap=2)):
        order = Order(pairs, 0, balance, multiple=12)
        for number in range(0, 60, 3):
            members = [index for part in range(3) for _, index in order.batch(number + part, 4)]
            assert len(set(members)) == 12
    with pytest.raises(ValueError, match="an epoch has 50 pictures, an update needs 64 different ones"):
        Order(pairs, 0, None, multiple=64)


def test_few_pictures_make_smaller_updates_and_one_alone_is_an_error(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ["clip_training.steps=2", "clip_training.warmup_steps=1", "clip_training.batch_size=16"]
    few = recipe(*settings, "clip_training.accumulation=64")
    out = run(data, tmp_path / "few", few)
    assert "updates of 48, not of 1024" in caplog.text  # 56 of 64 are to train on
    assert "from 47 others at once" in caplog.text and "leaves it out" in caplog.text
    rows = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
    with pytest.raises(ValueError, match="at least 2 are needed"):
        _fitting(few.clip_training, 1)  # type: ignore[arg-type]


def test_a_share_of_the_pictures_is_seen_through_the_dvae(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage clip needs a dVAE"):
        run(data, tmp_path / "none", recipe("clip_training.reconstructed=0.5"))


def test_half_of_the_objects_is_drawn_by_hash() -> None:
    pairs = [
        Pair(key=str(i), captions=("x",), split="train", fields={"okey": f"thing {i // 2}"})
        for i in range(400)
    ]
    halves = np.array([is_even(pair, "okey") for pair in pairs]).reshape(-1, 2)
    assert (halves[:, 0] == halves[:, 1]).all()  # both pictures of a thing, or none
    assert 60 < halves[:, 0].sum() < 140


def test_a_recipe_without_clip_refuses_the_stage(data: Path, tmp_path: Path) -> None:
    plain = validate(Recipe, load_preset("tiny"), "tiny")
    with pytest.raises(ValueError, match="stage clip needs the settings clip and clip_training"):
        run(data, tmp_path / "out", plain)
    with pytest.raises(ValueError, match="clip and clip_training belong together"):
        validate(Recipe, override(load_preset("tiny"), CLIP_SETTINGS[:1]), "tiny")
