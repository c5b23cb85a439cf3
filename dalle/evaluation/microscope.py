"""The microscope: how sure the transformer was of each cell of a picture, what it could see, what a token looks like.

One teacher-forced pass reads a picture's caption and tokens and gives, for every cell, the distribution from which
its token was drawn, given the true tokens before it. Probability, rank and entropy are the transformer's own: at
temperature 1, with the caption (the conditional branch), nothing cut off: what the model believes. A picture drawn with
guidance, top-k or another temperature was drawn from another distribution, in which a token that the model by itself
thinks unlikely may be the likeliest: `drawn_probability` is that one's.

Shapes: G grid side, N = G * G image tokens, T text tokens, K image tokens in the vocabulary.
"""

import io
import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from dalle.attention import LayerKind, allowed_image_keys, layer_kinds
from dalle.generation.request import GenerationOptions
from dalle.generation.sampling import combine_guidance, distribution
from dalle.image_tokenizer import ImageTokenizer
from dalle.images import to_images
from dalle.token_model import TokenModel
from dalle.transformer import Transformer, TransformerConfig

Grid = list[list[float]]


@dataclass(frozen=True)
class Reading:
    """What the transformer says of each cell of a picture: (G, G) lists, raster order."""

    tokens: list[list[int]]
    probability: Grid  # of the token that is there, 0..1
    drawn_probability: Grid  # the same under the settings that the picture was drawn with, guidance included
    entropy_bits: Grid  # of the whole distribution, 0..log2 K: 0 is certain
    rank: list[list[int]]  # of the token that is there; 1 is the likeliest of K


@torch.no_grad()
def read_picture(
    transformer: TokenModel, text: Tensor, tokens: Tensor, options: GenerationOptions
) -> Reading:
    """Read a caption (T,) and a picture (G, G), both int64, in one pass; see the file's head for what it says.

    `options` are those that the picture was drawn with.
    """
    ours, device = our_transformer(transformer), next(transformer.parameters()).device
    texts = [text] if options.guidance == 1 else [text, transformer.null_text()]
    drawn = tokens.reshape(1, -1)  # (1, N)
    _, logits = ours(torch.stack(texts).to(device), drawn.expand(len(texts), -1).to(device))
    logits = logits.double().cpu()  # (1, N, K), or with the empty caption's (2, N, K)
    log_p = logits[0].log_softmax(dim=-1)  # (N, K)
    own = log_p.gather(1, drawn.T)  # (N, 1)
    entropy = torch.special.entr(log_p.exp()).sum(dim=1) / math.log(2)  # (N,)
    rank = 1 + (log_p > own).sum(dim=1)  # (N,)
    guided = logits[0] if len(texts) == 1 else combine_guidance(logits[0], logits[1], options.guidance)
    drawn_p = distribution(guided, options).gather(1, drawn.T)  # (N, 1)
    return Reading(
        tokens=cast(list[list[int]], tokens.tolist()),
        probability=cast(Grid, own.exp().view_as(tokens).tolist()),
        drawn_probability=cast(Grid, drawn_p.view_as(tokens).tolist()),
        entropy_bits=cast(Grid, entropy.view_as(tokens).tolist()),
        rank=cast(list[list[int]], rank.view_as(tokens).tolist()),
    )


def our_transformer(model: TokenModel) -> Transformer:
    """Return the model as what the microscope can look into; ValueError for other people's models."""
    if not isinstance(model, Transformer):
        raise ValueError(f"{type(model).__name__} has no microscope: only models that dalle trained have one")
    return model


def masks(model: TokenModel) -> tuple[LayerKind, ...]:
    """Return the mask kind of each layer, the first first; none for other people's models."""
    config = model.config
    return layer_kinds(config.n_layers, config.layers) if isinstance(config, TransformerConfig) else ()


def visible_cells(transformer: TokenModel, layer: int, cell: int) -> list[int]:
    """The cells (raster indices, ascending) that a layer lets the model see when it draws `cell`.

    A cell is drawn from the slot that holds the cell before it (the first one from the last text token), and masks are
    defined on what a slot holds: so these are the keys of `cell - 1`. The whole caption is seen besides, always.

    Raises:
        ValueError: there is no such layer or cell.
    """
    config = our_transformer(transformer).config
    if not 0 <= layer < config.n_layers:
        raise ValueError(f"layer is {layer}; this transformer has 0 to {config.n_layers - 1}")
    if not 0 <= cell < config.n_image_tokens:
        raise ValueError(f"cell is {cell}; a picture has 0 to {config.n_image_tokens - 1}")
    kind = layer_kinds(config.n_layers, config.layers)[layer]
    return [] if cell == 0 else allowed_image_keys(kind, cell - 1, config.grid_size, config.conv_kernel)


@torch.no_grad()
def draw_token(dvae: ImageTokenizer, token: int) -> bytes:
    """The PNG of what one token looks like among its like: the middle cell of a grid that holds nothing else.

    A token has no picture of its own: the decoder paints each cell with an eye on those around it.
    """
    grid, size = dvae.grid_size, dvae.output_size
    device = next(dvae.parameters()).device
    pixels = dvae.decode(torch.full((1, grid, grid), token, device=device))  # (1, 3, H, W)
    side = size // grid
    start = grid // 2 * side
    swatch = pixels[:, :, start : start + side, start : start + side]  # (1, 3, side, side)
    buffer = io.BytesIO()
    to_images(swatch)[0].save(buffer, format="PNG")
    return buffer.getvalue()
