"""Batch: the pictures drawn side by side, made once: the engine draws it, and a recipe records it.

Their number decides how the matrix products round, so a picture is drawn again in a batch of the same shape.

Shapes: P captions, R pictures (rows), T text tokens, N image tokens of a picture.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from dalle.config import Config
from dalle.generation.request import CaptionRequest, GenerationOptions, Seed

ROWS_PER_BATCH = 64  # pictures drawn side by side; guidance doubles the rows that the transformer sees
MAX_ROWS_PER_BATCH = 1024  # a recipe names all of them


class BatchRecord(Config):
    """A batch as a picture's recipe names it."""

    captions: Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_ROWS_PER_BATCH)]
    # Those of the first caption first.
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=MAX_ROWS_PER_BATCH)]
    position: Annotated[int, Field(ge=0)]  # of the recipe's picture among `seeds`
    rows_per_batch: Annotated[int, Field(ge=1)] = ROWS_PER_BATCH  # the call's limit
    # A server draws what several people asked for side by side. Then each caption has a number of pictures of its own
    # (None: all the same), and some pictures are guided, which adds a row each (their places; None: all or none, as
    # the recipe's options say). What the others asked for stays theirs: it is recorded as empty captions with seed 0,
    # for what is in a row never changes its neighbours; only how many rows there are does.
    n_pictures: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | None = None
    guided: tuple[Annotated[int, Field(ge=0)], ...] | None = None

    def counts(self) -> list[int]:
        """Return how many pictures each caption has; ValueError where the batch is impossible."""
        n_seeds, n_captions = len(self.seeds), len(self.captions)
        counts = [n_seeds // n_captions] * n_captions if self.n_pictures is None else list(self.n_pictures)
        is_whole = len(counts) == n_captions and sum(counts) == n_seeds
        if not is_whole or max(self.position, *(self.guided or (0,))) >= n_seeds:
            raise ValueError(
                f"recipe has {n_seeds} seeds for {n_captions} captions and position {self.position};"
                " it was changed by hand: take the one stored in the picture"
            )
        return counts

    def caption_index(self) -> int:
        """Return which caption the recipe's picture has; ValueError as `counts`."""
        ends = itertools.accumulate(self.counts())
        return next(index for index, end in enumerate(ends) if self.position < end)


class Slot(NamedTuple):
    """Candidates of one caption that are drawn in one batch: `n` from `first` on."""

    request: CaptionRequest
    first: int
    n: int

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the seeds of these candidates."""
        return self.request.seeds[self.first : self.first + self.n]


@dataclass(frozen=True, eq=False)  # tensors do not compare to one answer
class Batch:
    """Pictures drawn side by side, each with its own settings, those of the first slot first."""

    slots: tuple[Slot, ...]
    rows_per_batch: int  # the call's limit, as recorded
    is_shared: bool = False  # drawn for several people: a recipe then names its own caption and seeds alone

    @cached_property
    def text(self) -> Tensor:
        """Return the captions' padded tokens, (P, T) int64."""
        return torch.stack([slot.request.text for slot in self.slots])

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """Return the pictures' seeds, R of them."""
        return tuple(seed for slot in self.slots for seed in slot.seeds)

    @cached_property
    def n_pictures(self) -> tuple[int, ...]:
        """Return how many pictures each caption has."""
        return tuple(slot.n for slot in self.slots)

    @cached_property
    def options(self) -> tuple[GenerationOptions, ...]:
        """Return each picture's settings."""
        return tuple(slot.request.options for slot in self.slots for _ in range(slot.n))

    @cached_property
    def known(self) -> Tensor | None:
        """Return the tokens that pictures must have, (R, N) int64, -1 where they are drawn; None: all are drawn."""
        given = [slot.request.completion for slot in self.slots]
        n_tokens = next((len(one.known) for one in given if one is not None), 0)
        if n_tokens == 0:
            return None
        rows = [(-1,) * n_tokens if one is None else one.known for one in given]
        return torch.tensor(rows).repeat_interleave(torch.tensor(self.n_pictures), dim=0)

    def place(self, row: int) -> tuple[CaptionRequest, int]:
        """Return whose candidate a row is, and which one of its request."""
        index = self._slot_of(row)
        slot = self.slots[index]
        return slot.request, slot.first + row - sum(self.n_pictures[:index])

    def for_recipe(self, row: int) -> BatchRecord:
        """Return the record that a row's recipe holds."""
        own = self._slot_of(row) if self.is_shared else None
        captions, seeds = list[str](), list[int]()
        for index, slot in enumerate(self.slots):
            is_named = own is None or index == own
            captions.append(slot.request.caption if is_named else "")
            seeds.extend(slot.seeds if is_named else (0,) * slot.n)
        guided = tuple(place for place, one in enumerate(self.options) if one.guidance != 1)
        return BatchRecord(
            captions=tuple(captions),
            seeds=tuple(seeds),
            position=row,
            rows_per_batch=self.rows_per_batch,
            n_pictures=None if len(set(self.n_pictures)) == 1 else self.n_pictures,
            guided=None if len(guided) in (0, len(seeds)) else guided,
        )

    def _slot_of(self, row: int) -> int:
        ends = itertools.accumulate(self.n_pictures)
        return next(index for index, end in enumerate(ends) if row < end)


def plan_batches(requests: Sequence[CaptionRequest], rows_per_batch: int = ROWS_PER_BATCH) -> list[Batch]:
    """Split a call into batches of at most `rows_per_batch` pictures: whole captions, or a part of one that has more.

    Raises ValueError for a limit outside 1..1024.
    """
    if not 1 <= rows_per_batch <= MAX_ROWS_PER_BATCH:
        raise ValueError(f"rows_per_batch is {rows_per_batch}; choose 1..{MAX_ROWS_PER_BATCH}")
    batches: list[list[Slot]] = [[]]
    n_free = rows_per_batch
    for request in requests:
        n = len(request.seeds)
        if n > n_free and batches[-1]:
            batches.append([])
            n_free = rows_per_batch
        for first in range(0, n, rows_per_batch):
            slot = Slot(request, first, min(rows_per_batch, n - first))
            if n_free < slot.n:
                batches.append([])
                n_free = rows_per_batch
            batches[-1].append(slot)
            n_free -= slot.n
        if n > rows_per_batch:  # nothing shares a batch with a part
            n_free = 0
    return [Batch(tuple(slots), rows_per_batch) for slots in batches if slots]
