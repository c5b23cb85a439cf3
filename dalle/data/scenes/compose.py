"""Choosing scenes: what is shown, in which colours and where, drawn from a random generator."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from dalle.data.art.packages import DEFAULT_STYLES
from dalle.data.scenes.colours import GROUND_COLOURS, THING_COLOURS, are_distinct, is_legible, stands_out
from dalle.data.scenes.lettering import FONTS
from dalle.data.scenes.library import Look
from dalle.data.scenes.scene import KINDS, Kind, Relation, Scene, Size, Thing
from dalle.data.scenes.shapes import SHAPES
from dalle.data.scenes.splits import split_of

Option = TypeVar("Option")

_SHARES: Mapping[Kind, float] = {
    "color": 0.26,
    "count": 0.12,
    "position": 0.20,
    "size": 0.10,
    "ground": 0.10,
    "word": 0.17,
    "top_bottom": 0.05,
}
_SHAPE_SHARE = 0.25  # of the things, the rest are drawings
_COLOURED_GROUND = 0.3  # of the scenes of other kinds than ground and word
_COLOURED_GROUND_OF_WORDS = 0.15  # letters are hard enough
_NONSENSE = 0.5  # of the words: random letters, so that letters are learned and not words
_MAX_TRIES = 5000
_COLOUR_STYLES = frozenset(style.name for style in DEFAULT_STYLES if style.is_colour)


class Composer:
    """Draw scenes of one kind after another; no scene comes twice from one composer."""

    def __init__(self, looks: Sequence[Look], words: Sequence[str], seed: int, max_letters: int) -> None:
        """Index what can be shown. words: in capitals; max_letters: of the random ones."""
        self.seed, self.max_letters = seed, max_letters
        self.looks = {(look.object, look.style, look.color): look for look in looks}
        self.words: dict[int, list[str]] = {}
        for word in words:
            self.words.setdefault(len(word), []).append(word)
        colourful = [look for look in looks if look.style is None or look.style in _COLOUR_STYLES]
        self.coloured = _by_object(look for look in colourful if look.color is not None)
        self.own = _by_object(look for look in colourful if look.color is None)
        self.countable = _by_object(look for look in colourful if look.is_whole)
        self.in_styles = _by_object(look for look in looks if look.color is None)
        self._seen: set[Scene] = set()

    def draw(self, kind: Kind, n: int) -> Iterator[tuple[Scene, str]]:
        """Yield n scenes of a kind that this composer has not drawn before, each with its split.

        Raises ValueError when the drawings do not give so many.
        """
        rng = np.random.default_rng([self.seed, KINDS.index(kind)])
        make: Callable[[np.random.Generator], Scene | None] = getattr(self, f"_{kind}")
        for i in range(n):
            for _ in range(_MAX_TRIES):
                scene = make(rng)
                split = None if scene is None or scene in self._seen else split_of(scene)
                if scene is not None and split is not None:
                    self._seen.add(scene)
                    yield scene, split
                    break
            else:
                raise ValueError(f"the drawings give about {i} different {kind} scenes; {n} were asked for")

    def _color(self, rng: np.random.Generator) -> Scene | None:
        look = self._pick_coloured(rng)
        return self._on_ground(rng, "color", [look], (_thing(look),), _COLOURED_GROUND)

    def _count(self, rng: np.random.Generator) -> Scene | None:
        look = self._pick(rng, self.countable)
        count = int(rng.integers(1, 5))
        scene = self._on_ground(rng, "count", [look], (_thing(look),), _COLOURED_GROUND)
        return None if scene is None else Scene("count", scene.things, scene.ground, count=count)

    def _position(self, rng: np.random.Generator) -> Scene | None:
        looks = self._pick_pair(rng)
        if looks is None:
            return None
        relations: tuple[Relation, ...] = ("left", "right", "above", "below")
        relation = relations[int(rng.integers(4))]
        things = tuple(map(_thing, looks))
        scene = self._on_ground(rng, "position", looks, things, _COLOURED_GROUND)
        return None if scene is None else Scene("position", things, scene.ground, relation)

    def _size(self, rng: np.random.Generator) -> Scene | None:
        sizes: tuple[Size, Size] = ("big", "small") if rng.random() < 0.5 else ("small", "big")
        if rng.random() < 0.5:
            looks = [self._pick(rng, self.own if rng.random() < 0.5 else self.coloured)]
        else:
            pair = self._pick_pair(rng)
            if pair is None:
                return None
            looks = pair
        things = tuple(
            Thing(look.object, look.color, look.style, size) for look, size in zip(looks, sizes, strict=False)
        )
        return self._on_ground(rng, "size", looks, things, _COLOURED_GROUND)

    def _ground(self, rng: np.random.Generator) -> Scene | None:
        look = self._pick(rng, self.own if rng.random() < 0.5 else self.coloured)
        return self._on_ground(rng, "ground", [look], (_thing(look),), 0.95)

    def _word(self, rng: np.random.Generator) -> Scene | None:
        length = int(rng.integers(2, self.max_letters + 1))
        if rng.random() < _NONSENSE or not self.words.get(length):
            word = "".join(chr(ord("A") + int(i)) for i in rng.integers(0, 26, length))
        else:
            word = _choose(rng, self.words[length])
        colour, font = _choose(rng, list(THING_COLOURS)), _choose(rng, FONTS).name
        ground = "white"
        if rng.random() < _COLOURED_GROUND_OF_WORDS:
            ground = _choose(rng, list(GROUND_COLOURS))
            if ground != "white" and not is_legible(colour, ground):
                return None
        return Scene("word", (), ground, word=word, font=font, color=colour)

    def _top_bottom(self, rng: np.random.Generator) -> Scene | None:
        looks = self.in_styles[_choose(rng, sorted(self.in_styles))]
        if len(looks) < 2:
            return None
        first, second = (looks[int(i)] for i in rng.choice(len(looks), 2, replace=False))
        return Scene("top_bottom", (_thing(first), _thing(second)))

    def _on_ground(
        self,
        rng: np.random.Generator,
        kind: Kind,
        looks: Sequence[Look],
        things: tuple[Thing, ...],
        share: float,
    ) -> Scene | None:
        """Return the scene on white or a ground of another colour than all things; None where none fits."""
        ground = "white"
        if rng.random() < share:
            shown = frozenset().union(*(look.shown for look in looks))
            grounds = [
                word
                for word in GROUND_COLOURS
                if word != "white" and all(stands_out(other, word) for other in shown)
            ]
            if not grounds:
                return None
            ground = _choose(rng, grounds)
        return Scene(kind, things, ground)

    def _pick(self, rng: np.random.Generator, looks: dict[str, list[Look]]) -> Look:
        """Return a look of a shape or a drawing; every object is as likely as any other."""
        names = [name for name in looks if name in SHAPES]
        if not names or rng.random() >= _SHAPE_SHARE:
            names = [name for name in looks if name not in SHAPES]
        return _choose(rng, looks[_choose(rng, sorted(names))])

    def _pick_coloured(self, rng: np.random.Generator) -> Look:
        """Return a look with a colour word; every colour of an object is as likely as any other."""
        found = self.coloured[self._pick(rng, self.coloured).object]
        colour = _choose(rng, sorted({str(look.color) for look in found}))
        return _choose(rng, [look for look in found if look.color == colour])

    def _pick_pair(self, rng: np.random.Generator) -> list[Look] | None:
        """Return two coloured looks, drawings of one style, whose colours cannot be mistaken for each other."""
        first, second = self._pick_coloured(rng), self._pick_coloured(rng)
        if first.object == second.object:
            return None
        if first.style is not None and second.style is not None and first.style != second.style:
            found = self.looks.get((second.object, first.style, second.color))
            if found is None:
                return None
            second = found
        for one, other in ((first, second), (second, first)):
            if not all(are_distinct(str(one.color), word) for word in other.shown | {str(other.color)}):
                return None
        return [first, second]


def share_out(n: int, kinds: Sequence[Kind]) -> dict[Kind, int]:
    """Return how many of n scenes each kind gets."""
    total = sum(_SHARES[kind] for kind in kinds)
    counts = {kind: int(n * _SHARES[kind] / total) for kind in kinds}
    counts[kinds[0]] += n - sum(counts.values())
    return counts


def _by_object(looks: Iterable[Look]) -> dict[str, list[Look]]:
    found: dict[str, list[Look]] = {}
    for look in looks:
        found.setdefault(look.object, []).append(look)
    return found


def _thing(look: Look) -> Thing:
    return Thing(look.object, look.color, look.style)


def _choose(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    return options[int(rng.integers(len(options)))]
