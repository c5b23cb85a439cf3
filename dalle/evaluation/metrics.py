"""Figures of merit as pure functions and running sums; `protocols` says what they are taken on.

Source: PSNR and perplexity are the field's; recall at k and median rank are those of retrieval. The paper
itself compares samples by FID, Inception Score and people (§3.1), which need another network or a crowd.
Shapes: B batch, H and W picture sides in pixels, S that of a decoded picture, G grid side, K candidates,
D = 16 * 16 * 3 thumbnail values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.images import box_filtered

INK_BELOW = 250  # a pixel whose darkest channel is below this is ink, not paper
MAX_PSNR = 100.0  # dB; equal pictures would give infinity, which JSON cannot hold
THUMBNAIL = 16  # pixels a side

Figures = dict[str, float | None]


def to_bytes(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] as the 8-bit values of a file, (B, 3, H, W) uint8 on the CPU."""
    return (pictures.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def psnr(squared_error: float, n_values: int) -> float:
    """Peak signal-to-noise ratio in dB, at most 100, of a sum of n_values squared 8-bit differences."""
    if squared_error == 0:
        return MAX_PSNR
    return min(MAX_PSNR, 10 * math.log10(255**2 * n_values / squared_error))


def perplexity(histogram: Tensor) -> float:
    """exp(entropy) of counts (K,): how many equally used codes would be as varied; 1..K, 0 for no counts."""
    total = histogram.sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(histogram.double() / total).sum().exp())


class PixelErrors:
    """Running sums of squared differences between pictures and copies; those of several sets add up with `+`.

    Errors are sums of whole numbers, so that neither order nor batch size changes a figure.
    """

    def __init__(self) -> None:
        self.squared_error, self.n_values = 0, 0
        self.ink_squared_error, self.n_ink_values = 0, 0

    def add_(self, originals: Tensor, copies: Tensor) -> None:
        """Count pictures and copies, both (B, 3, H, W) in [0, 1]."""
        before, after = to_bytes(originals), to_bytes(copies)
        error = (before.int() - after.int()).square().sum(dim=1)  # (B, H, W)
        is_ink = before.amin(dim=1) < INK_BELOW  # (B, H, W)
        self.squared_error += int(error.sum())
        self.n_values += before.numel()
        self.ink_squared_error += int(error[is_ink].sum())
        self.n_ink_values += 3 * int(is_ink.sum())

    def __add__(self, other: PixelErrors) -> PixelErrors:
        both = PixelErrors()
        for name, value in vars(self).items():  # sums, all of them
            setattr(both, name, value + getattr(other, name))
        return both

    @property
    def psnr(self) -> float | None:
        """In dB, of the squared error pooled over all pictures; None without pictures."""
        return psnr(self.squared_error, self.n_values) if self.n_values else None

    @property
    def ink_psnr(self) -> float | None:
        """As `psnr`, over the pixels where the original is not white; None where all are white."""
        return psnr(self.ink_squared_error, self.n_ink_values) if self.n_ink_values else None


class Reconstruction:
    """Running sums over pictures and their reconstructions; those of several sets add up with `+`."""

    def __init__(self, n_codes: int, side: int) -> None:
        """`side`: of the pictures that the tokens are made of, in pixels."""
        self.side, self.n_pictures = side, 0
        self.seen = PixelErrors()  # of both averaged down to `side`: what the tokens can hold
        self.drawn = PixelErrors()  # of the pictures as the decoder draws them
        self.histogram = torch.zeros(n_codes, dtype=torch.int64)  # (n_codes,) how often each code was used

    def add_(self, originals: Tensor, copies: Tensor, tokens: Tensor) -> None:
        """Count pictures and copies, both (B, 3, S, S) in [0, 1], and the tokens (B, G, G) between them."""
        self.n_pictures += len(originals)
        self.seen.add_(box_filtered(originals, self.side), box_filtered(copies, self.side))
        self.drawn.add_(originals, copies)
        self.histogram += torch.bincount(tokens.flatten().cpu(), minlength=len(self.histogram))

    def __add__(self, other: Reconstruction) -> Reconstruction:
        both = Reconstruction(len(self.histogram), self.side)
        for name in ("n_pictures", "seen", "drawn", "histogram"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    @property
    def codes_used(self) -> float:
        """The share of the codebook that occurred at least once, 0..1."""
        return int((self.histogram > 0).sum()) / len(self.histogram)

    @property
    def perplexity(self) -> float:
        """Of the code histogram, 1..n_codes."""
        return perplexity(self.histogram)


def thumbnails(pictures: Tensor) -> npt.NDArray[np.float32]:
    """Pictures (B, 3, H, W) in [0, 1], rounded to 8 bits and averaged down to 16 x 16 -> (B, D)."""
    small = F.adaptive_avg_pool2d(to_bytes(pictures).float() / 255, THUMBNAIL)  # (B, 3, 16, 16)
    flat: npt.NDArray[np.float32] = small.flatten(1).numpy()  # (B, D)
    return flat


def rank_of_first(query: npt.NDArray[np.float32], candidates: npt.NDArray[np.float32]) -> float:
    """The rank, 1..K, of the first of candidates (K, D) by RMSE to query (D,).

    Candidates exactly as far as the first count half, so that a query without information gets the middle
    rank.
    """
    distance = np.sqrt(((candidates.astype(np.float64) - query) ** 2).mean(axis=1))  # (K,)
    others = distance[1:]
    return 1 + float((others < distance[0]).sum()) + float((others == distance[0]).sum()) / 2


def retrieval_by_chance(n_candidates: Sequence[int]) -> Figures:
    """Recalls and median rank of ranks drawn blindly, given how many candidates each row had; None without rows."""
    n = len(n_candidates)
    figures: Figures = {}
    for k in (1, 5):
        figures[f"recall_at_{k}"] = (
            math.fsum(min(1.0, k / count) for count in n_candidates) / n if n else None
        )
    figures["median_rank"] = (float(np.median(n_candidates)) + 1) / 2 if n else None
    return figures
