"""The page's drawing over HTTP: a stream of rows, pictures best first, and a job that can be ended."""

import base64
import http.client
import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from dalle.generation.fields import FIELDS
from dalle.generation.request import ModelDefaults
from dalle.images import open_image, read_recipe
from dalle.serving import intake
from tests.live import Live, gated_pipe, live_server, parse_events
from tests.tiny import LARGE


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_server(tmp_path_factory.mktemp("data"), max_candidates=80, max_pixels=10_000) as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_left(live: Live) -> Iterator[None]:
    yield
    live.pipe.gate.set()
    assert live.state.queue.wait_idle(30)
    assert live.state.queue.n_slots == 0


def encoded(side: int = 32, clear: tuple[int, int, int, int] | None = None) -> str:
    image = Image.linear_gradient("L").resize((side, side)).convert("RGBA")
    if clear is not None:
        image.paste((0, 0, 0, 0), clear)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_drawing_is_queued_started_shown_and_settled(live: Live) -> None:
    events = live.events({"prompt": "a dog", "num_images": 3, "num_candidates": 10, "seed": 4})
    names = [name for name, _ in events]
    assert names[:3] == ["queued", "started", "row"] and names[-1] == "settled"
    assert events[0][1]["position"] == 0
    started, row, settled = events[1][1], events[2][1], events[-1][1]
    assert started["seeds"] == list(range(4, 14)) and started["caption"] == "a dog"
    assert (started["grid"], started["image_size"], started["n_candidates"]) == (4, 32, 10)
    assert (row["row"], row["n_rows"], row["first"], row["n"]) == (0, 4, 0, 10)
    with Image.open(io.BytesIO(base64.b64decode(row["sheet"]))) as sheet:
        assert sheet.size == (row["columns"] * row["tile"], 3 * row["tile"])
    twin = live.pipe("a dog", num_images_per_prompt=3, num_candidates=10, seed=4)
    assert settled["kept"] == 3 and settled["truncated"] is False
    assert [one["seed"] for one in settled["pictures"][:3]] == list(twin.seeds)
    assert [one["rank"] for one in settled["pictures"]] == list(range(10))
    assert sorted(one["index"] for one in settled["pictures"]) == list(range(10))
    assert settled["recipe"]["caption"] == "a dog" and "seed" not in settled["recipe"]
    status, headers, png = live.request("GET", settled["pictures"][0]["url"])
    assert (status, headers["content-type"]) == (200, "image/png")
    assert read_recipe(png)["tokens_sha256"] == twin.recipes[0]["tokens_sha256"]


def test_more_candidates_than_a_batch_holds_come_sheet_by_sheet(live: Live) -> None:
    events = live.events({"prompt": "a dog", "num_images": 2, "num_candidates": 70})
    firsts = {data["first"]: data["n"] for name, data in events if name == "row"}
    assert firsts == {0: 64, 64: 6}
    assert len(events[-1][1]["pictures"]) == 70


def test_a_completion_keeps_rows_or_what_a_mask_leaves(live: Live) -> None:
    kept = live.events({"prompt": "a dog", "image": encoded(), "keep_rows": 3})[-1][1]
    assert kept["recipe"]["completion"]["keep_rows"] == 3
    masked = {
        "prompt": "a dog",
        "image": f"data:image/png;base64,{encoded()}",
        "mask": encoded(clear=(24, 24, 32, 32)),
    }
    known = live.events(masked)[-1][1]["recipe"]["completion"]["known"]
    assert [token < 0 for token in known] == [False] * 15 + [True]


