"""GenerationOptions: how the next image token is chosen from the transformer's logits.

Source: the paper samples at temperature 1 with nothing cut off (§2.6); top-k, top-p and guidance came later.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dalle.config import Config


class GenerationOptions(Config):
    """Sampling settings of one call; the defaults are the paper's.

    Raises:
        ValueError: a setting is outside the range named beside it.
    """

    # Divides the logits; 0 takes the most likely token (argmax, as for the blog's Raven's matrices).
    temperature: Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)] = 1.0
    # Only the k most likely tokens can be drawn; None: all. No vocabulary is larger than uint16 can count.
    top_k: Annotated[int, Field(ge=1, le=2**16)] | None = None
    # Only the fewest tokens whose probabilities add up to p can be drawn; None: all.
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    # s in uncond + s * (cond - uncond), Ho & Salimans 2022; 1 is no guidance, 0 ignores the caption.
    guidance: Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)] = 1.0
