"""DALL·E as one small package: train it on captioned pictures, then draw, complete, rank, evaluate and serve.

Source: Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021 (arXiv 2102.12092).
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dalle.clip import CLIP
    from dalle.dvae import DiscreteVAE
    from dalle.evaluation.report import evaluate
    from dalle.generation.request import ImageRequest
    from dalle.pipeline import DallePipeline
    from dalle.published.vqgan import VQGAN
    from dalle.tokenizer import Tokenizer
    from dalle.training.train import train
    from dalle.transformer import Transformer

__version__ = "0.1.0"
__all__ = [
    "CLIP",
    "VQGAN",
    "DallePipeline",
    "DiscreteVAE",
    "ImageRequest",
    "Tokenizer",
    "Transformer",
    "__version__",
    "evaluate",
    "train",
]

_HOMES = {
    "CLIP": "dalle.clip",
    "DallePipeline": "dalle.pipeline",
    "DiscreteVAE": "dalle.dvae",
    "ImageRequest": "dalle.generation.request",
    "Tokenizer": "dalle.tokenizer",
    "Transformer": "dalle.transformer",
    "VQGAN": "dalle.published.vqgan",
    "evaluate": "dalle.evaluation.report",
    "train": "dalle.training.train",
}


def __getattr__(name: str) -> object:
    # Lazy, so that `import dalle` loads neither torch nor the models.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dalle' has no attribute {name!r}")
