"""The `dalle` command: what it prints and writes, and one clear line with an exit code for every mistake."""

import errno
import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from filelock import FileLock
from PIL import Image

from dalle import images, weights
from dalle.cli import main
from dalle.data.shapes import write_shapes
from dalle.pipeline import DallePipeline
from tests.tiny import GRID, tiny_pipe

MICRO = [
    part
    for setting in [
        "tokenizer.vocab_size=280",
        "dvae.d_hidden=8",
        "dvae.d_code=8",
        "dvae_training.steps=2",
        "dvae_training.warmup_steps=1",
        "dvae_training.batch_size=2",
    ]
    for part in ("--set", setting)
]


@dataclass
class Ended:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `dalle` in this process, logging to stderr as a process of its own would."""

    def call(*arguments: object) -> Ended:
        capsys.readouterr()
        code = 0
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["dalle", *map(str, arguments)])
            patch.setattr(logging.root, "handlers", [])  # pytest's own would keep ours out
            patch.setattr(logging.root, "level", logging.WARNING)
            try:
                main()
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return call


def assert_one_line(ended: Ended, expected: str, code: int = 2) -> None:
    """The command printed one line on stderr, nothing on stdout, and ended with `code`."""
    assert ended.err.count("\n") == 1 and ended.err.startswith("error: "), ended.err
    assert expected in ended.err
    assert (ended.code, ended.out) == (code, "")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread, and wait long for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of random weights; tests that damage it take a copy."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipe(["a red circle", "a blue square"]).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 captioned shapes, of which 4 are held out."""
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", 16, seed=0)


@pytest.fixture
def shapes(data: Path, tmp_path: Path) -> Path:
    """A copy of the data, to damage."""
    return Path(shutil.copytree(data, tmp_path / "shapes"))


def write_bomb(path: Path) -> Path:
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    return path


def fill_the_disk(patch: pytest.MonkeyPatch) -> None:
    """From now on no file can be synced."""

    def full(descriptor: int) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(os, "fsync", full)


# generate


def test_generate_json_is_exactly_one_object_with_the_documented_keys(
    run: Run, model: Path, tmp_path: Path
) -> None:
    ended = run(
        "generate", "a red circle", "--model", model, "-n", 2, "--seed", 7, "--out", tmp_path, "--json"
    )
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert found.keys() == {"images", "grid"}
    assert found["grid"] == str(tmp_path / "grid.png")
    for rank, row in enumerate(found["images"]):
        path = str(tmp_path / f"00{rank}_{7 + rank}.png")
        assert row == {"path": path, "caption": "a red circle", "seed": 7 + rank, "score": None, "rank": rank}
        assert images.open_image(Path(path)).size == (32, 32)


