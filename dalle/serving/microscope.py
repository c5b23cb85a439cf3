"""The microscope: how sure the transformer was of each cell of a picture, what it could see, what a token looks like.

One teacher-forced pass reads a picture's caption and tokens and gives, for every cell, the distribution from which
its token was drawn, given the true tokens before it. Probability, rank and entropy are the transformer's own: at
temperature 1, with the caption (the conditional branch), nothing cut off: what the model believes. A picture drawn with
guidance, top-k or another temperature was drawn from another distribution, in which a token that the model by itself
thinks unlikely may be the likeliest: `drawn_probability` is that one's.

Shapes: G grid side, N = G * G image tokens, T text tokens, K image tokens in the vocabulary.
"""

import functools
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from dalle.attention import LayerKind, allowed_image_keys, layer_kinds
from dalle.config import validate
from dalle.generation.recipe import Recipe
from dalle.generation.request import GenerationOptions
from dalle.generation.sampling import (
    MIN_TEMPERATURE,
    apply_temperature,
    combine_guidance,
    keep_top_p,
    top_k_of,
)
from dalle.image_tokenizer import ImageTokenizer
from dalle.images import to_images
from dalle.pipeline import DallePipeline
from dalle.serving.history import History, Picture
from dalle.token_model import TokenModel
from dalle.transformer import Transformer, TransformerConfig

N_READINGS = 64  # pictures whose numbers are kept: 20 kB each at a grid of 16
N_SWATCHES = 8192  # pictures of tokens that are kept: the paper's whole codebook, under 1 kB each

Grid = list[list[float]]
T = TypeVar("T")


class Runner(Protocol):
    """Runs work on the thread that owns the model, and waits for its result."""

    def __call__(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, or raise what it raises."""


@dataclass(frozen=True)
class Reading:
    """What the transformer says of each cell of a picture: (G, G) lists, raster order."""

    tokens: list[list[int]]
    probability: Grid  # of the token that is there, 0..1
    drawn_probability: Grid  # the same under the settings that the picture was drawn with, guidance included
    entropy_bits: Grid  # of the whole distribution, 0..log2 K: 0 is certain
    rank: list[list[int]]  # of the token that is there; 1 is the likeliest of K


class Microscope:
    """Looks at the pictures of a history through the model that drew them; safe to use from many threads."""

    def __init__(self, pipe: DallePipeline, history: History, run: Runner) -> None:
        """`run` calls what needs the model on the thread that owns it."""
        self.pipe, self.history = pipe, history
        self._run = run
        self._readings = functools.lru_cache(N_READINGS)(self._read)
        self._swatches = functools.lru_cache(N_SWATCHES)(self._draw_swatch)

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Number and mask kind of each layer of the transformer, the first first."""
        return [{"layer": layer, "mask": kind} for layer, kind in enumerate(masks(self.pipe.transformer))]

    def look(self, picture: Picture) -> dict[str, Any]:
        """Everything the page shows of a picture.

        Raises:
            ValueError: another model drew the picture: its tokens mean nothing to this one.
        """
        config = self.pipe.transformer.config
        reading = self._readings(picture.id)
        completion = picture.recipe.get("completion")
        given = None if completion is None else [token >= 0 for token in completion["known"]]
        return {
            "grid": config.grid_size,
            "tokens": reading.tokens,
            "probability": reading.probability,
            "drawn_probability": reading.drawn_probability,
            "entropy_bits": reading.entropy_bits,
            "max_entropy_bits": math.log2(config.n_image_vocab),
            "rank": reading.rank,
            "given": None if given is None else torch.tensor(given).view(2 * [config.grid_size]).tolist(),
            "layers": self.layers,
            "vocabulary": config.n_image_vocab,
        }

    def swatch(self, token: int) -> bytes:
        """The PNG of a token's picture; ValueError for a token that the codebook has not."""
        n_codes = self.pipe.dvae.n_codes
        if not 0 <= token < n_codes:
            raise ValueError(f"token is {token}; the codebook has 0 to {n_codes - 1}")
        return self._swatches(token)

    def _read(self, id: str) -> Reading:
        picture, tokens = self.history.get(id), self.history.tokens(id)
        if picture is None or tokens is None:
            raise ValueError("picture was deleted meanwhile")
        recipe = validate(Recipe, picture.recipe, "recipe")
        pipe = self.pipe
        if recipe.model_sha256 != pipe.model_sha256:
            raise ValueError(
                f"picture was drawn by model {recipe.model} ({recipe.model_sha256[:12]}); this server runs {pipe.name}"
                f" ({pipe.model_sha256[:12]}): serve the picture's model to look into it"
            )
        ids = pipe.tokenizer.pad(pipe.tokenizer.encode(recipe.caption, truncate=recipe.truncate))
        text = torch.as_tensor(ids, dtype=torch.int64)
        return self._run(lambda: read_picture(pipe.transformer, text, tokens, recipe.options))

    def _draw_swatch(self, token: int) -> bytes:
        return self._run(lambda: draw_token(self.pipe.dvae, token))


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
    drawn_p = probabilities(guided, options).gather(1, drawn.T)  # (N, 1)
    return Reading(
        tokens=cast(list[list[int]], tokens.tolist()),
        probability=cast(Grid, own.exp().view_as(tokens).tolist()),
        drawn_probability=cast(Grid, drawn_p.view_as(tokens).tolist()),
        entropy_bits=cast(Grid, entropy.view_as(tokens).tolist()),
        rank=cast(list[list[int]], rank.view_as(tokens).tolist()),
    )


def probabilities(logits: Tensor, options: GenerationOptions) -> Tensor:
    """The distribution that `dalle.generation.sampling.sample` draws from: (N, K) of logits (N, K)."""
    if options.temperature < MIN_TEMPERATURE:
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)
    logits = apply_temperature(logits, options.temperature)
    if options.top_k is not None and options.top_k < logits.shape[-1]:
        kept, tokens = top_k_of(logits, options.top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, tokens, kept)
    if options.top_p is not None and options.top_p < 1:
        logits = keep_top_p(logits, options.top_p)
    return logits.softmax(dim=-1)


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
