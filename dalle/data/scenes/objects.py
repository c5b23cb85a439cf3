"""The objects of scenes: the list in objects.toml, and the drawings of them that an art set has in train."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dalle.config import Config, read_toml, validate

_SELECTOR = "-FE0F"  # asks for colour; some sets write it, some do not


class SceneObject(Config):
    """One entry of objects.toml."""

    noun: str
    plural: str | None = None  # None: noun + s
    codepoints: str  # without the variation selector
    holes: bool = False  # white inside the outline is see-through
    why: str


class ObjectFile(Config):
    """What objects.toml holds."""

    object: Annotated[tuple[SceneObject, ...], Field(min_length=1)]


def load_objects() -> tuple[SceneObject, ...]:
    """Return the objects of the package's list, in its order."""
    file = resources.files("dalle.data.scenes") / "objects.toml"
    return validate(ObjectFile, read_toml(file, "objects.toml"), "objects.toml").object


@dataclass(frozen=True)
class Source:
    """A drawing of an object that scenes may be cut from: a train row of the art set."""

    object: str
    style: str
    path: str
    holes: bool
    licence: str
    source: str  # package@version/name


def read_art(art: Path) -> list[dict[str, Any]]:
    """Return the metadata rows of a set that `dalle data emoji` built; ValueError when it is none."""
    table = art / "metadata.jsonl"
    if not table.is_file():
        raise ValueError(
            f"{art} holds no metadata.jsonl: build the art set first (dalle data emoji --out {art})"
        )
    with table.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    needed = {"file_name", "split", "style", "codepoints", "license", "source"}
    if not rows or not needed <= rows[0].keys():
        raise ValueError(
            f"{table} is not the metadata of the emoji art set: it lacks {', '.join(sorted(needed))}"
        )
    return rows


def find_sources(
    art: Path, rows: Sequence[Mapping[str, Any]], objects: tuple[SceneObject, ...], styles: frozenset[str]
) -> list[Source]:
    """Return the train drawings of the objects in the given styles, at most one for an object and style.

    A drawing of a held-out split is never among them, nor an object that another split holds out altogether.
    """
    by_code = {obj.codepoints: obj for obj in objects}
    unseen = {_code(row) for row in rows if row["split"] == "object"}
    found: dict[tuple[str, str], Source] = {}
    for row in rows:
        obj = by_code.get(_code(row))
        if obj is None or row["split"] != "train" or row["style"] not in styles or _code(row) in unseen:
            continue
        source = Source(
            obj.noun, row["style"], str(art / row["file_name"]), obj.holes, row["license"], row["source"]
        )
        found.setdefault((obj.noun, row["style"]), source)
    return list(found.values())


def _code(row: Mapping[str, Any]) -> str:
    return str(row["codepoints"]).replace(_SELECTOR, "")
