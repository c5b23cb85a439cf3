"""ImageRequest: what a call asks for; it is the only list of a request's fields, ranges and units.

Arguments, JSON and keywords become one ImageRequest, then one `CaptionRequest` for each of its captions; every mistake
is an `InvalidRequest` that names its field.

Source: the paper samples at temperature 1 with nothing cut off (§2.6); top-k, top-p and guidance came later.
Shapes: T text tokens, G grid side, N = G * G image tokens, H = W picture side.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Self, TypedDict, Unpack

from PIL import Image
from pydantic import BeforeValidator, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError
from pydantic import model_serializer as serializer
from torch import Tensor

from dalle.config import Config, explain
from dalle.generation.fields import FIELDS, MAX_SEED

logger = logging.getLogger(__name__)

MAX_RANDOM_SEED = 2**32  # a random seed stays short enough to be typed


class InvalidRequest(ValueError):
    """A request that cannot be drawn as it is.

    Args:
        field: of `ImageRequest`, the one at fault.
        message: one line: what is wrong, and what is allowed.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@contextmanager
def blaming(field: str) -> Iterator[None]:
    """Turn a ValueError inside the block into an InvalidRequest that names `field`."""
    try:
        yield
    except InvalidRequest:
        raise
    except ValueError as error:
        raise InvalidRequest(field, " ".join(str(error).split())) from error


# --- Fields: ranges and meanings from `FIELDS` ---


def _field(name: str) -> Any:
    _, low, high = FIELDS[name]
    return Field(ge=low, le=high, description=FIELDS[name].help)


def _check_picture(picture: object) -> object:
    if not isinstance(picture, Image.Image):
        raise ValueError("must be a PIL image: open it with dalle.images.open_image")
    return picture


Count = Annotated[int, Field(ge=1)]
NumImages = Annotated[int, _field("num_images_per_prompt")]
NumCandidates = Annotated[int, _field("num_candidates")]
Seed = Annotated[int, _field("seed")]
Temperature = Annotated[float, _field("temperature")]
TopK = Annotated[int, _field("top_k")]
TopP = Annotated[float, Field(gt=0.0, le=FIELDS["top_p"].high, description=FIELDS["top_p"].help)]
Guidance = Annotated[float, _field("guidance")]
KeepRows = Annotated[int, _field("keep_rows")]
Picture = Annotated[Image.Image, BeforeValidator(_check_picture)]


class GenerationOptions(Config):
    """How the next image token is chosen from the transformer's logits; the defaults are the paper's.

    Raises:
        ValueError: a setting is outside its range.
    """

    # Divides the logits; 0 takes the most likely token (argmax, as for the blog's Raven's matrices).
    temperature: Temperature = 1.0
    # Only the k most likely tokens can be drawn; None: all.
    top_k: Annotated[int, Field(ge=1, le=FIELDS["top_k"].high)] | None = None
    # Only the fewest tokens whose probabilities add up to p can be drawn; None: all.
    top_p: TopP | None = None
    # s in uncond + s * (cond - uncond), Ho & Salimans 2022; 1 is no guidance, 0 ignores the caption.
    guidance: Guidance = 1.0


