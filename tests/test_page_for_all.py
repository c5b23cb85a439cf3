"""The page for everybody: by keyboard alone, on a phone, in the dark, for screen readers, and against hostile text."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Browser, Page, expect

from dalle.images import read_recipe
from tests.browser import chromium, page_pipe, visit
from tests.live import Live, live_server
from tests.test_page import write_run

pytestmark = pytest.mark.long

VIEWS = ("explorer", "completion", "history", "microscope", "training")
HOSTILE = """<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'"><b>bold</b>"""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    runs = tmp_path_factory.mktemp("runs")
    write_run(runs / "<i>tilted<i>" / "run", 100)
    with live_server(tmp_path_factory.mktemp("data"), page_pipe(), max_candidates=16, runs=runs) as server:
        server.events({"prompt": "a red apple", "num_images": 4, "seed": 1})
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


def wait_for_content(page: Page, view: str) -> None:
    """What a view shows once its answers are there."""
    content = {
        "explorer": ".sentence .word",
        "completion": ".recent .thumb",
        "history": ".gallery .tile",
        "microscope": ".slide .cell",
        "training": ".chart .curve",
    }
    page.locator(f"{content[view]} >> visible=true").first.wait_for()
    page.wait_for_load_state("networkidle")


def test_everything_works_by_keyboard_alone(browser: Browser, live: Live) -> None:
    with visit(browser, live.url) as person:
        page, keys = person.page, person.page.keyboard
        person.go("explorer")
        word = page.locator(".word").first
        expect(word).to_be_visible()
        keys.press("Tab")
        expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
        keys.press("Enter")
        for _ in range(30):
            keys.press("Tab")
            outline = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
            assert outline == "solid", page.evaluate("() => document.activeElement.outerHTML.slice(0, 200)")
            if word.evaluate("(word) => word === document.activeElement"):
                break
        expect(word).to_be_focused()
        was = word.inner_text()
        keys.press("ArrowDown")
        keys.press("ArrowDown")
        keys.press("Enter")
        expect(word).to_be_focused()
        assert word.inner_text() != was
        keys.press("Enter")
        keys.press("Escape")
        expect(word).to_be_focused()
        while not page.evaluate("() => document.activeElement.textContent === 'Draw'"):
            keys.press("Tab")
        keys.press("Enter")
        tiles = page.locator(".board.settled button.tile")
        expect(tiles).to_have_count(4)
        while not page.evaluate("() => document.activeElement.classList.contains('tile')"):
            keys.press("Tab")
        keys.press("ArrowRight")
        expect(tiles.nth(1)).to_be_focused()
        keys.press("Tab")  # one tab stop for all pictures
        assert not page.evaluate("() => document.activeElement.classList.contains('tile')")
        keys.press("Shift+Tab")
        keys.press("Enter")
        dialog = page.get_by_role("dialog")
        expect(dialog).to_be_visible()
        for _ in range(14):  # the focus never leaves the dialog for the page behind it
            keys.press("Tab")
            assert page.evaluate(
                "() => document.activeElement === document.body || !!document.activeElement.closest('dialog')"
            )
        keys.press("Escape")
        expect(dialog).to_be_hidden()
        expect(tiles.nth(1)).to_be_focused()
        for number, view in enumerate(VIEWS, 1):
            keys.press(str(number))
            expect(page.locator(f"section.{view}")).to_be_visible()
            assert page.title().lower().startswith(view)
        keys.press("?")
        expect(page.get_by_role("dialog", name="Shortcuts")).to_be_visible()
        keys.press("Escape")
        keys.press("/")
        expect(page.get_by_label("Search captions")).to_be_focused()


def test_nothing_scrolls_sideways_on_a_phone(browser: Browser, live: Live) -> None:
    phone: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
    with visit(browser, live.url, device_scale_factor=2, **phone) as person:
        page = person.page
        for view in VIEWS:
            person.go(view)
            wait_for_content(page, view)
            assert page.evaluate("() => document.documentElement.scrollWidth") == 360, view
            person.shoot(f"phone_{view}")
        person.go("explorer")
        page.locator(".word").first.tap()
        page.get_by_role("option").nth(1).tap()
        page.get_by_role("button", name="Draw", exact=True).tap()
        tile = page.locator(".board.settled button.tile").first
        tile.tap()
        expect(page.get_by_role("dialog")).to_be_visible()
        person.shoot("phone_picture")
        page.get_by_role("button", name="Close").tap()
        person.go("completion")
        page.locator(".thumb").first.tap()
        page.get_by_role("button", name="Paint a mask").tap()
        page.locator(".cell-editor .cell").nth(3).tap()
        expect(page.get_by_text("1 of 16 cells are drawn anew")).to_be_visible()


