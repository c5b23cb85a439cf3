"""What a model's CLIPs are worth on held-out pairs, and what the one that judges says of the draws.

Source: Radford et al. 2021, §3.1 and App. A.3; Park et al. 2021 (R-precision); Hessel et al. 2021 (CLIPScore). The CLIP
that chooses among candidates (`clip/`) never scores the model's draws: a second one does (`judge/`).
Shapes: M pictures, E width of the embedding, D width of CLIP's embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.data.pairs import PairSet
from dalle.evaluation.galleries import N_DISTRACTORS, OBJECT_FIELD, distractors, pools_of, style_of
from dalle.evaluation.pictures import PictureReader
from dalle.evaluation.protocols import Advance
from dalle.evaluation.sheets import spread
from dalle.evaluation.zero_shot import (
    CLIPSCORE_PREFIX,
    accuracy,
    clip_score,
    linear_probe,
    r_precision,
    retrieval_both_ways,
    standard_error,
)
from dalle.generation.rerank import Ranker

CAPTIONS_A_STYLE = 64  # that a style's class vector is the mean of
PROBE_FIELD = (
    "group"  # what the linear probe tells pictures by where nothing else is asked for: the art set's
)
MAX_PROBE_PICTURES = 4096  # of split train; a fifth of them chooses the strength


class CaptionVectors:
    """Unit vectors of pairs' first captions, each encoded once; over-long captions are cut."""

    def __init__(self, ranker: Ranker, pairs: PairSet) -> None:
        self._ranker, self._pairs = ranker, pairs
        self._known: dict[int, Tensor] = {}

    def __call__(self, indices: Sequence[int]) -> Tensor:
        """Of these pairs, (M, E) float32 on the CPU."""
        missing = [index for index in dict.fromkeys(indices) if index not in self._known]
        if missing:
            captions = [self._pairs[index].captions[0] for index in missing]
            vectors = self._ranker.encode_captions(captions, truncate=True)
            self._known.update(zip(missing, vectors, strict=True))
        return torch.stack([self._known[index] for index in indices])


