"""Checkpoints of several processes: stopped together, whole or not at all, read by any number of processes."""

import logging
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle import files, manifest
from dalle.training import checkpoint
from dalle.training.loop import Stopped, train_stage
from dalle.training.processes import World
from dalle.training.recipe import DistributedConfig
from dalle.training.transformer import TransformerStage
from tests.spawned import spawn
from tests.test_training_distributed import one_thread, transformer_stage

__all__ = ["one_thread"]  # a fixture of this module too

CASES: dict[str, dict[str, Any]] = {
    "ddp": {"mode": "ddp"},
    "shard": {"mode": "shard", "async_checkpoints": True},
    "hybrid": {"mode": "hybrid", "shard_size": 2},
}
STEPS = {"steps": 5, "checkpoint_every": 2, "sheet_every": 5, "validate_every": 5, "clip_norm": 5.0}
STOP = 3  # the update in which one process is told to stop


def stage(world: World, **changes: Any) -> TransformerStage:
    return transformer_stage(world, average_every=2, **(STEPS | changes))


def run(stage: TransformerStage, folder: Path, world: World, config: dict[str, Any]) -> dict[str, Tensor]:
    distributed = DistributedConfig.model_validate(config)
    return train_stage(stage, folder, torch.float32, quiet=True, world=world, config=distributed)


def stop_in(stage: TransformerStage, update: int) -> None:
    """Let a signal come while the stage is in its `update`."""
    loss = stage.loss

    def signalled(batch: Any, step: int, number: int) -> Any:
        if step + 1 == update and number == step * stage.settings.accumulation:  # once
            signal.raise_signal(signal.SIGTERM)
        return loss(batch, step, number)

    stage.loss = signalled  # type: ignore[method-assign]


def stopped(world: World, folder: str) -> list[str]:
    """Train in every layout until the second process alone gets a signal."""
    said = []
    for name, config in CASES.items():
        training = stage(world)
        if world.rank == 1:
            stop_in(training, STOP)
        try:
            run(training, Path(folder) / name, world, config)
        except Stopped as error:
            said.append(str(error))
    return said


def continued(world: World, folder: str) -> dict[str, dict[str, Tensor]]:
    """Go on in every layout that two processes can have; what one process began too."""
    found = {}
    for name in ("ddp", "shard", "hybrid", "one"):
        config = {"mode": "shard"} if name in ("hybrid", "one") else CASES[name]
        found[name] = run(stage(world), Path(folder) / name, world, config)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The averaged weights of one process that was never stopped."""
    return run(stage(World()), tmp_path_factory.mktemp("whole"), World(), {})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes, and one, left when they were stopped."""
    folder = tmp_path_factory.mktemp("saved")
    said = spawn(4, stopped, folder / "results", str(folder))
    expected = f"stopped in stage transformer after update {STOP}; the same command goes on from there"
    assert said == [[expected] * len(CASES)] * 4
    alone = stage(World())
    stop_in(alone, STOP)
    with pytest.raises(Stopped):
        run(alone, folder / "one", World(), {})
    return folder


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "checkpoints" / "transformer").iterdir())


@pytest.mark.parametrize("name", CASES)
def test_four_processes_stop_together_and_keep_two_whole_checkpoints(name: str, saved: Path) -> None:
    assert folders(saved / name) == ["step-2", "step-3"]
    newest = saved / name / "checkpoints" / "transformer" / "step-3"
    manifest.VerifiedFolder(newest)
    names = sorted(path.name for path in newest.iterdir())
    assert [name.split("-model")[0] for name in names] == [
        "manifest.json",
        *(f"shard-{rank:05d}" for rank in range(1, 5)),
        "state.json",
    ]
    assert set(files.read_json(newest / "manifest.json")["files"]) == {*names} - {"manifest.json"}


@pytest.mark.parametrize("name", CASES)
def test_what_four_saved_one_goes_on_from(
    name: str, saved: Path, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    shutil.copytree(saved / name, tmp_path / name)
    found = run(stage(World()), tmp_path / name, World(), {})
    assert_close(found, whole)


def test_what_four_or_one_saved_two_go_on_from(saved: Path, whole: dict[str, Tensor], tmp_path: Path) -> None:
    for name in (*CASES, "one"):
        shutil.copytree(saved / name, tmp_path / name)
    found = spawn(2, continued, tmp_path / "results", str(tmp_path))
    for name in (*CASES, "one"):
        assert_close(found[0][name], whole)
        assert (tmp_path / name / "samples" / "transformer" / "step-0000005.png").is_file()
    assert found[1]["shard"] == {}, "one process has the whole model"


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-10)


def test_a_broken_shard_sends_all_back_to_the_checkpoint_before(
    saved: Path, whole: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(saved / "shard", tmp_path / "shard")
    root = tmp_path / "shard" / "checkpoints" / "transformer"
    (shard,) = (root / "step-3").glob("shard-00002-*")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    found = checkpoint.newest(root)
    assert found is not None and found.step == 2
    with caplog.at_level(logging.WARNING):
        assert_close(run(stage(World()), tmp_path / "shard", World(), {}), whole)
    assert "checkpoint step-3 is broken" in caplog.text
