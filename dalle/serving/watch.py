"""Watching a training run: reads what `dalle train` writes into DIR/run while it writes it, and changes nothing.

A run is known by a hash of its name, never by a path from outside; a link that leads out of the watched folder is not
followed. metrics.jsonl is read from where the last look ended; half a line at its end waits for its other half. When a
stage resumes from an earlier update, the rows that it will write again are dropped.
"""

import contextlib
import hashlib
import json
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

STAGES = ("dvae", "decoder", "transformer", "clip")  # in the order in which they train
SHEETS = {
    "dvae": "reconstructions",
    "decoder": "reconstructions",
    "transformer": "samples",
    "clip": "retrieval",
}  # what a stage's sheet shows
MAX_ROWS = 8192  # rows of numbers kept of a run: beyond, every other one of the longest stage goes
MAX_READ = 64 * 1024 * 1024  # bytes of metrics.jsonl taken in by one look
MAX_LINE = 1024 * 1024  # bytes; no row of ours is near
MAX_STEP = 2**53  # beyond, JavaScript's numbers are no integers
MAX_FILE = 32 * 1024 * 1024  # bytes of a sheet or of a JSON file
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

Status = Literal["given", "waiting", "running", "done"]


@dataclass(frozen=True)
class Row:
    """One line of metrics.jsonl."""

    end: int  # byte where the line ends: the cursor of who has read it
    stage: str
    step: int  # updates done
    values: dict[str, float | None]  # the line's other numbers; None: one that was not finite


@dataclass(frozen=True)
class Sheet:
    """A picture that a stage drew of its own state."""

    name: str  # STAGE-STEP
    stage: str
    step: int
    path: Path


@dataclass(frozen=True)
class StageState:
    """Where one stage stands."""

    stage: str
    status: Status
    step: int  # updates done
    steps: int | None  # updates wanted, if the run says so
    is_continued: bool  # began from given weights, not from random ones
    settings: dict[str, Any]  # its part of the recipe, such as `warmup_steps`
    model: dict[str, Any]  # sizes of what it trains, such as `n_codes`


@dataclass
class RunSnapshot:
    """What a run's folder says at one moment."""

    name: str
    updated_at: float  # of metrics.jsonl, seconds since 1970, UTC
    stages: list[StageState]
    rows: list[Row]
    sheets: list[Sheet]
    n_bad: int  # samples that could not be read
    bad_reasons: Counter[str]
    end: int  # byte of metrics.jsonl up to which it was read
    rewritten_at: int  # a reader whose cursor is before this byte has rows that do not count any more
    problems: list[str] = field(default_factory=list)  # one clear line each: what could not be read

    def of(self, stage: str) -> list[Row]:
        """Return the rows of a stage."""
        return [row for row in self.rows if row.stage == stage]


class JSONLines:
    """Reads a growing file of JSON lines from where it stopped."""

    def __init__(self) -> None:
        self.end = 0
        self.n_broken = 0  # lines that are no JSON object
        self._file: tuple[int, int] | None = None

    def read(
        self, stream: BinaryIO, identity: tuple[int, int], size: int
    ) -> tuple[bool, list[tuple[int, Any]]]:
        """Return the new whole lines, each with the byte where it ends, and whether the file was begun anew."""
        is_new = self._file is not None and (identity != self._file or size < self.end)
        if is_new:
            self.end = self.n_broken = 0
        self._file = identity
        stream.seek(self.end)
        data = stream.read(MAX_READ)
        lines = []
        for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
            self.end += len(line)
            record = _object(line)
            if record is None:
                self.n_broken += 1
            else:
                lines.append((self.end, record))
        return is_new, lines


