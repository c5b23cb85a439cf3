"""What clients may send, strictly: OpenAI's image requests with our extensions, and the page's.

Source: the request types of OpenAI's Python client (`openai.types`); extensions are named as vLLM-Omni's.
A field that asks for what a small model cannot give is refused; one that changes nothing here is taken and ignored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from dalle.config import Config
from dalle.generation.fields import FIELDS
from dalle.generation.request import (
    Guidance,
    KeepRows,
    NumCandidates,
    NumImages,
    Seed,
    Temperature,
    TopK,
    TopP,
)
from dalle.serving.errors import ServingError, bad_request

MAX_JSON = 64_000  # bytes of a JSON body, base64 pictures aside
MAX_KEYS = 64  # of a JSON object
BASE64 = bytes(range(48, 58)) + bytes(range(65, 91)) + bytes(range(97, 123)) + b"+/="
MAX_PROMPT = 32_000  # characters, OpenAI's limit; how many tokens the model reads is checked later

Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT, description=FIELDS["prompt"].help)]
ANY_SEED = -1  # what other programs send for "no seed"
AnySeed = Literal[-1]
# Settings of other kinds of models that their clients send along; nothing here corresponds to them.
HARMLESS = frozenset(
    (
        "num_inference_steps",
        "steps",
        "sampler",
        "sampler_name",
        "scheduler",
        "clip_skip",
        "n_iter",
        "batch_size",
    )
)
Truncate = Annotated[bool, Field(description=FIELDS["truncate"].help)]
Ignored = Annotated[str, Field(max_length=1000)] | None


class DrawBody(Config):
    """Body of `POST /api/draw`."""

    prompt: Prompt
    num_images: NumImages = 4
    num_candidates: NumCandidates | None = None
    seed: Seed | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    guidance: Guidance | None = None
    image: str | None = None  # base64 of a PNG, JPEG or WebP
    keep_rows: KeepRows | None = None
    mask: str | None = None  # base64 of a PNG
    truncate: Truncate = False


class OpenAIImageBody(Config):
    """What generations and edits have in common, under OpenAI's names; ours are those of `ImageRequest`."""

    prompt: Prompt
    model: Annotated[str, Field(max_length=500)] | None = None
    n: NumImages | None = None
    size: Annotated[str, Field(max_length=20)] | None = None  # WxH or auto
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = None
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    background: Literal["auto", "opaque"] | None = None  # the dVAE knows no transparency
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    # ours
    seed: Seed | AnySeed | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    guidance_scale: Guidance | None = None
    num_candidates: NumCandidates | None = None
    truncate: Truncate | None = None
    # taken and ignored: nothing here depends on them
    user: Ignored = None
    safety_identifier: Ignored = None
    moderation: Literal["auto", "low"] | None = None


class GenerationBody(OpenAIImageBody):
    """Body of `POST /v1/images/generations`."""

    style: Literal["vivid", "natural"] | None = None  # ignored


class EditBody(OpenAIImageBody):
    """Text fields of `POST /v1/images/edits`."""

    keep_rows: KeepRows | None = None  # ours: in place of a mask
    input_fidelity: Literal["low", "high"] | None = None  # ignored


def without_harmless(tree: Any) -> tuple[Any, tuple[str, ...]]:
    """Return a request without the fields that change nothing here, and their names."""
    if not isinstance(tree, dict):
        return tree, ()
    ignored = tuple(sorted(HARMLESS & tree.keys()))
    return {name: value for name, value in tree.items() if name not in HARMLESS}, ignored


R = TypeVar("R", bound=Config)


def parse_json(body: bytes, pictures: Sequence[str] = ()) -> Any:
    """Read JSON as RFC 8259 has it, within bounds that keep it cheap.

    Args:
        body: at most `MAX_JSON` bytes, unless one of the `pictures` fields is there.
        pictures: fields that may hold a picture in base64.

    Raises:
        ServingError: 413 above the bounds; 400 for NaN, a key given twice, and anything else that is no JSON.
    """
    # Counted before it is parsed: what is no base64 are all brackets, commas and quotes that a parser would work on.
    n_bytes = len(body.translate(None, BASE64)) if pictures else len(body)
    if n_bytes > MAX_JSON:
        raise _too_long()
    try:
        tree = json.loads(body.decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_unique)
    except UnicodeDecodeError:
        raise bad_request("the body is not UTF-8", code="invalid_json") from None
    except RecursionError:
        raise bad_request("the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise bad_request(
            f"the body is not JSON: {' '.join(str(error).split())[:200]}", code="invalid_json"
        ) from None
    has_picture = isinstance(tree, dict) and any(isinstance(tree.get(name), str) for name in pictures)
    if len(body) > MAX_JSON and not has_picture:
        raise _too_long()
    return tree


def _too_long() -> ServingError:
    return ServingError(
        413, f"a JSON body without a picture has at most {MAX_JSON} bytes: send less", code="body_too_large"
    )


def check(schema: type[R], tree: Any) -> R:
    """Return the record of a tree; a ServingError that names the first field at fault."""
    if not isinstance(tree, dict):
        raise bad_request("the body must be a JSON object", code="invalid_type")
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise as_error(error) from None


def as_error(error: ValidationError) -> ServingError:
    """Return what pydantic found, for a client: the first field at fault, and never its value."""
    return first_error(error.errors(include_url=False, include_input=False, include_context=False))


def first_error(
    details: Sequence[Any], ignored: Sequence[str] = ("body", "query", "path", "header")
) -> ServingError:
    """Do the same with pydantic's list of errors; FastAPI's begin with where the field was (`ignored`)."""
    first = details[0]
    names = [part for part in first["loc"] if part not in ignored]
    # A client may have made the name up: shown, but short and printable.
    shown = ascii(str(names[0]))[1:-1][:64] if names else None
    if first["type"] == "extra_forbidden":
        return bad_request(f"unknown parameter: {shown}", shown, "unknown_parameter")
    if first["type"] == "missing":
        return bad_request(f"{shown} is missing", shown, "missing_required_parameter")
    kind = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    reason = first["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
    return bad_request(reason if shown is None else f"{shown}: {reason}", shown, kind)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise ValueError(f"an object has {len(pairs)} keys; at most {MAX_KEYS} are read")
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{ascii(twice)[:70]} is given twice")
    return tree
