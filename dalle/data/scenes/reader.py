"""Reading the word in a picture, by an OCR model that knows nothing of our words or fonts.

Source: PP-OCRv4's recognition model (PaddleOCR, Apache-2.0), which the wheel of rapidocr-onnxruntime holds: nothing
is downloaded. A nearest-of-candidates comparison would read a blot as some word; this reads what is there.
"""

import re
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dalle.data.scenes.checkers import Pixels, read

_SCALE = 3  # the model reads lines 48 pixels high
_FLATTEN = 0.6  # our capitals are taller than those of running text
_MARGIN = 24  # pixels around the word
_LOOKALIKES = str.maketrans("01", "OI")  # words hold no digits


class WordReader:
    """Read the one word of a picture of lettering."""

    def __init__(self) -> None:
        """Load the model; ValueError where the package is not installed."""
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise ValueError(
                "reading words needs rapidocr-onnxruntime: pip install 'dalle[ocr]' (Python 3.11 or 3.12)"
            ) from error
        self._engine: Any = RapidOCR(intra_op_num_threads=1)

    def __call__(self, picture: Pixels) -> str:
        """Return the letters in a picture (H, W, 3) uint8, in capitals; empty where nothing is read."""
        line = _line_of(picture)
        if line is None:
            return ""
        found, _ = self._engine(line, use_det=False, use_cls=False, use_rec=True)
        text = str(found[0][0]) if found else ""
        return re.sub("[^A-Z]", "", text.upper().translate(_LOOKALIKES))

    def shows(self, picture: Pixels, word: str) -> bool:
        """Return whether a picture is read as exactly this word, in capitals."""
        return self(picture) == word


def _line_of(picture: Pixels) -> Pixels | None:
    """Return the ink as a line of dark letters on white (h, w, 3); None for a picture without ink."""
    seen = read(picture)
    if not seen.ink.any():
        return None
    darkness = seen.distance / np.percentile(seen.distance, 99).clip(1.0)
    grey = Image.fromarray(np.rint(255 * (1 - darkness.clip(0, 1))).astype(np.uint8))
    grey = grey.resize((_SCALE * grey.width, _SCALE * grey.height), Image.Resampling.BICUBIC)
    ink = grey.point(lambda value: 255 if value < 160 else 0)
    line = ImageOps.expand(grey.crop(ink.getbbox()), _MARGIN, fill=255)
    line = line.resize((line.width, round(line.height * _FLATTEN)))
    return np.asarray(line.convert("RGB"))
