"""Presets are valid recipes, paper.toml is the paper, and a mistake in a setting is one clear line."""

from pathlib import Path

import pytest
import torch

from dalle.config import validate
from dalle.training.recipe import Recipe, load_recipe, transformer_config, with_given
from dalle.transformer import Transformer
from tests.tiny import tiny_dvae


def recipe(preset: str, *settings: str) -> Recipe:
    return load_recipe(preset, settings)


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
        ("transformer.steps=2", "transformer_training.steps"),
        ("dvae.batch_size=2", "dvae_training.batch_size"),
        ("clip.steps=2", "clip_training.steps"),
        ("transformer_training.n_layers=2", "transformer.n_layers"),
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
    settings = ("dvae_training.steps=20", "dvae_training.warmup_steps=20")
    assert "warmup_steps 20 must be below steps 20" in error_of(*settings)


@pytest.mark.parametrize(
    ("preset", "settings", "warmup"),
    [
        ("laptop", ["steps=100"], 4),  # 200 of 4500
        ("laptop", ["steps=10"], 1),
        ("laptop", ["steps=1"], 0),
        ("laptop", ["steps=9000"], 400),
        ("laptop", ["steps=100", "warmup_steps=7"], 7),
        ("laptop", ["warmup_steps=7", "steps=100"], 7),
        ("laptop", ["batch_size=2"], 200),
    ],
)
def test_a_warmup_keeps_its_share_of_the_presets_steps(preset: str, settings: list[str], warmup: int) -> None:
    changed = load_recipe(preset, [f"transformer_training.{setting}" for setting in settings])
    assert changed.transformer_training.warmup_steps == warmup
    assert changed.dvae_training == load_recipe(preset, []).dvae_training


def test_no_warmup_stays_none() -> None:
    assert load_recipe("gpu", ["dvae_training.steps=100"]).dvae_training.warmup_steps == 0


def test_steps_that_are_no_number_are_one_clear_line() -> None:
    assert 'dvae_training.steps = "many": must be an integer' in error_of("dvae_training.steps=many")


@pytest.mark.parametrize("word", ["none", "null"])
def test_the_balance_can_be_switched_off(word: str) -> None:
    assert recipe("laptop").balance is not None
    assert recipe("laptop", f"balance={word}").balance is None


@pytest.mark.parametrize(
    "setting", ["kl_weight=6.6", "kl_steps=5", "final_temperature=0.5", "temperature_steps=5"]
)
def test_settings_of_the_relaxation_are_refused_where_the_quantizer_has_none(setting: str) -> None:
    name, value = setting.split("=")
    expected = f"dvae_training.{name} is {value}, but quantizer fsq has neither temperature nor KL"
    assert expected in error_of(f"dvae_training.{setting}")


def test_a_recipe_takes_the_sizes_of_the_parts_that_are_given_and_says_so(tmp_path: Path) -> None:
    plain = recipe("tiny")
    assert with_given(plain, tmp_path) == (plain, [])
    with torch.device("meta"):
        made = transformer_config(plain.transformer, plain.dvae, 300, 32)
    Transformer(made.model_copy(update={"n_layers": 2})).save_pretrained(tmp_path / "transformer")
    tiny_dvae().save_pretrained(tmp_path / "dvae")
    found, said = with_given(recipe("tiny", "dvae.d_hidden=64"), tmp_path)
    assert found.transformer == plain.transformer.model_copy(update={"n_layers": 2})
    assert found.dvae == tiny_dvae().config and found.tokenizer == plain.tokenizer
    assert "transformer.n_layers: 4 -> 2" in said
    assert any(line.startswith("dvae.d_hidden: 64 -> ") for line in said)
