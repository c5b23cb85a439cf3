"""Train the dVAE by the paper's objective alone for some minutes: do its hard tokens carry pictures?

    python benchmarks/dvae_paper.py DATA --minutes 60 --batch 64 --width 64 --out runs/dvae-paper

Source: §2.1 and App. A.2, A.3: logit-Laplace likelihood, soft Gumbel relaxation, beta 0 -> 6.6, three
half-cosine schedules; here 64 px -> 8x8 tokens of 512 codes. The schedules are stretched to the run: the
learning rate falls to 1/80 over the whole of it, the temperature over its first half, and beta rises over
1/30 of that half, as 5k is to 150k.
differs: the peak learning rate is that of a short run at a small batch, and weights are not averaged.

DATA is anything that `dalle train` reads. Each line printed is one JSON object; its psnr values are means
over held-out pictures in dB: `psnr_hard` of argmax tokens, `psnr_relaxed` of the training path at the present
temperature.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from dalle import images
from dalle.data.pairs import PairSet, read_pairs
from dalle.dvae import DiscreteVAE, DVAEConfig, gumbel_softmax, map_pixels, unmap_pixels

SIZE, N_CODES = 64, 512
FINAL_BETA, FINAL_TEMPERATURE = 6.6, 1 / 16  # App. A.2
TEMPERATURE_SHARE = 1 / 2  # of the run
BETA_SHARE = TEMPERATURE_SHARE * 5_000 / 150_000
FINAL_RATE = 1 / 80  # 1e-4 -> 1.25e-6
N_HELD_OUT = 256


def half_cosine(progress: float, start: float, end: float) -> float:
    """From `start` to `end` along half a cosine while `progress` goes from 0 to 1, then `end`."""
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def split(pairs: PairSet) -> tuple[PairSet, PairSet]:
    """The pictures to learn from, and the held-out ones."""
    for name in ("validation", "val", "test"):
        if len(held_out := pairs.of_split(name)):
            return pairs.of_split("train"), held_out
    raise SystemExit(f"the data has the splits {pairs.counts}; a validation or test split is needed")


def load(pairs: PairSet, indices: list[int], read: Callable[[Image, int], Image]) -> Tensor:
    """Pictures (B, 3, 64, 64) in [0, 1]; a broken one ends the run."""
    return images.to_tensor([read(pairs[index].open(), SIZE) for index in indices])


def psnr(model: Callable[[Tensor], Tensor], held_out: Tensor) -> float:
    """Mean over pictures of 10 lg (1 / mean squared error), in dB."""
    errors = [(model(x) - x).square().mean(dim=(1, 2, 3)) for x in held_out.split(64)]
    return -10 * torch.cat(errors).clamp_min(1e-10).log10().mean().item()


@torch.no_grad()
def measure(model: DiscreteVAE, held_out: Tensor, temperature: float) -> dict[str, float]:
    """Hard and relaxed PSNR in dB, and how many codes the hard tokens use."""
    generator = torch.Generator(held_out.device).manual_seed(0)

    def relaxed(x: Tensor) -> Tensor:
        z = gumbel_softmax(model.encoder(map_pixels(x)), temperature, generator)
        return unmap_pixels(torch.sigmoid(model.decoder(z)[:, :3].float()))

    tokens = torch.cat([model.encode(x) for x in held_out.split(64)])
    return {
        "psnr_hard": psnr(model.reconstruct, held_out),
        "psnr_relaxed": psnr(relaxed, held_out),
        "codes_used": tokens.unique().numel(),
    }


def train(arguments: argparse.Namespace) -> DiscreteVAE:
    """Train for `arguments.minutes`, printing a JSON line every thirtieth of that."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = DVAEConfig(
        image_size=SIZE,
        n_codes=N_CODES,
        quantizer="gumbel",
        trunk=arguments.trunk,
        likelihood="logit_laplace",
        d_hidden=arguments.width,
        d_code=128,
        n_blocks=2,
    )
    model = DiscreteVAE(config).to(device)
    learned, spare = split(read_pairs(arguments.data))
    chosen = np.linspace(0, len(spare) - 1, min(N_HELD_OUT, len(spare))).astype(int).tolist()
    held_out = load(spare, chosen, images.center_crop).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4)
    rng, noise = np.random.default_rng(0), torch.Generator(device).manual_seed(0)
    started, n_lines, n_pictures, progress = time.monotonic(), 0, 0, 0.0
    while progress < 1:
        indices = rng.integers(len(learned), size=arguments.batch).tolist()
        batch = load(learned, indices, lambda picture, size: images.dvae_crop(picture, size, rng)).to(device)
        temperature = half_cosine(progress / TEMPERATURE_SHARE, 1.0, FINAL_TEMPERATURE)
        beta = half_cosine(progress / BETA_SHARE, 0.0, FINAL_BETA)
        for group in optimizer.param_groups:
            group["lr"] = half_cosine(progress, arguments.rate, arguments.rate * FINAL_RATE)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss, metrics = model.loss(batch, temperature=temperature, kl_weight=beta, generator=noise)
        loss.backward()
        optimizer.step()
        n_pictures += arguments.batch
        minutes = (time.monotonic() - started) / 60
        progress = minutes / arguments.minutes
        if progress * 30 >= n_lines or progress >= 1:
            n_lines = int(progress * 30) + 1
            line = {"minutes": minutes, "pictures": n_pictures, "temperature": temperature, "beta": beta}
            line |= {"loss": loss.item(), **{name: value.item() for name, value in metrics.items()}}
            line |= measure(model, held_out, temperature)
            print(json.dumps({name: round(value, 4) for name, value in line.items()}), flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="anything that `dalle train` reads")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=64, help="d_hidden")
    parser.add_argument("--rate", type=float, default=5e-4, help="peak learning rate")
    parser.add_argument("--trunk", choices=("light", "paper"), default="light")
    parser.add_argument("--out", type=Path, help="folder for the trained dVAE")
    arguments = parser.parse_args()
    model = train(arguments)
    if arguments.out:
        model.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
