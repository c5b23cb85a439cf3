"""From logits to one drawn token a row: pure functions, no state, the randomness passed in.

Source: DALL·E §2.6 (temperature 1); top-p: Holtzman et al. 2020; guidance: Ho & Salimans 2022, eq. 6.
Shapes: B rows, K image tokens in the vocabulary, N image tokens of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dalle.generation.fields import MAX_SEED
from dalle.generation.request import GenerationOptions

SCAN_BLOCK = 128  # tokens whose probabilities are summed together before the one drawn is looked for
MIN_TEMPERATURE = 1e-6  # below it the draw is the likeliest token anyway, and the division could overflow


def uniforms(seed: int, n_tokens: int) -> Tensor:
    """All the randomness of one picture: (n_tokens,) float64 on the CPU, in [0, 1), from the seed alone.

    Raises:
        ValueError: the seed is not in 0..2**63-1.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed is {seed}; allowed are 0..{MAX_SEED}: choose a seed in that range")
    # Drawn on the CPU whatever the model's device, so that a seed means the same picture everywhere.
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.rand(n_tokens, generator=generator, dtype=torch.float64)


def combine_guidance(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Logits (B, K), or what a linear head reads, moved away from the empty caption's: uncond + scale * (cond - uncond)."""
    return unconditional + scale * (conditional - unconditional)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits (B, K) divided by a temperature > 0; below 1 sharper, above 1 flatter."""
    return logits / temperature


def top_k_of(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row and their tokens, (B, k) each, in the order of the tokens; ties keep exactly k.

    In that order, and not by size, logits that differ by rounding alone draw the same token.
    """
    _, tokens = logits.topk(min(k, logits.shape[-1]), dim=-1, sorted=False)
    tokens = tokens.sort(dim=-1).values
    return logits.gather(-1, tokens), tokens


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits (B, K) with all at -inf but the fewest most likely tokens whose probabilities reach p > 0."""
    ordered, indices = logits.sort(dim=-1, descending=True, stable=True)  # (B, K)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # what the more likely tokens hold already
    outside = before >= p
    outside[..., 0] = False
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, ordered.masked_fill(outside, -torch.inf))


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the uniform number; never one of probability zero.

    Args:
        probabilities: (B, K), >= 0; each row is normalised here by its own sum.
        uniform: (B,) in [0, 1).

    Returns:
        (B,) int64.
    """
    # float64: over thousands of tokens a float32 running sum loses the rarest of them. MPS has no float64.
    precise = torch.float32 if probabilities.device.type == "mps" else torch.float64
    n_tokens = probabilities.shape[-1]
    width = SCAN_BLOCK if n_tokens % SCAN_BLOCK == 0 else n_tokens
    blocks = probabilities.reshape(*probabilities.shape[:-1], -1, width)  # (B, n, width)
    # First the block, then the token in it: a running sum over all tokens would cost more than the softmax.
    totals = blocks.sum(dim=-1, dtype=precise)  # (B, n)
    cdf = totals.cumsum(dim=-1)  # (B, n)
    threshold = uniform.to(cdf.device, precise) * cdf[..., -1]  # (B,)
    block = _first_above(cdf, threshold, totals)[..., None]  # (B, 1)
    before = (cdf - totals).gather(-1, block)[..., 0]  # (B,)
    inside = blocks.take_along_dim(block[..., None], dim=-2)[..., 0, :]  # (B, width)
    token = _first_above(inside.cumsum(dim=-1, dtype=precise), threshold - before, inside)
    return block[..., 0] * width + token


def _first_above(cdf: Tensor, threshold: Tensor, shares: Tensor) -> Tensor:
    """The first place of each row whose share is positive and whose cdf exceeds the threshold: (B, n) -> (B,)."""
    # A parallel scan may round a flat stretch of the sum up by an ulp: hence the condition on shares.
    above = (cdf > threshold[..., None]) & (shares > 0)
    last = shares.shape[-1] - 1 - (shares > 0).flip(-1).to(torch.uint8).argmax(dim=-1)
    # argmax of a mask is its first True. No True at all can only come from rounding: then the last of any share.
    return torch.where(above.any(dim=-1), above.to(torch.uint8).argmax(dim=-1), last)


def sample(logits: Tensor, uniform: Tensor, options: GenerationOptions) -> Tensor:
    """One token a row: temperature, top-k, top-p, then inverse CDF; temperature 0 is argmax.

    Args:
        logits: (B, K), any floating dtype, guidance already applied.
        uniform: (B,) in [0, 1), one number a row.

    Returns:
        (B,) int64.
    """
    logits = logits.float()
    if options.temperature < MIN_TEMPERATURE:
        return logits.argmax(dim=-1)
    logits, tokens = _cut(logits, options)
    place = inverse_cdf(logits.softmax(dim=-1), uniform)
    return place if tokens is None else tokens.gather(-1, place[..., None])[..., 0]


def distribution(logits: Tensor, options: GenerationOptions) -> Tensor:
    """Return the probabilities (B, K) that `sample` draws from, of logits (B, K), guidance already applied."""
    if options.temperature < MIN_TEMPERATURE:
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)
    kept, tokens = _cut(logits, options)
    shares = kept.softmax(dim=-1)
    return shares if tokens is None else torch.zeros_like(logits).scatter(-1, tokens, shares)