def test_the_theme_follows_the_system_until_one_is_chosen(browser: Browser, live: Live) -> None:
    def brightness(page: Page) -> int:
        colour = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        return sum(int(each) for each in re.findall(r"\d+", colour)[:3])

    with visit(browser, live.url, color_scheme="dark") as person:
        page = person.page
        for view in VIEWS:
            person.go(view)
            wait_for_content(page, view)
            assert brightness(page) < 200
            person.shoot(f"dark_{view}")
        page.keyboard.press("t")
        assert brightness(page) > 600
        page.reload()
        assert brightness(page) > 600
        page.get_by_role("button", name="Use the dark theme").click()
        assert brightness(page) < 200


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(browser: Browser, live: Live, scheme: str) -> None:
    with visit(browser, live.url, color_scheme=scheme) as person:
        page = person.page

        def check(what: str) -> None:
            found = [
                it for it in Axe().run(page).response["violations"] if it["impact"] in ("serious", "critical")
            ]
            assert found == [], f"{what}: " + "; ".join(
                f"{it['id']}: {it['nodes'][0]['html'][:200]}" for it in found
            )

        for view in VIEWS:
            person.go(view)
            wait_for_content(page, view)
            check(view)
        person.go("explorer")
        page.locator(".settings summary").click()
        page.get_by_role("button", name="Draw", exact=True).click()
        tile = page.locator(".board.settled button.tile").first
        tile.wait_for()
        check("pictures and settings")
        page.locator(".word").first.click()
        check("the list of a word")
        page.keyboard.press("Escape")
        tile.click()
        check("the dialog of a picture")
        page.keyboard.press("Escape")
        page.keyboard.press("?")
        check("the shortcuts")
        page.keyboard.press("Escape")
        person.go("completion")
        page.locator(".thumb").first.click()
        page.get_by_role("button", name="Paint a mask").click()
        page.locator(".cell-editor .cell").nth(3).click()
        check("a mask")


def test_hostile_text_stays_text(browser: Browser, live: Live) -> None:
    png = live.state.history.png(live.state.history.search(limit=1).pictures[0].id)
    assert png is not None
    recipe = read_recipe(png) | {"caption": HOSTILE}
    info = PngInfo()
    info.add_text("dalle", json.dumps(recipe))
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).save(buffer, format="PNG", pnginfo=info)
    with visit(browser, live.url) as person:
        page = person.page
        person.go("history")
        page.locator("input[type=file]").set_input_files(
            {"name": f"{HOSTILE[:20]}.png", "mimeType": "image/png", "buffer": buffer.getvalue()}
        )
        field = page.get_by_label("Caption in your own words")
        expect(field).to_have_value(HOSTILE)
        page.get_by_role("button", name="Draw", exact=True).click()
        page.locator(".board.settled button.tile").first.click()
        expect(page.get_by_role("dialog").get_by_role("heading")).to_have_text(HOSTILE)
        page.get_by_role("dialog").get_by_role("button", name="Complete it").click()
        expect(page.get_by_label("Caption of the whole picture")).to_have_value(HOSTILE)
        for view in ("history", "microscope", "training"):
            person.go(view)
            wait_for_content(page, view)
        expect(page.get_by_role("button", name="<i>tilted<i>")).to_be_visible()
        person.go("history")
        expect(page.locator(".tile-caption").first).to_have_text(HOSTILE)
        assert page.evaluate("() => window.hacked") is None
        assert page.locator("main b, main i, main script, img[src=x]").count() == 0


def test_the_page_asks_for_the_key_in_words(browser: Browser, tmp_path: Path) -> None:
    with live_server(tmp_path, page_pipe(), api_key="correct horse battery".replace(" ", "-")) as guarded:
        with visit(browser, guarded.url) as person:
            person.page.goto(f"{guarded.url}/?key=correct-horse-battery")
            expect(person.page.locator("#model")).to_contain_text("32 px")
            assert "key=" not in person.page.url
            person.page.context.clear_cookies()
            person.page.evaluate("() => { location.hash = '#/history'; }")
            expect(person.page.locator(".toast.error")).to_contain_text("key")
            person.forgive("HTTP 401", "status of 401")
