"""`finetune`: a finished model goes on from its own weights, and loses nothing that it had."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from dalle import files, images, weights
from dalle.config import load_preset, override, validate
from dalle.data.shapes import write_shapes
from dalle.dvae import DiscreteVAE, DVAEConfig
from dalle.generation.request import ModelDefaults
from dalle.model_folder import write_index
from dalle.pipeline import DallePipeline
from dalle.training.finetune import DEFAULTS, finetune, is_worth_training, own_psnr, recipe_for
from dalle.training.recipe import Recipe
from dalle.training.train import train
from tests.test_training_clip import CLIP_SETTINGS
from tests.test_training_train import MICRO, rows

SHORT = (
    "dvae_training.epochs=2",
    "transformer_training.epochs=3",
    "transformer_training.n_encodings=2",
    "clip_training.epochs=2",
    "dvae_training.batch_size=4",
    "transformer_training.batch_size=4",
)
SHORT_WITHOUT_CLIP = tuple(setting for setting in SHORT if not setting.startswith("clip"))
CARD = """---
license: apache-2.0
tags: [tiny]
---
# Base

Draws shapes.

## Figures

Not inherited.

## Data and licences

By A. Painter, CC-BY-4.0.

### Detail

More of it.
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread, and wait long for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 captioned shapes, of which 6 are held out."""
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", 24, seed=0)


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a CLIP, a judge and a card, as the Hub would give it: without its run."""
    clip = [*CLIP_SETTINGS, "clip_training.steps=2", "clip_training.warmup_steps=1"]
    settings = [*MICRO, *clip, "weights=bfloat16", "sampling.guidance=2.5"]
    recipe = validate(Recipe, override(load_preset("tiny"), settings), "base")
    out = tmp_path_factory.mktemp("base") / "model"
    train(str(data), out, recipe, device=torch.device("cpu"), dtype=torch.float32, quiet=True)
    shutil.rmtree(out / "run")
    shutil.copytree(out / "clip", out / "judge")
    (out / "README.md").write_text(CARD)
    (out / "LICENSE").write_text("the licence")
    write_index(out, recipe.sampling)
    return out


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def run(data: Path, out: Path, base: Path, *settings: str, name: str = "owner/base") -> Path:
    cpu = torch.device("cpu")
    return finetune(
        str(data),
        out,
        base,
        name=name,
        settings=[*(SHORT if (base / "clip").is_dir() else SHORT_WITHOUT_CLIP), *settings],
        device=cpu,
        dtype=torch.float32,
        quiet=True,
    )


