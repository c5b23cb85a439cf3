"""OpenAI's CLIP tokens: golden vectors of their code, rows, files."""

import gzip
import importlib.util
import os
from pathlib import Path

import pytest

from dalle.clip_tokenizer import CLIPTokenizer

# What clip.simple_tokenizer of OpenAI's package gives, without start and end.
GOLDEN = {
    "a diagram": [320, 22697],
    "a dog": [320, 1929],
    "a cat": [320, 2368],
    "a photo of a cat.": [320, 1125, 539, 320, 2368, 269],
    "Hello,   World!!  ": [3306, 267, 1002, 748],
    "an armchair in the shape of an avocado": [550, 45757, 530, 518, 6448, 539, 550, 14135],
    "it's 2021 & 1,024px": [585, 568, 273, 271, 273, 272, 261, 272, 267, 271, 273, 275, 10262],
    "猫 犬": [163, 234, 360, 163, 232, 361],
    "😀": [7334],
    "": [],
}


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    found = importlib.util.find_spec("clip")
    if found is None or found.origin is None:
        if os.environ.get("DALLE_CI"):
            pytest.fail("clip-anytorch is not installed")
        pytest.skip("clip-anytorch is not installed")
    return CLIPTokenizer.from_openai(Path(found.origin).parent / "bpe_simple_vocab_16e6.txt.gz")


def small() -> CLIPTokenizer:
    return CLIPTokenizer([("a", "b</w>"), ("c", "a")], max_tokens=6)


@pytest.mark.parametrize("caption", GOLDEN)
def test_tokens_are_openais(tokenizer: CLIPTokenizer, caption: str) -> None:
    assert tokenizer.encode(caption) == GOLDEN[caption]


def test_the_vocabulary_is_openais(tokenizer: CLIPTokenizer) -> None:
    assert (tokenizer.n_vocab, tokenizer.start_of_text, tokenizer.end_of_text) == (49408, 49406, 49407)
    assert [tokenizer.vocab[name] for name in ("!", "!</w>", "in", "jekyll</w>")] == [0, 256, 512, 49405]


def test_html_and_broken_text_are_repaired_as_openai_does(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.encode("a &amp;amp; b") == tokenizer.encode("a & b")
    assert tokenizer.encode("caf\u00c3\u00a9") == tokenizer.encode("caf\u00e9")


def test_a_special_token_in_a_caption_is_text(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer.encode("a <|endoftext|> cat")
    assert tokenizer.end_of_text not in ids and len(ids) > 4


def test_ids_are_bytes_then_bytes_that_end_a_word_then_merges() -> None:
    tokenizer = small()
    assert tokenizer.n_vocab == 512 + 2 + 2
    assert tokenizer.encode("ab") == [512]
    assert tokenizer.encode("cab") == [66, 512]  # the better merge first: a b</w>, then c stands alone


def test_a_row_is_start_ids_end_and_zeros() -> None:
    assert small().pad([7, 8]).tolist() == [514, 7, 8, 515, 0, 0]
    assert small()("ab cab").tolist() == [514, 512, 66, 512, 515, 0]


def test_long_captions_are_refused_or_cut_before_their_end() -> None:
    tokenizer = small()
    with pytest.raises(ValueError, match="caption has 7 tokens; this CLIP reads 6: shorten it"):
        tokenizer("ab ab ab ab ab")
    assert tokenizer("ab ab ab ab ab", truncate=True).tolist() == [514, 512, 512, 512, 512, 515]


def test_any_unicode_goes_in() -> None:
    for caption in ("\ud800", "\0", "👩‍👩‍👧", "x" * 10_000):
        assert all(0 <= index < 514 for index in small().encode(caption))


def test_saving_and_loading_keeps_the_merges(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    assert CLIPTokenizer.from_pretrained(tmp_path, max_tokens=6)("cab").tolist() == small()("cab").tolist()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a b\nc\n", "merge 2 is 'c', not two symbols"),
        (b"a zz\n", "names a symbol that is not in the vocabulary"),
        (gzip.compress(b"a b\n")[:-4], "cannot read"),
    ],
)
def test_damaged_merges_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "merges.txt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        CLIPTokenizer.from_pretrained(tmp_path)


def test_another_file_is_not_openais(tmp_path: Path) -> None:
    (tmp_path / "bpe.txt").write_text("version\na b\n")
    with pytest.raises(ValueError, match=r"is not bpe_simple_vocab_16e6\.txt\.gz"):
        CLIPTokenizer.from_openai(tmp_path / "bpe.txt")
