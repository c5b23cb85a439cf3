"""Taking a request in: its body within bounds, its slots, its pictures, and the checks that need no model."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Callable
from typing import Any

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest

from dalle.generation.request import CaptionRequest
from dalle.images import open_image, open_mask
from dalle.serving.job import Job, Listener, ServingError, bad_request
from dalle.serving.schema import parse_json
from dalle.serving.state import State

# How the package's own ValueErrors begin -> the field that a client knows; `guidance` is OpenAI's guidance_scale.
FIELDS = re.compile(
    r"(?:sampling options: )?(caption|num_candidates|seed|temperature|top_k|top_p|guidance|image|mask|keep_rows)\b"
)


async def read_json(http: HttpRequest, state: State) -> Any:
    """A JSON body; ServingErrors for another type, too many bytes, a client too slow, and what is no JSON."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Also what stops other sites: a page may send plain text anywhere without asking, but not JSON.
    if kind != "application/json":
        raise ServingError(
            415, "the body must be JSON: send content-type: application/json", code="unsupported_media_type"
        )
    return parse_json(await within(state.settings.body_s, http.body()))


async def within(seconds: float, reading: Any) -> Any:
    """What is read from a client, if it arrives in time; else a 408."""
    try:
        async with asyncio.timeout(seconds):
            return await reading
    except TimeoutError:
        raise ServingError(408, f"the body did not arrive within {seconds:g} s", code="timeout") from None


def count_candidates(n_images: int, n_candidates: int | None, state: State, name: str) -> int:
    """How many slots a request needs; a 400 above the server's limits. `name`: how it calls its pictures."""
    settings = state.settings
    if n_images > settings.max_images:
        raise bad_request(f"{name} is {n_images}; this server draws at most {settings.max_images}", name)
    if n_candidates is None:
        return n_images
    if not n_images <= n_candidates <= settings.max_candidates:
        raise bad_request(
            f"num_candidates is {n_candidates}; choose {n_images}..{settings.max_candidates}",
            "num_candidates",
        )
    return n_candidates


async def accept(
    state: State,
    n_slots: int,
    listener: Listener,
    prepare: Callable[[], CaptionRequest],
    keeps_candidates: bool,
) -> Job:
    """Reserves slots, then checks the request, then queues it; slots are given back where a check fails."""
    reservation = state.jobs.reserve(n_slots)
    try:
        request = await run_in_threadpool(_checked, prepare)
        return state.jobs.submit(reservation, request, listener, keeps_candidates)
    except BaseException:
        reservation.release()
        raise


def _checked(prepare: Callable[[], CaptionRequest]) -> CaptionRequest:
    try:
        return prepare()
    except ValueError as error:
        message = " ".join(str(error).split())
        named = FIELDS.match(message)
        name = {"caption": "prompt"}.get(named[1], named[1]) if named else None
        code = "caption_too_long" if named and named[1] == "caption" else "invalid_value"
        raise bad_request(message, name, code) from None


def decode_base64(text: str, name: str) -> bytes:
    """The bytes of a base64 field, which may be a data: address; a 400 for anything else."""
    head, comma, data = text.partition(",")
    if comma and head.startswith("data:") and head.endswith(";base64"):
        text = data
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise bad_request(f"{name} is not base64", name, "invalid_base64") from None


def read_picture(data: bytes, name: str, state: State) -> Image.Image:
    """An uploaded picture; its header is checked before a pixel is decoded. ValueErrors name the field."""
    return _named(lambda: open_image(data, state.settings.max_pixels), name)


def read_mask(data: bytes, name: str, state: State) -> Image.Image:
    """An uploaded mask, see `open_mask`."""
    return _named(lambda: open_mask(data, state.settings.max_pixels), name)


def _named(opened: Callable[[], Image.Image], name: str) -> Image.Image:
    try:
        return opened()
    except ValueError as error:
        message = str(error).removeprefix("picture: ")
        raise bad_request(f"{name}: {message}", name, "invalid_image") from None
