"""The fields of an image request: what each means and its range, for CLI help, HTTP schemas and the page.

Plain facts without pydantic, so that `dalle --help` need not load it. The fields themselves are in `ImageRequest`.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_SEED = 2**63 - 1


class FieldFacts(NamedTuple):
    """What people are told of a field."""

    help: str
    low: float | None = None  # the least that is allowed
    high: float | None = None  # the most


FIELDS = {
    "prompt": FieldFacts("What to draw."),
    "num_images_per_prompt": FieldFacts("Pictures a caption.", 1),
    "num_candidates": FieldFacts("Candidates per caption; CLIP keeps the best.", 1),
    "seed": FieldFacts("Picture i uses seed + i.", 0, MAX_SEED),
    "temperature": FieldFacts("Lower is safer; 0 draws the likeliest token.", 0, 100),
    # No vocabulary is larger than uint16 can count.
    "top_k": FieldFacts("Draw among the k likeliest tokens; 0: all.", 0, 2**16),
    "top_p": FieldFacts("Draw among the likeliest tokens that make up this share, above 0.", 0, 1),
    "guidance": FieldFacts("1: none; larger follows the caption more closely.", 0, 100),
    "image": FieldFacts("Complete this picture; with keep_rows or mask."),
    "keep_rows": FieldFacts("Token rows kept from the top of the picture.", 1),
    "mask": FieldFacts("Picture whose transparent (or, without transparency, white) parts are drawn anew."),
    "truncate": FieldFacts("Cut captions that are too long, and say so."),
}
