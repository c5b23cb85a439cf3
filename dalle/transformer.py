"""The sparse decoder-only transformer over text tokens followed by image tokens, and its joint loss.

Source: DALL·E paper (arXiv 2102.12092), sections 2.2 and 2.3, appendix B and figure 10; Child et al. 2019,
sections 5.2 and 6, for what DALL·E takes over from it. What neither says is marked `settled:`, a departure
`differs:`.

The input stream is [BOS, t_1 .. t_T, z_1 .. z_(N-1)], the targets [t_1 .. t_T, z_1 .. z_N]: both have T + N
slots (1280 in the paper), and slot T, which holds the last text token, predicts the first image token.
settled: figure 10 also draws a start-of-image state; without it the stream is exactly the paper's 1280 = 40
tiles of 32.

Text ids: 0 .. n_text_vocab - 1 are BPE entries; n_text_vocab + p is the pad of text position p (0-based).

Shapes: B batch, T text tokens, N = G * G image tokens, G grid side, S = T + N stream, C model width, H heads,
D head width, V text ids (n_text_vocab + T), K image ids.
"""

import math
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import pydantic
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dalle import weights
from dalle.attention import AttentionPlan, LayerKind, attend, layer_kinds
from dalle.config import Config
from dalle.token_model import Losses

TEXT_WEIGHT, IMAGE_WEIGHT = 1 / 8, 7 / 8  # section 2.2: "we are primarily interested in image modeling"
INIT_SCALE = 0.5  # of the first weights, times 1 / sqrt(fan-in); Child et al.: 0.125
HEAD_SCALE = 0.25  # of the heads' first weights, so that the first logits have this deviation at any width
LAYER_NORM_EPS = 1e-5  # settled: not in the paper; PyTorch's and GPT-2's

Count = Annotated[int, Field(gt=0)]


class TransformerConfig(Config):
    """Sizes of a transformer; the paper's are in brackets (appendix B.1)."""

    n_layers: Count  # attention layers, each followed by an MLP [64]
    n_heads: Count  # heads per layer [62]
    d_head: Count  # width of a head [64]
    n_text_tokens: Count  # text slots T, pads included [256]
    n_text_vocab: Count  # BPE entries; T pad ids come on top [16384]
    grid_size: Annotated[int, Field(gt=1)]  # side G of the token grid [32]
    n_image_vocab: Count  # codes of the dVAE [8192]
    conv_kernel: int = 11  # side of the convolutional mask, odd [11]
    layers: Literal["paper", "dense"] | tuple[LayerKind, ...] = (
        "paper"  # masks: a rule, or one kind per layer
    )

    @property
    def d_model(self) -> int:
        """Width C of the residual stream."""
        return self.n_heads * self.d_head

    @property
    def n_image_tokens(self) -> int:
        """Image tokens N of a picture."""
        return self.grid_size**2

    @property
    def n_text_ids(self) -> int:
        """Text ids V: BPE entries and one pad per text position."""
        return self.n_text_vocab + self.n_text_tokens

    @pydantic.model_validator(mode="after")
    def _check_layers(self) -> Self:
        layer_kinds(self.n_layers, self.layers)
        if self.conv_kernel < 1 or self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel is {self.conv_kernel}; it must be a positive odd number")
        return self


class StreamDropout(nn.Module):
    """Dropout with one mask for all slots of a stream, which costs nothing; off until `share` is set.

    Source: Gal and Ghahramani 2016, "A Theoretically Grounded Application of Dropout". The paper names none;
    Child et al. 5.2 drop on small data.
    """

    def __init__(self) -> None:
        super().__init__()
        self.share = 0.0  # of the channels, 0..1

    def forward(self, x: Tensor) -> Tensor:
        """Drops channels in training and scales up the others, (B, S, C) -> (B, S, C)."""
        if not self.training or self.share == 0:
            return x
        return x * F.dropout(x.new_ones(len(x), 1, x.shape[2]), self.share)


