"""The best validation of a stage: its weights are what the stage gives, and it ends where nothing improves."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dalle import weights
from dalle.training import checkpoint
from dalle.training.best import Best
from dalle.training.loop import Stopped, train_stage
from tests.test_training_loop import LineStage, rows


class ScriptedStage(LineStage):
    """Its validations give scripted errors; they are counted by the updates that were done."""

    def __init__(self, errors: dict[int, float], **changes: Any) -> None:
        settings = {"steps": 8, "validate_every": 1, "checkpoint_every": 2, "patience": 2}
        super().__init__(**(settings | changes))
        self.errors, self.at = errors, list[int]()

    def validate(self) -> dict[str, float]:
        super().validate()
        n_updates = 1 + self.seen[-1][0] if self.seen else 0
        self.at.append(n_updates)
        return {"error": self.errors.get(n_updates, 9.0)}

    def sheet(self) -> Image.Image:
        return Image.new("RGB", (4, 4))


def run(stage: LineStage, folder: Path) -> dict[str, Tensor]:
    return train_stage(stage, folder, torch.float32, quiet=True)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in (*one, *other))


def test_a_stage_gives_the_weights_of_its_best_validation_and_ends_after_patience(tmp_path: Path) -> None:
    stage = ScriptedStage({0: 5.0, 1: 4.0, 2: 4.5, 3: 1.0})
    found = run(stage, tmp_path)
    assert stage.at == [0, 1, 2, 3, 4, 5], "two without a better one"
    assert torch.equal(found["weight"], stage.validated_with[3])
    newest = checkpoint.newest(tmp_path / "checkpoints" / "line")
    assert newest is not None and newest.step == 5


def test_without_patience_a_stage_goes_to_its_end_and_validates_no_sooner(tmp_path: Path) -> None:
    stage = ScriptedStage({1: 1.0}, patience=None)
    found = run(stage, tmp_path)
    assert stage.at == [1, 2, 3, 4, 5, 6, 7, 8]
    assert torch.equal(found["weight"], stage.validated_with[-1])
    assert not list((tmp_path / "checkpoints" / "line").glob("best-*"))


def test_a_stage_that_only_makes_it_worse_gives_the_weights_that_it_was_given(tmp_path: Path) -> None:
    stage = ScriptedStage({0: 0.5})
    given = {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}
    assert equal(run(stage, tmp_path), given)
    assert stage.at == [0, 1, 2]


@pytest.mark.parametrize("errors", [{0: 5.0, 2: 1.0}, {0: 5.0, 3: 1.0, 4: 0.5}, {0: 0.5}], ids=str)
@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 5])
def test_a_stopped_stage_goes_on_to_the_same_weights(
    errors: dict[int, float], stop_at: int, tmp_path: Path
) -> None:
    whole = run(ScriptedStage(errors), tmp_path / "whole")
    part = ScriptedStage(errors, stop_at=stop_at)
    try:
        found = run(part, tmp_path / "part")
        assert len(part.seen) < stop_at, "it was over before"
    except Stopped:
        found = run(ScriptedStage(errors), tmp_path / "part")
    assert equal(found, whole)
    assert equal(run(ScriptedStage(errors), tmp_path / "part"), whole), "and once more, when it is done"


@pytest.mark.parametrize("killed_at", [1, 2, 3, 4, 5, 6])
def test_a_killed_stage_goes_on_to_the_same_weights(
    killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its validation and before its next checkpoint: the best on disk is newer than the checkpoint."""
    errors = {0: 5.0, 1: 4.0, 3: 1.0, 5: 0.5}
    whole = run(ScriptedStage(errors), tmp_path / "whole")
    take = Best.take

    def killed(self: Best, step: int, *rest: Any) -> None:
        take(self, step, *rest)
        if step == killed_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Best, "take", killed)
        run(ScriptedStage(errors), tmp_path / "part")
    assert equal(run(ScriptedStage(errors), tmp_path / "part"), whole)


def test_a_broken_checkpoint_falls_back_to_one_whose_best_weights_are_still_there(tmp_path: Path) -> None:
    errors = {n: 9.0 - n for n in range(9)}  # each validation is the best so far
    whole = run(ScriptedStage(errors), tmp_path / "run")
    root = tmp_path / "run" / "checkpoints" / "line"
    assert {folder.name for folder in root.glob("best-*")} == {"best-6", "best-8"}
    (root / "step-8" / "weights.safetensors").write_bytes(b"broken")
    assert equal(run(ScriptedStage(errors), tmp_path / "run"), whole)


def test_best_weights_that_are_gone_are_one_clear_error(tmp_path: Path) -> None:
    run(ScriptedStage({0: 0.5}), tmp_path)
    best = tmp_path / "checkpoints" / "line" / "best-0"
    weights.load_tensors(best / "weights.safetensors")
    (best / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"best-0: the best weights so far are gone: delete .*line to start"):
        run(ScriptedStage({0: 0.5}), tmp_path)


def test_what_is_kept_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train_stage(ScriptedStage({0: 5.0, 1: 1.0}), tmp_path, torch.float32)
    assert "line: the weights after 1 of 3 updates are kept, its best" in caplog.messages
    assert [row["validation_error"] for row in rows(tmp_path) if "validation_error" in row] == [
        5.0,
        1.0,
        9.0,
        9.0,
    ]
