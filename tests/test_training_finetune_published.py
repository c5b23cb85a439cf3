"""Published models are fine-tuned, whole or by adapters: only what should changes, and a killed run loses nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dalle import weights
from dalle.data.pairs import read_pairs
from dalle.data.shapes import write_shapes
from dalle.files import file_sha256
from dalle.images import center_crop, to_tensor
from dalle.manifest import VerifiedFolder
from dalle.pipeline import DallePipeline
from dalle.published.min_dalle import MinDalle, MinDalleConfig
from dalle.published.vqgan import VQGAN
from dalle.training.finetune_published import ADAPTER, finetune_published, is_for
from dalle.transformer import Transformer
from tests.test_end_to_end import n_right_colours
from tests.test_training_published import learn_autoencoder
from tests.tiny import tiny_pipe, tiny_tokenizer, tiny_transformer
from tests.tiny_published import (
    TOKEN_MODELS,
    caption_tokenizer,
    one_thread,  # noqa: F401 - every test here runs under it
    published_pipe,
    tiny_vqgan,
)

SHORT = (
    "transformer_training.steps=6",
    "transformer_training.validate_every=3",
    "transformer_training.checkpoint_every=2",
)
SHORT += ("transformer_training.batch_size=4", "transformer_training.learning_rate=1e-2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(folder, 8, seed=0)
    return folder


def run(data: Path, out: Path, base: Path, rank: int | None, *settings: str) -> Path:
    chosen = settings or SHORT
    cpu = torch.device("cpu")
    return finetune_published(
        str(data),
        out,
        base,
        name=base.name,
        rank=rank,
        settings=chosen,
        device=cpu,
        dtype=torch.float32,
        quiet=True,
    )


@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_adapters_change_linear_maps_alone_and_are_small(name: str, data: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    published_pipe(name).save_pretrained(base)
    hashes = {path: file_sha256(path) for path in base.rglob("*") if path.is_file()}
    out = run(data, tmp_path / "out", base, 2)
    VerifiedFolder(out)
    assert {path: file_sha256(path) for path in base.rglob("*") if path.is_file()} == hashes
    before, after = (
        weights.load_tensors(folder / "transformer" / "model.safetensors") for folder in (base, out)
    )
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    adapters = weights.load_tensors(out / ADAPTER)
    adapted = {key.partition("/lora_")[0].replace("/", ".") + ".weight" for key in adapters}
    assert changed == adapted and not any("head" in key for key in changed)
    for key in changed:
        assert torch.linalg.matrix_rank((after[key] - before[key]).double(), rtol=1e-4) <= 2, key
    assert DallePipeline.from_pretrained(out, dtype="float32")("red circle").images[0].size == (32, 32)


def test_without_adapters_all_weights_are_trained_and_kept_in_their_dtype(data: Path, tmp_path: Path) -> None:
    pipe = published_pipe("minDALL-E")
    pipe.to("cpu", "bfloat16")
    pipe.save_pretrained(tmp_path / "base")
    out = run(data, tmp_path / "out", tmp_path / "base", None)
    before, after = (
        weights.load_tensors(folder / "transformer" / "model.safetensors")
        for folder in (tmp_path / "base", out)
    )
    assert all(tensor.dtype == torch.bfloat16 for tensor in after.values())
    assert not torch.equal(before["image_head.weight"], after["image_head.weight"])
    assert not (out / ADAPTER).exists()


@pytest.mark.parametrize("rank", [None, 2])
def test_our_own_transformer_on_a_vqgan_is_fine_tuned_too(
    rank: int | None, data: Path, tmp_path: Path
) -> None:
    tokenizer, base = tiny_tokenizer(["a red circle", "a blue square"]), tmp_path / "base"
    DallePipeline(tokenizer, tiny_vqgan(), tiny_transformer(tokenizer.n_vocab)).save_pretrained(base)
    assert is_for(base, rank)
    pipe = DallePipeline.from_pretrained(run(data, tmp_path / "out", base, rank))
    assert isinstance(pipe.transformer, Transformer) and isinstance(pipe.dvae, VQGAN)
    tiny_pipe(["a red circle"]).save_pretrained(tmp_path / "ours")
    assert not is_for(tmp_path / "ours", None) and is_for(tmp_path / "ours", 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("transformer_training.dropout=0.1",), "are of our own transformer: leave them out"),
        (("dvae.n_codes=3",), "dvae is not a setting here"),
        (("transformer_training.epochs=0",), "must be a number above 0"),
    ],
)
def test_settings_that_have_no_effect_are_refused(
    settings: tuple[str, ...], message: str, data: Path, tmp_path: Path
) -> None:
    published_pipe("min-dalle").save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path / "out", tmp_path / "base", 2, *settings)


def test_a_resume_with_another_rank_is_refused(data: Path, tmp_path: Path) -> None:
    published_pipe("min-dalle").save_pretrained(tmp_path / "base")
    run(data, tmp_path / "out", tmp_path / "base", 2)
    with pytest.raises(ValueError, match=r"begun with other settings or data \(lora: 2 -> 3"):
        run(data, tmp_path / "out", tmp_path / "base", 3)


DYING = """
import os, signal, sys
import dalle.training.loop as loop
from dalle.cli import main

