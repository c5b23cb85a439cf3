"""Every import in `dalle/`, those inside functions too, goes down the layers or, without circles, stays in its folder."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The architecture, top to bottom: a file imports from lower rows or its own folder, never from its own row.
LAYERS = (
    ("cli",),
    ("commands",),
    ("training", "serving", "importers"),
    ("evaluation",),
    ("pipeline",),
    ("model_folder",),
    ("generation",),
    ("data", "published"),
    ("dvae", "transformer", "clip"),
    ("image_tokenizer", "token_model"),
    ("tokenizer", "clip_tokenizer", "attention", "images"),
    ("weights",),
    ("manifest",),  # below weights: a component is checked before it is read
    ("files", "picture_files"),
    ("config",),
)
HEIGHT = {name: len(LAYERS) - row for row, names in enumerate(LAYERS) for name in names}
# The package itself and `python -m dalle` stand with the command line: nothing reaches them.
TOP = {"__init__", "__main__"}
# What any file may take from the package itself: plain facts, defined there without imports.
FACTS = {"__version__"}


def unit(file: str) -> str:
    """The row entry a file belongs to: `dalle/data/pairs.py` -> `data`, `dalle/dvae.py` -> `dvae`."""
    name = Path(file).parts[1]
    name = name.removesuffix(".py")
    return "cli" if name in TOP else name


def module_file(root: Path, module: str) -> str | None:
    """The file of a dotted module name, relative to the root; None where there is no such module."""
    path = root / Path(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate.relative_to(root).as_posix()
    # A folder without __init__.py is a package too.
    return f"{path.relative_to(root).as_posix()}/__init__.py" if path.is_dir() else None


def imported_files(root: Path, file: str) -> Iterator[str]:
    """Every file of the package that `file` imports, at any depth of its code; relative imports resolved."""
    for node in ast.walk(ast.parse((root / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "dalle":
                    yield module_file(root, alias.name) or alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = list(Path(file).parent.parts)
                package = package[: len(package) - (node.level - 1)]
                base = ".".join([*package, *([base] if base else [])])
            if base.split(".")[0] != "dalle":
                continue
            for alias in node.names:
                if base == "dalle" and alias.name in FACTS:
                    continue
                yield module_file(root, f"{base}.{alias.name}") or module_file(root, base) or base


def violations(root: Path) -> list[str]:
    """One line for each import that does not go down."""
    found = []
    for path in sorted((root / "dalle").rglob("*.py")):
        file = path.relative_to(root).as_posix()
        here = unit(file)
        if here not in HEIGHT:
            found.append(f"{file} has no layer: add it to LAYERS or give it another home")
            continue
        for target in imported_files(root, file):
            if not target.endswith(".py"):
                found.append(f"{file} imports {target}, which does not exist")
                continue
            there = unit(target)
            if there == here:
                continue
            if there not in HEIGHT or HEIGHT[there] >= HEIGHT[here]:
                found.append(f"{file} ({here}) may not import {target} ({there})")
    return found


def circles(root: Path) -> list[str]:
    """The first circle of files that import each other in each folder of `dalle/`, as one line."""
    graphs: dict[str, dict[str, set[str]]] = {}
    for path in sorted((root / "dalle").rglob("*.py")):
        file = path.relative_to(root).as_posix()
        graph = graphs.setdefault(unit(file), {})
        graph[file] = {target for target in imported_files(root, file) if unit(target) == unit(file)} - {file}
    found = []
    for graph in graphs.values():
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            found.append(" -> ".join(reversed(error.args[1])))
    return found


def test_imports_go_down_the_layers() -> None:
    assert violations(ROOT) == []


def test_no_files_of_a_folder_import_each_other_in_a_circle() -> None:
    assert circles(ROOT) == []


def test_a_circle_inside_a_folder_is_caught(tmp_path: Path) -> None:
    files = {
        "dalle/serving/queue.py": "from dalle.serving import worker\n",
        "dalle/serving/worker.py": "def f():\n    from .queue import JobQueue\n",
        "dalle/serving/app.py": "from . import queue, worker\n",
    }
    [circle] = circles(write(tmp_path, files))
    assert set(circle.split(" -> ")) == {"dalle/serving/queue.py", "dalle/serving/worker.py"}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("file", "code", "target"),
    [
        ("dalle/dvae.py", "import dalle.pipeline\n", "dalle/pipeline.py (pipeline)"),
        ("dalle/dvae.py", "def f():\n    from dalle.clip import CLIP\n", "dalle/clip.py (clip)"),
        ("dalle/dvae.py", "from . import transformer\n", "dalle/transformer.py (transformer)"),
        ("dalle/dvae.py", "from dalle import pipeline\n", "dalle/pipeline.py (pipeline)"),
        ("dalle/dvae.py", "from dalle import DallePipeline\n", "dalle/__init__.py (cli)"),
        ("dalle/dvae.py", "import dalle\n", "dalle/__init__.py (cli)"),
        ("dalle/data/pairs.py", "from ..training.loop import run\n", "dalle/training/loop.py (training)"),
        ("dalle/files.py", "from dalle.images import open_image\n", "dalle/images.py (images)"),
        ("dalle/attention.py", "from dalle.images import open_image\n", "dalle/images.py (images)"),
        ("dalle/training/loop.py", "from dalle.serving import jobs\n", "dalle/serving/jobs.py (serving)"),
        (
            "dalle/dvae.py",
            "import typing as t\nif t.TYPE_CHECKING:\n    from .data import pairs\n",
            "dalle/data/pairs.py (data)",
        ),
    ],
)
def test_an_import_that_goes_up_or_sideways_is_caught(
    tmp_path: Path, file: str, code: str, target: str
) -> None:
    names = (
        "__init__",
        "pipeline",
        "clip",
        "transformer",
        "dvae",
        "attention",
        "images",
        "files",
        "data/pairs",
    )
    empty = {f"dalle/{name}.py": "" for name in (*names, "training/loop", "serving/jobs")}
    root = write(tmp_path, {**empty, file: code})
    assert violations(root) == [f"{file} ({unit(file)}) may not import {target}"]


def test_imports_that_go_down_or_stay_in_their_folder_pass(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "dalle/__init__.py": "def __getattr__(name):\n    from dalle.pipeline import DallePipeline\n",
            "dalle/cli.py": "from dalle import __version__, pipeline\nfrom .training import loop\n",
            "dalle/config.py": "import torch\nfrom dalle import __version__\n",
            "dalle/pipeline.py": "from dalle import config\nimport dalle.config\n",
            "dalle/training/loop.py": "from . import log\nfrom .log import write\nfrom ..config import C\n",
            "dalle/training/log.py": "",
        },
    )
    assert violations(root) == []


def test_an_import_of_what_does_not_exist_is_caught(tmp_path: Path) -> None:
    root = write(tmp_path, {"dalle/cli.py": "from dalle.training.loop import run\n"})
    assert violations(root) == ["dalle/cli.py imports dalle.training.loop, which does not exist"]


def test_a_file_without_a_layer_is_caught(tmp_path: Path) -> None:
    root = write(tmp_path, {"dalle/misc.py": ""})
    assert violations(root) == ["dalle/misc.py has no layer: add it to LAYERS or give it another home"]
