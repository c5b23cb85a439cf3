"""The discrete VAE: an image becomes a grid of tokens, and a grid of tokens an image.

Source: Ramesh et al. 2021, §2.1 and App. A.1-A.3, and OpenAI's released `dall_e` package, whose parameter
names the paper trunk keeps. Finite scalar quantization: Mentzer et al. 2023 (arXiv 2309.15505), §3, App. A.1.

Shapes: B batch, H = W image side, G = H / 8 grid side, S side of a decoded image (H in the paper), K codes, D channels
of the quantizer's latent (K for gumbel, one per level for FSQ). Images are float in [0, 1] unless a line says "mapped".
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dalle.config import Config, validate
from dalle.images import box_filtered
from dalle.weights import load_module, save_component

DOWNSAMPLING = 8  # image side / grid side; three 2x poolings (§2.1)
PIXEL_MARGIN = 0.1  # eps of App. A.3, eq. 3: pixels are squeezed into [eps, 1 - eps]
MAX_LN_B = 3.0  # differs: not clamped in the paper
L1_WEIGHT = 0.05  # of "mse_l1": squared error decides, the absolute error keeps flat areas exactly flat
N_NORM_GROUPS = 8  # of the light trunk's GroupNorm
# What the light trunk's resolutions are called, relative to the image side; a decoder has as many as it has widths.
RESOLUTIONS = ("eighth", "quarter", "half_scale", "full_scale")

PositiveInt = Annotated[int, Field(gt=0)]


class DVAEConfig(Config):
    """Sizes of a `DiscreteVAE`; ValueError when they do not fit together."""

    image_size: PositiveInt  # pixels a side, a multiple of 8 (paper: 256)
    n_codes: PositiveInt  # size of the codebook, K (paper: 8192)
    quantizer: Literal["gumbel", "fsq"]  # the paper's relaxation, or finite scalar quantization
    fsq_levels: tuple[int, ...] = ()  # levels of each FSQ channel; their product is n_codes
    trunk: Literal["paper", "light"]  # OpenAI's network, or a cheap one without full-resolution convolutions
    likelihood: Literal["logit_laplace", "mse_l1"] = "logit_laplace"  # the paper's, or regression for PSNR
    # Floor of ln b, in logits. differs: none in the paper, whose photographs are nowhere flat. White art would drive it
    # to -inf, and a pixel weighs 1 / b: the higher the floor, the less the flat ones outweigh the others.
    min_ln_b: Annotated[float, Field(lt=MAX_LN_B)] = -7.0
    d_hidden: PositiveInt  # base width, a multiple of 8 (paper: n_hid = 256)
    d_code: PositiveInt  # width of a code vector in the decoder (paper: n_init = 128)
    n_blocks: PositiveInt  # residual blocks per group (paper: 2) or per resolution (light)
    # The light trunk's decoder may be larger than its encoder, and draw more pixels than that reads: tokens say what,
    # it draws how. differs: the paper's decoder mirrors its encoder.
    output_size: PositiveInt = Field(
        default_factory=lambda given: given.get("image_size", 0)
    )  # pixels a side
    decoder_widths: tuple[PositiveInt, ...] = ()  # at G, 2G, ...: multiples of 8; (): 2 * d_hidden, d_hidden
    decoder_blocks: PositiveInt | None = None  # residual blocks per resolution of the decoder; None: n_blocks

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out a decoder's own sizes where it has none, as in the files of models older than these fields."""
        tree: dict[str, Any] = serialize(self)
        if self.output_size == self.image_size:
            del tree["output_size"]
        return {
            key: tree[key] for key in tree if key not in ("decoder_widths", "decoder_blocks") or tree[key]
        }

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.image_size % DOWNSAMPLING:
            raise ValueError(f"image_size is {self.image_size}; it must be a multiple of {DOWNSAMPLING}")
        if self.d_hidden % N_NORM_GROUPS:
            raise ValueError(f"d_hidden is {self.d_hidden}; it must be a multiple of {N_NORM_GROUPS}")
        if self.quantizer == "gumbel" and self.fsq_levels:
            raise ValueError(f"fsq_levels is {self.fsq_levels}; the gumbel quantizer has none: leave it out")
        if self.quantizer == "fsq":
            if not self.fsq_levels or min(self.fsq_levels) < 3:
                raise ValueError(
                    f"fsq_levels is {self.fsq_levels}; FSQ needs levels of 3 or more: [8, 5, 5, 5]"
                )
            n_made = math.prod(self.fsq_levels)
            if n_made != self.n_codes:
                raise ValueError(
                    f"fsq_levels {self.fsq_levels} make {n_made} codes; n_codes is {self.n_codes}"
                )
        return self

    @model_validator(mode="after")
    def _decoder_fits(self) -> Self:
        widths, side = self.decoder_widths, self.output_size
        if self.trunk == "paper":
            if side != self.image_size or widths or self.decoder_blocks:
                raise ValueError(
                    "output_size, decoder_widths and decoder_blocks belong to trunk light; the paper's decoder mirrors "
                    "its encoder: leave them out"
                )
            return self
        if len(widths) > len(RESOLUTIONS) or any(width % N_NORM_GROUPS for width in widths):
            raise ValueError(
                f"decoder_widths is {list(widths)}; it holds at most {len(RESOLUTIONS)} multiples of {N_NORM_GROUPS}"
            )
        if self.last_shuffle not in (1, 2, 4, 8) or side < self.image_size:
            allowed = [
                n for n in (self._last_side * shuffle for shuffle in (1, 2, 4, 8)) if n >= self.image_size
            ]
            raise ValueError(
                f"output_size is {side}; a decoder whose last width works at {self._last_side} px draws "
                f"{' or '.join(map(str, allowed)) or 'less than it reads: add widths'}"
            )
        return self

    @property
    def grid_size(self) -> int:
        """Tokens a side, G."""
        return self.image_size // DOWNSAMPLING

    @property
    def light_widths(self) -> tuple[int, ...]:
        """Widths of the light trunk's decoder at G, 2G, ... pixels a side."""
        return self.decoder_widths or (2 * self.d_hidden, self.d_hidden)

    @property
    def light_blocks(self) -> int:
        """Residual blocks per resolution of the light trunk's decoder."""
        return self.decoder_blocks or self.n_blocks

    @property
    def last_shuffle(self) -> float:
        """Factor of the light decoder's last pixel shuffle."""
        return self.output_size / self._last_side

    @property
    def _last_side(self) -> int:
        return int(self.grid_size * 2 ** (len(self.light_widths) - 1))

    def draws_as(self, other: Self) -> bool:
        """Whether the light decoders of two configs have the same sizes."""
        own, others = (
            (config.output_size, config.light_widths, config.light_blocks) for config in (self, other)
        )
        return own == others

    def drawing_as(self, other: Self) -> Self:
        """The same encoder and codes with the decoder of `other`; ValueError when that does not fit."""
        sizes = {
            "output_size": other.output_size,
            "decoder_widths": other.light_widths,
            "decoder_blocks": other.light_blocks,
        }
        return validate(type(self), self.model_dump() | sizes, "the given dVAE with the decoder of [dvae]")

    def mirrored(self) -> Self:
        """The same encoder and codes with the decoder that mirrors it: what the codes are learned with."""
        return self.model_copy(
            update={"output_size": self.image_size, "decoder_widths": (), "decoder_blocks": None}
        )


