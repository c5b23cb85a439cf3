"""What `dalle finetune` with its defaults makes of 200 sprites: drawn by code, 40 combinations never shown to it.

    python benchmarks/finetune.py OUT [--draws 4] [--from MODEL]

Prints one JSON object, all figures on the 40 held-out pictures and captions: PSNR through the dVAE before and after;
the share of draws whose nearest, by 16x16 RGB, is the right one of the object's 10 colours, of the colour's 20 objects,
and of all 200 sprites; CLIP's R-precision among all 200 captions, before and after. Beside it: copying a known picture
of the same object, and a model trained from nothing (`dalle train --preset laptop`, without a CLIP) for as many seconds.
Draws are what `dalle generate` gives: a fine-tuned model's CLIP keeps the best of its candidates. Shares come with the
standard error over captions. Refuses a base model whose dVAE shows the sprites well already; exit code 1 where
a target is missed.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sprites import COLOURS, OBJECTS, SIZE, draw_sprite, is_unseen, write_sprites
from torch import Tensor

from dalle import images
from dalle.dvae import DiscreteVAE
from dalle.evaluation.metrics import thumbnails
from dalle.evaluation.protocols import measure_reconstruction
from dalle.evaluation.zero_shot import r_precision
from dalle.generation.precision import has_native_bfloat16
from dalle.generation.rerank import Ranker
from dalle.model_folder import model_folder
from dalle.pipeline import DallePipeline
from dalle.training.finetune_report import validations

MAX_BEFORE_DB = 18.0  # a dVAE that is better on the sprites has little to learn
TARGETS = {"psnr_after": 24.0, "colour": 0.90, "object": 0.70}  # at least
MAX_SECONDS = {
    True: 20 * 60,
    False: 60 * 60,
}  # of the fine-tuning on two cores, with native bfloat16 and without
SPRITES = [(thing, colour) for thing in OBJECTS for colour in COLOURS]
UNSEEN = [place for place, sprite in enumerate(SPRITES) if is_unseen(*sprite)]
CAPTIONS = [f"a {colour} {thing}" for thing, colour in SPRITES]

Shares = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Marks:
    """Of each unseen caption (40,), the share of its draws that are nearest to the right sprite: 0..1."""

    colour: Shares  # of the object's 10
    object: Shares  # of the colour's 20
    both: Shares  # of all 200

    def figures(self) -> dict[str, float]:
        """Means over captions, each with its standard error."""
        found = {}
        for name, shares in vars(self).items():
            found[name] = float(shares.mean())
            found[f"{name}_standard_error"] = standard_error(shares)
        return found


def standard_error(shares: Shares) -> float:
    """Of the mean of numbers (M,)."""
    return float(shares.std(ddof=1) / len(shares) ** 0.5)


def main() -> None:
    """Draw, fine-tune, train from nothing, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--draws", type=int, default=4, help="of each held-out caption, each by the model's defaults"
    )
    parser.add_argument("--from", dest="base", help="model folder or Hub id; the bundled model if left out")
    arguments = parser.parse_args()
    out, base = arguments.out, model_folder(arguments.base)
    data, tuned = out / "sprites", out / "tuned"
    before = psnr(base, SPRITES)
    if before > MAX_BEFORE_DB:
        raise SystemExit(
            f"the dVAE of {base.name} shows the sprites at {before:.1f} dB: above {MAX_BEFORE_DB:g}"
        )
    write_sprites(data)
    seconds = run("finetune", data / "known", tuned, *(["--from", str(base)] if arguments.base else []))
    scratch, scratch_seconds = train_from_nothing(data / "known", out, tuned, seconds)
    gallery = thumbnails(pictures_of(SPRITES, SIZE))
    models = {"finetuned": tuned, "scratch": scratch}
    marks = {name: mark_draws(folder, gallery, arguments.draws) for name, folder in models.items()}
    unseen = [SPRITES[place] for place in UNSEEN]
    marks["copy"] = mark_copies(gallery)
    gain = marks["finetuned"].both - marks["scratch"].both
    found: dict[str, Any] = {
        "seconds": round(seconds),
        "scratch_seconds": round(scratch_seconds),
        "threads": torch.get_num_threads(),
        "psnr_before": psnr(base, unseen),
        "psnr_after": psnr(tuned, unseen),
        "psnr_scratch": psnr(scratch, unseen),
        **{name: mark.figures() for name, mark in marks.items()},
        "gain_over_scratch": {"both": float(gain.mean()), "standard_error": standard_error(gain)},
        "r_precision": {"before": precision(base), "after": precision(tuned), "chance": 1 / len(SPRITES)},
    }
    found["missed"] = missed(found)
    print(json.dumps(found, indent=2))
    sys.exit(1 if found["missed"] else 0)


def run(command: str, data: Path, out: Path, *options: str) -> float:
    """Run a command of dalle to its end; the seconds that it took. A finished one is not run again."""
    took = out / "run" / "seconds.json"
    if not took.is_file():
        began = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "dalle", command, str(data), "--out", str(out), *options],
            check=True,
            stdout=sys.stderr,
        )
        took.write_text(json.dumps(time.monotonic() - began))
    return float(json.loads(took.read_text()))