def _cut(logits: Tensor, options: GenerationOptions) -> tuple[Tensor, Tensor | None]:
    """Apply temperature, top-k and top-p to logits (B, K): (B, k) and the tokens they are of; None: all K in order."""
    logits = apply_temperature(logits, options.temperature)
    tokens = None
    if options.top_k is not None and options.top_k < logits.shape[-1]:
        logits, tokens = top_k_of(logits, options.top_k)
    if options.top_p is not None and options.top_p < 1:
        logits = keep_top_p(logits, options.top_p)
    return logits, tokens


class Chooser:
    """Chooses the next token of pictures side by side, each with its own options.

    Guided pictures are read twice: the stream has a row for each picture, then one more for each guided picture,
    after the empty caption.
    """

    def __init__(self, options: Sequence[GenerationOptions], device: torch.device) -> None:
        self.guided = [row for row, one in enumerate(options) if one.guidance != 1]  # which pictures
        scales = [options[row].guidance for row in self.guided]
        self._scales = torch.tensor(scales, dtype=torch.float32, device=device)[:, None]
        self._n_pictures = len(options)
        self._reads = torch.tensor([*range(len(options)), *self.guided], device=device)
        alike: dict[tuple[object, ...], list[int]] = {}
        for row, one in enumerate(options):
            alike.setdefault((one.temperature, one.top_k, one.top_p), []).append(row)
        self._alike = [(options[rows[0]], torch.tensor(rows, device=device)) for rows in alike.values()]

    def read(self, tokens: Tensor) -> Tensor:
        """The token that each row of the stream reads next: those of the pictures (R,), and of guided ones again."""
        return tokens[self._reads]

    def guide(self, states: Tensor) -> Tensor:
        """What each picture's head is to read, (R, C), of all rows of the stream (R + guided, C) float32.

        Guidance as `combine_guidance` has it, before the head, which is linear.
        """
        if not self.guided:
            return states
        conditional, unconditional = states.split_with_sizes([self._n_pictures, len(self.guided)])
        if len(self.guided) == self._n_pictures:
            return combine_guidance(conditional, unconditional, self._scales)
        rows = self._reads[self._n_pictures :]
        mixed = combine_guidance(conditional[rows], unconditional, self._scales)
        return conditional.index_copy(0, rows, mixed)

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """The next token of each picture, (R,) int64, from its logits (R, K), guided, and uniform numbers (R,)."""
        if len(self._alike) == 1:
            return sample(logits, uniform, self._alike[0][0])
        chosen = torch.empty(self._n_pictures, dtype=torch.int64, device=logits.device)
        for options, rows in self._alike:
            chosen[rows] = sample(logits[rows], uniform[rows], options)
        return chosen
