"""OpenAI's own Python client, over loopback, against a real server."""

import base64
import io
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from PIL import Image

from dalle.generation.recipe import Recipe
from dalle.images import open_image, read_recipe
from tests.live import Live, gated_pipe, live_server


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    limits = {"max_queue": 4, "max_candidates": 40, "max_images": 6, "max_body_bytes": 300_000}
    with live_server(tmp_path_factory.mktemp("data"), **limits) as server:
        yield server


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    live.pipe.gate.set()
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as made:
        yield made
    live.pipe.gate.set()
    assert live.state.queue.wait_idle(30), "slots were not given back"
    assert live.state.queue.n_slots == 0


def picture(side: int = 32, clear: tuple[int, int, int, int] | None = None) -> bytes:
    image = Image.radial_gradient("L").resize((side, side)).convert("RGBA")
    if clear is not None:
        image.paste((0, 0, 0, 0), clear)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def test_generate_gives_the_pictures_that_the_pipeline_draws(client: openai.OpenAI, live: Live) -> None:
    answer = client.images.generate(
        prompt="a red apple", n=2, response_format="b64_json", extra_body={"seed": 7, "num_candidates": 5}
    )
    twin = live.pipe("a red apple", num_images_per_prompt=2, num_candidates=5, seed=7)
    assert answer.data is not None and len(answer.data) == 2
    for datum, image, recipe in zip(answer.data, twin.images, twin.recipes, strict=True):
        png = base64.b64decode(datum.b64_json or "")
        assert read_recipe(png)["tokens_sha256"] == recipe["tokens_sha256"]
        assert open_image(png).tobytes() == image.tobytes()
    assert [datum.seed for datum in answer.data] == list(twin.seeds)  # type: ignore[attr-defined]
    assert answer.size == "32x32" and answer.output_format == "png" and answer.created > 1.7e9
    n_text = live.pipe.tokenizer.count("a red apple")
    assert answer.usage is not None
    assert answer.usage.input_tokens == answer.usage.input_tokens_details.text_tokens == n_text
    assert answer.usage.output_tokens == 5 * 16
    assert answer.usage.total_tokens == n_text + 80


def test_quality_is_how_many_candidates_are_drawn(client: openai.OpenAI) -> None:
    for quality, n_candidates in (("low", 1), ("standard", 8), ("hd", 32), ("max", 40)):
        answer = client.images.generate(prompt="a dog", quality=quality)  # type: ignore[arg-type, call-overload]
        assert answer.usage.output_tokens == 16 * n_candidates, quality


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_picture_has_the_size_and_format_asked_for(client: openai.OpenAI, kind: Any) -> None:
    more = {} if kind == "png" else {"output_compression": 40}
    answer = client.images.generate(prompt="a dog", size="128x128", output_format=kind, **more)  # type: ignore[call-overload]
    with Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))) as image:
        assert image.size == (128, 128) and image.format == kind.upper()


def test_an_address_gives_the_picture_and_others_give_404(client: openai.OpenAI, live: Live) -> None:
    answer = client.images.generate(prompt="a dog", response_format="url", size="64x64")
    assert answer.data is not None and answer.data[0].url is not None and answer.data[0].b64_json is None
    with urllib.request.urlopen(answer.data[0].url) as reply:
        assert reply.headers["content-type"] == "image/png"
        assert open_image(reply.read()).size == (64, 64)
    address = answer.data[0].url
    for wrong in (address.replace("~64~", "~128~"), address.replace(".png", ".webp"), address + "x"):
        assert live.request("GET", wrong.removeprefix(live.url))[0] == 404