# --- pixels and their likelihood (App. A.3) ---


def map_pixels(images: Tensor) -> Tensor:
    """Squeeze pixels from [0, 1] into [0.1, 0.9], where the logit is finite (App. A.3, eq. 3)."""
    return (1 - 2 * PIXEL_MARGIN) * images + PIXEL_MARGIN


def unmap_pixels(mapped: Tensor) -> Tensor:
    """Undo `map_pixels` and clamp to [0, 1]."""
    return ((mapped - PIXEL_MARGIN) / (1 - 2 * PIXEL_MARGIN)).clamp(0, 1)


def relaxed_pixels(out: Tensor) -> Tensor:
    """Images (B, 3, S, S) of what the decoder gives, (B, 6, S, S): beyond [0, 1] by a little where it overshoots.

    For losses: a clamp would stop the gradient there.
    """
    return (torch.sigmoid(out[:, :3].float()) - PIXEL_MARGIN) / (1 - 2 * PIXEL_MARGIN)


def logit_laplace_nll(mapped: Tensor, mu: Tensor, ln_b: Tensor) -> Tensor:
    """-ln f(x | mu, b), nats of each sub-pixel x in (0, 1): the sigmoid of a Laplace (App. A.3, eq. 2)."""
    error = (torch.logit(mapped) - mu).abs()
    return math.log(2) + ln_b + torch.log(mapped) + torch.log1p(-mapped) + error * torch.exp(-ln_b)


