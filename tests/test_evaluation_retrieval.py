"""Galleries and copies on a set drawn for it: what a perfect draw, a copy and a blind guess get in each gallery."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle.data.pair import Pair
from dalle.data.pairs import PairSet
from dalle.evaluation.baselines import DONOR, MEAN, RANDOM, Query, choose_donors, copies
from dalle.evaluation.galleries import Galleries, Thumbnails, distractors, style_of, zero_shot_rows
from dalle.evaluation.pictures import PictureReader
from dalle.evaluation.retrieval import Retrieval

N_OBJECTS, SIZE = 60, 16
STYLES = ("flat", "twin", "noise")  # twin is nearly flat, and noise has nothing of either


def pattern(thing: int, style: str) -> np.ndarray:
    """The 16 x 16 picture of an object in a style, (16, 16, 3) uint8."""
    shape = np.random.default_rng(thing).integers(60, 196, (SIZE, SIZE, 3))
    if style == "noise":
        shape = np.random.default_rng([thing, 99]).integers(60, 196, (SIZE, SIZE, 3))
    elif style == "twin":
        shape = shape + np.random.default_rng([thing, 7]).integers(-50, 51, (SIZE, SIZE, 3))
    return shape.astype(np.uint8)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PairSet:
    """Every object in three styles; the first 24 are held out in `flat`, as hard combinations."""
    folder, found = tmp_path_factory.mktemp("patterns"), []
    for style in STYLES:
        for thing in range(N_OBJECTS):
            path = folder / f"{style}-{thing}.png"
            Image.fromarray(pattern(thing, style)).save(path)
            is_hard = style == "flat" and thing < 24
            fields = {
                "style": style,
                "okey": f"thing {thing}",
                "object": f"a thing {thing}",
                "combo_hard": is_hard,
            }
            caption = f"a thing {thing}, {style}"
            found.append(Pair(path.name, (caption,), "combo" if is_hard else "train", fields, path=str(path)))
    return PairSet(tuple(sorted(found, key=lambda pair: pair.key)))


def thumbnails(pairs: PairSet) -> Thumbnails:
    return Thumbnails(pairs, PictureReader(SIZE))


def answers(pairs: PairSet, rows: Iterable[int], style: str) -> list[Query]:
    """What each row's object looks like in a style."""
    names = [Path(pairs[row].path).stem.split("-")[1] for row in rows]
    pictures = [pattern(int(name), style).transpose(2, 0, 1) / 255 for name in names]
    return [picture.astype(np.float32).reshape(1, -1) for picture in pictures]


def test_galleries_hold_others_of_the_style_and_then_the_object_in_other_styles(pairs: PairSet) -> None:
    galleries, row = Galleries(pairs), zero_shot_rows(pairs)[0]
    of_style, both = galleries.of_style(row), galleries.of_style_and_object(row)
    assert of_style[0] == row and len(set(of_style)) == N_OBJECTS  # 59 others: there are no more
    assert {style_of(pairs[index]) for index in of_style} == {"flat"}
    assert both[: len(of_style)] == of_style
    added = [pairs[index] for index in both[len(of_style) :]]
    assert {pair.fields["okey"] for pair in added} == {pairs[row].fields["okey"]}
    assert sorted(str(pair.fields["style"]) for pair in added) == ["noise", "twin"]


def test_distractors_share_the_style_and_not_the_object_and_depend_on_the_key_alone() -> None:
    pairs = PairSet(tuple(Pair(f"{i:03d}", ("x",), "combo", {"okey": str(i % 150)}) for i in range(300)))
    pool = np.arange(300, dtype=np.int64)
    chosen = distractors(pairs, 7, pool)
    assert len(set(chosen)) == 99
    assert not {7, 157} & set(chosen)
    assert chosen == distractors(pairs, 7, pool)
    assert chosen != distractors(pairs, 8, pool)


def test_the_donor_is_the_style_that_is_nearest_on_train(pairs: PairSet) -> None:
    [first, second] = choose_donors(Galleries(pairs), {"flat", None}, thumbnails(pairs))["flat"]
    assert (first.style, first.n, second.style) == ("twin", N_OBJECTS - 24, "noise")
    assert first.distance < second.distance / 1.5


