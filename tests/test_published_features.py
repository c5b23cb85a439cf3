"""All that a model of ours can do, every published token model can: one table, ours included."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dalle.generation.request import InvalidRequest
from dalle.generation.rerank import Ranker
from dalle.images import center_crop, read_recipe, save_png, to_tensor
from dalle.pipeline import DallePipeline
from dalle.published.vqgan import VQGAN
from tests.tiny import tiny_clip, tiny_pipe, tiny_tokenizer
from tests.tiny_published import (
    GRID,
    N_CODES,
    TOKEN_MODELS,
    one_thread,  # noqa: F401 - every test here runs under it
    published_pipe,
    tiny_vqgan,
)

OURS = "ours"
CAPTIONS = ["red apple", "two blue cats", "boat"]
N = GRID * GRID


@pytest.fixture(scope="module", params=[OURS, *TOKEN_MODELS])
def pipe(request: pytest.FixtureRequest) -> DallePipeline:
    return tiny_pipe(CAPTIONS) if request.param == OURS else published_pipe(request.param)


@pytest.fixture
def photo() -> Image.Image:
    pixels = torch.rand(40, 60, 3, generator=torch.Generator().manual_seed(3))
    return Image.fromarray((pixels * 255).to(torch.uint8).numpy())


def whole_logits(pipe: DallePipeline, text: Tensor, tokens: Tensor) -> Tensor:
    """Logits (B, N, K) by one forward pass without a cache."""
    model: Any = pipe.transformer
    with torch.no_grad():
        logits = model(text, tokens.flatten(1))
    return (logits[1] if isinstance(logits, tuple) else logits).float()  # type: ignore[no-any-return]


def read(pipe: DallePipeline, caption: str) -> Tensor:
    return pipe.sampler.read(caption, False)[0]


def test_seeds_mean_the_same_alone_and_in_any_batch(pipe: DallePipeline) -> None:
    together = pipe(CAPTIONS, num_images_per_prompt=2, seed=20)
    assert together.tokens.shape == (6, GRID, GRID) and len(together.images) == 6
    assert len({tuple(tokens.flatten().tolist()) for tokens in together.tokens}) == 6
    for i in (0, 3):
        assert torch.equal(pipe(CAPTIONS[i // 2], seed=20 + i).tokens[0], together.tokens[i])
    small = pipe(CAPTIONS, num_images_per_prompt=2, seed=20, rows_per_batch=3)
    assert torch.equal(small.tokens, together.tokens)


@pytest.mark.parametrize("guidance", [1.0, 0.0, 3.0, 16.0])
def test_likeliest_tokens_under_guidance_are_those_of_whole_passes(
    pipe: DallePipeline, guidance: float
) -> None:
    tokens = pipe(CAPTIONS[1], temperature=0, guidance=guidance).tokens
    null = pipe.transformer.null_text()
    conditional = whole_logits(pipe, read(pipe, CAPTIONS[1])[None], tokens)
    unconditional = whole_logits(pipe, null[None], tokens)
    mixed = unconditional + guidance * (conditional - unconditional)
    chosen = mixed.gather(-1, tokens.view(1, N, 1))[..., 0]
    # Equal but for rounding, which large scales amplify.
    assert float((mixed.amax(dim=-1) - chosen).max()) <= 1e-4 * (1 + guidance) * float(mixed.abs().max())


def test_temperature_top_k_and_top_p_narrow_the_choice(pipe: DallePipeline) -> None:
    likeliest = pipe(CAPTIONS[0], temperature=0).tokens
    assert torch.equal(pipe(CAPTIONS[0], top_k=1, seed=7).tokens, likeliest)
    assert torch.equal(pipe(CAPTIONS[0], top_p=1e-9, seed=7).tokens, likeliest)
    assert torch.equal(pipe(CAPTIONS[0], temperature=1e-7, seed=7).tokens, likeliest)
    assert not torch.equal(pipe(CAPTIONS[0], temperature=5, seed=7).tokens, likeliest)


@pytest.mark.parametrize("kept", ["rows", "mask"])
def test_completion_keeps_the_pictures_tokens(pipe: DallePipeline, photo: Image.Image, kept: str) -> None:
    pixels = to_tensor([center_crop(photo, pipe.dvae.image_size)])
    with torch.no_grad():
        own = pipe.dvae.encode(pixels)[0]
    if kept == "rows":
        out = pipe(CAPTIONS[0], image=photo, keep_rows=2, num_images_per_prompt=2)
        assert all(torch.equal(tokens[:2], own[:2]) for tokens in out.tokens)
    else:
        mask = Image.new("L", photo.size, 0)
        mask.paste(255, (photo.width // 2, 0, photo.width, photo.height))
        out = pipe(CAPTIONS[0], image=photo, mask=mask, num_images_per_prompt=2)
        assert all(torch.equal(tokens[:, : GRID // 2], own[:, : GRID // 2]) for tokens in out.tokens)
    assert not torch.equal(out.tokens[0], out.tokens[1])
    assert out.recipes[0]["completion"] is not None


def test_candidates_are_ranked_by_a_clip(pipe: DallePipeline) -> None:
    tokenizer = tiny_tokenizer(CAPTIONS)
    ranker = Ranker(tiny_clip(tokenizer), tokenizer)
    out = pipe(CAPTIONS[0], num_images_per_prompt=2, num_candidates=6, ranker=ranker, seed=3)
    assert out.scores is not None and list(out.scores) == sorted(out.scores, reverse=True)
    every = pipe(CAPTIONS[0], num_images_per_prompt=6, ranker=ranker, seed=3)
    assert every.seeds[:2] == out.seeds


def test_recipe_in_a_picture_draws_it_again(pipe: DallePipeline, tmp_path: Path) -> None:
    out = pipe(CAPTIONS, num_images_per_prompt=2, seed=5, guidance=2.5, top_k=20)
    save_png(out.images[3], tmp_path / "picture.png", out.recipes[3])
    image, is_same = pipe.rerun(read_recipe(tmp_path / "picture.png"))
    assert is_same and image.tobytes() == out.images[3].tobytes()


def test_saved_models_load_and_draw_the_same(pipe: DallePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    again = DallePipeline.from_pretrained(tmp_path / "model", dtype="float32")
    assert type(again.transformer) is type(pipe.transformer) and type(again.dvae) is type(pipe.dvae)
    assert again.model_sha256 == pipe.model_sha256
    out, before = again(CAPTIONS[0], seed=9), pipe(CAPTIONS[0], seed=9)
    assert torch.equal(out.tokens, before.tokens) and out.images[0].tobytes() == before.images[0].tobytes()
    again.save_pretrained(tmp_path / "again")
    assert DallePipeline.from_pretrained(tmp_path / "again").name == str(tmp_path / "again")


def test_bfloat16_draws_and_reruns_in_its_own_arithmetic(pipe: DallePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    half = DallePipeline.from_pretrained(tmp_path / "model", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    out = half(CAPTIONS[:2], seed=2, guidance=3)
    assert 0 <= int(out.tokens.min()) <= int(out.tokens.max()) < N_CODES
    assert half.rerun(out.recipes[1])[1]
    full = DallePipeline.from_pretrained(tmp_path / "model", dtype="float32")
    assert full.rerun(out.recipes[1])[1], "a rerun takes the recipe's dtype, whatever the model is held in"


def test_progress_is_told_and_a_callback_can_stop(pipe: DallePipeline) -> None:
    told: list[tuple[int, int]] = []
    pipe(CAPTIONS[:2], progress=lambda done, total: told.append((done, total)))
    assert told == [(row + 1, GRID) for row in range(GRID)]
    out = pipe(CAPTIONS[0], callback_on_row_end=lambda _, row, tokens: row == 1)
    assert out.is_stopped and not out.images


def test_captions_that_are_too_long_are_cut_only_on_request(pipe: DallePipeline) -> None:
    long = "two red cats " * 10
    with pytest.raises(InvalidRequest, match="tokens; the model reads") as caught:
        pipe(long)
    assert caught.value.field == "prompt"
    assert pipe(long, truncate=True).recipes[0]["truncation"] is not None


@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_int8_and_native_say_that_they_are_of_our_own_model(name: str, tmp_path: Path) -> None:
    published_pipe(name).save_pretrained(tmp_path / "model")
    for more in ({"dtype": "int8"}, {"native": True}):
        with pytest.raises(ValueError, match="draws in its own dtype, without compiled attention"):
            DallePipeline.from_pretrained(tmp_path / "model", **more)  # type: ignore[arg-type]


def test_a_model_without_encoder_refuses_pictures_before_it_draws(photo: Image.Image) -> None:
    pipe = published_pipe("min-dalle", dvae=tiny_vqgan(has_encoder=False))
    assert isinstance(pipe.dvae, VQGAN)
    with pytest.raises(InvalidRequest, match="published without its encoder") as caught:
        pipe(CAPTIONS[0], image=photo, keep_rows=1)
    assert caught.value.field == "image"
    assert len(pipe(CAPTIONS[0]).images) == 1


def test_parts_of_different_models_are_refused() -> None:
    with pytest.raises(ValueError, match="the dVAE has 32 codes; the transformer was made for 64"):
        published_pipe("min-dalle", dvae=tiny_vqgan(n_codes=32))
