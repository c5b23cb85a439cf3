"""The one training loop: every stage goes through `train_stage`, and can be stopped and resumed at any update."""

import functools
import logging
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import torch
from PIL.Image import Image
from torch import Tensor, nn

from dalle import images
from dalle.training.best import Best
from dalle.training.distributed import Layout
from dalle.training.log import RunLog
from dalle.training.optim import OPTIMIZERS, MovingAverage, Plateau, learning_rate
from dalle.training.precision import ResblockScaling
from dalle.training.processes import ALONE, AgreedStop, World
from dalle.training.recipe import IN_ONE_PIECE, DistributedConfig, Optimization
from dalle.training.sharded_checkpoint import Checkpoints

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16_resblock": torch.float32}
MAX_NON_FINITE = 20  # updates in a row whose loss or gradient is not finite before the run gives up
LOG_EVERY = 10  # updates between rows of metrics.jsonl
logger = logging.getLogger(__name__)


class Stage(Protocol):
    """What the loop asks of a stage; all randomness of an update is a function of its number."""

    @property
    def name(self) -> str:
        """What its folder, its rows and its lines are called."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    @property
    def settings(self) -> Optimization:
        """How it is trained."""

    def batch(self, number: int) -> Any:
        """The data of micro-batch `number`."""

    def loss(self, batch: Any, step: int, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch in update `step`, and what to log."""

    def validate(self) -> dict[str, float]:
        """Figures on held-out pictures, with the weights that the model holds now."""

    def score(self, figures: dict[str, float]) -> float:
        """The one number of a validation's figures that says how good the model is: the higher, the better."""

    def sheet(self) -> Image:
        """A picture that tells a person how the stage is going."""


@runtime_checkable
class WholeBatchStage(Stage, Protocol):
    """A stage whose loss is no sum over micro-batches: it adds an update's gradient itself."""

    def backward(self, step: int, dtype: torch.dtype, layout: Layout) -> tuple[float, dict[str, float]]:
        """Add the gradient of update `step`, computed in `dtype`, to the parameters; its loss, and what to log."""

    def after_update(self) -> None:
        """Restore what must hold of the weights after each update."""


class Stopped(AgreedStop):
    """The run was asked to stop, finished its update and saved; `signal_number` says by what."""

    def __init__(self, stage: str, step: int, signal_number: int) -> None:
        super().__init__(f"stopped in stage {stage} after update {step}; the same command goes on from there")
        self.signal_number = signal_number


@dataclass
class Progress:
    """Where a stage stands: what a checkpoint's state.json holds."""

    step: int = 0  # updates done
    n_non_finite: int = 0  # updates skipped in all
    n_non_finite_in_a_row: int = 0


