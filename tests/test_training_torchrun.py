"""`torchrun … -m dalle`: as a person starts it, as it fails, and as it survives the death of a process."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle import weights
from dalle.data.shapes import write_shapes
from dalle.data.tokens import TokenStore
from tests.spawned import learned

SETTINGS = [
    f"{stage}_training.{setting}"
    for stage in ("dvae", "transformer")
    for setting in (
        "steps=6",
        "checkpoint_every=2",
        "validate_every=6",
        "sheet_every=6",
        "warmup_steps=2",
        "batch_size=4",
        "n_validation=4",
    )
] + ["tokenizer.vocab_size=300"]

# `dalle` with one more line: the process notes what it is given to read, and fails or dies where `FAILURE` says.
RUNNER = """
import json, os, signal
import dalle.training.loop as loop
import dalle.training.order as order
from dalle.cli import main

rank, folder = int(os.environ.get("RANK", 0)), os.environ["NOTES"]
stage, step, who, what = os.environ.get("FAILURE", "none:0:0:none").split(":")
batch, update = order.Order.batch, loop.update
def noting_batch(self, number, size):
    members = batch(self, number, size)
    with open(f"{folder}/read-{rank}.jsonl", "a") as file:
        file.write(json.dumps([number, members]) + "\\n")
    return members
def failing_update(current, optimizer, plateau, progress, *rest):
    result = update(current, optimizer, plateau, progress, *rest)
    is_first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if current.name == stage and progress.step == int(step) and rank == int(who) and is_first_attempt:
        if what == "error":
            raise ValueError("this process alone has had enough")
        os.kill(os.getpid(), getattr(signal, what))
    return result
