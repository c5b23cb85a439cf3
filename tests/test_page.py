"""The page, used as a person would, in Debian's Chromium on a real server; screenshots go to out/page."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from dalle.evaluation.microscope import visible_cells
from dalle.images import read_recipe
from tests.browser import Visit, chromium, page_pipe, visit
from tests.live import Live, live_server
from tests.tiny import GRID

pytestmark = pytest.mark.long

RUN = "a <b>run<b>"  # a folder's name is somebody's text too
N_CANDIDATES = 16  # what the page asks for unless told otherwise
N_SHOWN = 4
TEMPLATES = """
[[template]]
id = "things"
title = "Things"
text = "{object}, {style} style. {object}."
[template.slots]
object = ["a red apple", "a dog"]
style = ["flat", "noto", "firefox"]
"""


def write_run(folder: Path, steps: int) -> None:
    """What `dalle train` has written after some updates of a dVAE's training."""
    (folder / "samples" / "dvae").mkdir(parents=True, exist_ok=True)
    recipe = {"dvae": {"n_codes": 4096}, "dvae_training": {"steps": 200}}
    (folder / "config.json").write_text(json.dumps({"recipe": recipe}))
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(10, steps + 1, 10):
            row = {
                "stage": "dvae",
                "step": step,
                "seconds": step / 5,
                "loss": 3 / step,
                "pictures_per_second": 50.0,
            }
            file.write(json.dumps(row) + "\n")
            if step % 50 == 0:
                more = {"stage": "dvae", "step": step, "validation_psnr": 18.0, "validation_codes_used": 0.02}
                file.write(json.dumps(more) + "\n")
    for step in range(50, steps + 1, 50):
        Image.new("RGB", (64, 32), (step % 255, 90, 90)).save(
            folder / "samples" / "dvae" / f"step-{step:07d}.png"
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / RUN / "run", 100)
    return folder


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, runs: Path) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("data")
    (folder / "captions.toml").write_text(TEMPLATES)
    more = {"templates": folder / "captions.toml", "runs": runs}
    with live_server(folder / "store", page_pipe(), max_candidates=64, max_images=16, **more) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def person(browser: Browser, live: Live) -> Iterator[Visit]:
    live.pipe.gate.set()
    with visit(browser, live.url) as found:
        yield found
    live.pipe.gate.set()


def button(page: Page, name: str | re.Pattern[str]) -> Locator:
    return page.get_by_role("button", name=name, exact=isinstance(name, str))


def tiles(page: Page) -> Locator:
    return page.locator(".board.settled:visible button.tile")


def draw(person: Visit, seed: int | None = None) -> None:
    """Go to the explorer, draw its first caption, and wait until the pictures have settled."""
    person.go("explorer")
    button(person.page, "Things").click()
    if seed is not None:
        person.page.get_by_text("Settings", exact=True).click()
        person.page.get_by_label("Seed").fill(str(seed))
    button(person.page, "Draw").click()
    expect(tiles(person.page)).to_have_count(N_SHOWN)


def shown(page: Page, what: str) -> list[float]:
    """The seeds or scores that the tiles on show tell a screen reader, in order."""
    labels = [tile.get_attribute("aria-label") or "" for tile in tiles(page).all()]
    return [float(re.search(rf"{what} (-?[\d.]+)", label)[1]) for label in labels]  # type: ignore[index]


