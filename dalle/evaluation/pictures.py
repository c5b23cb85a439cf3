"""Pictures of a data set as the models see them: one size, centre-cropped, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from PIL.Image import Image
from torch import Tensor

from dalle import images
from dalle.data.pair import Pair
from dalle.data.reading import read_chunks

BATCH = 64  # pictures read at once


@dataclass
class PictureReader:
    """Reads pictures at one size, centre-cropped, and remembers those that cannot be read."""

    size: int  # pixels a side
    unreadable: dict[str, str] = field(default_factory=dict)  # key -> reason

    def batches(self, pairs: Sequence[Pair]) -> Iterator[tuple[list[int], Tensor]]:
        """Positions in `pairs` of up to 64 readable pictures, and the pictures (B, 3, H, W) in [0, 1]."""
        start = 0
        for chunk in read_chunks(pairs, BATCH, lambda _, picture: images.center_crop(picture, self.size)):
            good: dict[int, Image] = {}
            for position, found in enumerate(chunk, start):
                if isinstance(found, ValueError):
                    self.unreadable[pairs[position].key] = str(found)
                else:
                    good[position] = found
            start += len(chunk)
            if good:
                yield list(good), images.to_tensor(list(good.values()))