def train_from_nothing(data: Path, out: Path, tuned: Path, seconds: float) -> tuple[Path, float]:
    """Train tokenizer, dVAE and transformer alone, for as long as all stages of the fine-tuning took.

    The updates that fit are foretold from the fine-tuning's, and once more from what they took, if that was less.
    Returns the model folder and its seconds.
    """
    rows = {stage: validations(tuned / "run", stage)[-1] for stage in ("dvae", "transformer")}
    factor = seconds / sum(row["seconds"] for row in rows.values())
    for attempt in range(1, 4):
        folder = out / f"scratch-{attempt}"
        options = ["--preset", "laptop", "--stages", "tokenizer,dvae,decoder,transformer"]
        for stage, row in rows.items():
            steps = round(row["step"] * factor)
            every = {"warmup_steps": max(1, steps // 20), "validate_every": steps, "checkpoint_every": steps}
            for name, value in {"steps": steps, **every, "sheet_every": steps}.items():
                options += ["--set", f"{stage}_training.{name}={value}"]
        took = run("train", data, folder, *options)
        if took >= 0.9 * seconds:
            break
        factor *= seconds / took
    return folder, took


def pictures_of(sprites: list[tuple[str, str]], side: int) -> Tensor:
    """Sprites as pictures (B, 3, side, side) in [0, 1]."""
    return images.to_tensor([images.center_crop(draw_sprite(*sprite), side) for sprite in sprites])


def psnr(model: Path, sprites: list[tuple[str, str]]) -> float:
    """Of sprites through a model's dVAE, dB."""
    dvae = DiscreteVAE.from_pretrained(model / "dvae")
    pictures = pictures_of(sprites, dvae.config.output_size)
    found = measure_reconstruction(dvae, torch.split(pictures, 32))[0].seen.psnr
    assert found is not None  # there are pictures
    return found


def mark_draws(model: Path, gallery: npt.NDArray[np.float32], n_draws: int) -> Marks:
    """Draw the unseen captions as the model does by default, `n_draws` times, and mark the draws against all sprites.

    A model that has a CLIP keeps the best of its own number of candidates.
    """
    pipe = DallePipeline.from_pretrained(model)
    captions = [CAPTIONS[place] for place in UNSEEN]
    drawn = [
        thumbnails(images.to_tensor(pipe(captions, seed=1000 * n).images)) for n in range(n_draws)
    ]  # (40, D) each
    return mark(np.stack(drawn, axis=1), gallery)


def mark_copies(gallery: npt.NDArray[np.float32]) -> Marks:
    """Mark, as draws, each unseen sprite's object in all its known colours: the right object, never the right colour."""
    known = [
        [
            place
            for place, sprite in enumerate(SPRITES)
            if sprite[0] == SPRITES[unseen][0] and place not in UNSEEN
        ]
        for unseen in UNSEEN
    ]
    return mark(np.stack([gallery[places] for places in known]), gallery)


def mark(drawn: npt.NDArray[np.float32], gallery: npt.NDArray[np.float32]) -> Marks:
    """Mark draws (40, n, D) of the unseen captions against all sprites (200, D)."""
    distances = ((drawn[:, :, None] - gallery) ** 2).sum(axis=3)  # (40, n, 200)
    grid = distances.reshape(*distances.shape[:2], len(OBJECTS), len(COLOURS))
    truth = np.array(UNSEEN)
    things, colours = truth // len(COLOURS), truth % len(COLOURS)
    rows = np.arange(len(truth))
    return Marks(
        colour=(grid[rows, :, things].argmin(axis=2) == colours[:, None]).mean(axis=1),
        object=(grid[rows, :, :, colours].argmin(axis=2) == things[:, None]).mean(axis=1),
        both=(distances.argmin(axis=2) == truth[:, None]).mean(axis=1),
    )


def precision(model: Path) -> float | None:
    """Share of the unseen sprites whose own caption is the nearest of all 200 to a model's CLIP; None without one."""
    if not (model / "clip").is_dir():
        return None
    ranker = Ranker.from_pretrained(model)
    pictures = pictures_of([SPRITES[place] for place in UNSEEN], ranker.clip.config.image_size)
    others = [[place, *(other for other in range(len(SPRITES)) if other != place)] for place in UNSEEN]
    return r_precision(ranker.encode_pictures(pictures), ranker.encode_captions(CAPTIONS), others)


def missed(found: dict[str, Any]) -> list[str]:
    """The targets that these figures miss."""
    reached = {
        "psnr_after": found["psnr_after"],
        **{name: found["finetuned"][name] for name in ("colour", "object")},
    }
    failures = [
        f"{name} {reached[name]:.3g} < {least:g}" for name, least in TARGETS.items() if reached[name] < least
    ]
    limit = MAX_SECONDS[has_native_bfloat16(torch.device("cpu"))]
    if found["seconds"] > limit:
        failures.append(f"seconds {found['seconds']} > {limit}")
    gain = found["gain_over_scratch"]
    if gain["both"] < 2 * gain["standard_error"]:
        failures.append(
            f"gain over scratch {gain['both']:.3g} < two standard errors of {gain['standard_error']:.3g}"
        )
    return failures


if __name__ == "__main__":
    main()