@pytest.fixture(scope="module")
def tuned(data: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(data, tmp_path_factory.mktemp("tuned") / "model", base)


def without_clip(base: Path) -> Path:
    """The same model without its CLIPs, whose settings do not concern it."""
    for name in ("clip", "judge"):
        shutil.rmtree(base / name)
    write_index(base, ModelDefaults())
    return base


def same(one: Path, other: Path, file: str) -> bool:
    return (one / file).read_bytes() == (other / file).read_bytes()


# What becomes of the components


def test_all_components_go_on_and_what_is_not_trained_is_kept(base: Path, tuned: Path) -> None:
    for file in ("tokenizer/tokenizer.json", "judge/model.safetensors", "judge/config.json"):
        assert same(base, tuned, file), file
    for component in ("dvae", "transformer", "clip"):
        assert same(base, tuned, f"{component}/config.json"), component
        before, after = (
            weights.load_tensors(folder / component / "model.safetensors") for folder in (base, tuned)
        )
        assert before.keys() == after.keys()
        assert {tensor.dtype for tensor in after.values()} == {tensor.dtype for tensor in before.values()}
    pipe = DallePipeline.from_pretrained(tuned)
    assert pipe.defaults.guidance == 2.5 and pipe.ranker is not None and pipe.load_judge() is not None
    assert len(pipe("a red circle").images) == 1
    assert {row["stage"] for row in rows(tuned)} == {"dvae", "transformer", "clip"}


def test_the_dvae_gets_better_at_the_new_pictures_and_the_transformer_reads_its_tokens(
    data: Path, base: Path, tmp_path: Path
) -> None:
    out = run(data, tmp_path / "model", without_clip(Path(shutil.copytree(base, tmp_path / "base"))), *LEARNS)
    figures = files.read_json(out / "finetune.json")
    assert figures["dvae"]["psnr_after"] > figures["dvae"]["psnr_before"] + 1
    assert figures["transformer"]["image_loss_after"] < figures["transformer"]["image_loss_before"]
    validated = [row["validation_psnr"] for row in rows(out) if "validation_psnr" in row]
    assert max(validated) == pytest.approx(figures["dvae"]["psnr_after"])


LEARNS = (
    "dvae_training.epochs=40",
    "dvae_training.learning_rate=3e-3",
    "transformer_training.epochs=10",
    "transformer_training.learning_rate=3e-3",
)


def test_a_dvae_that_shows_the_pictures_as_well_as_its_own_is_kept_byte_for_byte(
    data: Path, copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files.write_json(copy / "evaluation.json", {"dvae": {"psnr": 3.0}})
    with caplog.at_level("INFO"):
        out = run(data, tmp_path / "model", copy)
    assert same(copy, out, "dvae/model.safetensors")
    assert {row["stage"] for row in rows(out)} == {"transformer", "clip"}
    said = [message for message in caplog.messages if message.startswith("PSNR of your pictures")]
    psnr = files.read_json(out / "finetune.json")["dvae"]["psnr_given"]
    assert said == [
        f"PSNR of your pictures through this dVAE: {psnr:.1f} dB (3.0 on its own); it is kept as it is"
    ]
    assert not files.read_json(out / "finetune.json")["dvae"]["is_trained"]


@pytest.mark.parametrize(
    ("psnr", "own", "expected"),
    [(15.6, 23.1, True), (22.9, 23.1, False), (30.0, None, True), (25.0, 23.1, False)],
)
def test_a_dvae_is_trained_on_where_it_is_clearly_worse_than_on_its_own_or_nobody_knows(
    psnr: float, own: float | None, expected: bool
) -> None:
    assert is_worth_training(psnr, own) is expected


def test_a_dvaes_own_psnr_is_read_from_what_evaluate_finetune_or_train_left(copy: Path, tuned: Path) -> None:
    assert own_psnr(copy) is None
    after = files.read_json(tuned / "finetune.json")["dvae"]["psnr_after"]
    assert own_psnr(tuned) == round(after, 2)
    files.write_bytes(
        copy / "run" / "metrics.jsonl",
        b'{"stage": "dvae", "step": 1, "validation_psnr": 20.0}\n{"stage": "dvae", "step": 2, "validation_psnr": 21.0}\n',
    )
    assert own_psnr(copy) == 21.0
    files.write_json(copy / "evaluation.json", {"dvae": {"psnr": 23.13}})
    assert own_psnr(copy) == 23.13
    files.write_json(copy / "report.json", {"image_tokenizer": {"psnr": 24.5}})
    assert own_psnr(copy) == 24.5


def test_a_model_without_a_clip_goes_on_and_has_none(data: Path, copy: Path, tmp_path: Path) -> None:
    out = run(data, tmp_path / "model", without_clip(copy))
    assert DallePipeline.from_pretrained(out).ranker is None
    with pytest.raises(ValueError, match="clip_training has no effect: the given model has no CLIP"):
        run(data, tmp_path / "other", copy, "clip_training.epochs=3")


def test_a_decoder_that_draws_more_pixels_than_the_encoder_reads_goes_on(
    data: Path, copy: Path, tmp_path: Path
) -> None:
    config = files.read_json(copy / "dvae" / "config.json") | {
        "output_size": 64,
        "decoder_widths": [16, 8, 8],
    }
    torch.manual_seed(0)
    DiscreteVAE(validate(DVAEConfig, config, "test")).save_pretrained(copy / "dvae")
    write_index(copy, ModelDefaults())
    out = run(data, tmp_path / "model", copy)
    assert files.read_json(out / "dvae" / "config.json")["output_size"] == 64
    assert DallePipeline.from_pretrained(out)("a red circle").images[0].size == (64, 64)
    assert "dvae" in {row["stage"] for row in rows(out)}


# Settings and lengths


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "transformer.n_layers=2",
            r"the given transformer cannot be changed \(transformer\.n_layers: 1 -> 2\)",
        ),
        ("dvae.n_codes=27", r"the given dvae cannot be changed \(dvae\.n_codes: 64 -> 27\)"),
        ("tokenizer.vocab_size=300", "the given tokenizer cannot be changed"),
        ("clip.d_embed=8", "the given clip cannot be changed"),
        ("transformer_training.epochs=0", "transformer_training.epochs is 0: it must be a number above 0"),
        ("transformer_training.stepz=3", "transformer_training.stepz is not a setting"),
    ],
)
def test_settings_that_contradict_the_given_model_are_refused(
    base: Path, data: Path, tmp_path: Path, setting: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path / "model", base, setting)
    assert not (tmp_path / "model" / "run" / "config.json").exists()


