"""Files: atomic writes that keep the old file, checked reads that name what is wrong."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dalle import files


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


# Atomic writes


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "made/on/the/way/a.bin"
    files.write_bytes(path, b"old")
    files.write_bytes(str(path), b"new")
    assert path.read_bytes() == b"new" and names_in(path.parent) == ["a.bin"]


def test_a_write_in_several_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    files.write_bytes(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


@pytest.mark.parametrize("call", ["write", "fsync", "open", "replace"])
def test_a_full_disk_keeps_the_old_file_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a.bin"
    files.write_bytes(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail_with(errno.ENOSPC))
        with pytest.raises(OSError) as caught:
            files.write_bytes(path, b"new")
    assert str(caught.value) == f"cannot write {path}: No space left on device; the old file is kept"
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old" and names_in(tmp_path) == ["a.bin"]


def test_a_full_disk_leaves_no_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail_with(errno.ENOSPC))
        line = message_of(lambda: files.write_bytes(tmp_path / "a", b"new"), OSError)
    assert line == f"cannot write {tmp_path / 'a'}: No space left on device" and names_in(tmp_path) == []


def test_an_interrupted_write_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    files.write_bytes(tmp_path / "a", b"old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", interrupt)
        files.write_bytes(tmp_path / "a", b"new")
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
    files.write_bytes(folder / "a", b"new")
    assert calls == ["sync .tmp", "rename", "sync folder"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_and_folders_have_the_mode_that_the_umask_gives(
    tmp_path: Path, umask: Callable[[int], int], mask: int, mode: int
) -> None:
    umask(mask)
    with files.atomic_folder(tmp_path / "folder") as folder:
        files.write_bytes(folder / "a", b"x")
    assert (tmp_path / "folder/a").stat().st_mode & 0o777 == mode
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
        line = message_of(lambda name=name: files.write_bytes(tmp_path / name, b"x"))  # type: ignore[misc]
        assert line == (
            f"cannot write {tmp_path / name}: it is {kind}, not a regular file: choose another path"
        )
    assert (tmp_path / "target").read_text() == "kept"
    assert names_in(tmp_path) == ["folder", "link", "pipe", "target"]


def test_a_file_where_a_folder_should_be_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    line = message_of(lambda: files.write_bytes(tmp_path / "file/a", b"x"), OSError)
    assert line == f"cannot write {tmp_path / 'file/a'}: Not a directory"


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "run/step-1"
    with pytest.raises(RuntimeError), files.atomic_folder(path) as folder:
        files.write_bytes(folder / "sub/a", b"1")
        raise RuntimeError
    assert names_in(path.parent) == []
    with files.atomic_folder(path) as folder:
        assert folder.parent == path.parent and folder.name.startswith(".step-1.")
        files.write_bytes(folder / "sub/a", b"1")
        assert not path.exists()
    assert names_in(path.parent) == ["step-1"] and (path / "sub/a").read_bytes() == b"1"


def test_a_folder_never_replaces_another(tmp_path: Path) -> None:
    files.write_bytes(tmp_path / "step-1/a", b"1")

    def write() -> None:
        with files.atomic_folder(tmp_path / "step-1"):
            pass

    assert message_of(write).startswith(f"cannot write {tmp_path / 'step-1'}: it exists already")
    assert names_in(tmp_path) == ["step-1"] and names_in(tmp_path / "step-1") == ["a"]


def test_a_disk_that_fills_while_a_folder_is_finished_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write() -> None:
        with files.atomic_folder(tmp_path / "step-1") as folder:
            (folder / "a").write_bytes(b"1")
            monkeypatch.setattr(os, "fsync", fail_with(errno.ENOSPC))

    assert message_of(write, OSError) == f"cannot write {tmp_path / 'step-1'}: No space left on device"
    assert names_in(tmp_path) == []


# Checked reads


def test_json_survives_the_round_trip(tmp_path: Path) -> None:
    tree = {"caption": "ein Apfel – 🍎", "n": [1, 2.5, None, True]}
    files.write_json(tmp_path / "a.json", tree)
    assert files.read_json(tmp_path / "a.json") == tree
    assert (tmp_path / "a.json").read_text(encoding="utf-8").endswith("}\n")


def test_json_survives_what_utf_8_cannot_spell(tmp_path: Path) -> None:
    tree = {"caption": "caf\udce9 \\ \ud800\x00 🍎"}
    files.write_json(tmp_path / "a.json", tree)
    assert files.read_json(tmp_path / "a.json") == tree


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
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
    line = message_of(lambda: files.read_json(tmp_path / "a.json"))
    assert line == f"{tmp_path / 'a.json'}: not valid JSON: {reason}"


def test_binary_junk_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON: 'utf-8'"):
        files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("read", [files.read_json, files.file_sha256])
def test_a_missing_file_is_named(tmp_path: Path, read: Callable[[Path], object]) -> None:
    assert message_of(lambda: read(tmp_path / "gone")) == f"{tmp_path / 'gone'}: no such file"
    assert message_of(lambda: read(tmp_path)) == f"{tmp_path}: not a regular file"


def test_file_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert files.file_sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_a_json_file_that_never_ends_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_JSON", 8)
    (tmp_path / "a.json").write_bytes(b"[" + b" " * 7)
    assert message_of(lambda: files.read_json(tmp_path / "a.json")).endswith("line 1: Expecting value")
    (tmp_path / "a.json").write_bytes(b"[" + b" " * 1000)
    line = message_of(lambda: files.read_json(tmp_path / "a.json"))
    assert line == f"{tmp_path / 'a.json'}: larger than 8 bytes: not a JSON file of ours"
