"""DALLE-pytorch's transformer: one stream of text and image tokens, with the attention kinds of its versions 0.2 to 1.6.

Source: lucidrains/DALLE-pytorch. Every attention kind is a mask over slots here, so one code path draws from all of
them. Its dVAE is in `dalle_pytorch_vae`. Its guidance is not followed: there the empty caption erases the caption.

The stream is [BOS, t_1 .. t_T, z_1 .. z_(N-1)]. A text id of 0 is padding, and each position has a pad of its own.

Shapes: B batch, P captions, T text tokens, A = T + 1 caption slots, N = G * G image tokens, R pictures, S slots, C width,
H heads, D head width, V text ids, K codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dalle.config import Config
from dalle.published.saved import SavedModule
from dalle.published.stream import (
    MaskRows,
    SlotCache,
    Stream,
    attend_step,
    check_text,
    norm_in_float32,
    repeat_rows,
    split_heads,
    weighted_losses,
)
from dalle.token_model import Losses

Count = Annotated[int, Field(gt=0)]
AttentionKind = Literal["full", "axial_row", "axial_col", "conv_like"]
Branch = Callable[[Tensor], Tensor]


class DallePytorchConfig(Config):
    """Sizes and switches of a `DallePytorch`; DALLE-pytorch's names are in brackets."""

    n_layers: Count  # [depth]
    n_heads: Count  # [heads]
    d_head: Count  # [dim_head]
    d_model: Count  # C [dim]
    n_text_tokens: Count  # T [text_seq_len]
    n_text_vocab: Count  # ids of the tokenizer; T pads come on top [num_text_tokens]
    n_image_vocab: Count  # K [vae.num_tokens]
    grid_size: Annotated[int, Field(gt=1)]  # G
    attention: tuple[AttentionKind, ...]  # of each layer [attn_types]
    conv_kernel: Count = 5  # side of the square of image tokens that conv_like sees
    is_rotary: bool  # positions by rotation of queries, keys and values, not learned [rotary_emb]
    n_angles: Annotated[int, Field(ge=0)] = 0  # channels of a head that are rotated
    shifts_tokens: (
        bool  # half of each text token, and of each image token, is that of a neighbour [shift_tokens]
    )
    has_sandwich_norms: bool = False  # a norm behind each branch too [sandwich_norm]
    is_stable: bool = False  # the output is divided by its largest channel [stable]
    is_reversible: bool = False  # two residual streams [reversible]
    is_tied: bool = False  # the heads' weights are the embeddings [share_input_output_emb]
    image_weight: Annotated[float, Field(gt=0)] = 7.0  # in the loss; text counts 1 [loss_img_weight]

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if len(self.attention) != self.n_layers:
            raise ValueError(f"attention names {len(self.attention)} layers; n_layers is {self.n_layers}")
        if self.is_rotary != (self.n_angles > 0) or self.n_angles > self.d_head or self.n_angles % 2:
            raise ValueError(
                f"n_angles is {self.n_angles}; it does not fit is_rotary and d_head {self.d_head}"
            )
        return self

    @property
    def n_image_tokens(self) -> int:
        """Image tokens N of a picture."""
        return self.grid_size**2

    @property
    def n_text_ids(self) -> int:
        """Ids that a caption may hold; 0 is padding."""
        return self.n_text_vocab


