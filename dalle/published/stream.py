"""Decoding state shared by the published token models: captions' keys and values once, pictures' in place.

A stream of slots holds the caption part, then image tokens. Any attention mask over slots is a bool matrix; of it, one
step reads only the row of its own slot.

Shapes: P captions, R pictures, H heads, D head width, A caption slots, N image slots, S = A + N, W image keys seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KeysValues = tuple[Tensor, Tensor]


@dataclass
class Stream:
    """Half-drawn pictures of one model."""

    counts: Sequence[int]  # pictures of each caption
    layers: list[Any]  # what each layer keeps
    n_read: int = 0  # image tokens taken in so far
    extra: dict[str, Tensor] = field(default_factory=dict)


class SlotCache:
    """One attention layer's keys and values: (P, H, A, D) of captions, (R, H, N, D) of pictures."""

    def __init__(self, captions: KeysValues, n_pictures: int, n_image: int) -> None:
        keys = captions[0]
        self.captions = captions
        self.images = keys.new_empty(2, n_pictures, keys.shape[1], n_image, keys.shape[3])

    def store_(self, position: int, keys: Tensor, values: Tensor) -> None:
        """Keep the keys and values (R, H, D) of the image slot at `position`."""
        self.images[0, :, :, position], self.images[1, :, :, position] = keys, values


class MaskRows:
    """What each image slot sees under a mask (S, S), True where a query (row) sees a key (column)."""

    def __init__(self, mask: Tensor, n_caption: int) -> None:
        self.captions: list[Tensor | None] = []  # bool (A,); None: all of them
        self.images: list[slice | Tensor] = []
        for slot in range(n_caption, mask.shape[0]):
            seen = mask[slot, :n_caption]
            self.captions.append(None if bool(seen.all()) else seen)
            self.images.append(_places(mask[slot, n_caption : slot + 1].nonzero()[:, 0]))


def _places(indices: Tensor) -> slice | Tensor:
    """Turn ascending indices into a slice where they are evenly spaced: no copy is needed to read one."""
    gaps = indices.diff()
    if len(gaps) == 0 or bool((gaps == gaps[0]).all()):
        step = int(gaps[0]) if len(gaps) else 1
        return slice(int(indices[0]), int(indices[-1]) + 1, step)
    return indices


def attend_step(q: Tensor, cache: SlotCache, rows: MaskRows, position: int, counts: Sequence[int]) -> Tensor:
    """Attend from the image slot at `position`: scaled queries (R, H, D) -> (R, H * D). The cache holds its key."""
    read = by_caption(q, cache.captions[0].mT, counts)  # (R, H, A)
    hidden = rows.captions[position]
    if hidden is not None:
        read = read.masked_fill(~hidden.to(q.device), -torch.inf)
    places = rows.images[position]
    keys, values = cache.images[:, :, :, places if isinstance(places, slice) else places.to(q.device)]
    seen = (q[:, :, None] @ keys.mT)[:, :, 0]  # (R, H, W)
    shares = torch.cat([read, seen], dim=-1).softmax(dim=-1)
    n_caption = read.shape[-1]
    mixed = by_caption(shares[..., :n_caption], cache.captions[1], counts)
    mixed = mixed + (shares[:, :, None, n_caption:] @ values)[:, :, 0]  # (R, H, D)
    attended: Tensor = mixed.reshape(len(mixed), -1)
    return attended


def by_caption(x: Tensor, matrices: Tensor, counts: Sequence[int]) -> Tensor:
    """Multiply each picture's vectors (R, H, a) with its caption's matrices (P, H, a, b) -> (R, H, b)."""
    if len(set(counts)) == 1:
        rows = x.view(len(counts), counts[0], *x.shape[1:]).transpose(1, 2)  # (P, H, n, a)
        return (rows @ matrices).transpose(1, 2).reshape(*x.shape[:2], -1)
    parts = [
        (part.transpose(0, 1) @ matrix).transpose(0, 1)
        for part, matrix in zip(x.split_with_sizes(list(counts)), matrices, strict=True)
    ]
    return torch.cat(parts)


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """(B, S, H * D) -> (B, H, S, D)."""
    return x.view(*x.shape[:2], n_heads, -1).transpose(1, 2)


def norm_in_float32(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Apply a layer norm in float32: guidance mixes two of its results, and would multiply a rounding."""
    return F.layer_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)


def repeat_rows(x: Tensor, counts: Sequence[int]) -> Tensor:
    """Repeat each caption's row for each of its pictures: (P, C) -> (R, C)."""
    return x.repeat_interleave(torch.tensor(counts, device=x.device), dim=0)


def weighted_losses(
    text_logits: Tensor, text: Tensor, image_logits: Tensor, image: Tensor, image_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (text + w * image) / (1 + w), and both cross-entropies in nats per token."""
    text_loss = F.cross_entropy(text_logits.flatten(0, 1).float(), text.flatten())
    image_loss = F.cross_entropy(image_logits.flatten(0, 1).float(), image.flatten())
    return (text_loss + image_weight * image_loss) / (1 + image_weight), text_loss, image_loss


def check_text(text: Tensor, n_tokens: int, n_ids: int) -> None:
    """Raise ValueError for captions of another shape than (batch, T), or on a CPU for unknown ids."""
    if text.ndim != 2 or text.shape[1] != n_tokens:
        raise ValueError(
            f"text has shape {tuple(text.shape)}; the model reads (batch, {n_tokens}): pad captions"
        )
    if text.device.type == "cpu" and text.numel() and not 0 <= int(text.min()) <= int(text.max()) < n_ids:
        raise ValueError(
            f"text holds ids {int(text.min())}..{int(text.max())}; the model knows 0..{n_ids - 1}"
        )
