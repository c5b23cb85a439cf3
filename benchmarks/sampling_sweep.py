"""Which temperature and guidance a model should draw with: retrieval of `combo` pictures that are not `combo_hard`.

    python benchmarks/sampling_sweep.py MODEL ART [--limit 192] [--candidates 16]

Each setting is judged by one draw and by the one that the model's CLIP chooses, in both galleries.

The hard rows are left for the report: settings must not be chosen on the pictures that they are judged by.
"""

import argparse
import json
import time
from pathlib import Path

from dalle.data.pairs import read_pairs
from dalle.evaluation.galleries import Galleries, Thumbnails, zero_shot_rows
from dalle.evaluation.pictures import PictureReader
from dalle.evaluation.protocols import draw
from dalle.evaluation.retrieval import Retrieval, decoded
from dalle.evaluation.sheets import spread
from dalle.evaluation.subject import CANDIDATES
from dalle.generation.request import ModelDefaults
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
    parser.add_argument("--candidates", type=int, default=CANDIDATES)
    arguments = parser.parse_args()
    pipe, pairs = DallePipeline.from_pretrained(arguments.model), read_pairs(arguments.art)
    hard = set(zero_shot_rows(pairs))
    easy = [index for index, pair in enumerate(pairs) if pair.split == "combo" and index not in hard]
    rows = spread(easy, arguments.limit)
    captions = [pairs[row].captions[0] for row in rows]
    galleries, small = Galleries(pairs), Thumbnails(pairs, PictureReader(pipe.dvae.image_size))
    for temperature, guidance in SETTINGS:
        pipe.sampler.defaults = ModelDefaults(temperature=temperature, guidance=guidance)
        began = time.perf_counter()
        draws = draw(pipe, captions, 0, arguments.candidates, lambda _: None)
        seconds = time.perf_counter() - began
        answers = {"draws": decoded(pipe, draws.tokens[:, 0])}
        if draws.of_choice is not None:
            answers["chosen"] = decoded(pipe, draws.of_choice)
        report = Retrieval(galleries, rows, answers, small).report()
        row = {
            name: {query: figures["recall_at_1"]["value"] for query, figures in gallery["queries"].items()}
            for name, gallery in report.items()
        }
        settings = {"temperature": temperature, "guidance": guidance, "seconds": round(seconds, 1)}
        print(json.dumps(settings | row), flush=True)


if __name__ == "__main__":
    main()