def slot_mask(kind: AttentionKind, n_caption: int, grid: int, kernel: int) -> Tensor:
    """Draw what each slot (row) sees of each slot (column), bool (A + N - 1, A + N - 1)."""
    n = n_caption + grid * grid - 1
    mask = torch.ones(n, n, dtype=torch.bool, device="cpu").tril()
    if kind == "full":
        return mask
    place = torch.arange(grid * grid - 1, device="cpu")
    rows, columns = place // grid, place % grid
    down, right = rows[:, None] - rows, columns[:, None] - columns
    if kind == "axial_row":
        seen = (down == 0) & (right >= 0)
    elif kind == "axial_col":
        seen = (right == 0) & (down >= 0)
    else:  # the square whose last corner is the token itself; it does not wrap
        seen = (down >= 0) & (down < kernel) & (right >= 0) & (right < kernel)
    mask[n_caption:, n_caption:] = seen
    return mask


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the first channels of x (..., S, D) by angles (S, n)."""
    turned, rest = x.split_with_sizes([angles.shape[-1], x.shape[-1] - angles.shape[-1]], dim=-1)
    pairs = turned.unflatten(-1, (-1, 2))  # type: ignore[no-untyped-call]
    quarter = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    angles = angles.to(torch.float32)
    turned = turned * angles.cos().to(x.dtype) + quarter * angles.sin().to(x.dtype)
    return torch.cat([turned, rest], dim=-1)


def shift_tokens(x: Tensor, n_caption: int, grid: int) -> Tensor:
    """Give each slot of (B, S, C) channels of its neighbours.

    The first half of a caption slot is that of the slot before; of an image slot, the first quarter is that of the slot
    above and the second quarter that of the slot on the left.
    """
    caption, image = x[:, :n_caption], x[:, n_caption:]
    moved, kept = caption.chunk(2, dim=-1)
    parts = [torch.cat([F.pad(moved, (0, 0, 1, -1)), kept], dim=-1)]
    if image.shape[1]:
        first, second, *rest = image.chunk(4, dim=-1)
        above = F.pad(first, (0, 0, grid, 0))[:, : image.shape[1]]
        column = torch.arange(image.shape[1], device=x.device) % grid
        left = F.pad(second, (0, 0, 1, -1)) * (column > 0)[:, None]
        parts.append(torch.cat([above, left, *rest], dim=-1))
    return torch.cat(parts, dim=1)


class Attention(nn.Module):
    """Projections of one attention branch."""

    def __init__(self, config: DallePytorchConfig) -> None:
        super().__init__()
        inner = config.n_heads * config.d_head
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.d_model, 3 * inner, bias=False)
        self.out = nn.Linear(inner, config.d_model)

    def project(self, x: Tensor, angles: Tensor | None) -> list[Tensor]:
        """Project (B, S, C) to queries, keys and values (B, H, S, D), all three rotated by angles (S, n)."""
        parts = [split_heads(part, self.n_heads) for part in self.qkv(x).chunk(3, dim=-1)]
        return parts if angles is None else [rotate(part, angles) for part in parts]


class MLP(nn.Module):
    """A gated MLP: W_out (value * GELU(gate)), the two halves of one projection eight times as wide."""

    def __init__(self, config: DallePytorchConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.d_model, 8 * config.d_model)
        self.contract = nn.Linear(4 * config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        value, gate = self.expand(x).chunk(2, dim=-1)
        return cast(Tensor, self.contract(value * F.gelu(gate)))


class Sublayer(nn.Module):
    """One branch of a layer: norm, shift, attention or MLP, norm, scale of each channel."""

    def __init__(self, config: DallePytorchConfig, inner: Attention | MLP) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.inner = inner
        self.out_norm = nn.LayerNorm(config.d_model) if config.has_sandwich_norms else nn.Identity()
        self.scale = nn.Parameter(torch.ones(config.d_model))

    def finish(self, x: Tensor) -> Tensor:
        """Turn what the branch computed into what the stream takes up, (..., C)."""
        return cast(Tensor, self.out_norm(x) * self.scale)


class Layer(nn.Module):
    """An attention branch and an MLP branch."""

    def __init__(self, config: DallePytorchConfig) -> None:
        super().__init__()
        self.attention = Sublayer(config, Attention(config))
        self.mlp = Sublayer(config, MLP(config))


class DallePytorch(SavedModule):
    """p(text, image) as one autoregressive stream."""

    schema = DallePytorchConfig
    config: DallePytorchConfig

    def __init__(self, config: DallePytorchConfig) -> None:
        super().__init__(config)
        width, grid, n_text_ids = config.d_model, config.grid_size, config.n_text_vocab + config.n_text_tokens
        if not config.is_tied:
            self.text_token = nn.Embedding(n_text_ids, width)
            self.image_token = nn.Embedding(config.n_image_vocab, width)
        if config.is_rotary:
            self.register_buffer(
                "angles", torch.zeros(1 + config.n_text_tokens + grid * grid, config.n_angles)
            )
        else:
            self.text_position = nn.Embedding(config.n_text_tokens + 1, width)
            self.image_row = nn.Embedding(grid, width)
            self.image_column = nn.Embedding(grid, width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(width)
        self.text_head = nn.Linear(width, n_text_ids)
        self.image_head = nn.Linear(width, config.n_image_vocab)
        self.masks = {
            kind: slot_mask(kind, config.n_text_tokens + 1, grid, config.conv_kernel)
            for kind in dict.fromkeys(config.attention)
        }
        self._rows: dict[str, MaskRows] = {}

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of every text token (B, T, V) and image token (B, N, K) from all before it."""
        n_text, grid = self.config.n_text_tokens, self.config.grid_size
        x = torch.cat([self._embed_caption(text), self._embed_image(image[:, :-1], 0)], dim=1)  # (B, S, C)
        angles = self._angles(0, x.shape[1])

        def attend(index: int, sublayer: Sublayer) -> Branch:
            attention = cast(Attention, sublayer.inner)
            mask = self.masks[self.config.attention[index]].to(x.device)

            def run(read: Tensor) -> Tensor:
                q, keys, values = attention.project(read, angles)
                attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
                return cast(Tensor, attention.out(attended.transpose(1, 2).flatten(2)))

            return run

        x = self.norm(self._run(x, attend, lambda _, read: self._shift(read, grid)))
        text_logits = self.text_head(x[:, :n_text].to(self.text_head.weight.dtype))
        return text_logits.float(), self.head(x[:, n_text:]).float()

    def loss(self, text: Tensor, image: Tensor) -> Losses:
        """Return (text + 7 * image) / 8 and both cross-entropies, in nats per token; pads are targets too."""
        text_logits, image_logits = self(text, image)
        return Losses(
            *weighted_losses(
                text_logits, self._with_pads(text), image_logits, image, self.config.image_weight
            )
        )

    # Draw

    @torch.no_grad()
    def start(self, text: Tensor, counts: Sequence[int]) -> tuple[Tensor, Stream]:
        """Read captions (P, T), each for counts[p] pictures -> states (R, C), and the stream to go on with."""
        config = self.config
        x = self._embed_caption(text)  # (P, A, C)
        n_caption, n_pictures = x.shape[1], sum(counts)
        angles = self._angles(0, n_caption)
        stream = Stream(counts, [])

        def attend(index: int, sublayer: Sublayer) -> Branch:
            attention = cast(Attention, sublayer.inner)

            def run(read: Tensor) -> Tensor:
                q, keys, values = attention.project(read, angles)
                stream.layers.append(SlotCache((keys, values), n_pictures, config.n_image_tokens))
                attended = F.scaled_dot_product_attention(q, keys, values, is_causal=True)
                return cast(Tensor, attention.out(attended.transpose(1, 2).flatten(2)))

            return run

        x = self._run(x, attend, lambda _, read: self._shift(read, config.grid_size))
        if config.shifts_tokens:
            n_kept = 2 * -(-config.d_model // 4)
            kept = x.new_zeros(2 * config.n_layers, n_pictures, config.n_image_tokens, n_kept)
            stream.extra["neighbours"] = kept
        return repeat_rows(x[:, -1], counts), stream

    @torch.no_grad()
    def step(self, tokens: Tensor, stream: Stream) -> Tensor:
        """Take in the next image token of each picture, (R,) -> states (R, C) that predict the one after."""
        position = stream.n_read
        x = self._embed_image(tokens[:, None], position)  # (R, 1, C)
        slot = 1 + self.config.n_text_tokens + position
        angles = self._angles(slot, slot + 1)

        def attend(index: int, sublayer: Sublayer) -> Branch:
            attention, cache = cast(Attention, sublayer.inner), stream.layers[index]
            rows = self._mask_rows(self.config.attention[index])

            def run(read: Tensor) -> Tensor:
                q, keys, values = (part[:, :, 0] for part in attention.project(read, angles))
                cache.store_(position, keys, values)
                attended = attend_step(q * q.shape[-1] ** -0.5, cache, rows, position, stream.counts)
                return cast(Tensor, attention.out(attended[:, None]))

            return run

        x = self._run(x, attend, lambda index, read: self._shift_step(read, index, stream))
        stream.n_read += 1
        return x[:, 0]

    def norm(self, state: Tensor) -> Tensor:
        """Return what the heads read of states (..., C)."""
        if self.config.is_stable:
            state = state / state.amax(dim=-1, keepdim=True)
        return norm_in_float32(self.final_norm, state)

    def head(self, normed: Tensor) -> Tensor:
        """Return logits (..., K) of the codes."""
        return cast(Tensor, self.image_head(normed.to(self.image_head.weight.dtype)))

    def null_text(self) -> Tensor:
        """Return the empty caption, (T,): padding everywhere."""
        return torch.zeros(self.config.n_text_tokens, dtype=torch.int64)

    # Parts

    def _run(
        self,
        x: Tensor,
        attend: Callable[[int, Sublayer], Branch],
        shift: Callable[[int, Tensor], Tensor],
    ) -> Tensor:
        """Run all layers over one residual stream, or over two where the model is reversible."""
        other, is_reversible = x, self.config.is_reversible
        for i, layer in enumerate(cast(Iterable[Layer], self.layers)):
            attention, mlp = layer.attention, layer.mlp
            branch = attention.finish(attend(i, attention)(shift(2 * i, attention.norm(x))))
            other = (other if is_reversible else x) + branch
            if not is_reversible:
                x = other
            x = x + mlp.finish(mlp.inner(shift(2 * i + 1, mlp.norm(other))))
        return (x + other) / 2 if is_reversible else x

    def _shift(self, x: Tensor, grid: int) -> Tensor:
        return shift_tokens(x, self.config.n_text_tokens + 1, grid) if self.config.shifts_tokens else x

    def _shift_step(self, x: Tensor, index: int, stream: Stream) -> Tensor:
        """Do what `shift_tokens` does for the one image slot at hand, (R, 1, C)."""
        if not self.config.shifts_tokens:
            return x
        kept, position, grid = stream.extra["neighbours"][index], stream.n_read, self.config.grid_size
        first, second, *rest = x[:, 0].chunk(4, dim=-1)
        kept[:, position, : first.shape[1]], kept[:, position, first.shape[1] :] = first, second
        above = kept[:, position - grid, : first.shape[1]] if position >= grid else torch.zeros_like(first)
        left = kept[:, position - 1, first.shape[1] :] if position % grid else torch.zeros_like(second)
        return torch.cat([above, left, *rest], dim=-1)[:, None]

    def _with_pads(self, text: Tensor) -> Tensor:
        """Replace 0, padding, by the pad of its position, (B, T)."""
        pads = self.config.n_text_vocab + torch.arange(text.shape[1], device=text.device)
        return torch.where(text == 0, pads, text)

    def _embed_caption(self, text: Tensor) -> Tensor:
        """Embed BOS, which is id 0, and text tokens: (B, T) -> (B, A, C)."""
        check_text(text, self.config.n_text_tokens, self.config.n_text_vocab)
        ids = F.pad(self._with_pads(text), (1, 0))
        table = self.text_head.weight if self.config.is_tied else self.text_token.weight
        x = F.embedding(ids, table)
        return x if self.config.is_rotary else x + self.text_position.weight

    def _embed_image(self, tokens: Tensor, first: int) -> Tensor:
        """Embed image tokens (B, n) from raster index `first` on -> (B, n, C)."""
        table = self.image_head.weight if self.config.is_tied else self.image_token.weight
        x = F.embedding(tokens, table)
        if self.config.is_rotary:
            return x
        place = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        grid = self.config.grid_size
        return cast(Tensor, x + self.image_row(place // grid) + self.image_column(place % grid))

    def _angles(self, start: int, stop: int) -> Tensor | None:
        return cast(Tensor, self.angles)[start:stop] if self.config.is_rotary else None

    def _mask_rows(self, kind: AttentionKind) -> MaskRows:
        if kind not in self._rows:
            self._rows[kind] = MaskRows(self.masks[kind], self.config.n_text_tokens + 1)
        return self._rows[kind]
