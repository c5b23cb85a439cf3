"""uvicorn around the application, and how it stops: accepted jobs end, or their clients are told."""

from __future__ import annotations

import asyncio
import logging
import socket

import uvicorn
from fastapi import FastAPI

from dalle.serving.connections import Connection, protocol
from dalle.serving.queue import JobQueue
from dalle.serving.settings import Settings
from dalle.serving.state import State

logger = logging.getLogger(__name__)

AFTER_GRACE_S = 5  # for the streams to say goodbye
TICKS_PER_S = 10  # of uvicorn's main loop
BACKLOG = 2048  # connections that wait for the event loop


def listen(settings: Settings) -> socket.socket:
    """Return the socket of a server; ValueError where it cannot have that address."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listening = socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = (error.strerror or "refused").partition(" (")[0]
        raise ValueError(
            f"cannot listen on {settings.host}, port {settings.port} ({reason}): choose another --port or --host"
        ) from None
    # Accepted sockets inherit it; asyncio sets it only where the protocol is given by number. Without it the second
    # part of an answer waits for the client's delayed acknowledgement, 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


class Server(uvicorn.Server):
    """Runs one application until SIGTERM or SIGINT; a second SIGINT does not wait."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,  # nobody in front is trusted to say who asks
                lifespan="on",
                http=protocol(settings),  # it bounds connections; the guard bounds requests
                ws="none",
                timeout_keep_alive=30,
                timeout_graceful_shutdown=int(settings.grace_s) + AFTER_GRACE_S,
                h11_max_incomplete_event_size=32_768,  # of a request's head
            )
        )
        self.state: State = app.state.serving
        self._settings, self._grace_s = settings, settings.grace_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup([listen(self._settings)] if sockets is None else sockets)
        if self.started:
            logger.info("dalle serves on %s (stop it with Ctrl-C)", self.url)

    async def on_tick(self, counter: int) -> bool:
        """Once a second, end the connections whose clients are too slow; True stops the server."""
        if counter % TICKS_PER_S == 0:
            for connection in [*self.server_state.connections]:
                if isinstance(connection, Connection):
                    connection.check()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing more on, give jobs their time, then end them."""
        queue = self.state.queue
        queue.drain()
        ending = asyncio.ensure_future(asyncio.to_thread(_end, queue, self._grace_s))
        await super().shutdown(sockets)
        queue.stop()  # nobody is left to wait for them; or somebody pressed Ctrl-C twice
        await ending

    @property
    def url(self) -> str:
        """Where it listens, once it has started."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _end(queue: JobQueue, grace_s: float) -> None:
    if not queue.wait_idle(grace_s):
        logger.warning("%d requests did not end within %g s: their clients are told", queue.n_jobs, grace_s)
    queue.stop()