class AttentionResblock(nn.Module):
    """x + W_out attention(LN(x)): one of the 2 * n_layers resblocks of the paper (figure 4)."""

    def __init__(self, config: TransformerConfig, plan: AttentionPlan) -> None:
        super().__init__()
        self.n_heads, self.plan = config.n_heads, plan
        self.norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        # settled: every linear map has a bias, as in GPT-2; appendix D lists biases but not which.
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)
        self.dropout = StreamDropout()

    def forward(self, x: Tensor) -> Tensor:
        """Runs the whole stream, (B, S, C) -> (B, S, C)."""
        return self._add(x, attend(*self._project(x), self.plan))

    def prefill(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the caption part, (B, 1 + T, C) -> (B, 1 + T, C), and gives its keys and values (B, H, 1 + T, D)."""
        q, k, v = self._project(x)
        return self._add(x, attend(q, k, v, self.plan)), k, v

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads: Tensor = self.qkv(self.norm(x))  # (B, S, 3 C)
        heads = heads.view(*x.shape[:2], 3, self.n_heads, -1)  # (B, S, 3, H, D)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, S, D) each
        return q, k, v

    def _add(self, x: Tensor, attended: Tensor) -> Tensor:
        branch: Tensor = self.out(attended.transpose(1, 2).flatten(2))  # (B, S, C)
        return x + cast(Tensor, self.dropout(branch))


class MLPResblock(nn.Module):
    """x + W_2 GELU(W_1 LN(x)), four times as wide inside."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.expand = nn.Linear(config.d_model, 4 * config.d_model)
        self.contract = nn.Linear(4 * config.d_model, config.d_model)
        self.dropout = StreamDropout()

    def forward(self, x: Tensor) -> Tensor:
        """Runs any slots, (B, S, C) -> (B, S, C)."""
        branch: Tensor = self.expand(self.norm(x))  # (B, S, 4 C)
        # settled: GELU as x * sigmoid(1.702 x), Child et al. 5.2; silu(x) is x * sigmoid(x) in one kernel.
        branch = self.contract(F.silu(1.702 * branch) / 1.702)  # (B, S, C)
        return x + cast(Tensor, self.dropout(branch))


class Layer(nn.Module):
    """An attention resblock, then an MLP resblock, both pre-LN.

    settled: in sequence, H + a + ff(LN(H + a)), which is also what Child et al. 5.2 write: their b = ff(LN(H
    + a)) sees the attention's output, and H + a + b is the plain sequential sum.
    """

    def __init__(self, config: TransformerConfig, plan: AttentionPlan) -> None:
        super().__init__()
        self.attention = AttentionResblock(config, plan)
        self.mlp = MLPResblock(config)

    def forward(self, x: Tensor) -> Tensor:
        """Runs the whole stream, (B, S, C) -> (B, S, C)."""
        x = self.attention(x)
        x = self.mlp(x)
        return x


class Transformer(nn.Module):
    """p(text, image) as one autoregressive stream. Source: section 2.2, appendix B.1, figure 10."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.d_model
        self.start = nn.Embedding(1, width)  # BOS
        self.text_token = nn.Embedding(config.n_text_vocab, width)
        self.text_position = nn.Embedding(config.n_text_tokens, width)
        self.text_pad = nn.Embedding(config.n_text_tokens, width)  # one pad per text position
        self.image_token = nn.Embedding(config.n_image_vocab, width)
        self.image_row = nn.Embedding(config.grid_size, width)
        self.image_column = nn.Embedding(config.grid_size, width)
        kinds = layer_kinds(config.n_layers, config.layers)
        plans = {
            kind: AttentionPlan(kind, config.n_text_tokens, config.grid_size, config.conv_kernel)
            for kind in set(kinds)
        }
        self.layers = nn.ModuleList(Layer(config, plans[kind]) for kind in kinds)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        # settled: two heads, not one over all ids, untied from the embeddings, no biases; a slot can then
        # never predict an id of the wrong kind, and each head runs only on its own segment.
        self.text_head = nn.Linear(width, config.n_text_ids, bias=False)
        self.image_head = nn.Linear(width, config.n_image_vocab, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draws all weights anew, in the form of Child et al. 2019, sections 5.2 and 6.

        settled: DALL·E's own is not given (footnote 8: alternatives did not help). differs: Child et al. draw at a
        quarter of this scale and start the heads at zero. On a lookup task that reached an image loss of 0.24 nats
        after 200 updates, this 0.03 (`benchmarks/init_scale.py`). The first losses are near ln V and ln K.
        """
        width = self.config.d_model
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(
                    module.weight, std=INIT_SCALE / math.sqrt(module.in_features), generator=generator
                )
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_SCALE / math.sqrt(width), generator=generator)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for position in (self.image_row, self.image_column):  # two position terms share a slot
            position.weight /= math.sqrt(2)
        for layer in cast(Iterable[Layer], self.layers):
            for output in (layer.attention.out, layer.mlp.contract):
                output.weight /= math.sqrt(2 * self.config.n_layers)
        for head in (self.text_head, self.image_head):
            nn.init.normal_(head.weight, std=HEAD_SCALE / math.sqrt(width), generator=generator)

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Gives the logits of every text and image token from all before it, in fp32.

        `text` (B, T) ids 0 .. V - 1 with pads in place, `image` (B, N) ids 0 .. K - 1 in raster order, both
        int64 -> text logits (B, T, V), image logits (B, N, K). Raises ValueError for other shapes, and on CPU
        for other ids.
        """
        self._check_text(text)
        self._check_image(image, (text.shape[0], self.config.n_image_tokens))
        n_text = self.config.n_text_tokens
        # The last image token is only a target.
        x = torch.cat([self._embed_caption(text), self._embed_image(image[:, :-1])], dim=1)  # (B, S, C)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return _logits(self.text_head, x[:, :n_text]), _logits(self.image_head, x[:, n_text:])

    def loss(self, text: Tensor, image: Tensor, read: Tensor | None = None) -> Losses:
        """Gives the joint cross-entropy of a batch in nats per token; arguments and errors as `forward`.

        With `read` (B, N) the model reads those image tokens, and has to tell those of `image` all the same.
        settled: pads are targets like other text tokens, as in other re-implementations. Source: section 2.2.
        """
        text_logits, image_logits = self(text, image if read is None else read)
        text_loss = F.cross_entropy(text_logits.flatten(0, 1), text.flatten())
        image_loss = F.cross_entropy(image_logits.flatten(0, 1), image.flatten())
        return Losses(TEXT_WEIGHT * text_loss + IMAGE_WEIGHT * image_loss, text_loss, image_loss)

    @torch.no_grad()
    def prefill(self, text: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Reads captions (B, T): the state (B, C) that predicts the first image token, and each layer's keys and values.

        Keys and values are (B, H, 1 + T, D); `dalle.generation.decoder` draws on from there. Raises ValueError for
        another shape, and on CPU for ids out of range.
        """
        self._check_text(text)
        x = self._embed_caption(text)  # (B, 1 + T, C)
        keys_values = []
        for layer in cast(Iterable[Layer], self.layers):
            x, keys, values = layer.attention.prefill(x)
            x = layer.mlp(x)
            keys_values.append((keys, values))
        return x[:, -1], keys_values

    def null_text(self) -> Tensor:
        """Return the empty caption, which guidance moves away from, (T,) int64: the pad of every position."""
        return self.config.n_text_vocab + torch.arange(self.config.n_text_tokens)

    def set_dropout(self, share: float) -> None:
        """Sets the share (0..1) of each resblock's output channels that training drops; 0 until set."""
        for module in self.modules():
            if isinstance(module, StreamDropout):
                module.share = share

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors to `folder`."""
        weights.save_component(Path(folder), self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str]) -> Self:
        """Reads what `save_pretrained` wrote, in fp32 on the CPU, in eval mode. Raises ValueError if it is damaged."""
        return weights.load_module(folder, TransformerConfig, cls, "transformer")

    def _embed_caption(self, text: Tensor) -> Tensor:
        """Embeds BOS and the text tokens, (B, T) -> (B, 1 + T, C)."""
        n_vocab = self.config.n_text_vocab
        tokens = self.text_token(text.clamp(max=n_vocab - 1)) + self.text_position.weight  # (B, T, C)
        # A pad is one vector per position without a position term of its own (figure 10).
        tokens = torch.where((text >= n_vocab)[..., None], self.text_pad.weight, tokens)
        return torch.cat([self.start.weight.expand(len(text), 1, -1), tokens], dim=1)

    def image_positions(self) -> Tensor:
        """What each place of the grid adds to its token's embedding, in raster order: (N, C)."""
        return (self.image_row.weight[:, None] + self.image_column.weight).flatten(0, 1)

    def _embed_image(self, tokens: Tensor) -> Tensor:
        """Embeds the first n image tokens, (B, n) -> (B, n, C)."""
        embedded: Tensor = self.image_token(tokens)  # (B, n, C)
        return embedded + self.image_positions()[: tokens.shape[1]]

    def _check_text(self, text: Tensor) -> None:
        n_text, n_vocab = self.config.n_text_tokens, self.config.n_text_vocab
        if text.ndim != 2 or text.shape[1] != n_text:
            raise ValueError(
                f"text has shape {tuple(text.shape)}; the model reads (batch, {n_text}): pad the captions"
            )
        if _is_checkable(text):
            _check_range(text, "text", self.config.n_text_ids)
            position = torch.arange(n_text, device=text.device)
            misplaced = (text >= n_vocab) & (text != n_vocab + position)
            if misplaced.any():
                where = int(misplaced.any(0).nonzero()[0])
                raise ValueError(
                    f"text has another position's pad at position {where}; its pad id is {n_vocab + where}:"
                    " pad with Tokenizer.pad"
                )

    def _check_image(self, image: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(image.shape) != shape:
            raise ValueError(f"image tokens have shape {tuple(image.shape)}; the model reads {shape} here")
        if _is_checkable(image):
            _check_range(image, "image", self.config.n_image_vocab)


def _logits(head: nn.Linear, x: Tensor) -> Tensor:
    """Applies a head in fp32 or better whatever the model's dtype: 16-bit logits shift the loss (appendix D.2)."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
    with torch.autocast(x.device.type, enabled=False):
        if dtype is not None and x.requires_grad and head.weight.requires_grad:
            mixed: Tensor = _MixedLinear.apply(x.float(), head.weight.float(), dtype)  # type: ignore[no-untyped-call]
            return mixed
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), head.weight.to(wide))


class _MixedLinear(torch.autograd.Function):
    """A linear map exact in fp32 forwards, whose gradients are multiplied in autocast's dtype as everywhere else.

    Two of a head's three matrix products are in the backward pass, and a CPU's fp32 ones are far slower.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        cotangent = cotangents[0].to(ctx.dtype)  # (..., V)
        flat = cotangent.flatten(0, -2)  # (M, V)
        for_weight = flat.T @ x.to(ctx.dtype).flatten(0, -2)  # (V, C)
        return (cotangent @ weight.to(ctx.dtype)).float(), for_weight.float(), None


def _is_checkable(ids: Tensor) -> bool:
    """Tells whether reading the ids is free: on a GPU it would wait for all queued work."""
    return ids.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_range(ids: Tensor, name: str, n_ids: int) -> None:
    if ids.numel() == 0:
        return
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= n_ids:
        wrong = low if low < 0 else high
        raise ValueError(
            f"{name} has id {wrong}; the model knows 0 .. {n_ids - 1}: is this its own tokenizer?"
        )
