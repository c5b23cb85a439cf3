"""Composed scenes: an image tokenizer that keeps everything passes the checkers, and draws are held to their captions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from dalle import images
from dalle.data.pairs import Pair, PairSet
from dalle.data.scenes.scene import Scene, Thing
from dalle.evaluation import composition as module
from dalle.evaluation.composition import composition, scene_rows
from dalle.evaluation.protocols import Draws
from dalle.evaluation.subject import Parts, Settings, Subject
from tests.tiny import tiny_pipe

COLOURS = {"red": (220, 30, 30), "green": (30, 150, 50), "blue": (40, 110, 215), "yellow": (245, 210, 40)}
SIDE = 32


@pytest.fixture
def pairs(tmp_path: Path) -> PairSet:
    """24 coloured discs with their scenes, and a picture of top and bottom, which has no checker."""
    found = []
    for i in range(24):
        color = list(COLOURS)[i % 4]
        picture = Image.new("RGB", (SIDE, SIDE), "white")
        ImageDraw.Draw(picture).ellipse((6, 6, 26, 26), fill=COLOURS[color])
        picture.save(tmp_path / f"{i:02d}.png")
        fields = Scene("color", (Thing("circle", color, None),)).to_fields()
        found.append(
            Pair(f"{i:02d}.png", (f"a {color} circle",), "combo", fields, path=str(tmp_path / f"{i:02d}.png"))
        )
    both = {"scene": "top_bottom"}
    found.append(Pair("pair.png", ("a cat above a cat",), "combo", both, path=found[0].path))
    return PairSet(tuple(found))


def subject_of(pairs: PairSet, out: Path) -> Subject:
    pipe = tiny_pipe(caption for pair in pairs for caption in pair.captions)
    settings = Settings(networks=())
    return Subject(pipe, pairs, settings, {"combo": list(range(len(pairs)))}, out, Parts(out, "test"))


def test_draws_that_show_their_captions_pass_and_those_of_other_captions_do_not(
    pairs: PairSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_of(pairs, tmp_path)
    assert scene_rows(subject) == {"color": list(range(24))}
    pictures = images.to_tensor([pair.open() for pair in pairs.pairs[:24]])
    drawn = Draws(torch.arange(24).view(24, 1, 1, 1), None)  # a token is the number of its picture
    monkeypatch.setattr(Subject, "draw", lambda *_: drawn)
    monkeypatch.setattr(module, "decode", lambda dvae, tokens: pictures[tokens.flatten()])
    monkeypatch.setattr(module, "reconstruct", lambda dvae, read: (None, 1 - read))  # the wrong colours
    table: dict[str, Any] = composition(subject)["kinds"]["color"]
    assert table["true_pictures"]["value"] == table["draws"]["value"] == 1.0
    assert table["reconstructions"]["value"] == 0.0
    assert (
        table["draws_of_other_captions"]["value"] == 1.0
    )  # half a set off: 12 is a multiple of the 4 colours
    monkeypatch.setattr(Subject, "draw", lambda *_: Draws(drawn.tokens.roll(1, dims=0), None))
    shifted = composition(subject)["kinds"]["color"]
    assert shifted["draws"]["value"] == 0.0 and shifted["true_pictures"]["n"] == 24


def test_data_without_scenes_and_words_without_a_reader_get_a_sentence(
    pairs: PairSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = PairSet(tuple(Pair(p.key, p.captions, p.split, {}, path=p.path) for p in pairs))
    assert "hold no scenes" in composition(subject_of(bare, tmp_path))["refused"]

    def missing() -> None:
        raise ValueError("reading words needs a reader")

    monkeypatch.setattr(module, "WordReader", missing)
    word = Scene("word", (), word="CAT", font="x", color="red").to_fields()
    words = PairSet(tuple(Pair(p.key, p.captions, p.split, word, path=p.path) for p in pairs))
    assert composition(subject_of(words, tmp_path))["kinds"]["word"] == {
        "refused": "reading words needs a reader"
    }
