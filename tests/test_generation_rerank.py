"""Reranking: an order that depends on nothing but caption and picture, and bounded memory."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from dalle.clip_tokenizer import CLIPTokenizer
from dalle.generation.rerank import CHUNK, Ranker, best_first
from dalle.manifest import write_manifest
from dalle.tokenizer import Tokenizer, TokenizerConfig
from tests.tiny import tiny_clip

SIDE = 16


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    config = TokenizerConfig(vocab_size=360, max_tokens=16, space_tokens=False)
    return Tokenizer.train(["a red circle", "a blue square"], config)


@pytest.fixture(scope="module")
def ranker(tokenizer: Tokenizer) -> Ranker:
    return Ranker(tiny_clip(tokenizer), tokenizer)


def pictures(n: int, side: int = SIDE) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(3))


def scores(ranker: Ranker, drawn: Tensor, chunk: int = 7) -> Tensor:
    return ranker.score(ranker.encode_captions(["a red circle"])[0], drawn.split(chunk))


def test_scores_are_cosines_in_float32(ranker: Ranker) -> None:
    found = scores(ranker, pictures(5))
    caption = ranker.clip.encode_text(ranker.read(["a red circle"]))
    expected = torch.nn.functional.cosine_similarity(ranker.clip.encode_image(pictures(5)), caption)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-6)


def test_chunks_and_order_change_no_score(ranker: Ranker) -> None:
    drawn = pictures(CHUNK + 9)
    whole = scores(ranker, drawn, len(drawn))
    for chunk in (1, 7, CHUNK):
        torch.testing.assert_close(scores(ranker, drawn, chunk), whole, rtol=0, atol=1e-6)
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scores(ranker, drawn[order]), whole[order], rtol=0, atol=1e-6)


def test_the_same_picture_twice_has_the_same_score(ranker: Ranker) -> None:
    drawn = pictures(4)[[0, 1, 0, 2, 0]]
    found = scores(ranker, drawn, 5)
    # Its place in the chunk may round otherwise in the last bit.
    assert found[[2, 4]].tolist() == pytest.approx([float(found[0])] * 2, abs=1e-6)
    assert abs(float(found[1] - found[0])) > 1e-3


def test_more_candidates_never_make_the_best_worse(ranker: Ranker) -> None:
    found = scores(ranker, pictures(20))
    best = [max(found[:n].tolist()) for n in range(1, 21)]
    assert best == sorted(best)


def test_chunks_are_read_one_at_a_time(ranker: Ranker) -> None:
    alive = []

    def drawn():
        for _ in range(3):
            alive.append(1)
            yield pictures(2)

    seen = []
    ranker.score(ranker.encode_captions(["a"])[0], drawn(), lambda n: seen.append((n, len(alive))))
    assert seen == [(2, 1), (2, 2), (2, 3)]


def test_pictures_of_another_size_are_resized(ranker: Ranker) -> None:
    assert scores(ranker, pictures(3, 40)).shape == (3,)


def test_files_are_scored_by_their_central_square(ranker: Ranker) -> None:
    wide = Image.new("RGB", (60, 30), "red")
    wide.paste("blue", (15, 0, 45, 30))
    square = Image.new("RGB", (30, 30), "blue")
    first, second = ranker.score_images("a blue square", [wide, square])
    assert first == pytest.approx(second, abs=1e-6)


def test_best_first_is_stable_and_puts_nan_last() -> None:
    assert best_first([0.1, 0.5, float("nan"), 0.5, 0.2]) == [1, 3, 4, 0, 2]
    assert best_first([0.1, 0.5, 0.3], 2) == [1, 2]
    assert best_first([]) == []


def test_a_long_caption_is_refused_or_cut(ranker: Ranker) -> None:
    long = "red " * 30
    with pytest.raises(ValueError, match="tokens"):
        ranker.encode_captions([long])
    assert ranker.encode_captions([long], truncate=True).shape == (1, 8)


@pytest.fixture(scope="module")
def folder(ranker: Ranker, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    ranker.clip.save_pretrained(out / "clip")
    tokenizer.save_pretrained(out / "tokenizer")
    write_manifest(out)
    return out


def test_a_saved_ranker_gives_the_same_scores(ranker: Ranker, folder: Path) -> None:
    loaded = Ranker.from_pretrained(folder)
    assert torch.equal(scores(loaded, pictures(3)), scores(ranker, pictures(3)))
    assert loaded.sha256 is not None and len(loaded.sha256) == 64


def test_a_ranker_of_openais_kind_reads_with_openais_tokenizer(tmp_path: Path) -> None:
    tokens = CLIPTokenizer([("a", "b</w>")], max_tokens=9)
    tiny_clip(tokens).save_pretrained(tmp_path / "clip")
    tokens.save_pretrained(tmp_path / "clip")
    write_manifest(tmp_path)
    assert Ranker.from_pretrained(tmp_path).encode_captions(["ab"]).shape == (1, 8)


def test_a_wrong_ranker_is_one_clear_error(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no clip: give a model folder with a CLIP in it"):
        Ranker.from_pretrained(tmp_path)
    other = Tokenizer.train(["x"], TokenizerConfig(vocab_size=350, max_tokens=5, space_tokens=False))
    with pytest.raises(ValueError, match=r"reads 16 tokens of \d+, the tokenizer gives 5 of \d+"):
        Ranker(tiny_clip(tokenizer), other)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    data = bytearray((copy / "clip" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "clip" / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Ranker.from_pretrained(copy)
