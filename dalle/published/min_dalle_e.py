"""minDALL-E: a dense GPT of 1.3 billion parameters over 64 text tokens and 16x16 VQGAN tokens.

Source: kakaobrain/minDALL-E (its weights are CC BY-NC-SA 4.0). Pads are ordinary text tokens that later slots see.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dalle.published.gpt import Block, GPTConfig, SlotGPT
from dalle.published.stream import check_text


class MinDalleEConfig(GPTConfig):
    """Sizes of a `MinDalleE`: 42 layers, 24 heads, 1536 wide, 64 text tokens of 16384, a 16x16 grid of 16384."""

    pad_id: Annotated[int, Field(ge=0)]  # [PAD] of its tokenizer


class MinDalleE(SlotGPT):
    """p(text, image) as one causal stream."""

    schema = MinDalleEConfig
    config: MinDalleEConfig

    def __init__(self, config: MinDalleEConfig) -> None:
        n_slots = config.n_text_tokens + config.n_image_tokens
        super().__init__(
            config,
            partial(Block, config, F.gelu),
            {"causal": torch.ones(n_slots, n_slots, dtype=torch.bool, device="cpu").tril()},
            ["causal"] * config.n_layers,
            n_caption=config.n_text_tokens,
            n_text_logits=config.n_text_vocab,
            head_bias=False,
        )
        self.text_token = nn.Embedding(config.n_text_vocab, config.d_model)
        self.image_token = nn.Embedding(config.n_image_vocab, config.d_model)
        self.text_position = nn.Embedding(config.n_text_tokens, config.d_model)
        self.image_position = nn.Embedding(config.n_image_tokens, config.d_model)

    def embed_caption(self, text: Tensor) -> Tensor:
        """Embed captions (B, T) -> (B, T, C); ValueError for another shape or unknown ids."""
        check_text(text, self.config.n_text_tokens, self.config.n_text_vocab)
        return cast(Tensor, self.text_token(text) + self.text_position.weight)

    def embed_image(self, tokens: Tensor, first: int) -> Tensor:
        """Embed image tokens (B, n) from raster index `first` on -> (B, n, C)."""
        positions = self.image_position.weight[first : first + tokens.shape[1]]
        return cast(Tensor, self.image_token(tokens) + positions)

    def text_targets(self, text: Tensor) -> Tensor:
        """Return the text tokens but the first, which nothing predicts."""
        return text[:, 1:]

    def null_text(self) -> Tensor:
        """Return the empty caption, (T,): pads."""
        return torch.full((self.config.n_text_tokens,), self.config.pad_id, dtype=torch.int64)
