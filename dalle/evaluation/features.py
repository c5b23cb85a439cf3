"""Networks that turn pictures into features, behind one protocol: every number names the network and its sha256.

Numbers of different networks are never comparable: a Fréchet distance on EfficientNet-Lite0 is called FD-efflite, never
FID. FID is what an Inception of 2015 gives, which the user brings as a TorchScript file.
Shapes: B batch, H and W picture sides in pixels, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.evaluation.efficientnet import load_efficientnet, weights_path
from dalle.files import file_sha256
from dalle.generation.rerank import Ranker

BATCH = 32


class FeatureExtractor(Protocol):
    """Pictures (B, 3, H, W) in [0, 1] to features (B, D) float32, and perhaps to class probabilities (B, K)."""

    name: str  # with the size that pictures are brought to
    sha256: str  # of its weights

    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return features and class probabilities, both on the CPU; None for a network without classes."""
        ...


class EfficientNetFeatures:
    """EfficientNet-Lite: the features before its classifier, and its 1,000 ImageNet classes."""

    def __init__(self, variant: str = "lite0", side: int = 128) -> None:
        """`side`: in pixels, to which pictures are brought. ValueError when its package is not installed."""
        self._network, self._side = load_efficientnet(variant), side
        self.name = f"efficientnet-{variant}@{side}"
        self.sha256 = file_sha256(weights_path(variant))

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, 1280) and probabilities (B, 1000)."""
        features = self._network(resized(pictures, self._side))
        return features, self._network.fc(features).softmax(dim=-1)


class ClipFeatures:
    """A CLIP's unit vectors of pictures."""

    def __init__(self, ranker: Ranker) -> None:
        self._ranker = ranker
        self.name = f"clip of {ranker.name}@{ranker.clip.config.image_size}"
        self.sha256 = ranker.sha256 or "unsaved"

    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        """Unit vectors (B, E); a CLIP has no classes."""
        return self._ranker.encode_pictures(self._ranker.clip.fit(pictures)), None


class ScriptedFeatures:
    """A TorchScript file that maps 8-bit pictures to features, as the published Inception of FID does.

    Its `forward` takes (B, 3, H, W) uint8 and returns (B, D); one that has an argument `return_features`, as the file
    inception-2015-12-05.pt, is asked for these and, without it, for class probabilities.
    """

    def __init__(self, path: Path) -> None:
        """ValueError when the file is no TorchScript module."""
        try:
            self._module: Any = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
            arguments = [argument.name for argument in self._module.forward.schema.arguments]
        except (RuntimeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is no TorchScript module: {str(error).splitlines()[0]}") from None
        self._has_classes = "return_features" in arguments
        self.name, self.sha256 = path.name, file_sha256(path)

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the file's module returns, in float32."""
        values = (pictures.clamp(0, 1) * 255).round().to(torch.uint8)
        if not self._has_classes:
            return self._module(values).float(), None
        return self._module(values, return_features=True).float(), self._module(values).float()


def resized(pictures: Tensor, side: int) -> Tensor:
    """Bring square pictures (B, 3, H, H) to (B, 3, side, side): bilinear, averaged where they shrink."""
    if pictures.shape[-1] == side:
        return pictures
    return F.interpolate(pictures, size=(side, side), mode="bilinear", antialias=True, align_corners=False)


def extract(
    extractor: FeatureExtractor, batches: Iterable[Tensor], advance: Callable[[int], None] = lambda n: None
) -> tuple[Tensor, Tensor | None]:
    """Features (N, D) and probabilities (N, K), or None, of all pictures (n, 3, H, W) of the batches."""
    features, probabilities = list[Tensor](), list[Tensor]()
    for pictures in batches:
        for part in torch.split(pictures, BATCH):
            found, classes = extractor(part)
            features.append(found)
            probabilities += [] if classes is None else [classes]
            advance(len(part))
    if not features:
        return torch.zeros(0, 1), None
    return torch.cat(features), torch.cat(probabilities) if probabilities else None
