"""The manifest: every file of a model folder is checked, once, and what is wrong is named."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dalle import files, manifest

FILES = ("config.json", "model.safetensors")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for component in ("dvae", "clip"):
        files.write_bytes(folder / component / "config.json", b"{}")
        files.write_bytes(folder / component / "model.safetensors", b"weights")
    files.write_bytes(folder / "tokenizer/tokenizer.json", b"{}")
    manifest.write_manifest(folder)
    return folder


def message_of(call: Callable[[], object], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    return str(caught.value)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_manifest_lists_weights_configs_and_tokenizer_only(model: Path) -> None:
    for name in ("README.md", "run/config.json", "run/checkpoints/dvae/step-1/weights.safetensors"):
        files.write_bytes(model / name, b"x")
    files.write_bytes(model / "dvae/.model.safetensors.1234.tmp", b"x")
    manifest.write_manifest(model)
    tree = json.loads((model / "manifest.json").read_text())
    assert tree["format"] == 1 and list(tree["files"]) == [
        "clip/config.json",
        "clip/model.safetensors",
        "dvae/config.json",
        "dvae/model.safetensors",
        "tokenizer/tokenizer.json",
    ]
    assert tree["files"]["tokenizer/tokenizer.json"] == {
        "sha256": hashlib.sha256(b"{}").hexdigest(),
        "bytes": 2,
    }
    manifest.VerifiedFolder(model)


def test_a_manifest_of_named_files_holds_those(model: Path) -> None:
    manifest.write_manifest(model, ["dvae/config.json"])
    assert list(files.read_json(model / "manifest.json")["files"]) == ["dvae/config.json"]
    assert "no such file" in message_of(lambda: manifest.write_manifest(model, ["dvae/gone"]))
    assert "not a path below" in message_of(lambda: manifest.write_manifest(model, ["../manifest.json"]))


def test_one_flipped_bit_is_found_and_the_file_named(model: Path) -> None:
    flip_bit(model / "dvae/model.safetensors")
    expected = (
        f"{model}/dvae/model.safetensors: sha256 differs from manifest.json "
        "(the file was changed or damaged): copy the model again"
    )
    assert message_of(lambda: manifest.VerifiedFolder(model)) == expected
    assert message_of(lambda: manifest.checked_component(model / "dvae", FILES)) == expected
    manifest.checked_component(model / "clip", FILES)


def test_a_missing_or_shortened_file_is_named(model: Path) -> None:
    path = model / "dvae/model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert message_of(lambda: manifest.VerifiedFolder(model)).startswith(
        f"{path}: size of {len(data) - 1} bytes, not {len(data)}, differs from manifest.json"
    )
    path.unlink()
    expected = f"{path}: missing, but listed in manifest.json: copy the model again"
    assert message_of(lambda: manifest.checked_component(model / "dvae", FILES)) == expected
    assert message_of(lambda: manifest.checked_component(model / "dvae", FILES)) == expected


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"format": 2, "files": {}}, "format = 2: must be 1"),
        ([], "must be a table"),
        ({"format": 1, "files": {"../x": {"sha256": "0" * 64, "bytes": 1}}}, "not a path below"),
        ({"format": 1, "files": {"/etc/passwd": {"sha256": "0" * 64, "bytes": 1}}}, "not a path below"),
        ({"format": 1, "files": {"a": {"sha256": "0" * 63, "bytes": 1}}}, "files.a.sha256 = "),
        ({"format": 1, "files": {"a": {"sha256": "0" * 64}}}, "files.a.bytes is missing"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path: Path, tree: object, expected: str) -> None:
    files.write_json(tmp_path / "manifest.json", tree)
    line = message_of(lambda: manifest.VerifiedFolder(tmp_path))
    assert line.startswith(f"{tmp_path / 'manifest.json'}: ") and expected in line


def test_a_folder_without_a_manifest_cannot_be_verified(tmp_path: Path) -> None:
    line = message_of(lambda: manifest.VerifiedFolder(tmp_path))
    assert line == f"{tmp_path / 'manifest.json'}: no such file"


def test_a_file_that_the_manifest_leaves_out_is_refused(model: Path) -> None:
    manifest.write_manifest(model, ["dvae/config.json", "clip/config.json"])
    line = message_of(lambda: manifest.checked_component(model / "dvae", FILES))
    assert line == (
        f"{model}/dvae/model.safetensors: not listed in {model}/manifest.json: write the manifest again"
    )
    assert "lists no file of tokenizer" in message_of(
        lambda: manifest.VerifiedFolder(model).component("tokenizer")
    )


def test_a_component_of_a_verified_folder_is_not_hashed_again(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    component = manifest.VerifiedFolder(model).component("dvae")
    monkeypatch.setattr(manifest, "file_sha256", lambda _: pytest.fail("hashed twice"))
    assert manifest.checked_component(component, FILES) is component
    assert component.sha256["model.safetensors"] == hashlib.sha256(b"weights").hexdigest()
    assert Path(component) == model / "dvae"
