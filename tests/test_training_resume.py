"""A run may die at any point: the same command goes on, and the weights come out as if it had never stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dalle import weights
from dalle.data.shapes import write_shapes

SETTINGS = [
    "dvae_training.steps=7",
    "dvae_training.checkpoint_every=2",
    "dvae_training.validate_every=4",
    "dvae_training.sheet_every=4",
    "dvae_training.warmup_steps=2",
    "dvae_training.batch_size=4",
    "dvae.output_size=64",
    "dvae.decoder_widths=[16, 8, 8]",
    "decoder_training.steps=7",
    "decoder_training.checkpoint_every=2",
    "decoder_training.validate_every=4",
    "decoder_training.sheet_every=4",
    "decoder_training.n_validation=8",
    "decoder_training.batch_size=4",
    "decoder_training.learning_rate=2e-3",
    "decoder_training.final_learning_rate=0",
    "decoder_training.weight_decay=1e-4",
    "decoder_training.average_decay=0.9",
    "decoder_training.crop=shift",
    "decoder_training.feature_weight=0.1",
    "decoder_training.token_noise=0.1",
    "decoder_training.adversarial_share=0.3",
    "decoder_training.adversarial_start=2",
    "transformer_training.steps=7",
    "transformer_training.checkpoint_every=2",
    "transformer_training.validate_every=4",
    "transformer_training.sheet_every=4",
    "transformer_training.warmup_steps=2",
    "transformer_training.batch_size=4",
    "transformer_training.dropout=0.1",
    "transformer_training.token_noise=0.1",
    "tokenizer.vocab_size=300",
]

# Runs `dalle train` with one more line: the process kills itself where the arguments say.
RUNNER = """
import os, signal, sys
import dalle.training.loop as loop
import dalle.manifest as manifest
from dalle.cli import main

stage, step, place, number = sys.argv.pop(1).split(":")
update, write_manifest = loop.update, manifest.write_manifest
def dying_update(current, optimizer, plateau, progress, *rest):
    result = update(current, optimizer, plateau, progress, *rest)
    if place == "update" and current.name == stage and progress.step == int(step):
        os.kill(os.getpid(), int(number))
    return result
def dying_manifest(folder, files=None):
    if place == "save" and stage in str(folder) and f"step-{step}" in str(folder):
        os.kill(os.getpid(), int(number))
    write_manifest(folder, files)
loop.update, manifest.write_manifest = dying_update, dying_manifest
main()
"""


def run_train(data: Path, out: Path, death: str = "none:0:never:0") -> subprocess.CompletedProcess[str]:
    """Run the train command in a process of its own; `death` is stage:update:place:signal."""
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [
        sys.executable,
        "-c",
        RUNNER,
        death,
        "train",
        str(data),
        "--out",
        str(out),
        "--preset",
        "tiny",
        *sets,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 captioned shapes."""
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, 40, seed=0)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "model"
    result = run_train(shapes, out)
    assert result.returncode == 0, result.stderr
    return out


def rows(out: Path) -> list[dict[str, object]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(one: Path, other: Path) -> None:
    """All components are equal to the last bit."""
    for component in ("dvae", "transformer"):
        left = weights.load_tensors(one / component / "model.safetensors")
        right = weights.load_tensors(other / component / "model.safetensors")
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert torch.equal(tensor, right[name]), f"{component}: {name}"


@pytest.mark.long
def test_killed_run_resumes_at_its_last_checkpoint_to_the_same_bits(
    shapes: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    # stage, update at which the process dies, where, the checkpoint it must go on from
    deaths = [
        ("dvae", 1, "update", None),
        ("dvae", 3, "update", 2),
        ("dvae", 6, "save", 4),
        ("decoder", 4, "save", 2),
        ("decoder", 5, "update", 4),
        ("transformer", 4, "save", 2),
        ("transformer", 7, "update", 6),
    ]
    for stage, step, place, _ in deaths:
        result = run_train(shapes, out, f"{stage}:{step}:{place}:{int(signal.SIGKILL)}")
        assert result.returncode == -signal.SIGKILL, result.stderr
    result = run_train(shapes, out)
    assert result.returncode == 0, result.stderr
    resumed = [(row["stage"], row["step"]) for row in rows(out) if row.get("resumed")]
    expected = []
    for stage, step, _, found in deaths:
        if found is not None:
            assert 0 <= step - found <= 2, "at most one checkpoint interval is computed again"
            expected.append((stage, found))
    assert resumed == expected
    assert_same_weights(out, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.long
def test_signal_finishes_the_update_saves_and_exits(
    shapes: Path, uninterrupted: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "model"
    result = run_train(shapes, out, f"dvae:3:update:{int(number)}")
    assert result.returncode == 128 + number
    assert "stopped in stage dvae after update 3; the same command goes on" in result.stderr
    assert (out / "run" / "checkpoints" / "dvae" / "step-3").is_dir()
    assert run_train(shapes, out).returncode == 0
    assert_same_weights(out, uninterrupted)


def test_broken_newest_checkpoint_falls_back_and_says_so(
    shapes: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    assert (
        run_train(shapes, out, f"transformer:6:update:{int(signal.SIGTERM)}").returncode
        == 128 + signal.SIGTERM
    )
    broken = out / "run" / "checkpoints" / "transformer" / "step-6" / "weights.safetensors"
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    result = run_train(shapes, out)
    assert result.returncode == 0, result.stderr
    assert "checkpoint step-6 is broken" in result.stderr
    assert [row["step"] for row in rows(out) if row.get("resumed")] == [4]
    assert_same_weights(out, uninterrupted)


def test_checkpoints_keep_the_last_two(uninterrupted: Path) -> None:
    for stage in ("dvae", "decoder", "transformer"):
        kept = sorted(path.name for path in (uninterrupted / "run" / "checkpoints" / stage).glob("step-*"))
        assert kept == ["step-6", "step-7"]
        names = {path.name for path in (uninterrupted / "run" / "checkpoints" / stage / "step-7").iterdir()}
        assert "model.safetensors" not in names


def test_resume_with_another_setting_names_it(shapes: Path, uninterrupted: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "dalle.cli",
        "train",
        str(shapes),
        "--out",
        str(uninterrupted),
        "--preset",
        "tiny",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.count("\n") <= 2
    assert "recipe.dvae_training.steps: 7 -> 300" in result.stderr


def test_finished_run_is_left_alone(shapes: Path, uninterrupted: Path) -> None:
    before = (uninterrupted / "manifest.json").read_bytes()
    assert run_train(shapes, uninterrupted).returncode == 0
    assert (uninterrupted / "manifest.json").read_bytes() == before
