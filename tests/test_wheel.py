"""The wheel, installed alone and away from the clone, draws a picture without a network."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]

# Any attempt to look up or reach another machine ends the program.
NO_NETWORK = """
import os, sys

def refuse(event, arguments):
    if event in {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}:
        sys.stderr.write(f"network: {event} {arguments[1:]}\\n")
        sys.stderr.flush()
        os._exit(97)

sys.addaudithook(refuse)
"""


def run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=220,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that the build leaves nothing in the clone."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "dalle", source / "dalle", ignore=shutil.ignore_patterns("__pycache__"))
    # --no-isolation: the build tools are those installed here, as there may be no network to fetch others.
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", source)
    run(*build, cwd=folder)
    return next((folder / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel; torch and the rest are borrowed from the running one."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    run(*pip, cwd=folder)
    where = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    ).stdout.strip()
    borrowed = dict.fromkeys(sysconfig.get_path(key) for key in ("purelib", "platlib"))
    # .pth files inside a borrowed folder are not read: the clone's own editable install stays out of sight.
    (Path(where) / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    (folder / "guard").mkdir()
    (folder / "guard" / "sitecustomize.py").write_text(NO_NETWORK)
    return folder


@pytest.mark.long
def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dalle").rglob("*") if path.is_file()}
    assert {name for name in wanted if "__pycache__" not in name} - held == set()
    assert not [name for name in held if name.startswith(("tests/", "docs/"))]


@pytest.mark.long
def test_the_installed_wheel_draws_without_a_network(installed: Path, tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(installed / "guard"), "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hub")}
    python = installed / "venv" / "bin" / "python"
    found = run(python, "-c", "import dalle; print(dalle.__file__)", cwd=tmp_path, env=env).stdout.strip()
    assert Path(found).is_relative_to(installed)

    command = (installed / "venv" / "bin" / "dalle", "generate", "a red apple, flat fluent style")
    out = run(*command, "-n", "2", "--seed", "7", "--out", "out", "--json", cwd=tmp_path, env=env).stdout
    answer = json.loads(out)

    assert [Path(entry["path"]).name for entry in answer["images"]] == sorted(
        Path(entry["path"]).name for entry in answer["images"]
    )
    assert sorted(entry["seed"] for entry in answer["images"]) == [7, 8]
    for path in [*(entry["path"] for entry in answer["images"]), answer["grid"]]:
        with Image.open(tmp_path / path) as image:
            image.load()
            assert image.format == "PNG"
            extrema = image.convert("RGB").getextrema()
        assert any(low != high for low, high in extrema), f"{path} is one flat colour"
    assert not (tmp_path / "hub").exists()


@pytest.mark.long
def test_the_network_guard_stops_a_program_that_calls_out(installed: Path, tmp_path: Path) -> None:
    code = "import socket; socket.create_connection(('127.0.0.1', 9))"
    result = subprocess.run(
        [installed / "venv" / "bin" / "python", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed / "guard")},
        capture_output=True,
        timeout=60,
    )
    assert result.returncode == 97


def test_no_hard_dependency_brings_torchvision() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    waiting, seen = list(project["dependencies"]), set()
    while waiting:
        requirement = waiting.pop()
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")
        if name in seen or "extra ==" in requirement:
            continue
        seen.add(name)
        try:
            waiting += importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # needed on other systems or Python versions only
    assert "torch" in seen and "numpy" in seen
    assert "torchvision" not in seen
