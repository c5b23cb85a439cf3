"""The decoder: predicts the next image token of many pictures at once, and reads no more than their masks allow.

It computes what `Transformer.forward` computes, from the same weights (the tests compare every token). A caption's keys
and values are kept once, for all of its pictures; each layer keeps the image keys that it can still read; linear maps
in bfloat16 on a CPU use weights that oneDNN has laid out before.
differs: the image head answers in the transformer's dtype, not in float32. Guidance would multiply that rounding: so it
mixes what the head reads, in float32, and not what the head says. The head is linear, so both are the same, and half of
its work is saved.

Shapes: P captions, R pictures, T text tokens, N = G * G image tokens, G grid side, C model width, H heads, D head
width, K image ids, W image keys that a token sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle.generation.cache import ImageCache, Position
from dalle.generation.kernels import native
from dalle.generation.kernels.native import NativeSteps
from dalle.transformer import Layer, Transformer

Map = Callable[[Tensor], Tensor]  # a linear map or a norm, of (R, C)
# queries, keys and values (R, 3 C) of the tokens at a position, the captions' keys and values, the cache -> (R, C)
Attend = Callable[[Tensor, tuple[Tensor, Tensor], ImageCache, Position], Tensor]


class Group(NamedTuple):
    """Pictures side by side of captions side by side, the same number of each."""

    captions: slice
    pictures: slice


class Stream:
    """Half-drawn pictures: what the layers remember of captions and image tokens. Its memory never grows."""

    def __init__(
        self,
        captions: Sequence[tuple[Tensor, Tensor]],
        images: Sequence[ImageCache],
        groups: Sequence[Group],
        attend: Attend,
    ) -> None:
        self.captions = captions  # of each layer: keys and values, (H, P, 1 + T, D) each
        self.images = images  # of each layer
        self.groups = groups
        self.attend = attend
        self.caption_of: Tensor | None = None  # of each picture, where compiled C draws
        self.n_read: Position = 0  # image tokens taken in so far, the same for every picture


class TransformerDecoder:
    """A transformer made ready to draw; it must be made anew when the weights change.

    With `is_int8` the weights of linear maps are rounded to 8 bits; captions are read with all of theirs. With
    `is_native` few pictures on a CPU are drawn by compiled C, and many attend by it (ValueError without a compiler);
    recorded steps on a GPU attend by a Triton kernel.
    """

    def __init__(self, transformer: Transformer, is_int8: bool = False, is_native: bool = False) -> None:
        self.transformer, self.is_native = transformer, is_native
        weight = transformer.image_head.weight
        can_compile = is_native and not is_int8 and native.can_run(weight)
        self._native = NativeSteps(transformer) if can_compile else None
        self.config = transformer.config
        linear = _int8_linear if is_int8 else _linear
        self._layers = [_DecoderLayer(layer, linear) for layer in cast(Iterable[Layer], transformer.layers)]
        self._head, norm = linear(transformer.image_head), transformer.norm
        self._last_norm = (norm.weight.detach().float(), norm.bias.detach().float(), norm.eps)
        self._positions = transformer.image_positions().detach()  # (N, C)

    @torch.no_grad()
    def start(self, text: Tensor, n_pictures: Sequence[int]) -> tuple[Tensor, Stream]:
        """Read captions (P, T) int64, each for `n_pictures` of its own -> states (R, C), and the stream to go on with.

        Raises ValueError for captions that the transformer cannot read.
        """
        state, keys_values = self.transformer.prefill(text)
        captions = [
            (keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous())
            for keys, values in keys_values
        ]
        like = captions[0][0]
        images = [
            ImageCache(layer.plan, sum(n_pictures), like.shape[0], like.shape[3], like)
            for layer in self._layers
        ]
        counts = torch.tensor(n_pictures, device=state.device)
        groups = group(n_pictures)
        attend = attend_compiled if self._native is not None else attend_step
        stream = Stream(captions, images, groups, partial(attend, groups))
        if self._native is not None and NativeSteps.fits(like, sum(n_pictures)):
            stream.caption_of = torch.arange(len(text)).repeat_interleave(counts)
        return state.repeat_interleave(counts, dim=0), stream

    @torch.no_grad()
    def step(self, tokens: Tensor, stream: Stream) -> Tensor:
        """Take in the next image token of each picture, (R,) int64 -> states (R, C) that predict the one after."""
        position = stream.n_read
        x = F.embedding(tokens, self.transformer.image_token.weight) + self._positions[position]  # (R, C)
        if self._native is not None and stream.caption_of is not None:
            x = self._native.step(x, stream.captions, stream.images, stream.caption_of, int(position))
        else:
            for layer, captions, images in zip(self._layers, stream.captions, stream.images, strict=True):
                x = layer.attend(x, captions, images, position, stream.attend)
                x = layer.mlp(x)
        stream.n_read += 1  # last: on a GPU, `position` is the same tensor
        return x

    @torch.no_grad()
    def norm(self, state: Tensor) -> Tensor:
        """Return what the image head reads of states (R, C), float32: guidance mixes two of these, and the head is linear."""
        gain, bias, epsilon = self._last_norm
        return F.layer_norm(state.float(), gain.shape, gain, bias, epsilon)

    @torch.no_grad()
    def head(self, normed: Tensor) -> Tensor:
        """Logits of the next image token, (R, K), in the transformer's dtype, of what `norm` gives."""
        weight = self.transformer.image_head.weight
        if self._native is not None and NativeSteps.fits(weight, len(normed)):
            return self._native.head(normed)
        return self._head(normed.to(weight.dtype))


