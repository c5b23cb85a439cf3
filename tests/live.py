"""A real server in a thread, on a free port of this machine, with a model that a test can make and stop at will."""

import asyncio
import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle.generation.batch import Batch
from dalle.generation.engine import RowCallback
from dalle.generation.rerank import Ranker
from dalle.pipeline import DallePipeline
from dalle.serving.app import create_app
from dalle.serving.errors import ServingError
from dalle.serving.job import Event, Failed, Settled
from dalle.serving.server import Server
from dalle.serving.settings import Settings
from dalle.serving.state import State
from tests.tiny import tiny_clip, tiny_dvae, tiny_tokenizer, tiny_transformer

CAPTIONS = ["a red apple", "a green pear on a table", "a dog"]


class GatedPipeline(DallePipeline):
    """Waits after each grid row until the test lets it go on; open from the start."""

    def __init__(self, *parts: Any, **more: Any) -> None:
        super().__init__(*parts, **more)
        self.gate = threading.Event()
        self.gate.set()
        self.at_gate = threading.Event()  # a row is done and the worker waits
        self.batches: list[list[int]] = []  # how many rows of each request, batch by batch
        self.failing: set[str] = set()  # captions that no batch survives
        self.error: Exception = FloatingPointError("the transformer's logits are NaN")
        self.most_rows = 1000  # of a batch that memory holds
        self._sample = self.sampler.sample
        self.sampler.sample = self._gated  # type: ignore[method-assign]

    def _gated(self, batch: Batch, on_row_end: RowCallback, n_threads: int) -> Tensor:
        def held(row: int, tokens: Tensor) -> bool | None:
            if not self.gate.is_set():
                self.at_gate.set()
                assert self.gate.wait(60)
            return on_row_end(row, tokens)

        self.batches.append(list(batch.n_pictures))
        if any(slot.request.caption in self.failing for slot in batch.slots):
            raise self.error
        if sum(self.batches[-1]) > self.most_rows:
            raise MemoryError
        return self._sample(batch, held, n_threads)


def gated_pipe(with_ranker: bool = True, **dvae: Any) -> GatedPipeline:
    """A tiny model with a CLIP; `dvae` are settings of that."""
    tokenizer = tiny_tokenizer(CAPTIONS)
    ranker = Ranker(tiny_clip(tokenizer), tokenizer) if with_ranker else None
    return GatedPipeline(tokenizer, tiny_dvae(**dvae), tiny_transformer(tokenizer.n_vocab), ranker=ranker)


class Recorder:
    """A listener that keeps what it is told, and looks at every row."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.is_over = threading.Event()

    def n_looked_at(self, row: int, first: int, n: int, is_late: bool) -> int:
        return n

    def tell(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Settled | Failed):
            self.is_over.set()

    def last(self) -> Settled | Failed:
        """How the job ended; waits for it."""
        assert self.is_over.wait(60)
        ends = [event for event in self.events if isinstance(event, Settled | Failed)]
        assert len(ends) == 1 and self.events[-1] is ends[0], "told once, and last"
        return ends[0]

    def settled(self) -> Settled:
        last = self.last()
        assert isinstance(last, Settled), last
        return last

    def failed(self) -> ServingError:
        last = self.last()
        assert isinstance(last, Failed), last
        return last.error


@dataclass(frozen=True)
class Live:
    """A running server."""

    state: State
    pipe: GatedPipeline
    url: str
    server: Server

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case) and body; a dict is sent as JSON, bytes as they are."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        try:
            data = json.dumps(body).encode() if isinstance(body, dict | list) else body
            kind = {"content-type": "application/json"} if body is not None else {}
            connection.request(method, path, data, kind | (headers or {}))
            answer = connection.getresponse()
            return (
                answer.status,
                {name.lower(): value for name, value in answer.getheaders()},
                answer.read(),
            )
        finally:
            connection.close()

    def events(self, body: dict[str, Any], path: str = "/api/draw") -> list[tuple[str, dict[str, Any]]]:
        """All events of a stream."""
        status, _, text = self.request("POST", path, body)
        assert status == 200, text
        return parse_events(text)


def parse_events(text: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Name and JSON of each server-sent event."""
    found = []
    for block in text.decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((lines.get("event", ""), json.loads(lines["data"])))
    return found


@contextlib.contextmanager
def live_server(folder: Path, pipe: GatedPipeline | None = None, **settings: Any) -> Iterator[Live]:
    """Runs a server until the block ends; the worker must have ended by then."""
    pipe = gated_pipe() if pipe is None else pipe
    chosen = Settings.model_validate({"port": 0, "data_dir": folder, "grace_s": 1.0} | settings)
    server = Server(create_app(chosen, pipe), chosen)
    is_up = threading.Event()
    startup = server.startup

    async def announced(sockets: Any = None) -> None:
        await startup(sockets)
        is_up.set()

    server.startup = announced  # type: ignore[method-assign]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), name="live-server")
    thread.start()
    try:
        assert is_up.wait(30)
        state = server.state
        with state.queue.changed:
            assert state.queue.changed.wait_for(lambda: state.worker.is_ready, 30)
        pipe.batches.clear()
        yield Live(state, pipe, server.url, server)
    finally:
        pipe.gate.set()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
