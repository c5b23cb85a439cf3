"""What the routes of one server share."""

from __future__ import annotations

from dataclasses import dataclass, field

from anyio import CapacityLimiter

from dalle.pipeline import DallePipeline
from dalle.serving.history import History
from dalle.serving.queue import JobQueue
from dalle.serving.settings import Settings
from dalle.serving.worker import Worker

N_DECODING = 2


@dataclass(frozen=True)
class State:
    """One model, its queue, its pictures; each router is built from it."""

    pipe: DallePipeline  # the worker draws with it: run what computes with `queue.run`
    queue: JobQueue
    worker: Worker
    history: History
    settings: Settings
    # Requests whose pictures are decoded now: together at most so many times `max_pixels`.
    decoding: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(N_DECODING))
