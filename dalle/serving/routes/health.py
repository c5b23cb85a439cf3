"""Whether the server lives, whether it takes work, and what it counts."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from dalle.serving.errors import ServingError
from dalle.serving.state import State


def router(state: State) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> Response:
        """Alive: answered on the event loop, whatever the worker does; the one route that needs no key."""
        return JSONResponse({"status": "ok"})

    @routes.get("/ready")
    async def ready() -> Response:
        """The model is warm and requests are taken; 503 before that, and while the server stops."""
        if not state.worker.is_ready:
            raise ServingError(
                503, "the model is not warm yet", kind="server_error", code="not_ready", retry_after_s=1
            )
        return JSONResponse({"status": "ready"})

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(state.queue.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return routes