order.Order.batch, loop.update = noting_batch, failing_update
main()
"""


def start(
    arguments: Sequence[str], notes: Path, n: int, failure: str = "", options: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run `dalle ARGUMENTS` as `n` processes of torchrun, or as one without it."""
    notes.mkdir(exist_ok=True)
    runner = notes / "runner.py"
    runner.write_text(RUNNER)
    command = [sys.executable, str(runner), *arguments]
    if n > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", *options]
        command = [sys.executable, *launcher, str(runner), *arguments]
    environment = os.environ | {"NOTES": str(notes), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if failure:
        environment["FAILURE"] = failure
    root = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = root
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


def train_arguments(data: Path, out: Path, *settings: str) -> list[str]:
    sets = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
    return ["train", str(data), "--out", str(out), "--preset", "tiny", "--dtype", "float32", *sets]


def read(notes: Path, rank: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """The micro-batches that a process was given: number, and (epoch, picture) of each member."""
    lines = (notes / f"read-{rank}.jsonl").read_text().splitlines()
    return [(number, [tuple(member) for member in members]) for number, members in map(json.loads, lines)]


def assert_close(one: Path, other: Path, tolerance: float) -> None:
    for component in ("dvae", "transformer"):
        left = weights.load_tensors(one / component / "model.safetensors")
        right = weights.load_tensors(other / component / "model.safetensors")
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            if tolerance == 0:
                assert torch.equal(right[name], tensor), f"{component}: {name}"
            found = learned(name, right[name])
            torch.testing.assert_close(found, learned(name, tensor), rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", 32, seed=0)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model of one process, and its notes."""
    folder = tmp_path_factory.mktemp("alone")
    result = start(train_arguments(data, folder / "model"), folder / "notes", 1)
    assert result.returncode == 0, result.stderr
    return folder / "model", folder / "notes"


@pytest.fixture(scope="module")
def together(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """The model of two processes, their notes, and what they said."""
    folder = tmp_path_factory.mktemp("together")
    result = start(train_arguments(data, folder / "model"), folder / "notes", 2)
    assert result.returncode == 0, result.stderr
    return folder / "model", folder / "notes", result


def test_two_processes_train_the_weights_of_one_in_fp32(
    alone: tuple[Path, Path], together: tuple[Path, Path, Any]
) -> None:
    assert_close(alone[0], together[0], 1e-5)
    assert together[2].stdout == f"{together[0]}\n", "one process speaks"
    rows = [json.loads(line) for line in (together[0] / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [(row["stage"], row["step"]) for row in rows if "loss" in row]
    assert steps == [("dvae", 1), ("dvae", 6), ("transformer", 1), ("transformer", 6)]


def test_each_process_reads_its_own_half_of_every_batch_of_one(
    alone: tuple[Path, Path], together: tuple[Path, Path, Any]
) -> None:
    whole = read(alone[1], 0)
    halves = [read(together[1], rank) for rank in (0, 1)]
    assert len({number for number, _ in whole}) >= 6

    def by_number(batches: list[tuple[int, list[tuple[int, int]]]]) -> list[Any]:
        return sorted(batches)  # threads that read ahead note them in any order

    for (number, first), (also, second), (whole_number, members) in zip(
        *map(by_number, halves), by_number(whole), strict=True
    ):
        assert number == also == whole_number
        assert not set(first) & set(second) and first + second == members


def test_an_error_of_one_process_ends_all_with_one_line(data: Path, tmp_path: Path) -> None:
    result = start(train_arguments(data, tmp_path / "model"), tmp_path, 2, "dvae:3:1:error")
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: this process alone has had enough"]
    assert "gloo" not in result.stderr, "the other one says nothing"


def test_a_batch_that_cannot_be_split_is_refused_by_one_line_before_anything_is_written(
    data: Path, tmp_path: Path
) -> None:
    arguments = train_arguments(data, tmp_path / "model", "transformer_training.batch_size=5")
    result = start(arguments, tmp_path, 2)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: a batch of 5 cannot be split over 2 processes: set batch_size to a multiple of 2"
    ]
    assert not (tmp_path / "model").exists()


@pytest.mark.long
@pytest.mark.parametrize(("mode", "who"), [("ddp", 0), ("shard", 1)])
def test_a_killed_process_is_started_again_and_the_run_ends_with_the_same_weights(
    mode: str, who: int, data: Path, together: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    setting, whole = f"distributed.mode={mode}", together[0]
    if mode != "ddp":
        whole = tmp_path / "whole"
        assert start(train_arguments(data, whole, setting), tmp_path / "whole-notes", 2).returncode == 0
    arguments = train_arguments(data, tmp_path / "killed", setting)
    failure = f"transformer:5:{who}:SIGKILL"
    killed = start(arguments, tmp_path / "notes", 2, failure, ["--max-restarts=2"])
    assert killed.returncode == 0, killed.stderr
    rows = [
        json.loads(line) for line in (tmp_path / "killed" / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [(row["stage"], row["step"]) for row in rows if row.get("resumed")][-1] == ("transformer", 4)
    assert_close(whole, tmp_path / "killed", 0)


@pytest.mark.long
def test_a_signal_to_one_process_stops_all_and_one_process_can_go_on(
    alone: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    arguments = train_arguments(data, tmp_path / "model", "distributed.mode=shard")
    stopped = start(arguments, tmp_path, 2, "transformer:3:1:SIGTERM")
    assert stopped.returncode != 0
    assert stopped.stderr.count("stopped in stage transformer after update 3; the same command") == 1
    assert start(arguments, tmp_path, 1).returncode == 0
    assert_close(alone[0], tmp_path / "model", 1e-5)


@pytest.mark.long
def test_two_processes_encode_what_one_does(
    data: Path, together: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    stores = []
    for n in (1, 2):
        out = tmp_path / str(n)
        arguments = ["encode", str(data), "--model", str(together[0]), "--out", str(out), "--json"]
        result = start(arguments, tmp_path, n)
        assert result.returncode == 0, result.stderr
        found = json.loads(result.stdout)
        assert (found["pictures"], found["bad"]) == (32, 0)
        stores.append(TokenStore(found["folder"]))
    assert [grid.tolist() for grid in stores[0].tokens] == [grid.tolist() for grid in stores[1].tokens]
