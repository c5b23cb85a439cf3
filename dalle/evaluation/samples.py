"""The section on samples as a set: distances to the true pictures over blur, beside sets that need no transformer.

Source: DALL·E §3.1 and Figure 9 (distances after a Gaussian blur of both sides, so that a dVAE's loss of detail does not
hide the rest). Each network has a table of its own.
Shapes: N pictures, D features, H and W picture sides in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.evaluation.distances import (
    frechet_estimate,
    inception_score,
    kernel_estimate,
    precision_and_recall,
)
from dalle.evaluation.features import FeatureExtractor, extract
from dalle.evaluation.protocols import BATCH, decode, reconstruct
from dalle.evaluation.sheets import spread
from dalle.evaluation.subject import Subject

BLURS = (0, 1, 2, 4, 8)  # standard deviations of the Gaussian, in pixels of the drawn picture
N_SAMPLES = 2000


def sampled_rows(subject: Subject) -> list[int]:
    """The held-out pairs whose captions are drawn for distances, and whose pictures are the reference."""
    return spread(subject.everyone, N_SAMPLES)


def n_draws_each(subject: Subject) -> int:
    """Draws a caption: as many as bring all captions near to 2,000, two at least."""
    return max(2, N_SAMPLES // max(1, len(sampled_rows(subject))))


def samples(subject: Subject) -> dict[str, Any]:
    """Distances of draws, reconstructions and training pictures to held-out pictures, by network."""
    if not subject.extractors:
        return {"refused": "no network was asked for (--networks): there are no distances"}
    rows = sampled_rows(subject)
    limit = subject.settings.limit
    each = 2 if limit else n_draws_each(subject)
    draws = subject.draw(rows, each, "samples").tokens
    tokens = draws.transpose(0, 1).flatten(0, 1)  # the first of every caption, then the second, ...
    return {
        "n_captions": len(rows),
        "draws_a_caption": each,
        "networks": {
            extractor.name: {
                "sha256": extractor.sha256,
                **_distances(subject, extractor, rows, tokens),
            }
            for extractor in subject.extractors
        },
    }


def _distances(
    subject: Subject, extractor: FeatureExtractor, rows: list[int], tokens: Tensor
) -> dict[str, Any]:
    by_blur = []
    for blur in BLURS:
        truth, _ = _features(subject, extractor, f"true-{blur}", blurs(_true(subject, rows), blur))
        drawn, classes = _features(
            subject, extractor, f"draws-{blur}", blurs(_decoded(subject, tokens), blur)
        )
        row: dict[str, Any] = {"blur": blur, "draws": _against(drawn, truth)}
        if classes is not None:
            row["draws"]["inception_score"] = inception_score(classes)
        if blur == 0:
            row |= _baselines(subject, extractor, rows, truth)
        by_blur.append(row)
    return {"blur": by_blur}


def _baselines(
    subject: Subject, extractor: FeatureExtractor, rows: list[int], truth: Tensor
) -> dict[str, Any]:
    """What sets that no transformer drew come to: reconstructions, training pictures, and half of the true ones."""
    copies, _ = _features(
        subject,
        extractor,
        "reconstructions",
        (reconstruct(subject.pipe.dvae, pictures)[1] for pictures in _true(subject, rows)),
    )
    trained, _ = _features(subject, extractor, "train", _true(subject, spread(subject.train, len(rows))))
    order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))
    halves = truth[order[::2]], truth[order[1::2]]
    return {
        "reconstructions": _against(copies, truth),
        "training_pictures": _against(trained, truth),
        "half_of_the_true_pictures": _against(*halves),
    }


def _against(ours: Tensor, reference: Tensor) -> dict[str, Any]:
    return {
        "frechet": frechet_estimate(ours, reference),
        "kernel": kernel_estimate(ours, reference),
        **precision_and_recall(ours, reference),
    }


def _features(
    subject: Subject, extractor: FeatureExtractor, name: str, batches: Iterator[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Features and class probabilities of pictures, kept under a name."""

    def compute() -> dict[str, Tensor]:
        features, classes = extract(extractor, batches, subject.advance)
        return {"features": features} | ({} if classes is None else {"classes": classes})

    found = subject.parts.tensors(f"features-{extractor.sha256[:8]}-{name}", compute)
    return found["features"], found.get("classes")


def _true(subject: Subject, rows: Sequence[int]) -> Iterator[Tensor]:
    for _, pictures in subject.reader.batches([subject.pairs[row] for row in rows]):
        yield pictures


def _decoded(subject: Subject, tokens: Tensor) -> Iterator[Tensor]:
    for part in torch.split(tokens, BATCH):
        yield decode(subject.pipe.dvae, part)


def blurs(batches: Iterator[Tensor], deviation: float) -> Iterator[Tensor]:
    """Blur each batch of pictures."""
    return (blurred(pictures, deviation) for pictures in batches)


def blurred(pictures: Tensor, deviation: float) -> Tensor:
    """Pictures (N, 3, H, W) after a Gaussian filter of a standard deviation in pixels; edges are repeated."""
    if deviation == 0:
        return pictures
    reach = math.ceil(3 * deviation)
    places = torch.arange(-reach, reach + 1, dtype=torch.float32)
    weights = torch.exp(-places.square() / (2 * deviation**2))
    weights = (weights / weights.sum()).expand(3, 1, -1)  # (3, 1, 2 * reach + 1)
    rows = F.conv2d(F.pad(pictures, (reach, reach, 0, 0), "replicate"), weights[:, :, None], groups=3)
    return F.conv2d(F.pad(rows, (0, 0, reach, reach), "replicate"), weights[..., None], groups=3)
