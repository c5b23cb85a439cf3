"""From the worker's thread to a client: a mailbox for a job's events, and the answers that are read out of it."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dalle.serving.job import Event, Failed, Job, RowDrawn, Settled
from dalle.serving.queue import JobQueue

HEARTBEAT_S = 15.0  # a comment in an idle stream, so that nobody on the way takes it for dead


class Mailbox:
    """A job's events, for one asyncio task. A client that reads slowly misses rows, and costs none.

    Args:
        rows: the grid rows to show, in order; None: all. A row that was missed is made up for by the next.
        n_shown: of so many candidates, the first ones.
    """

    def __init__(self, rows: Sequence[int] | None = None, n_shown: int | None = None) -> None:
        self._rows = None if rows is None else deque(rows)
        self._n_shown = n_shown
        self._loop = asyncio.get_running_loop()
        self._events = asyncio.Queue[Event]()
        self._has_unread_row = False

    def n_looked_at(self, row: int, first: int, n: int, is_late: bool) -> int:
        """How many previews are wanted now; without chosen rows none while the last is unread, or in a hurry."""
        if self._rows is None:
            is_wanted = not (self._has_unread_row or is_late)
        else:
            is_wanted = bool(self._rows) and row >= self._rows[0]
        if not is_wanted:
            return 0
        return n if self._n_shown is None else max(0, min(n, self._n_shown - first))

    def tell(self, event: Event) -> None:
        """Takes an event in, from any thread."""
        if isinstance(event, RowDrawn):
            self._has_unread_row = True
            while self._rows and self._rows[0] <= event.row:
                self._rows.popleft()
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop has ended, and its clients with it
            pass

    async def get(self) -> Event:
        """The next event; a row counts as read when it is taken out."""
        event = await self._events.get()
        if isinstance(event, RowDrawn):
            self._has_unread_row = False
        return event


async def follow(mailbox: Mailbox, receive: Receive) -> AsyncIterator[Event | None]:
    """A job's events up to the last one, None when nothing happens for a while; ends early when the client leaves."""
    left = asyncio.ensure_future(_left(receive))
    try:
        while True:
            event = asyncio.ensure_future(mailbox.get())
            await asyncio.wait({event, left}, timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
            if event.done():
                yield event.result()
                if isinstance(event.result(), Settled | Failed):
                    return
                continue
            event.cancel()
            if left.done():
                return
            yield None
    finally:
        left.cancel()


async def outcome(mailbox: Mailbox, receive: Receive, queue: JobQueue, job: Job) -> Settled | Failed | None:
    """The last event of a job; None when the client left before, which cancels it."""
    try:
        async for event in follow(mailbox, receive):
            if isinstance(event, Settled | Failed):
                return event
        return None
    finally:
        queue.cancel(job.id)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events of a job; the job is cancelled when its client leaves.

    Args:
        write: turns an event into (name, JSON) pairs; an empty name leaves the `event:` line out.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        queue: JobQueue,
        job: Job,
        mailbox: Mailbox,
        write: Callable[[Event], Iterable[tuple[str, Mapping[str, Any]]]],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._queue, self._job, self._mailbox, self._write = queue, job, mailbox, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends event after event, each when it happens."""
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            async for event in follow(self._mailbox, receive):
                # On another thread: pictures are compressed, and the loop has others to answer.
                frames = (
                    [b": still here\n\n"] if event is None else await run_in_threadpool(self._frames, event)
                )
                for frame in frames:
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._queue.cancel(self._job.id)

    def _frames(self, event: Event) -> list[bytes]:
        return [_frame(name, data) for name, data in self._write(event)]


def _frame(name: str, data: Mapping[str, Any]) -> bytes:
    # ASCII, so that no odd character of a caption ends a line.
    line = f"data: {json.dumps(data, ensure_ascii=True, allow_nan=False)}\n\n"
    return (f"event: {name}\n{line}" if name else line).encode()
