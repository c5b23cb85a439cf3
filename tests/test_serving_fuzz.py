"""A thousand requests that nobody should send, and more: none is a 5xx, every refusal is told, the worker lives."""

import base64
import copy
import io
import json
import random
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from PIL import Image
from schemathesis import GenerationMode

from tests.live import Live, live_server

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("data")
    limits = {"max_candidates": 8, "max_images": 4, "max_body_bytes": 200_000, "max_pixels": 100_000}
    with live_server(folder, **limits) as server:
        yield server
        assert server.state.queue.wait_idle(60)
        assert (server.state.queue.n_jobs, server.state.queue.n_slots) == (0, 0)
        assert server.events({"prompt": "a dog"})[-1][0] == "settled", "the worker lives"


def check(status: int, headers: dict[str, str], body: bytes, sent: object) -> None:
    """What holds for every answer to anything."""
    assert status < 500 or (status == 503 and "retry-after" in headers), (status, sent)
    assert headers["x-request-id"] and headers["x-content-type-options"] == "nosniff"
    if status >= 400:
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}, sent
        assert error["message"] and len(body) < 2000, "what was sent is not sent back"


def test_no_request_that_the_openapi_schema_suggests_or_forbids_is_a_5xx(live: Live) -> None:
    app: Any = live.server.config.app
    counts = Counter[int]()

    def send(case: Any) -> None:
        answer = case.call(base_url=live.url, timeout=60)
        headers = {name.lower(): value[0] for name, value in answer.headers.items()}
        check(answer.status_code, headers, answer.content, case)
        counts[answer.status_code] += 1

    quiet = settings(
        max_examples=60,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],
        derandomize=True,
    )
    for found in schemathesis.openapi.from_dict(app.openapi()).get_all_operations():
        operation = found.ok()
        for mode in GenerationMode:
            try:
                quiet(given(case=operation.as_strategy(generation_mode=mode))(send))()
            except Unsatisfiable:  # a route without parameters cannot be called wrongly
                assert mode == GenerationMode.NEGATIVE
    assert sum(counts.values()) >= 1000, counts
    assert counts[200] > 20 and counts[400] > 200, counts


def png(side: int = 32, mode: str = "RGBA") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, format="PNG")
    return buffer.getvalue()


NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, int("9" * 400), 0.5, 1.0, 1e308, -0.0, "", " ",
    "\x00", "\ud800", "\udfff\ud800", "\u202e", "é" * 5000, "a" * 40_000, "../../etc/passwd", "<script>alert(1)</script>",
    "'; DROP TABLE pictures;--", "%s%n{0}{{", "NaN", "1e999", [], {}, [[[]]], {"a": {"b": []}}, ["a dog"],
    "data:image/png;base64,", "data:text/html;base64,AAAA", "\r\nx-evil: 1", "https://127.0.0.1:1/x.png",
    base64.b64encode(png()).decode(), base64.b64encode(png()[:60]).decode(), base64.b64encode(png(400)).decode(),
]  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "/api/draw": {
        "prompt": "a dog",
        "num_images": 1,
        "num_candidates": 2,
        "seed": 1,
        "temperature": 1.0,
        "top_k": 3,
        "top_p": 0.5,
        "guidance": 2.0,
        "image": base64.b64encode(png()).decode(),
        "keep_rows": 1,
        "mask": None,
        "truncate": True,
    },
    "/v1/images/generations": {
        "prompt": "a dog",
        "model": "dalle",
        "n": 1,
        "size": "auto",
        "quality": "low",
        "response_format": "b64_json",
        "output_format": "png",
        "output_compression": 100,
        "background": "auto",
        "stream": False,
        "partial_images": 0,
        "style": "vivid",
        "user": "me",
        "seed": 3,
        "temperature": 1.0,
        "top_k": 3,
        "top_p": 0.5,
        "guidance_scale": 2.0,
        "num_candidates": 2,
    },
}


@pytest.mark.parametrize("path", [*BODIES])
def test_no_field_holding_something_nasty_is_a_5xx(live: Live, path: str) -> None:
    for name in [*BODIES[path], "unknown", "\ud800", "__proto__"]:
        for value in NASTY:
            body = copy.deepcopy(BODIES[path]) | {name: value}
            check(*live.request("POST", path, body), (name, value))


@pytest.mark.parametrize("path", [*BODIES])
def test_no_damaged_body_is_a_5xx(live: Live, path: str) -> None:
    good, rng = json.dumps(BODIES[path]).encode(), random.Random(5)
    for _ in range(250):
        body = bytearray(good)
        match rng.randrange(4):
            case 0:
                del body[rng.randrange(len(body)) :]
            case 1:
                for _ in range(rng.randint(1, 8)):
                    body[rng.randrange(len(body))] = rng.randrange(256)
            case 2:
                start = rng.randrange(len(body))
                body[start:start] = body[start : start + rng.randint(1, 50)]
            case 3:
                start = rng.randrange(len(body))
                body[start : start + rng.randint(1, 10)] = rng.choice(
                    [b"NaN", b"Infinity", b"\xff\xfe", b"\\ud800", b'"', b"[" * 3000, b"1e99999", b"\x00"]
                )
        check(*live.request("POST", path, bytes(body)), bytes(body)[:300])