class Run:
    """One run's folder, read a little further at every look; safe to use from many threads."""

    def __init__(self, root: Path, folder: Path) -> None:
        """`folder` is what `dalle train --out` was given; nothing outside `root` is read."""
        self.name = _text(folder.name)
        self.id = hashlib.sha256(str(folder).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        self._root, self._folder = root, folder / "run"
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._metrics, self._bad = JSONLines(), JSONLines()
        self._rows: list[Row] = []
        self._last_step: dict[str, int] = {}
        self._rewritten_at = 0
        self._bad_reasons: Counter[str] = Counter()

    def look(self) -> RunSnapshot:
        """Read what is new; what cannot be read is named in `problems`."""
        problems: list[str] = []
        with self._lock:
            updated_at = self._read_metrics(problems)
            self._read_bad(problems)
            config = self._json("config.json", problems)
            records = self._json("stages.json", problems)
            if self._metrics.n_broken:
                problems.append(
                    f"{self._metrics.n_broken} lines of metrics.jsonl are not JSON and were left out"
                )
            return RunSnapshot(
                name=self.name,
                updated_at=updated_at,
                stages=list(_stages(config, records, self._rows)),
                rows=list(self._rows),
                sheets=list(self._sheets()),
                n_bad=self._bad_reasons.total(),
                bad_reasons=Counter(self._bad_reasons),
                end=self._metrics.end,
                rewritten_at=self._rewritten_at,
                problems=problems,
            )

    def sheet(self, name: str) -> bytes | None:
        """Return the PNG of a sheet, or None when there is none of that name; ValueError when it cannot be read."""
        with self._lock:
            found = {sheet.name: sheet for sheet in self._sheets()}.get(name)
        if found is None:
            return None
        with self._open(found.path) as stream:
            data = stream.read(MAX_FILE + 1)
        if len(data) > MAX_FILE or not data.startswith(PNG_SIGNATURE):
            raise ValueError(f"sheet {name} is no PNG, or larger than {MAX_FILE} bytes")
        return data

    def _read_metrics(self, problems: list[str]) -> float:
        path = self._folder / "metrics.jsonl"
        with self._tolerated(problems, path), self._open(path) as stream:
            status = path.stat()
            is_new, lines = self._metrics.read(stream, (status.st_dev, status.st_ino), status.st_size)
            if is_new:
                self._rows, self._last_step, self._rewritten_at = [], {}, self._metrics.end
            for end, record in lines:
                self._take(end, record)
            self._thin()
            return status.st_mtime
        return 0.0

    def _take(self, end: int, record: dict[str, Any]) -> None:
        stage, step = record.get("stage"), record.get("step")
        if stage not in STAGES or type(step) is not int or not 0 <= step <= MAX_STEP:
            self._metrics.n_broken += 1
            return
        if step < self._last_step.get(stage, 0):
            # The run goes on from an earlier checkpoint: what it had logged beyond is done again.
            self._rows = [row for row in self._rows if row.stage != stage or row.step <= step]
            self._rewritten_at = end
        self._last_step[stage] = step
        self._rows.append(Row(end, stage, step, _numbers(record)))

    def _thin(self) -> None:
        while len(self._rows) > MAX_ROWS:
            longest, _ = Counter(row.stage for row in self._rows).most_common(1)[0]
            losses = [row for row in self._rows if row.stage == longest and "loss" in row.values]
            if len(losses) < len(self._rows) // 4:  # no training writes such a file
                self._rows = self._rows[-MAX_ROWS:]
                return
            dropped = {row.end for row in losses[-2::-2]}  # the last one stays
            self._rows = [row for row in self._rows if row.end not in dropped]

    def _read_bad(self, problems: list[str]) -> None:
        path = self._folder / "bad_samples.jsonl"
        if not path.exists():
            return
        with self._tolerated(problems, path), self._open(path) as stream:
            status = path.stat()
            is_new, lines = self._bad.read(stream, (status.st_dev, status.st_ino), status.st_size)
            if is_new:
                self._bad_reasons.clear()
            self._bad_reasons.update(_text(str(record.get("reason", ""))[:200]) for _, record in lines)

    def _json(self, name: str, problems: list[str]) -> dict[str, Any]:
        path = self._folder / name
        if not path.exists():
            return {}
        with self._tolerated(problems, path), self._open(path) as stream:
            return _object(stream.read(MAX_FILE)) or {}
        return {}

    def _sheets(self) -> Iterator[Sheet]:
        for stage in STAGES:
            folder = self._folder / "samples" / stage
            if not folder.is_dir() or not _is_inside(folder, self._root):
                continue
            for path in sorted(folder.iterdir()):
                match = re.fullmatch(r"step-([0-9]{1,12})\.png", path.name)
                if match and path.is_file() and _is_inside(path, self._root):
                    step = int(match[1])
                    yield Sheet(f"{stage}-{step}", stage, step, path)

    @contextlib.contextmanager
    def _tolerated(self, problems: list[str], path: Path) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            return  # not written yet
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            problems.append(f"{path.name} cannot be read: {reason}")

    def _open(self, path: Path) -> BinaryIO:
        """Open a plain file that really lies in the watched folder."""
        if not _is_inside(path, self._root):
            raise ValueError("it is a link that leads out of the watched folder")
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise ValueError("it is no plain file")
        return path.open("rb")


class Runs:
    """The runs beneath a folder; or the one run that it is."""

    def __init__(self, root: Path) -> None:
        """ValueError when `root` is no folder."""
        if not root.is_dir():
            raise ValueError(f"{root}: no such folder of training runs: pass the parent of what --out was")
        self.root = root.resolve()
        self._runs: dict[Path, Run] = {}
        self._lock = threading.Lock()

    def all(self) -> list[Run]:
        """Every run that is there now, by name."""
        folders = [self.root] if _is_run(self.root) else sorted(self.root.iterdir())
        with self._lock:
            found = {}
            for folder in folders:
                if _is_inside(folder, self.root) and _is_run(folder):
                    found[folder] = self._runs.get(folder) or Run(self.root, folder)
            self._runs = found
            return list(found.values())

    def get(self, id: str) -> Run | None:
        """Return the run of an id, or None."""
        return next((run for run in self.all() if run.id == id), None)


def _is_run(folder: Path) -> bool:
    run = folder / "run"
    return (run / "config.json").is_file() or (run / "metrics.jsonl").is_file()


def _is_inside(path: Path, root: Path) -> bool:
    try:
        return path.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # links in a circle
        return False


def _object(data: bytes) -> dict[str, Any] | None:
    if len(data) > MAX_LINE:
        return None
    try:
        record = json.loads(data, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _numbers(record: dict[str, Any]) -> dict[str, float | None]:
    """Return what JSON can carry on: numbers, true and false, and null for what is not finite."""
    numbers = {
        name: value for name, value in record.items() if value is None or isinstance(value, int | float)
    }
    numbers.pop("step", None)
    return {
        _text(name): value if value is None or abs(value) <= sys.float_info.max else None
        for name, value in numbers.items()
    }


def _text(text: str) -> str:
    """Return a name from a file system or a log as UTF-8 can carry it on."""
    return text.encode("utf-8", "replace").decode()


def _stages(config: dict[str, Any], records: dict[str, Any], rows: list[Row]) -> Iterator[StageState]:
    """Return the stages of a run, in order; those that its recipe leaves out are left out."""
    recipe, given = _table(config, "recipe"), _table(config, "init_from")
    for stage in STAGES:
        settings, model = _table(recipe, f"{stage}_training"), _table(recipe, stage)
        steps = settings.get("steps")
        own = [row.step for row in rows if row.stage == stage]
        is_done = stage in records
        # A stage that goes on from given weights names them too, but it has rows.
        is_given = not own and "given" in _table(_table(records, stage), "inputs")
        if not (own or is_done or settings):
            continue
        status: Status = "given" if is_given else "done" if is_done else "running" if own else "waiting"
        yield StageState(
            stage=stage,
            status=status,
            step=max(own, default=0),
            steps=steps if type(steps) is int and not is_given else None,
            is_continued=stage in given,
            settings=settings,
            model={"n_codes": _table(recipe, "dvae").get("n_codes")} | model,
        )


def _table(tree: dict[str, Any], key: str) -> dict[str, Any]:
    value = tree.get(key)
    return value if isinstance(value, dict) else {}
