"""ru-dalle's checkpoints, imported, compute what ru-dalle computes; drawing by cache gives its tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dalle.importers.ru_dalle import import_ru_dalle
from dalle.manifest import VerifiedFolder
from dalle.published.captions import CaptionTokenizer
from dalle.published.ru_dalle import RuDalle
from dalle.published.vqgan import VQGAN
from tests.published_code import needs_peers, run_published_code
from tests.tiny_published import one_thread  # noqa: F401 - every test here runs under it

N_TEXT, N_TEXT_IDS, N_TOKENS = 6, 46, 144


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_published_code("ru_dalle_models", tmp_path_factory.mktemp("ru_dalle"))


def imported(published: Path, version: str, out: Path, **changes: Any) -> tuple[RuDalle, dict[str, Any]]:
    files = published / f"{version}.bin", published / "vqgan.ckpt", published / "bpe.model"
    import_ru_dalle(*files, out, changes={"n_heads": 2, **changes})
    VerifiedFolder(out)
    expected: dict[str, Any] = torch.load(published / f"{version}_expected.pt", weights_only=True)
    return RuDalle.from_pretrained(out / "transformer"), expected


@needs_peers
@pytest.mark.parametrize("version", ["v2", "v3"])
def test_logits_are_ru_dalles(version: str, published: Path, tmp_path: Path) -> None:
    model, expected = imported(published, version, tmp_path / "model")
    assert model.config.has_start == model.config.conv_wraps == (version == "v2")
    with torch.no_grad():
        text_logits, image_logits = model(expected["text"], expected["image"])
        losses = model.loss(expected["text"], expected["image"])
    theirs = expected["logits"]
    first = N_TEXT if version == "v2" else N_TEXT - 1  # the slot that predicts the first image token
    torch.testing.assert_close(
        image_logits, theirs[:, first : first + N_TOKENS, N_TEXT_IDS:], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(text_logits, theirs[:, :first, :N_TEXT_IDS], atol=1e-4, rtol=0)
    if version == "v2":  # v3's own loss asks the text head for an image token
        torch.testing.assert_close(losses.total, expected["loss"], atol=1e-4, rtol=0)


@needs_peers
@pytest.mark.parametrize("version", ["v2", "v3"])
def test_drawing_by_cache_gives_ru_dalles_tokens(version: str, published: Path, tmp_path: Path) -> None:
    model, expected = imported(published, version, tmp_path / "model")
    state, stream = model.start(expected["text"], [1, 1])
    drawn = []
    for i in range(N_TOKENS):
        drawn.append(model.head(model.norm(state)).argmax(dim=-1))
        if i + 1 < N_TOKENS:
            state = model.step(drawn[-1], stream)
    assert torch.equal(torch.stack(drawn, dim=1), expected["drawn"])
    pictures = VQGAN.from_pretrained(tmp_path / "model" / "dvae")
    assert pictures.decode(torch.stack(drawn, dim=1).view(2, 12, 12)).shape == (2, 3, 96, 96)


@needs_peers
def test_bpe_is_youtokentomes(published: Path, tmp_path: Path) -> None:
    imported(published, "v3", tmp_path / "model")
    tokenizer = CaptionTokenizer.from_pretrained(tmp_path / "model" / "tokenizer")
    # "▁абв": the first rules merge first; a run of unknown letters is one unknown token.
    assert tokenizer.encode("абв") == [2, 13, 3]
    assert tokenizer.encode("  г\tаб ") == [2, 4, 8, 11, 6, 3]
    assert tokenizer.encode("xyzа") == [2, 4, 1, 5, 3]
    assert tokenizer.encode("") == [2, 3]
    assert tokenizer.decode(tokenizer.encode("абв г")) == "абв г"
    assert tokenizer.pad([2, 3]).tolist() == [2, 3, 0, 0, 0, 0]


@needs_peers
def test_version_and_heads_must_be_told_where_no_tensor_tells_them(published: Path, tmp_path: Path) -> None:
    files = published / "vqgan.ckpt", published / "bpe.model", tmp_path / "model"
    with pytest.raises(ValueError, match="pass --set n_heads=N"):
        import_ru_dalle(published / "v3.bin", *files)
    state = torch.load(published / "v3.bin", weights_only=True)
    wrong = {**state, "transformer.row_mask": state["transformer.col_mask"]}
    torch.save(wrong, tmp_path / "wrong.bin")
    with pytest.raises(ValueError, match=r"row_mask is another mask than ru-dalle's"):
        import_ru_dalle(tmp_path / "wrong.bin", *files, changes={"n_heads": 2})
    torch.save({f"module.{k}": x for k, x in state.items() if "_mask" not in k}, tmp_path / "bare.bin")
    with pytest.raises(ValueError, match="pass --set version=v2 or version=v3"):
        import_ru_dalle(tmp_path / "bare.bin", *files, changes={"n_heads": 2})
    import_ru_dalle(tmp_path / "bare.bin", *files, changes={"n_heads": 2, "version": "v3"})
    assert not RuDalle.from_pretrained(tmp_path / "model" / "transformer").config.has_start
