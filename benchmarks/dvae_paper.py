"""Does the paper's own dVAE objective train? 64 px -> 8x8 tokens of 512 codes, in under two hours on two CPU cores.

    python benchmarks/dvae_paper.py ART --out runs/dvae-paper [--steps 4500]

Source: §2.1 and App. A.2, A.3: logit-Laplace likelihood, soft Gumbel relaxation, beta 0 -> 6.6, temperature
1 -> 1/16 and step size, each along half a cosine, through the one training loop of `dalle train`; the same command
goes on where it was stopped. The schedules are stretched to the run: the step size falls to 1/80 over all of it,
the temperature over its first half, and beta rises over 1/30 of that half, as the paper's 5k updates are to 150k.
differs: the trunk is that of the preset `laptop`; the peak step size is that of a short run at a small batch; ln b has a
floor, and the encoder's first logits are eight times as large (docs/dvae.md says what each is worth).

    python benchmarks/dvae_paper.py ART --out runs/other --steps 250 --batch 32 --set dvae.min_ln_b=-7

trains briefly with another setting, to see what it costs; the quantizer may be FSQ, the likelihood squared error.

At the end one JSON line: `psnr_hard` of argmax tokens and `psnr_relaxed` of the training path at temperature 1/16,
both in dB with the error pooled over the held-out pictures, and how many of the 512 codes the hard tokens use.
The curve is in OUT/run/metrics.jsonl (rows with validation_psnr).
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from dalle.config import load_preset, override, validate
from dalle.data.pairs import read_pairs
from dalle.data.reading import BadSampleLog
from dalle.dvae import DiscreteVAE, gumbel_softmax, map_pixels, unmap_pixels
from dalle.evaluation.metrics import Reconstruction
from dalle.generation.precision import default_dtype
from dalle.training.dvae import VALIDATION_BATCH, DVAEStage
from dalle.training.loop import train_stage
from dalle.training.memory import keep_freed_memory
from dalle.training.recipe import RELAXATION, Recipe

TEMPERATURE_SHARE = 1 / 2  # of the run
FINAL_TEMPERATURE, FINAL_BETA = 1 / 16, 6.6  # App. A.2
RATE, FINAL_RATE_SHARE = 1e-3, 1 / 80  # the paper: 1e-4 -> 1.25e-6
MIN_LN_B = -1.0  # of logits that span -2.2 .. 2.2
FIRST_LOGITS = 8.0  # times the initialisation's: so that the first codes say something in spite of the noise


def paper_recipe(steps: int, batch_size: int, changed: Sequence[str] = ()) -> Recipe:
    """The preset `laptop` with the paper's quantizer, likelihood and schedules, and what is `changed` in these."""
    temperature_steps = max(1, int(steps * TEMPERATURE_SHARE))
    changes = {
        "dvae.quantizer": "gumbel",
        "dvae.n_codes": 512,
        "dvae.fsq_levels": [],
        "dvae.likelihood": "logit_laplace",
        "dvae.min_ln_b": MIN_LN_B,
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
    tree = override(load_preset("laptop"), [*settings, *changed])
    if tree["dvae"]["quantizer"] == "fsq":  # it has neither temperature nor KL
        tree["dvae_training"] = {k: v for k, v in tree["dvae_training"].items() if k not in RELAXATION}
    return validate(Recipe, tree, "laptop")


class PaperStage(DVAEStage):
    """The dVAE stage, which also measures the relaxed path at the last temperature."""

    def validate(self) -> dict[str, float]:
        if self.model.config.quantizer == "fsq":  # has no relaxation
            return super().validate()
        generator = torch.Generator(self.device).manual_seed(0)
        sums = Reconstruction(self.model.config.n_codes, self.model.config.image_size)
        for pictures in torch.split(self.held_out, VALIDATION_BATCH):
            logits = self.model.encoder(map_pixels(pictures.to(self.device)))
            relaxed = gumbel_softmax(logits, FINAL_TEMPERATURE, generator)
            out = self.model.decoder(relaxed)[:, :3].float()
            sums.add_(pictures, unmap_pixels(torch.sigmoid(out)), logits.argmax(dim=1))
        assert sums.seen.psnr is not None
        return {**super().validate(), "psnr_relaxed": sums.seen.psnr}


def main() -> None:
    """Train, then print the last figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="anything that `dalle train` reads")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, curve and the dVAE")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--set", dest="changed", action="append", default=[], metavar="K=V")
    parser.add_argument("--first-logits", type=float, default=FIRST_LOGITS, help="times their initialisation")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    keep_freed_memory()
    recipe = paper_recipe(arguments.steps, arguments.batch, arguments.changed)
    pairs = read_pairs(arguments.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = DiscreteVAE(recipe.dvae).to(device)
    if recipe.dvae.quantizer == "gumbel":
        model.encoder.blocks.get_parameter("output.w").data *= arguments.first_logits
    stage = PaperStage(
        model,
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
        "codes_used": round(figures["codes_used"] * recipe.dvae.n_codes),
        "n_codes": recipe.dvae.n_codes,
        "held_out": len(stage.held_out),
        "pictures_seen": arguments.steps * arguments.batch,
    }
    if "psnr_relaxed" in figures:
        row["psnr_relaxed"] = round(figures["psnr_relaxed"], 2)
        row["relaxed_minus_hard"] = round(figures["psnr_relaxed"] - figures["psnr"], 2)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
