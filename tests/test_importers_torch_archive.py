"""Files of torch.save are read as data: small hostile ones cost little, and tensors come out as they went in."""

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dalle.importers.restricted_pickle import TensorRecord
from dalle.importers.torch_archive import open_archive

MOST_SECONDS, MOST_MEGABYTES = 2, 100


def doubled_tuple(n: int) -> bytes:
    """A dict whose key is a tuple that doubles itself n times: hashing it takes 2 ** n steps."""
    doubled = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(n))
    return b"\x80\x02)" + doubled + b"q" + bytes([n]) + b"0}h" + bytes([n]) + b"Ns."


def doubled_in_call(name: bytes) -> bytes:
    """The same tuple as a member of a set, or a key of an OrderedDict, by a call."""
    doubled = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(40))
    member = doubled if b"set" in name else b"(" + doubled + b"K\x01t"
    return b"\x80\x02c" + name + b"\n](" + member + b"e\x85R."


PICKLES = {
    "memo": b"\x80\x02Nr" + struct.pack("<I", 300_000_000) + b".",
    "memo as text": b"\x80\x02Np300000000\n.",
    "doubled key": doubled_tuple(60),
    "doubled in set": doubled_in_call(b"builtins\nset"),
    "doubled in OrderedDict": doubled_in_call(b"collections\nOrderedDict"),
    "many steps": b"\x80\x02" + b"}0" * 1_000_000 + b".",
    "many sets": b"\x80\x04" + b"\x8f" * 200_000 + b".",
    "deep": b"\x80\x02)" + b"\x85" * 250_000 + b".",
    "deep lists": b"\x80\x02" + b"]" * 150_000 + b"a" * 149_000 + b".",
    "long text": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc.",
    "long bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**32) + b"abc.",
    "long number": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"\x7f.",
    "long frame": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.",
    "long line": b"\x80\x02c" + b"a" * 15_000_000,
    "calls a number": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "many classes": b"\x80\x02" + b"c__torch__\nX\n0" * 140_000 + b"N.",
}


def archive_of(data: bytes, extra: dict[str, bytes] | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in (extra or {}).items():
            archive.writestr(f"archive/data/{name}", content)
    return buffer.getvalue()


def overlapping(n: int, size: int) -> bytes:
    """A zip whose list names the same bytes n times."""
    whole = archive_of(b"\x80\x02N.", {"0": b"\0" * size})
    end = whole.rindex(b"PK\5\6")
    (start,) = struct.unpack("<I", whole[end + 16 : end + 20])
    records = whole[start:end]
    last = records[records.rindex(b"PK\1\2") :]
    directory = records + last * n
    count = struct.pack("<HHII", 2 + n, 2 + n, len(directory), start)
    return whole[:start] + directory + whole[end : end + 8] + count + b"\0\0"


def hostile() -> dict[str, bytes]:
    files = {f"{name}, bare": data for name, data in PICKLES.items()}
    files |= {f"{name}, zip": archive_of(data) for name, data in PICKLES.items()}
    files["overlapping"] = overlapping(200, 20_000_000)
    files["long directory"] = overlapping(60_000, 1)
    files["two pickles"] = archive_of(b"\x80\x02N.", {"data.pkl": b""})
    legacy = io.BytesIO()
    torch.save({"w": torch.zeros(3)}, legacy, _use_new_zipfile_serialization=False)
    data = legacy.getvalue()
    files["legacy size"] = data[:-20] + struct.pack("<q", 2**40) + data[-12:]
    return files


SCRIPT = """
import json, resource, sys, time
from pathlib import Path
from dalle.importers.openai_clip import read_state
from dalle.importers.openai_dvae import read_module
def megabytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**29, now + 2**29))
for path in sorted(Path(sys.argv[1]).iterdir()):
    for read in (read_state, lambda path: read_module(path, "Encoder")):
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
        before, start = megabytes("VmRSS"), time.process_time()
        try:
            said = repr(read(path))
        except ValueError as error:
            said = str(error)
        print(json.dumps([path.name, said, time.process_time() - start, megabytes("VmHWM") - before]), flush=True)
"""


def test_small_hostile_files_are_refused_in_one_line_at_small_cost(tmp_path: Path) -> None:
    for name, data in hostile().items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 2 * len(hostile())
    for name, said, seconds, megabytes in results:
        assert said.startswith(str(tmp_path / name)) and "\n" not in said and len(said) < 400, (name, said)
        assert "MemoryError" not in said and "RecursionError" not in said, (name, said)
        assert seconds < MOST_SECONDS and megabytes < MOST_MEGABYTES, (name, seconds, megabytes)


@pytest.mark.parametrize("is_zip", [True, False])
def test_tensors_come_out_as_they_went_in(is_zip: bool, tmp_path: Path) -> None:
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8)
    state = {str(kind): torch.arange(24).reshape(2, 3, 4).to(kind) for kind in kinds}
    state["bool"] = torch.tensor([True, False])
    state["transposed"] = torch.randn(4, 5).T
    state["scalar"] = torch.tensor(3.5)
    state["view"] = torch.arange(100.0)[17:40:2]
    torch.save(state, tmp_path / "state.pt", _use_new_zipfile_serialization=is_zip)
    with open_archive(tmp_path / "state.pt", lambda *_: None, "state dict") as archive:
        assert isinstance(archive.root, dict)
        assert list(archive.root) == list(state)
        for name, record in archive.root.items():
            assert isinstance(record, TensorRecord)
            read = archive.read(record)
            assert read.dtype == state[name].dtype and archive.shape(record) == tuple(state[name].shape)
            assert torch.equal(read, state[name]) and read.is_contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.replace(b"\1\2\3\4" * 16, b"\1\2\3\5" * 16), "does not agree with its checksum"),
        (lambda data: data[:-40], "damaged"),
        (lambda data: data.replace(b"K\x40\x85", b"K\x41\x85"), "checksum|damaged"),
    ],
)
def test_damage_is_found(change: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.tensor([1, 2, 3, 4] * 16, dtype=torch.uint8)}, buffer)
    assert change(buffer.getvalue()) != buffer.getvalue()
    (tmp_path / "bad.pt").write_bytes(change(buffer.getvalue()))
    with (
        pytest.raises(ValueError, match=message),
        open_archive(tmp_path / "bad.pt", lambda *_: None, "x") as archive,
    ):
        assert isinstance(archive.root, dict)
        archive.read(archive.root["w"])


def test_a_small_file_cannot_stand_for_large_tensors(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(1000, 1000)}, tmp_path / "stride.pt")
    torch.save({str(i): torch.zeros(1000)[:] for i in range(3)}, tmp_path / "good.pt")
    shared = torch.zeros(1000)
    torch.save({str(i): shared for i in range(100)}, tmp_path / "shared.pt")
    for name, message in (("stride", "has 1 numbers"), ("shared", "would take 400,000 bytes")):
        path = tmp_path / f"{name}.pt"
        with pytest.raises(ValueError, match=message), open_archive(path, lambda *_: None, "x") as archive:
            assert isinstance(archive.root, dict)
            archive.check_total(list(archive.root.values()))
    with open_archive(tmp_path / "good.pt", lambda *_: None, "x") as archive:
        assert isinstance(archive.root, dict)
        archive.check_total(list(archive.root.values()))


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "it-ran"),)

    (tmp_path / "run.pkl").write_bytes(pickle.dumps(Touch(), protocol=2))
    with (
        pytest.raises(ValueError, match="refused"),
        open_archive(tmp_path / "run.pkl", lambda *_: None, "x"),
    ):
        pass
    assert not (tmp_path / "it-ran").exists()
