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
from dalle.serving.errors import ServingError, bad_request
from dalle.serving.files import SignedFiles
from dalle.serving.guard import Guard, error_answer
from dalle.serving.history import History
from dalle.serving.queue import JobQueue
from dalle.serving.routes import draw, health, microscope, openai, page, runs, templates
from dalle.serving.routes import history as history_routes
from dalle.serving.schema import first_error
from dalle.serving.settings import Settings
from dalle.serving.state import State
from dalle.serving.worker import Worker


def create_app(settings: Settings, pipe: DallePipeline) -> FastAPI:
    """Wire one server; its worker starts with the application and ends with it. `app.state.serving` is its State."""
    history, queue = History(settings.data_dir), JobQueue(settings)
    worker = Worker(pipe, history, queue)
    state, files = State(pipe, queue, worker, history, settings), SignedFiles(settings.url_s)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.close()
        history.close()

    # No generated pages of documentation: they load scripts from elsewhere. /openapi.json stays.
    app = FastAPI(title="dalle", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.serving = state
    for module in (health, draw, history_routes, microscope, runs, templates, page):
        app.include_router(module.router(state))
    app.include_router(openai.router(state, files))
    for kind in (ServingError, HTTPException, RequestValidationError, ClientDisconnect):
        app.add_exception_handler(kind, _answer)
    app.add_middleware(Guard, settings=settings, files=files, metrics=queue.metrics)
    return app


async def _answer(http: Request, error: Exception) -> Response:
    """Answer every failure in OpenAI's envelope."""
    failure = _as_error(http, error)
    headers, body = error_answer(failure)
    return Response(body, failure.status, headers)


def _as_error(http: Request, error: Exception) -> ServingError:
    if isinstance(error, ServingError):
        return error
    if isinstance(error, RequestValidationError):
        return first_error(error.errors())
    if isinstance(error, ClientDisconnect):
        return bad_request("the request ended before its body")
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
    shown = ascii(http.url.path)[1:-1][:80]
    texts = {404: f"there is nothing at {shown}", 405: f"{shown} does not take {http.method}"}
    is_plain = error.detail in ("Not Found", "Method Not Allowed")
    message = texts[error.status_code] if is_plain else str(error.detail)
    return ServingError(error.status_code, message, code=codes.get(error.status_code, "invalid_value"))
