"""`train` in one process: reuse of components, stale stages, locks, data that cannot be trained on."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from dalle import files, manifest, weights
from dalle.config import load_preset, override, validate
from dalle.data.shapes import write_shapes
from dalle.data.source import Source
from dalle.dvae import DiscreteVAE, DVAEConfig
from dalle.pipeline import DallePipeline
from dalle.training import stages
from dalle.training.recipe import Recipe
from dalle.training.train import train

MICRO = [
    "tokenizer.vocab_size=280",
    "dvae.d_hidden=8",
    "dvae.d_code=8",
    "transformer.n_layers=1",
    "transformer.layers=['row']",
    "transformer.n_heads=2",
    "transformer.d_head=8",
    *(
        f"{stage}_training.{setting}"
        for stage in ("dvae", "transformer")
        for setting in ("steps=2", "warmup_steps=1", "batch_size=2", "n_validation=2", "checkpoint_every=1")
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


def run(data: Path | Source, out: Path, *settings: str, **options: Any) -> Path:
    cpu = torch.device("cpu")
    return train(data, out, recipe(*settings), device=cpu, dtype=torch.float32, quiet=True, **options)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 captioned shapes, of which 4 are held out."""
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", 16, seed=0)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two updates a stage; tests that change it take a copy."""
    return run(data, tmp_path_factory.mktemp("trained") / "model")


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


# What a run leaves behind


def test_a_finished_run_is_a_model_folder_with_everything_else_below_run(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        "README.md",
        "dvae",
        "manifest.json",
        "model_index.json",
        "run",
        "tokenizer",
        "transformer",
    }
    found = {path.name for path in (trained / "run").iterdir()}
    assert {"config.json", "metrics.jsonl", "stages.json", "checkpoints", "samples", "tokens"} <= found
    pipe = DallePipeline.from_pretrained(trained)
    assert len(pipe("a red circle").images) == 1
    assert {row["stage"] for row in rows(trained)} == {"dvae", "transformer"}
    card = (trained / "README.md").read_text()
    assert "16 captioned pictures (train 12, validation 4)" in card


