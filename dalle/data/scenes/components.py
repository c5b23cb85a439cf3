"""Connected regions of a mask, 4-connected, in plain NumPy."""

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]


def flood(mask: Mask, seeds: Mask) -> Mask:
    """Return the pixels of `mask` (H, W) that are connected to a pixel of `seeds` inside it."""
    reached = mask & seeds
    while True:
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown &= mask
        if (grown == reached).all():
            return reached
        reached = grown


def label_regions(mask: Mask) -> npt.NDArray[np.int64]:
    """Return (H, W) labels: 0 outside the mask, one positive number for each connected region of it."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        grown = labels.copy()
        np.maximum(grown[1:], labels[:-1], out=grown[1:])
        np.maximum(grown[:-1], labels[1:], out=grown[:-1])
        np.maximum(grown[:, 1:], labels[:, :-1], out=grown[:, 1:])
        np.maximum(grown[:, :-1], labels[:, 1:], out=grown[:, :-1])
        grown[~mask] = 0
        if (grown == labels).all():
            return labels
        labels = grown


def region_sizes(mask: Mask) -> list[int]:
    """Return the pixels of each connected region, largest first."""
    _, counts = np.unique(label_regions(mask)[mask], return_counts=True)
    return sorted((int(n) for n in counts), reverse=True)
