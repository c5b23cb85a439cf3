"""The application: middleware around the routers of one model, its queue and its history."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dalle import __version__
from dalle.pipeline import DallePipeline
from dalle.serving import draw_api
from dalle.serving.history import History
from dalle.serving.job import ServingError
from dalle.serving.jobs import Jobs
from dalle.serving.settings import Settings
from dalle.serving.state import State


def create_app(settings: Settings, pipe: DallePipeline) -> FastAPI:
    """Wires one server; its worker starts with the application and ends with it. `app.state.serving` is its State."""
    history = History(settings.data_dir)
    jobs = Jobs(pipe, history, settings)
    state = State(pipe, jobs, history, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        jobs.start()
        yield
        jobs.close()
        history.close()

    app = FastAPI(title="dalle", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.serving = state
    for name in ("page", "history_api", "microscope_api", "watch_api", "templates"):
        if importlib.util.find_spec(f"dalle.serving.{name}"):
            module = importlib.import_module(f"dalle.serving.{name}")
            if hasattr(module, "router"):
                app.include_router(module.router(state))
    app.include_router(draw_api.router(state))
    app.add_exception_handler(ServingError, _tell)
    return app


async def _tell(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    return JSONResponse(error.body(), error.status)