def _mean(values: Tensor, pixel_weights: Tensor | None) -> Tensor:
    """The mean of values (B, 3, H, W), with a weight for each pixel (B, 1, H, W) where there are any."""
    if pixel_weights is None:
        return values.mean()
    return (values * pixel_weights).mean() / pixel_weights.mean()


# --- the two quantizers ---


def gumbel_softmax(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Relax a categorical choice over dim 1: softmax((logits + g) / temperature), g ~ Gumbel(0, 1); float32.

    Soft in both passes: the paper has no straight-through step (§2.1).
    """
    logits = logits.float()
    # minus the logarithm of an exponential variate is Gumbel(0, 1); in half precision it would underflow
    minus_gumbel = torch.empty_like(logits).exponential_(generator=generator).clamp_min_(1e-30).log_()
    return torch.softmax((logits - minus_gumbel) / temperature, dim=1)


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(softmax(logits) || uniform) in nats of each cell: (B, K, G, G) -> (B, G, G), between 0 and ln K.

    The plain categorical of the encoder: no temperature and no noise (App. A.2, as its author explained it).
    """
    log_p = torch.log_softmax(logits.float(), dim=1)
    return math.log(logits.shape[1]) + (log_p.exp() * log_p).sum(dim=1)  # (B, G, G)


@dataclass(frozen=True)
class FSQ:
    """Finite scalar quantization: each latent channel is bounded and rounded to one of its levels (§3)."""

    levels: tuple[int, ...]

    def bound(self, latents: Tensor) -> Tensor:
        """Squash (B, D, G, G) so that rounding leaves `level` integers a channel, from -(level // 2) up."""
        levels = self._per_channel(self.levels, latents)
        half = (levels - 1) * (1 - 1e-3) / 2
        offset = (1 - levels % 2) / 2  # an even number of levels has no middle: shift it by half a step
        return torch.tanh(latents + torch.atanh(offset / half)) * half - offset

    def quantize(self, latents: Tensor) -> Tensor:
        """Round latents (B, D, G, G) to code vectors in [-1, 1]; the gradient passes straight through."""
        bounded = self.bound(latents.float())
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / self._half_widths(latents)

    def tokens(self, codes: Tensor) -> Tensor:
        """Number code vectors (B, D, G, G) as tokens (B, G, G): mixed radix, the first channel fastest."""
        half_widths = self._half_widths(codes)
        digits = (codes.detach() * half_widths + half_widths).round().long()  # (B, D, G, G), 0 .. level - 1
        return (digits * self._per_channel(self._radices, digits)).sum(dim=1)  # (B, G, G)

    def codes(self, tokens: Tensor) -> Tensor:
        """Code vectors (B, D, G, G) in [-1, 1] of tokens (B, G, G)."""
        digits = tokens[:, None] // self._per_channel(self._radices, tokens)
        digits = (digits % self._per_channel(self.levels, tokens)).float()  # (B, D, G, G)
        half_widths = self._half_widths(digits)
        return (digits - half_widths) / half_widths

    def codebook(self, device: torch.device) -> Tensor:
        """All K code vectors, (K, D), in [-1, 1]."""
        tokens = torch.arange(math.prod(self.levels), device=device).view(-1, 1, 1)
        return self.codes(tokens)[:, :, 0, 0]

    def logits(self, latents: Tensor) -> Tensor:
        """Minus the squared distance, in steps, of latents (B, D, G, G) to each code: (B, K, G, G).

        The largest is the code that rounding picks; only analyses need all K of them.
        """
        with torch.autocast(latents.device.type, enabled=False):
            bounded = self.bound(latents.float())
            integers = self.codebook(latents.device) * self._half_widths(latents)[0, :, 0, 0]  # (K, D)
            cross = torch.einsum("kd,bdhw->bkhw", integers, bounded)
            lengths = integers.square().sum(dim=1).view(1, -1, 1, 1)
            return 2 * cross - lengths - bounded.square().sum(dim=1, keepdim=True)

    @property
    def _radices(self) -> list[int]:
        return list(accumulate((1, *self.levels[:-1]), mul))

    def _half_widths(self, like: Tensor) -> Tensor:
        return self._per_channel([level // 2 for level in self.levels], like.float())

    @staticmethod
    def _per_channel(values: Sequence[int], like: Tensor) -> Tensor:
        # built on demand: a buffer would be left undefined when the model is made on the meta device
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)


# --- blocks ---


class Conv2d(nn.Module):
    """A "same" convolution with OpenAI's names and initialisation: w ~ Normal(0, gain² / (n_in k²)), b = 0.

    With `is_fp32` it computes in float32 under autocast too, as the two 1x1 ones around the quantizer must.
    """

    def __init__(
        self, n_in: int, n_out: int, kernel: int, *, is_fp32: bool = False, gain: float = 1.0
    ) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(n_out, n_in, kernel, kernel))
        self.b = nn.Parameter(torch.zeros(n_out))
        self.is_fp32 = is_fp32
        nn.init.normal_(self.w, std=gain / math.sqrt(n_in * kernel**2))

    def forward(self, x: Tensor) -> Tensor:
        padding = self.w.shape[-1] // 2
        if self.is_fp32:
            with torch.autocast(x.device.type, enabled=False):
                return F.conv2d(x.float(), self.w.float(), self.b.float(), padding=padding)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.w.dtype)  # a bf16 model reads float32 images and float32 codes
        return F.conv2d(x, self.w, self.b, padding=padding)