def test_generate_names_files_by_rank_and_seed_for_several_captions(
    run: Run, model: Path, tmp_path: Path
) -> None:
    ended = run(
        "generate", "a red circle", "a blue square", "--model", model, "-n", 2, "--out", tmp_path / "new"
    )
    assert ended.code == 0
    names = ["000_0.png", "001_1.png", "002_2.png", "003_3.png"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [*names, "grid.png"]
    captions = [images.read_recipe(tmp_path / "new" / name)["caption"] for name in names]
    assert captions == ["a red circle"] * 2 + ["a blue square"] * 2
    assert ended.out.splitlines()[0] == f"{tmp_path / 'new' / '000_0.png'}  a red circle"
    assert ended.out.splitlines()[-1] == str(tmp_path / "new" / "grid.png")


def test_generate_without_grid_writes_pictures_only(run: Run, model: Path, tmp_path: Path) -> None:
    ended = run("generate", "a", "--model", model, "-n", 1, "--no-grid", "--out", tmp_path, "--json")
    assert json.loads(ended.out)["grid"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["000_0.png"]


def test_a_random_seed_is_found_in_name_and_recipe(run: Run, model: Path, tmp_path: Path) -> None:
    ended = run("generate", "a", "--model", model, "-n", 1, "--seed", -1, "--out", tmp_path, "--json")
    [row] = json.loads(ended.out)["images"]
    assert Path(row["path"]).name == f"000_{row['seed']}.png"
    assert images.read_recipe(Path(row["path"]))["seed"] == row["seed"]


def test_a_caption_of_any_unicode_is_printed_stored_and_drawn_again(
    run: Run, model: Path, tmp_path: Path
) -> None:
    caption = "\udce9 🍎\x00"  # a lone surrogate is what a byte that is not UTF-8 becomes on the command line
    ended = run("generate", caption, "--model", model, "-n", 1, "--out", tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines()[0] == f"{tmp_path / '000_0.png'}  \\udce9 🍎\x00"
    assert images.read_recipe(tmp_path / "000_0.png")["caption"] == caption
    again = run("rerun", tmp_path / "000_0.png", "--model", model, "--out", tmp_path / "\udce9.png")
    assert (again.code, again.out) == (0, f"{tmp_path}/\\udce9.png: the same tokens\n")
    shown = run("generate", caption, "--model", model, "-n", 1, "--out", tmp_path, "--json")
    assert json.loads(shown.out)["images"][0]["caption"] == caption


def test_a_model_that_computes_no_numbers_is_one_line(run: Run, model: Path, tmp_path: Path) -> None:
    pipe = DallePipeline.from_pretrained(model, dtype="float32")
    with torch.no_grad():
        pipe.transformer.norm.weight.fill_(torch.nan)
    pipe.save_pretrained(tmp_path / "broken")
    ended = run("generate", "a", "--model", tmp_path / "broken", "--out", tmp_path / "out")
    assert_one_line(ended, "the transformer's logits are NaN in row 0")


def test_a_gpu_that_is_not_there_is_one_line(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ended = run("generate", "a", "--model", model, "--device", "cuda:2")
    assert_one_line(ended, "device 'cuda:2': this machine has 2 GPUs, from cuda:0")


def test_options_reach_the_recipe(run: Run, model: Path, tmp_path: Path) -> None:
    options = ["--temperature", 0.5, "--top-k", 8, "--top-p", 0.9, "--guidance", 2]
    run("generate", "a", "--model", model, "-n", 1, *options, "--out", tmp_path)
    recipe = images.read_recipe(tmp_path / "000_0.png")
    assert recipe["options"] == {"temperature": 0.5, "top_k": 8, "top_p": 0.9, "guidance": 2.0}


def test_completion_keeps_the_rows_of_the_given_picture(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    picture = data / "000000.png"
    given = ["--image", picture, "--keep-rows", 2]
    ended = run("generate", "a", "--model", model, "-n", 2, *given, "--out", tmp_path)
    assert ended.code == 0
    pipe = DallePipeline.from_pretrained(model)
    tokens = pipe.dvae.encode(images.to_tensor([images.open_image(picture)])).flatten().tolist()
    completion = images.read_recipe(tmp_path / "001_1.png")["completion"]
    assert completion == {"keep_rows": 2, "known": tokens[: 2 * GRID] + [-1] * (2 * GRID)}


def test_a_mask_keeps_what_it_does_not_mark(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    mask = Image.new("RGBA", (32, 32), "white")
    mask.paste((0, 0, 0, 0), (24, 0, 32, 8))
    mask.save(tmp_path / "mask.png")
    given = ["--image", data / "000000.png", "--mask", tmp_path / "mask.png"]
    assert run("generate", "a", "--model", model, "-n", 1, *given, "--out", tmp_path / "out").code == 0
    known = images.read_recipe(tmp_path / "out" / "000_0.png")["completion"]["known"]
    assert [place for place, token in enumerate(known) if token == -1] == [GRID - 1]
    broken = run("generate", "a", "--model", model, *given[:3], data / "000000.txt", "--out", tmp_path / "no")
    assert_one_line(broken, "000000.txt: not a picture of a known kind")


def test_truncate_cuts_a_long_caption_and_says_so(run: Run, model: Path, tmp_path: Path) -> None:
    caption = "q " * 300
    cut = run("generate", caption, "--model", model, "-n", 1, "--truncate", "--out", tmp_path, "--json")
    assert cut.code == 0 and len(json.loads(cut.out)["images"]) == 1
    assert cut.err.startswith("caption has 300 tokens, read are the first 12")
    recipe = images.read_recipe(tmp_path / "000_0.png")
    assert recipe["truncation"] == {"n_tokens": 300, "n_kept": 12}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["q " * 300], "caption has 300 tokens; the model reads 12: shorten it, or pass truncate=True"),
        (["a", "--temperature", "-1"], "temperature = -1"),
        (["a", "--temperature", "nan"], "temperature"),
        (["a", "--top-p", "1.5"], "top_p = 1.5"),
        (["a", "--top-k", "-3"], "top_k = -3"),
        (["a", "--top-k", "1" + "0" * 400], "top_k = 1000"),
        (["a", "--guidance", "-1"], "guidance = -1"),
        (["a", "-n", "0"], "num_images_per_prompt = 0: must be greater than or equal to 1"),
        (["a", "-n", "1", "--candidates", "0"], "num_candidates = 0: must be"),
        (
            ["a", "-n", "2", "--candidates", "8"],
            "num_candidates is 8 for 2 pictures; choosing among candidates needs",
        ),
        (
            ["a", "-n", "1", "--seed", str(2**63)],
            f"seed = {2**63}: must be less than or equal to {2**63 - 1}",
        ),
        (["a", "-n", "2", "--seed", str(2**63 - 1)], f"seed is {2**63 - 1}; for 2 pictures"),
        (["a", "--seed", "-2"], "seed = -2: must be"),
        (
            ["a", "--keep-rows", "2"],
            "image is missing; a completion needs image and either keep_rows (1..4) or mask",
        ),
        (["a", "--image", "PICTURE"], "keep_rows is missing"),
        (
            ["a", "--image", "PICTURE", "--keep-rows", "5"],
            "keep_rows is 5; the model draws 4 rows: choose 1..4",
        ),
        (["a", "--image", "nowhere.png", "--keep-rows", "1"], "nowhere.png: no such picture file"),
        (["a", "--device", "gpu"], "device 'gpu' is unknown: use cpu, cuda or cuda:N"),
        (["a", "--device", "meta"], "device 'meta' is unknown: use cpu, cuda or cuda:N"),
        (["a", "--device", "cuda:x"], "device 'cuda:x' is unknown"),
        (["a", "--dtype", "float16"], "dtype is float16; allowed are auto, float32, bfloat16"),
    ],
)
def test_a_wrong_option_of_generate_is_one_line(
    arguments: list[str], expected: str, run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    given = [str(data / "000000.png") if part == "PICTURE" else part for part in arguments]
    assert_one_line(run("generate", *given, "--model", model, "--out", tmp_path / "out"), expected)
    assert not (tmp_path / "out").exists()


def test_a_bomb_is_refused_by_its_header(run: Run, model: Path, tmp_path: Path) -> None:
    bomb = write_bomb(tmp_path / "bomb.png")
    given = ["--image", bomb, "--keep-rows", 1, "--out", tmp_path / "out"]
    ended = run("generate", "a", "--model", model, *given)
    assert_one_line(ended, "bomb.png: picture ")
    assert re.search(r"3600000000 pixels; at most 64000000|far too many pixels", ended.err)


def test_an_out_that_is_a_file_is_refused(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    ended = run("generate", "a", "--model", model, "--out", tmp_path / "out")
    assert_one_line(ended, "is a file; give a folder")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_full_disk_ends_generate_with_one_line_and_leaves_no_half_picture(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fill_the_disk(patch)
        ended = run("generate", "a", "--model", model, "-n", 1, "--out", tmp_path / "out")
    assert_one_line(ended, "000_0.png: No space left on device", code=1)
    assert list((tmp_path / "out").iterdir()) == []


# Model folders


@pytest.mark.parametrize(
    "file", ["transformer/model.safetensors", "dvae/config.json", "tokenizer/tokenizer.json"]
)
def test_a_flipped_bit_in_a_model_is_found(file: str, run: Run, copy: Path, tmp_path: Path) -> None:
    content = bytearray((copy / file).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / file).write_bytes(content)
    ended = run("generate", "a", "--model", copy, "--out", tmp_path / "out")
    assert_one_line(ended, f"{file}: sha256 differs from manifest.json")


@pytest.mark.parametrize(
    "file", ["transformer/model.safetensors", "dvae/config.json", "manifest.json", "model_index.json"]
)
def test_a_missing_file_of_a_model_is_named(file: str, run: Run, copy: Path, tmp_path: Path) -> None:
    (copy / file).unlink()
    ended = run("generate", "a", "--model", copy, "--out", tmp_path / "out")
    assert_one_line(ended, Path(file).name)


def test_a_missing_model_folder_is_one_line(run: Run, tmp_path: Path) -> None:
    ended = run("generate", "a", "--model", tmp_path / "nowhere" / "at" / "all")
    assert_one_line(ended, "is not a folder: give a model folder or a Hugging Face Hub id")


# Data sets


def with_each_data_command(model: Path, data: Path, out: Path) -> list[list[object]]:
    return [
        ["train", data, "--out", out, "--preset", "tiny", "--quiet"],
        ["encode", data, "--model", model, "--out", out],
        ["evaluate", model, data, "--out", out],
        ["data", "inspect", data],
    ]


@pytest.mark.parametrize("command", range(4))
def test_a_missing_data_folder_is_one_line(command: int, run: Run, model: Path, tmp_path: Path) -> None:
    commands = with_each_data_command(model, tmp_path / "nowhere", tmp_path / "out")
    assert_one_line(run(*commands[command]), "nowhere does not exist: give a folder, a table")


@pytest.mark.parametrize("command", range(4))
def test_a_folder_without_captions_says_what_was_looked_for(
    command: int, run: Run, model: Path, shapes: Path, tmp_path: Path
) -> None:
    for caption in shapes.glob("*.txt"):
        caption.unlink()
    ended = run(*with_each_data_command(model, shapes, tmp_path / "out")[command])
    assert_one_line(ended, "no captions found in")
    assert "metadata.jsonl" in ended.err


@pytest.mark.parametrize("kind", ["corrupt", "bomb"])
@pytest.mark.parametrize("command", ["train", "encode"])
def test_too_many_unreadable_pictures_are_one_line_and_all_listed_at_once(
    kind: str, command: str, run: Run, model: Path, shapes: Path, tmp_path: Path
) -> None:
    for picture in shapes.glob("*.png"):
        if kind == "bomb":
            write_bomb(picture)
        else:
            picture.write_bytes(picture.read_bytes()[:100])
    commands = with_each_data_command(model, shapes, tmp_path / "out")
    ended = run(*commands[0], *MICRO) if command == "train" else run(*commands[1])
    assert_one_line(
        ended, "16 of 16 samples are bad; at most max(5, 1.0%) may be: repair or remove those listed in"
    )
    (listed,) = (tmp_path / "out").rglob("bad_samples.jsonl")
    assert len(listed.read_text().splitlines()) == 16


def test_of_a_truncated_tar_the_whole_samples_are_kept_and_the_rest_is_reported(
    run: Run, data: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "shapes.tar", "w") as shard:
        for path in sorted(data.iterdir()):
            shard.add(path, arcname=path.name)
    whole = (tmp_path / "shapes.tar").read_bytes()
    (tmp_path / "shapes.tar").write_bytes(whole[: len(whole) * 3 // 4])
    inspected = run("data", "inspect", tmp_path / "shapes.tar", "--json")
    assert inspected.code == 0
    found = json.loads(inspected.out)
    assert 8 <= found["n_pairs"] < 16 and found["n_bad"] == 1
    assert any("truncated" in problem for problem in found["problems"])

    out = tmp_path / "model"
    command = ["train", tmp_path / "shapes.tar", "--out", out, "--preset", "tiny", "--stages", "tokenizer"]
    assert_one_line(
        run(*command), "1 shards or tables are damaged, and nobody knows how many pictures they hold"
    )
    ended = run(*command, "--skip-bad")
    assert (ended.code, ended.out) == (0, f"{out}\n")
    assert f"{found['n_pairs']} captioned pictures" in ended.err
    assert "1 bad samples are left out" in ended.err
    assert "truncated" in (out / "run" / "bad_samples.jsonl").read_text()


def test_data_inspect_prints_one_json_object_or_lines(run: Run, data: Path) -> None:
    found = json.loads(run("data", "inspect", data, "--json").out)
    assert (found["n_pairs"], found["splits"]) == (16, {"train": 12, "validation": 4})
    assert "pictures  16 (train 12, validation 4)" in run("data", "inspect", data).out


# train


def test_train_prints_the_model_folder_and_says_what_it_trains_on(
    run: Run, data: Path, tmp_path: Path
) -> None:
    ended = run("train", data, "--out", tmp_path / "m", "--preset", "tiny", "--stages", "dvae", *MICRO)
    assert (ended.code, ended.out) == (0, f"{tmp_path / 'm'}\n")
    assert "16 captioned pictures (train 12, validation 4)" in ended.err
    assert "dvae 2: validation_psnr" in ended.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--preset", "huge"], "huge"),
        (
            ["--set", "dvae_training.stepz=3"],
            "dvae_training.stepz is not a setting; did you mean dvae_training.steps?",
        ),
        (["--set", "dvae_training.steps=-1"], "dvae_training.steps = -1"),
        (["--set", "dvae_training.steps"], "dvae_training.steps"),
        (["--set", "dvae.image_size=30"], "image_size is 30; it must be a multiple of 8"),
        (
            ["--stages", "dvae,vqgan"],
            "stage 'vqgan' is unknown: choose from tokenizer, dvae, decoder, transformer, clip",
        ),
        (["--init-from", "nowhere"], "--init-from nowhere: no such folder"),
        (["--device", "gpu"], "device 'gpu' is unknown"),
        (["--dtype", "int8"], "dtype int8 is for drawing only: use auto, float32 or bfloat16"),
    ],
)
def test_a_wrong_option_of_train_is_one_line(
    arguments: list[str], expected: str, run: Run, data: Path, tmp_path: Path
) -> None:
    ended = run("train", data, "--out", tmp_path / "m", "--preset", "tiny", "--quiet", *arguments)
    assert_one_line(ended, expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed = \n", "not valid TOML: line 1"),
        ("seed = 0\n", "tokenizer is missing"),
        ("\x00", "not valid TOML"),
    ],
)
def test_a_bad_preset_file_is_one_line(
    text: str, expected: str, run: Run, data: Path, tmp_path: Path
) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text(text)
    ended = run("train", data, "--out", tmp_path / "m", "--preset", preset)
    assert_one_line(ended, expected)
    assert "mine.toml" in ended.err


def test_a_full_disk_ends_train_with_one_line(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        "train",
        data,
        "--out",
        tmp_path / "m",
        "--preset",
        "tiny",
        "--stages",
        "dvae",
        "--quiet",
        *MICRO,
    ]
    with monkeypatch.context() as patch:
        fill_the_disk(patch)
        assert_one_line(run(*command), "No space left on device", code=1)
    assert run(*command).code == 0, "with room again, the same command goes on"


def test_a_disk_that_fills_up_at_a_checkpoint_ends_train_with_one_line_and_costs_nothing_saved(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*MICRO, "--set", "dvae_training.checkpoint_every=1"]
    command = [
        "train",
        data,
        "--out",
        tmp_path / "m",
        "--preset",
        "tiny",
        "--stages",
        "dvae",
        "--quiet",
        *settings,
    ]
    save_tensors = weights.save_tensors

    def full_at_step_2(path: Path, *arguments: Any) -> None:
        if "step-2" in str(path):
            fill_the_disk(patch)
        save_tensors(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_tensors", full_at_step_2)
        assert_one_line(run(*command), "No space left on device", code=1)
    folders = [path for path in (tmp_path / "m" / "run" / "checkpoints" / "dvae").iterdir() if path.is_dir()]
    assert [path.name for path in folders] == ["step-1"]
    assert run(*command).code == 0


def test_a_second_run_in_the_same_folder_is_one_line(run: Run, data: Path, tmp_path: Path) -> None:
    (tmp_path / "m" / "run").mkdir(parents=True)
    with FileLock(tmp_path / "m" / "run" / "lock"):
        ended = run("train", data, "--out", tmp_path / "m", "--preset", "tiny")
    assert_one_line(ended, "another run is training in this folder; wait for it, or choose another --out")


def test_an_out_that_cannot_be_a_folder_is_one_line(run: Run, data: Path, tmp_path: Path) -> None:
    (tmp_path / "m").write_text("a file")
    ended = run("train", data, "--out", tmp_path / "m", "--preset", "tiny")
    assert_one_line(ended, str(tmp_path / "m"), code=1)


# encode, evaluate, rerun, import


def test_encode_writes_a_store_and_goes_on_where_it_stopped(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    first = run("encode", data, "--model", model, "--out", tmp_path, "--json")
    found = json.loads(first.out)
    assert (first.code, found["pictures"], found["bad"]) == (0, 16, 0)
    assert (Path(found["folder"]) / "tokens-00000.npy").is_file()
    assert (
        run("encode", data, "--model", model, "--out", tmp_path).out
        == f"{found['folder']}: 16 pictures, 0 bad\n"
    )
    other = run("encode", data, "--model", model, "--out", tmp_path, "--crop", "paper", "--json")
    assert json.loads(other.out)["folder"] != found["folder"]


def test_encode_refuses_an_unknown_crop(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    ended = run("encode", data, "--model", model, "--out", tmp_path, "--crop", "wide")
    assert_one_line(ended, "--crop 'wide' is unknown: use center or paper")


def test_evaluate_prints_its_figures_and_writes_them(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    ended = run("evaluate", model, data, "--out", tmp_path, "--limit", 2, "--json")
    assert ended.code == 0
    found = json.loads(ended.out)
    assert found == json.loads((tmp_path / "report.json").read_text())
    assert {"image_tokenizer", "transformer", "retrieval"} <= found.keys()
    assert (tmp_path / "draws.png").is_file() and (tmp_path / "reconstructions.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--splits", "tset"], "split 'tset' is not in the data, which have train 12, validation 4"),
        (["--limit", "0"], "limit = 0: must be greater than or equal to 1"),
    ],
)
def test_a_wrong_option_of_evaluate_is_one_line(
    arguments: list[str], expected: str, run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    assert_one_line(run("evaluate", model, data, "--out", tmp_path, *arguments), expected)


def test_rerun_draws_the_same_tokens_again(run: Run, model: Path, tmp_path: Path) -> None:
    run("generate", "a red circle", "--model", model, "-n", 2, "--out", tmp_path)
    picture = tmp_path / "001_1.png"
    ended = run("rerun", picture, "--model", model, "--json")
    assert ended.code == 0
    assert json.loads(ended.out) == {"path": str(tmp_path / "001_1_rerun.png"), "agrees": True}
    assert Image.open(tmp_path / "001_1_rerun.png").tobytes() == Image.open(picture).tobytes()


def test_rerun_ends_with_code_3_when_the_tokens_differ(run: Run, model: Path, tmp_path: Path) -> None:
    run("generate", "a red circle", "--model", model, "-n", 1, "--out", tmp_path)
    recipe = images.read_recipe(tmp_path / "000_0.png") | {"tokens_sha256": "0" * 64}
    images.save_png(Image.new("RGB", (32, 32)), tmp_path / "other.png", recipe)
    ended = run("rerun", tmp_path / "other.png", "--model", model, "--out", tmp_path / "again.png")
    assert (ended.code, ended.err) == (3, "")
    assert ended.out == f"{tmp_path / 'again.png'}: other tokens than the recipe records\n"
    with pytest.raises(ValueError, match="holds no recipe"):  # that of other tokens would be a lie
        images.read_recipe(tmp_path / "again.png")


@pytest.mark.parametrize(("drawn_on", "expected"), [("cpu", "cpu"), ("cuda", "cuda")])
def test_rerun_draws_on_the_kind_of_device_that_the_recipe_names(
    drawn_on: str, expected: str, run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("generate", "a", "--model", model, "-n", 1, "--out", tmp_path)
    recipe = images.read_recipe(tmp_path / "000_0.png") | {"device": drawn_on}
    images.save_png(Image.new("RGB", (32, 32)), tmp_path / "moved.png", recipe)
    asked: list[str] = []
    load = DallePipeline.from_pretrained

    def record(source: str | None, *, device: torch.device) -> DallePipeline:
        asked.append(device.type)
        return load(source)  # on the CPU: there may be no GPU here

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(DallePipeline, "from_pretrained", record)
    assert run("rerun", tmp_path / "moved.png", "--model", model).code == 0
    assert asked == [expected]


def test_commands_that_write_a_model_folder_name_it_in_json(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m"
    trained = run(
        "train", data, "--out", out, "--preset", "tiny", "--stages", "tokenizer", "--json", *MICRO[:2]
    )
    assert json.loads(trained.out) == {"folder": str(out)}
    monkeypatch.setattr("dalle.importers.openai_dvae.import_openai_dvae", lambda *files: None)
    imported = run("import", "openai-dvae", "a", "b", "--out", out, "--allow-pickle", "--json")
    assert json.loads(imported.out) == {"folder": str(out)}


@pytest.mark.parametrize(
    ("picture", "expected"), [("plain.png", "PNG holds no recipe"), ("missing.png", "no such picture file")]
)
def test_rerun_of_a_picture_without_a_recipe_is_one_line(
    picture: str, expected: str, run: Run, model: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "plain.png")
    assert_one_line(run("rerun", tmp_path / picture, "--model", model), expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["vae", "a.pkl", "b.pkl"], "import kind 'vae' is unknown: use openai-dvae"),
        (["llamagen", "a.pt"], "llamagen is not read: its text-to-image models read features of a frozen"),
        (["cogview", "a.pt"], "cogview is not read: its 4 billion parameters are split"),
        (["vqgan", "a.ckpt"], "a.ckpt: no such file"),
        (["vqgan", "JUNK"], "junk.pkl is not a file of torch.save, or is damaged"),
        (["vqgan", "a.ckpt", "--dtype", "float16"], "vqgan takes neither --set nor --dtype"),
        (
            ["min-dalle", "a.pt"],
            "min-dalle takes encoder.pt decoder.pt detoker.pt vocab.json merges.txt; got 1",
        ),
        (["dalle-pytorch", "JUNK", "a.json"], "junk.pkl is not a file of torch.save, or is damaged"),
        (["dalle-pytorch", "a.pt", "b", "--dtype", "int8"], "dtype is int8; allowed are float32, bfloat16"),
        (["openai-dvae", "a.pkl"], "openai-dvae takes encoder.pkl and decoder.pkl; got 1 files"),
        (["hf-clip", "a", "b"], "hf-clip takes the folder of a transformers CLIPModel; got 2"),
        (["hf-clip", "a"], "a/config.json"),
        (
            ["open-clip", "a"],
            "open-clip takes a folder of open_clip and OpenAI's bpe_simple_vocab_16e6.txt.gz; got 1",
        ),
        (["openai-clip", "ViT-B-32.pt"], "takes an archive such as ViT-B-32.pt and bpe_simple_vocab"),
        (["openai-dvae", "a.pkl", "b.pkl"], "openai-dvae files are pickles: pass --allow-pickle"),
        (["openai-clip", "a.pt", "b.gz"], "openai-clip files are pickles: pass --allow-pickle"),
        (["openai-clip", "a.pt", "b.gz", "--allow-pickle"], "cannot read a.pt: No such file or directory"),
        (["openai-dvae", "a.pkl", "b.pkl", "--allow-pickle"], "cannot read a.pkl: No such file or directory"),
        (["openai-dvae", "JUNK", "b.pkl", "--allow-pickle"], "is not a file of torch.save, or is damaged"),
    ],
)
def test_a_wrong_import_is_one_line(arguments: list[str], expected: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "junk.pkl").write_bytes(b"junk")
    given = [str(tmp_path / "junk.pkl") if part == "JUNK" else part for part in arguments]
    assert_one_line(run("import", *given, "--out", tmp_path / "m"), expected)
    assert not (tmp_path / "m").exists()


def test_finetune_from_what_is_no_model_is_one_line_and_leaves_nothing(
    run: Run, data: Path, tmp_path: Path
) -> None:
    ended = run("finetune", data, "--out", tmp_path / "mine", "--from", "./nowhere")
    assert_one_line(ended, "./nowhere is not a folder")
    assert not (tmp_path / "mine").exists()


# The command as a whole


def test_every_command_has_help(run: Run) -> None:
    for command in (
        [],
        ["generate"],
        ["train"],
        ["finetune"],
        ["encode"],
        ["evaluate"],
        ["rerun"],
        ["rerank"],
        ["classify"],
        ["import"],
        ["data"],
    ):
        ended = run(*command, "--help")
        assert ended.code == 0 and "Usage: " in ended.out, command


def test_a_misspelt_option_is_a_usage_error_without_a_traceback(run: Run) -> None:
    ended = run("generate", "a", "--sede", 3)
    assert ended.code == 2
    assert "No such option" in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize(
    "arguments", [["generate", "a", "--model", "/nowhere/at/all"], ["data", "inspect", "/nowhere"]]
)
def test_as_a_process_of_its_own_a_mistake_is_one_line_and_code_2(arguments: list[str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "dalle.cli", *arguments], capture_output=True, text=True, timeout=200
    )
    assert_one_line(Ended(ended.returncode, ended.stdout, ended.stderr), "/nowhere")
