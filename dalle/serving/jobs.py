"""The queue in front of the one thread that owns the model: bounded, fair, and every slot given back once.

A request reserves slots, one for each candidate, before any work is done for it: what cannot be drawn soon is turned
away at once. A batch takes a few candidates of every waiting job in turn, so that 512 candidates do not keep four
waiting; captions, options, seeds and known tokens of a batch are mixed as they come.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from dalle.generation.request import CaptionRequest
from dalle.pipeline import DallePipeline
from dalle.serving.history import History
from dalle.serving.job import Failed, Job, Listener, Part, Queued, ServingError, Started
from dalle.serving.metrics import Metrics
from dalle.serving.settings import Settings
from dalle.serving.worker import Worker

logger = logging.getLogger(__name__)

T = TypeVar("T")

QUANTUM = 8  # candidates that each waiting job gets before any gets more
MAX_RETRY_AFTER_S = 60  # OpenAI's clients give up above two minutes
START_RATE = 32.0  # candidates a second, until some have been timed


class Reservation:
    """Slots held for a request; given back once, whoever asks first."""

    def __init__(self, jobs: Jobs, n_slots: int) -> None:
        self._jobs, self.n_slots, self._is_held = jobs, n_slots, True

    def release(self) -> None:
        """Gives the slots back; a second time does nothing."""
        with self._jobs.changed:
            if self._is_held:
                self._is_held = False
                self._jobs.give_back_(self.n_slots)


class Jobs:
    """The queue of one server and its worker.

    Args:
        pipe: what draws; from `start` on, the worker's own.
        history: where drawn pictures go.
        settings: the bounds.
        metrics: what is counted.
    """

    def __init__(
        self, pipe: DallePipeline, history: History, settings: Settings, metrics: Metrics | None = None
    ) -> None:
        self.settings = settings
        self.metrics = Metrics() if metrics is None else metrics
        self.changed = threading.Condition(threading.RLock())  # guards all below
        self._queue = deque[Job]()  # with candidates that no batch has taken
        self._jobs = dict[str, Job]()  # all that are not over
        self._reservations = dict[str, Reservation]()  # theirs
        self._n_reserved, self._n_slots = 0, 0  # of requests and jobs
        self._errands = deque[tuple[Callable[[], Any], Future[Any]]]()
        self._is_ready, self._is_draining, self._is_closed = False, False, False
        self._rate = START_RATE
        self._worker = Worker(pipe, history, self)
        self._thread = threading.Thread(target=self._work, name="dalle-worker", daemon=True)
        self.metrics.watch(
            lambda: sum(job.n_taken == 0 for job in [*self._jobs.values()]),
            lambda: sum(job.n_taken > 0 for job in [*self._jobs.values()]),
            lambda: self._n_slots,
        )

    # --- The server's side ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the worker, which warms the model up first."""
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether the model is warm and requests are taken."""
        return self._is_ready and not self._is_draining and self._thread.is_alive()

    @property
    def n_slots(self) -> int:
        """Candidates reserved now."""
        return self._n_slots

    @property
    def n_jobs(self) -> int:
        """Requests and jobs that hold slots now."""
        return self._n_reserved

    def reserve(self, n_slots: int) -> Reservation:
        """Holds slots for a request; nothing else may be done for it before.

        Raises:
            ServingError: 503 `server_overloaded`, with when to come again.
        """
        with self.changed:
            if self._is_draining:
                self.metrics.rejected.labels("shutting_down").inc()
                raise ServingError(
                    503,
                    "the server is shutting down: try again later",
                    kind="server_error",
                    code="server_shutting_down",
                    retry_after_s=5,
                )
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
        """Takes slots back; for `Reservation` alone."""
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
        """Queues a checked request; its slots are given back when it ends. The listener is told all about it."""
        assert reservation.n_slots == len(request.seeds)
        deadline = time.monotonic() + self.settings.deadline_s
        job = Job(request, listener, deadline, keeps_candidates)
        with self.changed:
            if self._is_closed:
                reservation.release()
                job.is_over = True
                listener.tell(Failed(_shutting_down()))
                return job
            self._jobs[job.id], self._reservations[job.id] = job, reservation
            self._queue.append(job)
            self._tell_positions()
            self.changed.notify_all()
        return job

    def cancel(self, job_id: str) -> bool:
        """Ends a job that its client no longer wants; its slots are free at once. False: there is none."""
        with self.changed:
            job = self._jobs.get(job_id)
            if job is None:
                return False
            error = ServingError(400, "the job was cancelled", code="cancelled")
            return self.end(job, "cancelled", Failed(error))

    def run(self, errand: Callable[[], T]) -> Future[T]:
        """Runs something that needs the model, between two batches, on the thread that owns it."""
        future: Future[T] = Future()
        with self.changed:
            if self._is_closed:
                future.set_exception(_shutting_down())
            else:
                self._errands.append((errand, future))
                self.changed.notify_all()
        return future

    def drain(self) -> None:
        """Takes nothing more on; accepted jobs go on."""
        with self.changed:
            self._is_draining = True
            self.changed.notify_all()

    def stop(self) -> None:
        """Ends every job that is left: their clients are told. The worker ends with its batch."""
        with self.changed:
            self._is_draining = self._is_closed = True
            for job in [*self._jobs.values()]:
                self.end(job, "failed", Failed(_shutting_down()))
            for _, future in self._errands:
                future.set_exception(_shutting_down())
            self._errands.clear()
            self.changed.notify_all()

    def close(self, timeout_s: float = 10.0) -> None:
        """Stops, and waits for the worker."""
        self.stop()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def wait_idle(self, timeout_s: float) -> bool:
        """Waits until no request holds a slot; False when the time is over before."""
        with self.changed:
            return self.changed.wait_for(lambda: self._n_reserved == 0, timeout_s)

    # --- The worker's side ----------------------------------------------------------------------------------

    def end(self, job: Job, outcome: str, last: Any) -> bool:
        """Ends a job once, tells its client, frees its slots; False: it had ended before."""
        with self.changed:
            if job.is_over:
                return False
            job.is_over = True
            del self._jobs[job.id]
            if job in self._queue:
                self._queue.remove(job)
            self.metrics.jobs.labels(outcome).inc()
            job.listener.tell(last)
            self._reservations.pop(job.id).release()
            self._tell_positions()
            return True

    def expire(self) -> None:
        """Ends the jobs whose time is over."""
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

    def _work(self) -> None:
        self._worker.warm_up()
        with self.changed:
            self._is_ready = True
            self.changed.notify_all()
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._errands or self._queue or self._is_closed)
                if self._is_closed:
                    return
                self.expire()
                errands = [*self._errands]
                self._errands.clear()
                parts = self._take()
            for errand, future in errands:
                _carry_out(errand, future)
            try:
                self._worker.draw(parts)
            except (
                Exception
            ) as error:  # a mistake of ours, or of a listener's: this batch ends, the thread does not
                logger.exception("a batch could not be drawn")
                for part in parts:
                    self._worker.fail(part.job, error)

    def _take(self) -> list[Part]:
        """The candidates of the next batch, and turns to whose turn is next."""
        queue = [*self._queue]
        shares = share_out(self.settings.rows_per_batch, [job.n_waiting for job in queue])
        parts = []
        for job, n in zip(queue, shares, strict=True):
            if n:
                if job.n_taken == 0:
                    job.listener.tell(Started())
                parts.append(Part(job, job.n_taken, n))
                job.n_taken += n
        later = [job for job, n in zip(queue, shares, strict=True) if n and job.n_waiting]
        self._queue = deque([job for job, n in zip(queue, shares, strict=True) if not n] + later)
        self._tell_positions()
        return sorted(parts, key=lambda part: part.n)  # equal numbers side by side share a matrix product

    def _tell_positions(self) -> None:
        for position, job in enumerate(self._queue):
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


def _carry_out(errand: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(errand())
    except BaseException as error:  # whoever waits for it is told
        future.set_exception(error)


def _shutting_down() -> ServingError:
    return ServingError(
        503,
        "the server is shutting down and could not finish: try again later",
        kind="server_error",
        code="server_shutting_down",
        retry_after_s=5,
    )
