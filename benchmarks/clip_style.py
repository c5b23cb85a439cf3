"""How well CLIP's image tower tells the styles of held-out pictures when that is all it is trained for.

    python benchmarks/clip_style.py --art ART [--model MODEL] [--updates 620]

The ceiling of zero-shot style accuracy: from the model's own image tower, with a linear layer over the styles on top,
trained on split train by cross-entropy on labels instead of captions. Prints the accuracy on `combo` and `object` and
which styles are taken for which.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from dalle import images
from dalle.data.pairs import read_pairs
from dalle.evaluation.galleries import style_of
from dalle.evaluation.pictures import PictureReader
from dalle.generation.rerank import Ranker
from dalle.model_folder import model_folder
from dalle.training.order import Order, rng
from dalle.training.recipe import Balance

BATCH, LEARNING_RATE, WARM_UP, WEIGHT_DECAY, SMOOTHING = 128, 1e-3, 30, 0.05, 0.05
SCALE = 8.0  # of unit vectors, for the linear layer


def main() -> None:
    """Train, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--art", required=True, type=Path)
    parser.add_argument("--model", help="folder or Hub id; the bundled model without it")
    parser.add_argument("--updates", type=int, default=620)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    pairs = read_pairs(arguments.art)
    clip = Ranker.from_pretrained(model_folder(arguments.model)).clip.train()
    clip.visual.to(memory_format=torch.channels_last)
    size = clip.config.image_size
    train = [pair for pair in pairs if pair.split == "train" and style_of(pair) is not None]
    styles = sorted({str(style_of(pair)) for pair in train})
    head = torch.nn.Linear(clip.config.d_embed, len(styles))
    weights = [*clip.visual.parameters(), *head.parameters()]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, weight_decay=WEIGHT_DECAY)
    order = Order(train, 0, Balance(fields=("okey", "style"), cap=1))
    began = time.perf_counter()
    for step in range(arguments.updates):
        rate = LEARNING_RATE * min((step + 1) / WARM_UP, 1 - step / arguments.updates)
        for group in optimizer.param_groups:
            group["lr"] = rate
        members = order.batch(step, BATCH)
        pictures = images.to_tensor(
            [
                images.near_crop(train[i].open(), size, rng(0, "crop", epoch, train[i].key))
                for epoch, i in members
            ]
        )
        labels = torch.tensor([styles.index(str(style_of(train[i]))) for _, i in members])
        with torch.autocast("cpu", torch.bfloat16):
            vectors = clip.encode_image(pictures.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(head(SCALE * vectors.float()), labels, label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 20 == 0:
            print(
                f"update {step + 1}: loss {float(loss):.3f}, {time.perf_counter() - began:.0f} s", flush=True
            )
    clip.eval()
    for split in ("combo", "object"):
        chosen = [pair for pair in pairs if pair.split == split]
        truth, found = list[int](), list[int]()
        with torch.no_grad():
            for positions, pictures in PictureReader(size).batches(chosen):
                truth += [styles.index(str(style_of(chosen[i]))) for i in positions]
                found += head(SCALE * clip.encode_image(pictures).float()).argmax(dim=1).tolist()
        table = np.zeros((len(styles), len(styles)), dtype=int)
        np.add.at(table, (truth, found), 1)
        print(
            f"\n{split}: {np.trace(table) / table.sum():.1%} of {table.sum()}; rows are true, columns found"
        )
        for style, row in zip(styles, table, strict=True):
            print(f"{style:28}", " ".join(f"{n:3}" for n in row))


if __name__ == "__main__":
    main()
