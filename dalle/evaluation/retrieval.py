"""Zero-shot retrieval: how often a draw is nearer to its caption's true picture than to the others of a gallery.

Distance is RMSE at 16 x 16 RGB: no network that a model could please. Every query is put to the same galleries, so that
models and the baselines of `dalle.evaluation.baselines` differ in nothing but their answers.
Shapes: R rows, K candidates, C equally likely answers, D thumbnail values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dalle.evaluation.baselines import DONOR, MEAN, MEANING, RANDOM, Query, copies
from dalle.evaluation.galleries import Galleries, Thumbnails, style_of
from dalle.evaluation.intervals import difference, estimate, median_estimate
from dalle.evaluation.metrics import rank_of_first, retrieval_by_chance, thumbnails
from dalle.evaluation.protocols import BATCH, decode, reconstruct
from dalle.evaluation.subject import Subject
from dalle.pipeline import DallePipeline

STYLE, STYLE_AND_OBJECT = "style", "style_and_object"
GALLERIES: dict[str, Callable[[Galleries, int], list[int]]] = {
    STYLE: lambda galleries, row: galleries.of_style(row),
    STYLE_AND_OBJECT: lambda galleries, row: galleries.of_style_and_object(row),
}
COPYING = (RANDOM, MEAN, DONOR)
MIN_BY_STYLE = 5  # rows of a style below which it is not listed

Ranks = npt.NDArray[np.float64]


class Retrieval:
    """The ranks of every answer to every row in each gallery."""

    def __init__(
        self,
        galleries: Galleries,
        rows: Sequence[int],
        queries: Mapping[str, Sequence[Query]],
        small: Thumbnails,
    ) -> None:
        """`queries` holds an answer (C, D), or None, to each of `rows`; rows whose picture is unreadable are left out."""
        self._pairs = galleries.pairs
        self.rows: list[int] = []
        self.ranks: dict[str, dict[str, list[Ranks | None]]] = {
            name: {query: [] for query in queries} for name in GALLERIES
        }
        self.n_candidates: dict[str, list[int]] = {name: [] for name in GALLERIES}
        for place, row in enumerate(rows):
            members = {name: of(galleries, row) for name, of in GALLERIES.items()}
            small.load_({index for found in members.values() for index in found})
            if not small.is_readable(row):
                continue
            candidates = {name: small.of(found) for name, found in members.items()}
            if len(candidates[STYLE]) < 2:  # nothing to confuse it with
                continue
            self.rows.append(row)
            for name, pictures in candidates.items():
                self.n_candidates[name].append(len(pictures))
                for query, answers in queries.items():
                    self.ranks[name][query].append(_ranks(answers[place], pictures))

    def recalls(self, gallery: str, query: str, k: int = 1) -> list[float | None]:
        """By row, the share of its answers among the k nearest, 0..1; None where the query has none."""
        found = self.ranks[gallery][query]
        return [None if ranks is None else float((ranks <= k).mean()) for ranks in found]

    def report(self, ours: Sequence[str] = ("draws", "chosen")) -> dict[str, Any]:
        """Return every gallery's table; each of `ours` is compared with the best copy, row by row."""
        return {
            name: {
                "n": len(self.rows),
                "n_candidates": _spread(self.n_candidates[name]),
                "chance": retrieval_by_chance(self.n_candidates[name]),
                "queries": {query: self._figures(name, query) for query in self.ranks[name]},
                "against_copying": {
                    query: self._against_copying(name, query) for query in ours if query in self.ranks[name]
                },
                "by_style": self._by_style(name, [query for query in ours if query in self.ranks[name]]),
            }
            for name in GALLERIES
        }

    def _figures(self, gallery: str, query: str) -> dict[str, Any]:
        medians = [np.median(ranks) for ranks in self.ranks[gallery][query] if ranks is not None]
        return {
            "recall_at_1": estimate(_present(self.recalls(gallery, query, 1))),
            "recall_at_5": estimate(_present(self.recalls(gallery, query, 5))),
            "median_rank": median_estimate(medians),
        }

    def _against_copying(self, gallery: str, query: str) -> dict[str, Any]:
        """Our recall at 1 less that of the copy that does best on these rows."""
        means = {
            copy: float(np.mean(found))
            for copy in COPYING
            if copy in self.ranks[gallery] and (found := _present(self.recalls(gallery, copy)))
        }
        if not means:
            return {"baseline": None, "beats": False}
        best = max(means, key=lambda copy: means[copy])
        both = [
            (a, b)
            for a, b in zip(self.recalls(gallery, query), self.recalls(gallery, best), strict=True)
            if a is not None and b is not None
        ]
        return {"baseline": best, **difference([a for a, _ in both], [b for _, b in both])}

    def _by_style(self, gallery: str, queries: Sequence[str]) -> dict[str, Any]:
        styles: dict[str, list[int]] = {}
        for place, row in enumerate(self.rows):
            styles.setdefault(style_of(self._pairs[row]) or "none", []).append(place)
        recalls = {
            query: self.recalls(gallery, query)
            for query in (*queries, *COPYING)
            if query in self.ranks[gallery]
        }
        return {
            style: {
                query: estimate(_present([found[place] for place in places]), MIN_BY_STYLE)
                for query, found in recalls.items()
            }
            for style, places in sorted(styles.items())
        }


def zero_shot(subject: Subject) -> dict[str, Any]:
    """The section on the hard rows: draws, the chosen ones, and every yardstick, in both galleries."""
    draws = subject.draws()
    queries: dict[str, list[Query]] = {"draws": decoded(subject.pipe, draws.tokens[:, 0])}
    if draws.of_choice is not None:
        queries["chosen"] = decoded(subject.pipe, draws.of_choice)
    if draws.tokens.shape[1] > 1:
        queries["another_seed"] = decoded(subject.pipe, draws.tokens[:, 1])
    if len(subject.rows) > 1:
        half = max(1, len(subject.rows) // 2)
        queries["draws_of_other_captions"] = queries["draws"][-half:] + queries["draws"][:-half]
    queries["reconstructions"] = _reconstructed(subject)
    queries |= copies(subject.galleries, subject.rows, subject.small)
    return {
        "rows": "combo_hard" if subject.hard else "splits",
        "n_candidates": subject.n_candidates,
        "meaning": MEANING,
        "galleries": Retrieval(subject.galleries, subject.rows, queries, subject.small).report(),
    }


def decoded(pipe: DallePipeline, tokens: Tensor) -> list[Query]:
    """The thumbnails of draws (R, G, G)."""
    parts = [thumbnails(decode(pipe.dvae, part)) for part in torch.split(tokens, BATCH)]
    return list(np.concatenate(parts)[:, None])  # R of (1, D)


def _reconstructed(subject: Subject) -> list[Query]:
    """The thumbnails of the dVAE's reconstructions of the true pictures: the best that the tokens allow."""
    found: list[Query] = [None] * len(subject.rows)
    for positions, pictures in subject.reader.batches([subject.pairs[row] for row in subject.rows]):
        small = thumbnails(reconstruct(subject.pipe.dvae, pictures)[1])
        for position, copy in zip(positions, small, strict=True):
            found[position] = copy[None]
        subject.advance(len(positions))
    return found


def _ranks(answers: Query, candidates: npt.NDArray[np.float32]) -> Ranks | None:
    if answers is None:
        return None
    return np.array([rank_of_first(answer, candidates) for answer in answers])


def _present(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _spread(counts: Sequence[int]) -> dict[str, float | None]:
    if not counts:
        return {"least": None, "median": None, "most": None}
    return {"least": min(counts), "median": float(np.median(counts)), "most": max(counts)}
