"""What a call asks for, checked: captions, numbers of pictures, seeds, settings; mistakes are ValueErrors."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dalle.config import validate
from dalle.generation.options import GenerationOptions
from dalle.generation.recipe import Truncation
from dalle.generation.sampling import MAX_SEED

MAX_RANDOM_SEED = 2**32  # a random seed stays short enough to be typed


@dataclass(frozen=True, eq=False)  # tensors do not compare to one answer
class Request:
    """What is to be drawn of one caption, all of it checked: what is left to do needs the model."""

    caption: str
    text: Tensor  # (T,) int64, its padded tokens
    n_images: int  # candidates to keep
    seeds: tuple[int, ...]  # one for each candidate
    first: int  # index of the first candidate in its call
    options: GenerationOptions
    truncate: bool  # the call allowed captions to be cut
    truncation: Truncation | None  # this caption was
    picture: Tensor | None = None  # (3, H, W) in [0, 1], to complete
    region: Tensor | None = None  # (G, G) bool, its cells to draw anew
    keep_rows: int | None = None  # grid rows kept from the top, where the region is all below


def read_captions(prompt: str | Sequence[str]) -> list[str]:
    """One caption or several, as a list of at least one."""
    captions = [prompt] if isinstance(prompt, str) else list(prompt)
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"prompt is {prompt!r}; it must be a caption or a list of at least one caption")
    return captions


def count_images(num_images: int, num_candidates: int | None, has_ranker: bool = False) -> int:
    """Pictures to draw for each caption; more candidates than pictures need a CLIP to choose among them."""
    if not is_count(num_images):
        raise ValueError(f"num_images_per_prompt is {num_images!r}; it must be a whole number from 1")
    if num_candidates is None or num_candidates == num_images:
        return num_images
    if not is_count(num_candidates) or num_candidates < num_images:
        raise ValueError(
            f"num_candidates is {num_candidates!r}; it must be at least the {num_images} pictures kept"
        )
    if has_ranker:
        return num_candidates
    raise ValueError(
        f"num_candidates is {num_candidates} for {num_images} pictures; choosing among candidates needs a"
        " CLIP, which this model lacks: give a ranker, or leave num_candidates out"
    )


def count_seeds(seed: int | None, n: int) -> list[int]:
    """The seeds of n pictures, seed + i; None starts at a random one."""
    first = secrets.randbelow(MAX_RANDOM_SEED) if seed is None else seed
    highest = MAX_SEED - (n - 1)
    if not isinstance(first, int) or isinstance(first, bool) or not 0 <= first <= highest:
        raise ValueError(f"seed is {first!r}; for {n} pictures it must be a whole number in 0..{highest}")
    return list(range(first, first + n))


def read_options(
    defaults: GenerationOptions,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    guidance: float | None,
) -> GenerationOptions:
    """The model's defaults with what the call sets; top_k=0 switches it off, for None means the default."""
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
    settings = defaults.model_dump() | {name: value for name, value in given.items() if value is not None}
    if top_k == 0:
        settings["top_k"] = None
    return validate(GenerationOptions, settings, "sampling options")


def is_count(value: object) -> bool:
    """A whole number from 1; True is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