def test_a_stream_shows_partial_images_and_then_the_picture(client: openai.OpenAI, live: Live) -> None:
    events = [
        *client.images.generate(
            prompt="a red apple", stream=True, partial_images=3, extra_body={"seed": 3, "num_candidates": 1}
        )
    ]
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:-1]] == [0, 1, 2]  # type: ignore[union-attr]
    partial = open_image(base64.b64decode(events[0].b64_json))
    assert partial.getpixel((0, 31)) == (128, 128, 128), "what is not drawn yet is grey"
    assert partial.getpixel((0, 0)) != (128, 128, 128)
    done = events[-1]
    assert isinstance(done, openai.types.ImageGenCompletedEvent)
    twin = live.pipe("a red apple", seed=3)
    assert read_recipe(base64.b64decode(done.b64_json))["tokens_sha256"] == twin.recipes[0]["tokens_sha256"]
    assert done.usage.output_tokens == 16 and done.output_format == "png"


def test_an_edit_redraws_the_clear_part_of_the_mask_and_keeps_the_rest(
    client: openai.OpenAI, live: Live
) -> None:
    answer = client.images.edit(
        image=picture(),
        mask=picture(clear=(16, 16, 32, 32)),
        prompt="a dog",
        extra_body={"seed": 5, "num_candidates": 1},
    )
    mask = Image.open(io.BytesIO(picture(clear=(16, 16, 32, 32))))
    twin = live.pipe("a dog", image=open_image(picture()), mask=mask, seed=5)
    recipe = read_recipe(base64.b64decode(answer.data[0].b64_json or ""))  # type: ignore[index]
    assert recipe["tokens_sha256"] == twin.recipes[0]["tokens_sha256"]
    assert recipe["completion"] == twin.recipes[0]["completion"]
    assert answer.usage is not None and answer.usage.input_tokens_details.image_tokens == 12
    assert answer.usage.output_tokens == 4


def test_an_edit_takes_the_images_own_hole_or_rows_to_keep(client: openai.OpenAI) -> None:
    hole = client.images.edit(image=picture(clear=(0, 0, 8, 8)), prompt="a dog")
    recipe = read_recipe(base64.b64decode(hole.data[0].b64_json or ""))  # type: ignore[index]
    assert [token < 0 for token in recipe["completion"]["known"]] == [True] + [False] * 15
    rows = client.images.edit(image=[picture()], prompt="a dog", extra_body={"keep_rows": 1})
    recipe = read_recipe(base64.b64decode(rows.data[0].b64_json or ""))  # type: ignore[index]
    assert recipe["completion"]["keep_rows"] == 1


def test_an_edit_streams(client: openai.OpenAI) -> None:
    stream = client.images.edit(
        image=picture(clear=(0, 0, 8, 8)), prompt="a dog", stream=True, partial_images=1
    )
    assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]


def test_the_models_are_listed_and_others_are_not_found(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.object == "model" and model.owned_by == "dalle"
    assert client.models.retrieve(model.id).id == model.id
    client.images.generate(prompt="a dog", model=model.id)
    for ask in (
        lambda: client.models.retrieve("dall-e-3"),
        lambda: client.images.generate(prompt="a dog", model="a/b"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.code == "model_not_found" and caught.value.param == "model"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"size": "1792x1024"}, "size", "invalid_value"),
        ({"size": "33x33"}, "size", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 7}, "n", None),
        ({"n": True}, "n", "invalid_type"),
        ({"n": "3"}, "n", "invalid_type"),
        ({"n": 1.0}, "n", "invalid_type"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": 3}, "prompt", "invalid_type"),
        ({"prompt": "a red apple " * 30}, "prompt", "caption_too_long"),
        ({"quality": "best"}, "quality", "invalid_value"),
        ({"background": "transparent"}, "background", "invalid_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"output_compression": 50}, "output_compression", None),
        ({"output_format": "jpeg", "output_compression": 101}, "output_compression", "invalid_value"),
        ({"partial_images": 2}, "partial_images", None),
        ({"stream": True, "partial_images": 4}, "partial_images", "invalid_value"),
        ({"seed": -2}, "seed", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"seed": int("9" * 400)}, "seed", "invalid_value"),
        ({"seed": 2**63 - 1, "n": 2, "num_candidates": 2}, "seed", "invalid_value"),
        ({"temperature": -0.5}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_k": -1}, "top_k", "invalid_value"),
        ({"num_candidates": 41}, "num_candidates", None),
        ({"n": 3, "num_candidates": 2}, "num_candidates", None),
        ({"negative_prompt": "blue"}, "negative_prompt", "unknown_parameter"),
    ],
)
def test_a_field_at_fault_is_named(
    client: openai.OpenAI, fields: dict[str, Any], param: str, code: str | None
) -> None:
    body = {"prompt": "a dog"} | fields
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/images/generations", body=body, cast_to=object)
    assert caught.value.param == param
    assert caught.value.code == code
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id is not None and caught.value.request_id.startswith("req_")


