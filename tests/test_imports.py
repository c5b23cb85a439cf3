"""Importing any module of `dalle` has no effect on the process, the disk or the network."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import dalle

ROOT = Path(__file__).resolve().parents[1]

# Runs in a fresh interpreter. Third-party packages are imported first, so that only our own effects are seen.
PROBE = """
import importlib, json, logging, os, sys, threading, warnings

modules, third_party = json.loads(sys.argv[1])
for name in third_party:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        pass  # an optional extra that is not installed
import numpy, torch

def loggers():
    ours = (x for n, x in logging.Logger.manager.loggerDict.items() if n.startswith("dalle"))
    known = [logging.getLogger(), *ours]
    return [(x.name, x.level, x.propagate, [repr(h) for h in getattr(x, "handlers", [])]) for x in known
            if isinstance(x, logging.Logger) and (x is logging.getLogger() or x.level or x.handlers)]

def state():
    return {
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "running threads": sorted(t.name for t in threading.enumerate()),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "matmul precision": torch.get_float32_matmul_precision(),
        "torch seed": torch.random.get_rng_state().tolist(),
        "numpy seed": repr(numpy.random.get_state(legacy=False)),
        "cuda": torch.cuda.is_initialized(),
        "logging": loggers(),
        "warnings": [repr(f) for f in warnings.filters],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
    }

effects, current = [], None
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ACTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.symlink", "subprocess.Popen",
        "socket.connect", "socket.getaddrinfo", "socket.bind"}

def watch(event, arguments):
    if current is None:
        return
    if event in ACTS:
        effects.append(f"{current}: {event} {arguments[:1]}")
    elif event == "open":
        path, mode, flags = arguments
        if (mode and set(mode) & set("wax+")) or (mode is None and isinstance(flags, int) and flags & WRITES):
            effects.append(f"{current}: writes {path}")

sys.addaudithook(watch)
for name in modules:
    before, current = state(), name
    importlib.import_module(name)
    current, after = None, state()
    effects += [f"{name}: changes {key}" for key in before if before[key] != after[key]]
print(json.dumps(effects))
"""


def module_names() -> list[str]:
    """Every module of the package, by dotted name; `python -m dalle` is a script, not a module."""
    names = []
    for path in sorted((ROOT / "dalle").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__main__":
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def third_party_names() -> list[str]:
    """Every package outside `dalle` that the package imports somewhere, with the submodules it names."""
    names = set()
    for path in (ROOT / "dalle").rglob("*.py"):
        # Only what runs at import: imports inside functions stay untouched.
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names.add(node.module)
    return sorted(name for name in names if name.split(".")[0] not in {"dalle", "__future__"})


def run(code: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-B", "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_any_module_has_no_effect() -> None:
    modules = module_names()
    assert "dalle" in modules
    assert json.loads(run(PROBE, json.dumps([modules, third_party_names()]))) == []


def test_importing_the_package_alone_does_not_import_torch() -> None:
    loaded = run("import sys, dalle; print(dalle.__version__, *sorted(sys.modules))").split()
    assert loaded[0][0].isdigit()
    assert not {"torch", "numpy", "PIL", "pydantic", "typer"} & set(loaded)


def test_every_public_name_is_found_and_no_other() -> None:
    names = {name: getattr(dalle, name) for name in dalle.__all__}
    assert names["ImageRequest"]("a cat").prompt == ("a cat",)
    assert all(value is not None for value in names.values())
    with pytest.raises(AttributeError, match="no attribute 'Dalle'"):
        dalle.Dalle  # noqa: B018
