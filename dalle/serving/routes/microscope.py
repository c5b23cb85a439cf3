"""The microscope over HTTP: the cells of a stored picture, the codebook's pictures, and what each layer sees."""

import asyncio
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from fastapi import APIRouter, Header, Response
from starlette.concurrency import run_in_threadpool

from dalle.config import validate
from dalle.evaluation.microscope import Reading, draw_token, masks, read_picture, visible_cells
from dalle.generation.recipe import Recipe
from dalle.pipeline import DallePipeline
from dalle.serving.errors import ServingError
from dalle.serving.history import History, Picture
from dalle.serving.routes.history import history_errors, no_picture
from dalle.serving.state import State

N_READINGS = 64  # pictures whose numbers are kept: 20 kB each at a grid of 16
N_SWATCHES = 8192  # pictures of tokens that are kept: the paper's whole codebook, under 1 kB each

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")


class Runner(Protocol):
    """Runs work on the thread that owns the model, and awaits its result."""

    async def __call__(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, or raise what it raises."""


class _Recent(Generic[K, V]):
    """Results by key; the longest unused go first. For one event loop."""

    def __init__(self, size: int, make: Callable[[K], Awaitable[V]]) -> None:
        self._size, self._make, self._found = size, make, OrderedDict[K, V]()

    async def __call__(self, key: K) -> V:
        """Return the result of a key, made where there is none."""
        if key not in self._found:
            self._found[key] = await self._make(key)
            if len(self._found) > self._size:
                self._found.popitem(last=False)
        self._found.move_to_end(key)
        return self._found[key]


class Microscope:
    """Looks at the pictures of a history through the model that drew them; for one event loop."""

    def __init__(self, pipe: DallePipeline, history: History, run: Runner) -> None:
        """`run` calls what needs the model on the thread that owns it."""
        self.pipe, self.history = pipe, history
        self._run = run
        self._readings = _Recent(N_READINGS, self._read)
        self._swatches = _Recent(N_SWATCHES, self._draw_swatch)

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Number and mask kind of each layer of the transformer, the first first."""
        return [{"layer": layer, "mask": kind} for layer, kind in enumerate(masks(self.pipe.transformer))]

    async def look(self, picture: Picture) -> dict[str, Any]:
        """Everything the page shows of a picture.

        Raises:
            ValueError: another model drew the picture: its tokens mean nothing to this one.
        """
        config = self.pipe.transformer.config
        reading = await self._readings(picture.id)
        completion = picture.recipe.get("completion")
        given = None if completion is None else [token >= 0 for token in completion["known"]]
        return {
            "grid": config.grid_size,
            "tokens": reading.tokens,
            "probability": reading.probability,
            "drawn_probability": reading.drawn_probability,
            "entropy_bits": reading.entropy_bits,
            "max_entropy_bits": math.log2(config.n_image_vocab),
            "rank": reading.rank,
            "given": None if given is None else torch.tensor(given).view(2 * [config.grid_size]).tolist(),
            "layers": self.layers,
            "vocabulary": config.n_image_vocab,
        }

    async def swatch(self, token: int) -> bytes:
        """Return the PNG of a token's picture; ValueError for a token that the codebook has not."""
        n_codes = self.pipe.dvae.n_codes
        if not 0 <= token < n_codes:
            raise ValueError(f"token is {token}; the codebook has 0 to {n_codes - 1}")
        return await self._swatches(token)

    async def _read(self, id: str) -> Reading:
        prepared = await run_in_threadpool(self._prepare, id)
        return await self._run(prepared)

    def _prepare(self, id: str) -> Callable[[], Reading]:
        picture, tokens = self.history.get(id), self.history.tokens(id)
        if picture is None or tokens is None:
            raise ValueError("picture was deleted meanwhile")
        recipe = validate(Recipe, picture.recipe, "recipe")
        pipe = self.pipe
        if recipe.model_sha256 != pipe.model_sha256:
            raise ValueError(
                f"picture was drawn by model {recipe.model} ({recipe.model_sha256[:12]}); this server runs {pipe.name}"
                f" ({pipe.model_sha256[:12]}): serve the picture's model to look into it"
            )
        text, _ = pipe.sampler.read(recipe.caption, recipe.truncate)
        return lambda: read_picture(pipe.transformer, text, tokens, recipe.options)

    async def _draw_swatch(self, token: int) -> bytes:
        return await self._run(lambda: draw_token(self.pipe.dvae, token))


def router(state: State) -> APIRouter:
    """Return the routes /api/pictures/ID/microscope, /api/codebook and /api/masks."""
    routes = APIRouter(prefix="/api", tags=["microscope"])

    async def run(work: Callable[[], T]) -> T:
        """Await the worker, as one slot of its queue: between two batches it runs what needs the model."""
        reservation = state.queue.reserve(1)
        try:
            async with asyncio.timeout(state.settings.deadline_s):
                return await asyncio.wrap_future(state.queue.run(work))
        except TimeoutError:
            text = "the model is busy drawing: try again later"
            raise ServingError(
                503, text, kind="server_error", code="server_overloaded", retry_after_s=30
            ) from None
        finally:
            reservation.release()

    microscope = Microscope(state.pipe, state.history, run)

    @routes.get("/pictures/{id}/microscope")
    async def look(id: str) -> dict[str, Any]:
        """Return what the transformer says of each cell of a picture."""
        with history_errors():
            picture = await run_in_threadpool(state.history.get, id)
            if picture is None:
                raise no_picture()
            return await microscope.look(picture)

    @routes.get("/codebook/{token}.png")
    async def swatch(token: int, if_none_match: str | None = Header(None)) -> Response:
        """Return what a token looks like among its like."""
        headers = {"ETag": f'"{state.pipe.model_sha256[:16]}-{token}"', "Cache-Control": "private, no-cache"}
        with not_found():
            if if_none_match == headers["ETag"] and 0 <= token < state.pipe.dvae.n_codes:
                return Response(status_code=304, headers=headers)
            return Response(await microscope.swatch(token), media_type="image/png", headers=headers)

    @routes.get("/masks/{layer}/{cell}")
    def mask(layer: int, cell: int) -> dict[str, Any]:
        """Which cells a layer lets the model see when it draws a cell; the whole caption is always seen."""
        with not_found():
            return {"cells": visible_cells(state.pipe.transformer, layer, cell), "text": True}

    return routes


@contextmanager
def not_found() -> Iterator[None]:
    """Make a 404 of a number in the address that names nothing."""
    try:
        yield
    except ValueError as error:
        raise ServingError(404, str(error), code="not_found") from error