@pytest.mark.parametrize("field", ["user", "moderation", "style", "background", "safety_identifier"])
def test_a_field_that_changes_nothing_here_is_taken(client: openai.OpenAI, field: str) -> None:
    value = {"moderation": "low", "style": "vivid", "background": "auto"}.get(field, "me")
    client.images.generate(prompt="a dog", extra_body={field: value, "model": None, "n": None, "size": None})


def test_a_caption_too_long_is_cut_only_when_asked_and_said_so(client: openai.OpenAI, live: Live) -> None:
    caption = "a red apple " * 30
    answer = client.images.with_raw_response.generate(prompt=caption, extra_body={"truncate": True})
    assert answer.headers["x-dalle-truncated"] == "true"
    parsed = answer.parse()
    assert parsed.truncated is True  # type: ignore[attr-defined]
    assert parsed.usage is not None and parsed.usage.input_tokens == live.pipe.tokenizer.max_tokens


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_type"),
        (b'"a dog"', "invalid_type"),
        (b'{"prompt": "a dog", "temperature": NaN}', "invalid_json"),
        (b'{"prompt": "a dog", "temperature": 1e999}', "invalid_value"),
        (b'{"prompt": "a dog", "temperature": -Infinity}', "invalid_json"),
        (b'{"prompt": "a dog", "prompt": "a cat"}', "invalid_json"),
        (b'{"prompt": "\xff"}', "invalid_json"),
        (b'{"prompt": "\\ud800"}', "invalid_value"),
        (b'{"prompt": "a dog", "seed": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b"[" * 50_000, "invalid_json"),
        (b'\xef\xbb\xbf{"prompt": "a dog"}', "invalid_json"),
    ],
)
def test_a_body_that_is_no_request_is_refused(live: Live, body: bytes, code: str) -> None:
    status, headers, text = live.request("POST", "/v1/images/generations", body)
    assert (status, headers["content-type"]) == (400, "application/json")
    assert f'"code": "{code}"' in text.decode("ascii")


