"""metrics.jsonl stays JSON through kills and NaN, and TensorBoard gets the same numbers."""

import json
import logging
import math
import threading
from pathlib import Path
from typing import Any, NoReturn

import pytest

from dalle.training.log import RunLog, duration


def refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is not JSON")


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_rows_are_json_with_stage_step_and_seconds(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", "dvae", steps=10, done=0, quiet=True) as log:
        log.metrics(5, {"loss": 0.25, "n_non_finite": 0})
        log.metrics(10, {"validation_psnr": 20.0})
    first, second = rows(tmp_path / "run")
    assert first.pop("seconds") >= 0 and second.pop("seconds") >= 0
    assert first == {"stage": "dvae", "step": 5, "loss": 0.25, "n_non_finite": 0}
    assert second == {"stage": "dvae", "step": 10, "validation_psnr": 20.0}


def test_a_row_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with RunLog(tmp_path, "dvae", steps=10, done=0, quiet=True) as log:
        log.metrics(1, {"loss": 1.0})
        assert len(rows(tmp_path)) == 1


def test_numbers_that_are_not_finite_are_null_for_json_has_no_nan(tmp_path: Path) -> None:
    with RunLog(tmp_path, "dvae", steps=10, done=0, quiet=True) as log:
        log.metrics(1, {"loss": math.nan, "gradient_norm": math.inf, "learning_rate": 0.5})
    [row] = rows(tmp_path)
    assert (row["loss"], row["gradient_norm"], row["learning_rate"]) == (None, None, 0.5)


@pytest.mark.parametrize("left", ["", '{"step": 1}\n', '{"step": 1}\n{"step": 2', '{"st'])
def test_half_a_line_left_by_a_kill_is_cut(left: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(left)
    with RunLog(tmp_path, "transformer", steps=10, done=1, quiet=True) as log:
        log.metrics(2, {"loss": 1.0})
    steps = [row["step"] for row in rows(tmp_path)]
    assert steps == ([1, 2] if left.count("\n") else [2])


def test_stages_append_to_one_file(tmp_path: Path) -> None:
    for stage in ("dvae", "transformer"):
        with RunLog(tmp_path, stage, steps=1, done=0, quiet=True) as log:
            log.metrics(1, {"loss": 1.0})
    assert [row["stage"] for row in rows(tmp_path)] == ["dvae", "transformer"]


def test_tensorboard_gets_the_numbers_of_each_stage(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, "dvae", steps=10, done=0, quiet=True) as log:
        log.metrics(4, {"loss": 0.5, "resumed": True})
    [file] = (tmp_path / "tensorboard" / "dvae").glob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    [scalar] = events.Scalars("dvae/loss")
    assert (scalar.step, scalar.value) == (4, 0.5)


def test_tensorboard_forgets_what_a_killed_process_logged_after_its_last_checkpoint(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, steps in ((0, (2, 4, 6)), (4, (6, 8))):
        with RunLog(tmp_path, "dvae", steps=10, done=done, quiet=True) as log:
            for step in steps:
                log.metrics(step, {"loss": float(done)})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "dvae")).Reload()
    scalars = [(scalar.step, scalar.value) for scalar in events.Scalars("dvae/loss")]
    assert scalars == [(2, 0.0), (4, 0.0), (6, 4.0), (8, 4.0)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full")
@pytest.mark.parametrize("full", ["metrics.jsonl", "tensorboard"])
def test_a_full_disk_is_one_error_that_names_the_file(full: str, tmp_path: Path) -> None:
    n_threads = threading.active_count()
    with RunLog(tmp_path, "dvae", steps=10, done=0, quiet=True) as log:
        log.metrics(1, {"loss": 1.0})
        assert threading.active_count() == n_threads, "a thread would show its own traceback"
        path = tmp_path / full if full == "metrics.jsonl" else log._board.path
        path.unlink()
        path.symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left on device") as caught:
            log.metrics(2, {"loss": 1.0})
        assert str(caught.value) == f"cannot write {path}: No space left on device"


def test_pictures_a_second_count_this_process_only(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "dvae", steps=10, done=5, quiet=True)
    assert log.pictures_per_second() == 0
    with log:
        log.step(6, 32, 1.0)
        log.step(7, 32, 1.0)
    assert log.n_pictures == 64 and log.pictures_per_second() > 0


def test_quiet_says_nothing_and_a_plain_line_names_stage_steps_and_eta(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for quiet in (True, False):
            with RunLog(tmp_path, "dvae", steps=10, done=0, quiet=quiet) as log:
                log.step(1, 4, 0.5)
                log.step(2, 4, 0.5)  # within the next LINE_SECONDS: no second line
                log.say("dvae 2: psnr 20")
    line, said = [record.getMessage() for record in caplog.records]
    assert line.startswith("dvae 1/10  loss 0.5000") and line.endswith("ETA 1 second")
    assert said == "dvae 2: psnr 20"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, "1 second"),
        (1.4, "1 second"),
        (89, "89 seconds"),
        (89.7, "1 minute"),
        (91, "2 minutes"),
        (26 * 60 + 10, "26 minutes"),
        (89.4 * 60, "89 minutes"),
        (90 * 60, "1.5 hours"),
        (7200, "2 hours"),
        (7.04 * 3600, "7 hours"),
        (47 * 3600, "47 hours"),
        (48 * 3600, "2 days"),
        (2.5 * 86400, "2.5 days"),
        (9.96 * 86400, "10 days"),
        (1234567 * 86400, "1,234,567 days"),
    ],
)
def test_durations_are_words_of_one_unit(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected
