"""Who may ask the server: names, origins, keys, sizes; and what every answer carries."""

import http.client
import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from dalle.cli import app as cli
from dalle.serving.files import OutputFormat, SignedFiles
from dalle.serving.settings import Settings, is_loopback
from tests.live import Live, live_server

KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("data")
    with live_server(
        folder, max_body_bytes=20_000, max_pixels=1_000_000, allowed_hosts=("art.example",)
    ) as one:
        yield one


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_server(tmp_path_factory.mktemp("data"), api_key=KEY) as one:
        yield one


def status(live: Live, path: str = "/api/info", method: str = "GET", **headers: str) -> int:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return live.request(method, path, None, named)[0]


def raw(live: Live, data: bytes) -> bytes:
    """What the server answers to these very bytes."""
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        while part := connection.recv(65536):
            found += part
        return found


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "art.example.evil", "a@127.0.0.1", "", "[::"]
)
def test_names_that_another_site_could_point_here_are_refused(live: Live, host: str) -> None:
    code, _, body = live.request("GET", "/health", None, {"host": host})
    assert code == 403 and json.loads(body)["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1:9", "[::1]:8000", "LOCALHOST:1", "art.example", "Art.Example:80"]
)
def test_names_of_this_machine_and_those_allowed_are_answered(live: Live, host: str) -> None:
    assert status(live, "/health", host=host) == 200


