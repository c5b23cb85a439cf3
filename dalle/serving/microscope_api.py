"""The microscope over HTTP: the cells of a stored picture, the codebook's pictures, and what each layer sees."""

from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from typing import Any, TypeVar

from fastapi import APIRouter, Header, Response

from dalle.serving.history_api import no_picture, told
from dalle.serving.job import ServingError
from dalle.serving.microscope import Microscope, visible_cells
from dalle.serving.state import State

T = TypeVar("T")


def router(state: State) -> APIRouter:
    """The routes /api/pictures/ID/microscope, /api/codebook and /api/masks."""
    routes = APIRouter(prefix="/api", tags=["microscope"])

    def run(work: Callable[[], T]) -> T:
        """Wait for the worker: between two batches it runs what needs the model."""
        future = state.jobs.run(work)
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