class RankerReport:
    """Measures one CLIP on pairs of a data set.

    Args:
        ranker: the CLIP.
        pairs: all pairs: galleries and class captions come from them too.
        advance: called with the number of pictures just done.
        probe: the field whose values a linear probe tells apart; data without it get no probe.
    """

    def __init__(self, ranker: Ranker, pairs: PairSet, advance: Advance, probe: str = PROBE_FIELD) -> None:
        self.ranker, self.pairs, self.advance, self.probe = ranker, pairs, advance, probe
        self.captions = CaptionVectors(ranker, pairs)
        self._reader = PictureReader(ranker.clip.config.image_size)
        self._pools = pools_of(pairs)
        self._styles = self._style_classes()

    def figures(self, members: dict[str, list[int]], hard: Sequence[int]) -> dict[str, Any]:
        """By split and on the `hard` rows among them; recalls and shares in 0..1, beside what chance gives."""
        by_split, vectors_of = {}, dict[int, Tensor]()
        for split, indices in members.items():
            kept, vectors = self._pictures(indices)
            vectors_of |= dict(zip(kept, vectors, strict=True))
            by_split[split] = self._split(kept, vectors)
        chosen = [index for index in hard if index in vectors_of]
        report: dict[str, Any] = {"splits": by_split}
        if chosen:
            report["combo_hard"] = self._split(chosen, torch.stack([vectors_of[index] for index in chosen]))
        probe = self._probe(vectors_of)
        return report | ({"probe": probe} if probe else {})

    def draws(self, rows: Sequence[int], drawn: Tensor) -> dict[str, Any]:
        """Of one draw (M, 3, H, W) in [0, 1] a row's caption: CLIPScore and R-precision beside the true pictures'."""
        kept, true = self._pictures(rows)
        places = [list(rows).index(row) for row in kept]
        vectors = self.ranker.encode_pictures(self.ranker.clip.fit(drawn[places]))
        texts = self.captions(kept)
        other = texts.roll(max(1, len(texts) // 2), dims=0)
        scores = {
            "draws": clip_score(vectors, texts),
            "true_pictures": clip_score(true, texts),
            "draws_with_other_captions": clip_score(vectors, other),
        }
        prefixed = [CLIPSCORE_PREFIX + self.pairs[index].captions[0] for index in kept]
        of_prefixed = self.ranker.encode_captions(prefixed, truncate=True)
        return {
            "clip_score": {name: float(score.mean()) for name, score in scores.items()},
            "clip_score_with_prefix": {  # as its authors', whose CLIP knew photographs
                "draws": float(clip_score(vectors, of_prefixed).mean()),
                "true_pictures": float(clip_score(true, of_prefixed).mean()),
            },
            "r_precision": self._r_precision(kept, vectors),
            "n": len(kept),
        }

    def _pictures(self, indices: Sequence[int]) -> tuple[list[int], Tensor]:
        """The readable ones of these pairs and their pictures' unit vectors (M, E)."""
        kept, vectors = list[int](), [torch.zeros(0, self.ranker.clip.config.d_embed)]
        for positions, pictures in self._reader.batches([self.pairs[index] for index in indices]):
            kept += [indices[position] for position in positions]
            vectors.append(self.ranker.encode_pictures(pictures))
            self.advance(len(positions))
        return kept, torch.cat(vectors)

    def _split(self, indices: list[int], vectors: Tensor) -> dict[str, Any]:
        if not indices:
            return {"n_pictures": 0}
        figures: dict[str, Any] = {
            "n_pictures": len(indices),
            "r_precision": self._r_precision(indices, vectors),
            "retrieval": retrieval_both_ways(vectors, self.captions(indices)),
        }
        names = list(self._styles)
        known = [place for place, index in enumerate(indices) if style_of(self.pairs[index]) in self._styles]
        if len(names) > 1 and known:
            truth = [names.index(str(style_of(self.pairs[indices[place]]))) for place in known]
            classes = torch.stack(list(self._styles.values()))
            figures["style_accuracy"] = accuracy(vectors[known], classes, truth)
            figures["style_chance"] = 1 / len(names)
        return figures

    def _r_precision(self, indices: Sequence[int], vectors: Tensor) -> dict[str, float]:
        """How often a picture's own caption is nearer than 99 of other objects in its style."""
        galleries = [
            [index, *distractors(self.pairs, index, self._pools[style_of(self.pairs[index])])]
            for index in indices
        ]
        where = {index: place for place, index in enumerate({i for gallery in galleries for i in gallery})}
        captions = self.captions(list(where))
        share = r_precision(vectors, captions, [[where[i] for i in gallery] for gallery in galleries])
        chance = sum(1 / len(gallery) for gallery in galleries) / len(galleries)
        return {
            "share": share,
            "standard_error": standard_error(share, len(indices)),
            "chance": chance,
            "n_captions": N_DISTRACTORS + 1,
        }

    def _style_classes(self) -> dict[str, Tensor]:
        """A unit vector (E,) a style: the mean over captions of split train, an ensemble over objects.

        Where objects are named (field `okey`), every style has captions of the same ones: then they cancel out.
        """
        pools, named = dict[str, list[int]](), dict[str, dict[str, int]]()
        for style, pool in self._pools.items():
            known = [index for index in pool.tolist() if self.pairs[index].split == "train"]
            if style is not None and known:
                pools[style] = known
                okeys = [self.pairs[index].fields.get(OBJECT_FIELD) for index in known]
                named[style] = {
                    str(okey): i for okey, i in zip(okeys, known, strict=True) if okey is not None
                }
        shared = sorted(set.intersection(*map(set, named.values()))) if named else []
        classes = {}
        for style, known in pools.items():
            chosen = [named[style][okey] for okey in spread(shared, CAPTIONS_A_STYLE)] if shared else known
            vectors = self.captions(spread(chosen, CAPTIONS_A_STYLE))
            classes[style] = F.normalize(vectors.mean(dim=0), dim=-1)
        return classes

    def _probe(self, held_out: dict[int, Tensor]) -> dict[str, Any] | None:
        """A linear probe on unit vectors: fitted on split train, scored on what is held out."""

        def label(index: int) -> str | None:
            value = self.pairs[index].fields.get(self.probe)
            return None if value is None else str(value)

        known = [i for i, pair in enumerate(self.pairs) if pair.split == "train" and label(i) is not None]
        names = sorted({str(label(index)) for index in known})
        tested = [index for index in held_out if label(index) in names]
        if len(names) < 2 or len(known) < 10 or not tested:
            return None
        kept, vectors = self._pictures(spread(known, MAX_PROBE_PICTURES))
        labels = torch.tensor([names.index(str(label(index))) for index in kept])
        is_validation = torch.arange(len(kept)) % 5 == 0
        probe = linear_probe(
            (vectors[~is_validation], labels[~is_validation]), (vectors[is_validation], labels[is_validation])
        )
        truth = torch.tensor([names.index(str(label(index))) for index in tested])
        features = torch.stack([held_out[index] for index in tested])
        commonest = float(truth.bincount().max() / len(truth))
        return {
            "field": self.probe,
            "n_classes": len(names),
            "n_train": len(kept),
            "n": len(tested),
            "strength": probe.strength,
            "accuracy": probe.accuracy(features, truth),
            "always_the_commonest": commonest,
        }


def best_of(chosen_by: Tensor, judged: Tensor, counts: Sequence[int]) -> list[dict[str, float]]:
    """The rerank curve: the judge's mean score of the candidate that a ranker puts first among N (DALL·E, fig. 6).

    Each caption's score is the mean over all of its C // N groups of N candidates, so that small N, too, use all draws.

    Args:
        chosen_by: the ranker's scores (P, C) of C candidates for each of P captions.
        judged: the judge's scores (P, C) of the same.
        counts: the values of N, the first of which all others are compared with, caption by caption.

    Returns:
        A row for each N: `n`, `score` and its standard error over captions, `gain` over the first N and its paired one.
    """
    n_captions, rows = len(judged), list[dict[str, float]]()
    first: Tensor | None = None
    for n in counts:
        n_used = judged.shape[1] // n * n
        groups = chosen_by[:, :n_used].reshape(n_captions, -1, n)  # (P, C // N, N)
        best = groups.argmax(dim=2, keepdim=True)
        score = judged[:, :n_used].reshape_as(groups).gather(2, best).double().mean(dim=(1, 2))  # (P,)
        first = score if first is None else first
        gain = score - first
        spread_of = [float(x.std() / n_captions**0.5) if n_captions > 1 else 0.0 for x in (score, gain)]
        rows.append(
            {
                "n": n,
                "score": float(score.mean()),
                "standard_error": spread_of[0],
                "gain": float(gain.mean()),
                "gain_standard_error": spread_of[1],
            }
        )
    return rows