step = int(sys.argv.pop(1))
update = loop.update
def dying(current, optimizer, plateau, progress, *rest):
    result = update(current, optimizer, plateau, progress, *rest)
    if progress.step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
loop.update = dying
main()
"""


def test_a_killed_run_goes_on_to_the_same_bits(data: Path, tmp_path: Path) -> None:
    """By SIGKILL, in a process of its own, by the command line."""
    base, out = tmp_path / "base", tmp_path / "out"
    published_pipe("min-dalle").save_pretrained(base)
    whole = run(data, tmp_path / "whole", base, 2)
    command = [
        sys.executable,
        "-c",
        DYING,
        "3",
        "finetune",
        str(data),
        "--from",
        str(base),
        "--out",
        str(out),
    ]
    command += [
        "--lora",
        "2",
        "--dtype",
        "float32",
        *(part for setting in SHORT for part in ("--set", setting)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    died = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (out / "manifest.json").exists()
    run(data, out, base, 2)
    for file in ("transformer/model.safetensors", ADAPTER):
        one, other = weights.load_tensors(out / file), weights.load_tensors(whole / file)
        assert all(torch.equal(one[key], other[key]) for key in other), file


@pytest.mark.long
def test_adapters_of_a_random_min_dalle_learn_the_colours_of_shapes(tmp_path: Path) -> None:
    write_shapes(tmp_path / "data", 64, seed=0)
    pictures = to_tensor([center_crop(pair.open(), 32) for pair in read_pairs(str(tmp_path / "data"))])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vqgan = VQGAN(tiny_vqgan(attention_sizes=()).config)
        config = {
            "n_layers": 3,
            "n_heads": 4,
            "d_model": 64,
            "d_gated": 128,
            "n_text_tokens": 8,
            "n_text_vocab": 60,
        }
        config |= {"n_image_vocab": 64, "n_image_ids": 65, "grid_size": 4, "start_token": 64}
        model = MinDalle(MinDalleConfig.model_validate(config)).eval()
        with torch.no_grad():
            model.image_head.weight *= 8  # frozen: it must be able to be sure of a token
    learn_autoencoder(vqgan, pictures)
    DallePipeline(caption_tokenizer(1), vqgan.eval(), model).save_pretrained(tmp_path / "base")
    table = {"epochs": 120, "patience": "none", "learning_rate": 1e-2, "caption_dropout": 0}
    settings = [f"transformer_training.{key}={value}" for key, value in table.items()]
    out = run(tmp_path / "data", tmp_path / "out", tmp_path / "base", 8, *settings)
    assert n_right_colours(out) >= 28