class PaperBlock(nn.Module):
    """OpenAI's residual bottleneck: identity + four ReLU-convolutions times a small constant."""

    def __init__(self, n_in: int, n_out: int, kernels: Sequence[int], n_layers: int) -> None:
        super().__init__()
        n_hidden = n_out // 4
        widths = [n_in, n_hidden, n_hidden, n_hidden, n_out]
        self.post_gain = 1 / n_layers**2  # keeps the sum of all blocks small at the start (§2.1)
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels, start=1):
            layers[f"relu_{i}"] = nn.ReLU()
            layers[f"conv_{i}"] = Conv2d(widths[i - 1], widths[i], kernel)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.id_path(x) + self.post_gain * self.res_path(x)
        return out


class LightBlock(nn.Module):
    """A plain residual block: one GroupNorm, two 3x3 convolutions, the second starting small."""

    def __init__(self, d: int, n_blocks: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(N_NORM_GROUPS, d)
        self.conv_1 = Conv2d(d, d, 3, gain=math.sqrt(2))
        self.conv_2 = Conv2d(d, d, 3, gain=1 / math.sqrt(2 * n_blocks))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv_2(F.silu(self.conv_1(F.silu(self.norm(x)))))
        return out


class ChannelsLast(nn.Module):
    """Store (B, C, H, W) channels last from here on: a third faster on CPU cores, and what GPUs prefer."""

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)


