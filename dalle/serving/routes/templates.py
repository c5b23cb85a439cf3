"""Templates: the explorer's captions as sentences with words that can be swapped, read from TOML files.

Source: the DALL·E page of January 2021, whose visuals were captions with drop-downs; a slot that occurs twice in a
sentence changes in both places.
"""

import re
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Self

from fastapi import APIRouter
from pydantic import AfterValidator, Field, model_validator

from dalle.config import Config, read_toml, validate
from dalle.serving.state import State

SLOT = re.compile(r"\{([a-z][a-z0-9_]*)\}")


def _check_line(line: str) -> str:
    if line != line.strip() or not line.isprintable():
        raise ValueError("must be text of one line without spaces at its ends")
    return line


def _check_word(word: str) -> str:
    if "{" in word or "}" in word:
        raise ValueError("must hold no braces")
    return _check_line(word)


def _check_words(words: tuple[str, ...]) -> tuple[str, ...]:
    twice = [word for i, word in enumerate(words) if word in words[:i]]
    if twice:
        raise ValueError(f"a word is there twice: {twice[0]}")
    return words


Line = Annotated[str, Field(min_length=1, max_length=300), AfterValidator(_check_line)]
Word = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_check_word)]
Words = Annotated[tuple[Word, ...], Field(min_length=1, max_length=200), AfterValidator(_check_words)]


class Template(Config):
    """One sentence of the explorer."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=40)]
    title: Line
    text: Line  # with {slots}
    slots: dict[str, Words | str]  # the words of each; a name means that list of the file's [words]
    rows: str | None = None  # the slot whose words label rows of pictures when they are compared
    note: Line | None = None  # what to expect, honestly

    @model_validator(mode="after")
    def _fits(self) -> Self:
        in_text = set(SLOT.findall(self.text))
        if re.search("[{}]", SLOT.sub("", self.text)):
            raise ValueError(
                f"text of {self.id} has a brace that belongs to no {{slot}}; slots are a-z, 0-9 and _"
            )
        if in_text != set(self.slots):
            odd = sorted(in_text ^ set(self.slots))[0]
            where = "in the text but not in slots" if odd in in_text else "in slots but not in the text"
            raise ValueError(f"slot {odd} of {self.id} is {where}")
        if self.rows is not None and self.rows not in self.slots:
            raise ValueError(f"rows of {self.id} names {self.rows}, which is none of its slots")
        return self

    def words(self, slot: str) -> tuple[str, ...]:
        """The words of a slot, once no list's name stands for them."""
        words = self.slots[slot]
        assert not isinstance(words, str)
        return words

    def captions(self) -> list[str]:
        """Every caption that the template can say."""
        captions = [self.text]
        for slot in self.slots:
            captions = [
                caption.replace(f"{{{slot}}}", word) for caption in captions for word in self.words(slot)
            ]
        return captions


class TemplateFile(Config):
    """What a file of templates holds."""

    words: dict[str, Words] = Field(default_factory=dict)  # lists that slots name
    template: Annotated[tuple[Template, ...], Field(min_length=1, max_length=200)]


def load_templates(more: Path | None = None) -> list[Template]:
    """The templates of the package, then those of another file; one with a known id takes that one's place.

    Raises ValueError, one line with the file's name, for a file that is missing, no TOML or not of this form.
    """
    own = _read(resources.files("dalle.serving") / "templates.toml", "templates.toml")
    templates = _resolved(own, own.words, "templates.toml")
    if more is not None:
        theirs = _read(more, str(more))
        templates |= _resolved(theirs, {**own.words, **theirs.words}, str(more))
    return list(templates.values())


def _read(file: Traversable, source: str) -> TemplateFile:
    return validate(TemplateFile, read_toml(file, source), source)


def _resolved(file: TemplateFile, words: dict[str, tuple[str, ...]], source: str) -> dict[str, Template]:
    """The templates of a file by id, with the words in place of the names of lists."""
    found = dict[str, Template]()
    for template in file.template:
        if template.id in found:
            raise ValueError(f"{source}: two templates have the id {template.id}: give one another")
        slots = dict[str, tuple[str, ...] | str]()
        for slot, given in template.slots.items():
            if isinstance(given, str) and given not in words:
                known = ", ".join(words)
                raise ValueError(
                    f"{source}: slot {slot} of {template.id} names the list {given}, which [words] has not; it has {known}"
                )
            slots[slot] = words[given] if isinstance(given, str) else given
        found[template.id] = template.model_copy(update={"slots": slots})
    return found


def router(state: State) -> APIRouter:
    """The route /api/templates; ValueError when the settings' file of templates is none."""
    routes = APIRouter(prefix="/api", tags=["templates"])
    templates = [template.model_dump(mode="json") for template in load_templates(state.settings.templates)]

    @routes.get("/templates")
    def list_templates() -> dict[str, Any]:
        """The explorer's captions, the package's first."""
        return {"templates": templates}

    return routes
