"""The microscope over HTTP: the cells of a stored picture, the codebook's pictures, and what each layer sees."""

import functools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from fastapi import APIRouter, Header, Response

from dalle.config import validate
from dalle.evaluation.microscope import Reading, draw_token, masks, read_picture, visible_cells
from dalle.generation.recipe import Recipe
from dalle.pipeline import DallePipeline
from dalle.serving.errors import ServingError
from dalle.serving.history import History, Picture
from dalle.serving.routes.history import no_picture, told
from dalle.serving.state import State

N_READINGS = 64  # pictures whose numbers are kept: 20 kB each at a grid of 16
N_SWATCHES = 8192  # pictures of tokens that are kept: the paper's whole codebook, under 1 kB each

T = TypeVar("T")


class Runner(Protocol):
    """Runs work on the thread that owns the model, and waits for its result."""

    def __call__(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, or raise what it raises."""


class Microscope:
    """Looks at the pictures of a history through the model that drew them; safe to use from many threads."""

    def __init__(self, pipe: DallePipeline, history: History, run: Runner) -> None:
        """`run` calls what needs the model on the thread that owns it."""
        self.pipe, self.history = pipe, history
        self._run = run
        self._readings = functools.lru_cache(N_READINGS)(self._read)
        self._swatches = functools.lru_cache(N_SWATCHES)(self._draw_swatch)

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Number and mask kind of each layer of the transformer, the first first."""
        return [{"layer": layer, "mask": kind} for layer, kind in enumerate(masks(self.pipe.transformer))]

    def look(self, picture: Picture) -> dict[str, Any]:
        """Everything the page shows of a picture.

        Raises:
            ValueError: another model drew the picture: its tokens mean nothing to this one.
        """
        config = self.pipe.transformer.config
        reading = self._readings(picture.id)
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

    def swatch(self, token: int) -> bytes:
        """The PNG of a token's picture; ValueError for a token that the codebook has not."""
        n_codes = self.pipe.dvae.n_codes
        if not 0 <= token < n_codes:
            raise ValueError(f"token is {token}; the codebook has 0 to {n_codes - 1}")
        return self._swatches(token)

    def _read(self, id: str) -> Reading:
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
        return self._run(lambda: read_picture(pipe.transformer, text, tokens, recipe.options))

    def _draw_swatch(self, token: int) -> bytes:
        return self._run(lambda: draw_token(self.pipe.dvae, token))


def router(state: State) -> APIRouter:
    """The routes /api/pictures/ID/microscope, /api/codebook and /api/masks."""
    routes = APIRouter(prefix="/api", tags=["microscope"])

    def run(work: Callable[[], T]) -> T:
        """Wait for the worker: between two batches it runs what needs the model."""
        future = state.queue.run(work)
        try:
            return future.result(state.settings.deadline_s)
        except FutureTimeout:
            future.cancel()
            text = "the model is busy drawing: try again later"
            raise ServingError(
                503, text, kind="server_error", code="server_overloaded", retry_after_s=30
            ) from None

    microscope = Microscope(state.pipe, state.history, run)

    @routes.get("/pictures/{id}/microscope")
    def look(id: str) -> dict[str, Any]:
        """What the transformer says of each cell of a picture."""
        with told():
            picture = state.history.get(id)
            if picture is None:
                raise no_picture()
            return microscope.look(picture)

    @routes.get("/codebook/{token}.png")
    def swatch(token: int, if_none_match: str | None = Header(None)) -> Response:
        """What a token looks like among its like."""
        headers = {"ETag": f'"{state.pipe.model_sha256[:16]}-{token}"', "Cache-Control": "private, no-cache"}
        with not_found():
            if if_none_match == headers["ETag"] and 0 <= token < state.pipe.dvae.n_codes:
                return Response(status_code=304, headers=headers)
            return Response(microscope.swatch(token), media_type="image/png", headers=headers)

    @routes.get("/masks/{layer}/{cell}")
    def mask(layer: int, cell: int) -> dict[str, Any]:
        """Which cells a layer lets the model see when it draws a cell; the whole caption is always seen."""
        with not_found():
            return {"cells": visible_cells(state.pipe.transformer, layer, cell), "text": True}

    return routes


@contextmanager
def not_found() -> Iterator[None]:
    """A number in the address that names nothing is a 404."""
    try:
        yield
    except ValueError as error:
        raise ServingError(404, str(error), code="not_found") from error
