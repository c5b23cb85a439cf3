"""Taking a request in: its body within bounds, its slots, its pictures, and the checks that need no model."""

from __future__ import annotations

import base64
import binascii
import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from dalle.generation.request import CaptionRequest, ImageRequest, InvalidRequest
from dalle.images import open_image, open_mask
from dalle.serving.errors import ServingError, bad_request
from dalle.serving.job import Job, Listener
from dalle.serving.schema import parse_json
from dalle.serving.state import State


async def read_json(http: HttpRequest, pictures: Sequence[str] = ()) -> Any:
    """Return a JSON body; ServingErrors for another type, too many bytes, and what is no JSON, see `parse_json`.

    Raises ClientDisconnect for a client that left while its body was parsed: it must not take a place in the queue.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Also what stops other sites: a page may send plain text anywhere without asking, but not JSON.
    if kind != "application/json":
        raise ServingError(
            415, "the body must be JSON: send content-type: application/json", code="unsupported_media_type"
        )
    tree = await run_in_threadpool(parse_json, await http.body(), pictures)
    if await http.is_disconnected():
        raise ClientDisconnect
    return tree


def count_candidates(n_images: int, n_candidates: int | None, state: State, name: str) -> int:
    """How many slots a request needs; a 400 above the server's limits. `name`: how it calls its pictures."""
    settings = state.settings
    if n_images > settings.max_images:
        raise bad_request(f"{name} is {n_images}; this server draws at most {settings.max_images}", name)
    if n_candidates is None:
        return usual_candidates(n_images, state.pipe.defaults.candidates, state)
    if not n_images <= n_candidates <= settings.max_candidates:
        raise bad_request(
            f"num_candidates is {n_candidates}; choose {n_images}..{settings.max_candidates}",
            "num_candidates",
        )
    return n_candidates


def usual_candidates(n_images: int, default: int | None, state: State) -> int:
    """How many candidates are drawn where a request leaves it open: max(default, pictures), as far as allowed here."""
    if state.pipe.ranker is None or default is None:
        return n_images
    return max(n_images, min(default, state.settings.max_candidates))


async def accept(
    state: State,
    n_slots: int,
    listener: Listener,
    read: Callable[[], ImageRequest],
    names: Mapping[str, str],
    keeps_candidates: bool,
    has_picture: bool,
) -> Job:
    """Reserve slots, then check the request, then queue it; slots are given back where a check fails.

    Args:
        n_slots: candidates.
        listener: is told what becomes of the job.
        read: makes the request, decoding its pictures.
        names: what the client calls fields of an `ImageRequest` that have another name there.
        keeps_candidates: in the history, those that lost too.
        has_picture: `read` decodes pictures: it waits until few others do.

    Raises:
        ServingError: 400 with the field at fault, or 503 where the queue is full.
    """
    reservation = state.queue.reserve(n_slots)
    try:
        if has_picture:
            async with state.decoding:
                request = await run_in_threadpool(_checked, state, read, names)
                await run_in_threadpool(give_memory_back)
        else:
            request = await run_in_threadpool(_checked, state, read, names)
        return state.queue.submit(reservation, request, listener, keeps_candidates)
    except BaseException:
        reservation.release()
        raise


def give_memory_back() -> None:
    """Return what decoded pictures took to the system: glibc keeps it for each thread otherwise."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # another libc has none
        if trim is not None:
            trim(0)


def _checked(state: State, read: Callable[[], ImageRequest], names: Mapping[str, str]) -> CaptionRequest:
    try:
        [request] = state.pipe.sampler.prepare(read(), state.pipe.ranker)
        return request
    except InvalidRequest as error:
        code = "caption_too_long" if error.field == "prompt" else "invalid_value"
        raise bad_request(str(error), names.get(error.field, error.field), code) from None


def decode_base64(text: str, name: str) -> bytes:
    """Return the bytes of a base64 field, which may be a data: address; a 400 for anything else."""
    head, comma, data = text.partition(",")
    if comma and head.startswith("data:") and head.endswith(";base64"):
        text = data
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise bad_request(f"{name} is not base64", name, "invalid_base64") from None


def read_picture(data: bytes, name: str, state: State) -> Image.Image:
    """Return an uploaded picture; its header is checked before a pixel is decoded. ValueErrors name the field."""
    return _named(lambda: open_image(data, state.settings.max_pixels), name)


def read_mask(data: bytes, name: str, state: State) -> Image.Image:
    """Return an uploaded mask, see `open_mask`."""
    return _named(lambda: open_mask(data, state.settings.max_pixels), name)


def _named(opened: Callable[[], Image.Image], name: str) -> Image.Image:
    try:
        return opened()
    except ValueError as error:
        message = str(error).removeprefix("picture: ")
        raise bad_request(f"{name}: {message}", name, "invalid_image") from None
