"""The sections on the two trained stages: what the image tokenizer keeps, and how well the transformer predicts.

Source: DALL·E §2.1 and §2.2. Shapes: M pictures, G grid side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.evaluation.metrics import Reconstruction
from dalle.evaluation.protocols import BATCH, first_captions, measure_losses, measure_reconstruction
from dalle.evaluation.sheets import spread
from dalle.evaluation.subject import Subject
from dalle.transformer import Transformer

MAX_TRAIN_PICTURES = 4096  # looked at for the use of codes only


def pictures_for_codes(subject: Subject) -> list[int]:
    """Training pictures that count for the use of codes; none where split train is measured anyway."""
    limit = min(subject.settings.limit or MAX_TRAIN_PICTURES, MAX_TRAIN_PICTURES)
    return [] if "train" in subject.members else spread(subject.train, limit)


def image_tokenizer(subject: Subject) -> dict[str, Any]:
    """PSNR in dB over all splits and by split, and the use of the codebook."""
    dvae = subject.pipe.dvae
    by_split, pooled = {}, Reconstruction(dvae.n_codes, dvae.image_size)
    for split, indices in subject.members.items():
        sums, _, _ = _measured(subject, indices)
        pooled += sums
        by_split[split] = _figures(sums)
    if not pooled.n_pictures:
        unreadable = subject.reader.unreadable
        raise ValueError(
            f"none of the {len(unreadable)} pictures can be read; the first: {next(iter(unreadable.values()))}"
        )
    all_codes = pooled + _measured(subject, pictures_for_codes(subject))[0]
    return {
        **_figures(pooled),
        "codes_used": all_codes.codes_used,
        "perplexity": all_codes.perplexity,
        "token_entropy_bits": math.log2(max(1.0, all_codes.perplexity)),
        "n_codes": dvae.n_codes,
        "n_pictures_for_codes": all_codes.n_pictures,
        "splits": by_split,
    }


def transformer(subject: Subject) -> dict[str, Any]:
    """Losses in nats a token by split, with the true captions and with those of other pictures."""
    by_split = dict[str, Any]()
    for split, indices in subject.members.items():
        _, kept, tokens = _measured(subject, indices)
        if not kept:
            by_split[split] = {"n_pictures": 0}
            continue
        text, n_cut = first_captions((subject.pairs[index] for index in kept), subject.pipe.tokenizer)
        losses = measure_losses(subject.pipe.transformer, text, tokens.flatten(1))
        size, model = subject.pipe.dvae, subject.pipe.transformer
        bits = losses.image_loss * size.grid_size**2 / math.log(2)
        by_split[split] = {
            **asdict(losses),
            "image_bits": bits,  # a picture's tokens
            "image_bits_per_dimension": bits / (3 * size.image_size**2),
            # a published model gives a mean alone
            "perplexity_by_row": perplexity_by_row(model, text, tokens)
            if isinstance(model, Transformer)
            else None,
            "n_pictures": len(kept),
            "n_captions_cut": n_cut,
        }
        subject.advance(len(kept))
    return by_split


@torch.no_grad()
def perplexity_by_row(model: Transformer, text: Tensor, tokens: Tensor) -> list[float]:
    """exp of the mean loss of the tokens (M, G, G) in each row of the grid, given captions (M, T): G numbers from 1."""
    device = next(model.parameters()).device
    total = torch.zeros(tokens.shape[1], dtype=torch.float64)
    for start in range(0, len(text), BATCH):
        image = tokens[start : start + BATCH].to(device)
        _, logits = model(text[start : start + BATCH].to(device), image.flatten(1))
        losses = F.cross_entropy(logits.float().flatten(0, 1), image.flatten(), reduction="none")
        total += losses.view(image.shape).sum(dim=(0, 2)).double().cpu()  # (G,)
    return [float(value) for value in (total / (len(text) * tokens.shape[2])).exp()]


def _measured(subject: Subject, indices: list[int]) -> tuple[Reconstruction, list[int], Tensor]:
    """Sums, the indices of the pictures that could be read, and the tokens (M, G, G) of these."""
    kept: list[int] = []

    def batches() -> Iterator[Tensor]:
        for positions, pictures in subject.reader.batches([subject.pairs[index] for index in indices]):
            kept.extend(indices[position] for position in positions)
            yield pictures
            subject.advance(len(positions))

    sums, tokens = measure_reconstruction(subject.pipe.dvae, batches())
    return sums, kept, tokens.to(torch.int64)


def _figures(sums: Reconstruction) -> dict[str, Any]:
    """PSNR at the size that the tokens are made of; and at that which is drawn, if this is another."""
    figures = {"psnr": sums.seen.psnr, "ink_psnr": sums.seen.ink_psnr}
    if sums.drawn.n_values != sums.seen.n_values:
        figures |= {"output_psnr": sums.drawn.psnr, "output_ink_psnr": sums.drawn.ink_psnr}
    return {**figures, "n_pictures": sums.n_pictures}
