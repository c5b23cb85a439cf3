"""TokenModel: p(image tokens | caption), ours or other people's, and how its tokens are drawn.

The engine knows a token model by these protocols alone. A published model is a `TokenModel` and a `TokenDecoder` in
one; our `Transformer` is a `TokenModel`, and `dalle.generation.decoder` is its fast `TokenDecoder`.

Shapes: P captions, R pictures, T text tokens, N = G * G image tokens, G grid side, C width, K codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Losses(NamedTuple):
    """Cross-entropies in nats per token, each averaged over all tokens of its kind: scalars."""

    total: Tensor  # the weighted sum of both that is trained on
    text: Tensor
    image: Tensor


class TokenModelSizes(Protocol):
    """The sizes of a token model that others need; fields of its config."""

    @property
    def n_text_tokens(self) -> int:
        """Return the text slots, T, pads included."""

    @property
    def n_text_ids(self) -> int:
        """Return how many ids a text slot may hold."""

    @property
    def n_text_vocab(self) -> int:
        """Return the ids of the tokenizer."""

    @property
    def n_image_vocab(self) -> int:
        """Return the codes of the image tokenizer, K."""

    @property
    def grid_size(self) -> int:
        """Return the side of the token grid, G."""

    @property
    def d_model(self) -> int:
        """Return the width, C."""


class TokenModel(Protocol):
    """A module that says how likely image tokens are."""

    @property
    def config(self) -> TokenModelSizes:
        """Return its sizes."""

    def loss(self, text: Tensor, image: Tensor) -> Losses:
        """Return the cross-entropies of captions (B, T) and image tokens (B, N), both int64."""

    def null_text(self) -> Tensor:
        """Return the caption that guidance moves away from, (T,) int64."""

    # What it has as a module.

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return the weights."""

    def to(self, device: torch.device, dtype: torch.dtype, /) -> object:
        """Move and cast the weights."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a component folder."""


@runtime_checkable
class TokenDecoder(Protocol):
    """Draws image tokens in raster order, of many pictures side by side."""

    def start(self, text: Tensor, n_pictures: Sequence[int], /) -> tuple[Tensor, Any]:
        """Read captions (P, T), each for so many pictures -> states (R, C), and the stream to go on with."""

    def step(self, tokens: Tensor, stream: Any, /) -> Tensor:
        """Take in the next image token of each picture, (R,) int64 -> states (R, C) that predict the one after."""

    def norm(self, state: Tensor, /) -> Tensor:
        """Return what the head reads of states (R, C): guidance mixes two of these, for the head is linear."""

    def head(self, normed: Tensor, /) -> Tensor:
        """Return logits of the next image token, (R, K), of what `norm` gives."""
