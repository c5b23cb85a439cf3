"""A planted fault moves the numbers that it should and no other; the table in docs/evaluation.md is what is tested."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dalle.data.art.splits import NEAR_RMSE, nearest_rmse
from dalle.data.pairs import Pair, PairSet
from dalle.evaluation.baselines import Query
from dalle.evaluation.distances import frechet
from dalle.evaluation.galleries import Galleries, Thumbnails, zero_shot_rows
from dalle.evaluation.metrics import Reconstruction, thumbnails
from dalle.evaluation.pictures import PictureReader
from dalle.evaluation.retrieval import Retrieval
from dalle.evaluation.samples import blurred

SIZE, N = 16, 60
STYLES = ("flat", "twin")
DOC = Path(__file__).parents[1] / "docs" / "evaluation.md"
LEAST = {"PSNR": 1.0, "Fréchet": 0.015, "perplexity": 20.0}  # of a change beyond chance; of shares 0.2


def pattern(thing: int, style: str) -> np.ndarray:
    """A coarse shape with a fine grain, (16, 16, 3) uint8; `twin` shows the same shape with another grain, shifted."""
    shape = np.random.default_rng(thing).integers(60, 196, (4, 4, 3)).repeat(4, axis=0).repeat(4, axis=1)
    grain = np.random.default_rng([thing, STYLES.index(style)]).integers(-30, 31, (SIZE, SIZE, 3))
    return (shape + grain + (25 if style == "twin" else 0)).clip(0, 255).astype(np.uint8)


def pictures(things: range, style: str) -> Tensor:
    """(N, 3, 16, 16) in [0, 1]."""
    drawn = np.stack([pattern(thing, style) for thing in things])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255


def features(drawn: Tensor) -> Tensor:
    """What the Fréchet distance sees, (N, 5): the mean colour, and how rough the grain is along both axes."""
    rough = [10 * drawn.diff(dim=axis).abs().mean(dim=(1, 2, 3)) for axis in (2, 3)]
    return torch.stack([*drawn.mean(dim=(2, 3)).T, *rough], dim=1)


class World:
    """Objects 0..59 are held out in `flat`, 60..119 trained on in both styles, 120..179 the reference of distances."""

    def __init__(self, folder: Path) -> None:
        pairs = []
        for style in STYLES:
            for thing in range(2 * N):
                path = folder / f"{style}-{thing:03d}.png"
                Image.fromarray(pattern(thing, style)).save(path)
                is_hard = style == "flat" and thing < N
                fields = {"style": style, "okey": f"{thing}", "object": f"{thing}", "combo_hard": is_hard}
                pairs.append(Pair(path.name, ("x",), "combo" if is_hard else "train", fields, path=str(path)))
        self.pairs = PairSet(tuple(pairs))
        self.galleries, self.small = Galleries(self.pairs), Thumbnails(self.pairs, PictureReader(SIZE))
        self.rows = zero_shot_rows(self.pairs)
        self.reference = features(pictures(range(2 * N, 3 * N), "flat"))

    def numbers(self, drawn: Tensor, tokens: Tensor) -> dict[str, float]:
        """Every number of the table, of draws (N, 3, 16, 16) and of an image tokenizer's tokens (N, 4, 4) of 0..255."""
        small = thumbnails(drawn)
        answers: list[Query] = list(small[:, None])
        tables = Retrieval(self.galleries, self.rows, {"draws": answers}, self.small).report()
        train = [index for index, pair in enumerate(self.pairs) if pair.split == "train"]
        self.small.load_(set(train))
        sums, truth = Reconstruction(256, SIZE), pictures(range(N), "flat")
        copies = (
            (tokens[:, None].float() / 255)
            .repeat_interleave(4, 2)
            .repeat_interleave(4, 3)
            .expand(-1, 3, -1, -1)
        )
        sums.add_(truth, copies, tokens)
        return {
            "style": tables["style"]["queries"]["draws"]["recall_at_1"]["value"],
            "style and object": tables["style_and_object"]["queries"]["draws"]["recall_at_1"]["value"],
            "near train": float((nearest_rmse(small, self.small.of(train)) < NEAR_RMSE).mean()),
            "Fréchet": frechet(features(drawn), self.reference),
            "perplexity": sums.perplexity,
            "PSNR": float(sums.seen.psnr or 0),
        }


def tokens_of(truth: Tensor) -> Tensor:
    """The mean grey of each 4 x 4 cell, (N, 4, 4) int64: an image tokenizer of 256 codes."""
    return (255 * torch.nn.functional.avg_pool2d(truth.mean(dim=1), 4)).round().long()


def planted() -> dict[str, tuple[Tensor, Tensor]]:
    """Draws and tokens without a fault, and with each."""
    truth, noise = pictures(range(N), "flat"), torch.Generator().manual_seed(0)
    good = (truth + 0.03 * torch.randn(truth.shape, generator=noise)).clamp(0, 1)
    tokens = tokens_of(truth)
    return {
        "none": (good, tokens),
        "shuffled captions": (good.roll(7, dims=0), tokens),
        "collapsed codebook": (good, torch.full_like(tokens, 128)),
        "copied training pictures": (pictures(range(N, 2 * N), "flat"), tokens),
        "blurred samples": (blurred(good, 1.0), tokens),
        "the object copied from another style": (pictures(range(N), "twin"), tokens),
    }


def documented() -> dict[str, dict[str, str]]:
    """The table of docs/evaluation.md: fault -> number -> up, down or same."""
    lines = [line for line in DOC.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    [start] = [i for i, line in enumerate(lines) if line.startswith("| planted fault")]
    head = [cell.strip() for cell in lines[start].strip("|").split("|")]
    table = {}
    for line in lines[start + 2 :]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != len(head):
            break
        table[cells[0]] = dict(zip(head[1:], cells[1:], strict=True))
    return table


def moved(name: str, before: float, after: float) -> str:
    change, least = after - before, LEAST.get(name, 0.2)
    return "same" if abs(change) < least else "up" if change > 0 else "down"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def test_the_table_of_docs_names_every_planted_fault() -> None:
    assert set(documented()) == set(planted()) - {"none"}


@pytest.mark.parametrize("fault", [name for name in planted() if name != "none"])
def test_a_fault_moves_the_numbers_that_docs_say_and_no_other(world: World, fault: str) -> None:
    cases = planted()
    before, after = world.numbers(*cases["none"]), world.numbers(*cases[fault])
    assert {name: moved(name, before[name], after[name]) for name in before} == documented()[fault], (
        before,
        after,
    )
