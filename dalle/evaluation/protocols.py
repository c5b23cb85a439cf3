"""The protocols: which pictures and captions a figure is taken on, and what the model does with them.

Source: DALL·E §2.1 (reconstructions), §2.2 (losses), §3.3 (known concepts combined anew, here by retrieval).
Shapes: M pictures, B batch, R rows (pictures to draw), T text slots, G grid side, N = G * G image tokens,
H = W side of the pictures that the dVAE reads, S of those that it draws, D thumbnail values.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from PIL.Image import Image
from torch import Tensor

from dalle import images
from dalle.data.pair import Pair
from dalle.data.pairs import PairSet
from dalle.data.reading import read_chunks
from dalle.dvae import DiscreteVAE
from dalle.evaluation.metrics import (
    Figures,
    Reconstruction,
    rank_of_first,
    retrieval,
    retrieval_by_chance,
    thumbnails,
)
from dalle.pipeline import DallePipeline
from dalle.tokenizer import Tokenizer
from dalle.transformer import Transformer

BATCH = 64  # pictures read, captions scored and rows drawn at once
DVAE_BATCH = 16  # pictures in the dVAE at once: its full-resolution activations are what fills memory
N_DISTRACTORS = 99
MAX_PSNR_PICTURES = 512  # that `psnr_of_pairs` measures
MAX_THUMBNAILS = 2**16  # kept between rows: 200 MB

Advance = Callable[[int], None]  # called with the number of pictures just done


@dataclass
class PictureReader:
    """Reads pictures at one size, centre-cropped, and remembers those that cannot be read."""

    size: int  # pixels a side
    unreadable: dict[str, str] = field(default_factory=dict)  # key -> reason

    def batches(self, pairs: Sequence[Pair]) -> Iterator[tuple[list[int], Tensor]]:
        """Positions in `pairs` of up to 64 readable pictures, and the pictures (B, 3, H, W) in [0, 1]."""
        start = 0
        for chunk in read_chunks(pairs, BATCH, lambda _, picture: images.center_crop(picture, self.size)):
            good: dict[int, Image] = {}
            for position, found in enumerate(chunk, start):
                if isinstance(found, ValueError):
                    self.unreadable[pairs[position].key] = str(found)
                else:
                    good[position] = found
            start += len(chunk)
            if good:
                yield list(good), images.to_tensor(list(good.values()))


# ---- dVAE ----------------------------------------------------------------------------------------


@torch.no_grad()
def reconstruct(dvae: DiscreteVAE, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Hard tokens (B, G, G) of pictures (B, 3, S, S) in [0, 1], and the pictures again; on the CPU.

    The pictures are of the size that the dVAE draws, S, which may be larger than that which its encoder reads.
    """
    device = next(dvae.parameters()).device
    seen = images.box_filtered(pictures, dvae.config.image_size)  # (B, 3, H, W)
    tokens = [dvae.encode(part.to(device)).cpu() for part in torch.split(seen, DVAE_BATCH)]
    found = torch.cat(tokens)
    return found, decode(dvae, found)


@torch.no_grad()
def decode(dvae: DiscreteVAE, tokens: Tensor) -> Tensor:
    """Pictures (B, 3, S, S) in [0, 1] of tokens (B, G, G), on the CPU."""
    device = next(dvae.parameters()).device
    return torch.cat([dvae.decode(part.to(device)).float().cpu() for part in torch.split(tokens, DVAE_BATCH)])


def measure_reconstruction(dvae: DiscreteVAE, batches: Iterable[Tensor]) -> tuple[Reconstruction, Tensor]:
    """Sums over batches of pictures (B, 3, S, S) in [0, 1], and the tokens (M, G, G) int64 of all of them."""
    sums, grid = Reconstruction(dvae.config.n_codes, dvae.config.image_size), dvae.config.grid_size
    found = [torch.zeros(0, grid, grid, dtype=torch.int64)]
    for pictures in batches:
        tokens, copies = reconstruct(dvae, pictures)
        sums.add_(pictures, copies, tokens)
        found.append(tokens)
    return sums, torch.cat(found)


def psnr_of_pairs(dvae: DiscreteVAE, pairs: PairSet) -> float:
    """PSNR in dB of the held-out pictures after a dVAE, hard tokens, error pooled; of up to 512 of them.

    Raises ValueError when none can be read.
    """
    held_out = [pair for pair in pairs if pair.split not in ("train", "excluded")] or list(pairs)
    chosen = np.unique(np.linspace(0, len(held_out) - 1, min(MAX_PSNR_PICTURES, len(held_out))).astype(int))
    reader = PictureReader(dvae.config.image_size)
    batches = (pictures for _, pictures in reader.batches([held_out[index] for index in chosen.tolist()]))
    psnr = measure_reconstruction(dvae, batches)[0].seen.psnr
    if psnr is None:
        raise ValueError(
            f"no held-out picture can be read, the first because: {next(iter(reader.unreadable.values()))}"
        )
    return psnr


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
    transformer: Transformer, text: Tensor, image: Tensor, rows: slice = slice(None)
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


def first_captions(pairs: Iterable[Pair], tokenizer: Tokenizer) -> tuple[Tensor, int]:
    """The first caption of each pair, (M, T) int64, and how many of them had to be cut."""
    rows, n_truncated = [], 0
    for pair in pairs:
        n_truncated += tokenizer.count(pair.captions[0]) > tokenizer.max_tokens
        rows.append(torch.from_numpy(tokenizer.pad(tokenizer.encode(pair.captions[0], truncate=True))))
    return torch.stack(rows), n_truncated