def test_other_failures_have_the_envelope_too(live: Live) -> None:
    for method, path, headers, status in (
        ("GET", "/v1/nothing", {}, 404),
        ("GET", "/v1/images/generations", {}, 405),
        ("POST", "/v1/images/generations", {"content-type": "text/plain"}, 415),
        ("POST", "/v1/images/edits", {"content-type": "application/json"}, 415),
        ("POST", "/v1/images/edits", {"content-type": "multipart/form-data"}, 400),
    ):
        found, _, body = live.request(method, path, b"{}", headers)
        assert found == status, (path, body)
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def edit(client: openai.OpenAI, **fields: Any) -> None:
    client.images.edit(**({"image": picture(clear=(0, 0, 8, 8)), "prompt": "a dog"} | fields))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"image": b"no picture"}, "image"),
        ({"image": picture()[:100]}, "image"),
        ({"image": b""}, "image"),
        ({"image": picture()}, "mask"),
        ({"image": [picture(), picture()]}, "image"),
        ({"mask": picture(side=16)}, "mask"),
        ({"mask": picture(), "image": picture()}, "mask"),
        ({"mask": b"GIF89a"}, "mask"),
        ({"extra_body": {"keep_rows": 5}}, "keep_rows"),
        ({"extra_body": {"keep_rows": "many"}}, "keep_rows"),
        ({"extra_body": {"frames": 2}}, "frames"),
    ],
)
def test_an_edit_at_fault_is_told_why(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        edit(client, **fields)
    assert caught.value.param == param


def test_the_client_hears_of_a_body_too_large_and_of_another_sites_page(client: openai.OpenAI) -> None:
    for send in (
        lambda: edit(client, image=b"\x89PNG" + bytes(400_000)),
        lambda: client.images.generate(prompt="a" * 400_000),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            send()
        assert (caught.value.status_code, caught.value.code) == (413, "body_too_large")
    with pytest.raises(openai.PermissionDeniedError) as denied:
        client.images.generate(prompt="a dog", extra_headers={"origin": "https://evil.example"})
    assert denied.value.code == "origin_not_allowed"


def test_a_deadline_is_a_503_that_says_when_to_come_again(tmp_path: Any) -> None:
    with live_server(tmp_path, gated_pipe(with_ranker=False), deadline_s=1e-6) as live:
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError) as caught:
                client.images.generate(prompt="a dog")
    assert (caught.value.status_code, caught.value.code) == (503, "deadline_exceeded")
    assert int(caught.value.response.headers["retry-after"]) >= 1


def test_a_full_queue_is_a_503_that_the_client_retries_when_it_is_told_to(
    client: openai.OpenAI, live: Live
) -> None:
    held = [live.state.queue.reserve(1) for _ in range(4)]
    with pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(prompt="a dog")
    assert caught.value.status_code == 503 and caught.value.code == "server_overloaded"
    wait = float(caught.value.response.headers["retry-after"])
    assert 1 <= wait <= 60

    is_refused = threading.Event()
    rejected = live.state.queue.metrics.rejected.labels("queue")
    before = rejected._value.get()

    def free() -> None:
        while rejected._value.get() == before:
            time.sleep(0.01)  # until the first try has been refused
        is_refused.set()
        for one in held:
            one.release()

    thread = threading.Thread(target=free)
    thread.start()
    start = time.monotonic()
    answer = client.with_options(max_retries=1).images.generate(prompt="a dog")
    thread.join()
    assert answer.data and is_refused.is_set()
    assert time.monotonic() - start >= 0.9 * wait, "the client came back before Retry-After"


def test_a_client_that_closes_its_stream_frees_its_slots(client: openai.OpenAI, live: Live) -> None:
    live.pipe.at_gate.clear()
    live.pipe.gate.clear()
    stream = client.images.generate(
        prompt="a dog", stream=True, partial_images=1, extra_body={"num_candidates": 4}
    )
    assert live.pipe.at_gate.wait(30)
    assert live.state.queue.n_slots == 4
    stream.close()
    assert live.state.queue.wait_idle(30)  # the worker still stands at its gate
    cancelled = live.state.queue.metrics.jobs.labels("cancelled")._value.get()
    live.pipe.gate.set()
    assert client.images.generate(prompt="a dog").data
    assert cancelled >= 1


def test_a_client_that_gives_up_waiting_frees_its_slots(client: openai.OpenAI, live: Live) -> None:
    live.pipe.gate.clear()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).images.generate(prompt="a dog", n=3)
    assert live.state.queue.wait_idle(30)


def test_a_job_that_fails_is_a_500_and_an_error_in_the_stream(client: openai.OpenAI, live: Live) -> None:
    live.pipe.failing.add("a broken dog")
    with pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(prompt="a broken dog")
    assert caught.value.status_code == 500 and caught.value.code == "drawing_failed"
    with pytest.raises(openai.APIError, match="could not be drawn"):
        [*client.images.generate(prompt="a broken dog", stream=True)]
    assert client.images.generate(prompt="a dog").data


def test_a_key_is_asked_for_and_a_wrong_one_is_an_authentication_error(tmp_path: Any) -> None:
    with live_server(tmp_path, gated_pipe(with_ranker=False), api_key="a-good-key") as live:
        good = openai.OpenAI(base_url=f"{live.url}/v1", api_key="a-good-key", max_retries=0)
        assert good.images.generate(prompt="a dog").data
        for key in ("a-bad-key", "a-good-kez", ""):
            with pytest.raises(openai.AuthenticationError) as caught:
                good.with_options(api_key=key or "x").images.generate(prompt="a dog")
            assert caught.value.code == "invalid_api_key"
        good.close()


