"""The microscope: its numbers are the model's own, its masks the model's real ones, and no other model is looked through."""

import asyncio
import io
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from torch import Tensor

from dalle.attention import LAYER_KINDS, dense_mask
from dalle.evaluation.microscope import draw_token, read_picture, visible_cells
from dalle.generation.request import GenerationOptions
from dalle.images import to_images
from dalle.pipeline import DallePipeline
from dalle.serving.app import create_app
from dalle.serving.history import History, NewPicture
from dalle.serving.routes.microscope import Microscope
from dalle.serving.settings import Settings
from dalle.transformer import Transformer
from tests.live import live_server
from tests.tiny import GRID, N_CODES, N_TEXT, tiny_pipe, tiny_transformer

T = TypeVar("T")
N = GRID * GRID
PLAIN = GenerationOptions()


@pytest.fixture(scope="module")
def pipe() -> DallePipeline:
    return tiny_pipe(["a red apple", "a blue boat"])


@pytest.fixture(scope="module")
def client(pipe: DallePipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    app = create_app(Settings(data_dir=tmp_path_factory.mktemp("data")), pipe)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        yield client


@pytest.fixture(scope="module")
def history(client: TestClient) -> History:
    found: History = client.app.state.serving.history  # type: ignore[attr-defined]
    return found


def store(history: History, pipe: DallePipeline, caption: str, **changes: Any) -> tuple[str, Tensor]:
    """Draw a picture into the history; its id and tokens."""
    settings = {"seed": 3} | changes
    out = pipe(caption, **settings)
    tokens = out.tokens[0]
    data = tokens.numpy().astype("<u2").tobytes()
    picture = NewPicture(b"png", dict(out.recipes[0]), caption, settings["seed"], None, 0, True, data)
    return history.add([picture], "job")[0], tokens


def text_of(pipe: DallePipeline, caption: str) -> Tensor:
    return torch.as_tensor(pipe.tokenizer.pad(pipe.tokenizer.encode(caption)), dtype=torch.int64)


# What the model says of each cell


def test_probabilities_are_those_of_the_models_own_loss(pipe: DallePipeline) -> None:
    text, tokens = text_of(pipe, "a red apple"), torch.arange(N).view(GRID, GRID)
    reading = read_picture(pipe.transformer, text, tokens, PLAIN)
    with torch.no_grad():
        loss = pipe.transformer.loss(text[None], tokens.view(1, -1)).image
    probability = torch.tensor(reading.probability)
    assert probability.shape == (GRID, GRID)
    torch.testing.assert_close(-probability.log().mean(), loss, atol=1e-5, rtol=1e-5)


def test_every_cell_is_read_as_it_was_drawn_one_by_one(pipe: DallePipeline) -> None:
    """The slow twin: each cell's distribution from a pass in which all later cells hold something else."""
    text = text_of(pipe, "a blue boat")
    tokens = torch.randint(N_CODES, (GRID, GRID), generator=torch.Generator().manual_seed(5))
    reading = read_picture(pipe.transformer, text, tokens, PLAIN)
    for cell in range(N):
        cut = tokens.flatten().clone()
        cut[cell:] = 0
        with torch.no_grad():
            p = pipe.transformer(text[None], cut[None])[1][0, cell].double().softmax(dim=0).numpy()
        row, column = divmod(cell, GRID)
        own = p[tokens[row, column]]
        assert reading.probability[row][column] == pytest.approx(own, rel=1e-4)
        assert reading.entropy_bits[row][column] == pytest.approx(-(p * np.log2(p)).sum(), rel=1e-4)
        assert reading.rank[row][column] == 1 + sorted(p, reverse=True).index(own)
    assert reading.tokens == tokens.tolist()


def test_the_likeliest_tokens_have_rank_one(pipe: DallePipeline, history: History) -> None:
    _, tokens = store(history, pipe, "a red apple", temperature=0.0)
    reading = read_picture(pipe.transformer, text_of(pipe, "a red apple"), tokens, PLAIN)
    assert all(rank == 1 for row in reading.rank for rank in row)


def test_a_model_that_knows_nothing_has_the_whole_codebooks_entropy(pipe: DallePipeline) -> None:
    blind = tiny_transformer(pipe.tokenizer.n_vocab)
    torch.nn.init.zeros_(blind.image_head.weight)
    tokens = torch.zeros(GRID, GRID, dtype=torch.int64)
    reading = read_picture(blind, text_of(pipe, "a red apple"), tokens, PLAIN)
    bits = [bit for row in reading.entropy_bits for bit in row]
    assert bits == pytest.approx([math.log2(N_CODES)] * N)
    assert all(rank == 1 for row in reading.rank for rank in row)  # none is likelier


# The distribution that a picture was drawn from


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.7, "guidance": 3.0},
        {"top_k": 3},
        {"top_p": 0.6, "guidance": 2.0},
        {"temperature": 2.0, "top_k": 5, "top_p": 0.5},
    ],
)
def test_every_drawn_token_was_possible_and_as_likely_as_its_settings_made_it(
    pipe: DallePipeline, history: History, settings: dict[str, Any]
) -> None:
    options = GenerationOptions(**settings)
    _, tokens = store(history, pipe, "a blue boat", **settings)
    text = text_of(pipe, "a blue boat")
    reading = read_picture(pipe.transformer, text, tokens, options)
    with torch.no_grad():
        with_caption, without = (
            pipe.transformer(row[None], tokens.view(1, -1))[1][0].double().numpy()
            for row in (text, text_of(pipe, ""))
        )
    logits = without + options.guidance * (with_caption - without)
    for cell, token in enumerate(tokens.flatten().tolist()):
        found = reading.drawn_probability[cell // GRID][cell % GRID]
        assert found > 0
        assert found == pytest.approx(chance_of(token, logits[cell], options), rel=1e-3)


def chance_of(token: int, logits: Any, options: GenerationOptions) -> float:
    """The slow twin: sorts all tokens, cuts off what the settings cut off, and shares the rest out."""
    order = np.argsort(-logits, kind="stable")
    if options.temperature == 0:
        return float(order[0] == token)
    kept = order[: options.top_k]
    p = np.exp((logits[kept] - logits[order[0]]) / options.temperature)
    p /= p.sum()
    if options.top_p is not None:
        n = int((np.cumsum(p) < options.top_p - 1e-12).sum()) + 1
        kept, p = kept[:n], p[:n] / p[:n].sum()
    return float(p[kept == token].sum())


# Masks


def masked(kind: str) -> Transformer:
    return tiny_transformer(50, n_layers=1, layers=(kind,))


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_visible_cells_are_those_of_the_dense_mask(kind: str) -> None:
    """Cell c is drawn from slot T + c of the stream; slot T + 1 + j holds cell j."""
    mask = dense_mask(kind, N_TEXT, GRID, kernel=3)
    for cell in range(N):
        row = mask[N_TEXT + cell]
        assert visible_cells(masked(kind), 0, cell) == row[N_TEXT + 1 :].nonzero().flatten().tolist()
        assert row[: N_TEXT + 1].all()  # the whole caption


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_a_cell_that_is_not_visible_changes_nothing_and_a_visible_one_does(kind: str) -> None:
    """The real model's answer, by changing one cell at a time: in one layer what it reads is its mask."""
    model = masked(kind)
    with torch.no_grad():
        model.layers[0].attention.qkv.weight *= 0.1  # no key is so weak that it rounds away
    text = torch.arange(50, 50 + N_TEXT)[None]
    tokens = torch.arange(N)[None]
    with torch.no_grad():
        before = model(text, tokens)[1][0]
        for changed in range(N - 1):
            other = tokens.clone()
            other[0, changed] = 40
            differs = (model(text, other)[1][0] - before).abs().amax(dim=1) > 1e-6
            seen = [changed in visible_cells(model, 0, cell) for cell in range(N)]
            assert differs.tolist() == seen


@pytest.mark.parametrize(("layer", "cell"), [(-1, 0), (1, 0), (0, -1), (0, N)])
def test_a_layer_or_cell_that_is_none_is_one_clear_line(layer: int, cell: int) -> None:
    with pytest.raises(ValueError, match=r"^(layer|cell) is -?\d+; .* has 0 to \d+$"):
        visible_cells(masked("row"), layer, cell)


# The codebook


def test_a_tokens_picture_is_the_middle_cell_of_a_grid_of_it(pipe: DallePipeline) -> None:
    with torch.no_grad():
        whole = to_images(pipe.dvae.decode(torch.full((1, GRID, GRID), 9)))[0]
    with Image.open(io.BytesIO(draw_token(pipe.dvae, 9))) as swatch:
        assert swatch.size == (8, 8)
        assert swatch.tobytes() == whole.crop((16, 16, 24, 24)).tobytes()


def test_different_tokens_look_different(pipe: DallePipeline) -> None:
    assert len({draw_token(pipe.dvae, token) for token in range(8)}) > 4


# Over HTTP


def test_a_stored_picture_is_looked_into(client: TestClient, pipe: DallePipeline, history: History) -> None:
    id, tokens = store(history, pipe, "a blue boat")
    answer = client.get(f"/api/pictures/{id}/microscope").json()
    expected = read_picture(pipe.transformer, text_of(pipe, "a blue boat"), tokens, PLAIN)
    assert answer["tokens"] == tokens.tolist() and answer["grid"] == GRID and answer["vocabulary"] == N_CODES
    assert np.allclose(answer["probability"], expected.probability, rtol=1e-4)
    assert np.allclose(answer["entropy_bits"], expected.entropy_bits, rtol=1e-4)
    assert answer["max_entropy_bits"] == math.log2(N_CODES) and answer["given"] is None
    assert answer["layers"] == [{"layer": 0, "mask": "row"}, {"layer": 1, "mask": "conv"}]


def test_cells_that_were_given_are_named(client: TestClient, pipe: DallePipeline, history: History) -> None:
    id, _ = store(history, pipe, "a blue boat", image=Image.new("RGB", (32, 32), "red"), keep_rows=1)
    given = client.get(f"/api/pictures/{id}/microscope").json()["given"]
    assert given == [[True] * GRID] + [[False] * GRID] * (GRID - 1)


def test_a_picture_of_another_model_is_refused_in_one_line(
    client: TestClient, pipe: DallePipeline, history: History
) -> None:
    out = pipe("a red apple")
    recipe = dict(out.recipes[0]) | {"model_sha256": "0" * 64, "model": "other"}
    data = out.tokens[0].numpy().astype("<u2").tobytes()
    [id] = history.add([NewPicture(b"png", recipe, "a red apple", 0, None, 0, True, data)], "job")
    answer = client.get(f"/api/pictures/{id}/microscope")
    assert answer.status_code == 400 and "drawn by model other" in answer.json()["error"]["message"]


def test_a_deleted_picture_is_not_looked_into_again(
    client: TestClient, pipe: DallePipeline, history: History
) -> None:
    id, _ = store(history, pipe, "a red apple")
    assert client.get(f"/api/pictures/{id}/microscope").status_code == 200
    history.delete(id)
    assert client.get(f"/api/pictures/{id}/microscope").status_code == 404


def test_a_picture_is_read_once_and_on_the_models_own_thread(pipe: DallePipeline, history: History) -> None:
    n_runs = 0

    async def run(work: Callable[[], T]) -> T:
        nonlocal n_runs
        n_runs += 1
        return work()

    microscope = Microscope(pipe, history, run)
    id, _ = store(history, pipe, "a red apple")
    picture = history.get(id)
    assert picture is not None

    async def twice() -> None:
        assert await microscope.look(picture) == await microscope.look(picture)
        assert await microscope.swatch(3) == await microscope.swatch(3)

    asyncio.run(twice())
    assert n_runs == 2


def test_requests_that_wait_for_the_model_hold_up_no_other_and_count_as_slots(tmp_path: Path) -> None:
    """A hundred of them took all threads, and the page waited for the model."""
    with live_server(tmp_path, max_queue=16) as live:
        live.pipe.gate.clear()
        with ThreadPoolExecutor(60) as pool:
            drawing = pool.submit(live.events, {"prompt": "a dog"})
            assert live.pipe.at_gate.wait(30)
            waiting = [pool.submit(live.request, "GET", f"/api/codebook/{i}.png") for i in range(55)]
            try:
                wait(waiting, timeout=30, return_when=FIRST_COMPLETED)  # those refused
                start = time.monotonic()
                assert live.request("GET", "/")[0] == 200
                assert time.monotonic() - start < 5
            finally:
                live.pipe.gate.set()
            assert drawing.result()[-1][0] == "settled"
            codes = Counter(one.result()[0] for one in waiting)
        assert set(codes) == {200, 503} and codes[200] >= 15, codes
        assert live.state.queue.n_slots == 0


def test_a_tokens_picture_is_sent_once(client: TestClient, pipe: DallePipeline) -> None:
    first = client.get("/api/codebook/9.png")
    assert first.content == draw_token(pipe.dvae, 9) and first.headers["content-type"] == "image/png"
    again = client.get("/api/codebook/9.png", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304 and again.content == b""


def test_masks_are_told(client: TestClient) -> None:
    answer = client.get("/api/masks/0/5").json()
    assert answer == {"cells": [0, 1, 2, 3, 4], "text": True}


@pytest.mark.parametrize(
    "path", [f"/api/codebook/{N_CODES}.png", "/api/codebook/-1.png", "/api/masks/2/0", f"/api/masks/0/{N}"]
)
def test_a_number_that_names_nothing_is_a_404(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("path", ["/api/codebook/x.png", "/api/masks/0/x", "/api/masks/0/" + "9" * 5000])
def test_what_is_no_number_is_refused(client: TestClient, path: str) -> None:
    assert 400 <= client.get(path).status_code < 500