# ---- zero-shot retrieval -------------------------------------------------------------------------


def zero_shot_rows(pairs: PairSet) -> list[int]:
    """The pairs marked `combo_hard`: known objects in a style in which nothing of them was trained on."""
    return [i for i, pair in enumerate(pairs) if str(pair.fields.get("combo_hard")).lower() in ("true", "1")]


def draw(pipe: DallePipeline, captions: Sequence[str], seed: int, advance: Advance) -> tuple[Tensor, float]:
    """One picture a caption by the model's defaults, row i with seed + i: tokens (R, G, G), seconds."""
    parts, began = [], time.perf_counter()
    for start in range(0, len(captions), BATCH):
        part = list(captions[start : start + BATCH])
        drawn = pipe(part, seed=seed + start, truncate=True, output_type="tokens", rows_per_batch=BATCH)
        parts.append(drawn.tokens)
        advance(len(part))
    return torch.cat(parts), time.perf_counter() - began


def nearest_of_100(
    pipe: DallePipeline,
    pairs: PairSet,
    rows: Sequence[int],
    tokens: Tensor,
    reader: PictureReader,
    advance: Advance,
) -> dict[str, Figures | int]:
    """How often a draw is nearer to the true picture of its caption than to 99 other pictures.

    The others are of the same style and not of the same object, where the data say what these are. Distance
    is RMSE at 16 x 16 RGB. Beside the draws of `tokens` (R, G, G) stand two yardsticks: the true pictures'
    reconstructions, the best that the dVAE allows, and each draw put to another row's test: chance.
    """
    ranks: dict[str, list[float]] = {"draws": [], "reconstructions": [], "draws_of_other_captions": []}
    n_candidates: list[int] = []
    pools, small = pools_of(pairs), _Thumbnails(pairs, reader)
    drawn = np.concatenate([thumbnails(decode(pipe.dvae, part)) for part in torch.split(tokens, BATCH)])
    other = np.roll(drawn, max(1, len(drawn) // 2), axis=0)  # (R, D)
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        galleries = [[row, *distractors(pairs, row, pools[style_of(pairs[row])])] for row in part]
        small.load_({index for gallery in galleries for index in gallery})
        for positions, pictures in reader.batches([pairs[row] for row in part]):
            copies = thumbnails(reconstruct(pipe.dvae, pictures)[1])  # (B, D)
            for position, copy in zip(positions, copies, strict=True):
                candidates = small.of(galleries[position])
                if len(candidates) < 2:  # nothing to confuse it with
                    continue
                n_candidates.append(len(candidates))
                queries = (drawn[start + position], copy, other[start + position])
                for found, query in zip(ranks.values(), queries, strict=True):
                    found.append(rank_of_first(query, candidates))
        advance(len(part))
    if len(rows) == 1:  # its own caption would be the other one
        ranks["draws_of_other_captions"] = []
    figures: dict[str, Figures | int] = {name: retrieval(found) for name, found in ranks.items()}
    n_short = sum(count <= N_DISTRACTORS for count in n_candidates)
    chance = retrieval_by_chance(n_candidates)
    return figures | {"chance": chance, "n": len(n_candidates), "n_with_fewer_than_99_others": n_short}


def distractors(pairs: PairSet, row: int, pool: npt.NDArray[np.int64]) -> list[int]:
    """Up to 99 of `pool`, none of them `row` or of its object (field `okey`); its key alone decides which."""
    digest = hashlib.sha256(pairs[row].key.encode()).digest()
    order = np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(pool)
    thing, chosen = pairs[row].fields.get("okey"), []
    for index in order.tolist():
        if index != row and (thing is None or pairs[index].fields.get("okey") != thing):
            chosen.append(index)
            if len(chosen) == N_DISTRACTORS:
                break
    return chosen


def style_of(pair: Pair) -> str | None:
    """The field `style` of a pair."""
    style = pair.fields.get("style")
    return None if style is None else str(style)


def pools_of(pairs: PairSet) -> dict[str | None, npt.NDArray[np.int64]]:
    """The pairs of each style; under None all pairs, for rows without one."""
    members: dict[str | None, list[int]] = {None: list(range(len(pairs)))}
    for index, pair in enumerate(pairs):
        if (style := style_of(pair)) is not None:
            members.setdefault(style, []).append(index)
    return {style: np.array(found, dtype=np.int64) for style, found in members.items()}


class _Thumbnails:
    """Thumbnails of a set's pictures, each read once as long as memory allows."""

    def __init__(self, pairs: PairSet, reader: PictureReader) -> None:
        self._pairs, self._reader = pairs, reader
        self._known: dict[int, npt.NDArray[np.float32] | None] = {}  # None: not readable

    def load_(self, wanted: set[int]) -> None:
        """Read what is wanted and not known yet."""
        if len(self._known) + len(wanted) > MAX_THUMBNAILS:
            self._known.clear()
        missing = sorted(wanted - self._known.keys())
        self._known.update(dict.fromkeys(missing))
        for positions, pictures in self._reader.batches([self._pairs[index] for index in missing]):
            for position, small in zip(positions, thumbnails(pictures), strict=True):
                self._known[missing[position]] = small

    def of(self, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        """Those of readable pictures, in order, (K, D); at least the first has to be one."""
        return np.stack([small for index in indices if (small := self._known[index]) is not None])
