"""Pictures of a data set as the models see them: one size, centre-cropped, in batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from PIL.Image import Image
from torch import Tensor

from dalle import images
from dalle.data.pairs import Pair

BATCH = 64  # pictures read at once
N_READERS = 8


@dataclass
class PictureReader:
    """Reads pictures at one size, centre-cropped, and remembers those that cannot be read."""

    size: int  # pixels a side
    unreadable: dict[str, str] = field(default_factory=dict)  # key -> reason

    def batches(self, pairs: Sequence[Pair]) -> Iterator[tuple[list[int], Tensor]]:
        """Positions in `pairs` of up to 64 readable pictures, and the pictures (B, 3, H, W) in [0, 1]."""
        with ThreadPoolExecutor(min(N_READERS, os.cpu_count() or 1)) as readers:
            for start in range(0, len(pairs), BATCH):
                found = list(readers.map(self._read, pairs[start : start + BATCH]))
                readable = [(start + i, image) for i, image in enumerate(found) if image is not None]
                if readable:
                    yield [i for i, _ in readable], images.to_tensor([image for _, image in readable])

    def _read(self, pair: Pair) -> Image | None:
        try:
            return images.center_crop(pair.open(), self.size)
        except ValueError as error:
            self.unreadable[pair.key] = str(error)
            return None
