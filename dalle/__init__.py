"""DALL·E as one small package: train it on captioned pictures, then draw, complete, rank, evaluate and serve.

Source: Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021 (arXiv 2102.12092).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dalle.pipeline import DallePipeline

__version__ = "0.1.0"
__all__ = ["DallePipeline", "__version__"]


def __getattr__(name: str) -> object:
    # Lazy, so that `import dalle` loads neither torch nor the models.
    if name == "DallePipeline":
        from dalle.pipeline import DallePipeline

        return DallePipeline
    raise AttributeError(f"module 'dalle' has no attribute {name!r}")
