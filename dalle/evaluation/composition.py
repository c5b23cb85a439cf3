"""The section on composed scenes: does the draw show the colour, position, size, count or word that the caption asks for?

Source: GenEval (Ghosh et al. 2023) asks a detector; our scenes have exact checkers (`dalle.data.scenes`), whose own
accuracy on true pictures stands first. Chance is the same draws held against other captions of the kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle.data.scenes.checkers import Pixels, shows
from dalle.data.scenes.reader import WordReader
from dalle.data.scenes.scene import Scene
from dalle.evaluation.intervals import difference, estimate
from dalle.evaluation.metrics import to_bytes
from dalle.evaluation.protocols import BATCH, decode, reconstruct
from dalle.evaluation.sheets import spread
from dalle.evaluation.subject import Subject

MAX_ROWS = 128  # of each kind
UNCHECKED = ("top_bottom",)  # what is right there is a question of other pictures
Check = Callable[[Pixels, Scene], bool]


def scene_rows(subject: Subject) -> dict[str, list[int]]:
    """The measured pairs that are scenes with a checker, by kind."""
    found: dict[str, list[int]] = {}
    for index in subject.everyone:
        kind = subject.pairs[index].fields.get("scene")
        if kind is not None and kind not in UNCHECKED:
            found.setdefault(str(kind), []).append(index)
    return {kind: spread(rows, MAX_ROWS) for kind, rows in sorted(found.items())}


def composition(subject: Subject) -> dict[str, Any]:
    """Shares of pictures that show what their scene says, by kind; the draws beside true pictures and chance."""
    by_kind = scene_rows(subject)
    if not by_kind:
        return {"refused": "the data hold no scenes: build them with `dalle data scenes`"}
    found: dict[str, Any] = {}
    for kind, rows in by_kind.items():
        try:
            check = _reads() if kind == "word" else shows
        except ValueError as error:
            found[kind] = {"refused": str(error)}
            continue
        found[kind] = _kind(subject, kind, rows, check)
    return {"kinds": found}


def _reads() -> Check:
    reader = WordReader()
    return lambda picture, scene: scene.word is not None and reader.shows(picture, scene.word)


def _kind(subject: Subject, kind: str, rows: list[int], check: Check) -> dict[str, Any]:
    scenes = [Scene.from_fields(subject.pairs[row].fields) for row in rows]
    draws = subject.draw(rows, subject.n_candidates, f"scene-{kind}")
    pictures = {"draws": _pixels(subject, draws.tokens[:, 0])}
    if draws.of_choice is not None:
        pictures["chosen"] = _pixels(subject, draws.of_choice)
    hits = {
        name: [check(picture, scene) for picture, scene in zip(found, scenes, strict=True)]
        for name, found in pictures.items()
    }
    half = max(1, len(scenes) // 2)
    others = scenes[half:] + scenes[:half]
    hits["draws_of_other_captions"] = [
        check(picture, scene) for picture, scene in zip(pictures["draws"], others, strict=True)
    ]
    hits |= _true(subject, rows, scenes, check)
    table: dict[str, Any] = {name: estimate(found) for name, found in hits.items()}
    best = "chosen" if "chosen" in hits else "draws"
    return table | {"against_shuffled": difference(hits[best], hits["draws_of_other_captions"])}


def _true(
    subject: Subject, rows: Sequence[int], scenes: Sequence[Scene], check: Check
) -> dict[str, list[bool]]:
    """The checker's verdicts on readable true pictures and their reconstructions."""
    found: dict[str, list[bool]] = {"true_pictures": [], "reconstructions": []}
    for positions, pictures in subject.reader.batches([subject.pairs[row] for row in rows]):
        copies = reconstruct(subject.pipe.dvae, pictures)[1]
        for name, batch in (("true_pictures", pictures), ("reconstructions", copies)):
            found[name] += [
                check(picture, scenes[place])
                for place, picture in zip(positions, _arrays(batch), strict=True)
            ]
        subject.advance(len(positions))
    return found


def _pixels(subject: Subject, tokens: Tensor) -> list[Pixels]:
    return [
        picture for part in torch.split(tokens, BATCH) for picture in _arrays(decode(subject.pipe.dvae, part))
    ]


def _arrays(pictures: Tensor) -> list[Pixels]:
    """Pictures (B, 3, H, W) in [0, 1] as arrays (H, W, 3) uint8."""
    return list(np.ascontiguousarray(to_bytes(pictures).permute(0, 2, 3, 1).numpy()))
