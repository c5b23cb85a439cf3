"""A plain GPT over caption slots and image slots: what ru-dalle and minDALL-E have in common.

A subclass says how slots are embedded and what each layer's slots see. The last caption slot predicts the first image
token.

Shapes: B batch, P captions, T text tokens, A caption slots, N image tokens, R pictures, S slots, C width, H heads, D head
width, V text ids, K codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dalle.config import Config
from dalle.published.saved import SavedModule
from dalle.published.stream import (
    MaskRows,
    SlotCache,
    Stream,
    attend_step,
    norm_in_float32,
    repeat_rows,
    split_heads,
    weighted_losses,
)
from dalle.token_model import Losses

Count = Annotated[int, Field(gt=0)]
Branch = Callable[[Tensor], Tensor]
IMAGE_WEIGHT = 7.0  # of image tokens in the loss; text counts 1


class GPTConfig(Config):
    """Sizes that every such model has."""

    n_layers: Count
    n_heads: Count
    d_model: Count  # C, a multiple of n_heads
    n_text_tokens: Count  # T
    n_text_vocab: Count  # ids of the tokenizer
    n_image_vocab: Count  # K
    grid_size: Annotated[int, Field(gt=1)]  # G

    @property
    def n_image_tokens(self) -> int:
        """Image tokens N of a picture."""
        return self.grid_size**2

    @property
    def n_text_ids(self) -> int:
        """Ids that a caption may hold."""
        return self.n_text_vocab


class Block(nn.Module):
    """Pre-norm attention and MLP; with sandwich norms, one more behind each."""

    def __init__(self, config: GPTConfig, activation: Branch, has_sandwich_norms: bool = False) -> None:
        super().__init__()
        width = config.d_model
        self.n_heads, self.activation = config.n_heads, activation
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.out_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * has_sandwich_norms))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project (B, S, C) to queries, keys and values (B, H, S, D)."""
        q, k, v = (split_heads(part, self.n_heads) for part in self.qkv(self.attention_norm(x)).chunk(3, -1))
        return q, k, v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add what attention gathered, then the MLP: (B, S, C) twice -> (B, S, C)."""
        branch = self.out(attended)
        x = x + (self.out_norms[0](branch) if len(self.out_norms) else branch)
        branch = self.contract(self.activation(self.expand(self.mlp_norm(x))))
        return cast(Tensor, x + (self.out_norms[1](branch) if len(self.out_norms) else branch))


class SlotGPT(SavedModule):
    """p(text, image) as one autoregressive stream of A caption slots and N - 1 image slots."""

    config: GPTConfig

    def __init__(
        self,
        config: GPTConfig,
        block: Callable[[], Block],
        masks: dict[str, Tensor],  # bool (S, S) by name
        kinds: Sequence[str],  # of each layer, the name of its mask
        *,
        n_caption: int,
        n_text_logits: int,
        head_bias: bool,
    ) -> None:
        super().__init__(config)
        self.n_caption, self.masks, self.kinds = n_caption, masks, kinds
        self.layers = nn.ModuleList(block() for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.d_model)
        self.text_head = nn.Linear(config.d_model, n_text_logits, bias=head_bias)
        self.image_head = nn.Linear(config.d_model, config.n_image_vocab, bias=head_bias)
        self._rows: dict[str, MaskRows] = {}

    # What a subclass says

    def embed_caption(self, text: Tensor) -> Tensor:
        """Embed captions (B, T) -> (B, A, C)."""
        raise NotImplementedError

    def embed_image(self, tokens: Tensor, first: int) -> Tensor:
        """Embed image tokens (B, n) from raster index `first` on -> (B, n, C)."""
        raise NotImplementedError

    def text_targets(self, text: Tensor) -> Tensor:
        """Return what the caption slots before the last predict, (B, A - 1)."""
        raise NotImplementedError

    # Whole streams

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of text tokens (B, A - 1, V) and image tokens (B, N, K) from all before each."""
        x = torch.cat([self.embed_caption(text), self.embed_image(image[:, :-1], 0)], dim=1)  # (B, S, C)
        masks = {kind: mask[: x.shape[1], : x.shape[1]].to(x.device) for kind, mask in self.masks.items()}
        for layer, kind in zip(cast(Iterable[Block], self.layers), self.kinds, strict=True):
            q, keys, values = layer.project(x)
            attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=masks[kind])
            x = layer.finish(x, attended.transpose(1, 2).flatten(2))
        x = self.norm(x)
        last = self.n_caption - 1
        return self.text_head(x[:, :last].to(self.text_head.weight.dtype)).float(), self.head(
            x[:, last:]
        ).float()

    def loss(self, text: Tensor, image: Tensor) -> Losses:
        """Return (text + 7 * image) / 8 and both cross-entropies, in nats per token."""
        text_logits, image_logits = self(text, image)
        return Losses(
            *weighted_losses(text_logits, self.text_targets(text), image_logits, image, IMAGE_WEIGHT)
        )

    # Draw

    @torch.no_grad()
    def start(self, text: Tensor, counts: Sequence[int]) -> tuple[Tensor, Stream]:
        """Read captions (P, T), each for counts[p] pictures -> states (R, C), and the stream to go on with."""
        x = self.embed_caption(text)
        caches = []
        for layer in cast(Iterable[Block], self.layers):
            q, keys, values = layer.project(x)
            caches.append(SlotCache((keys, values), sum(counts), self.config.n_image_tokens))
            attended = F.scaled_dot_product_attention(q, keys, values, is_causal=True)
            x = layer.finish(x, attended.transpose(1, 2).flatten(2))
        return repeat_rows(x[:, -1], counts), Stream(counts, caches)

    @torch.no_grad()
    def step(self, tokens: Tensor, stream: Stream) -> Tensor:
        """Take in the next image token of each picture, (R,) -> states (R, C) that predict the one after."""
        position = stream.n_read
        x = self.embed_image(tokens[:, None], position)  # (R, 1, C)
        for layer, cache, kind in zip(
            cast(Iterable[Block], self.layers), stream.layers, self.kinds, strict=True
        ):
            q, keys, values = (part[:, :, 0] for part in layer.project(x))
            cache.store_(position, keys, values)
            attended = attend_step(
                q * float(q.shape[-1] ** -0.5), cache, self._mask_rows(kind), position, stream.counts
            )
            x = layer.finish(x, attended[:, None])
        stream.n_read += 1
        return x[:, 0]

    def norm(self, state: Tensor) -> Tensor:
        """Return what the heads read of states (..., C)."""
        return norm_in_float32(self.final_norm, state)

    def head(self, normed: Tensor) -> Tensor:
        """Return logits (..., K) of the codes."""
        return cast(Tensor, self.image_head(normed.to(self.image_head.weight.dtype)))

    def _mask_rows(self, kind: str) -> MaskRows:
        if kind not in self._rows:
            self._rows[kind] = MaskRows(self.masks[kind], self.n_caption)
        return self._rows[kind]
