"""Models so small that a test can make one: random weights, large enough for every output to depend on every input."""

import os
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from dalle.clip import CLIP, CLIPConfig
from dalle.clip_tokenizer import CLIPTokenizer
from dalle.config import validate
from dalle.dvae import DiscreteVAE, DVAEConfig
from dalle.generation.kernels.native import find_compiler
from dalle.pipeline import DallePipeline
from dalle.tokenizer import Tokenizer, TokenizerConfig
from dalle.transformer import Transformer, TransformerConfig

GRID, N_CODES, N_TEXT = 4, 64, 12
LARGE = {"output_size": 64, "decoder_widths": (16, 8, 8)}  # of a dVAE that draws more pixels than it reads

needs_compiler = pytest.mark.skipif(
    find_compiler() is None and not os.environ.get("DALLE_CI"), reason="needs a C compiler"
)


def tiny_tokenizer(captions: Iterable[str], n_text: int = N_TEXT) -> Tokenizer:
    config = TokenizerConfig(vocab_size=360, max_tokens=n_text, space_tokens=False)
    return Tokenizer.train(captions, config)


def tiny_dvae(**changes: Any) -> DiscreteVAE:
    """Reads 32 px pictures as 4x4 tokens of 64; `changes` are settings."""
    settings = {
        "image_size": 8 * GRID,
        "n_codes": N_CODES,
        "quantizer": "fsq",
        "fsq_levels": (4, 4, 4),
        "trunk": "light",
        "likelihood": "mse_l1",
        "d_hidden": 8,
        "d_code": 8,
        "n_blocks": 1,
    }
    config = DVAEConfig.model_validate(settings | changes)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        dvae = DiscreteVAE(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in dvae.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return dvae.eval()


def tiny_transformer(n_text_vocab: int, **changes: Any) -> Transformer:
    """Two layers that write what `tiny_dvae` reads; `changes` are settings."""
    settings = {
        "n_layers": 2,
        "n_heads": 2,
        "d_head": 8,
        "n_text_tokens": N_TEXT,
        "n_text_vocab": n_text_vocab,
        "grid_size": GRID,
        "n_image_vocab": N_CODES,
        "conv_kernel": 3,
        "layers": ("row", "conv"),
    }
    transformer = Transformer(TransformerConfig.model_validate(settings | changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
    return transformer.eval()


def tiny_clip(tokenizer: Tokenizer | CLIPTokenizer, seed: int = 4, **changes: Any) -> CLIP:
    """One layer a tower, for 16 px pictures and a tokenizer's captions; `changes` are settings."""
    settings = {
        "d_embed": 8,
        "image_size": 16,
        "image_tower": "vit",
        "image_layers": 1,
        "image_width": 64,
        "patch_size": 8,
        "n_text_tokens": tokenizer.max_tokens,
        "n_text_vocab": tokenizer.n_vocab,
        "text_layers": 1,
        "text_width": 64,
        "text_tokens": "dalle" if isinstance(tokenizer, Tokenizer) else "openai",
        "activation": "gelu",
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIP(validate(CLIPConfig, settings | changes, "test")).eval()


def tiny_pipe(captions: Iterable[str], dvae: DiscreteVAE | None = None) -> DallePipeline:
    tokenizer = tiny_tokenizer(captions)
    return DallePipeline(tokenizer, dvae or tiny_dvae(), tiny_transformer(tokenizer.n_vocab))