def test_the_default_sampling_of_the_recipe_goes_into_the_model(data: Path, tmp_path: Path) -> None:
    out = run(data, tmp_path / "model", "sampling.guidance=2.5", "weights=bfloat16")
    assert DallePipeline.from_pretrained(out).defaults.guidance == 2.5
    stored = weights.load_tensors(out / "transformer" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_counts_of_every_split_are_said(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run(data, tmp_path / "model", stages=("tokenizer",))
    said = [record.getMessage() for record in caplog.records]
    expected = f"{data}: 16 captioned pictures (train 12, validation 4); training uses split train"
    assert expected in said


def test_stages_dvae_stops_after_the_dvae_and_the_rest_can_follow(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    run(data, out, stages=("dvae",))
    assert (out / "dvae" / "model.safetensors").is_file() and (out / "tokenizer" / "tokenizer.json").is_file()
    assert not (out / "transformer").exists() and not (out / "manifest.json").exists()
    with pytest.raises(ValueError, match=r"no model_index\.json: .* its training has not finished"):
        DallePipeline.from_pretrained(out)
    run(data, out)
    for component in ("dvae", "transformer"):
        file = f"{component}/model.safetensors"
        assert files.file_sha256(out / file) == files.file_sha256(trained / file), "as in one go"


def test_stages_transformer_without_a_dvae_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stage transformer needs a dVAE, and .* has none: add dvae to"):
        run(data, tmp_path / "model", stages=("transformer",))


def test_stages_transformer_uses_the_dvae_that_is_given(data: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "dvae", tmp_path / "given" / "dvae")
    out = run(data, tmp_path / "model", stages=("transformer",), init_from=tmp_path / "given")
    assert DallePipeline.from_pretrained(out)("a red circle").images


def test_an_unknown_stage_is_refused_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="stage 'vqgan' is unknown: choose from tokenizer, dvae, decoder, transformer, clip"
    ):
        run(data, tmp_path / "model", stages=("dvae", "vqgan"))
    assert not (tmp_path / "model").exists()


# --init-from


def test_init_from_reuses_tokenizer_and_dvae_byte_for_byte_and_continues_the_transformer(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    # At this rate a continued transformer hardly moves; one begun anew would be far away.
    slow = ("transformer_training.learning_rate=1e-9", "transformer_training.final_learning_rate=1e-9")
    out = run(data, tmp_path / "model", *slow, init_from=trained)
    reused = (
        "dvae/model.safetensors",
        "dvae/config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/config.json",
    )
    for file in reused:
        assert (out / file).read_bytes() == (trained / file).read_bytes(), file
    before = weights.load_tensors(trained / "transformer" / "model.safetensors")
    after = weights.load_tensors(out / "transformer" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {row["stage"] for row in rows(out)} == {"transformer"}
    DallePipeline.from_pretrained(out)


@pytest.mark.parametrize(
    "given",
    [
        ("tokenizer",),
        ("transformer",),
        ("tokenizer", "dvae"),
        ("tokenizer", "transformer"),
        ("dvae", "transformer"),
    ],
    ids="+".join,
)
def test_init_from_takes_any_of_the_components_and_trains_the_rest(
    given: tuple[str, ...], data: Path, trained: Path, tmp_path: Path
) -> None:
    for component in given:
        shutil.copytree(trained / component, tmp_path / "given" / component)
    slow = ("transformer_training.learning_rate=1e-9", "transformer_training.final_learning_rate=1e-9")
    out = run(data, tmp_path / "model", "seed=1", *slow, init_from=tmp_path / "given")
    DallePipeline.from_pretrained(out)
    dvae = "dvae/model.safetensors"
    assert ((out / dvae).read_bytes() == (trained / dvae).read_bytes()) is ("dvae" in given)
    assert {row["stage"] for row in rows(out)} == {"dvae", "transformer"} - (set(given) & {"dvae"})
    before, after = (
        weights.load_tensors(folder / "transformer/model.safetensors") for folder in (trained, out)
    )
    is_near = all(torch.allclose(before[name], tensor, atol=1e-6) for name, tensor in after.items())
    assert is_near is ("transformer" in given)


def test_a_given_dvae_keeps_its_digits_in_a_recipe_that_stores_bfloat16(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    out = run(data, tmp_path / "model", "weights=bfloat16", init_from=trained)
    file = "dvae/model.safetensors"
    assert (out / file).read_bytes() == (trained / file).read_bytes()


def test_a_damaged_dvae_is_not_reused(data: Path, copy: Path, tmp_path: Path) -> None:
    file = copy / "dvae" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"dvae/model\.safetensors: sha256 differs from manifest\.json"):
        run(data, tmp_path / "model", init_from=copy)


def test_init_from_with_a_dvae_alone_trains_the_rest(data: Path, tmp_path: Path) -> None:
    # As `dalle import openai-dvae` writes: a model folder with one component, of other sizes than the recipe's.
    given = tmp_path / "imported"
    torch.manual_seed(0)
    config = DVAEConfig(
        image_size=32, n_codes=16, quantizer="gumbel", trunk="paper", d_hidden=8, d_code=8, n_blocks=1
    )
    DiscreteVAE(config).save_pretrained(given / "dvae")
    files.write_json(given / "model_index.json", {"components": {"dvae": "DiscreteVAE"}})
    manifest.write_manifest(given)
    out = run(data, tmp_path / "model", init_from=given)
    file = "dvae/model.safetensors"
    assert (out / file).read_bytes() == (given / file).read_bytes()
    pipe = DallePipeline.from_pretrained(out)
    assert pipe.transformer.config.n_image_vocab == 16
    assert {row["stage"] for row in rows(out)} == {"transformer"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("missing", "no such folder"), ("empty", "holds no tokenizer, dvae, transformer or clip")],
)
def test_init_from_a_folder_without_components_is_refused(
    data: Path, tmp_path: Path, name: str, expected: str
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"--init-from .*{name}: {expected}"):
        run(data, tmp_path / "model", init_from=tmp_path / name)


def test_init_from_parts_that_do_not_fit_is_refused(data: Path, trained: Path, tmp_path: Path) -> None:
    given = tmp_path / "given"
    shutil.copytree(trained / "transformer", given / "transformer")  # without its tokenizer
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ .*the transformer was made for"):
        run(data, tmp_path / "other-tokenizer", "tokenizer.vocab_size=270", init_from=given)
    with pytest.raises(ValueError, match="the dVAE has 27 codes; the transformer was made for 64"):
        run(data, tmp_path / "other-dvae", "dvae.n_codes=27", "dvae.fsq_levels=[3,3,3]", init_from=given)
    for name in ("other-tokenizer", "other-dvae"):
        assert not (tmp_path / name / "run" / "checkpoints").exists(), "said before a dVAE is trained"


def test_a_model_is_not_overwritten_by_another(data: Path, trained: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(trained, model, ignore=shutil.ignore_patterns("run"))
    before = files.file_sha256(model / "transformer" / "model.safetensors")
    with pytest.raises(ValueError, match="holds a model that was not trained there: choose another --out"):
        run(data, model)
    with pytest.raises(ValueError, match="is --out as well, and would be overwritten: choose another --out"):
        run(data, model, init_from=model)
    assert files.file_sha256(model / "transformer" / "model.safetensors") == before
    DallePipeline.from_pretrained(model)


# Stale stages, other settings, locks


def test_a_replaced_dvae_makes_its_stage_stale(data: Path, copy: Path) -> None:
    file = copy / "dvae" / "model.safetensors"
    tensors = weights.load_tensors(file)
    weights.save_tensors(file, {name: tensor + 1 for name, tensor in tensors.items()})
    with pytest.raises(
        ValueError, match=r"stage dvae in .* is stale .*not what the stage wrote.*: delete"
    ) as caught:
        run(data, copy)
    assert str(caught.value).isprintable()


def test_a_dvae_that_is_trained_anew_makes_the_transformer_stale(data: Path, copy: Path) -> None:
    records = files.read_json(copy / "run" / "stages.json")
    records["transformer"]["inputs"]["dvae"] = "0" * 64
    files.write_json(copy / "run" / "stages.json", records)
    with pytest.raises(ValueError, match=r"stage transformer in .* is stale \(dvae: "):
        run(data, copy)


def forget(out: Path, stage: str) -> None:
    """Does what the error about a stale stage says."""
    shutil.rmtree(out / stage)
    shutil.rmtree(out / "run" / "checkpoints" / stage)
    records = files.read_json(out / "run" / "stages.json")
    del records[stage]
    files.write_json(out / "run" / "stages.json", records)


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_dvae_trained_anew_as_told_makes_the_transformer_stale_half_trained_or_finished(
    is_finished: bool, data: Path, copy: Path
) -> None:
    slower = "dvae_training.learning_rate=1e-4"  # stands for a GPU, where no two runs are alike
    config = files.read_json(copy / "run" / "config.json")
    config["recipe"] = recipe(slower).identity()
    files.write_json(copy / "run" / "config.json", config)
    if not is_finished:  # as a kill before the last stage's end leaves it
        records = files.read_json(copy / "run" / "stages.json")
        del records["transformer"]
        files.write_json(copy / "run" / "stages.json", records)
    forget(copy, "dvae")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"stage transformer in .* is stale \(dvae: "):
            run(data, copy, slower)
    with pytest.raises(ValueError, match="training has not finished"):
        DallePipeline.from_pretrained(copy)
    if is_finished:
        forget(copy, "transformer")
    else:
        shutil.rmtree(copy / "run" / "checkpoints" / "transformer")
    DallePipeline.from_pretrained(run(data, copy, slower))


def test_another_setting_and_other_data_are_named_on_resume(data: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"recipe\.dvae_training\.steps: 2 -> 3"):
        run(data, copy, "dvae_training.steps=3")
    other = write_shapes(tmp_path / "other", 16, seed=1)
    with pytest.raises(
        ValueError, match=r"the data have changed since .*/run was begun: 16 pictures changed"
    ):
        run(other, copy)


def test_a_second_run_in_the_same_folder_is_refused_and_the_lock_is_released_after_an_error(
    data: Path, copy: Path
) -> None:
    with FileLock(copy / "run" / "lock"), pytest.raises(ValueError, match="another run is training in this"):
        run(data, copy)
    with pytest.raises(ValueError, match="seed: 0 -> 5"):
        run(data, copy, "seed=5")
    assert run(data, copy) == copy


# Data that cannot be trained on


def table(folder: Path, splits: list[str]) -> Path:
    """Shapes whose splits a metadata.jsonl names."""
    write_shapes(folder, len(splits), seed=0)
    lines = [
        json.dumps({"file_name": f"{index:06d}.png", "text": "a circle", "split": name})
        for index, name in enumerate(splits)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize(
    ("splits", "found"),
    [
        (["train"] * 4, "found train 4"),
        (["validation"] * 4, "found validation 4"),
        (["train"] * 3 + ["excluded"], "found excluded 1, train 3"),
    ],
)
def test_data_without_training_or_held_out_pictures_are_refused(
    tmp_path: Path, splits: list[str], found: str
) -> None:
    source = table(tmp_path / "data", splits)
    with pytest.raises(
        ValueError, match="training needs pictures of split train and some held out"
    ) as caught:
        run(source, tmp_path / "model")
    assert str(caught.value).endswith(found)


def test_without_a_validation_split_other_held_out_pictures_are_looked_at(tmp_path: Path) -> None:
    source = table(tmp_path / "data", ["train"] * 6 + ["test"] * 2 + ["excluded"])
    out = run(source, tmp_path / "model", stages=("dvae",))
    assert any("validation_psnr" in row for row in rows(out))


def test_held_out_pictures_that_cannot_be_read_are_one_clear_error(trained: Path, tmp_path: Path) -> None:
    source = table(tmp_path / "data", ["train"] * 6 + ["validation"])
    (source / "000006.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"needs pictures of split train and some held out; found train 6"):
        run(source, tmp_path / "model", init_from=trained)


def test_a_flipped_byte_in_the_tokens_of_a_begun_run_is_refused(data: Path, copy: Path) -> None:
    records = files.read_json(copy / "run" / "stages.json")
    del records["transformer"]
    files.write_json(copy / "run" / "stages.json", records)
    shutil.rmtree(copy / "transformer")
    shutil.rmtree(copy / "run" / "checkpoints" / "transformer", ignore_errors=True)
    (shard,) = (copy / "run" / "tokens").glob("*/tokens-00000.npy")
    tokens = bytearray(shard.read_bytes())
    tokens[-3] ^= 1
    shard.write_bytes(tokens)
    with pytest.raises(ValueError, match=r"tokens-00000\.npy is not what was written: its sha256 differs"):
        run(data, copy)
    shard.unlink()  # as the error says
    (shard.parent / "progress-00000.json").unlink()
    assert DallePipeline.from_pretrained(run(data, copy))


def test_encoding_says_how_far_it_is(
    data: Path,
    trained: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stages, "LINE_SECONDS", 0.0)
    cpu = torch.device("cpu")
    with caplog.at_level(logging.INFO):
        train(str(data), tmp_path / "m", recipe(), init_from=trained, device=cpu, dtype=torch.float32)
    said = [record.getMessage() for record in caplog.records]
    assert any(message.startswith("encoding: 16/16 pictures  ETA 1 second") for message in said)


def test_bad_samples_are_listed_and_more_than_five_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_shapes(tmp_path / "data", 16, seed=0)
    (source / "orphan.txt").write_text("no picture beside this caption")
    with caplog.at_level(logging.WARNING):
        run(source, tmp_path / "model", stages=("tokenizer",))
    assert any("1 bad samples are left out; see run/bad_samples" in r.getMessage() for r in caplog.records)
    assert "orphan" in (tmp_path / "model" / "run" / "bad_samples.jsonl").read_text()
    for number in range(4):
        (source / f"{number}.txt").write_text("no picture beside this caption")
    (source / "000003.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"6 of 21 samples are bad; at most max\(5, 1\.0%\)") as caught:
        run(source, tmp_path / "other", stages=("tokenizer",))
    listed = (tmp_path / "other" / "run" / "bad_samples.jsonl").read_text().splitlines()
    assert "run/bad_samples.jsonl" in str(caught.value) and len(listed) == 6, "all of them at once"
    skipping = Source((str(source),), skip_bad=True)
    run(skipping, tmp_path / "other", stages=("tokenizer",))
    for suffix in ("png", "txt"):
        (source / f"000003.{suffix}").unlink()
    assert run(source, tmp_path / "other", stages=("tokenizer",)), "without the unreadable one it goes on"


# The paper's dVAE


def test_a_run_with_the_papers_dvae_and_schedules_finishes(data: Path, tmp_path: Path) -> None:
    paper = (
        "dvae.quantizer=gumbel",
        "dvae.fsq_levels=[]",
        "dvae.trunk=paper",
        "dvae.likelihood=logit_laplace",
        "dvae_training.crop=paper",
        "dvae_training.kl_weight=6.6",
        "dvae_training.kl_steps=2",
        "dvae_training.temperature_steps=2",
        "transformer_training.crop=paper",
        "transformer_training.decay=plateau",
    )
    out = run(data, tmp_path / "model", *paper)
    pipe = DallePipeline.from_pretrained(out)
    assert pipe.dvae.config.quantizer == "gumbel" and pipe.dvae.config.trunk == "paper"
    last = [row for row in rows(out) if row["stage"] == "dvae" and "kl" in row][-1]
    assert last["step"] == 2 and last["kl"] >= 0
    assert len(pipe("a red circle").images) == 1
