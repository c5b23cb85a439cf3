"""The two seams: our models and other people's are drawn by one engine, and its tokens are their likeliest."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle.generation.engine import Engine
from dalle.generation.request import GenerationOptions, ImageRequest
from dalle.generation.sampler import Sampler
from dalle.image_tokenizer import ImageTokenizer
from dalle.published.dalle_pytorch import DallePytorch, DallePytorchConfig
from dalle.published.min_dalle import MinDalle, MinDalleConfig
from dalle.published.vqgan import VQGAN, VQGANConfig
from dalle.token_model import TokenDecoder, TokenModel
from tests.tiny import GRID, N_CODES, N_TEXT, tiny_dvae, tiny_tokenizer, tiny_transformer

CAPTIONS = ["a red apple", "two cats"]
N_VOCAB = 360


def ours() -> TokenModel:
    return tiny_transformer(N_VOCAB)


def dalle_pytorch() -> TokenModel:
    config = DallePytorchConfig(
        n_layers=2,
        n_heads=2,
        d_head=8,
        d_model=16,
        n_text_tokens=N_TEXT,
        n_text_vocab=N_VOCAB,
        n_image_vocab=N_CODES,
        grid_size=GRID,
        attention=("full", "axial_row"),
        is_rotary=False,
        shifts_tokens=True,
    )
    return scrambled(DallePytorch(config))


def min_dalle() -> TokenModel:
    config = MinDalleConfig(
        n_layers=1,
        n_heads=2,
        d_model=16,
        d_gated=24,
        n_text_tokens=N_TEXT,
        n_text_vocab=N_VOCAB,
        n_image_vocab=N_CODES,
        n_image_ids=N_CODES + 1,
        grid_size=GRID,
        start_token=N_CODES,
    )
    return scrambled(MinDalle(config))


def scrambled(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
    return model.eval()


def image_logits(model: TokenModel, text: Tensor, image: Tensor) -> Tensor:
    """Logits (B, N, K) by the model's forward pass over whole pictures."""
    with torch.no_grad():
        out = model(text, image)  # type: ignore[operator]
    return out[1] if isinstance(out, tuple) else out


@pytest.mark.parametrize("build", [ours, dalle_pytorch, min_dalle])
def test_the_engine_draws_the_likeliest_tokens_of_any_model(build: Callable[[], TokenModel]) -> None:
    model = build()
    text = torch.randint(3, 300, (2, N_TEXT), generator=torch.Generator().manual_seed(1))
    drawn = Engine(model).generate(text, [0, 1, 2, 3], GenerationOptions(temperature=0)).flatten(1)
    expected = torch.zeros_like(drawn)
    for position in range(GRID * GRID):
        logits = image_logits(model, text.repeat_interleave(2, dim=0), expected)
        expected[:, position] = logits[:, position].argmax(dim=-1)
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("build", [dalle_pytorch, min_dalle])
def test_other_peoples_models_draw_in_their_own_dtype_only(build: Callable[[], TokenModel]) -> None:
    model = build()
    assert isinstance(model, TokenDecoder)
    for arithmetic in ({"is_int8": True}, {"is_native": True}):
        with pytest.raises(ValueError, match="draws in its own dtype"):
            Engine(model, **arithmetic)


def vqgan() -> VQGAN:
    config = VQGANConfig(
        image_size=8 * GRID,
        n_codes=N_CODES,
        d_code=8,
        d_latent=8,
        d_hidden=32,
        multipliers=(1, 1, 1, 1),
        n_blocks=1,
        attention_sizes=(GRID,),
        quantizer="nearest",
    )
    torch.manual_seed(0)
    return VQGAN(config).eval()


@pytest.mark.parametrize("dvae", [tiny_dvae(), vqgan()])
def test_a_sampler_draws_with_any_image_tokenizer(dvae: ImageTokenizer) -> None:
    tokenizer = tiny_tokenizer(CAPTIONS)
    sampler = Sampler(tokenizer, dvae, tiny_transformer(tokenizer.n_vocab))
    requests = sampler.prepare(ImageRequest(CAPTIONS, num_images_per_prompt=2), None)
    [batch] = sampler.plan(requests, None)
    tokens = sampler.sample(batch, lambda *_: False, 1)
    pictures = sampler.decode(tokens)
    assert pictures.shape == (4, 3, dvae.output_size, dvae.output_size)
    top = sampler.decode_together(tokens[:, :2])
    assert top.shape == (4, 3, dvae.output_size // 2, dvae.output_size)
    assert sampler.pictures(tokens)[0].size == (dvae.output_size, dvae.output_size)