def drop_on(target: Locator, name: str, kind: str, data: bytes) -> None:
    """Let a file fall on an element, as from a folder's window."""
    target.evaluate(
        """(element, [name, type, bytes]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], name, { type }));
            for (const kind of ["dragover", "drop"])
                element.dispatchEvent(new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",
        [name, kind, list(data)],
    )


# Explorer


def test_a_caption_is_chosen_word_by_word_and_its_picture_comes_row_by_row(person: Visit, live: Live) -> None:
    page = person.page
    person.go("explorer")
    button(page, "Things").click()
    button(page, "object: a red apple").first.click()
    page.get_by_role("option", name="a dog").click()
    expect(button(page, "object: a dog")).to_have_count(2)  # a slot used twice changes in both places
    button(page, "style: flat").click()
    page.get_by_role("combobox", name=re.compile("style")).fill("crayon")
    person.shoot("explorer_word")
    page.keyboard.press("Enter")
    live.pipe.gate.clear()
    live.pipe.at_gate.clear()
    button(page, "Draw").click()
    assert live.pipe.at_gate.wait(20)
    expect(page.locator(".status:visible")).to_have_text(f"Drawing {N_CANDIDATES} candidates")
    live.pipe.gate.step()
    expect(page.get_by_text(f"row 1 of {GRID}")).to_be_visible()
    expect(page.locator(".tile.drawing canvas")).to_have_count(N_CANDIDATES)
    filled = page.locator(".tile canvas").first.evaluate(
        "(c) => { const { data } = c.getContext('2d').getImageData(4, 0, 1, c.height); return [data[3], data.at(-1)]; }"
    )
    assert filled == [255, 0], "the first row is there, and the last is not yet"
    person.shoot("explorer_drawing")
    live.pipe.gate.set()
    expect(tiles(page)).to_have_count(N_SHOWN)
    expect(page.locator(".status:visible")).to_have_text(f"The best {N_SHOWN} of {N_CANDIDATES}")
    scores = shown(page, "score")
    assert scores == sorted(scores, reverse=True)
    assert (
        tiles(page)
        .first.get_attribute("aria-label")
        .startswith(f"Picture 1 of {N_SHOWN}: a dog, crayon style. a dog.")
    )  # type: ignore[union-attr]
    expect(page.locator("#announcer")).to_contain_text("Done")
    person.shoot("explorer_settled")


def test_the_slider_reranks_what_is_there_and_asks_nobody(person: Visit, live: Live) -> None:
    page = person.page
    draw(person, seed=11)
    settled = live.events(
        {
            "prompt": "a red apple, flat style. a red apple.",
            "num_images": N_SHOWN,
            "num_candidates": N_CANDIDATES,
            "seed": 11,
        }
    )[-1][1]
    n_draws = person.n_draws()
    slider = page.get_by_role("slider", name=re.compile("Best of"))
    for n in (1, 3, 8, N_CANDIDATES):
        slider.fill(str(n))
        best = [each["seed"] for each in settled["pictures"] if each["index"] < n][:N_SHOWN]
        expect(tiles(page)).to_have_count(len(best))
        assert shown(page, "seed") == best
    assert person.n_draws() == n_draws == 1
    slider.focus()
    page.keyboard.press("Home")
    expect(tiles(page)).to_have_count(1)
    assert slider.get_attribute("aria-valuetext") == "best 1 of the first 1 candidates"


def test_the_words_of_a_slot_are_compared_side_by_side(person: Visit) -> None:
    page = person.page
    person.go("explorer")
    button(page, "Things").click()
    page.get_by_label("Compare the words of").select_option("style")
    button(page, "firefox").click()  # off again
    button(page, "Draw").click()
    expect(page.locator(".row-label")).to_have_text(["flat", "noto"])
    expect(tiles(page)).to_have_count(2 * N_SHOWN)
    seeds = [min(shown(page, "seed")[i : i + N_SHOWN]) // 100 for i in (0, N_SHOWN)]
    assert seeds[0] == seeds[1], "rows differ by the word alone"
    person.shoot("explorer_compare")


def test_a_drawing_waits_its_turn_and_can_be_cancelled(person: Visit, live: Live) -> None:
    page = person.page
    live.pipe.gate.clear()
    live.pipe.at_gate.clear()
    with visit(page.context.browser, live.url) as other:  # type: ignore[arg-type]
        other.go("explorer")
        button(other.page, "Your own words").click()
        other.page.get_by_label("Caption in your own words").fill("a dog")
        other.page.keyboard.press("Enter")
        assert live.pipe.at_gate.wait(20)
        person.go("explorer")
        button(page, "Things").click()
        button(page, "Draw").click()
        expect(page.get_by_text(re.compile("in the queue", re.IGNORECASE))).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_text("Cancelled.")).to_be_visible()
        button(other.page, "Cancel").click()
        expect(other.page.get_by_text("Cancelled.")).to_be_visible()
        live.pipe.gate.set()
        assert live.state.queue.wait_idle(20)
    expect(button(page, "Draw")).to_be_visible()
    assert live.state.queue.n_slots == 0
    assert any(it.method == "DELETE" and "/api/jobs/" in it.url for it in person.requests)


def test_what_goes_wrong_is_one_clear_line(person: Visit, live: Live) -> None:
    page = person.page
    person.go("explorer")
    button(page, "Your own words").click()
    button(page, "Draw").click()
    expect(page.get_by_role("alert")).to_have_text("Write a caption first.")
    page.get_by_label("Caption in your own words").fill("apple " * 200)
    button(page, "Draw").click()
    expect(page.get_by_role("alert")).to_contain_text("tokens; the model reads 160")
    person.forgive("HTTP 400", "status of 400")
    live.pipe.failing.add("a dog")
    page.get_by_label("Caption in your own words").fill("a dog")
    button(page, "Draw").click()
    expect(page.locator(".error-line:visible")).not_to_be_empty()
    live.pipe.failing.clear()
    expect(button(page, "Draw")).to_be_visible()
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Temperature").fill("-1")
    n_draws = person.n_draws()
    button(page, "Draw").click()
    expect(page.get_by_label("Temperature")).to_be_focused()
    assert person.n_draws() == n_draws


def test_a_picture_opens_with_its_recipe_and_what_can_be_done_with_it(
    person: Visit, live: Live, tmp_path: Path
) -> None:
    page = person.page
    draw(person, seed=5)
    first = tiles(page).first
    seed = int(shown(page, "seed")[0])
    first.click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("heading")).to_have_text("a red apple, flat style. a red apple.")
    expect(dialog.locator(".facts")).to_contain_text(f"Seed{seed}")
    expect(dialog.locator(".facts")).to_contain_text(f"Rank1 of {N_CANDIDATES}")
    person.shoot("picture")
    with page.expect_download() as download:
        dialog.get_by_role("link", name="Download").click()
    download.value.save_as(tmp_path / "got.png")
    assert read_recipe(tmp_path / "got.png")["seed"] == seed
    assert download.value.suggested_filename == f"a-red-apple-flat-style-a-red-apple-{seed}.png"
    dialog.get_by_role("button", name="Favourite").click()
    expect(dialog.get_by_role("button", name="Favourite")).to_have_attribute("aria-pressed", "true")
    assert [it.seed for it in live.state.history.search(favourite=True).pictures] == [seed]
    page.keyboard.press("ArrowRight")
    expect(dialog.locator(".viewer-place")).to_have_text(f"2 of {N_SHOWN}")
    page.keyboard.press("Escape")
    first.click()
    expect(dialog.get_by_role("button", name="Favourite")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("ArrowRight")
    dialog.get_by_text("Recipe", exact=True).click()
    expect(dialog.locator("pre")).to_contain_text('"model_sha256"')
    page.keyboard.press("ArrowLeft")
    dialog.get_by_role("button", name="Draw again").click()
    expect(tiles(page)).to_have_count(1)
    assert shown(page, "seed") == [seed]
    for id in [it.id for it in live.state.history.search(favourite=True).pictures]:
        live.state.history.set_favourite(id, False)


# Completion


def test_a_picture_is_completed_below_a_line_that_is_dragged(person: Visit, live: Live) -> None:
    page = person.page
    draw(person)
    tiles(page).first.click()
    button(page, "Complete it").click()
    line = page.get_by_role("slider", name="Rows to keep")
    expect(line).to_have_attribute("aria-valuenow", "2")
    box = page.locator(".cell-editor").bounding_box()
    grip = line.bounding_box()
    assert box and grip
    page.mouse.move(grip["x"] + grip["width"] / 2, grip["y"] + grip["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.74, steps=4)
    page.mouse.up()
    expect(line).to_have_attribute("aria-valuetext", f"the top 3 of {GRID} rows stay")
    line.press("ArrowUp")
    line.press("ArrowUp")
    button(page, re.compile("^the exact same red apple .* as a sketch on the bottom$")).click()
    expect(page.get_by_label("Caption of the whole picture")).to_have_value(
        re.compile("as a sketch on the bottom$")
    )
    button(page, "Complete it").click()
    expect(tiles(page)).to_have_count(N_SHOWN)
    person.shoot("completion_line")
    newest = live.state.history.search(limit=1).pictures[0]
    assert newest.caption.endswith("as a sketch on the bottom")
    known = newest.recipe["completion"]["known"]
    assert [token >= 0 for token in known] == [True] * GRID + [False] * (GRID * GRID - GRID)
    drawn = live.state.history.tokens(newest.id)
    assert drawn is not None and drawn.flatten().tolist()[:GRID] == known[:GRID]


def test_a_picture_is_completed_under_a_painted_mask(person: Visit, live: Live) -> None:
    page = person.page
    person.go("completion")
    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").resize((300, 200)).save(buffer, format="JPEG")
    drop_on(page.locator(".stage"), "moon.jpg", "image/jpeg", buffer.getvalue())
    button(page, "Paint a mask").click()
    cells = page.locator(".cell-editor .cell")
    expect(cells).to_have_count(GRID * GRID)
    first, second = cells.nth(5).bounding_box(), cells.nth(6).bounding_box()
    assert first and second
    page.mouse.move(first["x"] + 20, first["y"] + 20)
    page.mouse.down()
    page.mouse.move(second["x"] + 20, second["y"] + 20, steps=5)
    page.mouse.up()
    cells.nth(6).press("ArrowDown")
    page.keyboard.press("Space")  # by keyboard: cell 10
    expect(page.get_by_text(f"3 of {GRID * GRID} cells are drawn anew")).to_be_visible()
    page.get_by_label("Caption of the whole picture").fill("a dog")
    button(page, "Complete it").click()
    expect(tiles(page)).to_have_count(N_SHOWN)
    person.shoot("completion_mask")
    known = live.state.history.search(limit=1).pictures[0].recipe["completion"]["known"]
    assert [cell for cell, token in enumerate(known) if token < 0] == [5, 6, 10]


def test_what_is_no_picture_is_refused_in_one_line(person: Visit) -> None:
    person.go("completion")
    button(person.page, "Complete it").click()
    expect(person.page.get_by_role("alert")).to_have_text("Choose a picture first.")
    person.page.locator("input[type=file]").set_input_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": b"none"}
    )
    expect(person.page.get_by_role("alert")).to_contain_text("not a picture")


# History


def test_the_history_is_searched_favoured_and_cleared_with_undo(person: Visit, live: Live) -> None:
    page, history = person.page, live.state.history
    for caption, seed in (("a green pear on a table", 21), ("a dog with a hat", 22)):
        live.events({"prompt": caption, "num_images": 1, "seed": seed})
    person.go("history")
    items = page.locator(".gallery > li")
    expect(items.first).to_be_visible()
    page.get_by_label("Search captions").fill("pear green")
    expect(items).to_have_count(1)
    items.first.get_by_role("button").click()
    page.get_by_role("dialog").get_by_role("button", name="Favourite").click()
    page.keyboard.press("Escape")
    expect(items.first.locator(".badge")).to_be_visible()
    page.get_by_label("Search captions").fill("")
    button(page, "Favourites").click()
    expect(items).to_have_count(1)
    person.shoot("history_favourites")
    button(page, "Favourites").click()
    page.get_by_label("Search captions").fill("hat")
    expect(items).to_have_count(1)
    items.first.get_by_role("button").focus()
    page.keyboard.press("Delete")
    expect(items).to_have_count(0)
    button(page, "Undo").click()
    expect(items).to_have_count(1)
    assert len(history.search("hat").pictures) == 1
    items.first.get_by_role("button").click()
    with page.expect_response(lambda answer: answer.request.method == "DELETE"):
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        button(page, "Dismiss").click()
    assert history.search("hat").pictures == []
    expect(page.get_by_text("Nothing like that in the history.")).to_be_visible()


def test_the_history_goes_on_as_one_scrolls(person: Visit, live: Live) -> None:
    for seed in range(100, 500, 100):
        live.events({"prompt": "a dog", "num_images": 16, "seed": seed})
    wanted: list[str] = []
    before = None
    while before is not None or not wanted:
        listed = live.state.history.search(before=before)
        wanted += [it.id for it in listed.pictures]
        before = listed.next
    page = person.page
    person.go("history")
    items = page.locator(".gallery > li")
    expect(page.locator(".history .status")).to_have_text("48+ pictures")
    page.mouse.move(400, 400)
    more = page.get_by_role("button", name="Show more")
    while more.is_visible():
        n = items.count()
        page.mouse.wheel(0, 4000)
        expect(items.nth(n)).to_be_attached()
    assert [it.get_attribute("data-id") for it in items.all()] == wanted


def test_a_dropped_png_restores_its_caption_and_settings(person: Visit, live: Live) -> None:
    settled = live.events({"prompt": "a dog", "num_images": 1, "seed": 77, "temperature": 0.5, "top_k": 9})[
        -1
    ][1]
    png = live.state.history.png(settled["pictures"][0]["id"])
    assert png is not None
    page = person.page
    person.go("training")
    drop_on(page.locator("body"), "dog.png", "image/png", png)
    expect(page.get_by_label("Caption in your own words")).to_have_value("a dog")
    expect(page.locator(".explorer .digest")).to_have_text(
        re.compile(r"1 picture · seed 77 · temperature 0\.5 · top-k 9")
    )
    person.shoot("history_restored")
    button(page, "Draw").click()
    expect(tiles(page)).to_have_count(1)
    again = live.state.history.search(limit=1).pictures[0]
    assert again.recipe["tokens_sha256"] == read_recipe(png)["tokens_sha256"], "the very same picture"
    blank = io.BytesIO()
    Image.new("RGB", (8, 8)).save(blank, format="PNG")
    drop_on(page.locator("body"), "blank.png", "image/png", blank.getvalue())
    expect(page.locator(".toast.error")).to_contain_text("recipe")
    person.forgive("HTTP 400", "status of 400")


# Microscope


def test_the_microscope_tells_a_cells_token_and_what_a_layer_sees(person: Visit, live: Live) -> None:
    page = person.page
    id = live.events({"prompt": "a dog", "num_images": 1, "seed": 3})[-1][1]["pictures"][0]["id"]
    tokens = live.state.history.tokens(id)
    assert tokens is not None
    person.go(f"microscope/{id}")
    cells = page.locator(".slide .cell")
    expect(cells).to_have_count(GRID * GRID)
    cells.nth(6).click()
    facts = page.locator(".token .facts")
    expect(facts).to_contain_text(f"Token{int(tokens[1, 2])}")
    expect(facts).to_contain_text(
        re.compile(r"Probability[\w\d. ]+ %As it was drawn[\w\d. ]+ %Rank\d+ of 64Entropy[\d.]+ bits")
    )
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("heading", name="Row 3, column 2")).to_be_visible()
    expect(facts).to_contain_text(f"Token{int(tokens[2, 1])}")
    swatch = page.locator(".swatch")
    expect(swatch).to_have_attribute("src", f"/api/codebook/{int(tokens[2, 1])}.png")
    page.wait_for_load_state("networkidle")
    assert swatch.evaluate("(image) => image.naturalWidth") > 0
    colours = {cell.evaluate("(cell) => cell.style.backgroundColor") for cell in cells.all()}
    assert len(colours) > 3, "the entropy map has many colours"
    expect(page.locator(".legend")).to_contain_text("6 bits: anything goes")
    person.shoot("microscope_entropy")
    for layer, kind in enumerate(("row", "conv")):
        button(page, f"{layer + 1} {kind}").click()
        expect(page.locator(".sees")).to_contain_text(
            f"Layer {layer + 1}, a {kind} mask, sees the whole caption"
        )
        seen = visible_cells(live.pipe.transformer, layer, 9)
        expect(page.locator(".slide .cell.seen")).to_have_count(len(seen))
        found = [
            int(cell.get_attribute("data-cell") or -1) for cell in page.locator(".slide .cell.seen").all()
        ]
        assert found == seen
    person.shoot("microscope_mask")


# Training


def test_a_run_is_watched_as_it_goes(person: Visit, runs: Path) -> None:
    page = person.page
    person.go("training")
    expect(button(page, RUN)).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".run-head")).to_contain_text("dvae · update 100 of 200")
    expect(
        page.get_by_role("img", name=re.compile(r"Loss: loss from 0\.3 at step 10 to 0\.03 at step 100"))
    ).to_be_visible()
    page.get_by_text("As a table").first.click()
    expect(page.get_by_role("row", name=re.compile(r"^50 0\.06"))).to_be_visible()
    expect(page.locator(".codebook")).to_contain_text("share of codes used2.0 %")
    expect(page.locator(".remark").first).to_contain_text(
        re.compile("code", re.IGNORECASE)
    )  # 2 % of the codes
    sheet = page.locator(".sheet-picture")
    expect(sheet).to_have_attribute("alt", "reconstructions after 100 updates")
    page.get_by_label("Step of the sheet").fill("0")
    expect(sheet).to_have_attribute("alt", "reconstructions after 50 updates")
    chart = page.locator(".chart-drawing").first
    chart.focus()
    page.keyboard.press("End")
    expect(page.locator(".chart-readout").first).to_have_text("Step 100: loss 0.03")
    person.shoot("training")
    write_run(runs / RUN / "run", 150)
    expect(page.locator(".run-head")).to_contain_text("dvae · update 150")  # by polling
    expect(page.get_by_role("img", name=re.compile("at step 150"))).not_to_have_count(0)
    write_run(runs / RUN / "run", 100)
