"""Data at addresses: read where they lie, with the same pairs and contents as on this machine."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from dalle.data.contents import check_contents
from dalle.data.filters import FilterSettings, filter_pairs
from dalle.data.pairs import PairSet, read_pairs
from tests.layouts import LAYOUTS, N_PAIRS, good_samples


class RangeServer(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, whole or a range of bytes, as object stores and the Hub serve them."""

    asked: list[str]  # "path range" of each request

    def log_message(self, *_: object) -> None:
        pass

    def send_head(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data, wanted = path.read_bytes(), self.headers.get("Range")
        self.asked.append(f"{path.name} {wanted}")
        first, last = 0, len(data) - 1
        if wanted:
            first, end = wanted.removeprefix("bytes=").split("-")
            first, last = int(first), min(int(end or last), last)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hash(data)}"')
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[first : last + 1])

    def do_GET(self) -> None:
        self.send_head()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server of `tmp_path`/data on loopback."""
    pytest.importorskip("aiohttp")
    (tmp_path / "data").mkdir()
    RangeServer.asked = []
    handler = functools.partial(RangeServer, directory=str(tmp_path / "data"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()
        thread.join()


@pytest.fixture
def memory() -> Iterator[str]:
    """An empty place in fsspec's file system in memory."""
    yield "memory://bucket/set"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def upload(folder: Path, address: str) -> None:
    system = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            system.pipe_file(f"{address}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def contents(pairs: PairSet, record: Path) -> list[tuple[object, ...]]:
    found = check_contents(pairs, record)
    assert found.contents is not None and found.bad == []
    return [(pair.key, pair.captions, pair.split, found.contents[pair.key]) for pair in found]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_at_an_address_is_the_same_data_set(layout: str, memory: str, tmp_path: Path) -> None:
    LAYOUTS[layout].write(tmp_path / "data", good_samples())
    upload(tmp_path / "data", memory)
    local, remote = read_pairs(tmp_path / "data"), read_pairs(memory)
    assert contents(remote, tmp_path / "remote.jsonl") == contents(local, tmp_path / "local.jsonl")
    assert len(remote) == N_PAIRS and remote[5].open().size == (8, 8)


@pytest.mark.parametrize("layout", ["tar", "parquet"])
def test_a_shard_is_read_over_http_a_range_at_a_time(layout: str, server: str, tmp_path: Path) -> None:
    LAYOUTS[layout].write(tmp_path / "data", good_samples())
    name = sorted(path.name for path in (tmp_path / "data").iterdir())[0]
    local, remote = read_pairs(tmp_path / "data" / name), read_pairs(f"{server}/{name}")
    assert contents(remote, tmp_path / "remote.jsonl") == contents(local, tmp_path / "local.jsonl")
    assert all(" bytes=" in asked for asked in RangeServer.asked if "None" not in asked)
    n_asked = len(RangeServer.asked)
    assert remote[3].open().size == (8, 8)
    if layout == "tar":
        (asked,) = [asked for asked in RangeServer.asked[n_asked:] if "bytes" in asked]
        first, last = asked.split("bytes=")[1].split("-")
        assert int(last) - int(first) + 1 == remote[3].n_bytes, "one picture, not the shard"


def test_what_is_not_there_is_one_clear_error(server: str) -> None:
    with pytest.raises((ValueError, OSError), match=r"gone\.tar does not exist or cannot be read"):
        read_pairs(f"{server}/gone.tar")
    with pytest.raises((ValueError, OSError), match="memory://nowhere"):
        read_pairs("memory://nowhere/at/all")


def test_a_selection_of_data_at_an_address_is_refused(memory: str, tmp_path: Path) -> None:
    LAYOUTS["folder"].write(tmp_path / "data", good_samples())
    upload(tmp_path / "data", memory)
    with pytest.raises(ValueError, match="is at an address; a selection names pictures on this machine"):
        filter_pairs(read_pairs(memory), tmp_path / "clean", FilterSettings())