def group(n_pictures: Sequence[int]) -> list[Group]:
    """Join neighbouring captions with equally many pictures, so that one matrix product serves them all."""
    groups, start = list[Group](), 0
    for caption, n in enumerate(n_pictures):
        last = groups[-1] if groups else None
        if last is not None and n == n_pictures[caption - 1]:
            groups[-1] = Group(slice(last.captions.start, caption + 1), slice(last.pictures.start, start + n))
        else:
            groups.append(Group(slice(caption, caption + 1), slice(start, start + n)))
        start += n
    return groups


class _DecoderLayer:
    """One layer of the transformer, for one token a picture."""

    def __init__(self, layer: Layer, linear: Callable[[nn.Linear], Map]) -> None:
        attention, mlp = layer.attention, layer.mlp
        self.plan, self.n_heads = attention.plan, attention.n_heads
        self._norm, self._qkv, self._out = _norm(attention.norm), linear(attention.qkv), linear(attention.out)
        self._mlp_norm, self._expand, self._contract = (
            _norm(mlp.norm),
            linear(mlp.expand),
            linear(mlp.contract),
        )

    def attend(
        self,
        x: Tensor,
        captions: tuple[Tensor, Tensor],
        images: ImageCache,
        position: Position,
        attend: Attend,
    ) -> Tensor:
        """x + W_out attention(LN(x)) for the tokens at raster index `position`: (R, C) -> (R, C)."""
        return x + self._out(attend(self._qkv(self._norm(x)), captions, images, position))

    def mlp(self, x: Tensor) -> Tensor:
        """x + W_2 GELU(W_1 LN(x)), the same GELU as `MLPResblock`: (R, C) -> (R, C)."""
        inner = F.silu(self._expand(self._mlp_norm(x)).mul_(1.702), inplace=True).div_(1.702)  # (R, 4 C)
        return x + self._contract(inner)