def test_copies_are_training_pictures_of_the_same_object_in_other_styles(pairs: PairSet) -> None:
    rows, small = zero_shot_rows(pairs), thumbnails(pairs)
    found = copies(Galleries(pairs), rows, small)
    for place, row in enumerate(rows):
        [twin], [noise] = answers(pairs, [row], "twin"), answers(pairs, [row], "noise")
        both = found[RANDOM][place]
        assert both is not None and twin is not None and noise is not None
        np.testing.assert_allclose(both, np.concatenate([noise, twin]), atol=1e-6)
        np.testing.assert_allclose(found[MEAN][place], (noise + twin) / 2, atol=1e-6)
        np.testing.assert_allclose(found[DONOR][place], twin, atol=1e-6)


def test_a_copy_wins_among_its_style_and_loses_to_itself_among_the_objects_styles(pairs: PairSet) -> None:
    rows, small, galleries = zero_shot_rows(pairs), thumbnails(pairs), Galleries(pairs)
    queries: dict[str, list[Query]] = {
        "draws": answers(pairs, rows, "flat"),
        "chosen": answers(pairs, rows, "noise"),
        **copies(galleries, rows, small),
    }
    tables = Retrieval(galleries, rows, queries, small).report()
    style, both = tables["style"], tables["style_and_object"]
    assert (style["n"], style["n_candidates"]["most"], both["n_candidates"]["least"]) == (24, 60, 62)

    def recall(table: dict[str, dict[str, dict[str, dict[str, float]]]], query: str) -> float:
        return table["queries"][query]["recall_at_1"]["value"]

    assert recall(style, "draws") == recall(both, "draws") == 1.0
    assert recall(style, DONOR) == 1.0 and recall(both, DONOR) == 0.0
    assert recall(style, RANDOM) == pytest.approx(0.5, abs=0.05)  # the mean of twin and noise
    assert style["queries"]["draws"]["recall_at_1"]["low"] < 0.9
    assert style["against_copying"]["draws"]["baseline"] in (MEAN, DONOR)  # both always win
    assert style["against_copying"]["draws"]["beats"] is False  # copying does as well
    assert both["against_copying"]["draws"]["beats"] is True
    assert both["against_copying"]["chosen"]["beats"] is False
    assert style["by_style"]["flat"]["draws"]["n"] == 24
    assert style["chance"]["recall_at_1"] == pytest.approx(1 / 60)


def test_a_row_without_a_copy_or_a_readable_picture_is_left_out_where_it_must_be(
    pairs: PairSet, tmp_path: Path
) -> None:
    rows = zero_shot_rows(pairs)
    broken = tmp_path / "broken-0.png"
    broken.write_bytes(b"no picture")
    kept = []
    for index, pair in enumerate(pairs):
        if index == rows[0]:
            pair = Pair(pair.key, pair.captions, pair.split, pair.fields, path=str(broken))
        if pair.fields["okey"] != pairs[rows[1]].fields["okey"] or index == rows[1]:
            kept.append(pair)
    fewer = PairSet(tuple(kept))
    rows, small, galleries = zero_shot_rows(fewer), thumbnails(fewer), Galleries(fewer)
    queries = {"draws": answers(fewer, rows, "flat"), **copies(galleries, rows, small)}
    assert queries[MEAN][1] is None
    table = Retrieval(galleries, rows, queries, small).report()["style"]
    assert table["n"] == 23 and table["queries"][MEAN]["recall_at_1"]["n"] == 22
    assert table["against_copying"]["draws"]["n"] == 22


def test_data_without_objects_have_no_copies(pairs: PairSet) -> None:
    bare = PairSet(
        tuple(
            Pair(p.key, p.captions, p.split, {"combo_hard": p.split == "combo"}, path=p.path) for p in pairs
        )
    )
    rows, small, galleries = zero_shot_rows(bare), thumbnails(bare), Galleries(bare)
    queries = {"draws": answers(bare, rows, "flat"), **copies(galleries, rows, small)}
    table = Retrieval(galleries, rows, queries, small).report()["style"]
    assert table["queries"][DONOR]["recall_at_1"]["refused"].startswith("0 values")
    assert table["against_copying"]["draws"] == {"baseline": None, "beats": False}
