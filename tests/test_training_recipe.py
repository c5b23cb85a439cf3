"""Presets are valid recipes, paper.toml is the paper, and a mistake in a setting is one clear line."""

import pytest

from dalle.config import load_preset, override, validate
from dalle.training.recipe import Recipe, transformer_config


def recipe(preset: str, *settings: str) -> Recipe:
    return validate(Recipe, override(load_preset(preset), settings), preset)


def error_of(*settings: str) -> str:
    with pytest.raises(ValueError) as caught:
        recipe("tiny", *settings)
    assert str(caught.value).isprintable(), "one line"
    return str(caught.value)


@pytest.mark.parametrize("preset", ["tiny", "laptop", "gpu", "paper"])
def test_every_preset_is_a_valid_recipe_whose_parts_fit(preset: str) -> None:
    found = recipe(preset)
    shape = transformer_config(found.transformer, found.dvae, 1000, found.tokenizer.max_tokens)
    assert (shape.grid_size, shape.n_image_vocab) == (found.dvae.image_size // 8, found.dvae.n_codes)
    assert validate(Recipe, found.model_dump(mode="json"), "config.json") == found


def test_paper_preset_holds_the_numbers_of_the_paper() -> None:
    paper = recipe("paper")
    dvae, first = paper.dvae, paper.dvae_training
    assert (dvae.image_size, dvae.grid_size, dvae.n_codes) == (256, 32, 8192)
    assert (dvae.quantizer, dvae.trunk, dvae.likelihood, dvae.d_hidden, dvae.d_code, dvae.n_blocks) == (
        "gumbel",
        "paper",
        "logit_laplace",
        256,
        128,
        2,
    )
    assert (first.beta2, first.weight_decay, first.average_decay, first.average_every) == (
        0.999,
        1e-4,
        0.999,
        1,
    )
    assert (first.learning_rate, first.final_learning_rate, first.decay_steps) == (1e-4, 1.25e-6, 1_200_000)
    assert (first.batch_size, first.steps, first.clip_norm, first.warmup_steps) == (512, 3_000_000, None, 0)
    assert (first.final_temperature, first.temperature_steps) == (1 / 16, 150_000)
    assert (first.kl_weight, first.kl_steps) == (6.6, 5_000)

    shape, second = paper.transformer, paper.transformer_training
    assert (shape.n_layers, shape.n_heads, shape.d_head, shape.n_heads * shape.d_head) == (64, 62, 64, 3968)
    assert paper.tokenizer.max_tokens + dvae.grid_size**2 == 1280
    assert (paper.tokenizer.vocab_size, paper.tokenizer.max_tokens) == (16384, 256)
    assert (second.beta2, second.weight_decay, second.clip_norm) == (0.96, 4.5e-2, 4.0)
    assert (second.learning_rate, second.warmup_steps, second.decay) == (4.5e-4, 5_000, "plateau")
    assert second.final_learning_rate == 4.5e-4 / 2**5 == 1.40625e-5
    assert (second.batch_size * second.accumulation, second.steps) == (1024, 430_000)
    assert (second.average_decay, second.average_every) == (0.99, 25)
    assert (second.bpe_dropout, second.caption_dropout) == (0.1, 0.0)


@pytest.mark.parametrize(
    ("setting", "nearest"),
    [
        ("dvae_training.step=3", "dvae_training.steps"),
        ("transformer_training.batchsize=3", "transformer_training.batch_size"),
        ("transformer.n_head=2", "transformer.n_heads"),
        ("sampling.temprature=1", "sampling.temperature"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_one(setting: str, nearest: str) -> None:
    key = setting.split("=")[0]
    assert error_of(setting) == f"tiny: {key} is not a setting; did you mean {nearest}?"


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("dvae_training.steps=0", "dvae_training.steps = 0"),
        ("dvae_training.average_decay=1", "dvae_training.average_decay = 1"),
        ("transformer_training.decay=linear", 'transformer_training.decay = "linear"'),
        ("transformer_training.bpe_dropout=-0.1", "transformer_training.bpe_dropout = -0.1"),
        ("dvae.image_size=30", "image_size is 30; it must be a multiple of 8"),
        ("seed=-1", "seed = -1"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_key(setting: str, named: str) -> None:
    assert named in error_of(setting)


def test_a_warmup_as_long_as_the_run_is_refused() -> None:
    assert "warmup_steps 20 must be below steps 20" in error_of("dvae_training.steps=20")
