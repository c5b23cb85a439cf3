"""VQGAN: a convolutional autoencoder with a codebook of vectors; the image tokenizer of most published models.

Source: Esser et al. 2021 (arXiv 2012.09841) and CompVis/taming-transformers; the Gumbel variant is theirs too (f8-8192,
also ru-dalle's). min-dalle's "detokenizer" is the decoder alone, of a VQGAN whose pixels lie in [0, 1].

Shapes: B batch, H = W image side, G grid side, K codes, D code width, C channels.
"""

from itertools import pairwise
from typing import Annotated, Literal, Self, cast

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dalle.config import Config
from dalle.published.saved import SavedImageTokenizer

N_NORM_GROUPS = 32
Count = Annotated[int, Field(gt=0)]


class VQGANConfig(Config):
    """Sizes of a `VQGAN`; taming's names are in brackets."""

    image_size: Count  # pixels a side [resolution]
    n_codes: Count  # K [n_embed]
    d_code: Count  # width of a code vector [embed_dim]
    d_latent: Count  # channels between the convolutions and the codes [z_channels]
    d_hidden: Count  # channels at full resolution, a multiple of 32 [ch]
    multipliers: tuple[
        Count, ...
    ]  # of d_hidden, one a level, finest first; each level but the first halves [ch_mult]
    n_blocks: Count  # residual blocks a level [num_res_blocks]
    attention_sizes: tuple[Count, ...]  # image sides at which every block attends [attn_resolutions]
    quantizer: Literal["nearest", "gumbel"]  # the nearest code vector, or the likeliest by a 1x1 convolution
    is_signed: bool = True  # pixels lie in [-1, 1], not in [0, 1]
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    has_encoder: bool = True  # some are published as decoders only

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.d_hidden % N_NORM_GROUPS:
            raise ValueError(f"d_hidden is {self.d_hidden}; it must be a multiple of {N_NORM_GROUPS}")
        if self.image_size % self.downsampling:
            raise ValueError(f"image_size is {self.image_size}; it must be a multiple of {self.downsampling}")
        if max(self.multipliers) > 64 or len(self.multipliers) > 10 or self.n_blocks > 64:
            raise ValueError("multipliers or n_blocks are those of no VQGAN")
        return self

    @property
    def downsampling(self) -> int:
        """Image side / grid side."""
        return 1 << (len(self.multipliers) - 1)

    @property
    def grid_size(self) -> int:
        """Tokens a side, G."""
        return self.image_size // self.downsampling


class ResidualBlock(nn.Module):
    """x + two 3x3 convolutions, each after GroupNorm and swish."""

    def __init__(self, n_in: int, n_out: int, eps: float) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(N_NORM_GROUPS, n_in, eps)
        self.conv_1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.norm_2 = nn.GroupNorm(N_NORM_GROUPS, n_out, eps)
        self.conv_2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, n_in, h, w) -> (B, n_out, h, w)."""
        branch = self.conv_1(F.silu(self.norm_1(x)))
        branch = self.conv_2(F.silu(self.norm_2(branch)))
        return cast(Tensor, self.shortcut(x) + branch)


class AttentionBlock(nn.Module):
    """x + one head of attention over all positions of a feature map."""

    def __init__(self, n: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(N_NORM_GROUPS, n, eps)
        self.q = nn.Conv2d(n, n, 1)
        self.k = nn.Conv2d(n, n, 1)
        self.v = nn.Conv2d(n, n, 1)
        self.out = nn.Conv2d(n, n, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, h, w) -> the same shape."""
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).mT[:, None] for part in (self.q, self.k, self.v))  # (B, 1, h w, n)
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x.shape)
        return cast(Tensor, x + self.out(mixed))


class Downsample(nn.Module):
    """Halve a feature map by a strided convolution, padded on the right and below only."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n, n, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, h, w) -> (B, n, h / 2, w / 2)."""
        return cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1))))


class Upsample(nn.Module):
    """Double a feature map: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n, n, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, h, w) -> (B, n, 2 h, 2 w)."""
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


