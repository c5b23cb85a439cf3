"""Which optimizer brings the transformer of a preset further in the same number of updates, on the same batches?

    python benchmarks/optimizers.py ART --model MODEL --tokens FOLDER [--updates 200] [--schedule 300]

MODEL holds the tokenizer and the dVAE (a model folder, or a run that has finished these stages). Each candidate
trains a fresh transformer through the first `--updates` of a cosine schedule of `--schedule` updates. One JSON line
a candidate and hundred updates: training image loss since the line before, and losses on held-out pictures with
their captions and with other ones, in nats per token, without weight averaging; `seconds` is for orientation only.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from dalle.config import load_preset, override, validate
from dalle.data.pairs import read_pairs
from dalle.data.tokens import encode_pairs
from dalle.dvae import DiscreteVAE
from dalle.generation.precision import default_dtype
from dalle.tokenizer import Tokenizer
from dalle.training.loop import Progress, update
from dalle.training.memory import keep_freed_memory
from dalle.training.optim import OPTIMIZERS, Plateau
from dalle.training.recipe import Recipe, transformer_config
from dalle.training.stages import sequences
from dalle.training.transformer import TransformerStage
from dalle.transformer import Transformer

CANDIDATES = (("adamw", 1.5e-3), ("muon", 2e-3))  # optimizer, peak learning rate
REPORT_EVERY = 100  # updates


def main() -> None:
    """Train each candidate for some updates and print how far it came."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="anything that `dalle train` reads")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="folder for the encoded pictures")
    parser.add_argument("--preset", default="laptop")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--schedule", type=int, default=300)
    given = parser.parse_args()
    keep_freed_memory()
    pairs, device = read_pairs(given.data), torch.device("cpu")
    dvae = DiscreteVAE.from_pretrained(given.model / "dvae").eval()
    tokenizer = Tokenizer.from_pretrained(given.model / "tokenizer")
    store = encode_pairs(pairs, dvae, given.tokens, crop="center", seed=0)
    train = [pair for pair in pairs if pair.split == "train"]
    held_out = [pair for pair in pairs if pair.split not in ("train", "excluded")]
    for optimizer_name, rate in CANDIDATES:
        changes = {
            "steps": given.schedule,
            "optimizer": optimizer_name,
            "learning_rate": rate,
            "final_learning_rate": rate / 20,
            "warmup_steps": given.schedule // 5,
        }
        settings = [f"transformer_training.{name}={value}" for name, value in changes.items()]
        recipe = validate(Recipe, override(load_preset(given.preset), settings), given.preset)
        config = transformer_config(recipe.transformer, dvae.config, tokenizer.n_vocab, tokenizer.max_tokens)
        torch.manual_seed(recipe.seed)
        stage = TransformerStage(
            Transformer(config),
            recipe.transformer_training,
            tokenizer,
            dvae,
            sequences([store], train),
            sequences([store], held_out),
            seed=recipe.seed,
            balance=recipe.balance,
            sampling=recipe.sampling,
        )
        optimizer = OPTIMIZERS[optimizer_name](stage.model, recipe.transformer_training)
        plateau, progress, losses, began = Plateau(), Progress(), [], time.perf_counter()
        while progress.step < given.updates:
            _, metrics = update(stage, optimizer, plateau, progress, default_dtype(device))
            losses.append(metrics["image_loss"])
            if progress.step % REPORT_EVERY and progress.step < given.updates:
                continue
            stage.model.eval()
            with torch.no_grad():
                figures = stage.validate()
            stage.model.train()
            row = {"optimizer": optimizer_name, "peak_learning_rate": rate, "updates": progress.step}
            row |= {"train_image_loss": sum(losses) / len(losses), **figures}
            row |= {"seconds": time.perf_counter() - began}
            print(
                json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}),
                flush=True,
            )
            losses = []


if __name__ == "__main__":
    main()
