"""The figures that made yardsticks necessary: on the old splits a copy beat the model, whose pictures are stored here.

`old_split/` holds, as 16 x 16 thumbnails (all that retrieval looks at), what the model of November 2026 drew for the 213
hard captions of the art set before its splits were mended, the training pictures of the same objects, and of each
gallery those candidates that are nearest to some answer: the others decide no rank 1.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dalle.data.pairs import Pair, PairSet
from dalle.evaluation import baselines
from dalle.evaluation.baselines import DONOR, MEAN, RANDOM, Donor, Query, copies
from dalle.evaluation.galleries import Galleries, Thumbnails
from dalle.evaluation.pictures import PictureReader
from dalle.evaluation.retrieval import Retrieval

FOLDER = Path(__file__).parent / "old_split"
COLUMNS, SIDE = 64, 16


def cells(name: str, n: int) -> list[np.ndarray]:
    """The first n 16 x 16 pictures of a sheet, (16, 16, 3) uint8."""
    sheet = np.asarray(Image.open(FOLDER / name).convert("RGB"))
    places = [(SIDE * (i // COLUMNS), SIDE * (i % COLUMNS)) for i in range(n)]
    return [sheet[y : y + SIDE, x : x + SIDE] for y, x in places]


class StoredGalleries(Galleries):
    """Galleries whose members were chosen from the whole art set."""

    def __init__(self, pairs: PairSet, members: dict[int, list[int]]) -> None:
        super().__init__(pairs)
        self._members = members

    def of_style(self, row: int) -> list[int]:
        return self._members[row]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Both galleries' tables of the draws, the chosen draws, another seed and the copies."""
    stored = json.loads((FOLDER / "rows.json").read_text(encoding="utf-8"))
    folder, found = tmp_path_factory.mktemp("old"), []
    pictures = cells("pictures.webp", len(stored["pictures"]))
    for place, ((style, thing, name, is_train), picture) in enumerate(
        zip(stored["pictures"], pictures, strict=True)
    ):
        path = folder / f"{place:05d}.png"
        Image.fromarray(picture).save(path)
        fields = {
            "style": stored["styles"][style],
            "okey": stored["objects"][thing],
            "object": stored["names"][name],
        }
        found.append(Pair(path.name, ("x",), "train" if is_train else "combo", fields, path=str(path)))
    pairs, rows = PairSet(tuple(found)), stored["rows"]
    galleries = StoredGalleries(pairs, dict(zip(rows, stored["galleries"], strict=True)))
    small = Thumbnails(pairs, PictureReader(SIDE))
    drawn = cells("draws.webp", 3 * len(rows))
    answers = [(cell.transpose(2, 0, 1)[None] / 255).astype(np.float32).reshape(1, -1) for cell in drawn]
    n = len(rows)
    queries: dict[str, list[Query]] = {
        name: list(answers[i * n : (i + 1) * n]) for i, name in enumerate(("draws", "chosen", "another_seed"))
    }
    donors = {style: [Donor(name, 0.0, 0) for name in names] for style, names in stored["donors"].items()}
    with pytest.MonkeyPatch.context() as patch:  # chosen on the whole training set, of which a part is stored
        patch.setattr(baselines, "choose_donors", lambda *_: donors)
        queries |= copies(galleries, rows, small)
    return Retrieval(galleries, rows, queries, small).report()


def percent(table: dict[str, Any], query: str) -> float:
    return round(100 * table["queries"][query]["recall_at_1"]["value"], 1)


def test_copies_and_draws_have_the_figures_that_docs_name(tables: dict[str, Any]) -> None:
    style = tables["style"]
    assert style["n"] == 213
    assert percent(style, RANDOM) == 31.4
    assert percent(style, MEAN) == 37.6
    assert percent(style, DONOR) == 45.1
    assert (percent(style, "draws"), percent(style, "another_seed")) == (31.9, 30.5)
    assert percent(style, "chosen") == 37.1  # of four candidates
    both = tables["style_and_object"]
    assert (percent(both, "draws"), percent(both, "another_seed")) == (10.8, 13.1)
    assert percent(both, "chosen") == 14.1
    assert percent(both, DONOR) == percent(both, RANDOM) == 0.0


def test_the_model_of_then_is_said_not_to_beat_copying(tables: dict[str, Any]) -> None:
    against = tables["style"]["against_copying"]["draws"]
    assert against["baseline"] == DONOR and not against["beats"]
    assert against["high"] < 0  # it is worse, not merely no better
