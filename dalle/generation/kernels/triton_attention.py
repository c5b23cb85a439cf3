"""Attention of one image token a picture as one Triton kernel: a caption's keys are loaded once for many pictures.

The plain way (`dalle.generation.decoder.attend_step`) copies a GPU's window keys out of the cache before it multiplies
them; this reads them where they lie, and only those that the mask allows. Like `native.c` it is used when it is asked
for. Proved against the plain way in Triton's interpreter (pip install triton, then
`TRITON_INTERPRET=1 python -m pytest tests/test_generation_triton_attention.py`); not yet run on a GPU.

Shapes: R pictures, P captions, H heads, D head width, T text slots with BOS, L slots of the image cache.
"""

# mypy: disable-error-code="valid-type,import-not-found,import-untyped"

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dalle.generation.cache import ImageCache, Position, RecordedImageCache

if TYPE_CHECKING:
    from dalle.generation.decoder import Group

PICTURES = 16  # of one program: the least that a tensor core multiplies
TEXT = 64  # caption keys loaded at once


def can_run(d_head: int) -> bool:
    """Whether there is Triton, and a head width that it can take."""
    return importlib.util.find_spec("triton") is not None and d_head >= 16 and d_head & (d_head - 1) == 0


def attend(
    groups: Sequence[Group],
    heads: Tensor,
    captions: tuple[Tensor, Tensor],
    images: ImageCache,
    position: Position,
) -> Tensor:
    """Return what `attend_step` gives, from a `RecordedImageCache`: (R, 3 C) at `position` -> (R, C)."""
    assert isinstance(images, RecordedImageCache) and isinstance(position, Tensor)
    keys, values = captions
    n_heads, _, n_text, d_head = keys.shape
    slots, visible, counts = images.positions()
    out = heads.new_empty(len(heads), n_heads * d_head)
    for group in groups:
        n_captions = group.captions.stop - group.captions.start
        n_each = (group.pictures.stop - group.pictures.start) // n_captions
        n_blocks = -(-n_each // PICTURES)
        _kernel()[(n_heads, n_captions * n_blocks)](
            heads,
            keys,
            values,
            images.memory,
            position,
            slots,
            visible,
            counts,
            out,
            group.captions.start,
            group.pictures.start,
            n_each,
            keys.shape[1],
            len(heads),
            n_text,
            images.memory.shape[3],
            images.memory.stride(0),  # Python's integers reach the kernel in 64 bits where they need them
            visible.shape[1],
            d_head**-0.5,
            n_heads=n_heads,
            d_head=d_head,
            n_blocks=n_blocks,
            PICTURES=PICTURES,
            TEXT=TEXT,
        )
    return out


tl: Any = None  # triton.language, which the kernel finds here, from when it is made
_compiled: Any = None


def _kernel() -> Any:
    """Return the kernel, made on first use: importing Triton takes seconds and needs no place where there is no GPU."""
    global _compiled, tl
    if _compiled is None:
        import triton
        from triton import language

        tl = language
        _compiled = triton.jit(_attend)
    return _compiled


def _attend(  # type: ignore[no-untyped-def]
    heads,
    keys,
    values,
    memory,
    position_of,
    slots,
    visible,
    counts,
    out,
    first_caption,
    first_picture,
    n_each,
    n_captions,
    n_pictures,
    n_text,
    n_slots,
    to_values,
    n_visible,
    scale,
    n_heads: tl.constexpr,
    d_head: tl.constexpr,
    n_blocks: tl.constexpr,
    PICTURES: tl.constexpr,
    TEXT: tl.constexpr,
):
    head, block = tl.program_id(0), tl.program_id(1)
    caption = block // n_blocks
    own = (block % n_blocks) * PICTURES + tl.arange(0, PICTURES)  # among the caption's pictures
    is_real = (own < n_each)[:, None]
    picture = first_picture + caption * n_each + own
    width = tl.arange(0, d_head)
    position = tl.load(position_of)

    row = heads + (picture * 3 * n_heads + head)[:, None] * d_head + width[None, :]
    q = tl.load(row, mask=is_real, other=0.0)
    own_key = tl.load(row + n_heads * d_head, mask=is_real, other=0.0)
    own_value = tl.load(row + 2 * n_heads * d_head, mask=is_real, other=0.0)
    cache = memory + ((head * n_pictures + picture) * n_slots)[:, None].to(tl.int64) * d_head + width[None, :]
    own_slot = tl.load(slots + position)
    tl.store(cache + own_slot * d_head, own_key, mask=is_real)
    tl.store(cache + to_values + own_slot * d_head, own_value, mask=is_real)

    largest = tl.full((PICTURES,), -float("inf"), tl.float32)
    total = tl.zeros((PICTURES,), tl.float32)
    mixed = tl.zeros((PICTURES, d_head), tl.float32)

    text = (head * n_captions + first_caption + caption) * n_text * d_head
    for start in range(0, n_text, TEXT):
        slot = start + tl.arange(0, TEXT)
        is_text = slot < n_text
        where = text + slot[:, None] * d_head + width[None, :]
        key = tl.load(keys + where, mask=is_text[:, None], other=0.0)  # (TEXT, D)
        value = tl.load(values + where, mask=is_text[:, None], other=0.0)
        score = tl.dot(q, tl.trans(key), input_precision="ieee") * scale  # (PICTURES, TEXT)
        score = tl.where(is_text[None, :], score, -float("inf"))
        top = tl.maximum(largest, tl.max(score, 1))
        share = tl.exp(score - top[:, None])
        shrink = tl.exp(largest - top)
        total = total * shrink + tl.sum(share, 1)
        mixed = mixed * shrink[:, None] + tl.dot(share.to(value.dtype), value, input_precision="ieee")
        largest = top

    wide = q.to(tl.float32) * scale
    for seen in range(0, tl.load(counts + position)):
        slot = tl.load(visible + position * n_visible + seen)
        key = tl.load(cache + slot * d_head, mask=is_real, other=0.0)
        value = tl.load(cache + to_values + slot * d_head, mask=is_real, other=0.0)
        # What this program has only just stored is taken from its registers.
        key = tl.where(slot == own_slot, own_key, key).to(tl.float32)
        value = tl.where(slot == own_slot, own_value, value).to(tl.float32)
        score = tl.sum(wide * key, 1)  # (PICTURES,)
        top = tl.maximum(largest, score)
        share, shrink = tl.exp(score - top), tl.exp(largest - top)
        total = total * shrink + share
        mixed = mixed * shrink[:, None] + share[:, None] * value
        largest = top

    answer = out + (picture * n_heads + head)[:, None] * d_head + width[None, :]
    tl.store(answer, (mixed / total[:, None]).to(out.dtype.element_ty), mask=is_real)