def attend_step(
    groups: Sequence[Group],
    heads: Tensor,
    captions: tuple[Tensor, Tensor],
    images: ImageCache,
    position: Position,
) -> Tensor:
    """Attends from the tokens at raster index `position`: their queries, keys and values (R, 3 C) -> (R, C).

    The cache takes the keys and values in. Heads come first, so that no product needs a copy.
    """
    n_heads, n_pictures = captions[0].shape[0], len(heads)
    split = heads.view(n_pictures, 3, n_heads, -1).permute(1, 2, 0, 3)  # (3, H, R, D)
    images.store_(position, split[1:])
    keys, values = images.visible(position).flatten(1, 2)  # (H R, W, D) each
    q = (split[0] * split.shape[3] ** -0.5).contiguous()  # (H, R, D)
    one_each = q.view(-1, 1, q.shape[2])  # (H R, 1, D)
    seen = torch.bmm(one_each, keys.mT).view(*q.shape[:2], -1)  # (H, R, W)
    bias = images.bias(position)
    if bias is not None:
        seen = seen + bias
    read = _by_caption(q, captions[0].mT, groups)  # (H, R, 1 + T)
    shares = torch.cat([read, seen], dim=-1).softmax(dim=-1)  # one softmax over both, footnote 7
    read, seen = shares.split_with_sizes([read.shape[2], seen.shape[2]], dim=-1)
    mixed = _by_caption(read, captions[1], groups).reshape(one_each.shape)  # (H R, 1, D)
    mixed = torch.baddbmm(mixed, seen.flatten(0, 1)[:, None], values)
    return mixed.view(q.shape).transpose(0, 1).reshape(n_pictures, -1)  # (R, C)


def attend_compiled(
    groups: Sequence[Group],
    heads: Tensor,
    captions: tuple[Tensor, Tensor],
    images: ImageCache,
    position: Position,
) -> Tensor:
    """`attend_step` with everything but the products with captions in compiled C, for a float32 or bfloat16 CPU."""
    n_heads, n_pictures = captions[0].shape[0], len(heads)
    q = heads.view(n_pictures, 3, n_heads, -1)[:, 0].transpose(0, 1)  # (H, R, D)
    q = (q * q.shape[2] ** -0.5).contiguous()
    read = _by_caption(q, captions[0].mT, groups)  # (H, R, 1 + T)
    read, mixed = native.attend_window_(q, heads, images, int(position), read)
    if len(groups) == 1 and captions[0].shape[1] == 1:
        mixed = torch.baddbmm(mixed, read, captions[1][:, 0])
    else:
        mixed = mixed + _by_caption(read, captions[1], groups)
    return mixed.transpose(0, 1).reshape(n_pictures, -1)  # (R, C)


def _by_caption(x: Tensor, matrices: Tensor, groups: Sequence[Group]) -> Tensor:
    """Multiplies each picture's vectors (H, R, a) with its caption's matrices (H, P, a, b) -> (H, R, b)."""
    products = []
    for captions, pictures in groups:
        matrix = matrices[:, captions]  # (H, p, a, b)
        if matrix.shape[1] == 1:  # the same, and a third faster to start
            products.append(torch.bmm(x[:, pictures], matrix[:, 0]))
            continue
        rows = x[:, pictures].reshape(*matrix.shape[:2], -1, x.shape[2])  # (H, p, r, a)
        products.append((rows @ matrix).flatten(1, 2))
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)


# --- Linear maps and norms without the price of a module's call ----------------------------------------------


def _norm(norm: nn.LayerNorm) -> Map:
    weight, bias = norm.weight.detach(), norm.bias.detach()
    return lambda x: F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def _linear(linear: nn.Linear) -> Map:
    weight = linear.weight.detach()
    bias = None if linear.bias is None else linear.bias.detach()
    if not can_pack(weight):
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    apply = torch.ops.mkldnn._linear_pointwise
    return lambda x: cast(Tensor, apply(x, packed, bias, "none", [], ""))


def _int8_linear(linear: nn.Linear) -> Map:
    """Return a linear map with weights in 8 bits and one scale an output, the largest weight at 127."""
    weight = linear.weight.detach().float()
    bias = None if linear.bias is None else linear.bias.detach()
    scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127  # (outputs,)
    rounded = (weight / scale[:, None]).round().to(torch.int8)
    scale = scale.to(linear.weight.dtype)
    if weight.device.type == "cpu" and hasattr(torch, "_weight_int8pack_mm"):  # private

        def fused(x: Tensor) -> Tensor:
            product = torch._weight_int8pack_mm(x, rounded, scale)
            return product if bias is None else product.add_(bias)

        return fused

    def plain(x: Tensor) -> Tensor:
        product = F.linear(x, rounded.to(x.dtype)) * scale
        return product if bias is None else product.add_(bias)

    return plain


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can lay a linear map's weight out in advance: the same products, twice as fast for one picture.

    The operators are private: where they are missing, maps are computed from the plain weights.
    """
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