class ModelDefaults(GenerationOptions):
    """What a model is drawn with where a request says nothing."""

    # Candidates per caption; CLIP keeps the best, as in the paper. None: as many as are kept.
    candidates: Count | None = None

    @classmethod
    def of(cls, options: GenerationOptions | None) -> Self:
        """Return settings as defaults, the paper's for None."""
        return cls() if options is None else cls(**dict(options))

    @serializer(mode="wrap")
    def _without_none(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `candidates` out where there are none, as in the files of models older than it."""
        tree: dict[str, Any] = serialize(self)
        return {key: value for key, value in tree.items() if key != "candidates" or value is not None}


class RequestFields(TypedDict, total=False):
    """The keywords of an `ImageRequest`, for type checkers."""

    num_images_per_prompt: int
    num_candidates: int | None
    seed: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    guidance: float | None
    image: Image.Image | None
    keep_rows: int | None
    mask: Image.Image | None
    truncate: bool


class ImageRequest(Config):
    """Pictures of one or several captions.

    Raises:
        InvalidRequest: a field is outside its range, or two fields do not go together.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    prompt: Annotated[tuple[str, ...], Field(min_length=1)]
    num_images_per_prompt: NumImages = 1
    num_candidates: NumCandidates | None = None  # of each caption; None: the model's own number
    seed: Seed | None = 0  # candidate i of the request uses seed + i; None takes a random one
    # See `GenerationOptions`; None is the model's own, top_k = 0 and top_p = 1 switch it off.
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    guidance: Guidance | None = None
    image: Picture | None = None  # a picture to complete: its central square, at the model's size
    keep_rows: KeepRows | None = None  # grid rows of its tokens that are kept, from the top
    # In place of keep_rows, a picture of the same shape whose fully transparent pixels (without transparency: its white
    # ones) are drawn anew, in whole cells.
    mask: Picture | None = None
    truncate: bool = False  # cut captions longer than the model reads, and say so in log and recipe

    def __init__(self, prompt: str | Sequence[str], **fields: Unpack[RequestFields]) -> None:
        given = {"prompt": [prompt] if isinstance(prompt, str) else prompt, **fields}
        try:
            super().__init__(**given)
        except ValidationError as error:  # caught out here: a validator's own error would be swallowed
            raise InvalidRequest(*explain(ImageRequest, given, error)) from None
        n, candidates = self.num_images_per_prompt, self.num_candidates
        if candidates is not None and candidates < n:
            raise InvalidRequest(
                "num_candidates", f"num_candidates is {candidates}; it must be at least the {n} pictures kept"
            )

    def count_candidates(self, default: int | None, has_ranker: bool) -> int:
        """Return how many candidates a caption has: the request's number, else max(the model's, pictures kept).

        Raises InvalidRequest where the request wants a choice and there is no CLIP to choose; a model's default is
        then ignored, and the log says so.
        """
        n, candidates = self.num_images_per_prompt, self.num_candidates
        if candidates is None:
            candidates = max(n, default or 0)
            if candidates > n and not has_ranker:
                logger.warning(
                    "the model's default of %d candidates per caption needs a CLIP, which is missing: drawing %d",
                    candidates,
                    n,
                )
                candidates = n
        if candidates > n and not has_ranker:
            raise InvalidRequest(
                "num_candidates",
                f"num_candidates is {candidates} for {n} pictures; choosing among candidates needs a"
                " CLIP, which this model lacks: give a ranker, or leave num_candidates out",
            )
        return candidates

    def seeds(self, n: int) -> tuple[int, ...]:
        """Return the seeds of n candidates, seed + i; InvalidRequest where they would pass the highest."""
        first = secrets.randbelow(MAX_RANDOM_SEED) if self.seed is None else self.seed
        highest = MAX_SEED - (n - 1)
        if first > highest:
            raise InvalidRequest(
                "seed", f"seed is {first}; for {n} pictures it must be a whole number in 0..{highest}"
            )
        return tuple(range(first, first + n))

    def options(self, defaults: GenerationOptions) -> GenerationOptions:
        """Return the model's settings with those of the request in place."""
        own = {name: getattr(self, name) for name in GenerationOptions.model_fields}
        given = {name: value for name, value in own.items() if value is not None}
        if given.get("top_k") == 0:
            given["top_k"] = None
        usual = {name: getattr(defaults, name) for name in GenerationOptions.model_fields}
        return GenerationOptions(**(usual | given))


# --- What is left to do needs the model ---


class Truncation(Config):
    """A caption that was cut, as the call allowed."""

    n_tokens: int  # of the whole caption
    n_kept: int


class Completion(Config):
    """What was kept of a given picture."""

    keep_rows: Annotated[int, Field(ge=1)] | None = None  # grid rows from the top; None: a mask said what
    known: tuple[Annotated[int, Field(ge=-1)], ...]  # (N,) tokens that were forced, -1 where drawn


@dataclass(frozen=True, eq=False)  # tensors do not compare to one answer
class CaptionRequest:
    """What is to be drawn of one caption, all of it checked."""

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
