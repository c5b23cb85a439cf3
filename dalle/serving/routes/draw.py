"""The page's drawing: `POST /api/draw` streams a job row by row, `DELETE /api/jobs/{job}` ends it.

Shapes: G grid side.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import APIRouter
from PIL import Image
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from dalle import __version__
from dalle.evaluation.microscope import masks
from dalle.generation.fields import FIELDS
from dalle.generation.request import ImageRequest
from dalle.images import grid
from dalle.serving.errors import ServingError
from dalle.serving.intake import accept, count_candidates, decode_base64, read_json, read_mask, read_picture
from dalle.serving.job import Event, Failed, Job, Queued, RowDrawn, Settled, Started
from dalle.serving.mailbox import EventStream, Mailbox
from dalle.serving.schema import DrawBody, check
from dalle.serving.state import State

NAMES = {"num_images_per_prompt": "num_images"}  # fields that the page calls otherwise
SHEET_QUALITY = 85  # JPEG; a preview is looked at for a fraction of a second
OWN = (
    "seed",
    "index",
    "batch",
    "tokens_sha256",
    "score",
    "rank",
)  # of a recipe: not shared by a job's pictures


def router(state: State) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(prefix="/api")
    schema = DrawBody.model_json_schema()

    @routes.get("/info")
    def info() -> dict[str, Any]:
        return describe(state)

    @routes.post(
        "/draw", openapi_extra={"requestBody": {"content": {"application/json": {"schema": schema}}}}
    )
    async def draw(http: HttpRequest) -> Response:
        wanted = check(DrawBody, await read_json(http, ("image", "mask")))
        n = count_candidates(wanted.num_images, wanted.num_candidates, state, "num_images")
        mailbox = Mailbox()
        has_picture = wanted.image is not None or wanted.mask is not None
        job = await accept(state, n, mailbox, lambda: read(state, wanted, n), NAMES, True, has_picture)
        writer = PageEvents(state, job)
        return EventStream(state.queue, job, mailbox, writer.write, {"x-dalle-job": job.id})

    @routes.delete("/jobs/{job}")
    def cancel(job: str) -> Response:
        if not state.queue.cancel(job):
            raise ServingError(404, "there is no such job, or it has ended", code="not_found", param="job")
        return JSONResponse({"cancelled": True})

    return routes


def describe(state: State) -> dict[str, Any]:
    """Return what the page needs to know of the model and the server's limits."""
    pipe, config = state.pipe, state.pipe.transformer.config
    return {
        "model": pipe.name if pipe.name == "bundled" else pipe.name.rstrip("/").rpartition("/")[2],
        "model_sha256": pipe.model_sha256,
        "version": __version__,
        "grid": config.grid_size,
        "image_size": pipe.dvae.output_size,
        "n_codes": config.n_image_vocab,
        "n_text_tokens": config.n_text_tokens,
        "defaults": pipe.defaults.model_dump(),
        "fields": {NAMES.get(name, name): facts._asdict() for name, facts in FIELDS.items()},
        "has_ranker": pipe.ranker is not None,
        "max_images": state.settings.max_images,
        "max_candidates": state.settings.max_candidates if pipe.ranker else state.settings.max_images,
        "layers": list(masks(pipe.transformer)),
        "is_guarded": state.settings.api_key is not None,
    }


def read(state: State, wanted: DrawBody, n_candidates: int) -> ImageRequest:
    """Return a body's request; ServingErrors for its pictures, InvalidRequests for its fields."""
    image = mask = None
    if wanted.image is not None:
        image = read_picture(decode_base64(wanted.image, "image"), "image", state)
    if wanted.mask is not None:
        mask = read_mask(decode_base64(wanted.mask, "mask"), "mask", state)
    return ImageRequest(
        wanted.prompt,
        num_images_per_prompt=wanted.num_images,
        num_candidates=n_candidates,
        seed=wanted.seed,
        temperature=wanted.temperature,
        top_k=wanted.top_k,
        top_p=wanted.top_p,
        guidance=wanted.guidance,
        image=image,
        keep_rows=wanted.keep_rows,
        mask=mask,
        truncate=wanted.truncate,
    )


class PageEvents:
    """Turns a job's events into the page's."""

    def __init__(self, state: State, job: Job) -> None:
        self._job, self._request = job, job.request
        self._grid, self._side = state.pipe.dvae.grid_size, state.pipe.dvae.output_size

    def write(self, event: Event) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Name and JSON of what the page is sent for an event."""
        match event:
            case Queued(position):
                yield "queued", {"job": self._job.id, "position": position}
            case Started():
                yield "started", self._started()
            case RowDrawn(row, first, images):
                yield "row", {"row": row, "n_rows": self._grid, "first": first} | sheet(images)
            case Settled():
                yield "settled", self._settled(event)
            case Failed(error):
                yield "error", error.body()

    def _started(self) -> dict[str, Any]:
        return {
            "job": self._job.id,
            "caption": self._request.caption,
            "n_candidates": self._job.n_candidates,
            "seeds": list(self._request.seeds),
            "grid": self._grid,
            "image_size": self._side,
        }

    def _settled(self, event: Settled) -> dict[str, Any]:
        pictures = [
            {
                "id": one.picture_id,
                "url": f"/api/pictures/{one.picture_id}.png",
                "seed": one.seed,
                "index": one.index,
                "score": one.score,
                "rank": one.rank,
            }
            for one in event.pictures
        ]
        return {
            "pictures": pictures,
            "kept": self._request.n_images,
            "recipe": {name: value for name, value in event.pictures[0].recipe.items() if name not in OWN},
            "truncated": self._request.truncation is not None,
        }


def sheet(images: tuple[Image.Image, ...]) -> dict[str, Any]:
    """Pictures side by side as one JPEG."""
    columns = math.ceil(math.sqrt(len(images)))
    buffer = io.BytesIO()
    grid(images, columns, pad=0).save(buffer, format="JPEG", quality=SHEET_QUALITY)
    return {
        "sheet": base64.b64encode(buffer.getvalue()).decode("ascii"),
        "columns": columns,
        "tile": images[0].width,
        "n": len(images),
    }
