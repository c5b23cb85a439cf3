"""`dalle rerank` and `dalle classify` as a person types them, with a CLIP that knows red from blue."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle.model_folder import write_ranker_index
from tests.tiny import tiny_clip, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose CLIP is trained for some updates on plain red and blue squares."""
    out = tmp_path_factory.mktemp("ranker")
    tokenizer = tiny_tokenizer(["red", "blue"] * 3, n_text=12)
    model = tiny_clip(tokenizer, seed=0).train()
    text = torch.stack([torch.from_numpy(tokenizer.pad(tokenizer.encode(word))) for word in ("red", "blue")])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        noise = 0.2 * torch.rand(2, 3, 16, 16)
        noise[0, 0] += 0.8
        noise[1, 2] += 0.8
        loss = model.pair_loss(model.encode_image(noise), model.encode_text(text))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(out / "clip")
    tokenizer.save_pretrained(out / "tokenizer")
    write_ranker_index(out)
    return out


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    paths = []
    for name, colour in (("b", "blue"), ("r", "red")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
        paths.append(str(tmp_path / f"{name}.png"))
    return paths


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dalle.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_rerank_puts_the_picture_that_fits_first(folder: Path, pictures: list[str]) -> None:
    for caption, best in (("red", pictures[1]), ("blue", pictures[0])):
        shown = json.loads(run("rerank", caption, *pictures, "--ranker", folder, "--json").stdout)
        assert [row["rank"] for row in shown["images"]] == [0, 1]
        assert shown["images"][0]["path"] == best
        assert shown["images"][0]["score"] > shown["images"][1]["score"]
    lines = run("rerank", "red", *pictures, "--ranker", folder).stdout.splitlines()
    assert [line.split("  ")[1] for line in lines] == pictures[::-1]


def test_classify_names_the_label_that_fits(folder: Path, pictures: list[str], tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("blue\nred\n")
    options = ["--labels", tmp_path / "labels.txt", "--template", "{}", "--ranker", folder]
    shown = json.loads(run("classify", *pictures, *options, "--json").stdout)
    assert [row["label"] for row in shown["images"]] == ["blue", "red"]
    assert all(row["probability"] > 0.5 for row in shown["images"])


def test_generate_keeps_the_best_candidates_by_the_given_ranker(folder: Path, tmp_path: Path) -> None:
    options = ["-n", 2, "--candidates", 6, "--ranker", folder, "--out", tmp_path / "out", "--json"]
    shown = json.loads(run("generate", "red", *options).stdout)
    assert [row["rank"] for row in shown["images"]] == [0, 1]
    assert shown["images"][0]["score"] >= shown["images"][1]["score"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[:1] == [
        f"000_{shown['images'][0]['seed']}.png"
    ]
    missing = run("generate", "red", *options[:4], "--ranker", tmp_path, "--out", tmp_path / "none")
    assert missing.returncode == 2 and "has no clip" in missing.stderr and not (tmp_path / "none").exists()


def test_a_clip_alone_is_evaluated_on_held_out_pictures(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = []
    for i in range(24):
        colour, split = ("red", "blue")[i % 2], "train" if i < 16 else "test"
        Image.new("RGB", (16, 16), colour).save(data / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "captions": [colour], "split": split, "hue": colour})
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--probe", "hue", "--out", tmp_path / "out", "--json"]
    shown = json.loads(run("evaluate", folder, data, *options).stdout)
    assert shown == json.loads((tmp_path / "out" / "report.json").read_text())
    test = shown["clip"]["splits"]["test"]
    assert test["n_pictures"] == 8 and test["retrieval"]["picture_to_caption"]["recall_at_5"] > 0.5
    probe = shown["clip"]["probe"]
    assert (probe["field"], probe["accuracy"], probe["always_the_commonest"]) == ("hue", 1.0, 0.5)
    assert "probe" not in json.loads(run("evaluate", folder, data, *options[2:]).stdout)["clip"]


def test_mistakes_are_one_line(folder: Path, pictures: list[str], tmp_path: Path) -> None:
    for arguments, expected in (
        (["rerank", "red", *pictures, "--ranker", tmp_path], "has no clip"),
        (["rerank", "red " * 40, *pictures, "--ranker", folder], "tokens"),
        (["rerank", "red", tmp_path / "no.png", "--ranker", folder], "no such picture file"),
        (["classify", *pictures, "--labels", tmp_path / "no.txt", "--ranker", folder], "cannot be read"),
    ):
        ended = run(*arguments)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert (
            ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1 and expected in ended.stderr
        )
