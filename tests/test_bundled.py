"""The model that ships: small, whole, described by its own figures, and a start for other people's pictures."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dalle.data.shapes import write_shapes
from dalle.files import file_sha256
from dalle.manifest import VerifiedFolder
from dalle.model_folder import bundled_folder
from dalle.pipeline import DallePipeline


def evaluation() -> dict[str, object]:
    """The figures that ship beside the model."""
    figures = json.loads((bundled_folder() / "evaluation.json").read_text())
    assert isinstance(figures, dict)
    return figures


def test_files_are_whole_and_at_most_40_megabytes() -> None:
    VerifiedFolder(bundled_folder())
    assert sum(path.stat().st_size for path in bundled_folder().rglob("*") if path.is_file()) <= 40_000_000


def test_every_file_is_hashed_once_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = Counter[Path]()

    def counted(path: str | Path) -> str:
        hashed[Path(path).relative_to(bundled_folder())] += 1
        return file_sha256(path)

    # Every module that can hash a file of a model folder.
    for module in ("dalle.files", "dalle.manifest", "dalle.model_folder"):
        monkeypatch.setattr(f"{module}.file_sha256", counted)
    pipe = DallePipeline.from_pretrained()
    assert pipe.ranker is not None and pipe.ranker.sha256 and pipe.model_sha256
    listed = json.loads((bundled_folder() / "manifest.json").read_text())["files"]
    assert hashed == {Path(name): 1 for name in listed}


def test_card_states_the_figures_of_its_own_evaluation() -> None:
    card, figures = (bundled_folder() / "README.md").read_text(), evaluation()
    dvae, nearest = figures["dvae"], figures["nearest_of_100"]
    assert isinstance(dvae, dict) and isinstance(nearest, dict)
    assert f"{dvae['psnr']:.1f} dB" in card
    assert f"{nearest['draws']['recall_at_1']:.1%}" in card
    assert figures["model"]["sha256"] == DallePipeline.from_pretrained().model_sha256  # type: ignore[index]
    for licence in ("Apache-2.0", "CC-BY-4.0", "MIT", "OFL-1.1"):
        assert licence in card


def test_readme_states_the_figures_of_the_card() -> None:
    readme, figures = (Path(__file__).parents[1] / "README.md").read_text(), evaluation()
    dvae, nearest, losses = figures["dvae"], figures["nearest_of_100"], figures["transformer"]
    assert isinstance(dvae, dict) and isinstance(nearest, dict) and isinstance(losses, dict)
    draws, combo = nearest["draws"], losses["combo"]
    assert f"**{dvae['psnr']:.1f} dB**, {dvae['ink_psnr']:.1f} dB" in readme
    assert f"{dvae['codes_used']:.1%} of {dvae['n_codes']} codes" in readme
    assert f"{combo['image_loss']:.2f} and {combo['image_loss_shuffled']:.2f} nats" in readme
    assert f"**{draws['recall_at_1']:.1%}** (± {draws['recall_at_1_standard_error']:.1%})" in readme
    clip = figures["clip"]
    assert isinstance(clip, dict)
    combo_clip = clip["splits"]["combo"]
    precision = combo_clip["r_precision"]
    assert f"**{precision['share']:.1%}** (± {precision['standard_error']:.1%}) on `combo`" in readme
    assert f"**{combo_clip['style_accuracy']:.1%}** on `combo`" in readme


def test_clip_and_judge_find_captions_of_held_out_pictures_and_fit_into_12_megabytes() -> None:
    figures = evaluation()
    weights = [bundled_folder() / name / "model.safetensors" for name in ("clip", "judge")]
    assert sum(path.stat().st_size for path in weights) <= 12_000_000
    clip, judge = figures["clip"], figures["judge"]
    assert isinstance(clip, dict) and isinstance(judge, dict)
    assert clip["splits"]["combo"]["r_precision"]["share"] >= 0.7
    assert (
        judge["splits"]["combo"]["r_precision"]["share"] >= 0.2
    )  # chance: 0.01; it saw one half of the objects


def test_the_bundled_clip_orders_what_is_drawn_and_the_judge_does_not() -> None:
    pipe = DallePipeline.from_pretrained()
    judge = pipe.load_judge()
    assert pipe.ranker is not None and judge is not None
    assert pipe.ranker.sha256 != judge.sha256
    assert pipe.ranker.clip.config.image_tower != judge.clip.config.image_tower
    out = pipe("a red apple, flat fluent style", num_images_per_prompt=2, num_candidates=8)
    assert out.scores is not None and out.scores[0] >= out.scores[1]
    assert out.recipes[0]["ranker_sha256"] == pipe.ranker.sha256


def test_dvae_reaches_the_promised_reconstruction() -> None:
    dvae = evaluation()["dvae"]
    assert isinstance(dvae, dict)
    assert dvae["psnr"] >= 22
    assert dvae["codes_used"] >= 0.9


def test_true_captions_predict_the_picture_better_than_other_ones() -> None:
    splits = evaluation()["transformer"]
    assert isinstance(splits, dict)
    for figures in splits.values():
        assert figures["image_loss"] < figures["image_loss_shuffled"]


def test_colours_are_drawn_as_asked() -> None:
    pipe = DallePipeline.from_pretrained(dtype="float32")
    captions = [
        "a red apple, flat fluent style",
        "a blue heart, twemoji style",
        "a yellow heart, twemoji style",
    ]
    out = pipe(captions, num_images_per_prompt=4)
    ink = [colour_of_the_ink(np.asarray(image)) for image in out.images]
    assert sum(red > green for red, green, _ in ink[:4]) >= 3
    assert sum(blue > red for red, _, blue in ink[4:8]) >= 3
    assert sum(red > blue and green > blue for red, green, blue in ink[8:]) >= 3


def colour_of_the_ink(pixels: np.ndarray) -> tuple[float, float, float]:
    """Mean colour of the pixels that are not white."""
    ink = pixels[pixels.min(axis=-1) < 200]
    red, green, blue = ink.mean(axis=0) if len(ink) else (0.0, 0.0, 0.0)
    return float(red), float(green), float(blue)


@pytest.mark.long
def test_fine_tuning_beats_the_same_steps_from_scratch(tmp_path: Path) -> None:
    data = write_shapes(tmp_path / "data", 64, seed=3, size=64)
    scratch = (
        tmp_path / "parts"
    )  # tokenizer and dVAE of the bundled model, so that both losses are of the same tokens
    for component in ("tokenizer", "dvae"):
        shutil.copytree(bundled_folder() / component, scratch / component)
    losses = {}
    for name, start in (("tuned", bundled_folder()), ("scratch", scratch)):
        out = tmp_path / name
        sets = [
            "steps=40",
            "batch_size=16",
            "warmup_steps=5",
            "validate_every=40",
            "sheet_every=40",
            "learning_rate=5e-4",
        ]
        command = [
            sys.executable,
            "-m",
            "dalle.cli",
            "train",
            str(data),
            "--out",
            str(out),
            "--init-from",
            str(start),
            "--stages",
            "tokenizer,dvae,transformer",
        ]
        for setting in sets:
            command += ["--set", f"transformer_training.{setting}"]
        subprocess.run(command, check=True, capture_output=True, timeout=240)
        rows = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row["validation_image_loss"] for row in rows if "validation_image_loss" in row][-1]
    assert losses["tuned"] < losses["scratch"]
