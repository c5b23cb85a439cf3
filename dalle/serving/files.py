"""Addresses of drawn pictures that work for a while: random ids, signed, so that none can be made up or prolonged.

Source: OpenAI's `response_format: "url"`, whose addresses work for an hour. The address is the credential: whoever has
it may look, as clients fetch it without a key.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

PREFIX = "/v1/images/files/"
NAME = re.compile(
    r"(?P<id>[\w-]{1,64})~(?P<expires>\d{1,12})~(?P<side>\d{1,5})~(?P<compression>\d{1,3})"
    r"~(?P<signature>[\w-]{43})\.(?P<format>png|jpeg|webp)",
    re.ASCII,
)

Format = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True)
class OutputFormat:
    """How a picture is handed out."""

    side: int  # pixels
    format: Format
    compression: int  # quality of JPEG and WebP, 0..100


class SignedFiles:
    """Makes and reads addresses; a restart of the server ends them all."""

    def __init__(self, seconds: int, clock: Callable[[], float] = time.time) -> None:
        self._seconds, self._clock = seconds, clock
        self._secret = secrets.token_bytes(32)

    def path(self, picture_id: str, look: OutputFormat) -> str:
        """Return the path of a picture in the history, from now on."""
        expires = int(self._clock()) + self._seconds
        facts = f"{picture_id}~{expires}~{look.side}~{look.compression}"
        return f"{PREFIX}{facts}~{self._sign(facts, look.format)}.{look.format}"

    def read(self, path: str) -> tuple[str, OutputFormat] | None:
        """Id and look of a path that was given out and has not expired, else None."""
        found = NAME.fullmatch(path.removeprefix(PREFIX)) if path.startswith(PREFIX) else None
        if found is None:
            return None
        facts = path.removeprefix(PREFIX).rpartition("~")[0]
        if not hmac.compare_digest(found["signature"], self._sign(facts, found["format"])):
            return None
        if int(found["expires"]) < self._clock():
            return None
        look = OutputFormat(int(found["side"]), cast(Format, found["format"]), int(found["compression"]))
        return found["id"], look

    def _sign(self, facts: str, kind: str) -> str:
        digest = hmac.digest(self._secret, f"{facts}.{kind}".encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(digest).decode("ascii").rstrip("=")
