"""The application: the guard around the routers of one model, its queue and its history."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from dalle import __version__
from dalle.pipeline import DallePipeline
from dalle.serving import (
    draw_api,
    health_api,
    history_api,
    microscope_api,
    openai_api,
    page,
    templates,
    watch_api,
)
from dalle.serving.files import SignedFiles
from dalle.serving.guard import Guard, error_answer
from dalle.serving.history import History
from dalle.serving.job import ServingError, bad_request
from dalle.serving.jobs import Jobs
from dalle.serving.schema import told_first
from dalle.serving.settings import Settings
from dalle.serving.state import State


def create_app(settings: Settings, pipe: DallePipeline) -> FastAPI:
    """Wires one server; its worker starts with the application and ends with it. `app.state.serving` is its State."""
    history = History(settings.data_dir)
    jobs = Jobs(pipe, history, settings)
    state, files = State(pipe, jobs, history, settings), SignedFiles(settings.url_s)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        jobs.start()
        yield
        jobs.close()
        history.close()

    # No generated pages of documentation: they load scripts from elsewhere. /openapi.json stays.
    app = FastAPI(title="dalle", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.serving = state
    for module in (health_api, draw_api, history_api, microscope_api, watch_api, templates, page):
        app.include_router(module.router(state))
    app.include_router(openai_api.router(state, files))
    for kind in (ServingError, HTTPException, RequestValidationError, ClientDisconnect):
        app.add_exception_handler(kind, _tell)
    app.add_middleware(Guard, settings=settings, files=files, metrics=jobs.metrics)
    return app


async def _tell(http: Request, error: Exception) -> Response:
    """Every failure, in OpenAI's envelope."""
    failure = _as_told(http, error)
    headers, body = error_answer(failure)
    return Response(body, failure.status, headers)


def _as_told(http: Request, error: Exception) -> ServingError:
    if isinstance(error, ServingError):
        return error
    if isinstance(error, RequestValidationError):
        return told_first(error.errors())
    if isinstance(error, ClientDisconnect):
        return bad_request("the request ended before its body")
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
    shown = ascii(http.url.path)[1:-1][:80]
    texts = {404: f"there is nothing at {shown}", 405: f"{shown} does not take {http.method}"}
    is_plain = error.detail in ("Not Found", "Method Not Allowed")
    message = texts[error.status_code] if is_plain else str(error.detail)
    return ServingError(error.status_code, message, code=codes.get(error.status_code, "invalid_value"))
