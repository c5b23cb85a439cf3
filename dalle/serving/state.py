"""What the routes of one server share."""

from __future__ import annotations

from dataclasses import dataclass

from dalle.pipeline import DallePipeline
from dalle.serving.history import History
from dalle.serving.queue import JobQueue
from dalle.serving.settings import Settings
from dalle.serving.worker import Worker


@dataclass(frozen=True)
class State:
    """One model, its queue, its pictures; each router is built from it."""

    pipe: DallePipeline  # the worker draws with it: run what computes with `queue.run`
    queue: JobQueue
    worker: Worker
    history: History
    settings: Settings
