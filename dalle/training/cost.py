"""What one update costs, by arithmetic: parameters, FLOPs, and the bytes that the backward pass waits for.

Source: Kaplan et al. 2020 (arXiv 2001.08361), table 1, for FLOPs of weights; PaLM (arXiv 2204.02311), appendix B, for
model FLOPs: what the model needs, nothing recomputed, of attention only the pairs that the masks allow.

Shapes: T text tokens, N image tokens, S = T + N stream, C model width, H heads, V text ids, K image ids.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dalle.attention import EXPLICIT_TO_STREAM, SPLIT_FROM_GRID, AttentionPlan, image_offsets, layer_kinds
from dalle.clip import CLIP, CLIPConfig
from dalle.dvae import DiscreteVAE, DVAEConfig
from dalle.transformer import Transformer, TransformerConfig

BACKWARD = 2  # FLOPs of the backward pass over those of the forward pass: each product has two gradients
FP32, BF16 = 4, 2  # bytes

# The transformer's modules by what a reader of the paper calls them; the first name that a parameter's has in it.
PARTS = {
    "text_head": "heads",
    "image_head": "heads",
    "text_": "text embeddings",
    "start": "text embeddings",
    "image_": "image embeddings",
    ".norm.": "norms",
    "norm.": "norms",
    ".attention.": "attention",
    ".mlp.": "mlp",
}


# --- Parameters ---------------------------------------------------------------------------------------------


@functools.cache
def parameters_by_part(config: TransformerConfig) -> Mapping[str, int]:
    """Parameters of a transformer, counted on the meta device: no memory is taken."""
    with torch.device("meta"):
        model = Transformer(config)
    counts = Counter[str]()
    for name, parameter in model.named_parameters():
        part = next(part for fragment, part in PARTS.items() if fragment in name)
        counts[part] += parameter.numel()
    return MappingProxyType(counts)


def layer_matrices(config: TransformerConfig) -> int:
    """Weights in the matrices of the layers, 12 C² each: all but gains, biases, embeddings and heads."""
    return 12 * config.n_layers * config.d_model**2


# --- FLOPs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """FLOPs of one sequence, forwards."""

    layers: int  # the layers' matrices
    attention: int  # scores and weighted values of the pairs that the masks allow
    heads: int

    @property
    def forward(self) -> int:
        """All of them."""
        return self.layers + self.attention + self.heads

    @property
    def update(self) -> int:
        """Forward and backward pass: the model FLOPs of one sequence in an update."""
        return (1 + BACKWARD) * self.forward


def allowed_pairs(kind: str, config: TransformerConfig) -> int:
    """Pairs of query and key slots that a layer's mask allows, over the whole stream."""
    n_caption, n_queries = 1 + config.n_text_tokens, config.n_image_tokens - 1  # the last token is no query
    offsets = image_offsets(kind, config.grid_size, config.conv_kernel)
    among_image = sum(max(0, n_queries - offset) for offset in offsets)
    return n_caption * (n_caption + 1) // 2 + n_queries * n_caption + among_image


def transformer_flops(config: TransformerConfig) -> Flops:
    """Model FLOPs of one sequence; a product of m x k and k x n counts 2 m k n."""
    width, n_stream = config.d_model, config.n_text_tokens + config.n_image_tokens
    pairs = sum(allowed_pairs(kind, config) for kind in layer_kinds(config.n_layers, config.layers))
    heads = config.n_text_tokens * config.n_text_ids + config.n_image_tokens * config.n_image_vocab
    return Flops(2 * layer_matrices(config) * n_stream, 4 * width * pairs, 2 * width * heads)


@functools.cache
def dvae_flops(config: DVAEConfig) -> tuple[int, int]:
    """FLOPs of one picture, forwards: through the encoder, and through the decoder."""

    def encode(dvae: DiscreteVAE) -> Tensor:
        side = config.image_size
        out: Tensor = dvae.encoder.blocks(torch.empty(1, 3, side, side))
        return out

    def decode(dvae: DiscreteVAE) -> Tensor:
        grid, n_latent = config.grid_size, len(config.fsq_levels) or config.n_codes
        out: Tensor = dvae.decoder.blocks(torch.empty(1, n_latent, grid, grid))
        return out

    return _counted(lambda: DiscreteVAE(config), encode), _counted(lambda: DiscreteVAE(config), decode)