def pictures(rng: random.Random) -> Iterator[bytes]:
    """Uploads cut short, flipped, of other kinds, and bombs."""
    formats = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "ICO"):
        buffer = io.BytesIO()
        Image.radial_gradient("L").resize((48, 48)).convert("RGB").save(buffer, format=kind)
        formats.append(buffer.getvalue())
    for data in formats:
        yield data
        for _ in range(12):
            yield data[: rng.randrange(len(data))]
            flipped = bytearray(data)
            for _ in range(rng.randint(1, 20)):
                flipped[rng.randrange(len(flipped))] = rng.randrange(256)
            yield bytes(flipped)
    for side in (1_000, 65_535, 2**31 - 1):
        bomb = bytearray(png(1, "L"))
        bomb[16:24] = struct.pack(">II", side, side)
        yield bytes(bomb)
    yield b""
    yield b"\x89PNG\r\n\x1a\n"
    yield b"GIF89a" + b"\xff\xff\xff\xff" + b"\x00" * 20
    yield b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"


def form(boundary: bytes, parts: list[tuple[bytes, bytes]]) -> bytes:
    return (
        b"".join(b"--%s\r\n%s\r\n\r\n%s\r\n" % (boundary, head, data) for head, data in parts)
        + b"--%s--\r\n" % boundary
    )


# Of a form that is cut off, Starlette leaves the last file for the garbage collector to close.
@pytest.mark.filterwarnings("ignore:.*SpooledTemporaryFile.*:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:Unclosed file <tempfile.Spooled:ResourceWarning")
def test_no_upload_is_a_5xx(live: Live) -> None:
    rng = random.Random(6)
    kind = {"content-type": "multipart/form-data; boundary=b"}
    text = (b'Content-Disposition: form-data; name="prompt"', b"a dog")
    rows = (b'Content-Disposition: form-data; name="keep_rows"', b"1")
    image = b'Content-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png'
    mask = b'Content-Disposition: form-data; name="mask"; filename="../../m"'
    for data in pictures(rng):
        check(
            *live.request("POST", "/v1/images/edits", form(b"b", [text, rows, (image, data)]), kind),
            data[:80],
        )
        body = form(b"b", [text, (image, png()), (mask, data)])
        check(*live.request("POST", "/v1/images/edits", body, kind), data[:80])
        check(*live.request("POST", "/api/restore", data, {"content-type": "image/png"}), data[:80])
    good = form(b"b", [text, rows, (image, png())])
    for _ in range(150):
        body_bytes = bytearray(good)
        for _ in range(rng.randint(1, 10)):
            body_bytes[rng.randrange(len(body_bytes))] = rng.choice(b'\r\n-";=b\x00\xff')
        check(*live.request("POST", "/v1/images/edits", bytes(body_bytes), kind), bytes(body_bytes)[:300])
    many = form(b"b", [text, *[(b'Content-Disposition: form-data; name="f%d"' % i, b"") for i in range(100)]])
    for content_type in (
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "x" * 300,
    ):
        check(*live.request("POST", "/v1/images/edits", many, {"content-type": content_type}), content_type)
    check(*live.request("POST", "/v1/images/edits", many, kind), "many fields")


PATHS = [
    "/%2e%2e/%2e%2e/etc/passwd", "/static/../settings.py", "/static/%2e%2e%2fapp.py", "/static/..%5capp.py",
    "/api/pictures/..%2f..%2fhistory.sqlite", "/api/pictures/%00.png", "/api/pictures/" + "a" * 3000 + ".png",
    "/api/pictures/%ff.png", "/v1/models/..", "/v1/models/%F0%9F%92%A9", "/v1/images/files/..%2fx.png", "/api/runs/..%2f..",
    "/api/runs/%2e%2e/sheets/0.png", "/api/runs/x/sheets/-1.png", "/api/history?limit=99999999999999999999",
    "/api/history?before=x",
    "/api/history?query=%FF%FE", "/api/history?query=%00", "/api/codebook/-1.png", "/api/codebook/99999999999999999999999.png",
    "/api/masks/-1/0", "/api/masks/0/999999", "/api/masks/1e3/0", "/?key=" + "k" * 5000, "//", "/.", "/api/jobs/%00",
]  # fmt: skip


def test_no_path_is_a_5xx(live: Live) -> None:
    for path in PATHS:
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE"):
            status, headers, body = live.request(method, path)
            if method == "HEAD":
                assert status < 500
            else:
                check(status, headers, body, (method, path))
            assert b"root:" not in body and b"from __future__" not in body and b"SQLite" not in body
