"""Which temperature and guidance a model should draw with: nearest of 100 on `combo` pictures that are not `combo_hard`.

    python benchmarks/sampling_sweep.py MODEL ART [--limit 192]

The hard rows are left for the report: settings must not be chosen on the pictures that they are judged by.
"""

import argparse
import json
from pathlib import Path

from dalle.data.pairs import read_pairs
from dalle.evaluation.protocols import PictureReader, draw, nearest_of_100, zero_shot_rows
from dalle.evaluation.sheets import spread
from dalle.generation.request import GenerationOptions
from dalle.pipeline import DallePipeline

SETTINGS = [  # temperature, guidance
    (1.0, 1.0),
    (1.0, 3.0),
    (0.7, 2.0),
    (0.7, 4.0),
    (0.7, 6.0),
    (0.4, 2.0),
    (0.4, 4.0),
    (0.4, 6.0),
    (0.0, 3.0),
    (0.0, 5.0),
]


def main() -> None:
    """Print one JSON line a setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("art", type=Path)
    parser.add_argument("--limit", type=int, default=192)
    arguments = parser.parse_args()
    pipe, pairs = DallePipeline.from_pretrained(arguments.model), read_pairs(arguments.art)
    hard = set(zero_shot_rows(pairs))
    easy = [index for index, pair in enumerate(pairs) if pair.split == "combo" and index not in hard]
    rows = spread(easy, arguments.limit)
    reader = PictureReader(pipe.dvae.config.image_size)
    for temperature, guidance in SETTINGS:
        pipe.defaults = GenerationOptions(temperature=temperature, guidance=guidance)
        tokens, seconds = draw(pipe, [pairs[row].captions[0] for row in rows], 0, lambda _: None)
        figures = nearest_of_100(pipe, pairs, rows, tokens, reader, lambda _: None)
        row = {
            "temperature": temperature,
            "guidance": guidance,
            "seconds": round(seconds, 1),
            **figures["draws"],
        }  # type: ignore[dict-item]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
