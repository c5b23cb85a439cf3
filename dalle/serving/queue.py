"""The queue in front of the thread that owns the model: bounded, fair, and every slot given back once.

It knows jobs and their slots, and neither a model nor a thread nor the history: see `dalle.serving.worker`.

A request reserves slots, one for each candidate, before any work is done for it: what cannot be drawn soon is turned
away at once. A batch takes a few candidates of every waiting job in turn, so that 512 candidates do not keep four
waiting; captions, options, seeds and known tokens of a batch are mixed as they come.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from dalle.generation.request import CaptionRequest
from dalle.serving.errors import ServingError, shutting_down
from dalle.serving.job import Failed, Job, Listener, Queued, Settled, Started, Turn
from dalle.serving.metrics import Metrics
from dalle.serving.settings import Settings

T = TypeVar("T")

QUANTUM = 8  # candidates that each waiting job gets before any gets more
MAX_RETRY_AFTER_S = 60  # OpenAI's clients give up above two minutes
START_RATE = 32.0  # candidates a second, until some have been timed


class ModelCall(NamedTuple):
    """Something that needs the model, and where its result goes."""

    run: Callable[[], Any]
    future: Future[Any]

    def make(self) -> None:
        """Run it, unless nobody waits any more; whoever does is given the result or the error."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.run())
        except BaseException as error:
            self.future.set_exception(error)


class Reservation:
    """Slots held for a request; given back once, whoever asks first."""

    def __init__(self, queue: JobQueue, n_slots: int) -> None:
        self._queue, self.n_slots, self._is_held = queue, n_slots, True

    def release(self) -> None:
        """Give the slots back; a second time does nothing."""
        with self._queue.changed:
            if self._is_held:
                self._is_held = False
                self._queue.give_back_(self.n_slots)


