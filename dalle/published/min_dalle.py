"""DALL·E mini and mega: a BART that translates captions into VQGAN tokens.

Source: borisdayma/dalle-mini (Flax) and kuprel/min-dalle (its port to torch), whose arithmetic this is: pre- and
post-norms around attention (NormFormer), gated linear units with a norm inside, learned positions, no biases.
"Super-conditioning" is classifier-free guidance against the caption `<s></s>`.

Shapes: P captions, T text slots, R pictures, N = G * G image tokens, C width, H heads, D head width, K codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dalle.config import Config
from dalle.published.saved import SavedModule
from dalle.published.stream import (
    KeysValues,
    MaskRows,
    SlotCache,
    Stream,
    attend_step,
    by_caption,
    check_text,
    norm_in_float32,
    repeat_rows,
    split_heads,
)
from dalle.token_model import Losses

Count = Annotated[int, Field(gt=0)]


class MinDalleConfig(Config):
    """Sizes of a `MinDalle`; those of mini and mega are in brackets."""

    n_layers: Count  # of the encoder, and of the decoder [12, 24]
    n_heads: Count  # [16, 32]
    d_model: Count  # C [1024, 2048]
    d_gated: Count  # width inside the gated linear units [2730, 4096]
    n_text_tokens: Count = 64  # T, <s> and </s> included
    n_text_vocab: Count  # [50264, 50272]
    n_image_vocab: Count = 16384  # codes that are drawn, K
    n_image_ids: (
        Count  # rows of the image embedding and head; the decoder's own ids follow the codes [16385, 16416]
    )
    grid_size: Count = 16  # G
    # What the decoder reads first. dalle-mini trained with its BOS, 16384; min-dalle reads code 16383 since August 2022.
    start_token: Annotated[int, Field(ge=0)] = 16384
    bos_id: int = 0  # <s>
    pad_id: int = 1
    eos_id: int = 2  # </s>

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model is {self.d_model}; it must be a multiple of n_heads, {self.n_heads}")
        if self.start_token >= self.n_image_ids or self.n_image_vocab > self.n_image_ids:
            raise ValueError(
                f"start_token {self.start_token} and {self.n_image_vocab} codes do not fit {self.n_image_ids} image ids"
            )
        return self

    @property
    def n_image_tokens(self) -> int:
        """Image tokens N of a picture."""
        return self.grid_size**2

    @property
    def n_text_ids(self) -> int:
        """Ids that a caption may hold."""
        return self.n_text_vocab


class GatedMLP(nn.Module):
    """x + W_out LN(GELU(W_gate LN(x)) * W_value LN(x))."""

    def __init__(self, config: MinDalleConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.gate = nn.Linear(config.d_model, config.d_gated, bias=False)
        self.value = nn.Linear(config.d_model, config.d_gated, bias=False)
        self.inner_norm = nn.LayerNorm(config.d_gated)
        self.out = nn.Linear(config.d_gated, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        read = self.norm(x)
        return cast(Tensor, x + self.out(self.inner_norm(F.gelu(self.gate(read)) * self.value(read))))


class Attention(nn.Module):
    """x + LN(W_out attention(LN(x))), to itself or to what the encoder made of the caption."""

    def __init__(self, config: MinDalleConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.norm = nn.LayerNorm(config.d_model)
        self.q, self.k, self.v, self.out = (
            nn.Linear(config.d_model, config.d_model, bias=False) for _ in range(4)
        )
        self.out_norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, mask: Tensor | None, source: Tensor | None = None) -> Tensor:
        """(B, S, C) -> (B, S, C); `source` (B, T, C) stands for x itself when None; `mask` True where seen."""
        read = self.norm(x)
        keys, values = self.keys_values(read if source is None else source)
        q = split_heads(self.q(read), self.n_heads)
        attended = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, is_causal=mask is None and source is None
        )
        return self.add(x, attended.transpose(1, 2).flatten(2))

    def keys_values(self, source: Tensor) -> KeysValues:
        """Project (B, S, C) to keys and values (B, H, S, D)."""
        return split_heads(self.k(source), self.n_heads), split_heads(self.v(source), self.n_heads)

    def query(self, read: Tensor) -> Tensor:
        """Project one slot a picture, (R, C), to scaled queries (R, H, D)."""
        q: Tensor = self.q(read).view(len(read), self.n_heads, -1)
        return q * float(q.shape[-1] ** -0.5)

    def add(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add what attention gathered, (..., C), to the residual stream."""
        return cast(Tensor, x + self.out_norm(self.out(attended)))