def paper_encoder(config: DVAEConfig, n_out: int) -> nn.Sequential:
    """OpenAI's encoder, mapped (B, 3, H, W) -> (B, n_out, G, G): widths 1, 2, 4, 8 times d_hidden."""
    d, n_groups = config.d_hidden, 4
    blocks: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(3, d, 7))
    n_in = d
    for group in range(n_groups):
        n_group = d * 2**group
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(config.n_blocks):
            layers[f"block_{i + 1}"] = PaperBlock(n_in, n_group, (3, 3, 3, 1), n_groups * config.n_blocks)
            n_in = n_group
        if group < n_groups - 1:
            layers["pool"] = nn.MaxPool2d(2)
        blocks[f"group_{group + 1}"] = nn.Sequential(layers)
    output = OrderedDict[str, nn.Module](relu=nn.ReLU(), conv=Conv2d(n_in, n_out, 1, is_fp32=True))
    blocks["output"] = nn.Sequential(output)
    return nn.Sequential(blocks)


def paper_decoder(config: DVAEConfig, n_latent: int) -> nn.Sequential:
    """OpenAI's decoder, (B, n_latent, G, G) -> (B, 6, H, W): widths 8, 4, 2, 1 times d_hidden."""
    d, n_groups = config.d_hidden, 4
    blocks: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(n_latent, config.d_code, 1, is_fp32=True))
    n_in = config.d_code
    for group in range(n_groups):
        n_group = d * 2 ** (n_groups - 1 - group)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(config.n_blocks):
            layers[f"block_{i + 1}"] = PaperBlock(n_in, n_group, (1, 3, 3, 3), n_groups * config.n_blocks)
            n_in = n_group
        if group < n_groups - 1:
            layers["upsample"] = nn.Upsample(scale_factor=2, mode="nearest")
        blocks[f"group_{group + 1}"] = nn.Sequential(layers)
    blocks["output"] = nn.Sequential(OrderedDict[str, nn.Module](relu=nn.ReLU(), conv=Conv2d(n_in, 6, 1)))
    return nn.Sequential(blocks)


def light_encoder(config: DVAEConfig, n_out: int) -> nn.Sequential:
    """A cheap encoder, mapped (B, 3, H, W) -> (B, n_out, G, G): work at H/4 and, twice as wide, at H/8."""
    d, n_blocks = config.d_hidden, config.n_blocks
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            unshuffle=nn.PixelUnshuffle(4),  # (B, 48, H/4, W/4): no convolution at full resolution
            layout=ChannelsLast(),
            input=Conv2d(48, d, 3),
            quarter=nn.Sequential(*(LightBlock(d, n_blocks) for _ in range(n_blocks))),
            down=nn.Sequential(nn.PixelUnshuffle(2), Conv2d(4 * d, 2 * d, 1)),  # (B, 2d, G, G)
            eighth=nn.Sequential(*(LightBlock(2 * d, n_blocks) for _ in range(n_blocks))),
            norm=nn.GroupNorm(N_NORM_GROUPS, 2 * d),
            silu=nn.SiLU(),
            output=Conv2d(2 * d, n_out, 1, is_fp32=True),
        )
    )


def light_decoder(config: DVAEConfig, n_latent: int) -> nn.Sequential:
    """A cheap decoder, (B, n_latent, G, G) -> (B, 6, S, S): by default the mirror of `light_encoder`.

    Blocks at G, 2G, ..., each as wide as the config says, then one pixel shuffle to the output.
    """
    widths, n_blocks = config.light_widths, config.light_blocks
    layers = OrderedDict[str, nn.Module](
        input=Conv2d(n_latent, config.d_code, 1, is_fp32=True),
        layout=ChannelsLast(),
        widen=Conv2d(config.d_code, widths[0], 3),
    )
    for i, (name, width) in enumerate(zip(RESOLUTIONS, widths, strict=False)):
        if i:  # (B, width, 2G, 2G), then twice that
            up = nn.Sequential(Conv2d(widths[i - 1], 4 * width, 1), nn.PixelShuffle(2))
            layers["up" if i == 1 else f"up_{name}"] = up
        layers[name] = nn.Sequential(*(LightBlock(width, n_blocks) for _ in range(n_blocks)))
    shuffle = int(config.last_shuffle)
    layers["norm"] = nn.GroupNorm(N_NORM_GROUPS, widths[-1])
    layers["silu"] = nn.SiLU()
    layers["output"] = Conv2d(widths[-1], 6 * shuffle**2, 3)
    layers["shuffle"] = nn.PixelShuffle(shuffle)  # (B, 6, S, S)
    return nn.Sequential(layers)


