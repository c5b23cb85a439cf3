"""The section on memory: are draws nearer to a training picture than true pictures are that were never trained on?

Source: DALL·E §3.2 (overlap of training and evaluation sets by nearest neighbours). Distances at 16 x 16 RGB, and by a
network. Shapes: R rows, M training pictures, D features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.data.art.splits import NEAR_RMSE, nearest_rmse
from dalle.evaluation.features import FeatureExtractor, extract
from dalle.evaluation.intervals import difference, estimate, median_estimate
from dalle.evaluation.metrics import thumbnails
from dalle.evaluation.protocols import BATCH, decode
from dalle.evaluation.subject import Subject

Array = npt.NDArray[np.float64]


def memorisation(subject: Subject) -> dict[str, Any]:
    """Distances of true pictures and draws to the nearest training picture, and how often draws are the nearer."""
    if not subject.train:
        return {"refused": "the data have no split train to look for copies in"}
    draws = subject.draws()
    drawn = {"draws": draws.tokens[:, 0]}
    if draws.of_choice is not None:
        drawn["chosen"] = draws.of_choice
    measures = {"16x16 RGB": {"sha256": None, **_by_pixels(subject, drawn)}}
    if subject.memory_network is not None:
        network = subject.memory_network
        measures[network.name] = {"sha256": network.sha256, **_by_network(subject, network, drawn)}
    return {"n_training_pictures": len(subject.train), "measures": measures}


def _by_pixels(subject: Subject, drawn: dict[str, Tensor]) -> dict[str, Any]:
    small, rows = subject.small, subject.rows
    small.load_({*subject.train, *rows})
    known = small.of(subject.train)
    kept = [place for place, row in enumerate(rows) if small.is_readable(row)]
    nearest = {"true_pictures": nearest_rmse(small.of([rows[place] for place in kept]), known)}
    for name, tokens in drawn.items():
        parts = [thumbnails(decode(subject.pipe.dvae, part)) for part in torch.split(tokens[kept], BATCH)]
        nearest[name] = nearest_rmse(np.concatenate(parts), known)
    overlap = estimate(nearest["true_pictures"] < NEAR_RMSE)
    return {"near_is_below": NEAR_RMSE, "overlap_of_the_split": overlap, **_compared(nearest, NEAR_RMSE)}


def _by_network(subject: Subject, network: FeatureExtractor, drawn: dict[str, Tensor]) -> dict[str, Any]:
    every = subject.picture_features()
    known = every[subject.train]
    nearest = {"true_pictures": _nearest(every[subject.rows], known)}
    for name, tokens in drawn.items():
        batches = (decode(subject.pipe.dvae, part) for part in torch.split(tokens, BATCH))
        nearest[name] = _nearest(extract(network, batches, subject.advance)[0], known)
    near = float(np.quantile(nearest["true_pictures"], 0.05))
    return {"near_is_below": near, **_compared(nearest, near)}


def _nearest(ours: Tensor, known: Tensor) -> Array:
    """The cosine distance of each of ours (R, D) to the nearest of (M, D)."""
    others = F.normalize(known, dim=-1)
    found = [1 - (F.normalize(part, dim=-1) @ others.T).amax(dim=1) for part in torch.split(ours, 256)]
    distances: Array = torch.cat(found).double().numpy()
    return distances


def _compared(nearest: dict[str, Array], near: float) -> dict[str, Any]:
    """Medians, shares below `near`, and how much more often than half of the time draws are the nearer."""
    true = nearest["true_pictures"]
    found: dict[str, Any] = {}
    for name, distances in nearest.items():
        found[name] = {"median": median_estimate(distances), "near": estimate(distances < near)}
        if name != "true_pictures" and len(distances) == len(true):
            found[name]["nearer_than_true"] = estimate(distances < true)
            found[name]["excess_near"] = difference(distances < near, true < near)
    return found
