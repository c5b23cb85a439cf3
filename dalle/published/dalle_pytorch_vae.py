"""DALLE-pytorch's own dVAE: strided convolutions, residual blocks, one code for each cell.

Source: lucidrains/DALLE-pytorch, `DiscreteVAE`. Only encoding and decoding: its training loss has faults (a KL term that
grows with the batch), so new tokenizers are trained as `dalle.dvae`.
differs: pictures are brought back from normalised space; there, they are saved stretched to the brightest and darkest.

Shapes: B batch, H = W image side, G grid side, K codes, D code width.
"""

from __future__ import annotations

from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from dalle.config import Config
from dalle.published.saved import SavedImageTokenizer
from dalle.published.vqgan import check_tokens

Count = Annotated[int, Field(gt=0)]


class DallePytorchVAEConfig(Config):
    """Sizes of a `DallePytorchVAE`; DALLE-pytorch's names are in brackets."""

    image_size: Count  # pixels a side
    n_codes: Count  # K [num_tokens]
    d_code: Count  # D [codebook_dim]
    n_layers: Annotated[int, Field(gt=0, le=10)]  # each halves the image [num_layers]
    n_blocks: Annotated[int, Field(ge=0)]  # residual blocks [num_resnet_blocks]
    d_hidden: Count  # [hidden_dim]
    pixel_mean: tuple[float, float, float] = (
        0.5,
        0.5,
        0.5,
    )  # of the pixels that the encoder reads [normalization]
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @property
    def grid_size(self) -> int:
        """Tokens a side, G."""
        return self.image_size >> self.n_layers


class Block(nn.Module):
    """x + three convolutions with ReLU between them."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(n, n, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(n, n, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(n, n, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, h, w) -> the same shape."""
        return cast(Tensor, x + self.layers(x))


class DallePytorchVAE(SavedImageTokenizer):
    """An image tokenizer: images to a grid of codes and back."""

    schema = DallePytorchVAEConfig
    config: DallePytorchVAEConfig

    def __init__(self, config: DallePytorchVAEConfig) -> None:
        super().__init__(config)
        d, n_layers = config.d_hidden, config.n_layers
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        d_first = d if config.n_blocks else config.d_code
        for i in range(n_layers):
            down += [nn.Conv2d(d if i else 3, d, 4, stride=2, padding=1), nn.ReLU()]
            up += [nn.ConvTranspose2d(d if i else d_first, d, 4, stride=2, padding=1), nn.ReLU()]
        blocks = [[Block(d) for _ in range(config.n_blocks)] for _ in range(2)]
        widen = [nn.Conv2d(config.d_code, d, 1)] if config.n_blocks else []
        self.codebook = nn.Embedding(config.n_codes, config.d_code)
        self.encoder = nn.Sequential(*down, *blocks[0], nn.Conv2d(d, config.n_codes, 1))
        self.decoder = nn.Sequential(*widen, *blocks[1], *up, nn.Conv2d(d, 3, 1))

    @property
    def has_encoder(self) -> bool:
        """Whether it can read pictures."""
        return True

    def logits(self, images: Tensor) -> Tensor:
        """Return logits (B, K, G, G) of images (B, 3, H, W) in [0, 1]; ValueError for another size."""
        size = self.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(
                f"images have shape {tuple(images.shape)}; this dVAE reads (batch, 3, {size}, {size})"
            )
        mean, std = self._pixel_statistics(images)
        return cast(Tensor, self.encoder(((images - mean) / std).to(self.codebook.weight.dtype)))

    def encode(self, images: Tensor) -> Tensor:
        """Return the likeliest tokens (B, G, G) int64 of images (B, 3, H, W) in [0, 1]; errors as `logits`."""
        return self.logits(images).argmax(dim=1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the top of images, (B, 3, g * H / G, W) in [0, 1], of the first g grid rows of tokens, (B, g, G).

        Raises ValueError for more rows, or codes that are not in [0, K).
        """
        check_tokens(tokens, self.grid_size, self.n_codes)
        out = self.decoder(self.codebook(tokens.long()).permute(0, 3, 1, 2)).float()
        mean, std = self._pixel_statistics(out)
        return cast(Tensor, (out * std + mean).clamp(0, 1))

    def _pixel_statistics(self, like: Tensor) -> list[Tensor]:
        values = (self.config.pixel_mean, self.config.pixel_std)
        return [torch.tensor(value, device=like.device).view(1, 3, 1, 1) for value in values]
