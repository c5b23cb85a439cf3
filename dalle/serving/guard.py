"""The guard in front of everything: who may ask, from which page, how much at once; and headers that keep pages safe.

A server on a person's own machine is reached by every web page that this person opens: a page may post to it, or point
a name of its own at 127.0.0.1 (DNS rebinding). So requests are answered only under known names, and never for the
script of another site. There is no CORS.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dalle.serving.errors import ServingError
from dalle.serving.files import SignedFiles
from dalle.serving.metrics import Metrics
from dalle.serving.settings import Settings, is_loopback

logger = logging.getLogger(__name__)

COOKIE = "dalle_key"
OPEN = ("/health",)  # answered without a key
SAFE_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'self';"
        " frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
MAX_HEAD = 32_768  # bytes of a request line and its headers
DISCARDED = (
    4  # times the allowed bytes are read and dropped, so that a client hears why before the line is cut
)


class Guard:
    """ASGI middleware; what it refuses never reaches the application."""

    def __init__(self, app: ASGIApp, settings: Settings, files: SignedFiles, metrics: Metrics) -> None:
        self._app, self._settings, self._files, self._metrics = app, settings, files, metrics
        key = settings.api_key
        self._key_hash = None if key is None else _hash(key)
        # Not the key itself: who reads the cookie can use this server, and no other with the same key.
        self._cookie = (
            None if key is None else hmac.digest(secrets.token_bytes(32), key.encode(), "sha256").hex()
        )
        self._n_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or lets the application answer."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        body = _Body(receive, self._settings)

        has_started = False

        async def answer(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
                headers["x-request-id"] = request_id
                headers.setdefault("cache-control", "no-store")
                self._metrics.responses.labels(str(message["status"])).inc()
            await send(message)

        self._n_open += 1
        try:
            _check_head(scope)
            entry = self._entry(scope)
            if entry is not None:
                await answer(entry)
                await answer({"type": "http.response.body", "body": b""})
                return
            self._check(scope)
            await body.check_length(Headers(scope=scope))
            await self._app(scope, body.receive, answer)
        except ServingError as error:
            await refuse(error, answer)
        except Exception:
            logger.exception("%s %s failed (%s)", scope["method"], ascii(scope["path"]), request_id)
            if has_started:
                raise  # the server cuts the line: the client must not take a part for the whole
            await refuse(_internal_error(), answer)
        finally:
            self._n_open -= 1

    def _check(self, scope: Scope) -> None:
        """Raise the ServingError of a request that is not answered."""
        headers, path = Headers(scope=scope), scope["path"]
        host = self._check_host(headers)
        is_given_out = scope["method"] in ("GET", "HEAD") and self._files.read(path) is not None
        if not is_given_out:
            self._check_origin(headers, host)
        if path in OPEN:
            return
        if self._n_open > self._settings.max_connections:
            self._metrics.rejected.labels("connections").inc()
            raise ServingError(
                503,
                f"the server is overloaded: {self._n_open - 1} requests are open: try again later",
                kind="server_error",
                code="server_overloaded",
                retry_after_s=1,
            )
        if self._key_hash is None or self._has_key(headers) or is_given_out:
            return
        raise ServingError(
            401,
            "this server needs its API key: send authorization: Bearer KEY, or open the page as /?key=KEY",
            code="invalid_api_key",
        )

    def _check_host(self, headers: Headers) -> str:
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            raise ServingError(400, "a request needs one Host header", code="host_missing")
        name = _host_name(hosts[0])
        settings = self._settings
        known = {settings.host.strip("[]").lower(), *(one.lower() for one in settings.allowed_hosts)}
        is_public = not is_loopback(settings.host)  # then it has a key, and no page of another site has that
        if name is None or not (
            is_loopback(name) or name in known or (is_public and not settings.allowed_hosts)
        ):
            raise ServingError(
                403,
                "this server does not answer under that name: start it with --allow-host NAME",
                code="host_not_allowed",
            )
        return hosts[0].lower()

    def _check_origin(self, headers: Headers, host: str) -> None:
        origins = headers.getlist("origin")
        is_ours = all(_origin_host(origin) == host for origin in origins)
        # What browsers say of requests that carry no Origin: pictures, scripts and the like in another site's page.
        site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode", "navigate")
        if not is_ours or (site in ("cross-site", "same-site") and mode != "navigate"):
            raise ServingError(403, "pages of other sites may not use this server", code="origin_not_allowed")

    def _has_key(self, headers: Headers) -> bool:
        assert self._key_hash is not None and self._cookie is not None
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(_hash(key.strip()), self._key_hash):
            return True
        cookie = _cookie(headers)
        return cookie is not None and hmac.compare_digest(_hash(cookie), _hash(self._cookie))

    def _entry(self, scope: Scope) -> Message | None:
        """Return the answer to `/?key=KEY`: a cookie, and the page without the key in its address."""
        if self._key_hash is None or scope["path"] != "/" or scope["method"] != "GET":
            return None
        keys = parse_qs(scope["query_string"].decode("latin-1")).get("key", [])
        if len(keys) != 1 or not hmac.compare_digest(_hash(keys[0]), self._key_hash):
            return None
        self._check_host(Headers(scope=scope))
        cookie = f"{COOKIE}={self._cookie}; Path=/; HttpOnly; SameSite=Strict"
        if scope["scheme"] == "https":
            cookie += "; Secure"
        headers = [(b"location", b"/"), (b"set-cookie", cookie.encode()), (b"content-length", b"0")]
        return {"type": "http.response.start", "status": 303, "headers": headers}


class _Body:
    """A request's body, counted while it arrives: a client can lie about its length, or give none."""

    def __init__(self, receive: Receive, settings: Settings) -> None:
        self._receive, self._most, self._seconds = receive, settings.max_body_bytes, settings.body_s
        self._n_bytes, self._is_complete = 0, False
        self._deadline: float | None = None  # by the loop's clock, from the first wait on

    async def check_length(self, headers: Headers) -> None:
        """Refuses what says of itself that it is too long."""
        given = headers.get("content-length", "0")
        if not given.isascii() or not given.isdigit():
            raise ServingError(400, "content-length is not a number", code="invalid_header")
        if len(given) > 18 or int(given) > self._most:
            await self._discard()
            raise self._too_large()

    async def receive(self) -> Message:
        """Return the next message; a ServingError once the body is longer than allowed."""
        message = await self._next()
        if message["type"] == "http.request":
            self._is_complete = not message.get("more_body")
            self._n_bytes += len(message.get("body", b""))
            if self._n_bytes > self._most:
                if message.get("more_body"):
                    await self._discard()
                raise self._too_large()
        return message

    async def _next(self) -> Message:
        """Wait for the next message: until the body is there only as long as a client may take to send it."""
        if self._is_complete:
            return await self._receive()
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + self._seconds
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._receive()
        except TimeoutError:
            text = f"the body did not arrive within {self._seconds:g} s"
            raise ServingError(408, text, code="timeout") from None

    async def _discard(self) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                while self._n_bytes <= DISCARDED * self._most:
                    message = await self._receive()
                    self._n_bytes += len(message.get("body", b""))
                    if message["type"] != "http.request" or not message.get("more_body"):
                        return
        except TimeoutError:
            pass

    def _too_large(self) -> ServingError:
        return ServingError(
            413, f"the body is larger than {self._most} bytes: send a smaller picture", code="body_too_large"
        )


