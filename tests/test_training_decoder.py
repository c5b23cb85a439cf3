"""Stage decoder: a frozen encoder, targets at the size that is drawn, wrong tokens that do not move the target."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle import images, weights
from dalle.config import load_preset, override, validate
from dalle.data.pairs import read_pairs
from dalle.data.reading import BadSampleLog
from dalle.data.shapes import write_shapes
from dalle.dvae import DiscreteVAE, DVAEConfig
from dalle.files import file_sha256
from dalle.pipeline import DallePipeline
from dalle.training.decoder import DecoderStage
from dalle.training.recipe import Recipe
from dalle.training.train import train

MICRO = [
    "tokenizer.vocab_size=280",
    "dvae.d_hidden=8",
    "dvae.d_code=8",
    "dvae.output_size=64",
    "dvae.decoder_widths=[16, 16, 8]",
    "transformer.n_layers=1",
    "transformer.layers=['row']",
    "transformer.n_heads=2",
    "transformer.d_head=8",
    "decoder_training.crop=center",
    "decoder_training.learning_rate=3e-3",
    "decoder_training.final_learning_rate=1e-3",
    "decoder_training.weight_decay=0",
    "decoder_training.average_decay=0.5",
    *(
        f"{stage}_training.{setting}"
        for stage in ("dvae", "decoder", "transformer")
        for setting in (
            "steps=2",
            "warmup_steps=1",
            "batch_size=4",
            "n_validation=4",
            "checkpoint_every=1",
            "validate_every=2",
            "sheet_every=2",
        )
    ),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread, and wait long for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(*settings: str) -> Recipe:
    return validate(Recipe, override(load_preset("tiny"), [*MICRO, *settings]), "micro")


def run(data: Path, out: Path, *settings: str, **options: Any) -> Path:
    cpu = torch.device("cpu")
    return train(str(data), out, recipe(*settings), device=cpu, dtype=torch.float32, quiet=True, **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 captioned shapes at 64 px, of which 4 are held out."""
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", 16, seed=0, size=64)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two updates a stage."""
    return run(data, tmp_path_factory.mktemp("trained") / "model")


def stage(data: Path, *settings: str) -> DecoderStage:
    found = recipe(*settings)
    assert found.decoder_training is not None
    pairs = read_pairs(data)
    torch.manual_seed(0)
    return DecoderStage(
        DiscreteVAE(found.dvae),
        found.decoder_training,
        list(pairs.of_split("train")),
        list(pairs.of_split("validation")),
        BadSampleLog(data.parent / "bad_samples.jsonl", total=16),
        seed=0,
        balance=None,
    )


@pytest.mark.parametrize("crop", ["center", "shift"])
def test_batches_depend_on_the_number_only_and_tokens_are_those_of_the_pictures(
    data: Path, crop: str
) -> None:
    one, other = (stage(data, f"decoder_training.crop={crop}") for _ in range(2))
    in_order = [one.batch(number) for number in range(5)]
    for number in (4, 0, 2):
        tokens, pictures = other.batch(number)
        assert torch.equal(tokens, in_order[number][0]) and torch.equal(pictures, in_order[number][1])
    assert pictures.shape == (4, 3, 64, 64)
    assert torch.equal(tokens, one.dvae.encode(images.box_filtered(pictures, 32)))


def test_wrong_tokens_are_another_pictures_at_the_same_place_and_the_target_stays(data: Path) -> None:
    tokens, pictures = stage(data).batch(1)
    noisy, same = stage(data, "decoder_training.token_noise=0.4").batch(1)
    assert torch.equal(pictures, same)
    is_wrong = noisy != tokens
    assert 0 < float(is_wrong.float().mean()) < 0.5
    assert bool((noisy[:, None] == tokens[None]).any(dim=1).all()), (
        "each is some picture's token at that place"
    )


