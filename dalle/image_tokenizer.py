"""ImageTokenizer: what turns pictures into grids of tokens and back, ours or other people's.

Engine, completion, sampling and serving know an image tokenizer by this protocol alone: a `DiscreteVAE`, or a VQGAN.

Shapes: B batch, H = W side of a picture that is read, S of one that is drawn, G grid side, g <= G grid rows, K codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dalle.config import Config


class ImageTokenizer(Protocol):
    """A module with these sizes and these two maps."""

    @property
    def image_size(self) -> int:
        """Return the side of the pictures that `encode` reads, in pixels."""

    @property
    def output_size(self) -> int:
        """Return the side of the pictures that `decode` gives, in pixels."""

    @property
    def grid_size(self) -> int:
        """Return the side of the token grid, G."""

    @property
    def n_codes(self) -> int:
        """Return the size of the codebook, K."""

    @property
    def has_encoder(self) -> bool:
        """Say whether it can read pictures; some are published as decoders alone."""

    def encode(self, images: Tensor) -> Tensor:
        """Turn pictures (B, 3, H, W) in [0, 1] into tokens (B, G, G) int64."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Turn the first g grid rows of tokens, (B, g, G), into the top of pictures, (B, 3, g * S / G, S) in [0, 1]."""

    # What it has as a module.

    @property
    def config(self) -> Config:
        """Return its sizes as they are saved."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return its tensors by name."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return the weights: they say on which device it computes."""

    def to(self, device: torch.device) -> object:
        """Move the weights."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a component folder."""
