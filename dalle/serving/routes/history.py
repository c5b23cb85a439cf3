"""The history over HTTP: the listing, the pictures, favourites, deletion, and what a picture's own recipe restores."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from dalle.config import Config, validate
from dalle.generation.recipe import Recipe
from dalle.images import read_recipe
from dalle.serving.errors import ServingError, bad_request
from dalle.serving.history import MAX_PAGE, History, Picture
from dalle.serving.intake import read_json
from dalle.serving.schema import check
from dalle.serving.state import State

# A picture never changes under its id; `private`: it belongs to whoever has the key.
IMMUTABLE = {"Cache-Control": "private, max-age=31536000, immutable"}


class Change(Config):
    """What can be changed of a picture."""

    favourite: bool


def router(state: State) -> APIRouter:
    """Return the routes beneath /api/history, /api/pictures and /api/restore."""
    routes = APIRouter(prefix="/api", tags=["history"])
    history = state.history

    @routes.get("/history")
    def search(
        query: str = "",
        favourite: bool = False,
        before: str | None = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
    ) -> dict[str, Any]:
        """List kept pictures, newest first, whose captions hold every word of `query`."""
        with history_errors():
            page = history.search(query, favourite=favourite, before=before, limit=limit)
        return {"pictures": [listed(picture) for picture in page.pictures], "next": page.next}

    @routes.get("/pictures/{id}.png")
    def png(id: str) -> Response:
        """Return the PNG of a picture, with its recipe inside."""
        with history_errors():
            data = history.png(id)
        if data is None:
            raise no_picture()
        return Response(data, media_type="image/png", headers=IMMUTABLE)

    schema = Change.model_json_schema()

    @routes.patch(
        "/history/{id}",
        openapi_extra={"requestBody": {"content": {"application/json": {"schema": schema}}}},
    )
    async def change(id: str, http: Request) -> dict[str, Any]:
        """Mark a picture as a favourite, or unmark it."""
        body = check(Change, await read_json(http))
        return await run_in_threadpool(_changed, history, id, body)

    @routes.delete("/history/{id}", status_code=204)
    def delete(id: str) -> None:
        """Delete a picture for ever."""
        with history_errors():
            if not history.delete(id):
                raise no_picture()

    @routes.post("/restore")
    async def restore(request: Request) -> dict[str, Any]:
        """Say how one of our PNGs, the raw body, was drawn; its pixels are not looked at."""
        data = await request.body()  # its size is bounded before it comes here
        return await run_in_threadpool(_restored, data, history, state.pipe.model_sha256)

    return routes


def _changed(history: History, id: str, body: Change) -> dict[str, Any]:
    with history_errors():
        picture = history.get(id) if history.set_favourite(id, body.favourite) else None
    if picture is None:
        raise no_picture()
    return listed(picture)


def listed(picture: Picture) -> dict[str, Any]:
    """Return a picture as the page sees it."""
    return {
        "id": picture.id,
        "url": f"/api/pictures/{picture.id}.png",
        "job": picture.job,
        "caption": picture.caption,
        "seed": picture.seed,
        "score": picture.score,
        "rank": picture.rank,
        "created_at": picture.created_at,
        "favourite": picture.favourite,
        "recipe": picture.recipe,
    }


def no_picture() -> ServingError:
    """Return what is said of an id that no picture has."""
    return ServingError(404, "there is no such picture; it may have been deleted", code="not_found")


@contextmanager
def history_errors() -> Iterator[None]:
    """Turn what the history raises into what a client is told."""
    try:
        yield
    except ValueError as error:
        raise bad_request(str(error)) from error
    except OSError as error:  # the path is in the log, and nobody else's business
        text = "the history cannot be read or written: is the disk full? The server's log says more"
        raise ServingError(500, text, kind="server_error", code="history_failed") from error


def _restored(data: bytes, history: History, model_sha256: str) -> dict[str, Any]:
    """Caption and settings of a PNG, checked; nothing of a picture that is not ours is repeated."""
    try:
        found = read_recipe(data)
    except ValueError as error:
        raise bad_request(str(error), code="no_recipe") from error
    try:
        recipe = validate(Recipe, found, "recipe")
        json.dumps(found, ensure_ascii=False).encode()  # a lone surrogate could not be sent on
    except ValueError as error:  # its line repeats the wrong value, which anybody may have written
        text = "the recipe in this PNG cannot be read: it was changed by hand, or by another version of dalle"
        raise bad_request(text, code="bad_recipe") from error
    options, completion = recipe.options, recipe.completion
    with history_errors():
        id = history.find_recipe(found)
    return {
        "caption": recipe.caption,
        "settings": {
            "seed": recipe.seed,
            "num_images": 1,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "guidance": options.guidance,
            "truncate": recipe.truncate,
            "keep_rows": None if completion is None else completion.keep_rows,
        },
        "recipe": found,
        "id": id,
        "same_model": recipe.model_sha256 == model_sha256,
    }
