"""What every test runs under: two threads, and no way out to the network."""

import ipaddress
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def two_threads() -> None:
    """Keep sums in one order on every machine, and leave other processes room."""
    torch.set_num_threads(2)


@pytest.fixture(autouse=True, scope="session")
def offline() -> Iterator[None]:
    """Refuse every connection that would leave this machine, in the other fixtures too."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guarded_connect(self: socket.socket, address: Any) -> None:
        _refuse_remote(self, address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        _refuse_remote(self, address)
        return connect_ex(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        yield


def _refuse_remote(connection: socket.socket, address: Any) -> None:
    if connection.family == socket.AF_UNIX:
        return
    host = str(address[0])
    try:
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        is_local = False
    if not is_local:
        raise RuntimeError(f"tests stay offline: refused a connection to {host}")