class JobQueue:
    """The queue of one server.

    Args:
        settings: the bounds.
        metrics: what is counted.
    """

    def __init__(self, settings: Settings, metrics: Metrics | None = None) -> None:
        self.settings = settings
        self.metrics = Metrics() if metrics is None else metrics
        self.changed = threading.Condition(threading.RLock())  # guards all below
        self._waiting = deque[Job]()  # with candidates that no batch has taken
        self._jobs = dict[str, Job]()  # all that are not over
        self._reservations = dict[str, Reservation]()  # theirs
        self._n_reserved, self._n_slots = 0, 0  # of requests and jobs
        self._calls = deque[ModelCall]()
        self._is_draining, self._is_closed = False, False
        self._rate = START_RATE
        self.metrics.watch(
            lambda: sum(job.n_taken == 0 for job in [*self._jobs.values()]),
            lambda: sum(job.n_taken > 0 for job in [*self._jobs.values()]),
            lambda: self._n_slots,
        )

    # --- The server's side ----------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Say whether requests are taken."""
        return not self._is_draining

    @property
    def n_waiting(self) -> int:
        """Return how many jobs have candidates that no batch has taken."""
        return len(self._waiting)

    @property
    def n_slots(self) -> int:
        """Candidates reserved now."""
        return self._n_slots

    @property
    def n_jobs(self) -> int:
        """Requests and jobs that hold slots now."""
        return self._n_reserved

    def reserve(self, n_slots: int) -> Reservation:
        """Hold slots for a request; nothing else may be done for it before.

        Raises:
            ServingError: 503 `server_overloaded`, with when to come again.
        """
        with self.changed:
            if self._is_draining:
                self.metrics.rejected.labels("shutting_down").inc()
                raise shutting_down("the server is shutting down: try again later")
            is_full = self._n_reserved >= self.settings.max_queue
            if is_full or self._n_slots + n_slots > self.settings.max_slots:
                self.metrics.rejected.labels("queue" if is_full else "slots").inc()
                raise ServingError(
                    503,
                    f"the server is overloaded: {self._n_reserved} requests with {self._n_slots} candidates are"
                    " being drawn or wait: try again later",
                    kind="server_error",
                    code="server_overloaded",
                    retry_after_s=self._retry_after(),
                )
            self._n_reserved += 1
            self._n_slots += n_slots
            return Reservation(self, n_slots)

    def give_back_(self, n_slots: int) -> None:
        """Take slots back; for `Reservation` alone."""
        self._n_reserved -= 1
        self._n_slots -= n_slots
        assert self._n_reserved >= 0 and self._n_slots >= 0
        self.changed.notify_all()

    def submit(
        self,
        reservation: Reservation,
        request: CaptionRequest,
        listener: Listener,
        keeps_candidates: bool = False,
    ) -> Job:
        """Queue a checked request; its slots are given back when it ends. The listener gets every event."""
        assert reservation.n_slots == len(request.seeds)
        deadline = time.monotonic() + self.settings.deadline_s
        job = Job(request, listener, deadline, keeps_candidates)
        with self.changed:
            if self._is_closed:
                reservation.release()
                job.is_over = True
                listener.tell(Failed(_stopped()))
                return job
            self._jobs[job.id], self._reservations[job.id] = job, reservation
            self._waiting.append(job)
            self._tell_positions()
            self.changed.notify_all()
        return job

    def cancel(self, job_id: str) -> bool:
        """End a job that its client no longer wants; its slots are free at once. False: there is none."""
        with self.changed:
            job = self._jobs.get(job_id)
            if job is None:
                return False
            error = ServingError(400, "the job was cancelled", code="cancelled")
            return self.end(job, "cancelled", Failed(error))

    def run(self, call: Callable[[], T]) -> Future[T]:
        """Queue something else that needs the model: it runs between two batches, on the thread that owns it."""
        future: Future[T] = Future()
        with self.changed:
            if self._is_closed:
                future.set_exception(_stopped())
            else:
                self._calls.append(ModelCall(call, future))
                self.changed.notify_all()
        return future

    def drain(self, is_draining: bool = True) -> None:
        """Take nothing more on; accepted jobs go on. False opens the queue again."""
        with self.changed:
            self._is_draining = is_draining
            self.changed.notify_all()

    def stop(self) -> None:
        """End every job that is left: their clients are told. The worker ends with its batch."""
        with self.changed:
            self._is_draining = self._is_closed = True
            for job in [*self._jobs.values()]:
                self.end(job, "failed", Failed(_stopped()))
            for call in self._calls:
                call.future.set_exception(_stopped())
            self._calls.clear()
            self.changed.notify_all()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no request holds a slot; False when the time is over before."""
        with self.changed:
            return self.changed.wait_for(lambda: self._n_reserved == 0, timeout_s)

    # --- The worker's side ----------------------------------------------------------------------------------

    def end(self, job: Job, outcome: str, last: Settled | Failed) -> bool:
        """End a job once, tell its client, free its slots; False: it had ended before."""
        with self.changed:
            if job.is_over:
                return False
            job.is_over = True
            del self._jobs[job.id]
            if job in self._waiting:
                self._waiting.remove(job)
            self.metrics.jobs.labels(outcome).inc()
            job.listener.tell(last)
            self._reservations.pop(job.id).release()
            self._tell_positions()
            return True

    def expire(self) -> None:
        """End the jobs whose time is over."""
        now = time.monotonic()
        with self.changed:
            for job in [job for job in self._jobs.values() if job.deadline <= now]:
                error = ServingError(
                    503,
                    f"the pictures were not drawn within {self.settings.deadline_s:g} s: ask for fewer candidates,"
                    " or try again later",
                    kind="server_error",
                    code="deadline_exceeded",
                    retry_after_s=self._retry_after(),
                )
                self.end(job, "expired", Failed(error))

    def timed(self, n_rows: int, seconds: float) -> None:
        """Learns how fast candidates are drawn, for Retry-After."""
        with self.changed:
            self._rate += 0.3 * (n_rows / max(seconds, 1e-3) - self._rate)

    def wait(self) -> tuple[list[ModelCall], list[Turn]] | None:
        """Wait for work: calls to make, then a batch to draw; None once the queue is closed."""
        with self.changed:
            self.changed.wait_for(lambda: self._calls or self._waiting or self._is_closed)
            if self._is_closed:
                return None
            self.expire()
            calls = [*self._calls]
            self._calls.clear()
            return calls, self.take()

    def take(self) -> list[Turn]:
        """Take the next batch and rotate the queue; called under the lock."""
        queue = [*self._waiting]
        shares = share_out(self.settings.rows_per_batch, [job.n_waiting for job in queue])
        turns = []
        for job, n in zip(queue, shares, strict=True):
            if n:
                if job.n_taken == 0:
                    job.listener.tell(Started())
                turns.append(Turn(job, job.n_taken, n))
                job.n_taken += n
        later = [job for job, n in zip(queue, shares, strict=True) if n and job.n_waiting]
        self._waiting = deque([job for job, n in zip(queue, shares, strict=True) if not n] + later)
        self._tell_positions()
        return sorted(turns, key=lambda turn: turn.n)  # equal numbers side by side share a matrix product

    def _tell_positions(self) -> None:
        for position, job in enumerate(self._waiting):
            if job.n_taken == 0 and job.position != position:
                job.position = position
                job.listener.tell(Queued(position))

    def _retry_after(self) -> int:
        return max(1, min(MAX_RETRY_AFTER_S, math.ceil(self._n_slots / self._rate)))


def share_out(capacity: int, wanted: Sequence[int]) -> list[int]:
    """How much of a batch each job gets, in the order of their turns: up to `QUANTUM` each, then what is left."""
    shares = [0] * len(wanted)
    for most in (QUANTUM, capacity):
        for i, n in enumerate(wanted):
            more = min(most, n) - shares[i]
            more = max(0, min(more, capacity - sum(shares)))
            shares[i] += more
    return shares


def _stopped() -> ServingError:
    return shutting_down("the server is shutting down and could not finish: try again later")