class EncoderLayer(nn.Module):
    """Self-attention over the caption, then a gated MLP."""

    def __init__(self, config: MinDalleConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.mlp = GatedMLP(config)


class DecoderLayer(nn.Module):
    """Causal self-attention over image tokens, attention to the caption, a gated MLP."""

    def __init__(self, config: MinDalleConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.cross_attention = Attention(config)
        self.mlp = GatedMLP(config)


class Side(nn.Module):
    """What encoder and decoder share: embeddings with learned positions, a norm at each end."""

    def __init__(
        self, config: MinDalleConfig, n_ids: int, n_positions: int, layer: type[EncoderLayer | DecoderLayer]
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(n_ids, config.d_model)
        self.position = nn.Embedding(n_positions, config.d_model)
        self.embedding_norm = nn.LayerNorm(config.d_model)
        self.layers = nn.ModuleList(layer(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Embed tokens (B, n) at positions (n,) -> (B, n, C)."""
        return cast(Tensor, self.embedding_norm(self.token(tokens) + self.position(positions)))


class MinDalle(SavedModule):
    """p(image tokens | caption) by an encoder and a decoder."""

    schema = MinDalleConfig
    config: MinDalleConfig

    def __init__(self, config: MinDalleConfig) -> None:
        super().__init__(config)
        self.encoder = Side(config, config.n_text_vocab, config.n_text_tokens, EncoderLayer)
        self.decoder = Side(config, config.n_image_ids, config.n_image_tokens, DecoderLayer)
        self.image_head = nn.Linear(config.d_model, config.n_image_ids, bias=False)
        n = config.n_image_tokens
        self._rows = MaskRows(torch.ones(n, n, dtype=torch.bool, device="cpu").tril(), 0)

    def encode(self, text: Tensor) -> Tensor:
        """Read captions (P, T) -> (P, T, C); ValueError for another shape or unknown ids."""
        config = self.config
        check_text(text, config.n_text_tokens, config.n_text_vocab)
        mask = self._seen(text)
        x = self.encoder.embed(text, torch.arange(config.n_text_tokens, device=text.device))
        for layer in cast(Iterable[EncoderLayer], self.encoder.layers):
            x = layer.mlp(layer.attention(x, mask))
        return cast(Tensor, self.encoder.norm(x))

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """Return logits (B, N, K) of every image token (B, N) from the caption (B, T) and the tokens before it."""
        config = self.config
        source, mask = self.encode(text), self._seen(text)
        start = torch.full_like(image[:, :1], config.start_token)
        positions = torch.arange(image.shape[1], device=image.device)
        x = self.decoder.embed(torch.cat([start, image[:, :-1]], dim=1), positions)
        for layer in cast(Iterable[DecoderLayer], self.decoder.layers):
            x = layer.cross_attention(layer.attention(x, None), mask, source)
            x = layer.mlp(x)
        return self.head(self.norm(x)).float()

    def loss(self, text: Tensor, image: Tensor) -> Losses:
        """Return the cross-entropy of image tokens (B, N) in nats per token; captions are not predicted."""
        logits = self(text, image)
        image_loss = F.cross_entropy(logits.flatten(0, 1), image.flatten())
        return Losses(image_loss, torch.zeros_like(image_loss), image_loss)

    # Draw

    @torch.no_grad()
    def start(self, text: Tensor, counts: Sequence[int]) -> tuple[Tensor, Stream]:
        """Read captions (P, T), each for counts[p] pictures -> states (R, C), and the stream to go on with."""
        source, config = self.encode(text), self.config
        hidden = ~(text != config.pad_id)[:, None, None]  # (P, 1, 1, T)
        layers = []
        for layer in cast(Iterable[DecoderLayer], self.decoder.layers):
            keys, values = layer.cross_attention.keys_values(source)
            nothing = keys.new_empty(len(text), config.n_heads, 0, config.d_model // config.n_heads)
            cache = SlotCache((nothing, nothing), sum(counts), config.n_image_tokens)
            layers.append((cache, keys.mT.contiguous(), values))
        bias = torch.zeros_like(hidden, dtype=source.dtype).masked_fill(hidden, -torch.inf)
        stream = Stream(counts, layers, extra={"bias": repeat_rows(bias[:, 0], counts)})  # (R, 1, T)
        first = torch.full((sum(counts),), config.start_token, dtype=torch.int64, device=text.device)
        return self._read(first, stream), stream

    @torch.no_grad()
    def step(self, tokens: Tensor, stream: Stream) -> Tensor:
        """Take in the next image token of each picture, (R,) -> states (R, C) that predict the one after."""
        return self._read(tokens, stream)

    def norm(self, state: Tensor) -> Tensor:
        """Return what the image head reads of states (..., C)."""
        return norm_in_float32(self.decoder.norm, state)

    def head(self, normed: Tensor) -> Tensor:
        """Return logits (..., K) of the codes; the decoder's own ids are never drawn."""
        weight = self.image_head.weight[: self.config.n_image_vocab]
        return F.linear(normed.to(weight.dtype), weight)

    def null_text(self) -> Tensor:
        """Return the caption that guidance is away from, (T,): <s></s>."""
        text = torch.full((self.config.n_text_tokens,), self.config.pad_id, dtype=torch.int64)
        text[0], text[1] = self.config.bos_id, self.config.eos_id
        return text

    def _read(self, tokens: Tensor, stream: Stream) -> Tensor:
        position, bias = stream.n_read, stream.extra["bias"]
        x = self.decoder.embed(tokens[:, None], torch.tensor([position], device=tokens.device))[:, 0]
        for layer, (cache, keys, values) in zip(
            cast(Iterable[DecoderLayer], self.decoder.layers), stream.layers, strict=True
        ):
            attention, cross = layer.attention, layer.cross_attention
            read = attention.norm(x)
            cache.store_(
                position,
                *(
                    split_heads(p(read)[:, None], attention.n_heads)[:, :, 0]
                    for p in (attention.k, attention.v)
                ),
            )
            x = attention.add(
                x, attend_step(attention.query(read), cache, self._rows, position, stream.counts)
            )
            seen = by_caption(cross.query(cross.norm(x)), keys, stream.counts) + bias  # (R, H, T)
            x = cross.add(x, by_caption(seen.softmax(dim=-1), values, stream.counts).flatten(1))
            x = layer.mlp(x)
        stream.n_read += 1
        return x

    def _seen(self, text: Tensor) -> Tensor:
        return (text != self.config.pad_id)[:, None, None]  # (P, 1, 1, T)
