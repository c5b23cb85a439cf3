"""`dalle serve` as a process of its own: stopped during work it ends or tells, killed it leaves a whole history."""

import contextlib
import http.client
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dalle.images import read_recipe
from dalle.serving.history import History
from tests.live import gated_pipe, parse_events

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    gated_pipe().save_pretrained(folder)
    return folder


class Process:
    """A running `dalle serve`."""

    def __init__(self, model: Path, data: Path, *settings: str) -> None:
        command = [sys.executable, "-m", "dalle.cli", "serve", "--port", "0", "--model", str(model)]
        command += ["--data-dir", str(data), *(word for one in settings for word in ("--set", one))]
        # One thread: the machine has few cores, and the model is tiny.
        self.popen = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert self.popen.stderr is not None
        lines = []
        for line in self.popen.stderr:
            lines.append(line)
            if "dalle serves on http://" in line:
                self.address = line.split("http://")[1].split()[0]
                break
        else:
            raise AssertionError("".join(lines))

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.address, timeout=60)

    @contextlib.contextmanager
    def draw(self, **fields: Any) -> Iterator[http.client.HTTPResponse]:
        """A stream of which something is drawn already."""
        with contextlib.closing(self.connect()) as connection:
            body = json.dumps({"prompt": "a dog"} | fields)
            connection.request("POST", "/api/draw", body, {"content-type": "application/json"})
            with connection.getresponse() as answer:
                assert answer.status == 200
                while not (line := answer.readline()).startswith(b"event: row"):
                    if not line:
                        raise ConnectionError("the stream ended early")
                yield answer


@contextlib.contextmanager
def serve(model: Path, data: Path, *settings: str) -> Iterator[Process]:
    process = Process(model, data, *settings)
    try:
        yield process
    finally:
        if process.popen.poll() is None:
            process.popen.kill()
        process.popen.communicate(timeout=30)


def last_event(answer: http.client.HTTPResponse) -> tuple[str, dict[str, Any]]:
    text = answer.read().split(b"\n\n")
    whole = [block for block in text if block.startswith(b"event: ")]
    return parse_events(whole[-1])[0]


def test_sigterm_lets_accepted_work_end_and_takes_no_more(model: Path, tmp_path: Path) -> None:
    with serve(model, tmp_path, "rows_per_batch=2", "grace_s=60") as process:
        with process.draw(num_images=2, num_candidates=60) as answer:
            process.popen.send_signal(signal.SIGTERM)
            name, data = last_event(answer)
        assert name == "settled" and len(data["pictures"]) == 60
        assert process.popen.wait(60) in (0, -signal.SIGTERM)
        with contextlib.closing(process.connect()) as connection, pytest.raises(OSError):
            connection.request("GET", "/health")
    assert_whole(tmp_path, {one["id"] for one in data["pictures"]})


def test_sigterm_tells_those_whose_work_takes_too_long(model: Path, tmp_path: Path) -> None:
    with serve(model, tmp_path, "rows_per_batch=1", "grace_s=0") as process:
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(process.draw(num_images=1, num_candidates=500)) for _ in range(3)]
            process.popen.send_signal(signal.SIGTERM)
            for answer in streams:
                name, data = last_event(answer)
                assert (name, data["error"]["code"]) == ("error", "server_shutting_down")
        assert process.popen.wait(60) in (0, -signal.SIGTERM)
    assert_whole(tmp_path, set())


def test_the_history_is_whole_after_sigkill_at_any_moment(model: Path, tmp_path: Path) -> None:
    rng, told, lock = random.Random(7), set[str](), threading.Lock()
    for _ in range(4):
        with serve(model, tmp_path, "rows_per_batch=8") as process:

            def keep_drawing(process: Process = process) -> None:
                try:
                    while True:
                        with process.draw(num_images=1, num_candidates=5) as answer:
                            name, data = last_event(answer)
                        if name == "settled":
                            with lock:
                                told.update(one["id"] for one in data["pictures"])
                except (OSError, http.client.HTTPException, AssertionError, IndexError, KeyError, ValueError):
                    pass  # killed

            clients = [threading.Thread(target=keep_drawing) for _ in range(4)]
            for client in clients:
                client.start()
            goal = len(told) + rng.randint(5, 60)
            while len(told) < goal:
                assert process.popen.poll() is None
                threading.Event().wait(rng.uniform(0.0, 0.01))  # so that the kill falls anywhere
            process.popen.kill()
            for client in clients:
                client.join(60)
                assert not client.is_alive()
        assert_whole(tmp_path, told)
    assert len(told) > 20


def assert_whole(folder: Path, told: set[str]) -> None:
    """The file is sound, holds every picture that a client was told of, and each with its recipe."""
    history = History(folder)
    for picture_id in told:
        png = history.png(picture_id)
        assert png is not None, "a client was told of a picture that is gone"
        assert read_recipe(png)["caption"] == "a dog"
    history.close()
    with contextlib.closing(sqlite3.connect(folder / "history.sqlite")) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