class Level(nn.Module):
    """The blocks at one resolution, each followed by attention where the config says so, then a change of size."""

    def __init__(
        self, widths: list[int], has_attention: bool, resize: type[Downsample | Upsample] | None, eps: float
    ) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.blocks = nn.ModuleList(ResidualBlock(n_in, n_out, eps) for n_in, n_out in pairs)
        self.attention = nn.ModuleList(AttentionBlock(n, eps) for _, n in pairs if has_attention)
        self.resize = resize(widths[-1]) if resize else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, n_in, h, w) -> (B, n_out, h', w')."""
        for i, block in enumerate(self.blocks):
            x = block(x)
            if len(self.attention):
                x = self.attention[i](x)
        return cast(Tensor, self.resize(x))


class Middle(nn.Module):
    """Two blocks with attention between them, at the coarsest resolution."""

    def __init__(self, n: int, eps: float) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(n, n, eps)
        self.attention = AttentionBlock(n, eps)
        self.block_2 = ResidualBlock(n, n, eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, h, w) -> the same shape."""
        return cast(Tensor, self.block_2(self.attention(self.block_1(x))))


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> latents (B, d_latent, G, G)."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.d_hidden * m for m in config.multipliers]
        self.input = nn.Conv2d(3, config.d_hidden, 3, padding=1)
        self.levels = nn.ModuleList()
        n_in, last = config.d_hidden, len(widths) - 1
        for i, n in enumerate(widths):
            attends = config.image_size >> i in config.attention_sizes
            resize = Downsample if i < last else None
            self.levels.append(Level([n_in, *[n] * config.n_blocks], attends, resize, config.norm_eps))
            n_in = n
        self.middle = Middle(n_in, config.norm_eps)
        self.norm = nn.GroupNorm(N_NORM_GROUPS, n_in, config.norm_eps)
        self.output = nn.Conv2d(n_in, config.d_latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Run all levels, finest first."""
        x = self.input(x)
        for level in self.levels:
            x = level(x)
        return cast(Tensor, self.output(F.silu(self.norm(self.middle(x)))))


class Decoder(nn.Module):
    """Latents (B, d_latent, G, G) -> images (B, 3, H, W)."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.d_hidden * m for m in config.multipliers]
        n_in, last = widths[-1], len(widths) - 1
        self.input = nn.Conv2d(config.d_latent, n_in, 3, padding=1)
        self.middle = Middle(n_in, config.norm_eps)
        self.levels = nn.ModuleList()  # coarsest first
        for i in range(last, -1, -1):
            attends = config.image_size >> i in config.attention_sizes
            sizes = [n_in, *[widths[i]] * (config.n_blocks + 1)]
            self.levels.append(Level(sizes, attends, Upsample if i > 0 else None, config.norm_eps))
            n_in = widths[i]
        self.norm = nn.GroupNorm(N_NORM_GROUPS, n_in, config.norm_eps)
        self.output = nn.Conv2d(n_in, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Run all levels, coarsest first."""
        x = self.middle(self.input(x))
        for level in self.levels:
            x = level(x)
        return cast(Tensor, self.output(F.silu(self.norm(x))))


class VQGAN(SavedImageTokenizer):
    """An image tokenizer: images to a grid of codes and back."""

    schema = VQGANConfig
    config: VQGANConfig

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config)
        if config.has_encoder:
            self.encoder = Encoder(config)
            self.to_code = nn.Conv2d(config.d_latent, config.d_code, 1)
            if config.quantizer == "gumbel":
                self.to_logits = nn.Conv2d(config.d_code, config.n_codes, 1)
        self.codebook = nn.Embedding(config.n_codes, config.d_code)
        self.from_code = nn.Conv2d(config.d_code, config.d_latent, 1)
        self.decoder = Decoder(config)

    @property
    def has_encoder(self) -> bool:
        """Whether it can read pictures."""
        return self.config.has_encoder

    def latents(self, images: Tensor) -> Tensor:
        """Return what the quantizer reads, (B, D, G, G), of images (B, 3, H, W) in [0, 1].

        Raises ValueError for images of another size, and for a model that was published without its encoder.
        """
        if not self.config.has_encoder:
            raise ValueError(
                "this VQGAN was published without its encoder: it can draw, but not read pictures"
            )
        size = self.config.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(
                f"images have shape {tuple(images.shape)}; this VQGAN reads (batch, 3, {size}, {size})"
            )
        images = images.to(self.codebook.weight.dtype)
        return cast(Tensor, self.to_code(self.encoder(2 * images - 1 if self.config.is_signed else images)))

    def encode(self, images: Tensor) -> Tensor:
        """Return tokens (B, G, G) int64 in [0, K) of images (B, 3, H, W) in [0, 1]; errors as `latents`."""
        latents = self.latents(images)
        if self.config.quantizer == "gumbel":
            return cast(Tensor, self.to_logits(latents)).argmax(dim=1)
        return nearest_codes(latents, self.codebook.weight)

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the top of images, (B, 3, g * H / G, W) in [0, 1], of the first g grid rows of tokens, (B, g, G).

        Raises ValueError for more rows, or codes that are not in [0, K).
        """
        check_tokens(tokens, self.grid_size, self.n_codes)
        codes = self.codebook(tokens.long()).permute(0, 3, 1, 2)  # (B, D, G, G)
        pixels: Tensor = self.decoder(self.from_code(codes)).float()
        return (((pixels + 1) / 2) if self.config.is_signed else pixels).clamp(0, 1)


def check_tokens(tokens: Tensor, grid: int, n_codes: int) -> None:
    """Raise ValueError for tokens that are not (batch, 1..grid, grid) or not in [0, n_codes)."""
    if tokens.ndim != 3 or tokens.shape[2] != grid or not 0 < tokens.shape[1] <= grid:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}; decoded are (batch, up to {grid}, {grid})"
        )
    low, high = (int(tokens.min()), int(tokens.max())) if tokens.numel() else (0, 0)
    if not 0 <= low <= high < n_codes:
        raise ValueError(f"tokens range from {low} to {high}; there are codes 0 to {n_codes - 1}")


def nearest_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """Return the index (B, G, G) of the code vector (K, D) nearest to each latent (B, D, G, G)."""
    flat = latents.permute(0, 2, 3, 1).flatten(0, 2).float()  # (M, D)
    codes = codebook.float()
    # |z|² is the same for all codes.
    distances = codes.square().sum(dim=1) - 2 * flat @ codes.T  # (M, K)
    return distances.argmin(dim=1).view(latents.shape[0], *latents.shape[2:])
