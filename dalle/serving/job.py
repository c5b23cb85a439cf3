"""A job: the candidates of one request on their way through the queue, and what its client is told.

Shapes: R candidates, G grid side, N = G * G image tokens.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image
from torch import Tensor

from dalle.generation.batch import Batch, Slot
from dalle.generation.request import CaptionRequest
from dalle.serving.errors import ServingError

# --- Events of a job, in this order ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Queued:
    """The job waits behind so many others."""

    position: int


@dataclass(frozen=True)
class Started:
    """The first candidates are being drawn."""


@dataclass(frozen=True)
class RowDrawn:
    """A grid row of a batch's candidates is drawn."""

    row: int  # from 0
    first: int  # candidate that the batch begins with
    images: tuple[Image.Image, ...]  # so far, grey where nothing is drawn


@dataclass(frozen=True)
class Drawn:
    """A finished candidate."""

    index: int  # among the job's candidates
    seed: int
    score: float | None  # by CLIP
    rank: int  # 0 is best
    kept: bool
    image: Image.Image
    png: bytes  # with the recipe in it
    recipe: dict[str, object]
    picture_id: str  # in the history


@dataclass(frozen=True)
class Settled:
    """All candidates are drawn and ranked; those in the history, best first."""

    pictures: tuple[Drawn, ...]


@dataclass(frozen=True)
class Failed:
    """The job ended without pictures."""

    error: ServingError


Event = Queued | Started | RowDrawn | Settled | Failed


class Listener(Protocol):
    """Where a job's events go; called from the worker's thread, so it must return at once."""

    def n_looked_at(self, row: int, first: int, n: int, is_late: bool) -> int:
        """Of how many of the `n` candidates from `first` on a preview is wanted now: others cost nothing.

        `is_late`: previews had their share of the time; only those that were counted on should be made.
        """

    def tell(self, event: Event) -> None:
        """Take an event in."""


# --- A job's state ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A drawn candidate that waits for the others of its job."""

    tokens: Tensor  # (G, G) int64
    image: Image.Image
    score: float | None
    batch: Batch
    row: int  # of the batch
    n_threads: int


@dataclass(eq=False)
class Job:
    """State of one request. The queue's lock guards `is_over` and `n_taken`; the rest is the worker's."""

    request: CaptionRequest
    listener: Listener
    deadline: float  # by time.monotonic()
    keeps_candidates: bool  # in the history, those that lost too
    caption_vector: Tensor | None = None  # (E,) of CLIP
    is_prepared: bool = False
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    accepted_at: float = field(default_factory=time.monotonic)
    n_taken: int = 0  # candidates that a batch has taken
    position: int | None = None  # in the queue, as its client last heard
    candidates: list[Candidate] = field(default_factory=list)  # in order
    is_over: bool = False

    @property
    def n_candidates(self) -> int:
        """How many are to be drawn."""
        return len(self.request.seeds)

    @property
    def n_waiting(self) -> int:
        """How many no batch has taken yet."""
        return self.n_candidates - self.n_taken


@dataclass(frozen=True)
class Turn:
    """Some of a job's candidates, to be drawn in one batch."""

    job: Job
    first: int
    n: int

    @property
    def slot(self) -> Slot:
        """What a batch draws of them."""
        return Slot(self.job.request, self.first, self.n)
