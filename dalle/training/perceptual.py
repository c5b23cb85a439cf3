"""How far two pictures are from each other in the eyes of a fixed network: a loss that keeps edges sharp.

Source: Zhang et al. 2018 (LPIPS, arXiv 1801.03924), §3, without its learned weights; Gu et al. 2022 (SeQ-GAN), which trains
tokens by such a loss. The network is EfficientNet-Lite0 (Apache-2.0), early maps only: they see lines and textures.
Shapes: B batch, S picture side in pixels.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dalle.evaluation.efficientnet import EfficientNetLite, load_efficientnet

NETWORK = "lite0"
AFTER = (-1, 1, 3, 5)  # the stem and blocks whose maps are compared: at S / 2, S / 4, S / 8, S / 16


class FeatureDistance:
    """Squared distance of unit feature vectors, averaged over places and pictures, summed over maps; 0 to 4 per map.

    Raises ValueError when the package of the network's weights is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        network = load_efficientnet(NETWORK)
        fold_batch_norms_(network)
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def __call__(self, drawn: Tensor, true: Tensor) -> Tensor:
        """Distance of pictures `drawn` from `true`, both (B, 3, S, S) in [0, 1]; differentiable in `drawn`."""
        # float32: on CPUs the backward pass of a depthwise convolution in bfloat16 takes longer
        with torch.autocast(drawn.device.type, enabled=False):
            with torch.no_grad():
                wanted = [_unit(found) for found in self._maps(true)]
            distances = [
                (_unit(found) - one).square().sum(dim=1).mean()
                for found, one in zip(self._maps(drawn), wanted, strict=True)
            ]
            return torch.stack(distances).sum()

    def _maps(self, pictures: Tensor) -> list[Tensor]:
        found: list[Tensor] = self.network.maps(
            pictures.float().contiguous(memory_format=torch.channels_last), AFTER
        )
        return found


def _unit(features: Tensor) -> Tensor:
    """Feature vectors (B, C, h, w) at length 1."""
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-6).sqrt()


@torch.no_grad()
def fold_batch_norms_(network: EfficientNetLite) -> None:
    """Put the scale and shift of each batch norm into the convolution before it: a quarter of the time."""
    _fold_(network, "conv_stem", "bn0")
    for block in network.blocks:
        if hasattr(block, "expand_conv"):
            _fold_(block, "expand_conv", "bn0")
        _fold_(block, "depthwise_conv", "bn1")
        _fold_(block, "project_conv", "bn2")


def _fold_(module: nn.Module, convolution: str, norm: str) -> None:
    conv, batch_norm = module.get_submodule(convolution), module.get_submodule(norm)
    assert isinstance(conv, nn.Conv2d) and isinstance(batch_norm, nn.BatchNorm2d)
    assert batch_norm.running_mean is not None and batch_norm.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        batch_norm.running_mean,
        batch_norm.running_var,
        batch_norm.eps,
        batch_norm.weight,
        batch_norm.bias,
    )
    conv.weight, conv.bias = weight.requires_grad_(False), bias.requires_grad_(False)
    setattr(module, norm, nn.Identity())
