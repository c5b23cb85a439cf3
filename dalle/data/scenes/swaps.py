"""Pairs of captions that differ in one attribute word: what a model that composes draws differently.

Both captions have the same form. The checker of the changed attribute is `checkers.shows(picture, swap.after)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dalle.data.scenes.captions import make_captions
from dalle.data.scenes.colours import GROUND_COLOURS, THING_COLOURS, are_distinct
from dalle.data.scenes.scene import OPPOSITE, Kind, Scene

SWAPPED_KINDS: tuple[Kind, ...] = ("color", "count", "position", "size", "ground")


@dataclass(frozen=True)
class Swap:
    """A scene and the same scene with one attribute changed."""

    before: Scene
    after: Scene

    @property
    def captions(self) -> tuple[str, str]:
        """The plainest caption of both."""
        return make_captions(self.before)[0], make_captions(self.after)[0]


def make_swaps(scenes: Sequence[Scene], n: int, seed: int) -> list[Swap]:
    """Return n swaps, the kinds in equal parts, of scenes of which none is taken twice.

    Raises ValueError when there are too few scenes of a kind.
    """
    rng = np.random.default_rng([seed])
    swaps = []
    for i, kind in enumerate(SWAPPED_KINDS):
        wanted = n // len(SWAPPED_KINDS) + (i < n % len(SWAPPED_KINDS))
        # A change between white and a coloured ground adds or drops words: that is no swap of one.
        fits = [s for s in scenes if s.kind == kind and (kind != "ground" or s.ground != "white")]
        fits = [s for s in fits if kind != "size" or len(s.things) == 1]
        if len(fits) < wanted:
            raise ValueError(f"{n} swaps need {wanted} scenes of kind {kind}; there are {len(fits)}")
        chosen = rng.choice(len(fits), wanted, replace=False)
        swaps += [Swap(fits[int(j)], _swapped(fits[int(j)], rng)) for j in chosen]
    return swaps


def _swapped(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return the scene with the attribute of its kind changed."""
    if scene.kind == "count":
        others = [count for count in (1, 2, 3, 4) if count != scene.count]
        return replace(scene, count=others[int(rng.integers(len(others)))])
    if scene.kind == "position":
        assert scene.relation is not None
        return replace(scene, relation=OPPOSITE[scene.relation])
    thing = scene.things[0]
    if scene.kind == "size":
        return replace(scene, things=(replace(thing, size="small" if thing.size == "big" else "big"),))
    if scene.kind == "ground":
        return replace(scene, ground=_other(rng, scene.ground, thing.color, [*GROUND_COLOURS][1:]))
    return replace(
        scene, things=(replace(thing, color=_other(rng, thing.color, scene.ground, [*THING_COLOURS])),)
    )


def _other(rng: np.random.Generator, word: str | None, beside: str | None, words: list[str]) -> str:
    """Return a colour word that can be told apart from the present one and from the one beside it."""
    fits = [w for w in words if all(are_distinct(w, other) for other in (word, beside) if other is not None)]
    return fits[int(rng.integers(len(fits)))]
