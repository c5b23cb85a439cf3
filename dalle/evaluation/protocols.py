"""The protocols: what a model does with pictures and captions so that figures can be taken.

Source: DALL·E §2.1 (reconstructions), §2.2 (losses), §2.6 (draws, of which CLIP chooses).
Shapes: M pictures, B batch, R rows (captions to draw), C candidates, T text slots, G grid side, N = G * G image tokens,
H = W side of the pictures that the dVAE reads, S of those that it draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle import images
from dalle.data.pair import Pair
from dalle.evaluation.metrics import Reconstruction
from dalle.image_tokenizer import ImageTokenizer
from dalle.pipeline import DallePipeline
from dalle.token_model import TokenModel
from dalle.tokenizer import TextTokenizer

BATCH = 64  # captions scored and rows drawn at once
DVAE_BATCH = 16  # pictures in the dVAE at once: its full-resolution activations are what fills memory

Advance = Callable[[int], None]  # called with the number of pictures just done


# ---- dVAE ----------------------------------------------------------------------------------------


@torch.no_grad()
def reconstruct(dvae: ImageTokenizer, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Hard tokens (B, G, G) of pictures (B, 3, S, S) in [0, 1], and the pictures again; on the CPU.

    The pictures are of the size that the dVAE draws, S, which may be larger than that which its encoder reads.
    """
    device = next(dvae.parameters()).device
    seen = images.box_filtered(pictures, dvae.image_size)  # (B, 3, H, W)
    tokens = [dvae.encode(part.to(device)).cpu() for part in torch.split(seen, DVAE_BATCH)]
    found = torch.cat(tokens)
    return found, decode(dvae, found)


@torch.no_grad()
def decode(dvae: ImageTokenizer, tokens: Tensor) -> Tensor:
    """Pictures (B, 3, S, S) in [0, 1] of tokens (B, G, G), on the CPU."""
    device = next(dvae.parameters()).device
    return torch.cat([dvae.decode(part.to(device)).float().cpu() for part in torch.split(tokens, DVAE_BATCH)])


def measure_reconstruction(dvae: ImageTokenizer, batches: Iterable[Tensor]) -> tuple[Reconstruction, Tensor]:
    """Sums over batches of pictures (B, 3, S, S) in [0, 1], and the tokens (M, G, G) int64 of all of them."""
    sums, grid = Reconstruction(dvae.n_codes, dvae.image_size), dvae.grid_size
    found = [torch.zeros(0, grid, grid, dtype=torch.int64)]
    for pictures in batches:
        tokens, copies = reconstruct(dvae, pictures)
        sums.add_(pictures, copies, tokens)
        found.append(tokens)
    return sums, torch.cat(found)


# ---- transformer ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionLosses:
    """Mean cross-entropies over pictures in nats per token: text tokens, image tokens twice, all tokens."""

    text_loss: float
    image_loss: float
    image_loss_shuffled: float  # with other pictures' captions: if no higher, captions are not read
    nats_per_token: float


@torch.no_grad()
def measure_losses(
    transformer: TokenModel, text: Tensor, image: Tensor, rows: slice = slice(None)
) -> CaptionLosses:
    """Losses of M >= 1 captions (M, T) and image tokens (M, N), these also with captions half a set off.

    Of the whole set, or of some of its rows.
    """
    wrong = text.roll(max(1, len(text) // 2), dims=0)[rows]
    text, image = text[rows], image[rows]
    n, device = len(text), next(transformer.parameters()).device
    text_sum = image_sum = shuffled_sum = 0.0
    for start in range(0, n, BATCH):
        chunk = slice(start, start + BATCH)
        tokens = image[chunk].to(device)
        losses = transformer.loss(text[chunk].to(device), tokens)
        text_sum += float(losses.text) * len(tokens)
        image_sum += float(losses.image) * len(tokens)
        shuffled_sum += float(transformer.loss(wrong[chunk].to(device), tokens).image) * len(tokens)
    n_text, n_image = text.shape[1], image.shape[1]
    total = (n_text * text_sum + n_image * image_sum) / (n_text + n_image)
    return CaptionLosses(text_sum / n, image_sum / n, shuffled_sum / n, total / n)


def first_captions(pairs: Iterable[Pair], tokenizer: TextTokenizer) -> tuple[Tensor, int]:
    """The first caption of each pair, (M, T) int64, and how many of them had to be cut."""
    rows, n_truncated = [], 0
    for pair in pairs:
        n_truncated += tokenizer.count(pair.captions[0]) > tokenizer.max_tokens
        rows.append(torch.from_numpy(tokenizer.pad(tokenizer.encode(pair.captions[0], truncate=True))))
    return torch.stack(rows), n_truncated


# ---- draws -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draws:
    """C candidates for each of R captions, and which of them CLIP puts first."""

    tokens: Tensor  # (R, C, G, G) int64, in the order of their seeds
    chosen: Tensor | None  # (R,) int64, the place of the best by the model's own CLIP; None without one

    @property
    def of_choice(self) -> Tensor | None:
        """The chosen candidate of each row, (R, G, G)."""
        return None if self.chosen is None else self.tokens[torch.arange(len(self.tokens)), self.chosen]


def draw(
    pipe: DallePipeline, captions: Sequence[str], seed: int, n_candidates: int, advance: Advance
) -> Draws:
    """Draw by the model's defaults: candidate j of caption i has seed + i * C + j."""
    parts, places = list[Tensor](), list[Tensor]()
    n_captions = max(1, BATCH // n_candidates)
    for start in range(0, len(captions), n_captions):
        part = list(captions[start : start + n_captions])
        first = seed + start * n_candidates
        drawn = pipe(
            part,
            num_images_per_prompt=n_candidates,
            num_candidates=n_candidates,
            seed=first,
            truncate=True,
            output_type="tokens",
            rows_per_batch=BATCH,
        )
        order = torch.tensor(drawn.seeds) - first  # (B * C,) best first within each caption
        tokens = torch.empty_like(drawn.tokens)
        tokens[order] = drawn.tokens
        parts.append(tokens.view(len(part), n_candidates, *tokens.shape[1:]))
        places.append(order.view(len(part), n_candidates)[:, 0] % n_candidates)
        advance(len(part))
    return Draws(torch.cat(parts), None if pipe.ranker is None else torch.cat(places))
