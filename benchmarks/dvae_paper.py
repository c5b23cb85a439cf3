"""Does the paper's own dVAE objective train? 64 px -> 8x8 tokens of 512 codes, in under two hours on two CPU cores.

    python benchmarks/dvae_paper.py ART --out runs/dvae-paper [--steps 6000]

Source: §2.1 and App. A.2, A.3: logit-Laplace likelihood, soft Gumbel relaxation, beta 0 -> 6.6, temperature
1 -> 1/16 and step size, each along half a cosine, through the one training loop of `dalle train`; the same command
goes on where it was stopped. The schedules are stretched to the run: the step size falls to 1/80 over all of it,
the temperature over its first half, and beta rises over 1/30 of that half, as the paper's 5k updates are to 150k.
differs: the trunk is that of the preset `laptop`, and the peak step size that of a short run at a small batch.

At the end one JSON line: `psnr_hard` of argmax tokens and `psnr_relaxed` of the training path at temperature 1/16,
both in dB with the error pooled over the held-out pictures, and how many of the 512 codes the hard tokens use.
The curve is in OUT/run/metrics.jsonl (rows with validation_psnr).
"""

import argparse
import json
import logging
from pathlib import Path

import torch

from dalle.config import load_preset, override, validate
from dalle.data.pairs import BadSampleLog, read_pairs
from dalle.dvae import DiscreteVAE, gumbel_softmax, map_pixels, unmap_pixels
from dalle.evaluation.metrics import Reconstruction
from dalle.generation.precision import default_dtype
from dalle.training.dvae import VALIDATION_BATCH, DVAEStage
from dalle.training.loop import train_stage
from dalle.training.memory import keep_freed_memory
from dalle.training.recipe import Recipe

TEMPERATURE_SHARE = 1 / 2  # of the run
FINAL_TEMPERATURE, FINAL_BETA = 1 / 16, 6.6  # App. A.2
RATE, FINAL_RATE_SHARE = 1e-3, 1 / 80  # the paper: 1e-4 -> 1.25e-6


def paper_recipe(steps: int, batch_size: int) -> Recipe:
    """The preset `laptop` with the paper's quantizer, likelihood and schedules."""
    temperature_steps = max(1, int(steps * TEMPERATURE_SHARE))
    changes = {
        "dvae.quantizer": "gumbel",
        "dvae.n_codes": 512,
        "dvae.fsq_levels": [],
        "dvae.likelihood": "logit_laplace",
        "dvae.d_code": 128,
        "dvae_training.steps": steps,
        "dvae_training.batch_size": batch_size,
        "dvae_training.learning_rate": RATE,
        "dvae_training.final_learning_rate": RATE * FINAL_RATE_SHARE,
        "dvae_training.kl_weight": FINAL_BETA,
        "dvae_training.kl_steps": max(1, temperature_steps // 30),
        "dvae_training.final_temperature": FINAL_TEMPERATURE,
        "dvae_training.temperature_steps": temperature_steps,
    }
    settings = [f"{name}={value}" for name, value in changes.items()]
    return validate(Recipe, override(load_preset("laptop"), settings), "laptop")


class PaperStage(DVAEStage):
    """The dVAE stage, which also measures the relaxed path at the last temperature."""

    def validate(self) -> dict[str, float]:
        generator = torch.Generator(self.device).manual_seed(0)
        sums = Reconstruction(self.model.config.n_codes)
        for pictures in torch.split(self.held_out, VALIDATION_BATCH):
            logits = self.model.encoder(map_pixels(pictures.to(self.device)))
            relaxed = gumbel_softmax(logits, FINAL_TEMPERATURE, generator)
            out = self.model.decoder(relaxed)[:, :3].float()
            sums.add_(pictures, unmap_pixels(torch.sigmoid(out)), logits.argmax(dim=1))
        assert sums.psnr is not None
        n_used = int((sums.histogram > 0).sum())
        return {**super().validate(), "psnr_relaxed": sums.psnr, "n_codes_used": n_used}


def main() -> None:
    """Train, then print the last figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="anything that `dalle train` reads")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, curve and the dVAE")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    keep_freed_memory()
    recipe = paper_recipe(arguments.steps, arguments.batch)
    pairs = read_pairs(arguments.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    stage = PaperStage(
        DiscreteVAE(recipe.dvae).to(device),
        recipe.dvae_training,
        [pair for pair in pairs if pair.split == "train"],
        [pair for pair in pairs if pair.split not in ("train", "excluded")],
        BadSampleLog(arguments.out / "bad_samples.jsonl", total=len(pairs)),
        seed=0,
        balance=recipe.balance,
    )
    stage.model.load_state_dict(train_stage(stage, arguments.out / "run", default_dtype(device)))
    stage.model.eval()
    with torch.no_grad():
        figures = stage.validate()
    stage.model.save_pretrained(arguments.out / "dvae")
    row = {
        "psnr_hard": round(figures["psnr"], 2),
        "psnr_relaxed": round(figures["psnr_relaxed"], 2),
        "relaxed_minus_hard": round(figures["psnr_relaxed"] - figures["psnr"], 2),
        "codes_used": figures["n_codes_used"],
        "n_codes": recipe.dvae.n_codes,
        "held_out": len(stage.held_out),
        "pictures_seen": arguments.steps * arguments.batch,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
