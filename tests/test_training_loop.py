"""The loop: accumulation, clipping, updates that are not finite, and stopping, on a model of one layer."""

import json
import logging
import math
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dalle import files, weights
from dalle.training import checkpoint, loop
from dalle.training.loop import MAX_NON_FINITE, Progress, Stopped, train_stage
from dalle.training.optim import MovingAverage, Plateau, adamw
from dalle.training.recipe import Optimization


class LineStage:
    """Fits a line; the data of micro-batch n are rows n * B .. n * B + B of one endless table."""

    name = "line"

    def __init__(self, *, broken: tuple[int, ...] = (), stop_at: int | None = None, **changes: Any) -> None:
        settings: dict[str, Any] = {
            "steps": 6,
            "batch_size": 4,
            "learning_rate": 0.1,
            "final_learning_rate": 0.01,
            "weight_decay": 0.0,
            "average_decay": 0.5,
            "validate_every": 3,
            "checkpoint_every": 2,
            "sheet_every": 6,
        }
        self.settings = Optimization(**(settings | changes))
        torch.manual_seed(0)
        self.model = nn.Linear(5, 2)
        self.broken, self.stop_at = broken, stop_at  # updates, counted from 1
        self.seen: list[tuple[int, int]] = []  # (update, micro-batch)
        self.validated_with: list[Tensor] = []

    def batch(self, number: int) -> Tensor:
        rows = range(number * self.settings.batch_size, (number + 1) * self.settings.batch_size)
        return torch.stack([torch.randn(5, generator=torch.Generator().manual_seed(row)) for row in rows])

    def loss(self, batch: Tensor, step: int, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append((step, number))
        loss = (self.model(batch) - batch[:, :2]).square().mean()
        if step + 1 in self.broken:
            loss = loss * math.nan
        if step + 1 == self.stop_at:
            signal.raise_signal(signal.SIGTERM)
        return loss, {"error": loss.detach()}

    def validate(self) -> dict[str, float]:
        assert not self.model.training and not torch.is_grad_enabled()
        self.validated_with.append(self.model.weight.detach().clone())
        return {"error": 1.0}

    def score(self, figures: dict[str, float]) -> float:
        return -figures["error"]

    def sheet(self) -> Image.Image:
        return Image.new("RGB", (4, 4))


def run(stage: LineStage, folder: Path) -> dict[str, Tensor]:
    return train_stage(stage, folder, torch.float32, quiet=True)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def one_update(stage: LineStage) -> dict[str, float]:
    """Compute one update, and leave its gradient in the model."""
    optimizer = adamw(stage.model, stage.settings)
    return loop.update(stage, optimizer, Plateau(), Progress(), torch.float32)[1]


def gradient(stage: LineStage) -> Tensor:
    parameters = list(stage.model.parameters())
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def test_two_micro_batches_of_16_give_the_gradient_of_one_batch_of_32() -> None:
    whole, parts = LineStage(batch_size=32), LineStage(batch_size=16, accumulation=2)
    figures, figures_of_parts = one_update(whole), one_update(parts)
    assert parts.seen == [(0, 0), (0, 1)]
    torch.testing.assert_close(gradient(parts), gradient(whole), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(parts.model.weight, whole.model.weight)
    assert figures_of_parts == pytest.approx(figures, rel=1e-5)


def test_micro_batches_of_later_updates_are_counted_on() -> None:
    stage = LineStage(accumulation=2)
    loop.update(stage, adamw(stage.model, stage.settings), Plateau(), Progress(step=3), torch.float32)
    assert stage.seen == [(3, 6), (3, 7)]


def test_clipping_scales_the_gradient_to_its_limit_and_logs_the_norm_before_it() -> None:
    free, clipped, loose = LineStage(), LineStage(clip_norm=0.01), LineStage(clip_norm=1e3)
    norm = one_update(free)["gradient_norm"]
    assert norm == pytest.approx(float(gradient(free).norm())) and norm > 0.01
    assert one_update(clipped)["gradient_norm"] == pytest.approx(norm)
    assert float(gradient(clipped).norm()) == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(gradient(clipped), gradient(free) * 0.01 / norm, rtol=1e-3, atol=1e-8)
    one_update(loose)
    assert torch.equal(gradient(loose), gradient(free))


def test_an_update_that_is_not_finite_is_skipped_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = LineStage(broken=(3, 5))
    with caplog.at_level(logging.WARNING):
        averaged = run(stage, tmp_path)
    said = [record.getMessage() for record in caplog.records if record.name == loop.logger.name]
    assert said == [f"line: loss or gradient of update {n} is not finite: skipped" for n in (3, 5)]
    assert [row["n_non_finite"] for row in rows(tmp_path) if "n_non_finite" in row] == [0, 2]
    assert all(tensor.isfinite().all() for tensor in (*averaged.values(), *stage.model.state_dict().values()))
    found = checkpoint.newest(tmp_path / "checkpoints" / "line")
    assert found is not None and found.step == 6
    assert files.read_json(found.folder / "state.json")["n_non_finite"] == 2


def test_a_skipped_update_changes_neither_weights_nor_moments_nor_the_plateau() -> None:
    stage = LineStage(broken=(2,))
    optimizer, plateau, progress = adamw(stage.model, stage.settings), Plateau(), Progress()
    loop.update(stage, optimizer, plateau, progress, torch.float32)
    before = {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}
    moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
    loop.update(stage, optimizer, plateau, progress, torch.float32)
    assert (progress.step, progress.n_non_finite, plateau.count) == (2, 1, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage.model.state_dict().items())
    after = [value for state in optimizer.state.values() for value in state.values()]
    assert all(torch.equal(*pair) for pair in zip(moments, after, strict=True))


def test_too_many_in_a_row_end_the_run_in_one_line_and_the_last_good_checkpoint_is_kept(
    tmp_path: Path,
) -> None:
    settings: dict[str, Any] = {"decay_steps": 100, "sheet_every": 100, "validate_every": 100}
    short = LineStage(steps=4, checkpoint_every=4, **settings)
    run(short, tmp_path / "short")
    stage = LineStage(steps=60, checkpoint_every=7, broken=tuple(range(5, 61)), **settings)
    with pytest.raises(ValueError) as caught:
        run(stage, tmp_path / "broken")
    last = 4 + MAX_NON_FINITE
    assert str(caught.value) == (
        f"line: {MAX_NON_FINITE} updates in a row were not finite, up to update {last}: lower "
        "line_training.learning_rate, or look at the data; the last good checkpoint is kept"
    )
    found = checkpoint.newest(tmp_path / "broken" / "checkpoints" / "line")
    assert found is not None and found.step == last // 7 * 7
    kept = weights.load_tensors(found.folder / "weights.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in short.model.state_dict().items())


def test_good_updates_between_start_the_count_again(tmp_path: Path) -> None:
    n = MAX_NON_FINITE - 1
    broken = (*range(1, n + 1), *range(n + 2, 2 * n + 2))
    stage = LineStage(steps=2 * n + 2, broken=broken, sheet_every=100, checkpoint_every=100)
    run(stage, tmp_path)
    assert rows(tmp_path)[-1]["step"] == 2 * n + 2
    assert max(row.get("n_non_finite", 0) for row in rows(tmp_path)) == 2 * n


def test_validation_and_sheet_come_when_due_and_at_the_end_with_the_averaged_weights(tmp_path: Path) -> None:
    stage = LineStage(steps=7)
    averaged = run(stage, tmp_path)
    assert [row["step"] for row in rows(tmp_path) if "validation_error" in row] == [3, 6, 7]
    sheets = sorted(path.name for path in (tmp_path / "samples" / "line").iterdir())
    assert sheets == ["step-0000006.png", "step-0000007.png"]
    assert torch.equal(stage.validated_with[-1], averaged["weight"])
    assert not torch.equal(stage.model.weight, averaged["weight"]), "the model trains on with its own"
    assert stage.model.training


def test_the_average_is_taken_every_so_many_updates(tmp_path: Path) -> None:
    stage = LineStage(average_every=3, average_decay=0.999)
    first = stage.model.weight.detach().clone()
    by_hand = MovingAverage(stage.model, 0.999)
    averaged = run(stage, tmp_path)
    # the same updates again, the average by hand: decay (1 + n) / (10 + n)
    other = LineStage(average_every=3, average_decay=0.999)
    optimizer, plateau, progress = adamw(other.model, other.settings), Plateau(), Progress()
    for step in range(1, 7):
        loop.update(other, optimizer, plateau, progress, torch.float32)
        if step % 3 == 0:
            by_hand.update(other.model, step // 3)
    assert torch.equal(averaged["weight"], by_hand.tensors["weight"])
    assert not torch.equal(averaged["weight"], first)


def test_a_signal_finishes_the_update_saves_and_the_same_call_goes_on_to_the_same_bits(
    tmp_path: Path,
) -> None:
    whole = LineStage()
    expected = run(whole, tmp_path / "whole")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped in stage line after update 3; the same command") as caught:
        run(LineStage(stop_at=3), tmp_path / "cut")
    assert caught.value.signal_number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    found = checkpoint.newest(tmp_path / "cut" / "checkpoints" / "line")
    assert found is not None and found.step == 3
    resumed = LineStage()
    averaged = run(resumed, tmp_path / "cut")
    assert [step for step, _ in resumed.seen] == [3, 4, 5]
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in expected.items())
    assert torch.equal(resumed.model.weight, whole.model.weight)
    finished = LineStage()
    assert torch.equal(run(finished, tmp_path / "cut")["weight"], expected["weight"])
    assert finished.seen == [], "a finished stage computes nothing"


@pytest.mark.parametrize("place", ["update", "checkpoint"])
def test_a_signal_in_the_last_update_ends_the_run_too_and_no_later_stage_begins(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(LineStage(), tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="after update 6"):
        if place == "checkpoint":
            save = checkpoint.save

            def signalled(root: Path, step: int, *parts: Any) -> Path:
                if step == 6:
                    signal.raise_signal(signal.SIGTERM)
                return save(root, step, *parts)

            patch.setattr(checkpoint, "save", signalled)
        run(LineStage(stop_at=6 if place == "update" else None), tmp_path / "cut")
    resumed = LineStage()
    assert torch.equal(run(resumed, tmp_path / "cut")["weight"], expected["weight"])
    assert resumed.seen == [], "all was saved"


def test_a_run_in_another_thread_leaves_the_signals_alone(tmp_path: Path) -> None:
    done: list[dict[str, Tensor]] = []
    thread = threading.Thread(target=lambda: done.append(run(LineStage(steps=2), tmp_path)))
    thread.start()
    thread.join()
    assert len(done) == 1
