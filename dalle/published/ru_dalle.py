"""ru-dalle (Malevich, Emojich, Surrealist, Kandinsky): a sparse GPT that reads Russian captions.

Source: ai-forever/ru-dalle, versions v2 and v3 of its format. The image region of its masks begins at slot T in both; in
v2, where a start token comes first, that is the slot of the last text token. Its VQGAN is taming's Gumbel one (`vqgan`).
differs: the loss of v3 there has the text head predict the first image token; here the image head does, as in drawing.
"""

from __future__ import annotations

from functools import partial
from typing import Self, cast

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dalle.published.gpt import Block, GPTConfig, SlotGPT
from dalle.published.stream import check_text, norm_in_float32

CONV_KERNEL = 11


class RuDalleConfig(GPTConfig):
    """Sizes of a `RuDalle`; Malevich's are 24 layers, 16 heads, 2048 wide, 128 text tokens, a 32x32 grid of 8192."""

    has_start: bool  # a start token stands before the caption (v2)
    conv_wraps: bool  # the convolutional mask wraps over the grid's sides (v2), or is cut off at them (v3)
    has_sandwich_norms: bool = True
    start_id: int = 2  # of the tokenizer: <BOS>, which begins each caption too
    eos_id: int = 3

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model is {self.d_model}; it must be a multiple of n_heads, {self.n_heads}")
        return self


def slot_mask(kind: str, n_text: int, grid: int, wraps: bool) -> Tensor:
    """Draw what each slot (row) sees of each slot (column): bool (T + N, T + N)."""
    n = n_text + grid * grid
    mask = torch.ones(n, n, dtype=torch.bool, device="cpu").tril()
    place = torch.arange(grid * grid, device="cpu")
    back = place[:, None] - place
    if kind == "row":
        seen = (back >= 0) & (back <= grid)
    elif kind == "column":
        seen = (back >= 0) & (back % grid == 0)
    else:
        seen = _conv_mask(grid, wraps)
    mask[n_text:, n_text:] = seen
    return mask


def _conv_mask(grid: int, wraps: bool) -> Tensor:
    """Draw which later cells (rows) lie in the 11x11 square around a cell (column), or are that cell."""
    cells, reach = grid * grid, CONV_KERNEL // 2
    seen = torch.eye(cells, dtype=torch.bool, device="cpu")
    place = torch.arange(cells, device="cpu")
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            row, column = place // grid + down, place % grid + right
            if wraps:
                row, column = row % grid, column % grid
            else:  # a cell outside stands for the nearest one inside
                row, column = row.clamp(0, grid - 1), column.clamp(0, grid - 1)
            other = row * grid + column
            later = other > place
            seen[other[later], place[later]] = True
    return seen


class RuDalle(SlotGPT):
    """p(text, image); a text id of 0 is padding, and each position has a pad of its own."""

    schema = RuDalleConfig
    config: RuDalleConfig

    def __init__(self, config: RuDalleConfig) -> None:
        n_text, grid, width = config.n_text_tokens, config.grid_size, config.d_model
        last = config.n_layers - 1
        kinds = ["column" if (i - 1) % 4 == 0 else "row" if i != last else "conv" for i in range(last + 1)]
        super().__init__(
            config,
            partial(Block, config, partial(F.gelu, approximate="tanh"), config.has_sandwich_norms),
            {kind: slot_mask(kind, n_text, grid, config.conv_wraps) for kind in set(kinds)},
            kinds,
            n_caption=n_text + config.has_start,
            n_text_logits=config.n_text_vocab + n_text,
            head_bias=True,
        )
        # The transformer ends with a norm, and the heads begin with another.
        self.stream_norm = nn.LayerNorm(width)
        self.text_token = nn.Embedding(config.n_text_vocab + n_text, width)
        self.image_token = nn.Embedding(config.n_image_vocab, width)
        self.text_position = nn.Embedding(n_text + 1, width)
        self.image_row = nn.Embedding(grid, width)
        self.image_column = nn.Embedding(grid, width)

    def embed_caption(self, text: Tensor) -> Tensor:
        """Embed captions (B, T) -> (B, A, C); ValueError for another shape or unknown ids."""
        check_text(text, self.config.n_text_tokens, self.config.n_text_vocab)
        ids = self._with_pads(text)
        if self.config.has_start:
            ids = F.pad(ids, (1, 0), value=self.config.start_id)
        return cast(Tensor, self.text_token(ids) + self.text_position.weight[: ids.shape[1]])

    def embed_image(self, tokens: Tensor, first: int) -> Tensor:
        """Embed image tokens (B, n) from raster index `first` on -> (B, n, C)."""
        place = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        grid = self.config.grid_size
        return cast(
            Tensor, self.image_token(tokens) + self.image_row(place // grid) + self.image_column(place % grid)
        )

    def text_targets(self, text: Tensor) -> Tensor:
        """Return the text tokens, of v3 without the first, which nothing predicts."""
        padded = self._with_pads(text)
        return padded if self.config.has_start else padded[:, 1:]

    def norm(self, state: Tensor) -> Tensor:
        """Return what the heads read of states (..., C)."""
        return norm_in_float32(self.final_norm, norm_in_float32(self.stream_norm, state))

    def null_text(self) -> Tensor:
        """Return the empty caption, (T,)."""
        text = torch.zeros(self.config.n_text_tokens, dtype=torch.int64)
        text[0], text[1] = self.config.start_id, self.config.eos_id
        return text

    def _with_pads(self, text: Tensor) -> Tensor:
        pads = self.config.n_text_vocab + torch.arange(text.shape[1], device=text.device)
        return torch.where(text == 0, pads, text)
