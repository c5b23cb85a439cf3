"""What a call asks for, checked: captions, numbers of pictures, seeds, settings; mistakes are ValueErrors.

Source: the paper samples at temperature 1 with nothing cut off (§2.6); top-k, top-p and guidance came later.
Shapes: T text tokens, G grid side, N = G * G image tokens, H = W picture side.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from dalle.config import Config, validate

MAX_SEED = 2**63 - 1
MAX_RANDOM_SEED = 2**32  # a random seed stays short enough to be typed

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class GenerationOptions(Config):
    """Sampling settings of one call; the defaults are the paper's.

    Raises:
        ValueError: a setting is outside the range named beside it.
    """

    # Divides the logits; 0 takes the most likely token (argmax, as for the blog's Raven's matrices).
    temperature: Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)] = 1.0
    # Only the k most likely tokens can be drawn; None: all. No vocabulary is larger than uint16 can count.
    top_k: Annotated[int, Field(ge=1, le=2**16)] | None = None
    # Only the fewest tokens whose probabilities add up to p can be drawn; None: all.
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    # s in uncond + s * (cond - uncond), Ho & Salimans 2022; 1 is no guidance, 0 ignores the caption.
    guidance: Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)] = 1.0


class Completion(Config):
    """What was kept of a given picture."""

    keep_rows: Annotated[int, Field(ge=1)] | None = None  # grid rows from the top; None: a mask said what
    known: tuple[Annotated[int, Field(ge=-1)], ...]  # (N,) tokens that were forced, -1 where drawn


class Truncation(Config):
    """A caption that was cut, as the call allowed."""

    n_tokens: int  # of the whole caption
    n_kept: int


@dataclass(frozen=True, eq=False)  # tensors do not compare to one answer
class CaptionRequest:
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
    completion: Completion | None = None  # what is kept of the picture, once it is encoded


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
