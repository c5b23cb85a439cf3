"""From logits to one drawn token a row: pure functions, no state, the randomness passed in.

Source: DALL·E §2.6 (temperature 1); top-p: Holtzman et al. 2020; guidance: Ho & Salimans 2022, eq. 6.
Shapes: B rows, K image tokens in the vocabulary, N image tokens of a picture.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle.generation.options import GenerationOptions

MAX_SEED = 2**63 - 1
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


def combine_guidance(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Logits (B, K) moved away from what the empty caption says: uncond + scale * (cond - uncond)."""
    return unconditional + scale * (conditional - unconditional)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits (B, K) divided by a temperature > 0; below 1 sharper, above 1 flatter."""
    return logits / temperature


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits (B, K) with all but the k largest of each row at -inf; k >= K keeps all, ties keep exactly k."""
    if k >= logits.shape[-1]:
        return logits
    values, indices = logits.topk(k, dim=-1)  # (B, k)
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, values)


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
    cdf = probabilities.cumsum(dim=-1, dtype=precise)  # (B, K)
    threshold = uniform.to(cdf.device, precise) * cdf[..., -1]  # (B,)
    # A parallel scan may round a flat stretch of the sum up by an ulp: hence the second condition.
    candidates = (cdf > threshold[..., None]) & (probabilities > 0)
    # argmax of a mask is its first True. No True at all can only come from rounding at u ~ 1.
    first = candidates.to(torch.uint8).argmax(dim=-1)
    return torch.where(candidates.any(dim=-1), first, probabilities.argmax(dim=-1))


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
    logits = apply_temperature(logits, options.temperature)
    if options.top_k is not None:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p is not None and options.top_p < 1:
        logits = keep_top_p(logits, options.top_p)
    return inverse_cdf(logits.softmax(dim=-1), uniform)
