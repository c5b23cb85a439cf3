"""The server draws, completes and streams with a published model, and its microscope says what it cannot show."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.live import GatedPipeline, live_server
from tests.tiny_published import (
    one_thread,  # noqa: F401 - every test here runs under it
    published_pipe,
    tiny_vqgan,
)


def gated(name: str, **parts: Any) -> GatedPipeline:
    pipe = published_pipe(name, **parts)
    return GatedPipeline(pipe.tokenizer, pipe.dvae, pipe.transformer)


@pytest.mark.parametrize("name", ["min-dalle", "dalle-pytorch", "ru-dalle v3", "minDALL-E"])
def test_openai_api_draws_with_a_published_model(name: str, tmp_path: Path) -> None:
    with live_server(tmp_path, gated(name)) as live:
        status, _, body = live.request("POST", "/v1/images/generations", {"prompt": "red apple", "n": 2})
        assert status == 200, body
        assert len(json.loads(body)["data"]) == 2
        events = live.events({"prompt": "two blue cats", "num_images": 1})
        assert events[-1][0] not in ("error", "failed"), events[-1]
        status, _, body = live.request("GET", "/")
        assert status == 200


def test_a_picture_to_complete_is_refused_where_there_is_no_encoder(tmp_path: Path) -> None:
    import base64
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, format="PNG")
    picture = base64.b64encode(buffer.getvalue()).decode()
    with live_server(tmp_path, gated("min-dalle", dvae=tiny_vqgan(has_encoder=False))) as live:
        body = {"prompt": "red apple", "num_images": 1, "image": picture, "keep_rows": 1}
        status, _, text = live.request("POST", "/api/draw", body)
        assert status in (400, 422) and b"published without its encoder" in text, (status, text)
