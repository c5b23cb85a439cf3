"""Debian's Chromium on the page of a real server: every fault it reports fails the test that caused it."""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Request, Response, expect, sync_playwright

from dalle.generation.rerank import Ranker
from tests.live import CAPTIONS, GatedPipeline
from tests.tiny import tiny_clip, tiny_dvae, tiny_tokenizer, tiny_transformer

OUT = Path(__file__).resolve().parents[1] / "out" / "page"
# A container's root, no GPU, and nothing that calls home.
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
TIMEOUT_MS = 20_000  # for anything to happen, on a busy machine
N_TEXT = 160  # text tokens: the explorer's captions are longer than those of the other tests


class Turnstile(threading.Event):
    """A gate for one worker that can also let a single grid row through."""

    def __init__(self) -> None:
        super().__init__()
        self._permits = threading.Semaphore(0)

    def step(self) -> None:
        self._permits.release()

    def set(self) -> None:
        super().set()
        self._permits.release()

    def clear(self) -> None:
        super().clear()
        while self._permits.acquire(blocking=False):
            pass

    def wait(self, timeout: float | None = None) -> bool:
        return self._permits.acquire(timeout=timeout)


def page_pipe() -> GatedPipeline:
    """A tiny model with a CLIP that reads the explorer's captions; its gate is a `Turnstile`."""
    tokenizer = tiny_tokenizer(CAPTIONS, N_TEXT)
    ranker = Ranker(tiny_clip(tokenizer), tokenizer)
    transformer = tiny_transformer(tokenizer.n_vocab, n_text_tokens=N_TEXT)
    pipe = GatedPipeline(tokenizer, tiny_dvae(), transformer, ranker=ranker)
    pipe.gate = Turnstile()
    pipe.gate.set()
    return pipe


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The browser; without one the tests are skipped, but never under `.ci/run`."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        if os.environ.get("DALLE_CI"):
            pytest.fail("chromium is missing: .ci/run installs it")
        pytest.skip("needs Debian's chromium")
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield browser
        browser.close()


@dataclass
class Visit:
    """One person's visit: their page, and everything that went wrong on it."""

    page: Page
    url: str
    faults: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def go(self, view: str) -> None:
        self.page.goto(f"{self.url}/#/{view}")
        self.page.locator("main > section").wait_for()

    def shoot(self, name: str) -> None:
        OUT.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=OUT / f"{name}.png", full_page=True)

    def n_draws(self) -> int:
        """How many drawings the page asked the server for."""
        return sum(request.url.endswith("/api/draw") for request in self.requests)

    def forgive(self, *parts: str) -> None:
        """Take the faults that a test provoked off the list; each part must have occurred."""
        for part in parts:
            kept = [fault for fault in self.faults if part not in fault]
            assert len(kept) < len(self.faults), f"no fault {part!r} in {self.faults}"
            self.faults[:] = kept


@contextlib.contextmanager
def visit(browser: Browser, url: str, **settings: Any) -> Iterator[Visit]:
    """Open the page in a browser of its own; `settings` are those of a Playwright context."""
    chosen: dict[str, Any] = {
        "viewport": {"width": 1280, "height": 860},
        "reduced_motion": "reduce",
    } | settings
    context = browser.new_context(**chosen)
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    found = Visit(page, url)

    def answered(response: Response) -> None:
        if response.status >= 400:
            found.faults.append(f"HTTP {response.status} {response.url}")

    # What breaks the content policy is a console error too.
    page.on(
        "console",
        lambda it: found.faults.append(f"console: {it.text}") if it.type in ("error", "warning") else None,
    )
    page.on("pageerror", lambda error: found.faults.append(f"page: {error}"))
    page.on("response", answered)
    page.on("request", lambda request: found.requests.append(request))
    try:
        yield found
        assert not found.faults, found.faults
        strangers = [it.url for it in found.requests if not it.url.startswith((url, "blob:", "data:"))]
        assert not strangers, strangers
    finally:
        context.close()
