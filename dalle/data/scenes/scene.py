"""What a scene shows, exactly: the record that pictures, captions, splits and checkers are made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

Kind = Literal["color", "count", "position", "size", "ground", "word", "top_bottom"]
Relation = Literal["left", "right", "above", "below"]
Size = Literal["big", "small"]
KINDS: tuple[Kind, ...] = get_args(Kind)
OPPOSITE: dict[Relation, Relation] = {"left": "right", "right": "left", "above": "below", "below": "above"}


def named_kinds(names: Sequence[str]) -> tuple[Kind, ...]:
    """Return the kinds with these names, all of them for none; ValueError for an unknown name."""
    for name in names:
        if name not in KINDS:
            raise ValueError(f"unknown kind of scene {name!r}; the kinds are {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if not names or kind in names)


@dataclass(frozen=True)
class Thing:
    """A drawing or a shape in a scene."""

    object: str  # singular noun of objects.toml, or the name of a shape
    color: str | None  # None: in its own colours, which the caption does not name
    style: str | None  # name of an art style; None: a plain shape
    size: Size | None = None  # None: the caption does not name it


@dataclass(frozen=True)
class Scene:
    """One picture. Which fields are set follows from the kind."""

    kind: Kind
    things: tuple[Thing, ...]  # one; two for position, pairs of sizes, and top and bottom; none for a word
    ground: str = "white"
    relation: Relation | None = None  # where the first thing is, seen from the second
    count: int = 1  # how often the one thing is there
    word: str | None = None  # in capitals
    font: str | None = None  # name in lettering.FONTS
    color: str | None = None  # of the word

    def to_fields(self) -> dict[str, Any]:
        """Return the columns of a metadata row that `from_fields` reads."""
        things = [
            {"object": t.object, "color": t.color, "style": t.style, "size": t.size} for t in self.things
        ]
        return {
            "scene": self.kind,
            "things": things,
            "ground": self.ground,
            "relation": self.relation,
            "count": self.count,
            "word": self.word,
            "font": self.font,
            "color": self.color,
        }

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Read a scene from a metadata row; ValueError for a row that holds none."""
        kind = fields.get("scene")
        if kind not in KINDS:
            raise ValueError(f"scene is {kind!r}; it has to be one of {', '.join(KINDS)}")
        try:
            things = tuple(Thing(**thing) for thing in fields["things"])
            names = ("ground", "relation", "count", "word", "font", "color")
            return cls(kind, things, **{name: fields[name] for name in names})
        except (KeyError, TypeError) as error:
            raise ValueError(f"the fields of a {kind} scene are damaged: {error!r}") from error

    def combinations(self) -> tuple[tuple[str, ...], ...]:
        """Return what the picture combines, the combination its kind is about first; see splits.py."""
        found = [("color", thing.object, thing.color) for thing in self.things if thing.color is not None]
        if self.ground != "white":
            found += [("ground", thing.object, self.ground) for thing in self.things]
        primary = self._primary()
        return (primary, *(combination for combination in dict.fromkeys(found) if combination != primary))

    def _primary(self) -> tuple[str, ...]:
        if self.kind == "word":
            assert self.word is not None
            return ("word", self.word)
        first = self.things[0]
        if self.kind == "color":
            assert first.color is not None
            return ("color", first.object, first.color)
        if self.kind == "count":
            return ("count", first.object, str(self.count))
        if self.kind == "ground":
            return ("ground", first.object, self.ground)
        if self.kind == "size" and len(self.things) == 1:
            assert first.size is not None
            return ("size", first.object, first.size)
        second = self.things[1]
        if self.kind == "size":
            big, small = (first, second) if first.size == "big" else (second, first)
            return ("sizes", big.object, small.object)
        if self.kind == "position":
            assert self.relation is not None
            if self.relation in ("right", "below"):  # the same picture, told from the other thing
                return ("position", second.object, OPPOSITE[self.relation], first.object)
            return ("position", first.object, self.relation, second.object)
        return ("styles", first.object, *sorted((str(first.style), str(second.style))))
