"""Connections: how long a client may take for a request's head and for reading, and how many it may hold.

uvicorn ends silence only between two requests. Here a head that does not come, and an answer that nobody reads, end the
connection too; where sockets run out, one that waits for a request gives way to the new one.
"""

from __future__ import annotations

import asyncio
import functools
import math
import resource
import socket
import struct
from typing import TYPE_CHECKING, Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from dalle.serving.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable

SPARE_FILES = 100  # descriptors that are left to the model, the history and the log


class Connection(H11Protocol):
    """One client's connection, with deadlines; `check` is to be called about once a second."""

    def __init__(self, settings: Settings, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._settings = settings
        self._waiting_since: float | None = None  # for the rest of a head, by the loop's clock
        self._reading_since, self._n_unread = (
            math.inf,
            0,
        )  # since when a client has read nothing, of how many bytes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a client in, or turn it away where it, or all together, hold too many connections."""
        super().connection_made(cast(asyncio.Transport, transport))
        self._waiting_since = self.loop.time()
        others = [one for one in self.connections if isinstance(one, Connection) and one is not self]
        own = [one for one in others if one._address == self._address]
        if len(own) >= self._settings.max_per_address:
            self._make_room(own)
        elif len(others) >= max_sockets(self._settings):
            self._make_room(others)

    def data_received(self, data: bytes) -> None:
        """Take bytes in; the deadline of a head runs from its first byte, or from the connection's beginning."""
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._waiting_since = None
        elif self.is_idle and self._waiting_since is None:
            self._waiting_since = self.loop.time()

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def check(self) -> None:
        """End the connection if its client is too slow."""
        now, settings = self.loop.time(), self._settings
        if self._waiting_since is not None and now - self._waiting_since > settings.head_s:
            self.cut()
            return
        # While nothing is added to what waits to be sent, it shrinks as the client reads.
        is_fixed = self.flow.write_paused or self.is_idle or self.transport.is_closing()
        n_unread = self.transport.get_write_buffer_size()
        if not n_unread or not is_fixed:
            self._reading_since = math.inf
        elif self._reading_since == math.inf or n_unread < self._n_unread:
            self._reading_since = now
        elif now - self._reading_since > settings.send_s:
            self.cut()
        self._n_unread = n_unread

    def cut(self) -> None:
        """End the connection at once, and drop what the kernel would still send."""
        linger = struct.pack("ii", 1, 0)
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.transport.abort()

    @property
    def _address(self) -> str | None:
        return None if self.client is None else self.client[0]

    @property
    def _idle_since(self) -> float:
        return self.loop.time() if self._waiting_since is None else self._waiting_since

    def _make_room(self, others: Iterable[Connection]) -> None:
        idle = [one for one in others if one.is_idle and not one.transport.is_closing()]
        (min(idle, key=lambda one: one._idle_since) if idle else self).cut()


def max_sockets(settings: Settings) -> int:
    """Connections held at once: what the guard lets in and says no to, as far as this process may open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * settings.max_connections + 64
    return wanted if soft == resource.RLIM_INFINITY else max(16, min(wanted, soft - SPARE_FILES))


def protocol(settings: Settings) -> type[asyncio.Protocol]:
    """Return what uvicorn makes connections with."""
    return cast(type[asyncio.Protocol], functools.partial(Connection, settings))