@contextmanager
def stop_signals(is_alone: bool = True) -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying: the first asks politely, a second one interrupts at once.

    Not so under a launcher, which passes on what the terminal has sent already, and kills those who take too long.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and is_alone:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_stage(
    stage: Stage,
    run_folder: Path,
    dtype: torch.dtype,
    quiet: bool = False,
    world: World = ALONE,
    config: DistributedConfig = IN_ONE_PIECE,
    later: float = 0.0,
) -> dict[str, Tensor]:
    """Train `stage` to its last update, from its newest checkpoint if there is one; returns the averaged weights.

    With `patience` in its settings, it ends where nothing improves any more, and those of its best validation are
    returned. `later` is the work of the stages after it, in its own updates: for the ETA.
    Of several processes the main one gets them whole, the others get nothing. Raises `Stopped` after a signal
    (saved), ValueError when losses stay non-finite, OSError when the disk is full.
    """
    settings, model = stage.settings, stage.model
    dtype = DTYPES.get(settings.precision, dtype)
    scaling = ResblockScaling(model) if settings.precision == "fp16_resblock" else None
    layout = Layout(model, world, config, settings.compression, scaling)
    optimizer = OPTIMIZERS[settings.optimizer](model, settings)
    average = MovingAverage(model, settings.average_decay, settings.average_on_cpu)
    checkpoints = Checkpoints(run_folder / "checkpoints" / stage.name, layout, average, optimizer)
    best = Best(checkpoints.root, settings.patience, world.is_main) if settings.patience else None
    plateau, progress = Plateau(), Progress()
    state = checkpoints.restore()
    if state is not None:
        plateau.restore(state["plateau"])
        progress = Progress(state["step"], state["n_non_finite"], state["n_non_finite_in_a_row"])
        if scaling is not None:
            scaling.restore(state["scales"])
        if best is not None:
            best.restore(state["best"])
    with (
        RunLog(run_folder, stage.name, settings.steps, progress.step, quiet, world.is_main, later) as log,
        stop_signals(world.size == 1) as signals,
        checkpoints,
    ):
        n_pictures = settings.batch_size * settings.accumulation
        log.say(
            f"{stage.name}: {settings.steps:,} updates of {n_pictures:,} pictures; sample sheets in "
            f"{_sheet_folder(run_folder, stage)}"
        )
        if state is not None:
            log.say(f"{stage.name}: goes on from update {progress.step}")
            log.metrics(progress.step, {"resumed": True})
        elif best is not None:  # the model that it starts from may be the best
            _look(stage, average, 0, run_folder, log, layout, best)
        model.train()
        is_over = best is not None and best.is_over
        while progress.step < settings.steps and not is_over:
            loss, metrics = update(stage, optimizer, plateau, progress, dtype, scaling, layout)
            if progress.step % settings.average_every == 0:
                average.update(model, progress.step // settings.average_every)
            log.step(progress.step, n_pictures, loss)
            if progress.step % LOG_EVERY == 0 or progress.step in (1, settings.steps):
                log.metrics(progress.step, {**metrics, "pictures_per_second": log.pictures_per_second()})
            _look(stage, average, progress.step, run_folder, log, layout, best)
            is_over = best is not None and best.is_over
            stopped_by = _signal(signals, world)  # looked at once: a later one waits for the next update
            if (
                stopped_by
                or progress.step % settings.checkpoint_every == 0
                or progress.step == settings.steps
                or is_over
            ):
                state = {"plateau": plateau.state(), "n_non_finite": progress.n_non_finite}
                state["n_non_finite_in_a_row"] = progress.n_non_finite_in_a_row
                if scaling is not None:
                    state["scales"] = scaling.state()
                if best is not None:
                    state["best"] = best.state()
                checkpoints.save(progress.step, state)
                if best is not None:
                    best.checkpoint_written()
            if stopped_by:
                raise Stopped(stage.name, progress.step, stopped_by)
    stopped_by = _signal(signals, world)  # in the last update, or in its checkpoint
    if stopped_by:
        raise Stopped(stage.name, progress.step, stopped_by)  # the next stage must not begin
    if best is None:
        return layout.whole(average.tensors)
    log.say(f"{stage.name}: the weights after {best.step} of {progress.step} updates are kept, its best")
    return best.load()


def _signal(received: list[int], world: World) -> int:
    """The signal that some process was sent, as all of them agree; 0 if none was."""
    return world.largest(received[0] if received else 0)


def update(
    stage: Stage,
    optimizer: torch.optim.Optimizer,
    plateau: Plateau,
    progress: Progress,
    dtype: torch.dtype,
    scaling: ResblockScaling | None = None,
    layout: Layout | None = None,
) -> tuple[float, dict[str, float]]:
    """One update: accumulate, clip, step; a non-finite one is skipped and counted."""
    settings, step = stage.settings, progress.step
    layout = layout or Layout(stage.model)
    rate = learning_rate(settings, step, plateau.n_halvings)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    whole = stage if isinstance(stage, WholeBatchStage) else None
    accumulate = whole.backward if whole is not None else functools.partial(_accumulate, stage)
    total, sums = accumulate(step, dtype, layout)
    layout.finish_gradients()
    total, *means = layout.world.means([total, *sums.values()])
    sums = dict(zip(sums, means, strict=True))
    has_overflowed = scaling is not None and not scaling.unscale_()
    limit = settings.clip_norm or math.inf
    norm = layout.clip(limit)
    progress.step += 1
    if has_overflowed and math.isfinite(total) and scaling is not None and scaling.can_back_off():
        progress.n_non_finite += 1  # about one update in twenty is (App. E.2.2): its scales have moved
    elif has_overflowed or not (math.isfinite(total) and math.isfinite(norm)):
        _skip(stage, progress)
    else:
        optimizer.step()
        layout.average_buffers()
        if whole is not None:
            whole.after_update()
        progress.n_non_finite_in_a_row = 0
        plateau.update(total)
    return total, {
        "loss": total,
        **sums,
        "gradient_norm": norm,
        "learning_rate": rate,
        "n_non_finite": progress.n_non_finite,
        **({} if scaling is None else scaling.figures()),
        **({} if layout.compressor is None else {"compression_ratio": layout.compressor.ratio}),
    }


def _accumulate(
    stage: Stage, step: int, dtype: torch.dtype, layout: Layout
) -> tuple[float, dict[str, float]]:
    """Add the mean gradient of an update's micro-batches to the parameters; mean loss and metrics."""
    n, total, sums = stage.settings.accumulation, 0.0, dict[str, float]()
    device = next(stage.model.parameters()).device
    for number in range(step * n, (step + 1) * n):
        batch = stage.batch(number)
        with layout.micro_batch(is_last=number == (step + 1) * n - 1):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss, metrics = layout(stage.loss, batch, step, number)
            (loss / n).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach()) / n
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value) / n
    return total, sums


def _skip(stage: Stage, progress: Progress) -> None:
    progress.n_non_finite += 1
    progress.n_non_finite_in_a_row += 1
    logger.warning("%s: loss or gradient of update %d is not finite: skipped", stage.name, progress.step)
    if progress.n_non_finite_in_a_row >= MAX_NON_FINITE:
        raise ValueError(
            f"{stage.name}: {MAX_NON_FINITE} updates in a row were not finite, up to update {progress.step}: lower "
            f"{stage.name}_training.learning_rate, or look at the data; the last good checkpoint is kept"
        )


def _sheet_folder(run_folder: Path, stage: Stage) -> Path:
    return run_folder / "samples" / stage.name


def _look(
    stage: Stage,
    average: MovingAverage,
    step: int,
    run_folder: Path,
    log: RunLog,
    layout: Layout,
    best: Best | None,
) -> None:
    """Validate and draw the sample sheet with the averaged weights, when it is time; `best` takes the validation."""
    last = step == stage.settings.steps
    validates = step % stage.settings.validate_every == 0 or last
    draws = step % stage.settings.sheet_every == 0 or last
    if not (validates or draws):
        return
    stage.model.eval()
    with average.applied(stage.model), torch.no_grad():
        if validates:
            found = stage.validate()
            figures = {f"validation_{name}": value for name, value in found.items()}
            log.metrics(step, figures)
            if best is not None:
                (score,) = layout.world.means([stage.score(found)])  # the same for all processes
                best.take(step, score, lambda: layout.whole(average.tensors))
            shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
            log.say(f"{stage.name} {step}: {shown}")
        if draws:
            with layout.drawing(stage, average.tensors) as is_drawing:
                if is_drawing:
                    folder = _sheet_folder(run_folder, stage)
                    folder.mkdir(parents=True, exist_ok=True)
                    images.save_png(stage.sheet(), folder / f"step-{step:07d}.png", None)
    stage.model.train()
