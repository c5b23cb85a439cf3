"""Weight files: atomic writes that keep the old file, checked reads that name what is wrong."""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from dalle import weights
from dalle.config import Config


class Widths(Config):
    d_in: int
    d_out: int


class Layer(nn.Module):
    def __init__(self, config: Widths) -> None:
        super().__init__()
        self.linear = nn.Linear(config.d_in, config.d_out)
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("mask", torch.tensor([True, False]))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "linear.weight": torch.randn(3, 2, generator=random),
        "linear.bias": torch.randn(3, generator=random),
        "steps": torch.tensor(7),
        "mask": torch.tensor([False, True]),
    }


@pytest.fixture
def model(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    folder = tmp_path / "model"
    weights.save_component(folder / "dvae", Widths(d_in=2, d_out=3), tensors)
    weights.save_component(folder / "clip", Widths(d_in=2, d_out=3), tensors)
    weights.write_bytes(folder / "tokenizer/tokenizer.json", b"{}")
    weights.write_manifest(folder)
    return folder


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    old = os.umask(0o022)
    yield os.umask
    os.umask(old)


def message_of(call: Callable[[], object], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    return str(caught.value)


def fail_with(number: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# Atomic writes


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "made/on/the/way/a.bin"
    weights.write_bytes(path, b"old")
    weights.write_bytes(str(path), b"new")
    assert path.read_bytes() == b"new" and names_in(path.parent) == ["a.bin"]


def test_a_write_in_several_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    weights.write_bytes(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


@pytest.mark.parametrize("call", ["write", "fsync", "open", "replace"])
def test_a_full_disk_keeps_the_old_file_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a.bin"
    weights.write_bytes(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail_with(errno.ENOSPC))
        with pytest.raises(OSError) as caught:
            weights.write_bytes(path, b"new")
    assert str(caught.value) == f"cannot write {path}: No space left on device; the old file is kept"
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old" and names_in(tmp_path) == ["a.bin"]


def test_a_full_disk_leaves_no_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail_with(errno.ENOSPC))
        line = message_of(lambda: weights.write_bytes(tmp_path / "a", b"new"), OSError)
    assert line == f"cannot write {tmp_path / 'a'}: No space left on device" and names_in(tmp_path) == []


def test_an_interrupted_write_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    weights.write_bytes(tmp_path / "a", b"old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", interrupt)
        weights.write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and names_in(tmp_path) == ["a"]


def test_file_is_synced_before_the_rename_and_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(descriptor: int) -> None:
        calls.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).suffix or 'folder'}")
        fsync(descriptor)

    def watch_replace(old: Path, new: Path) -> None:
        calls.append("rename")
        replace(old, new)

    folder = tmp_path / "inside"
    folder.mkdir()
    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    weights.write_bytes(folder / "a", b"new")
    assert calls == ["sync .tmp", "rename", "sync folder"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_and_folders_have_the_mode_that_the_umask_gives(
    tmp_path: Path, umask: Callable[[int], int], tensors: dict[str, Tensor], mask: int, mode: int
) -> None:
    umask(mask)
    with weights.atomic_folder(tmp_path / "folder") as folder:
        weights.save_tensors(folder / "a.safetensors", tensors)
    assert (tmp_path / "folder/a.safetensors").stat().st_mode & 0o777 == mode
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~mask


def test_only_a_regular_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, kind in [
        ("link", "a symbolic link"),
        ("folder", "a folder"),
        ("pipe", "a device, pipe or socket"),
    ]:
        line = message_of(lambda name=name: weights.write_bytes(tmp_path / name, b"x"))  # type: ignore[misc]
        assert line == (
            f"cannot write {tmp_path / name}: it is {kind}, not a regular file: choose another path"
        )
    assert (tmp_path / "target").read_text() == "kept"
    assert names_in(tmp_path) == ["folder", "link", "pipe", "target"]


def test_a_file_where_a_folder_should_be_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    line = message_of(lambda: weights.write_bytes(tmp_path / "file/a", b"x"), OSError)
    assert line == f"cannot write {tmp_path / 'file/a'}: Not a directory"


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "run/step-1"
    with pytest.raises(RuntimeError), weights.atomic_folder(path) as folder:
        weights.write_bytes(folder / "sub/a", b"1")
        raise RuntimeError
    assert names_in(path.parent) == []
    with weights.atomic_folder(path) as folder:
        assert folder.parent == path.parent and folder.name.startswith(".step-1.")
        weights.write_bytes(folder / "sub/a", b"1")
        assert not path.exists()
    assert names_in(path.parent) == ["step-1"] and (path / "sub/a").read_bytes() == b"1"


def test_a_folder_never_replaces_another(tmp_path: Path) -> None:
    weights.write_bytes(tmp_path / "step-1/a", b"1")

    def write() -> None:
        with weights.atomic_folder(tmp_path / "step-1"):
            pass

    assert message_of(write).startswith(f"cannot write {tmp_path / 'step-1'}: it exists already")
    assert names_in(tmp_path) == ["step-1"] and names_in(tmp_path / "step-1") == ["a"]


def test_a_disk_that_fills_while_a_folder_is_finished_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write() -> None:
        with weights.atomic_folder(tmp_path / "step-1") as folder:
            (folder / "a").write_bytes(b"1")
            monkeypatch.setattr(os, "fsync", fail_with(errno.ENOSPC))

    assert message_of(write, OSError) == f"cannot write {tmp_path / 'step-1'}: No space left on device"
    assert names_in(tmp_path) == []


# Checked reads


def test_json_survives_the_round_trip(tmp_path: Path) -> None:
    tree = {"caption": "ein Apfel – 🍎", "n": [1, 2.5, None, True]}
    weights.write_json(tmp_path / "a.json", tree)
    assert weights.read_json(tmp_path / "a.json") == tree
    assert (tmp_path / "a.json").read_text(encoding="utf-8").endswith("}\n")


def test_json_survives_what_utf_8_cannot_spell(tmp_path: Path) -> None:
    tree = {"caption": "caf\udce9 \\ \ud800\x00 🍎"}
    weights.write_json(tmp_path / "a.json", tree)
    assert weights.read_json(tmp_path / "a.json") == tree


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        weights.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a": 1,\n "b"}', "line 2: Expecting ':' delimiter"),
        (b"", "line 1: Expecting value"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_junk_json_is_one_line_with_the_path(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    line = message_of(lambda: weights.read_json(tmp_path / "a.json"))
    assert line == f"{tmp_path / 'a.json'}: not valid JSON: {reason}"


def test_binary_junk_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON: 'utf-8'"):
        weights.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("read", [weights.read_json, weights.load_tensors, weights.file_sha256])
def test_a_missing_file_is_named(tmp_path: Path, read: Callable[[Path], object]) -> None:
    assert message_of(lambda: read(tmp_path / "gone")) == f"{tmp_path / 'gone'}: no such file"
    assert message_of(lambda: read(tmp_path)) == f"{tmp_path}: not a regular file"


def test_tensors_survive_the_round_trip_as_they_are(tmp_path: Path) -> None:
    table = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "float": table,
        "tied": table,
        "transposed": table.T,
        "row": table[1],
        "bfloat16": table.bfloat16(),
        "integer": torch.tensor(5),
        "boolean": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    weights.save_tensors(tmp_path / "a.safetensors", tensors, metadata={"step": "3"})
    loaded = weights.load_tensors(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor.detach())
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"step": "3"}


def test_a_truncated_safetensors_file_is_one_line_at_every_length(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    path = tmp_path / "a.safetensors"
    weights.save_tensors(path, tensors)
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        line = message_of(lambda: weights.load_tensors(path))
        assert line.startswith(f"{path}: not a whole safetensors file (")


@pytest.mark.parametrize("data", [b"PK\x03\x04" + b"\0" * 100, b"\xff" * 64, b"\x02" + b"\0" * 7 + b"{}x"])
def test_junk_is_no_safetensors_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    assert "not a whole safetensors file" in message_of(lambda: weights.load_tensors(tmp_path / "a"))


def test_file_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert weights.file_sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_tensors_sha256_sees_names_dtypes_shapes_and_bytes_only(tensors: dict[str, Tensor]) -> None:
    tensors |= {"half": torch.ones(2, 3).bfloat16(), "empty": torch.zeros(0)}
    digest = weights.tensors_sha256(tensors)
    assert weights.tensors_sha256(dict(reversed(tensors.items()))) == digest
    assert weights.tensors_sha256(tensors | {"linear.weight": tensors["linear.weight"].T.clone().T}) == digest
    ones = tensors["half"]
    others = [
        {"half": ones.half()},
        {"half": ones.T},
        {"half": ones.view(torch.int16)},
        {"half": -ones},
        {"other": ones},
    ]
    assert len({digest, *(weights.tensors_sha256(tensors | other) for other in others)}) == 6


# Manifest


def test_the_manifest_lists_weights_configs_and_tokenizer_only(model: Path) -> None:
    for name in ("README.md", "run/config.json", "run/checkpoints/dvae/step-1/weights.safetensors"):
        weights.write_bytes(model / name, b"x")
    weights.write_bytes(model / "dvae/.model.safetensors.1234.tmp", b"x")
    weights.write_manifest(model)
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
    weights.verify_manifest(model)


def test_a_manifest_of_named_files_holds_those(model: Path) -> None:
    weights.write_manifest(model, ["dvae/config.json"])
    assert list(weights.read_json(model / "manifest.json")["files"]) == ["dvae/config.json"]
    assert "no such file" in message_of(lambda: weights.write_manifest(model, ["dvae/gone"]))
    assert "not a path below" in message_of(lambda: weights.write_manifest(model, ["../manifest.json"]))


def test_one_flipped_bit_is_found_and_the_file_named(model: Path) -> None:
    flip_bit(model / "dvae/model.safetensors")
    expected = (
        f"{model}/dvae/model.safetensors: sha256 differs from manifest.json "
        "(the file was changed or damaged): copy the model again"
    )
    assert message_of(lambda: weights.verify_manifest(model)) == expected
    assert message_of(lambda: weights.load_component(model / "dvae", Widths)) == expected
    weights.verify_manifest(model, under="clip")
    weights.load_component(model / "clip", Widths)


def test_a_missing_or_shortened_file_is_named(model: Path) -> None:
    path = model / "dvae/model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert message_of(lambda: weights.verify_manifest(model)).startswith(
        f"{path}: size of {len(data) - 1} bytes, not {len(data)}, differs from manifest.json"
    )
    path.unlink()
    expected = f"{path}: missing, but listed in manifest.json: copy the model again"
    assert message_of(lambda: weights.verify_manifest(model, under="dvae")) == expected
    assert message_of(lambda: weights.load_component(model / "dvae", Widths)) == expected


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
    weights.write_json(tmp_path / "manifest.json", tree)
    line = message_of(lambda: weights.verify_manifest(tmp_path))
    assert line.startswith(f"{tmp_path / 'manifest.json'}: ") and expected in line


def test_a_folder_without_a_manifest_cannot_be_verified(tmp_path: Path) -> None:
    line = message_of(lambda: weights.verify_manifest(tmp_path))
    assert line == f"{tmp_path / 'manifest.json'}: no such file"


# Components


def test_a_component_survives_the_round_trip(
    model: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors["linear.bias"] = tensors["linear.bias"].bfloat16()
    weights.save_component(model / "dvae", Widths(d_in=2, d_out=3), tensors)
    weights.write_manifest(model)
    monkeypatch.chdir(model / "dvae")
    for folder in (model / "dvae", str(model / "dvae"), ".", "../dvae"):
        config, loaded = weights.load_component(folder, Widths)
        assert config == Widths(d_in=2, d_out=3)
        assert loaded["linear.bias"].dtype == torch.bfloat16
        assert weights.tensors_sha256(loaded) == weights.tensors_sha256(tensors)


def test_a_component_alone_needs_no_manifest(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    weights.save_component(tmp_path / "dvae", Widths(d_in=2, d_out=3), tensors)
    assert weights.load_component(tmp_path / "dvae", Widths)[0].d_out == 3


def test_a_file_that_the_manifest_leaves_out_is_not_loaded(model: Path) -> None:
    weights.write_manifest(model, ["dvae/config.json", "clip/config.json"])
    line = message_of(lambda: weights.load_component(model / "dvae", Widths))
    assert line == (
        f"{model}/dvae/model.safetensors: not listed in {model}/manifest.json: write the manifest again"
    )
    assert "lists no file of transformer" in message_of(
        lambda: weights.verify_manifest(model, under="transformer")
    )


def test_a_wrong_config_is_refused_before_the_weights_are_read(model: Path) -> None:
    (model / "manifest.json").unlink()
    weights.write_json(model / "dvae/config.json", {"d_inn": 2, "d_out": 3})
    (model / "dvae/model.safetensors").write_bytes(b"junk")
    line = message_of(lambda: weights.load_component(model / "dvae", Widths))
    assert line == f"{model}/dvae/config.json: d_inn is not a setting; did you mean d_in?"


def test_a_missing_component_is_named(model: Path) -> None:
    line = message_of(lambda: weights.load_component(model / "transformer", Widths))
    assert line == f"{model}/transformer: no such folder"


def test_load_strict_copies_every_tensor_and_casts_floats(tensors: dict[str, Tensor]) -> None:
    layer = Layer(Widths(d_in=2, d_out=3)).double()
    half = {key: value.bfloat16() if value.is_floating_point() else value for key, value in tensors.items()}
    weights.load_strict(layer, half, "dvae")
    assert layer.linear.weight.dtype == torch.float64
    for key, value in layer.state_dict().items():
        assert torch.equal(value, half[key].to(value.dtype))
    layer.state_dict()["linear.bias"].zero_()
    assert half["linear.bias"].all()  # a copy, not the same memory


def test_load_strict_lists_all_that_does_not_fit_and_copies_nothing(tensors: dict[str, Tensor]) -> None:
    layer = Layer(Widths(d_in=2, d_out=3))
    before = weights.tensors_sha256(layer.state_dict())
    del tensors["linear.bias"]
    tensors |= {"linear.weight": torch.zeros(4, 2), "steps": torch.tensor(1.5), "extra": torch.zeros(1)}
    assert message_of(lambda: weights.load_strict(layer, tensors, "model/dvae")) == (
        "model/dvae: the weights do not fit the model: missing: linear.bias; unexpected: extra; "
        "shape: linear.weight [4, 2], not [3, 2]; dtype: steps torch.float32, not torch.int64"
    )
    assert weights.tensors_sha256(layer.state_dict()) == before


def test_a_long_list_of_wrong_tensors_is_shortened() -> None:
    layer = Layer(Widths(d_in=2, d_out=3))
    tensors = {f"t{i}": torch.zeros(1) for i in range(9)} | layer.state_dict()
    line = message_of(lambda: weights.load_strict(layer, tensors, "dvae"))
    assert line.endswith("unexpected: t0, t1, t2, t3 and 5 more")
