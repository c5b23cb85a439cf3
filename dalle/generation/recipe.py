"""Recipe: everything needed to draw a picture again, as it is stored in the picture's PNG.

Drawing again means sampling again under the recorded batch plan; of the drawn tokens it keeps only a hash.
Shapes: G grid side, N = G * G image tokens.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from dalle.config import Config
from dalle.generation.engine import MAX_ROWS_PER_BATCH, ROWS_PER_BATCH, Batch
from dalle.generation.options import GenerationOptions
from dalle.generation.sampling import MAX_SEED

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class BatchPlan(Config):
    """The pictures drawn side by side with this one: their count decides how the matrix products round."""

    captions: Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_ROWS_PER_BATCH)]
    seeds: Annotated[
        tuple[Seed, ...], Field(min_length=1, max_length=MAX_ROWS_PER_BATCH)
    ]  # those of the first caption first
    position: Annotated[int, Field(ge=0)]  # of this picture among `seeds`
    rows_per_batch: Annotated[int, Field(ge=1)] = ROWS_PER_BATCH  # the call's limit
    # A server draws what several people asked for side by side. Then each caption has a number of pictures of its own
    # (None: all the same), and some pictures are guided, which adds a row each (their places; None: all or none, as
    # the recipe's options say). What the others asked for stays theirs: it is recorded as empty captions with seed 0,
    # for what is in a row never changes its neighbours; only how many rows there are does.
    n_pictures: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | None = None
    guided: tuple[Annotated[int, Field(ge=0)], ...] | None = None


class Completion(Config):
    """What was kept of a given picture."""

    keep_rows: Annotated[int, Field(ge=1)] | None = None  # grid rows from the top; None: a mask said what
    known: tuple[Annotated[int, Field(ge=-1)], ...]  # (N,) tokens that were forced, -1 where drawn


class Truncation(Config):
    """A caption that was cut, as the call allowed."""

    n_tokens: int  # of the whole caption
    n_kept: int


class Versions(Config):
    """Software that drew the picture."""

    dalle: str
    torch: str
    python: str


MAX_THREADS = 1024


class Recipe(Config):
    """How one picture was drawn."""

    format: Literal[1] = 1
    caption: str
    seed: Seed
    index: Annotated[int, Field(ge=0)]  # of the picture in its call, before any ranking
    options: GenerationOptions
    batch: BatchPlan
    completion: Completion | None = None
    truncate: bool = False  # the call allowed captions to be cut
    truncation: Truncation | None = None  # this caption was
    dtype: str  # of the transformer's weights: float32, bfloat16 or int8
    device: str  # type of device: cpu, cuda, ...
    threads: Annotated[int, Field(ge=1, le=MAX_THREADS)]  # of one operation on the CPU
    native: bool = False  # compiled attention, which rounds otherwise than PyTorch's
    versions: Versions
    model: str  # folder name or Hub id, for people; the hash decides
    model_sha256: str  # of the model folder's manifest.json
    tokens_sha256: str
    score: float | None = None  # by CLIP, where one ranked the picture
    rank: int | None = None  # 0 is best
    ranker: str | None = None  # where the CLIP came from, for people
    ranker_sha256: str | None = None  # of its weights; None: it was never saved


def tokens_sha256(tokens: Tensor) -> str:
    """The hash that compares two drawings: of tokens (G, G) in raster order as little-endian int32."""
    return hashlib.sha256(tokens.detach().cpu().numpy().astype("<i4").tobytes()).hexdigest()


def batch_plans(
    plan: list[Batch], captions: Sequence[str], seeds: Sequence[int], rows_per_batch: int
) -> list[BatchPlan]:
    """The batch plan of every row of a call, in order."""
    return [
        BatchPlan(
            captions=tuple(captions[i] for i in batch.captions),
            seeds=tuple(seeds[i] for i in batch.rows),
            position=row - batch.rows.start,
            rows_per_batch=rows_per_batch,
        )
        for batch in plan
        for row in batch.rows
    ]


def count_pictures(batch: BatchPlan) -> list[int]:
    """How many pictures each caption of a batch has.

    Raises:
        ValueError: the batch plan is impossible.
    """
    n_seeds, n_captions = len(batch.seeds), len(batch.captions)
    counts = [n_seeds // n_captions] * n_captions if batch.n_pictures is None else list(batch.n_pictures)
    is_whole = len(counts) == n_captions and sum(counts) == n_seeds
    if not is_whole or max(batch.position, *(batch.guided or (0,))) >= n_seeds:
        raise ValueError(
            f"recipe has {n_seeds} seeds for {n_captions} captions and position {batch.position};"
            " it was changed by hand: take the one stored in the picture"
        )
    return counts


def caption_at(batch: BatchPlan) -> int:
    """Which caption of a batch the picture at its position has; ValueError as `count_pictures`."""
    ends = itertools.accumulate(count_pictures(batch))
    return next(caption for caption, end in enumerate(ends) if batch.position < end)


def options_in_batch(recipe: Recipe) -> list[GenerationOptions]:
    """The settings to draw each picture of the recipe's batch with: its own, guided where the batch's pictures were."""
    batch, own = recipe.batch, recipe.options
    if batch.guided is None:
        return [own] * len(batch.seeds)
    is_guided = own.guidance != 1
    other = own.model_copy(update={"guidance": 1.0 if is_guided else 2.0})
    return [own if (row in batch.guided) == is_guided else other for row in range(len(batch.seeds))]


def place_in_batch(recipe: Recipe) -> tuple[BatchPlan, bool]:
    """The batch to draw again, with the recipe's caption and seed in place, and whether they were there.

    Raises:
        ValueError: the batch plan is impossible.
    """
    batch = recipe.batch
    caption = caption_at(batch)
    is_consistent = batch.captions[caption] == recipe.caption and batch.seeds[batch.position] == recipe.seed
    is_consistent &= batch.guided is None or (batch.position in batch.guided) == (
        recipe.options.guidance != 1
    )
    captions, seeds = list(batch.captions), list(batch.seeds)
    captions[caption], seeds[batch.position] = recipe.caption, recipe.seed
    return batch.model_copy(update={"captions": tuple(captions), "seeds": tuple(seeds)}), is_consistent
