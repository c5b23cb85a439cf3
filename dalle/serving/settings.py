"""Settings of `dalle serve`: where it listens, what it keeps, and how much it takes on."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from dalle.config import Config
from dalle.generation.batch import ROWS_PER_BATCH


def default_data_dir() -> Path:
    """Where pictures are kept: `dalle` in the user's data folder (XDG base directories)."""
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home) / "dalle"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address or name."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # another name
        return False


class Settings(Config):
    """What a server is started with.

    Raises:
        ValueError: an address that others reach, without an API key; limits that exclude each other.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000  # 0: any free one
    # What every request must bring, `/health` excepted; None: none, for this machine alone.
    api_key: Annotated[str, Field(min_length=8, max_length=512, pattern=r"^[\x21-\x7e]+$")] | None = None
    allowed_hosts: tuple[str, ...] = ()  # further names in the Host header, such as a proxy's
    data_dir: Path = Field(default_factory=default_data_dir)  # history.sqlite and the pictures
    runs: Path | None = None  # folder whose sub-folders are training runs to watch
    templates: Path | None = None  # TOML file with further captions for the explorer

    max_queue: Annotated[int, Field(ge=1)] = 32  # jobs accepted and not settled, the drawn ones included
    max_slots: Annotated[int, Field(ge=1)] = 4096  # candidates of those jobs together
    max_images: Annotated[int, Field(ge=1, le=512)] = 64  # pictures of one request
    max_candidates: Annotated[int, Field(ge=1, le=4096)] = 512  # drawn for one request
    rows_per_batch: Annotated[int, Field(ge=1, le=ROWS_PER_BATCH)] = ROWS_PER_BATCH  # candidates side by side
    deadline_s: Annotated[float, Field(gt=0)] = 300.0  # from acceptance to the last picture
    grace_s: Annotated[float, Field(ge=0)] = 20.0  # after SIGTERM, for accepted jobs to end
    url_s: Annotated[int, Field(ge=1)] = 3600  # how long the address of a drawn picture works, as OpenAI's

    max_body_bytes: Annotated[int, Field(ge=1024)] = 16_000_000  # of one request, base64 pictures included
    body_s: Annotated[float, Field(gt=0)] = 60.0  # for a client to send it
    head_s: Annotated[float, Field(gt=0)] = 10.0  # for a client to send a request's head
    send_s: Annotated[float, Field(gt=0)] = 30.0  # for a client to read some of what it is sent
    max_pixels: Annotated[int, Field(ge=1)] = 16_000_000  # of an uploaded picture
    max_connections: Annotated[int, Field(ge=1)] = 512  # requests open at once; above: 503 at once
    max_per_address: Annotated[int, Field(ge=1)] = 256  # connections of one address; the idle ones end first

    @model_validator(mode="after")
    def _fits(self) -> Settings:
        if self.api_key is None and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} is open to other machines: set an API key (--api-key, or DALLE_API_KEY),"
                " or listen on 127.0.0.1"
            )
        if self.max_slots < self.max_candidates:
            raise ValueError(
                f"max_slots is {self.max_slots}, max_candidates {self.max_candidates}: no request for so many could"
                " ever be taken; make max_candidates smaller"
            )
        return self
