"""Templates: every caption that the explorer can say fits the bundled model, and a user's file is checked strictly."""

import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import cast

import pytest
from fastapi.testclient import TestClient

from dalle.serving.app import create_app
from dalle.serving.routes.templates import Template, load_templates
from dalle.serving.settings import Settings
from dalle.tokenizer import Tokenizer
from tests.tiny import tiny_pipe

TEMPLATES = load_templates()
MAX_WORD_TOKENS = 3  # a word that the tokenizer hardly saw falls into more; names of countries are rare
MAX_NAME_TOKENS = 5

each_template = pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.id)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(cast(Path, resources.files("dalle") / "bundled" / "tokenizer"))


@each_template
def test_every_caption_fits_the_bundled_model(template: Template, tokenizer: Tokenizer) -> None:
    captions = template.captions()
    assert len(captions) == len(set(captions)) <= 10_000
    for caption in captions:
        assert "{" not in caption and "  " not in caption
        assert 0 < tokenizer.count(caption) <= tokenizer.max_tokens


@each_template
def test_every_word_is_known_to_the_bundled_tokenizer(template: Template, tokenizer: Tokenizer) -> None:
    words = {word for caption in template.captions() for word in re.split(r"[ ,]+", caption)}
    for word in words:
        assert tokenizer.count(word) <= (MAX_NAME_TOKENS if word[0].isupper() else MAX_WORD_TOKENS), word
        assert tokenizer.decode(tokenizer.encode(word)).replace(" ", "") == word.lower()


@pytest.mark.parametrize("word", ["capybara", "daikon", "chimera", "claymation"])
def test_words_of_the_blog_that_the_art_set_has_not_would_be_noticed(word: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.count(word) > MAX_WORD_TOKENS


def test_the_package_has_the_blogs_kinds_of_visuals_each_with_an_honest_note() -> None:
    assert len(TEMPLATES) >= 10
    assert all(template.note and template.slots for template in TEMPLATES)
    assert all(1 < len(template.words(slot)) for template in TEMPLATES for slot in template.slots)
    assert sum(template.rows is not None for template in TEMPLATES) >= 8


def test_a_slot_that_occurs_twice_changes_in_both_places() -> None:
    template = Template(
        id="x", title="X", text="a {a} of {a} and {b}", slots={"a": ("1", "2"), "b": ("3", "4")}
    )
    assert template.captions() == ["a 1 of 1 and 3", "a 1 of 1 and 4", "a 2 of 2 and 3", "a 2 of 2 and 4"]


# A user's file

OWN = """
[words]
fruit = ["a mango", "a lime"]
[[template]]
id = "mine"
title = "Mine"
text = "{fruit} or {more}, {style} style"
rows = "fruit"
slots = { fruit = "fruit", more = ["a pear"], style = "styles" }
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "own.toml"
    file.write_text(text)
    return file


def test_a_users_templates_come_after_the_packages_and_may_use_its_words(tmp_path: Path) -> None:
    *packages, mine = load_templates(write(tmp_path, OWN))
    assert packages == TEMPLATES
    assert mine.words("fruit") == ("a mango", "a lime") and "noto" in mine.words("style")


def test_a_users_template_takes_the_place_of_the_packages_with_its_id(tmp_path: Path) -> None:
    templates = load_templates(write(tmp_path, OWN.replace('"mine"', '"styles"')))
    assert [template.id for template in templates] == [template.id for template in TEMPLATES]
    assert templates[0].title == "Mine" and templates[1:] == TEMPLATES[1:]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("[[template]]", "[[template", "not valid TOML"),
        ('title = "Mine"\n', "", "title is missing"),
        ('title = "Mine"', "title = 3", "must be text in quotes"),
        ('title = "Mine"', 'titel = "Mine"', "did you mean template.title"),
        ('id = "mine"', 'id = "../x"', "id"),
        ('rows = "fruit"', 'rows = "x"', "none of its slots"),
        ("{more}", "{less}", "slot less of mine is in the text but not in slots"),
        ("{fruit} or ", "", "slot fruit of mine is in slots but not in the text"),
        ("{more}", "{more} {", "brace that belongs to no"),
        ('"a pear"', "", "at least 1 item"),
        ('"a pear"', '"a pear", "a pear"', "there twice"),
        ('"a pear"', '"{fruit}"', "must hold no braces"),
        ('"a pear"', '" a pear"', "spaces at its ends"),
        ('"a pear"', '"a\\npear"', "one line"),
        ('style = "styles"', 'style = "stiles"', "names the list stiles"),
        (
            "[[template]]",
            '[[template]]\nid = "mine"\ntitle = "X"\ntext = "x"\nslots = {}\n[[template]]',
            "two templates",
        ),
        (OWN, "", "template is missing"),
    ],
)
def test_a_mistake_in_a_users_file_is_one_clear_line_with_its_name(
    tmp_path: Path, old: str, new: str, line: str
) -> None:
    assert old in OWN
    with pytest.raises(ValueError, match=rf"^[^\n]*own\.toml: [^\n]*{re.escape(line)}[^\n]*$"):
        load_templates(write(tmp_path, OWN.replace(old, new)))


def test_a_file_that_is_missing_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"own\.toml: cannot read the file"):
        load_templates(tmp_path / "own.toml")


# Over HTTP


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("data")
    settings = Settings(data_dir=folder, templates=write(folder, OWN))
    with TestClient(create_app(settings, tiny_pipe(["a cat"])), base_url="http://127.0.0.1:8000") as client:
        yield client


def test_the_page_gets_all_templates_with_their_words(client: TestClient) -> None:
    *packages, mine = client.get("/api/templates").json()["templates"]
    assert [template["id"] for template in packages] == [template.id for template in TEMPLATES]
    assert (
        mine["slots"]["fruit"] == ["a mango", "a lime"] and mine["rows"] == "fruit" and mine["note"] is None
    )
    assert all(isinstance(words, list) for template in packages for words in template["slots"].values())


def test_a_server_with_a_wrong_file_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="own"):
        create_app(Settings(data_dir=tmp_path, templates=write(tmp_path, "x")), tiny_pipe(["a cat"]))