class Encoder(nn.Module):
    """Mapped images (B, 3, H, W) -> logits (B, K, G, G) over the codes."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.fsq = FSQ(config.fsq_levels) if config.quantizer == "fsq" else None
        n_out = len(config.fsq_levels) if self.fsq else config.n_codes
        trunk = paper_encoder if config.trunk == "paper" else light_encoder
        self.blocks = trunk(config, n_out)

    def forward(self, x: Tensor) -> Tensor:
        latents: Tensor = self.blocks(x)  # (B, D, G, G)
        return self.fsq.logits(latents) if self.fsq else latents


class Decoder(nn.Module):
    """(Relaxed) one-hot codes (B, K, G, G) -> (B, 6, S, S): mu of R, G, B, then ln b of R, G, B."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.fsq = FSQ(config.fsq_levels) if config.quantizer == "fsq" else None
        n_latent = len(config.fsq_levels) if self.fsq else config.n_codes
        trunk = paper_decoder if config.trunk == "paper" else light_decoder
        self.blocks = trunk(config, n_latent)

    def forward(self, z: Tensor) -> Tensor:
        if self.fsq:
            with torch.autocast(z.device.type, enabled=False):
                z = torch.einsum("bkhw,kd->bdhw", z.float(), self.fsq.codebook(z.device))
        out: Tensor = self.blocks(z)
        return out

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """Equal to `forward` of the one-hot of tokens (B, G, G), without building K channels."""
        if self.fsq:
            out: Tensor = self.blocks(self.fsq.codes(tokens))
            return out
        # the 1x1 input convolution of a one-hot picks one column of its weight: that is the codebook
        codebook = self.blocks.get_submodule("input")
        assert isinstance(codebook, Conv2d)
        x = F.embedding(tokens, codebook.w[:, :, 0, 0].float().T) + codebook.b.float()  # (B, G, G, d_code)
        out = self.blocks[1:](x.permute(0, 3, 1, 2))
        return out