def test_a_request_needs_exactly_one_host(live: Live) -> None:
    assert b" 400 " in raw(live, b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
    assert b" 400 " in raw(live, b"GET /health HTTP/1.1\r\n\r\n")


def test_pages_of_other_sites_get_nothing(live: Live) -> None:
    here = live.url
    assert status(live, origin=here) == 200
    for origin in (
        "http://evil.example",
        "null",
        "http://127.0.0.1:1",
        "file://",
        here + ".evil.example",
        "http://[",
    ):
        assert status(live, origin=origin) == 403, origin
        assert status(live, "/api/draw", "POST", origin=origin) == 403
    assert status(live, sec_fetch_site="cross-site", sec_fetch_mode="no-cors") == 403
    assert status(live, sec_fetch_site="same-site", sec_fetch_mode="cors") == 403
    assert status(live, sec_fetch_site="same-origin", sec_fetch_mode="cors") == 200
    assert status(live, "/health", sec_fetch_site="cross-site", sec_fetch_mode="navigate") == 200
    _, headers, _ = live.request("OPTIONS", "/api/draw", None, {"origin": here})
    assert not any(name.startswith("access-control") for name in headers)


def test_every_answer_carries_the_headers_that_keep_a_page_safe(live: Live) -> None:
    for method, path in (
        ("GET", "/api/info"),
        ("GET", "/nothing"),
        ("POST", "/api/info"),
        ("GET", "/health"),
    ):
        _, headers, _ = live.request(method, path)
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert headers["x-request-id"].startswith("req_") and "server" not in headers
    ids = {live.request("GET", "/health")[1]["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


def test_the_key_guards_every_route_but_health(guarded: Live) -> None:
    paths = {getattr(route, "path", "") for route in guarded.server.config.app.routes}  # type: ignore[union-attr]
    paths |= {*guarded.server.config.app.openapi()["paths"]}  # type: ignore[union-attr]
    assert {"/ready", "/metrics", "/v1/models", "/api/draw", "/openapi.json"} <= paths
    for path in sorted(paths - {"", "/health"}):
        for method in ("GET", "POST", "DELETE"):
            code, headers, body = guarded.request(method, path)
            assert code == 401, (method, path)
            assert headers["www-authenticate"] == "Bearer"
            assert json.loads(body)["error"]["code"] == "invalid_api_key"
    assert status(guarded, "/health") == 200
    assert status(guarded, "/health/../api/info") == 401
    assert status(guarded, "//health") == 401


@pytest.mark.parametrize(
    "given",
    [
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Basic {KEY}",
        KEY,
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        "Bearer \xff",
    ],
)
def test_a_wrong_key_is_refused(guarded: Live, given: str) -> None:
    assert status(guarded, authorization=given) == 401


def test_the_right_key_opens_everything(guarded: Live) -> None:
    for given in (f"Bearer {KEY}", f"bearer  {KEY} "):
        assert status(guarded, authorization=given) == 200
    assert json.loads(guarded.request("GET", "/api/info", None, {"authorization": f"Bearer {KEY}"})[2])[
        "is_guarded"
    ]


def test_the_page_is_opened_with_the_key_once_and_then_by_a_cookie(guarded: Live) -> None:
    code, headers, _ = guarded.request("GET", f"/?key={KEY}")
    assert (code, headers["location"]) == (303, "/")
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and KEY not in cookie
    assert status(guarded, cookie=cookie.partition(";")[0]) == 200
    assert status(guarded, cookie=f"dalle_key={KEY}") == 401, "the key itself is no cookie"
    assert status(guarded, cookie="dalle_key=; x=\x01") in (400, 401)
    for wrong in ("/?key=wrong", "/?key=", f"/?key={KEY}&key=x", f"/api/info?key={KEY}"):
        assert guarded.request("GET", wrong)[0] == 401
    assert guarded.request("GET", f"/?key={KEY}", None, {"host": "evil.example"})[0] == 403


def test_a_cookie_of_backslashes_costs_nothing(guarded: Live) -> None:
    """The library's parser needed eight seconds for this one, on the event loop, before any key was asked for."""
    start = time.monotonic()
    assert status(guarded, cookie='dalle_key="' + "\\" * 15_000 + '"') == 401
    assert time.monotonic() - start < 1


def test_a_cookie_is_found_among_others(guarded: Live) -> None:
    cookie = guarded.request("GET", f"/?key={KEY}")[1]["set-cookie"].partition(";")[0]
    assert status(guarded, cookie=f'theme=dark; {cookie} ; b="c"') == 200
    assert status(guarded, cookie=f"x{cookie}") == 401


def test_a_head_above_32_kilobytes_is_refused(guarded: Live) -> None:
    for size, code in ((30_000, 401), (33_000, 431), (100_000, 431)):
        head = b"GET /api/info HTTP/1.1\r\nHost: localhost\r\nX: %s\r\n\r\n" % (b"y" * size)
        assert b" %d " % code in raw(guarded, head)[:20], size


def test_an_address_that_was_given_out_needs_no_key_and_ends_with_its_hour(guarded: Live) -> None:
    key = {"authorization": f"Bearer {KEY}"}
    body = {"prompt": "a dog", "response_format": "url"}
    answer = json.loads(guarded.request("POST", "/v1/images/generations", body, key)[2])
    path = answer["data"][0]["url"].removeprefix(guarded.url)
    assert guarded.request("GET", path)[0] == 200
    assert guarded.request("GET", path.replace(".png", ".jpeg"))[0] == 401
    assert guarded.request("GET", "/v1/images/files/x.png")[0] == 401


def test_signed_addresses_cannot_be_made_up_or_prolonged() -> None:
    now = [1000.0]
    files = SignedFiles(3600, lambda: now[0])
    path = files.path("AbC-_9", OutputFormat(64, "png", 100))
    assert files.read(path) == ("AbC-_9", OutputFormat(64, "png", 100))
    assert "~4600~" in path
    for wrong in (
        path.replace("~4600~", "~9999~"),
        path.replace("AbC", "AbD"),
        path.replace("~64~", "~99~"),
        path.replace("png", "webp"),
        path[:-5] + ("B" if path[-5] == "A" else "A") + ".png",
        path + "\n",
        path.replace("files/", "files/../"),
        path.replace("4600", "٤٦٠٠"),
    ):
        assert files.read(wrong) is None, wrong
    assert SignedFiles(3600, lambda: now[0]).read(path) is None, "another server's"
    now[0] = 4601.0
    assert files.read(path) is None


def test_a_body_too_large_is_refused_by_its_length_and_while_it_comes(live: Live) -> None:
    code, headers, body = live.request("POST", "/api/draw", b"x" * 20_001)
    assert code == 413 and json.loads(body)["error"]["code"] == "body_too_large" and "x-request-id" in headers
    head = b"POST /api/draw HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunk = b"2710\r\n" + b"x" * 10_000 + b"\r\n"
    assert b" 413 " in raw(live, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 3 + b"0\r\n\r\n")
    assert b" 400 " in raw(live, head + b"Content-Length: 999999999999999999999999\r\n\r\n")
    form = head.replace(b"application/json", b"multipart/form-data; boundary=b").replace(
        b"/api/draw", b"/v1/images/edits"
    )
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + b"y" * 30_000
    lied = form + b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n" % len(part) + part + b"\r\n0\r\n\r\n"
    assert b" 413 " in raw(live, lied)
    assert status(live) == 200


def test_a_body_that_ends_early_or_never_harms_nobody(live: Live) -> None:
    head = b"POST /api/draw HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    raw(live, head)
    raw(
        live,
        b"POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        b"Content-Length: 100\r\n\r\n--b\r\n",
    )
    assert status(live) == 200
    assert live.state.queue.n_slots == 0


@pytest.mark.parametrize(
    "line",
    [b"POST /api/draw", b"POST /api/restore", b"PATCH /api/history/x", b"POST /v1/images/generations"],
)
def test_a_client_that_sends_nothing_is_given_up_after_a_while(tmp_path: Any, line: bytes) -> None:
    """Restoring and favourites waited for ever."""
    with live_server(tmp_path, body_s=0.05) as slow:
        host, port = slow.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(
                line
                + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
            )
            assert b" 408 " in connection.recv(65536)


def test_answers_on_a_kept_alive_connection_do_not_wait_for_acknowledgements(live: Live) -> None:
    """Nagle's algorithm held the second part of each answer back for 40 ms."""
    connection = http.client.HTTPConnection(live.url.removeprefix("http://"), timeout=30)
    seconds = []
    for _ in range(20):
        start = time.monotonic()
        connection.request("GET", "/health")
        connection.getresponse().read()
        seconds.append(time.monotonic() - start)
    connection.close()
    assert sorted(seconds)[10] < 0.03, seconds


def test_json_that_costs_too_much_is_refused_at_once(tmp_path: Any) -> None:
    """The first took nine seconds of the event loop, the second twenty and 2 GB."""
    twice = b"{" + b",".join(b'"k%d":1' % i for i in range(16_000)) + b',"k15999":2}'
    many = b"{" + b",".join(b'"k%d":1' % i for i in range(600_000)) + b"}"
    long = json.dumps({"prompt": "a" * 70_000}).encode()
    nested = json.dumps({"image": "A" * 70_000, "mask": {f"k{i}": 1 for i in range(65)}}).encode()
    with live_server(tmp_path) as one:
        for path in ("/api/draw", "/v1/images/generations"):
            for body, code in ((twice, 413), (many, 413), (long, 413)):
                start = time.monotonic()
                assert one.request("POST", path, body)[0] == code
                assert time.monotonic() - start < 2
        code, _, text = one.request("POST", "/api/draw", nested)
        assert code == 400 and b"at most 64 are read" in text
        code, _, text = one.request("POST", "/api/draw", {"prompt": "a dog", "image": "A" * 70_000})
        assert code == 400 and json.loads(text)["error"]["param"] == "image", "a picture may be that long"


def test_a_key_given_twice_is_refused_in_a_change_too(live: Live) -> None:
    code, _, text = live.request("PATCH", "/api/history/x", b'{"favourite": true, "favourite": false}')
    assert code == 400 and b"is given twice" in text
    assert live.request("PATCH", "/api/history/x", {"favourite": True})[0] == 404


def bomb(side: int) -> bytes:
    """A PNG that says that it is huge, with almost nothing in it."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, format="PNG")
    png = bytearray(buffer.getvalue())
    png[16:24] = struct.pack(">II", side, side)
    png[29:33] = struct.pack(">I", zlib.crc32(bytes(png[12:29])))
    return bytes(png)


@pytest.mark.parametrize("side", [1001, 65_000, 2**31 - 1])
def test_pictures_that_are_bombs_are_refused_by_their_header(live: Live, side: int) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na dog\r\n'
    form += b'--b\r\nContent-Disposition: form-data; name="keep_rows"\r\n\r\n1\r\n'
    form += b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + bomb(side)
    form += b"\r\n--b--\r\n"
    kind = {"content-type": "multipart/form-data; boundary=b"}
    code, _, body = live.request("POST", "/v1/images/edits", form, kind)
    assert code == 400 and json.loads(body)["error"]["param"] == "image", body


def test_too_many_requests_at_once_are_told_to_come_again_but_health_is_answered(tmp_path: Any) -> None:
    with live_server(tmp_path, max_connections=1) as busy:
        host, port = busy.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(
                b"POST /api/draw HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n"
            )
            assert b"100 Continue" in connection.recv(65536)  # the request is open, and waits for its body
            code, headers, _ = busy.request("GET", "/api/info")
            assert code == 503 and headers["retry-after"] == "1"
            assert status(busy, "/health") == 200
        rejected = busy.state.queue.metrics.rejected.labels("connections")
        assert rejected._value.get() == 1


def test_a_mistake_of_ours_is_a_500_with_an_id_and_nothing_of_its_inside(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(_: int) -> None:
        raise RuntimeError("a secret of the inside")

    with monkeypatch.context() as patch:
        patch.setattr(live.state.queue, "reserve", wrong)
        code, headers, body = live.request("POST", "/api/draw", {"prompt": "a dog"})
    assert code == 500 and headers["x-request-id"] and headers["x-content-type-options"] == "nosniff"
    assert json.loads(body)["error"]["code"] == "internal_error" and b"secret" not in body
    assert live.events({"prompt": "a dog"})[-1][0] == "settled"


def test_websockets_are_closed(live: Live) -> None:
    answer = raw(
        live,
        b"GET /api/info HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
    )
    assert b" 101 " not in answer


def test_an_address_that_others_reach_needs_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.2", "my-machine", "0"):
        assert not is_loopback(host)
        with pytest.raises(ValueError, match="set an API key"):
            Settings(host=host)
        assert Settings(host=host, api_key="12345678").host == host
    for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
        assert is_loopback(host) and Settings(host=host).host == host
    with pytest.raises(ValueError, match="no request for so many could ever be taken"):
        Settings(max_slots=100)
    with pytest.raises(ValueError, match="at least 8"):
        Settings(api_key="short")


def test_the_command_line_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ValueError, match=r"^serve: host 0\.0\.0\.0 is open to other machines: set an API key"
    ) as caught:
        cli(["serve", "--host", "0.0.0.0"], standalone_mode=False)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="max_queues is not a setting; did you mean max_queue"):
        cli(["serve", "--set", "max_queues=3"], standalone_mode=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ValueError, match=r"cannot listen on 127\.0\.0\.1, port \d+ \(.*in use\): choose"):
            cli(["serve", "--port", str(taken.getsockname()[1])], standalone_mode=False)


def test_ready_and_metrics_tell_what_happens(live: Live) -> None:
    assert status(live, "/ready") == 200
    live.events({"prompt": "a dog", "num_images": 2})
    _, headers, text = live.request("GET", "/metrics")
    assert headers["content-type"].startswith("text/plain")
    found = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))
    assert float(found["dalle_pictures_total"]) >= 2 and float(found["dalle_image_tokens_total"]) >= 32
    assert found["dalle_queue_jobs"] == found["dalle_running_jobs"] == found["dalle_reserved_slots"] == "0.0"
    assert float(found['dalle_jobs_total{outcome="settled"}']) >= 1
    assert float(found["dalle_job_seconds_count"]) >= 1 and float(found["dalle_first_row_seconds_count"]) >= 1
    live.state.queue.drain()
    code, headers, _ = live.request("GET", "/ready")
    assert code == 503 and headers["retry-after"]
    live.state.queue.drain(False)
