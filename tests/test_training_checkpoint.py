"""Checkpoints come back to the last bit, the last two are kept, and a broken one is never trusted."""

import errno
import json
import logging
import os
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import nn

from dalle.training import checkpoint
from dalle.training.optim import MovingAverage, adamw
from dalle.training.recipe import Optimization

SETTINGS = Optimization(
    steps=10,
    batch_size=2,
    learning_rate=1e-2,
    final_learning_rate=1e-3,
    weight_decay=0.1,
    average_decay=0.9,
    validate_every=1,
    checkpoint_every=1,
    sheet_every=1,
)
STATE = {"plateau": {"n_halvings": 1}, "n_non_finite": 2}


class Parts:
    """A small model in channels_last, its optimiser and its average."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
        self.model = layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = MovingAverage(self.model, 0.9)
        self.optimizer = adamw(self.model, SETTINGS)

    def update(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        self.optimizer.zero_grad()
        self.model(torch.randn(2, 3, 4, 4, generator=generator)).square().sum().backward()
        self.optimizer.step()
        self.average.update(self.model, number)

    def save(self, root: Path, step: int) -> Path:
        return checkpoint.save(root, step, self.model, self.average, self.optimizer, dict(STATE))

    def tensors(self) -> dict[str, torch.Tensor]:
        own = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        own |= {f"average/{name}": tensor for name, tensor in self.average.tensors.items()}
        for name, parameter in self.model.named_parameters():
            own |= {f"{name}/{key}": value for key, value in self.optimizer.state[parameter].items()}
        return own


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_round_trip_gives_back_every_bit_and_layout(tmp_path: Path) -> None:
    ours, theirs = Parts(seed=0), Parts(seed=1)
    for number in (1, 2):
        ours.update(number)
    ours.save(tmp_path, 2)
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 2
    state = checkpoint.restore(found, theirs.model, theirs.average, theirs.optimizer)
    assert state == {"step": 2, **STATE}

    before, after = ours.tensors(), theirs.tensors()
    assert before.keys() == after.keys()
    assert {"0.weight/exp_avg", "0.weight/exp_avg_sq", "0.weight/step"} <= before.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
        assert tensor.dtype == after[name].dtype, name
        assert tensor.stride() == after[name].stride(), name
    assert after["0.weight/exp_avg"].is_contiguous(memory_format=torch.channels_last)

    ours.update(3)
    theirs.update(3)
    for name, tensor in ours.tensors().items():
        assert torch.equal(tensor, theirs.tensors()[name]), f"{name} after one more update"


def test_a_checkpoint_holds_named_files_and_no_model_safetensors(tmp_path: Path) -> None:
    parts = Parts(seed=0)
    parts.update(1)
    folder = parts.save(tmp_path, 1)
    assert names(folder) == [
        "average.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "state.json",
        "weights.safetensors",
    ]
    assert json.loads((folder / "state.json").read_text())["step"] == 1


def test_the_last_two_are_kept_by_number_and_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    parts = Parts(seed=0)
    (tmp_path / ".step-9.0a1b2c3d.tmp").mkdir()
    for step in (9, 10, 100):  # by name 100 would stand before 9
        parts.save(tmp_path, step)
    assert names(tmp_path) == ["step-10", "step-100"]


def test_no_folder_or_an_empty_one_is_a_fresh_start(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "missing") is None
    (tmp_path / "step-x").mkdir()
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize("damage", ["flipped", "missing", "no manifest", "empty"])
def test_a_broken_newest_checkpoint_is_passed_over_with_a_warning(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = Parts(seed=0)
    parts.save(tmp_path, 1)
    newest = parts.save(tmp_path, 2)
    if damage == "flipped":
        flip_a_bit(newest / "optimizer.safetensors")
    elif damage == "missing":
        (newest / "state.json").unlink()
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "weights.safetensors").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 1
    [record] = caplog.records
    assert "checkpoint step-2 is broken" in record.getMessage()
    parts.save(tmp_path, 2)  # the broken one stands in the way of its successor
    again = checkpoint.newest(tmp_path)
    assert again is not None and again.step == 2


def test_when_every_checkpoint_is_broken_nothing_is_started_anew_in_silence(tmp_path: Path) -> None:
    parts = Parts(seed=0)
    for step in (1, 2):
        flip_a_bit(parts.save(tmp_path, step) / "weights.safetensors")
    with pytest.raises(ValueError, match=r"every checkpoint is broken .* delete the folder to start"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_keeps_the_old_checkpoints(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = Parts(seed=0)
    for step in (1, 2):
        parts.save(tmp_path, step)

    def full(*arguments: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device") as caught:
        patch.setattr(os, call, full)
        parts.save(tmp_path, 3)
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["step-1", "step-2"], "no half checkpoint, no temporary folder"
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 2
    parts.save(tmp_path, 3)
    assert names(tmp_path) == ["step-2", "step-3"]


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    parts = Parts(seed=0)
    parts.save(tmp_path, 1)
    found = checkpoint.newest(tmp_path)
    other = nn.Linear(2, 2)
    assert found is not None
    with pytest.raises(ValueError, match="the weights do not fit the model"):
        checkpoint.restore(found, other, MovingAverage(other, 0.9), adamw(other, SETTINGS))