def test_lengths_are_epochs_and_warm_up_and_validations_follow_them(base: Path) -> None:
    recipe = recipe_for(base, 160, ["transformer_training.epochs=30"])
    training = recipe.transformer_training
    assert training.steps == 30 * 160 / training.batch_size == 75
    assert (training.warmup_steps, training.validate_every, training.checkpoint_every) == (4, 2, 4)
    assert recipe_for(base, 20).dvae_training.steps == round(
        DEFAULTS["dvae_training"]["epochs"] * 20 / recipe.dvae_training.batch_size
    )
    many = recipe_for(base, 5000).transformer_training
    assert many.steps == 40_000 / many.batch_size, "fewer epochs of many pictures"
    clip = recipe_for(base, 300).clip_training
    assert clip is not None and clip.batch_size == 100, "no picture of an epoch is left out"
    given = recipe_for(base, 160, ["transformer_training.steps=7", "transformer_training.warmup_steps=2"])
    assert (given.transformer_training.steps, given.transformer_training.warmup_steps) == (7, 2)


def test_the_guide_states_the_defaults() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "finetune.md").read_text()
    for stage, name in (("dvae", "dVAE"), ("transformer", "transformer"), ("clip", "CLIP")):
        table = DEFAULTS[f"{stage}_training"]
        peak = f"{table['learning_rate']:.0e}".replace("e-0", "e-")
        assert f"| {name} | {table['epochs']} | {peak} |" in guide


def test_a_clip_that_learns_the_pictures_chooses_among_candidates(base: Path, copy: Path) -> None:
    assert recipe_for(base, 160).sampling.candidates == 16
    assert recipe_for(base, 160, ["sampling.candidates=1"]).sampling.candidates == 1
    assert recipe_for(without_clip(copy), 160).sampling.candidates is None


@pytest.mark.parametrize("n_train", [1, 2, 3, 20])
def test_very_few_pictures_give_a_recipe_too(base: Path, n_train: int) -> None:
    recipe = recipe_for(base, n_train, ["clip_training.epochs=1", "dvae_training.epochs=1"])
    assert recipe.dvae_training.warmup_steps < recipe.dvae_training.steps


# Stop, kill, go on


