"""What a run tells a person and a program: metrics.jsonl, TensorBoard, and one progress line."""

import io
import json
import logging
import math
import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

LINE_SECONDS = 30.0  # between plain lines when nobody watches a terminal
logger = logging.getLogger(__name__)


def duration(seconds: float) -> str:
    """Seconds in words of one unit: "45 seconds", "26 minutes", "5.3 hours", "12 days"."""
    limits = {"second": 89.5, "minute": 89.5 * 60, "hour": 47.5 * 3600}
    name = next((name for name, limit in limits.items() if seconds < limit), "day")
    count = seconds / {"second": 1, "minute": 60, "hour": 3600, "day": 86400}[name]
    # Tenths where a whole number would round by more than a twentieth.
    is_coarse = name in ("hour", "day") and count < 10 and round(count, 1) != round(count)
    shown = f"{count:.1f}" if is_coarse else f"{max(round(count), 1):,}"
    return f"{shown} {name}" + ("" if shown == "1" else "s")


class RunLog:
    """Logs one stage of a run; use as a context manager.

    `folder` is DIR/run. Every row of metrics.jsonl holds `stage`, `step` (updates done) and numbers: losses in nats
    per token or per sub-pixel, `pictures_per_second`, `seconds` since this process began the stage.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        steps: int,
        done: int,
        quiet: bool = False,
        is_main: bool = True,
        later: float = 0.0,
    ) -> None:
        """`is_main`: of several processes one writes and speaks, the others keep silent.

        `later` is the work of the stages after this one, in updates of this one.
        """
        self.stage, self.steps, self.done, self.later = stage, steps, done, later
        self.is_main = is_main
        self.quiet = quiet or not is_main
        self.folder = folder
        self.began = time.monotonic()
        self.last_line = -math.inf  # the first update is said at once
        self.n_pictures = 0
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if not self.is_main:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        _drop_half_line(self.folder / "metrics.jsonl")
        self._board = Board(self.folder / "tensorboard" / self.stage, self.done)
        if sys.stderr.isatty() and not self.quiet:
            self._progress = Progress(
                TextColumn("[bold]{task.fields[stage]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=Console(stderr=True),
            )
            self._progress.start()
            self._task = self._progress.add_task(
                "train", total=self.steps, completed=self.done, stage=self.stage, numbers=""
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def step(self, step: int, n_pictures: int, loss: float) -> None:
        """Move the progress line: `step` updates are done, the last one saw `n_pictures`."""
        self.n_pictures += n_pictures
        now = time.monotonic()
        rate = self.pictures_per_second()
        numbers = f"loss {loss:.4f}  {rate:.1f} pictures/s"
        if self._progress is not None and self._task is not None:
            shown = f"{numbers}  ETA {self._eta(step, now)}"
            self._progress.update(self._task, completed=step, numbers=shown)
        elif not self.quiet and now - self.last_line >= LINE_SECONDS:
            self.last_line = now
            eta = self._eta(step, now)
            logger.info("%s %d/%d  %s  ETA %s", self.stage, step, self.steps, numbers, eta)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Write one row of numbers to metrics.jsonl and TensorBoard; one that is not finite becomes null."""
        if not self.is_main:
            return
        row = {
            "stage": self.stage,
            "step": step,
            "seconds": round(time.monotonic() - self.began, 1),
            **{name: value if _is_json(value) else None for name, value in values.items()},
        }
        _append(self.folder / "metrics.jsonl", (json.dumps(row, allow_nan=False) + "\n").encode())
        numbers = {
            f"{self.stage}/{name}": float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and _is_json(value)
        }
        self._board.add(step, numbers)

    def say(self, message: str) -> None:
        """Show one line now."""
        if self._progress is not None:
            self._progress.console.print(message)
        elif not self.quiet:
            logger.info("%s", message)

    def pictures_per_second(self) -> float:
        """Pictures seen a second since this process began the stage."""
        return self.n_pictures / max(time.monotonic() - self.began, 1e-9)

    def _eta(self, step: int, now: float) -> str:
        """Return the time left: of this stage and, where others follow, of all."""
        per_update = (now - self.began) / max(step - self.done, 1)
        left = duration(per_update * (self.steps - step))
        if self.later == 0:
            return left
        return f"{left}; of all stages {duration(per_update * (self.steps - step + self.later))}"


class Board:
    """TensorBoard's file of one stage and process, written at once and here.

    TensorBoard's own writer has a thread, which answers a full disk with a traceback.
    """

    def __init__(self, folder: Path, done: int) -> None:
        """`done` updates stand; TensorBoard forgets what an earlier process logged for later ones."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._add(Event(wall_time=time.time(), step=done + 1, session_log=start))

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """Write the numbers of one update, by tag."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=number) for tag, number in numbers.items()]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _add(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        _append(self.path, record.getvalue())


def _append(path: Path, data: bytes) -> None:
    try:
        with open(path, "ab") as file:
            file.write(data)
    except OSError as error:
        again = OSError(f"cannot write {path}: {error.strerror}")
        again.errno = error.errno  # set by hand, for with it in the constructor the text begins "[Errno 28]"
        raise again from error


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _drop_half_line(path: Path) -> None:
    """A killed process can leave half a row: cut it, so that every line stays JSON."""
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            with open(path, "r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)
