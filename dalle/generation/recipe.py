"""Recipe: everything needed to draw a picture again, as it is stored in the picture's PNG.

Drawing again means sampling again under the recorded batch plan; of the drawn tokens it keeps only a hash.
Shapes: G grid side, N = G * G image tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dalle import __version__
from dalle.config import Config
from dalle.generation.batch import Batch, BatchRecord, Slot
from dalle.generation.request import CaptionRequest, Completion, GenerationOptions, Seed, Truncation


class Versions(Config):
    """Software that drew the picture."""

    dalle: str
    torch: str
    python: str


MAX_THREADS = 1024


@dataclass(frozen=True)
class Origin:
    """What drew and ranked a picture, and how it computed; see the fields of `Recipe`."""

    model: str
    model_sha256: str
    dtype: str
    device: str
    threads: int
    native: bool
    ranker: str | None = None
    ranker_sha256: str | None = None


class Recipe(Config):
    """How one picture was drawn."""

    format: Literal[1] = 1
    caption: str
    seed: Seed
    index: Annotated[int, Field(ge=0)]  # of the picture in its call, before any ranking
    options: GenerationOptions
    batch: BatchRecord
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

    @classmethod
    def of(
        cls, batch: Batch, row: int, tokens: Tensor, origin: Origin, scored: tuple[float | None, int | None]
    ) -> Recipe:
        """Return the recipe of a batch's picture with tokens (G, G), score and rank."""
        request, candidate = batch.place(row)
        return cls(
            caption=request.caption,
            seed=request.seeds[candidate],
            index=request.first + candidate,
            options=request.options,
            batch=batch.for_recipe(row),
            completion=request.completion,
            truncate=request.truncate,
            truncation=request.truncation,
            tokens_sha256=tokens_sha256(tokens),
            versions=Versions(
                dalle=__version__, torch=str(torch.__version__), python=platform.python_version()
            ),
            score=scored[0],
            rank=scored[1],
            **asdict(origin),
        )


def tokens_sha256(tokens: Tensor) -> str:
    """Return the hash that compares two drawings: of tokens (G, G) in raster order as little-endian int32."""
    return hashlib.sha256(tokens.detach().cpu().numpy().astype("<i4").tobytes()).hexdigest()


def batch_to_rerun(
    recipe: Recipe, read: Callable[[str], tuple[Tensor, Truncation | None]]
) -> tuple[Batch, bool]:
    """Make the batch of a recipe again, its own caption and seed in place, and say whether they were there.

    Args:
        recipe: of one picture; the others' captions and seeds are those that it names.
        read: the tokens (T,) of a caption, and what was cut from it.

    Raises:
        ValueError: the recorded batch is impossible.
    """
    record, own = recipe.batch, recipe.batch.caption_index()
    ends = [*itertools.accumulate(record.counts())]
    is_consistent = record.captions[own] == recipe.caption and record.seeds[record.position] == recipe.seed
    seeds = list(record.seeds)
    seeds[record.position] = recipe.seed
    slots = []
    for index, (caption, end) in enumerate(zip(record.captions, ends, strict=True)):
        caption = recipe.caption if index == own else caption
        text, truncation = read(caption)
        start = end - record.counts()[index]
        options = _options_of(recipe, range(start, end))
        if index == own:
            is_consistent &= truncation == recipe.truncation and options == recipe.options
        request = CaptionRequest(
            caption=caption,
            text=text,
            n_images=1,
            seeds=tuple(seeds[start:end]),
            first=0,
            options=options,
            truncate=recipe.truncate,
            truncation=truncation,
            completion=recipe.completion,
        )
        slots.append(Slot(request, 0, end - start))
    return Batch(tuple(slots), record.rows_per_batch), is_consistent


def _options_of(recipe: Recipe, rows: range) -> GenerationOptions:
    """Return the settings to draw a caption's pictures with: the recipe's own, guided where the batch's were."""
    guided, own = recipe.batch.guided, recipe.options
    if guided is None:
        return own
    are_guided = {row in guided for row in rows}
    if len(are_guided) > 1:
        raise ValueError(
            f"recipe guides some pictures {rows.start}..{rows.stop - 1} of a caption only: it was changed by hand:"
            " take the one stored in the picture"
        )
    is_guided = own.guidance != 1
    if is_guided in are_guided:
        return own
    return own.model_copy(update={"guidance": 1.0 if is_guided else 2.0})
