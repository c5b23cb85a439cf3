"""What CLIP's vectors are worth: zero-shot classes, retrieval, CLIPScore, R-precision, a linear probe.

Source: Radford et al. 2021, §3.1.4 (prompt ensembles), App. A.3 (linear probe); Hessel et al. 2021 (CLIPScore); Park et
al. 2021 (R-precision). All figures are taken in float32 on unit vectors; a tie counts as lost to the lower index.

Shapes: N pictures, M captions, C classes, E width of the embedding, D width of a feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

CLIPSCORE_PREFIX = "A photo depicts "  # of every caption, in the authors' code
CLIPSCORE_WEIGHT = 2.5
RETRIEVAL_AT = (1, 5, 10)
CHUNK = 1024  # rows of a similarity matrix held at once
PROBE_STRENGTHS = 96  # log-spaced over 1e-6 .. 1e6 (App. A.3)
PROBE_FIRST = (0, 16, 32, 48, 63, 79, 95)  # 1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6 among these
PROBE_ITERATIONS = 1000


def read_labels(path: Path) -> list[str]:
    """The lines of a text file without blank ones; ValueError when it cannot be read, is empty or repeats a label."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"labels {path} cannot be read: {error}") from None
    labels = [line for line in lines if line]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if not labels or twice is not None:
        problem = f"names {twice!r} twice" if labels else "is empty"
        raise ValueError(f"labels {path} {problem}: write one label a line")
    return labels


def class_vectors(
    names: Sequence[str], templates: Sequence[str], encode: Callable[[Sequence[str]], Tensor]
) -> Tensor:
    """One unit vector a class, (C, E): the mean over templates such as "a drawing of {}" of unit caption vectors.

    `encode` gives unit vectors (P, E) of P captions. Raises ValueError without classes, or for a template without {}.
    """
    if not names or not templates:
        raise ValueError(
            f"{len(names)} labels and {len(templates)} templates: at least one of each is needed"
        )
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"template {template!r} must hold {{}} once, where the label goes")
    vectors = encode([template.replace("{}", name) for name in names for template in templates])  # (C * T, E)
    mean = vectors.view(len(names), len(templates), -1).mean(dim=1)  # (C, E)
    return F.normalize(mean, dim=-1)


def classify(pictures: Tensor, classes: Tensor, scale: float = 100.0) -> Tensor:
    """Probabilities (N, C) of classes for unit vectors of pictures (N, E) and classes (C, E)."""
    return (scale * pictures.float() @ classes.float().T).softmax(dim=-1)


def accuracy(pictures: Tensor, classes: Tensor, truth: Sequence[int]) -> float:
    """The share of pictures (N, E) whose nearest class (C, E) is the true one, 0..1."""
    found = (pictures.float() @ classes.float().T).argmax(dim=-1)
    return float((found == torch.as_tensor(truth)).float().mean())


def retrieval_ranks(queries: Tensor, targets: Tensor, truth: Sequence[int]) -> Tensor:
    """The rank, from 1, of each query's (N, E) true target among (M, E), in chunks of queries: (N,) int64."""
    ranks, truth_of = [], torch.as_tensor(truth)
    for start in range(0, len(queries), CHUNK):
        scores = queries[start : start + CHUNK].float() @ targets.float().T  # (n, M)
        wanted = truth_of[start : start + CHUNK, None]
        own = scores.gather(1, wanted)
        index = torch.arange(scores.shape[1])
        before = (scores > own) | ((scores == own) & (index < wanted))
        ranks.append(1 + before.sum(dim=1))
    return torch.cat(ranks)


def recalls(ranks: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 (0..1) and the median rank."""
    figures = {f"recall_at_{k}": float((ranks <= k).float().mean()) for k in RETRIEVAL_AT}
    return figures | {"median_rank": float(ranks.double().quantile(0.5))}


def retrieval_both_ways(pictures: Tensor, captions: Tensor) -> dict[str, dict[str, float]]:
    """Recalls of pairs (N, E) and (N, E): captions found by their pictures, and pictures by their captions."""
    truth = range(len(pictures))
    return {
        "picture_to_caption": recalls(retrieval_ranks(pictures, captions, truth)),
        "caption_to_picture": recalls(retrieval_ranks(captions, pictures, truth)),
        "chance": {f"recall_at_{k}": min(1.0, k / len(pictures)) for k in RETRIEVAL_AT},
    }


def clip_score(pictures: Tensor, captions: Tensor) -> Tensor:
    """2.5 * max(cosine, 0) of each pair of unit vectors (N, E): (N,) (Hessel et al. 2021, eq. 1)."""
    cosines = (pictures.float() * captions.float()).sum(dim=-1)
    return CLIPSCORE_WEIGHT * cosines.clamp(min=0)


def r_precision(pictures: Tensor, captions: Tensor, galleries: Sequence[Sequence[int]]) -> float:
    """How often a picture (N, E) is nearest to the first caption of its gallery, 0..1; captions are (M, E)."""
    hits = 0
    for picture, gallery in zip(pictures.float(), galleries, strict=True):
        scores = captions[list(gallery)].float() @ picture
        hits += bool(scores[0] > scores[1:].max()) if len(gallery) > 1 else 1
    return hits / len(galleries)


# --- the linear probe (App. A.3) ---


@dataclass(frozen=True)
class Probe:
    """A logistic regression on features (N, D): logits are features @ weight.T + bias."""

    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)
    strength: float  # C of scikit-learn: 1 / L2 penalty
    validation_accuracy: float  # at that strength, 0..1

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """The share of features (N, D) put into their class, 0..1."""
        return _share_right(features, labels, self.weight, self.bias)


def linear_probe(train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor]) -> Probe:
    """Fit a probe by L-BFGS; its strength is searched as the paper does, then it is fitted on both sets.

    Each set is features (N, D) and labels (N,) int64. Seven strengths from 1e-6 to 1e6, then half-way steps round the
    best down to eight a decade.
    """
    n_classes = int(max(train[1].max(), validation[1].max())) + 1
    grid = torch.logspace(-6, 6, PROBE_STRENGTHS, dtype=torch.float64).tolist()
    right: dict[int, float] = {}

    def measure(index: int) -> float:
        if index not in right:
            weight, bias = fit_logistic(*train, n_classes, grid[index])
            right[index] = _share_right(*validation, weight, bias)
        return right[index]

    best, step = max(PROBE_FIRST, key=measure), 8
    while step >= 1:
        near = [best, *(index for index in (best - step, best + step) if 0 <= index < len(grid))]
        best, step = max(near, key=measure), step // 2
    both = torch.cat([train[0], validation[0]]), torch.cat([train[1], validation[1]])
    weight, bias = fit_logistic(*both, n_classes, grid[best])
    return Probe(weight, bias, grid[best], right[best])


def fit_logistic(features: Tensor, labels: Tensor, n_classes: int, strength: float) -> tuple[Tensor, Tensor]:
    """Minimise strength * sum of cross-entropies + |weight|² / 2, as scikit-learn does: weight (C, D), bias (C,)."""
    x = features.double()
    weight = torch.zeros(n_classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(n_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=PROBE_ITERATIONS, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )
    # Divided by the strength and the number of rows: the same minimum, at a size that the line search likes.
    penalty = 1 / (2 * strength * len(x))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, labels) + penalty * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def _share_right(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> float:
    found = (features.double() @ weight.T + bias).argmax(dim=-1)
    return float((found == labels).float().mean())


def standard_error(share: float, n: int) -> float:
    """Of a share of n, 0..0.5."""
    return math.sqrt(share * (1 - share) / n) if n else 0.0
