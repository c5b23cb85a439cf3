"""Distances between sets of pictures by their features: Fréchet, kernel, inception score, precision and recall.

Source: Heusel et al. 2017 (FID), Bińkowski et al. 2018 (KID), Salimans et al. 2016 (inception score), Kynkäänniemi et al.
2019 (precision and recall). Decompositions are scipy's (`pip install 'dalle[eval]'`).
Shapes: N and M pictures, D features, K classes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dalle.evaluation.intervals import Estimate, refused

MIN_FRECHET = 200  # pictures of each set: a covariance of fewer says more of the sample than of the model
MIN_KERNEL = 50
N_BLOCKS = 10  # into which sets are cut for a standard error
N_NEIGHBOURS = 3  # whose farthest gives the radius round each picture

Array = npt.NDArray[np.float64]


def frechet(ours: Tensor, reference: Tensor) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features (N, D) and (M, D), by normal distributions.

    The trace of the root is the nuclear norm of X1 X2', the centred features divided by (n - 1)^(1/2): exact for
    singular covariances too, which sets smaller than D have.
    """
    linalg = _scipy_linalg()
    means, roots, traces = list[Array](), list[Array](), list[float]()
    for features in (ours, reference):
        x = features.double().numpy()
        centred = (x - x.mean(axis=0)) / math.sqrt(max(1, len(x) - 1))
        means.append(x.mean(axis=0))
        traces.append(float((centred**2).sum()))
        roots.append(linalg.qr(centred, mode="r")[0][: min(centred.shape)])  # (min(N, D), D)
    cross = float(linalg.svdvals(roots[0] @ roots[1].T).sum())
    return float(((means[0] - means[1]) ** 2).sum()) + traces[0] + traces[1] - 2 * cross


def kernel(ours: Tensor, reference: Tensor) -> float:
    """Return the unbiased squared MMD of (N, D) and (M, D) under the kernel (x'y / D + 1)^3."""
    x, y = ours.double(), reference.double()
    n, m, d = len(x), len(y), x.shape[1]

    def k(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / d + 1) ** 3

    xx, yy, xy = k(x, x), k(y, y), k(x, y)
    own = float(xx.sum() - xx.diagonal().sum()) / (n * (n - 1))
    theirs = float(yy.sum() - yy.diagonal().sum()) / (m * (m - 1))
    return own + theirs - 2 * float(xy.mean())


def frechet_estimate(ours: Tensor, reference: Tensor) -> Estimate:
    """The Fréchet distance; its bias grows as sets shrink, so that only figures of equal n compare."""
    n = min(len(ours), len(reference))
    if (refusal := refused(n, MIN_FRECHET, "pictures")) is not None:
        return refusal
    return {"value": frechet(ours, reference), "n": len(ours), "n_reference": len(reference)}


def kernel_estimate(ours: Tensor, reference: Tensor) -> Estimate:
    """The kernel distance with the standard error over ten disjoint blocks of both sets."""
    n = min(len(ours), len(reference))
    if (refusal := refused(n, MIN_KERNEL, "pictures")) is not None:
        return refusal
    generator = torch.Generator().manual_seed(0)
    order, other = (
        torch.randperm(len(ours), generator=generator),
        torch.randperm(len(reference), generator=generator),
    )
    blocks = zip(order.tensor_split(N_BLOCKS), other.tensor_split(N_BLOCKS), strict=True)
    values = torch.tensor([kernel(ours[a], reference[b]) for a, b in blocks])
    error = float(values.std() / math.sqrt(N_BLOCKS))
    value = kernel(ours, reference)
    return {
        "value": value,
        "low": value - 1.96 * error,
        "high": value + 1.96 * error,
        "standard_error": error,
        "n": len(ours),
        "n_reference": len(reference),
    }


def inception_score(probabilities: Tensor) -> Estimate:
    """exp of the mean KL divergence of class probabilities (N, K) from their mean: mean and error of ten splits."""
    if (refusal := refused(len(probabilities), MIN_FRECHET, "pictures")) is not None:
        return refusal
    order = torch.randperm(len(probabilities), generator=torch.Generator().manual_seed(0))
    scores = []
    for part in probabilities.double()[order].tensor_split(N_BLOCKS):
        entropy = torch.special.entr(part).sum(dim=1).mean()
        scores.append(float((torch.special.entr(part.mean(dim=0)).sum() - entropy).exp()))
    error = float(np.std(scores, ddof=1)) / math.sqrt(N_BLOCKS)
    mean = float(np.mean(scores))
    interval = {"low": mean - 1.96 * error, "high": mean + 1.96 * error}
    return {"value": mean, **interval, "standard_error": error, "n": len(probabilities)}


def precision_and_recall(ours: Tensor, reference: Tensor) -> dict[str, Estimate]:
    """Share of ours within the reference's manifold, and of the reference within ours: balls to the third neighbour."""
    n = min(len(ours), len(reference))
    if (refusal := refused(n, MIN_KERNEL, "pictures")) is not None:
        return {"precision": refusal, "recall": refusal}
    between = torch.cdist(ours.double(), reference.double())  # (N, M)
    within_reference = (between <= _radii(reference)[None]).any(dim=1)
    within_ours = (between <= _radii(ours)[:, None]).any(dim=0)
    return {
        "precision": {"value": float(within_reference.double().mean()), "n": len(ours)},
        "recall": {"value": float(within_ours.double().mean()), "n": len(reference)},
    }


def _radii(features: Tensor) -> Tensor:
    """The distance (N,) of each picture to its third neighbour in its set."""
    apart = torch.cdist(features.double(), features.double())
    return apart.kthvalue(min(N_NEIGHBOURS + 1, len(features)), dim=1).values


def _scipy_linalg() -> Any:
    try:
        from scipy import linalg
    except ImportError:
        raise ValueError("a Fréchet distance needs scipy: pip install 'dalle[eval]'") from None
    return linalg
