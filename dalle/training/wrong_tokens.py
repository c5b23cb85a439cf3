"""Wrong tokens for a decoder to learn from: plausible where they stand, and not those of the picture.

What the transformer draws is wrong in places. A decoder that has only seen true grids lets one wrong token smear over
its neighbours; one that has seen wrong ones beside true targets does not.
Shapes: B batch, G grid side, N = G * G image tokens.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dalle.data.pair import Pair
from dalle.generation.precision import has_native_bfloat16
from dalle.generation.sampling import inverse_cdf
from dalle.tokenizer import Tokenizer
from dalle.training.pictures import Member
from dalle.transformer import Transformer

# Other tokens (B, G, G) for those of a batch's pictures, from members, tokens (B, G, G) and a generator.
Source = Callable[[Sequence[Member], Tensor, np.random.Generator], Tensor]


def corrupted(
    source: Source, share: float, members: Sequence[Member], tokens: Tensor, generator: np.random.Generator
) -> Tensor:
    """Replace a share of tokens (B, G, G), each drawn by itself, by those that `source` gives."""
    if not share:
        return tokens
    is_wrong = torch.from_numpy(generator.random(tuple(tokens.shape)) < share).to(tokens.device)
    return torch.where(is_wrong, source(members, tokens, generator), tokens)


def of_another_picture(members: Sequence[Member], tokens: Tensor, generator: np.random.Generator) -> Tensor:
    """The tokens of another picture of the batch at the same places."""
    return tokens[torch.from_numpy(generator.permutation(len(tokens))).to(tokens.device)]


class TransformerDraws:
    """What a transformer draws for a picture's caption after the true tokens before each: one pass for all N."""

    def __init__(self, transformer: Transformer, tokenizer: Tokenizer, pairs: list[Pair]) -> None:
        self.transformer = transformer.eval().requires_grad_(False)
        self.tokenizer, self.pairs = tokenizer, pairs

    @torch.no_grad()
    def __call__(self, members: Sequence[Member], tokens: Tensor, generator: np.random.Generator) -> Tensor:
        """Sample tokens (B, G, G) at temperature 1, without guidance."""
        captions = [self.pairs[index].captions for _, index in members]
        chosen = [found[int(generator.integers(len(found)))] for found in captions]
        text = np.stack([self.tokenizer.pad(self.tokenizer.encode(one, truncate=True)) for one in chosen])
        uniform = torch.from_numpy(generator.random((len(tokens), tokens[0].numel())))  # (B, N)
        device = tokens.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_native_bfloat16(device)):
            _, logits = self.transformer(torch.from_numpy(text).to(device), tokens.flatten(1))
        probabilities = logits.softmax(dim=-1).flatten(0, 1)  # (B * N, K)
        return inverse_cdf(probabilities, uniform.flatten()).view_as(tokens)
