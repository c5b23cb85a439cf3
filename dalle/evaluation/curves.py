"""The section on choosing: what the best of N by the model's CLIP is worth, for N from 1 to 512.

Source: DALL·E §2.6, Figures 6 and 9c. By the true picture (retrieval in both galleries, beside the best possible choice)
and by another CLIP. Shapes: P captions, C candidates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle.evaluation.distances import kernel_estimate
from dalle.evaluation.features import extract
from dalle.evaluation.galleries import STYLE, STYLE_AND_OBJECT
from dalle.evaluation.metrics import rank_of_first, thumbnails
from dalle.evaluation.protocols import BATCH, decode
from dalle.evaluation.ranking import best_of
from dalle.evaluation.sheets import spread
from dalle.evaluation.subject import Subject
from dalle.evaluation.zero_shot import CLIPSCORE_WEIGHT

N_CAPTIONS = 32
GALLERIES = (STYLE, STYLE_AND_OBJECT)
MAX_KERNEL = 256  # chosen pictures for each count
COUNTS = tuple(2**power for power in range(10))


def curve_rows(subject: Subject) -> list[int]:
    """The pairs whose captions are drawn many times."""
    return spread(subject.rows, N_CAPTIONS)


def curves(subject: Subject) -> dict[str, Any]:
    """Each measure's mean over captions for the candidate that CLIP chooses among N, with its gain over N = 1."""
    if "clip" not in subject.rankers:
        return {"refused": "the model has no CLIP that could choose among candidates"}
    rows, n = curve_rows(subject), subject.settings.curve_candidates
    tokens = subject.draw(rows, n, "curve").tokens  # (P, C, G, G)
    found = subject.parts.tensors("curve-scores", lambda: _scores(subject, rows, tokens))
    counts = [count for count in COUNTS if count <= n]
    chosen_by = found.pop("clip")
    curve = {name: best_of(chosen_by, values, counts) for name, values in found.items()}
    best = {
        name: best_of(found[name], found[name], counts) for name in GALLERIES
    }  # chosen by the truth itself
    return {
        "n_captions": len(rows),
        "n_candidates": n,
        "captions": subject.captions(rows),
        "chosen_by_clip": curve,
        "best_possible": best,
        "kernel": _kernel(subject, rows, tokens, chosen_by, counts),
    }


def _scores(subject: Subject, rows: list[int], tokens: Tensor) -> dict[str, Tensor]:
    """Scores (P, C) of every candidate: by each CLIP, and 1 where the true picture is the nearest of a gallery."""
    found: dict[str, list[Tensor]] = {name: [] for name in (*subject.rankers, *GALLERIES)}
    for row, candidates in zip(rows, tokens, strict=True):
        pictures = [decode(subject.pipe.dvae, part) for part in torch.split(candidates, BATCH)]
        for name, ranker in subject.rankers.items():
            [vector] = ranker.encode_captions(subject.captions([row]), truncate=True)
            weight = 1.0 if name == "clip" else CLIPSCORE_WEIGHT
            scores = ranker.score(vector, (ranker.clip.fit(part) for part in pictures))
            found[name].append(weight * (scores if name == "clip" else scores.clamp(min=0)))
        small = np.concatenate([thumbnails(part) for part in pictures])
        for name in GALLERIES:
            members = subject.galleries.members(row)[name]
            subject.small.load_(set(members))
            gallery = subject.small.of(members)
            hits = (
                [rank_of_first(one, gallery) <= 1 for one in small] if subject.small.is_readable(row) else []
            )
            found[name].append(torch.tensor(hits or [False] * len(small)).float())
        subject.advance(len(candidates))
    return {name: torch.stack(values) for name, values in found.items()}


def _kernel(
    subject: Subject, rows: list[int], tokens: Tensor, chosen_by: Tensor, counts: list[int]
) -> dict[str, Any]:
    """The kernel distance of the chosen to the held-out pictures, by network; unbiased, so that counts compare."""
    found = {}
    for extractor in subject.extractors[:1]:
        truth, _ = extract(
            extractor, (p for _, p in subject.reader.batches([subject.pairs[i] for i in subject.rows]))
        )
        table = []
        for count in counts:
            groups = chosen_by[:, : chosen_by.shape[1] // count * count].view(len(rows), -1, count)
            groups = groups[:, : max(1, MAX_KERNEL // len(rows))]
            best = groups.argmax(dim=2) + torch.arange(groups.shape[1]) * count  # (P, C // N)
            chosen = torch.cat([candidates[places] for candidates, places in zip(tokens, best, strict=True)])
            drawn, _ = extract(
                extractor, (decode(subject.pipe.dvae, part) for part in torch.split(chosen, BATCH))
            )
            table.append({"candidates": count, **kernel_estimate(drawn, truth)})
        found[extractor.name] = {"sha256": extractor.sha256, "counts": table}
    return found
