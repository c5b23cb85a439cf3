"""min-dalle's checkpoints, imported, compute what min-dalle computes; one step at a time as all at once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dalle.importers.min_dalle import import_min_dalle
from dalle.manifest import VerifiedFolder
from dalle.published.captions import CaptionTokenizer
from dalle.published.min_dalle import MinDalle
from dalle.published.vqgan import VQGAN
from tests.published_code import needs_peers, run_published_code
from tests.tiny_published import one_thread  # noqa: F401 - every test here runs under it

FILES = ("encoder.pt", "decoder.pt", "detoker.pt", "vocab.json", "merges.txt")
THEIR_START = 2**14 - 1  # what min-dalle 0.4.11 begins with; BOS is 16384


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_published_code("min_dalle_model", tmp_path_factory.mktemp("min_dalle"))


@pytest.fixture(scope="module")
def imported(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    changes = {"n_heads": 2, "start_token": THEIR_START}
    import_min_dalle(*(published / name for name in FILES), folder / "model", changes=changes)
    return folder / "model"


@pytest.fixture(scope="module")
def expected(published: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(published / "expected.pt", weights_only=True)
    return loaded


@needs_peers
def test_encoder_and_decoder_compute_what_min_dalles_do(imported: Path, expected: dict[str, Any]) -> None:
    VerifiedFolder(imported)
    model = MinDalle.from_pretrained(imported / "transformer")
    text, image = expected["text"], expected["image"]
    with torch.no_grad():
        # Slots behind the caption are never read.
        read = text != 1
        torch.testing.assert_close(model.encode(text)[read], expected["encoded"][read], atol=1e-4, rtol=0)
        logits = model(text, image.expand(2, -1))
    theirs = expected["logits"].float()
    torch.testing.assert_close(logits, theirs, atol=1e-4 + 2**-10 * float(theirs.abs().max()), rtol=0)


@needs_peers
def test_tokenizer_gives_min_dalles_ids(imported: Path, expected: dict[str, Any]) -> None:
    tokenizer = CaptionTokenizer.from_pretrained(imported / "tokenizer")
    for caption, ids in zip(expected["captions"], expected["tokens"], strict=True):
        assert tokenizer.encode(caption) == ids
    assert tokenizer.pad([0, 2]).tolist() == [0, 2] + [1] * 62


@needs_peers
def test_drawing_by_cache_gives_min_dalles_picture(imported: Path, expected: dict[str, Any]) -> None:
    """The likeliest tokens under super-conditioning of 16, and their pixels."""
    model = MinDalle.from_pretrained(imported / "transformer")
    text = torch.stack([expected["text"][0], model.null_text()])
    state, stream = model.start(text, [1, 1])
    drawn = []
    for _ in range(256):
        conditional, unconditional = model.head(model.norm(state))
        token = (unconditional + 16 * (conditional - unconditional)).argmax()
        drawn.append(int(token))
        state = model.step(token.expand(2), stream) if len(drawn) < 256 else state
    assert drawn == expected["drawn"][0].tolist()
    pixels = VQGAN.from_pretrained(imported / "dvae").float().decode(torch.tensor(drawn).view(1, 16, 16))
    theirs = expected["picture"].permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(pixels, theirs, atol=1e-4, rtol=0)


@needs_peers
def test_bos_is_the_start_token_unless_chosen(published: Path, tmp_path: Path) -> None:
    import_min_dalle(*(published / name for name in FILES), tmp_path / "model")
    config = MinDalle.from_pretrained(tmp_path / "model" / "transformer").config
    assert (config.start_token, config.n_image_vocab, config.n_image_ids) == (16384, 16384, 16385)
    assert config.n_heads == 1  # 64 wide: the heads of mini and mega are


@needs_peers
def test_files_in_the_wrong_place_are_refused(published: Path, tmp_path: Path) -> None:
    encoder, decoder, detoker, vocab, merges = (published / name for name in FILES)
    with pytest.raises(ValueError, match="the encoder comes first"):
        import_min_dalle(decoder, encoder, detoker, vocab, merges, tmp_path / "model")
    with pytest.raises(ValueError, match=r"encoder\.pt holds no VQGAN"):
        import_min_dalle(encoder, decoder, encoder, vocab, merges, tmp_path / "model")
    with pytest.raises(ValueError, match=r"merges\.txt is not a vocabulary in JSON"):
        import_min_dalle(encoder, decoder, detoker, merges, vocab, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