@pytest.mark.parametrize(
    "where",
    [
        ("transformer", 3),
        *(pytest.param(where, marks=pytest.mark.long) for where in (("dvae", 2), ("clip", 1))),
    ],
    ids=str,
)
def test_a_killed_run_goes_on_to_the_same_bits(
    where: tuple[str, int], data: Path, base: Path, tuned: Path, tmp_path: Path
) -> None:
    """By SIGKILL, in a process of its own, just after an update."""
    out, death = tmp_path / "model", [where[0], str(where[1])]
    command = [
        sys.executable,
        "-c",
        DYING,
        *death,
        "finetune",
        str(data),
        "--from",
        str(base),
        "--out",
        str(out),
    ]
    command += ["--dtype", "float32", *(part for setting in SHORT for part in ("--set", setting))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    died = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (out / "manifest.json").exists()
    run(data, out, base, name=base.name)
    for component in ("dvae", "transformer", "clip"):
        file = f"{component}/model.safetensors"
        one, other = (weights.load_tensors(folder / file) for folder in (out, tuned))
        assert all(torch.equal(one[name], other[name]) for name in other), component


DYING = """
import os, signal, sys
import dalle.training.loop as loop
from dalle.cli import main

stage, step = sys.argv.pop(1), int(sys.argv.pop(1))
update = loop.update
def dying(current, optimizer, plateau, progress, *rest):
    result = update(current, optimizer, plateau, progress, *rest)
    if current.name == stage and progress.step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
loop.update = dying
main()
"""


def test_a_finished_run_is_left_as_it_is_and_other_settings_or_another_base_are_refused(
    data: Path, base: Path, copy: Path, tuned: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(tuned, tmp_path / "model"))
    before = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    run(data, out, base)
    assert before == {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    with pytest.raises(ValueError, match=r"begun with other settings or data \(recipe\.seed: 0 -> 3"):
        run(data, out, base, "seed=3")
    torch.manual_seed(5)
    for component in ("clip", "judge"):
        shutil.rmtree(copy / component)
    write_index(copy, ModelDefaults(guidance=2.5))
    with pytest.raises(ValueError, match="begun with other settings or data"):
        run(data, out, copy)


def test_a_base_that_is_no_model_or_is_damaged_is_refused(data: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no tokenizer: give a finished model folder"):
        run(data, tmp_path / "model", tmp_path)
    file = copy / "transformer" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"transformer/model\.safetensors: sha256 differs"):
        run(data, tmp_path / "model", copy)


# The card


def test_the_card_inherits_licence_and_attribution_and_shows_sheets_figures_and_a_snippet(
    tuned: Path,
) -> None:
    card = ModelCard.load(tuned / "README.md")
    metadata = card.data.to_dict()
    assert metadata["license"] == "apache-2.0" and metadata["tags"] == ["tiny"]
    assert metadata["base_model"] == "owner/base" and metadata["base_model_relation"] == "finetune"
    text = card.text
    assert "By A. Painter, CC-BY-4.0." in text and "More of it." in text and "Not inherited." not in text
    assert text.index("## Licences and attributions of the base model, `owner/base`") < text.index(
        "### Data and"
    )
    figures = files.read_json(tuned / "finetune.json")
    dvae = figures["dvae"]
    assert f"| PSNR through the dVAE, dB | {dvae['psnr_before']:.1f} | {dvae['psnr_after']:.1f} |" in text
    for name in ("reconstructions.png", "draws.png"):
        assert f"]({name})" in text
        assert images.open_image(tuned / name).width > 128
    (code,) = (part.split("```")[0] for part in text.split("```python")[1:])
    compile(code, "snippet", "exec")
    assert str(tuned.parent) not in text, "no path of this machine"
    assert (tuned / "LICENSE").read_text() == "the licence"


def test_figures_of_the_card_are_those_of_the_weights_that_were_kept(tuned: Path) -> None:
    figures = files.read_json(tuned / "finetune.json")
    assert figures["n_held_out"] == 6 and figures["base"] == "owner/base"
    losses = [row["validation_image_loss"] for row in rows(tuned) if "validation_image_loss" in row]
    assert figures["transformer"]["image_loss_before"] == losses[0]
    assert figures["transformer"]["image_loss_after"] == min(losses)


def test_a_base_with_a_broken_card_or_none_is_no_obstacle(data: Path, copy: Path, tmp_path: Path) -> None:
    (copy / "README.md").write_text("---\nlicense: [unclosed\n---\n# Base\n\n## License\n\nMIT, by B.\n")
    assert "MIT, by B." in (run(data, tmp_path / "one", copy) / "README.md").read_text()
    (copy / "README.md").unlink()
    assert "no licence" in (run(data, tmp_path / "two", copy) / "README.md").read_text()


# What train keeps of a given model


def test_train_keeps_the_given_clips_that_it_does_not_train(data: Path, base: Path, tmp_path: Path) -> None:
    recipe = validate(Recipe, override(load_preset("tiny"), MICRO), "micro")
    out = train(
        str(data),
        tmp_path / "model",
        recipe,
        init_from=base,
        stages=("transformer",),
        device=torch.device("cpu"),
        dtype=torch.float32,
        quiet=True,
    )
    for name in ("clip", "judge"):
        assert same(base, out, f"{name}/model.safetensors") and same(base, out, f"{name}/config.json")
    assert DallePipeline.from_pretrained(out).ranker is not None
    assert "By A. Painter, CC-BY-4.0." in (out / "README.md").read_text()


def test_train_leaves_out_a_given_clip_whose_tokenizer_is_another_and_says_so(
    data: Path, copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("tokenizer", "transformer", "dvae"):
        shutil.rmtree(copy / name)
    recipe = validate(Recipe, override(load_preset("tiny"), MICRO), "micro")
    with caplog.at_level("WARNING"):
        (copy / "manifest.json").unlink()
        out = train(
            str(data), tmp_path / "m", recipe, init_from=copy, device=torch.device("cpu"), dtype=torch.float32
        )
    assert not (out / "clip").exists() and not (out / "judge").exists()
    assert any("clip: left out of" in message for message in caplog.messages)


def test_the_line_of_a_stage_foretells_all_stages(
    data: Path, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        finetune(
            str(data),
            tmp_path / "model",
            base,
            name="base",
            settings=SHORT,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
    first = {stage: [m for m in caplog.messages if m.startswith(f"{stage} 1/")] for stage in ("dvae", "clip")}
    assert "; of all stages " in first["dvae"][0] and "of all stages" not in first["clip"][0]
    json.dumps(files.read_json(tmp_path / "model" / "finetune.json"))