def test_a_caption_is_cut_only_when_asked(live: Live) -> None:
    body = {"prompt": "a red apple " * 20}
    status, _, text = live.request("POST", "/api/draw", body)
    assert status == 400 and json.loads(text)["error"]["code"] == "caption_too_long"
    assert live.events(body | {"truncate": True})[-1][1]["truncated"] is True


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"image": "@"}, "image"),
        ({"image": "bm90IGEgcGljdHVyZQ==", "keep_rows": 1}, "image"),
        ({"image": encoded(), "keep_rows": 5}, "keep_rows"),
        ({"image": encoded()}, "keep_rows"),
        ({"image": encoded(), "mask": encoded()}, None),
        ({"image": encoded(side=101), "keep_rows": 1}, "image"),
        ({"keep_rows": 1}, "image"),
        ({"num_images": 65}, "num_images"),
        ({"num_candidates": 81}, "num_candidates"),
        ({"num_images": 4, "num_candidates": 3}, "num_candidates"),
        ({"steps": 50}, "steps"),
        ({"\ud800": 50}, None),
        ({"truncate": 1}, "truncate"),
    ],
)
def test_a_field_at_fault_is_named(live: Live, fields: dict[str, Any], param: str | None) -> None:
    if fields.get("mask"):  # a mask with nothing marked: dark and opaque
        black = io.BytesIO()
        Image.new("RGB", (32, 32)).save(black, format="PNG")
        fields, param = fields | {"mask": base64.b64encode(black.getvalue()).decode()}, "mask"
    status, headers, text = live.request("POST", "/api/draw", {"prompt": "a dog"} | fields)
    assert (status, headers["content-type"]) == (400, "application/json"), text
    assert json.loads(text)["error"]["param"] == param


def stream(live: Live, body: dict[str, Any]) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(live.url.removeprefix("http://"), timeout=60)
    connection.request("POST", "/api/draw", json.dumps(body), {"content-type": "application/json"})
    return connection, connection.getresponse()


def read_event(answer: http.client.HTTPResponse) -> tuple[str, dict[str, Any]]:
    text = b""
    while not text.endswith(b"\n\n"):
        text += answer.readline()
    [event] = parse_events(text)
    return event


def test_a_job_can_be_ended_by_its_id(live: Live) -> None:
    live.pipe.at_gate.clear()
    live.pipe.gate.clear()
    connection, answer = stream(live, {"prompt": "a dog", "num_images": 4})
    job = read_event(answer)[1]["job"]
    assert job == answer.headers["x-dalle-job"]
    assert live.pipe.at_gate.wait(30)
    assert live.request("DELETE", f"/api/jobs/{job}")[0] == 200
    assert live.state.queue.n_slots == 0, "while the worker still stands at its gate"
    name, data = parse_events(answer.read())[-1]
    assert (name, data["error"]["code"]) == ("error", "cancelled")
    assert live.request("DELETE", f"/api/jobs/{job}")[0] == 404
    connection.close()


def test_who_waits_is_told_its_place_and_leaving_frees_it(live: Live) -> None:
    live.pipe.at_gate.clear()
    live.pipe.gate.clear()
    first, _ = stream(live, {"prompt": "a dog"})
    assert live.pipe.at_gate.wait(30)
    second, second_answer = stream(live, {"prompt": "a dog"})
    third, third_answer = stream(live, {"prompt": "a dog"})
    assert read_event(second_answer)[1]["position"] == 0
    assert read_event(third_answer)[1]["position"] == 1
    second_answer.close()
    second.close()
    assert read_event(third_answer)[1]["position"] == 0
    third_answer.close()
    third.close()
    first.close()


def test_an_error_ends_the_stream_as_an_event(live: Live) -> None:
    live.pipe.failing.add("broken")
    assert live.events({"prompt": "broken"})[-1][0] == "error"
    assert live.events({"prompt": "a dog"})[-1][0] == "settled"


def test_a_full_queue_turns_the_page_away(live: Live) -> None:
    held = [live.state.queue.reserve(1) for _ in range(live.state.settings.max_queue)]
    status, headers, text = live.request("POST", "/api/draw", {"prompt": "a dog"})
    for one in held:
        one.release()
    assert status == 503 and int(headers["retry-after"]) >= 1
    assert json.loads(text)["error"]["code"] == "server_overloaded"


def test_the_page_learns_the_model_and_its_limits(live: Live) -> None:
    info = json.loads(live.request("GET", "/api/info")[2])
    assert info["grid"] == 4 and info["image_size"] == 32 and info["n_codes"] == 64
    assert info["layers"] == ["row", "conv"] and info["has_ranker"] is True
    assert info["max_candidates"] == 80 and info["is_guarded"] is False
    assert info["defaults"] == {"temperature": 1.0, "top_k": None, "top_p": None, "guidance": 1.0}


