"""How fast does a small transformer learn to look captions up, by the scale of its first weights?

    python benchmarks/init_scale.py [--updates 200]

The task: 8 words of 64, and a picture of 8x8 tokens of 512 in which token i is a fixed random function of word i mod 8
and of i // 8. 6 layers x 128, batch 32, AdamW at 1e-3. One JSON line for each start, the mean image loss of the last
20 updates in nats per token (ln 512 = 6.24 where nothing is known): Child et al. 2019's (scale 0.125, heads at zero),
ours (dalle.transformer.INIT_SCALE and HEAD_SCALE), and each half of the difference.
"""

import argparse
import json
import math

import torch

from dalle import transformer
from dalle.training.memory import keep_freed_memory
from dalle.transformer import Transformer, TransformerConfig

N_WORDS, VOCABULARY, GRID, N_CODES = 8, 64, 8, 512
STARTS = {  # name: (scale of the weights, scale of the heads)
    "child_et_al": (0.125, 0.0),
    "heads_near_zero": (0.125, transformer.HEAD_SCALE),
    "four_times_as_wide": (transformer.INIT_SCALE, 0.0),
    "ours": (transformer.INIT_SCALE, transformer.HEAD_SCALE),
}


def final_loss(scale: float, head_scale: float, updates: int) -> float:
    """Mean image loss of the last 20 updates, nats per token."""
    config = TransformerConfig(
        n_layers=6,
        n_heads=2,
        d_head=64,
        n_text_tokens=N_WORDS,
        n_text_vocab=VOCABULARY,
        grid_size=GRID,
        n_image_vocab=N_CODES,
    )
    transformer.INIT_SCALE, transformer.HEAD_SCALE = scale, head_scale
    torch.manual_seed(0)
    model = Transformer(config)
    table = torch.randint(0, N_CODES, (GRID * GRID // N_WORDS, VOCABULARY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    cell = torch.arange(GRID * GRID)
    losses = []
    for _ in range(updates):
        text = torch.randint(0, VOCABULARY, (32, N_WORDS))
        image = table[cell // N_WORDS, text[:, cell % N_WORDS]]  # (B, N)
        loss = model.loss(text, image)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(float(loss.image.detach()))
    return sum(losses[-20:]) / 20


def main() -> None:
    """Train once from each start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=200)
    given = parser.parse_args()
    keep_freed_memory()
    for name, (scale, head_scale) in STARTS.items():
        row = {"start": name, "image_loss": round(final_loss(scale, head_scale, given.updates), 3)}
        print(json.dumps(row | {"nothing_known": round(math.log(N_CODES), 3)}), flush=True)


if __name__ == "__main__":
    main()