def test_the_loss_falls_and_moves_the_decoder_alone(data: Path) -> None:
    one = stage(data, "decoder_training.feature_weight=0.1")
    before = {name: tensor.clone() for name, tensor in one.dvae.state_dict().items()}
    optimizer = torch.optim.Adam(one.model.parameters(), lr=3e-3)
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        loss, metrics = one.loss(one.batch(0), step, step)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
        total = metrics["l1"] + metrics["mse"] + 0.1 * metrics["feature_distance"]
        assert losses[-1] == pytest.approx(float(total))
    assert losses[-1] < 0.8 * losses[0]
    changed = {
        name for name, tensor in one.dvae.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed and all(name.startswith("decoder.") for name in changed)


def test_two_phases_make_one_model_that_draws_at_its_size(data: Path, trained: Path) -> None:
    pipe = DallePipeline.from_pretrained(trained)
    assert pipe("a red circle").images[0].size == (64, 64)
    tokens = weights.load_tensors(trained / "run" / "dvae" / "model.safetensors")
    whole = weights.load_tensors(trained / "dvae" / "model.safetensors")
    encoder = [name for name in tokens if name.startswith("encoder.")]
    assert encoder and all(torch.equal(tokens[name], whole[name]) for name in encoder)
    validations = [
        row
        for row in map(json.loads, (trained / "run" / "metrics.jsonl").read_text().splitlines())
        if row["stage"] == "decoder" and "validation_psnr" in row
    ]
    assert [row["step"] for row in validations] == [2] and "validation_output_psnr" in validations[0]
    assert (trained / "run" / "samples" / "decoder" / "step-0000002.png").is_file()
    assert "32 px -> 4x4 tokens of 64 (fsq), drawn at 64 px" in (trained / "README.md").read_text()


def test_a_model_is_given_another_decoder_and_nothing_else(data: Path, trained: Path, tmp_path: Path) -> None:
    given = Path(shutil.copytree(trained, tmp_path / "given"))
    sizes = ("dvae.decoder_widths=[8, 8, 8]", "sampling.guidance=3.0")
    out = run(data, tmp_path / "out", *sizes, init_from=given, stages=("decoder",))
    for file in ("tokenizer/tokenizer.json", "transformer/model.safetensors", "transformer/config.json"):
        assert (out / file).read_bytes() == (given / file).read_bytes()
    before, after = DallePipeline.from_pretrained(given), DallePipeline.from_pretrained(out)
    assert after.dvae.config.decoder_widths == (8, 8, 8) and after.defaults == before.defaults
    assert torch.equal(before("a red circle", seed=3).tokens, after("a red circle", seed=3).tokens)
    manifest = (out / "manifest.json").read_bytes()
    run(data, out, *sizes, init_from=given, stages=("decoder",))
    assert (out / "manifest.json").read_bytes() == manifest, "a finished run is left alone"


def test_a_dvae_that_is_given_keeps_its_decoder_unless_it_has_other_sizes(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    given = tmp_path / "given"
    shutil.copytree(trained / "dvae", given / "dvae")
    same = run(data, tmp_path / "same", init_from=given, stages=("tokenizer", "dvae", "decoder"))
    assert (same / "dvae" / "model.safetensors").read_bytes() == (
        given / "dvae" / "model.safetensors"
    ).read_bytes()
    only = run(data, tmp_path / "only", init_from=given, stages=("transformer",))
    assert DallePipeline.from_pretrained(only)("a red circle").images[0].size == (64, 64)
    wider = ["dvae.decoder_widths=[24, 16, 8]"]
    other = run(data, tmp_path / "other", *wider, init_from=given, stages=("tokenizer", "dvae", "decoder"))
    assert DiscreteVAE.from_pretrained(other / "dvae").config.decoder_widths == (24, 16, 8)


def test_the_encoder_is_stored_as_it_was_given_when_weights_are_rounded(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    out = run(data, tmp_path / "out", "weights=bfloat16", init_from=trained, stages=("decoder",))
    stored = weights.load_tensors(out / "dvae" / "model.safetensors")
    given = weights.load_tensors(trained / "dvae" / "model.safetensors")
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if name.startswith("encoder.") else torch.bfloat16)
        if name.startswith("encoder."):
            assert torch.equal(tensor, given[name])


def test_wrong_tokens_may_be_the_given_transformers_and_a_given_decoder_is_trained_on(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    settings = ("decoder_training.replaced_by=transformer", "decoder_training.token_noise=0.2")
    out = run(data, tmp_path / "out", *settings, init_from=trained, stages=("decoder",))
    record = json.loads((out / "run" / "stages.json").read_text())["decoder"]
    assert record["inputs"]["transformer"] == file_sha256(trained / "transformer" / "model.safetensors")
    old, new, other = (
        weights.load_tensors(folder / "dvae" / "model.safetensors")["decoder.blocks.output.w"]
        for folder in (
            trained,
            out,
            run(data, tmp_path / "x", *settings[1:], "seed=5", stages=("dvae", "decoder")),
        )
    )
    assert 0 < float((new - old).abs().mean()) < 0.2 * float((other - old).abs().mean())
    with pytest.raises(ValueError, match="replaced_by is transformer, and none is given"):
        run(data, tmp_path / "none", *settings, stages=("dvae", "decoder"))


def test_a_decoder_that_does_not_fit_is_refused_in_one_line(data: Path, tmp_path: Path) -> None:
    for settings, message in (
        (["dvae.trunk=paper"], "belong to trunk light"),
        (["dvae.output_size=48"], "draws 32 or 64 or 128"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe(*settings)
    tree = load_preset("tiny")
    with pytest.raises(ValueError, match="needs the settings decoder_training"):
        validate(Recipe, override(tree, ["dvae.output_size=64"]), "tiny")
    with pytest.raises(ValueError, match="stage decoder needs the settings decoder_training"):
        without = validate(Recipe, tree, "tiny")
        cpu = torch.device("cpu")
        train(str(data), tmp_path / "a", without, stages=("decoder",), device=cpu, dtype=torch.float32)
    with pytest.raises(ValueError, match="stage decoder needs a dVAE"):
        run(data, tmp_path / "b", stages=("decoder",))
    paper = validate(DVAEConfig, {**recipe().dvae.mirrored().model_dump(), "trunk": "paper"}, "here")
    DiscreteVAE(paper).save_pretrained(tmp_path / "given" / "dvae")
    with pytest.raises(ValueError, match="stage decoder needs the settings decoder_training"):
        run(data, tmp_path / "c", init_from=tmp_path / "given", stages=("decoder",))
