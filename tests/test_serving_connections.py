"""Slow, silent and too many clients: their connections end, and others are answered meanwhile."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from dalle.serving.connections import max_sockets
from dalle.serving.settings import Settings
from tests.live import Live, live_server


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    limits = {"head_s": 0.5, "send_s": 0.5, "max_per_address": 12, "max_connections": 64}
    with live_server(tmp_path_factory.mktemp("data"), **limits) as one:
        yield one


def connect(live: Live) -> socket.socket:
    host, port = live.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def is_ended(connection: socket.socket) -> bool:
    """Whether the server ends a connection; TimeoutError when it says nothing for ten seconds."""
    try:
        while connection.recv(65536):
            pass
        return True
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: local"])
def test_a_head_that_does_not_come_ends_the_connection(live: Live, sent: bytes) -> None:
    with connect(live) as silent:
        silent.sendall(sent)
        assert is_ended(silent)


def test_half_a_second_head_ends_the_connection_too(live: Live) -> None:
    with connect(live) as one:
        one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in one.recv(65536)
        one.sendall(b"GET /hea")
        assert is_ended(one)


def test_idle_connections_give_way_and_health_is_answered(live: Live) -> None:
    """1,100 of them made a server answer 503 to everybody."""
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(live)) for _ in range(40)]
        assert live.request("GET", "/health")[0] == 200
        assert is_ended(idle[0]), "the oldest first"


def test_a_client_that_reads_nothing_is_given_up(live: Live) -> None:
    with connect(live) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        request = b"GET /static/app.js HTTP/1.1\r\nHost: localhost\r\n\r\n"
        deadline = time.monotonic() + 20
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while time.monotonic() < deadline:  # answers fill the buffers on the way, then the server's own
                one.sendall(request)


def test_sockets_stay_below_the_files_that_a_process_may_open() -> None:
    assert 16 <= max_sockets(Settings()) <= 2 * 512 + 64
    assert max_sockets(Settings(max_connections=1)) == 66