def clip_flops(config: CLIPConfig) -> int:
    """FLOPs of one pair, forwards, through both towers; the comparison of all pairs in a batch is left out."""

    def encode(clip: CLIP) -> Tensor:
        text = torch.zeros(1, config.n_text_tokens, dtype=torch.int64)
        clip.transformer(clip.token_embedding(text) + clip.positional_embedding)
        out: Tensor = clip.visual(torch.empty(1, 3, config.image_size, config.image_size))
        return out

    return _counted(lambda: CLIP(config).eval(), encode)


def _counted(build: Callable[[], nn.Module], run: Callable[..., Tensor]) -> int:
    """FLOPs of a forward pass, without memory or arithmetic: only shapes pass through the model."""
    # not the meta device, whose tensors no autocast state belongs to
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        model = build()
        with FlopCounterMode(display=False) as counter:
            run(model)
    return int(counter.get_total_flops())


def count_parameters(build: Callable[[], nn.Module]) -> int:
    """Parameters of any model, counted on the meta device."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


# --- Bytes of activations -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activations:
    """Bytes of one sequence, the residual stream and the logits in fp32."""

    layer: int  # what one layer keeps for its backward pass
    layer_input: int  # what it keeps when it is checkpointed
    heads: int  # logits and their gradients at their largest
    n_layers: int

    def kept(self, is_checkpointed: bool) -> int:
        """Bytes when the backward pass begins; checkpointed: inputs alone, and one layer computed anew."""
        layers = self.n_layers * (self.layer_input if is_checkpointed else self.layer)
        return layers + (max(self.layer, self.heads) if is_checkpointed else self.heads)


def activations(config: TransformerConfig, device: str, n_bytes: int = BF16) -> Activations:
    """What a sequence keeps in memory for its backward pass; `device` is "cuda" or "cpu".

    A number of what is multiplied takes `n_bytes`: 2 under bfloat16 autocast, 4 in float32. A layer keeps, in bytes a
    slot and for 2: the inputs of both norms in fp32 (8 C), their outputs (4 C), queries, keys and values (6 C), what
    attention gave (2 C), and what enters GELU and what leaves it (16 C): 36 C in all. On top come the shares: a fused
    kernel keeps none but its own output again and a number a head; on a CPU, see `attend`.
    """
    width, n_stream = config.d_model, config.n_text_tokens + config.n_image_tokens
    kinds = layer_kinds(config.n_layers, config.layers)
    shares = sum(_attention_bytes(config, kind, device, n_bytes) for kind in kinds) // config.n_layers
    norms = 4 * FP32 * n_stream  # mean and deviation of both
    layer = (2 * FP32 + 14 * n_bytes) * width * n_stream + norms + shares
    # Kept: log-probabilities. Then beside them: the loss's gradient to them, that to the logits, and its 16-bit copy.
    logits = config.n_text_tokens * config.n_text_ids + config.n_image_tokens * config.n_image_vocab
    largest = max(config.n_text_tokens * config.n_text_ids, config.n_image_tokens * config.n_image_vocab)
    return Activations(
        layer=layer,
        layer_input=FP32 * width * n_stream,
        heads=FP32 * logits
        + (2 * FP32 + (n_bytes if n_bytes < FP32 else 0)) * largest
        + 2 * FP32 * width * n_stream,
        n_layers=config.n_layers,
    )


def _attention_bytes(config: TransformerConfig, kind: str, device: str, n_bytes: int) -> int:
    """What a layer's attention keeps of one sequence besides queries, keys, values and its output."""
    n_text, n_stream, n_heads = (
        config.n_text_tokens,
        config.n_text_tokens + config.n_image_tokens,
        config.n_heads,
    )
    plan = AttentionPlan(kind, n_text, config.grid_size, config.conv_kernel)
    if device == "cpu" and n_stream <= EXPLICIT_TO_STREAM:
        return n_bytes * n_heads * n_stream**2
    if device == "cpu" and kind in SPLIT_FROM_GRID and config.grid_size >= SPLIT_FROM_GRID[kind]:
        n_window = (plan.n_rows_back + 1) * config.grid_size
        shares = n_bytes * n_heads * config.n_image_tokens * (plan.n_caption + n_window)
        copies = 2 * n_bytes * config.d_model * config.n_image_tokens * (plan.n_rows_back + 1)  # keys, values
        return shares + copies + n_bytes * config.d_model * n_stream
    return n_bytes * config.d_model * n_stream + FP32 * n_heads * n_stream