def _internal_error() -> ServingError:
    return ServingError(
        500,
        "something went wrong here; the server's log says what",
        kind="server_error",
        code="internal_error",
    )


async def refuse(error: ServingError, send: Send) -> None:
    """Send a ServingError as the whole answer."""
    headers, body = error_answer(error)
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def error_answer(error: ServingError) -> tuple[dict[str, str], bytes]:
    """Headers and body of an error."""
    body = json.dumps(error.body(), ensure_ascii=True).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers, body


def _check_head(scope: Scope) -> None:
    """Refuse a head that is too long before anything in it is parsed."""
    n_bytes = len(scope["raw_path"]) + len(scope["query_string"])
    n_bytes += sum(len(name) + len(value) + 4 for name, value in scope["headers"])  # ": " and the line's end
    if n_bytes > MAX_HEAD:
        raise ServingError(
            431,
            f"the request's head is longer than {MAX_HEAD} bytes: send fewer headers",
            code="head_too_large",
        )


def _hash(text: str) -> bytes:
    """Return what is compared in place of a key: of one length, whatever was sent."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _cookie(headers: Headers) -> str | None:
    """Return the value of our cookie: split plainly, as ours needs no quotes and anybody may send one."""
    for pair in "; ".join(headers.getlist("cookie")).split(";"):
        name, _, value = pair.strip().partition("=")
        if name == COOKIE:
            return value
    return None


def _host_name(host: str) -> str | None:
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # ValueError where it is no number
    except ValueError:
        return None
    is_plain = parts.hostname and parts.netloc == host and not parts.username
    return parts.hostname if is_plain else None


def _origin_host(origin: str) -> str | None:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return None
    return parts.netloc.lower() if parts.scheme in ("http", "https") else None
