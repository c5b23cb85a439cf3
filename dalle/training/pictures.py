"""Batches of training pictures, read ahead of the model; a file is decoded once where memory allows.

Shapes: B batch, H and W picture sides in pixels.
"""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from dalle import images
from dalle.data.pair import Pair
from dalle.data.reading import BadSampleLog, in_chunks
from dalle.training.order import Order, rng
from dalle.training.prefetch import Prefetch

CHUNK = 64  # held-out pictures read ahead
MAX_CACHE_BYTES = 2**31  # of pictures kept in memory
BYTES_A_PIXEL = 4  # of a PIL picture

Member = tuple[int, int]  # epoch, index of the picture


class Pictures:
    """Micro-batches of the pictures of an order; what one holds depends on its number and the seed alone.

    Args:
        read: opens a picture; the result is kept if all of them, at `side` pixels, fit into memory.
        draw: makes a training picture of it, another one each epoch; None: it is one already.
        side: of what `read` gives at most, in pixels; None: too large to be kept.
    """

    def __init__(
        self,
        pairs: list[Pair],
        order: Order,
        batch_size: int,
        bad: BadSampleLog,
        *,
        read: Callable[[Pair], Image],
        draw: Callable[[Image, np.random.Generator], Image] | None,
        side: int | None,
        seed: int,
    ) -> None:
        self._pairs, self._order, self._batch_size, self._bad = pairs, order, batch_size, bad
        self._read, self._draw, self._seed = read, draw, seed
        fits = side is not None and BYTES_A_PIXEL * side * side * len(pairs) <= MAX_CACHE_BYTES
        self._cache: dict[int, Image] | None = {} if fits else None
        self._prefetch = Prefetch(self._load)

    def __call__(self, number: int) -> tuple[list[Member], Tensor]:
        """The members of micro-batch `number` whose pictures can be read, and these, (B, 3, H, W) in [0, 1]."""
        return self._prefetch(number)

    def _load(self, number: int) -> tuple[list[Member], Tensor]:
        members, pictures = [], []
        for epoch, index in self._order.batch(number, self._batch_size):
            try:
                pictures.append(self._picture(epoch, index))
                members.append((epoch, index))
            except ValueError as error:
                reason = str(error)
                self._bad.add(self._pairs[index].key, reason)
        if not pictures:
            raise ValueError(f"no picture of a whole batch can be read, the last because: {reason}")
        return members, images.to_tensor(pictures).contiguous(memory_format=torch.channels_last)

    def _picture(self, epoch: int, index: int) -> Image:
        """One training picture; ValueError when its file cannot be read."""
        pair = self._pairs[index]
        picture = self._cache.get(index) if self._cache is not None else None
        if picture is None:
            picture = self._read(pair)
            if self._cache is not None:
                self._cache[index] = picture
        return (
            picture if self._draw is None else self._draw(picture, rng(self._seed, "crop", epoch, pair.key))
        )


def load_all(
    pairs: list[Pair], read: Callable[[Pair], Image], bad: BadSampleLog
) -> tuple[list[Pair], Tensor]:
    """The readable ones of `pairs` and their pictures (M, 3, H, W) in [0, 1]; unreadable ones are logged and left out.

    Raises ValueError when none can be read.
    """
    kept, pictures = [], []
    found = itertools.chain.from_iterable(in_chunks(pairs, CHUNK, read))
    for pair, picture in zip(pairs, found, strict=True):
        if isinstance(picture, ValueError):
            reason = str(picture)
            bad.add(pair.key, reason)
        else:
            pictures.append(picture)
            kept.append(pair)
    if not pictures:
        raise ValueError(f"no held-out picture can be read, the last because: {reason}")
    return kept, images.to_tensor(pictures)


def small_square(pair: Pair, side: int) -> Image:
    """The central square of a pair's picture, at most `side` pixels wide: a small one is not blown up."""
    picture = pair.open()
    return images.center_crop(picture, min(side, *picture.size))
