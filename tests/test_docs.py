"""What README.md and docs/ name exists: symbols, tests, files, commands, options, make targets."""

import ast
import importlib
import itertools
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAPER = ROOT / "docs" / "paper.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]

SYMBOL = re.compile(r"`(dalle(?:\.\w+)+)(?:\([^`]*\))?`")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+(?:::\w+)?)`")
FILE = re.compile(r"`((?:dalle|tests|docs|benchmarks)/[\w./*-]*)`")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def resolve(symbol: str) -> Any:
    """The object a dotted name stands for, fields of records included; LookupError where there is none."""
    first, *rest = symbol.split(".")
    thing: Any = importlib.import_module(first)
    for name in rest:
        fields = {**getattr(thing, "model_fields", {}), **getattr(thing, "__dataclass_fields__", {})}
        if name in fields:
            thing = fields[name]
        elif hasattr(thing, name):
            thing = getattr(thing, name)
        elif hasattr(thing, "__path__") and find_spec(f"{thing.__name__}.{name}"):
            thing = importlib.import_module(f"{thing.__name__}.{name}")
        else:
            raise LookupError(f"{symbol}: no {name} in {thing!r}")
    return thing


def names_of_tests(file: Path) -> set[str]:
    """The test functions of a file, `Class::name` for methods."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{f.name}" for f in node.body if isinstance(f, ast.FunctionDef)}
    return names


def fences(page: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def command_lines(page: Path, program: str) -> list[list[str]]:
    """The words of each shell line in a page's fenced blocks that runs `program`, without comments."""
    found = []
    for language, text in fences(page):
        if language not in {"", "bash", "console", "sh", "shell"}:
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words and words[0] == program:
                found.append(words)
    return found


def parse(command: Any, words: list[str], parent: Any = None, name: str = "dalle") -> None:
    """Follow the words down the command tree, running nothing; raise on an unknown command or option."""
    context = command.context_class(command, info_name=name, parent=parent)
    if "commands" in vars(command) and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            raise LookupError(
                f"{context.command_path} has no command {words[0]}; it has {[*command.commands]}"
            )
        parse(command.commands[words[0]], words[1:], context, words[0])
        return
    context.resilient_parsing = False
    options, left_over, _ = command.make_parser(context).parse_args(args=list(words))
    if left_over:
        raise LookupError(f"{context.command_path} does not take {left_over}")
    for parameter in command.params:
        if parameter.required and not options.get(parameter.name):
            raise LookupError(f"{context.command_path} needs {parameter.name}")


def app() -> Any:
    """The typer application as a tree of commands."""
    import typer.main

    return typer.main.get_command(importlib.import_module("dalle.cli").app)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_symbol_named_in_the_documents_exists(page: Path) -> None:
    missing = []
    for symbol in dict.fromkeys(SYMBOL.findall(page.read_text(encoding="utf-8"))):
        try:
            resolve(symbol)
        except LookupError as error:
            missing.append(str(error))
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_named_in_the_documents_exists(page: Path) -> None:
    named = dict.fromkeys(TEST.findall(page.read_text(encoding="utf-8")))
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not (ROOT / file).is_file() or test not in names_of_tests(ROOT / file)
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_named_in_the_documents_exists(page: Path) -> None:
    named = dict.fromkeys(FILE.findall(page.read_text(encoding="utf-8")))
    assert [file for file in named if not any(ROOT.glob(file.rstrip("/")))] == []


def rows(page: Path) -> Iterator[list[str]]:
    """The cells of each table row, heads and rules left out."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for before, line in itertools.pairwise(lines):
        is_row = line.startswith("|") and not set(line) <= set("|-: ")
        if is_row and before.startswith("|"):
            yield [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_every_row_of_the_paper_map_names_a_symbol_and_a_test() -> None:
    text = PAPER.read_text(encoding="utf-8")
    assert len(SYMBOL.findall(text)) > 20
    bare = [row[0] for row in rows(PAPER) if not SYMBOL.search(row[1]) or not TEST.search(row[2])]
    assert bare == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_the_documents_parses(page: Path) -> None:
    wrong = []
    launched = [words for words in command_lines(page, "torchrun") if "dalle" in words]
    for words in (*command_lines(page, "dalle"), *(line[line.index("dalle") :] for line in launched)):
        try:
            parse(app(), words[1:])
        except Exception as error:
            wrong.append(f"{shlex.join(words)}: {error}")
    assert wrong == []


def test_the_readme_shows_the_main_commands() -> None:
    shown = {words[1] for words in command_lines(README, "dalle")}
    assert {"generate", "train", "evaluate", "data", "serve"} <= shown


@pytest.mark.parametrize(
    "line", ["dalle no-such-command", "dalle generate x --no-such-option 1", "dalle generate"]
)
def test_a_wrong_command_line_is_caught(line: str) -> None:
    with pytest.raises(Exception, match=r"no-such|needs"):
        parse(app(), shlex.split(line)[1:])


def test_a_wrong_symbol_is_caught() -> None:
    assert resolve("dalle.config.Config").__name__ == "Config"
    for wrong in (
        "dalle.config.NoSuchThing",
        "dalle.no_such_module.Config",
        "dalle.config.Config.no_such_field",
    ):
        with pytest.raises(LookupError):
            resolve(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_in_the_documents_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = {w for words in command_lines(page, "make") for w in words[1:] if "=" not in w}
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_documents_imports_what_exists(page: Path) -> None:
    for language, text in fences(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dalle":
                for alias in node.names:
                    resolve(f"{node.module}.{alias.name}")


def test_the_readme_shows_the_presets_as_they_are() -> None:
    shown = {row[0]: row[1:3] for row in rows(README) if len(row) == 4}
    actual = {}
    for path in (ROOT / "dalle" / "presets").glob("*.toml"):
        preset = tomllib.loads(path.read_text(encoding="utf-8"))
        dvae, transformer = preset["dvae"], preset["transformer"]
        side, width = dvae["image_size"] // 8, transformer["n_heads"] * transformer["d_head"]
        actual[f"`{path.stem}`"] = [
            f"{dvae['image_size']} px → {side}×{side}, {dvae['n_codes']}",
            f"{transformer['n_layers']} layers × {width}",
        ]
    assert {name: shown.get(name) for name in actual} == actual


def test_the_version_has_one_source() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "dalle.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", resolve("dalle.__version__"))
