"""The page: its files, read once from the package, and nothing else that lies there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Annotated

from fastapi import APIRouter, Header
from starlette.responses import Response

from dalle.serving.errors import ServingError
from dalle.serving.state import State

TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
ENTRY = "index.html"


@dataclass(frozen=True)
class PageFile:
    """One file of the page, as it is sent."""

    data: bytes
    media_type: str
    etag: str

    def response(self, if_none_match: str | None) -> Response:
        """The file, or 304 to who has it already; asked for anew each time, so that an upgrade shows at once."""
        headers = {"ETag": self.etag, "Cache-Control": "no-cache"}
        known = [] if if_none_match is None else [tag.strip() for tag in if_none_match.split(",")]
        if self.etag in known or f"W/{self.etag}" in known:
            return Response(status_code=304, headers=headers)
        return Response(self.data, media_type=self.media_type, headers=headers)


def page_files() -> Mapping[str, PageFile]:
    """Every file of the page by name; a name from outside is looked up here and never becomes a path."""
    files = {}
    for item in resources.files("dalle.serving").joinpath("static").iterdir():
        suffix = item.name[item.name.rfind(".") :]
        if suffix in TYPES:
            data = item.read_bytes()
            files[item.name] = PageFile(data, TYPES[suffix], f'"{hashlib.sha256(data).hexdigest()[:32]}"')
    return files


def router(_: State) -> APIRouter:
    """The routes `/` and `/static/NAME`."""
    routes = APIRouter(include_in_schema=False)
    files = page_files()

    @routes.api_route("/", methods=["GET", "HEAD"])
    def index(if_none_match: Annotated[str | None, Header()] = None) -> Response:
        return files[ENTRY].response(if_none_match)

    @routes.api_route("/static/{name}", methods=["GET", "HEAD"])
    def static(name: str, if_none_match: Annotated[str | None, Header()] = None) -> Response:
        if name not in files or name == ENTRY:
            raise ServingError(404, "the page has no such file", code="not_found")
        return files[name].response(if_none_match)

    return routes