def test_without_a_clip_pictures_come_in_the_order_of_their_seeds(tmp_path: Any) -> None:
    with live_server(tmp_path, gated_pipe(with_ranker=False)) as plain:
        settled = plain.events({"prompt": "a dog", "num_images": 3, "seed": 8})[-1][1]
        assert [(one["seed"], one["score"]) for one in settled["pictures"]] == [
            (8, None),
            (9, None),
            (10, None),
        ]
        status, _, _ = plain.request("POST", "/api/draw", {"prompt": "a dog", "num_candidates": 9})
        assert status == 400
        png = plain.request("GET", settled["pictures"][1]["url"])[2]
        assert open_image(png).size == (32, 32) and read_recipe(png)["rank"] is None


def test_a_decoder_that_draws_more_pixels_is_shown_at_its_size(tmp_path: Any) -> None:
    with live_server(tmp_path, gated_pipe(**LARGE)) as large:
        assert json.loads(large.request("GET", "/api/info")[2])["image_size"] == 64
        body = {"prompt": "a dog", "num_images": 2, "seed": 8, "image": encoded(), "keep_rows": 1}
        events = large.events(body)
        assert events[1][1]["image_size"] == 64
        assert next(event["tile"] for name, event in events if name == "row") == 64
        png = large.request("GET", events[-1][1]["pictures"][0]["url"])[2]
        assert open_image(png).size == (64, 64)
        token = large.request("GET", "/api/codebook/3.png")
        order = {"prompt": "a dog", "size": "64x64", "response_format": "b64_json"}
        status, _, answer = large.request("POST", "/v1/images/generations", order)
    assert status == 200 and json.loads(answer)["size"] == "64x64"
    assert token[0] == 200 and open_image(token[2]).size == (16, 16)


def test_a_models_own_number_of_candidates_is_drawn_where_a_request_leaves_it_open(tmp_path: Any) -> None:
    pipe = gated_pipe()
    pipe.sampler.defaults = ModelDefaults(candidates=5)
    with live_server(tmp_path, pipe) as choosing:
        events = dict(choosing.events({"prompt": "a dog", "num_images": 2}))
        assert events["started"]["n_candidates"] == 5 and events["settled"]["kept"] == 2
        events = dict(choosing.events({"prompt": "a dog", "num_images": 2, "num_candidates": 3}))
        assert events["started"]["n_candidates"] == 3
        for fields, n in (({}, 5), ({"quality": "auto"}, 5), ({"quality": "low"}, 2), ({"n": 6}, 6)):
            body = {"prompt": "a dog", "n": 2} | fields
            status, _, text = choosing.request("POST", "/v1/images/generations", body)
            assert status == 200 and json.loads(text)["usage"]["output_tokens"] == n * 16
        assert json.loads(choosing.request("GET", "/api/info")[2])["defaults"]["candidates"] == 5


def test_a_server_without_a_clip_says_that_it_draws_no_candidates_to_choose_from(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = gated_pipe(with_ranker=False)
    pipe.sampler.defaults = ModelDefaults(candidates=5)
    with live_server(tmp_path, pipe) as plain:
        events = dict(plain.events({"prompt": "a dog", "num_images": 2}))
    assert events["started"]["n_candidates"] == 2
    assert "5 candidates per caption needs a CLIP, which is missing" in caplog.text


def test_the_page_is_told_ranges_and_meanings_of_all_fields(live: Live) -> None:
    fields = json.loads(live.request("GET", "/api/info")[2])["fields"]
    assert {"num_images", "num_candidates", "seed", "temperature", "top_k", "top_p", "guidance"} <= {*fields}
    assert fields["temperature"] == FIELDS["temperature"]._asdict()


def test_few_pictures_are_decoded_at_once(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen grey pictures of 16 bits and 16 million pixels took 7.5 GB together."""
    lock, n_now, most = threading.Lock(), 0, 0
    opened = intake.open_image

    def counted(*args: Any) -> Image.Image:
        nonlocal n_now, most
        with lock:
            n_now += 1
            most = max(most, n_now)
        time.sleep(0.02)  # long enough for others to come
        image = opened(*args)
        with lock:
            n_now -= 1
        return image

    monkeypatch.setattr(intake, "open_image", counted)
    buffer = io.BytesIO()
    Image.new("I;16", (64, 64)).save(buffer, format="PNG")
    body = {"prompt": "a dog", "num_images": 1, "keep_rows": 1}
    body["image"] = base64.b64encode(buffer.getvalue()).decode()
    with ThreadPoolExecutor(8) as pool:
        ends = [found[-1][0] for found in pool.map(live.events, [body] * 8)]
    assert ends == ["settled"] * 8 and most <= 2