def test_without_a_clip_more_candidates_than_pictures_are_refused(tmp_path: Any) -> None:
    with live_server(tmp_path, gated_pipe(with_ranker=False)) as live:
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0) as client:
            answer = client.images.generate(prompt="a dog", quality="hd")
            assert answer.usage is not None and answer.usage.output_tokens == 16
            with pytest.raises(openai.BadRequestError) as caught:
                client.images.generate(prompt="a dog", extra_body={"num_candidates": 2})
            assert caught.value.param == "num_candidates"


def test_a_picture_of_a_mixed_batch_can_be_drawn_again_from_its_recipe(
    client: openai.OpenAI, live: Live
) -> None:
    live.pipe.at_gate.clear()
    live.pipe.gate.clear()
    answers: list[Any] = []

    def ask(**fields: Any) -> None:
        answers.append(client.images.generate(**fields))

    asked = [
        {"prompt": "a dog", "extra_body": {"seed": 1}},  # holds the worker while the others queue up
        {
            "prompt": "a red apple",
            "n": 2,
            "extra_body": {"seed": 9, "guidance_scale": 3, "num_candidates": 3},
        },
        {"prompt": "a green pear", "extra_body": {"seed": 4, "temperature": 0.5, "num_candidates": 2}},
        {"prompt": "pear " * 40, "extra_body": {"truncate": True, "top_k": 5, "num_candidates": 1}},
    ]
    threads = [threading.Thread(target=ask, kwargs=one) for one in asked]
    threads[0].start()
    assert live.pipe.at_gate.wait(30)
    for thread in threads[1:]:
        thread.start()
    with live.state.queue.changed:
        assert live.state.queue.changed.wait_for(lambda: live.state.queue.n_waiting == 3, 30)
    live.pipe.gate.set()
    for thread in threads:
        thread.join(60)
    assert sorted(live.pipe.batches[-1]) == [1, 2, 3]
    for answer in answers:
        for datum in answer.data:
            recipe = read_recipe(base64.b64decode(datum.b64_json))
            _, agrees = live.pipe.rerun(recipe)
            assert agrees
            others = set(Recipe.model_validate(recipe).batch.captions) - {recipe["caption"]}
            assert others <= {""}, "what others asked for is nobody's business"


def test_a_seed_of_minus_one_is_none(client: openai.OpenAI) -> None:
    seeds = {
        client.images.generate(prompt="a dog", extra_body={"seed": -1}).data[0].seed  # type: ignore[index, attr-defined]
        for _ in range(3)
    }
    assert len(seeds) == 3


def test_settings_of_other_kinds_of_models_are_ignored_by_name(client: openai.OpenAI) -> None:
    more = {"num_inference_steps": 20, "scheduler": "ddim"}
    answer = client.images.with_raw_response.generate(prompt="a dog", extra_body=more)
    assert answer.headers["x-dalle-ignored"] == "num_inference_steps, scheduler"
    edit = client.images.with_raw_response.edit(
        image=picture(clear=(0, 0, 8, 8)), prompt="a dog", extra_body={"steps": 20}
    )
    assert edit.headers["x-dalle-ignored"] == "steps"
    with pytest.raises(openai.BadRequestError, match="unknown parameter: stepz"):
        client.images.generate(prompt="a dog", extra_body={"stepz": 1})


def test_an_address_answers_head_and_other_pages_may_show_it(client: openai.OpenAI, live: Live) -> None:
    answer = client.images.generate(prompt="a dog", response_format="url")
    path = answer.data[0].url.removeprefix(live.url)  # type: ignore[index, union-attr]
    status, headers, body = live.request("HEAD", path)
    assert (status, body) == (200, b"") and headers["content-type"] == "image/png"
    assert headers["cross-origin-resource-policy"] == "cross-origin"
    cross = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert live.request("GET", path, None, cross)[0] == 200
    assert live.request("GET", "/api/info", None, cross)[0] == 403
    assert live.request("GET", "/v1/models/")[0] == live.request("GET", "/v1/models")[0] == 200
