"""Drawing a picture again from its recipe: the whole recorded batch is sampled, as it was then."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from dalle.generation.engine import Engine
from dalle.generation.precision import as_dtype, held_dtype, threads
from dalle.generation.recipe import Recipe, batch_to_rerun, tokens_sha256
from dalle.generation.sampler import Sampler
from dalle.token_model import TokenModel

Progress = Callable[[int, int], None]  # (grid rows done, of how many)


def rerun(
    recipe: Recipe,
    sampler: Sampler,
    load: Callable[[torch.dtype], TokenModel],
    progress: Progress | None = None,
) -> tuple[Image.Image, bool]:
    """Draw a picture again, and say whether its tokens agree with the recorded hash.

    Args:
        recipe: one of the sampler's own model.
        sampler: its engine is used where it computes as the recipe's did, and stays as it is where not.
        load: gives the token model in another dtype.
        progress: called after each grid row.

    Raises:
        ValueError: the recorded batch is impossible, or `load` cannot give the recipe's dtype.
    """
    batch, is_consistent = batch_to_rerun(recipe, lambda caption: sampler.read(caption, recipe.truncate))
    engine = _engine_of(recipe, sampler, load)
    n_rows = sampler.dvae.grid_size

    def on_row_end(row: int, _: Tensor) -> bool:
        if progress is not None:
            progress(row + 1, n_rows)
        return False

    with threads(recipe.threads):
        drawn = engine.draw(batch, on_row_end)[recipe.batch.position]
        [image] = sampler.pictures(drawn[None])
    return image, is_consistent and tokens_sha256(drawn) == recipe.tokens_sha256


def _engine_of(recipe: Recipe, sampler: Sampler, load: Callable[[torch.dtype], TokenModel]) -> Engine:
    warm, dtype = sampler.engine, as_dtype(recipe.dtype, recipe.device)
    if (warm.dtype, warm.is_native) == (dtype, recipe.native):
        return warm
    held = held_dtype(dtype)
    model = warm.model if held == held_dtype(warm.dtype) else load(held)
    return Engine(model, is_int8=dtype == torch.int8, is_native=recipe.native)