class DiscreteVAE(nn.Module):
    """The dVAE: encoder, quantizer, decoder and their loss (§2.1)."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, images: Tensor) -> Tensor:
        """Most likely tokens (B, G, G), int64 in [0, K), of images (B, 3, H, W) in [0, 1]; no noise."""
        latents = self._latents(images)
        if self.encoder.fsq:
            return self.encoder.fsq.tokens(self.encoder.fsq.quantize(latents))
        return latents.argmax(dim=1)  # (B, G, G)

    @property
    def image_size(self) -> int:
        """Side of the pictures that are read, in pixels."""
        return self.config.image_size

    @property
    def output_size(self) -> int:
        """Side of the pictures that are drawn, in pixels, S."""
        return self.config.output_size

    @property
    def grid_size(self) -> int:
        """Tokens a side, G."""
        return self.config.grid_size

    @property
    def has_encoder(self) -> bool:
        """Whether it can read pictures."""
        return True

    @property
    def n_codes(self) -> int:
        """Size of the codebook, K."""
        return self.config.n_codes

    def decode(self, tokens: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] of tokens (B, G, G) in [0, K), or the top of them of the first grid rows.

        Raises ValueError for other tokens.
        """
        grid, n_codes = self.config.grid_size, self.config.n_codes
        if tokens.ndim != 3 or tokens.shape[2] != grid or not 1 <= tokens.shape[1] <= grid:
            shape = tuple(tokens.shape)
            raise ValueError(f"tokens have shape {shape}; this dVAE decodes (batch, {grid}, {grid})")
        tokens = tokens.long()
        low, high = (int(tokens.min()), int(tokens.max())) if tokens.numel() else (0, 0)
        if not 0 <= low <= high < n_codes:
            raise ValueError(f"tokens range from {low} to {high}; this dVAE has codes 0 to {n_codes - 1}")
        return self.pixels(self.decoder.from_tokens(tokens))

    def reconstruct(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] to hard tokens and decode them: (B, 3, S, S)."""
        return self.decode(self.encode(images))

    def loss(
        self,
        images: Tensor,
        *,
        temperature: float,
        kl_weight: float,
        generator: torch.Generator | None,
        distance: Callable[[Tensor, Tensor], Tensor] | None = None,
        pixel_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Negative ELBO of images (B, 3, H, W) in [0, 1], nats per sub-pixel, and its parts (App. A.2).

        (reconstruction summed over 3HW + kl_weight * KL summed over G² cells) / 3HW, averaged over the batch.
        The metrics, all detached: `reconstruction` (per sub-pixel), `kl` (nats per cell; 0 for FSQ), `mse` of
        the training path in [0, 1], `perplexity` of the code use within this batch (1 to K).
        `temperature`, `kl_weight` and `generator` concern the gumbel quantizer only. `distance` of the
        reconstructions from the images is added, and a metric too; `pixel_weights` (B, 1, H, W) say what each pixel
        counts in the reconstruction's mean (differs: the paper has its likelihood alone, and all pixels count alike).
        Where the decoder draws more pixels than the encoder reads, the images are of the size that it draws, and the
        encoder is given them averaged down.
        """
        latents = self._latents(box_filtered(images, self.config.image_size))  # (B, D, G, G)
        if self.encoder.fsq:
            codes = self.encoder.fsq.quantize(latents)
            out = self.decoder.blocks(codes)
            kl = latents.new_zeros(())
            used = torch.bincount(self.encoder.fsq.tokens(codes).flatten(), minlength=self.config.n_codes)
            code_use = used / used.sum()
        else:
            out = self.decoder(gumbel_softmax(latents, temperature, generator))
            kl = kl_to_uniform(latents).mean()
            code_use = torch.softmax(latents.detach().float(), dim=1).mean(dim=(0, 2, 3))
        with torch.autocast(images.device.type, enabled=False):
            reconstruction = self._reconstruction(images.float(), out.float(), pixel_weights)
            n_cells, n_subpixels = latents.shape[-1] * latents.shape[-2], images[0].numel()
            total = reconstruction + kl_weight * kl * n_cells / n_subpixels
            mse = F.mse_loss(self.pixels(out.detach()), images.float())
            perplexity = torch.exp(torch.special.entr(code_use).sum())
        metrics = {"reconstruction": reconstruction, "kl": kl, "mse": mse, "perplexity": perplexity}
        if distance is not None:
            metrics["distance"] = distance(relaxed_pixels(out), images)
            total = total + metrics["distance"]
        return total, {name: value.detach() for name, value in metrics.items()}

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str]) -> Self:
        """Read config.json and model.safetensors of a component folder; ValueError when they are damaged."""
        return load_module(folder, DVAEConfig, cls, "dvae")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors to a component folder."""
        save_component(Path(folder), self.config, {k: v.contiguous() for k, v in self.state_dict().items()})

    def _latents(self, images: Tensor) -> Tensor:
        side = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            shape = tuple(images.shape)
            raise ValueError(f"images have shape {shape}; this dVAE reads (batch, 3, {side}, {side})")
        latents: Tensor = self.encoder.blocks(map_pixels(images))
        return latents

    def _reconstruction(self, images: Tensor, out: Tensor, pixel_weights: Tensor | None) -> Tensor:
        mu, ln_b = out.chunk(2, dim=1)  # (B, 3, H, W) each
        if self.config.likelihood == "logit_laplace":
            ln_b = ln_b.clamp(self.config.min_ln_b, MAX_LN_B)
            return _mean(logit_laplace_nll(map_pixels(images), mu, ln_b), pixel_weights)
        error = relaxed_pixels(out) - images
        return _mean(error.square(), pixel_weights) + L1_WEIGHT * _mean(error.abs(), pixel_weights)

    @staticmethod
    def pixels(out: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] of what the decoder gives, (B, 6, S, S)."""
        return unmap_pixels(torch.sigmoid(out[:, :3].float()))  # ln b plays no part (App. A.3)
