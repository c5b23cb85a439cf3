"""Tests of the caption tokenizer."""

import itertools
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from dalle import files, manifest
from dalle import tokenizer as tokenizer_module
from dalle.tokenizer import Tokenizer, TokenizerConfig

CAPTIONS = [
    f"{article} {colour} {thing}, {style} style"
    for article in ("a", "the")
    for colour in ("red", "green", "blue", "yellow", "light blue")
    for thing in ("apple", "avocado armchair", "café", "snail made of harp", "baby daikon radish")
    for style in ("flat fluent", "3d fluent", "noto")
]
PAPER = TokenizerConfig(vocab_size=400, max_tokens=32, space_tokens=True)
SHORT = TokenizerConfig(vocab_size=500, max_tokens=32, space_tokens=False)
TRAINED = {config: Tokenizer.train(CAPTIONS, config) for config in (PAPER, SHORT)}

both = pytest.mark.parametrize("config", [PAPER, SHORT], ids=["space_tokens", "no_space_tokens"])
# Text that the merges apply to, among text that they do not.
texts = st.one_of(
    st.text(),
    st.lists(st.sampled_from(["apple", "fluent ", "radis", "é", "\ud83d", "#", "##", "  ", "12", "Ġ"])).map(
        "".join
    ),
)


def tokens_of(tokenizer: Tokenizer, caption: str) -> list[str]:
    return [tokenizer.decode([i]) for i in tokenizer.encode(caption)]


def unlimited(config: TokenizerConfig) -> Tokenizer:
    """Return the same vocabulary with room for any caption."""
    wide = config.model_copy(update={"max_tokens": 10_000_000})
    return Tokenizer(TRAINED[config]._json, wide)


WIDE = {config: unlimited(config) for config in (PAPER, SHORT)}


def naive_merges(tokenizer: Tokenizer, word: str) -> list[str]:
    """Merge the best pair of a word, leftmost first, until none is left: textbook BPE."""
    model = json.loads(tokenizer._json)["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    prefix = model["continuing_subword_prefix"] or ""
    symbols = [prefix + s if i else s for i, s in enumerate(word)]
    while True:
        known = [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks]
        if not known:
            return symbols
        _, i = min(known)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1].removeprefix(prefix)]


def test_spaces_digits_and_punctuation_are_tokens_of_their_own() -> None:
    tokens = tokens_of(TRAINED[PAPER], "Red  apple's 12")
    assert tokens == ["red", " ", "apple", "'", "s", " ", "1", "2"]


def test_without_space_tokens_spaces_leave_no_token() -> None:
    assert tokens_of(TRAINED[SHORT], "Red  apple's 12") == ["red", "apple", "'", "s", "1", "2"]


def test_without_space_tokens_a_word_has_the_same_ids_wherever_it_stands() -> None:
    short = TRAINED[SHORT]
    assert short.encode("red,apple") == short.encode("red, apple") == short.encode("  red ,apple\n")
    assert short.encode("redapple") != short.encode("red apple")


@both
def test_no_merge_crosses_a_word_boundary(config: TokenizerConfig) -> None:
    model = json.loads(TRAINED[config]._json)["model"]
    for left, right in model["merges"]:
        merged = (left + right).replace("##", "")
        is_word = merged.isascii() and merged.isalpha() and merged.islower()
        is_one_character = len(TRAINED[config]._text(merged)) == 1
        assert is_word or is_one_character, (left, right)


@both
@given(text=texts)
@settings(max_examples=60, deadline=None)
def test_dropout_loop_without_a_drop_equals_the_encoder(config: TokenizerConfig, text: str) -> None:
    tokenizer = WIDE[config]
    never = 1e-300
    assert tokenizer.encode(text, dropout=never, rng=np.random.default_rng(0)) == tokenizer.encode(text)


@both
@given(word=st.text("aefluntrdish", max_size=20))
@settings(max_examples=50, deadline=None)
def test_encoder_equals_textbook_bpe(config: TokenizerConfig, word: str) -> None:
    tokenizer = TRAINED[config]
    assert [tokenizer._token_of[i] for i in tokenizer.encode(word)] == naive_merges(tokenizer, word)


@both
@given(text=texts, dropout=st.floats(0.01, 1.0), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_dropout_changes_tokens_never_the_text(
    config: TokenizerConfig, text: str, dropout: float, seed: int
) -> None:
    tokenizer = WIDE[config]
    dropped = tokenizer.encode(text, dropout=dropout, rng=np.random.default_rng(seed))
    assert len(dropped) >= tokenizer.count(text)
    assert tokenizer.decode(dropped) == tokenizer.decode(tokenizer.encode(text))


@both
def test_dropout_of_one_spells_every_symbol(config: TokenizerConfig) -> None:
    ids = TRAINED[config].encode("red apple", dropout=1.0, rng=np.random.default_rng(0))
    assert len(ids) == len("red apple") - (not config.space_tokens)


def test_dropout_skips_each_candidate_with_its_probability() -> None:
    # "red" has two paths: each outcome's probability follows from the order of its merges.
    tokenizer = Tokenizer.train(["red red", "re re re"], PAPER)
    rng, p, n_draws = np.random.default_rng(0), 0.3, 4000
    drawn = Counter(len(tokenizer.encode("red", dropout=p, rng=rng)) for _ in range(n_draws))
    # 3 symbols: "re" skipped. 2 symbols: "re" kept, then "red" skipped. 1: both kept.
    expected = {3: p, 2: (1 - p) * p, 1: (1 - p) ** 2}
    for n_symbols, probability in expected.items():
        sigma = (n_draws * probability * (1 - probability)) ** 0.5
        assert abs(drawn[n_symbols] - n_draws * probability) < 4 * sigma


def test_a_skipped_merge_is_a_candidate_again_at_the_next_step() -> None:
    # Two separate merges, "ab" before "cd": if "ab" is skipped and "cd" kept, "ab" is drawn once more.
    tokenizer = Tokenizer.train(["abx aby abz", "xcd ycd"], PAPER)
    rng, p, n_draws = np.random.default_rng(1), 0.5, 4000
    drawn = Counter(len(tokenizer.encode("abcd", dropout=p, rng=rng)) for _ in range(n_draws))
    both_merged = (1 - p) * (1 - p) + p * (1 - p) * (1 - p)
    sigma = (n_draws * both_merged * (1 - both_merged)) ** 0.5
    assert abs(drawn[2] - n_draws * both_merged) < 4 * sigma


def test_dropout_repeats_with_the_seed_and_leaves_the_generator_to_the_caller() -> None:
    tokenizer = TRAINED[PAPER]
    twice = [
        tokenizer.encode("light blue apple", dropout=0.5, rng=np.random.default_rng(7)) for _ in range(2)
    ]
    assert twice[0] == twice[1]
    rng = np.random.default_rng(7)
    several = {tuple(tokenizer.encode("light blue apple", dropout=0.5, rng=rng)) for _ in range(20)}
    assert len(several) > 1


def test_dropout_never_makes_a_caption_too_long() -> None:
    caption = "flat fluent style apple"  # 7 tokens, 23 symbols
    tokenizer = Tokenizer(TRAINED[PAPER]._json, PAPER.model_copy(update={"max_tokens": 7}))
    assert tokenizer.encode(caption, dropout=1.0, rng=np.random.default_rng(0)) == tokenizer.encode(caption)


@pytest.mark.parametrize("dropout", [-0.1, 1.5, float("nan")])
def test_dropout_outside_its_range_is_an_error(dropout: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        TRAINED[PAPER].encode("a", dropout=dropout, rng=np.random.default_rng(0))


def test_dropout_without_a_generator_is_an_error() -> None:
    with pytest.raises(ValueError, match="pass rng"):
        TRAINED[PAPER].encode("a", dropout=0.1)


@given(text=st.text(st.characters(max_codepoint=127)))
@settings(max_examples=60, deadline=None)
def test_decode_returns_the_normalised_caption(text: str) -> None:
    tokenizer = WIDE[PAPER]
    assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.normalize(text)


@given(text=st.text(st.characters(max_codepoint=127)))
@settings(max_examples=60, deadline=None)
def test_without_space_tokens_decoded_text_encodes_to_the_same_ids(text: str) -> None:
    tokenizer = WIDE[SHORT]
    ids = tokenizer.encode(text)
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_without_space_tokens_decode_sets_words_apart() -> None:
    caption = "a zebra's red apple (new), 3 big ones; size 12: qxz."
    tokenizer = WIDE[SHORT]
    assert tokenizer.decode(tokenizer.encode(caption)) == caption


def test_captions_are_lower_cased_composed_and_stripped() -> None:
    tokenizer = TRAINED[PAPER]
    assert tokenizer.normalize("\t CAFE\u0301 \u00a0\n Red ") == "caf\u00e9 red"
    assert tokenizer.encode("CAFE\u0301") == tokenizer.encode("caf\u00e9")


@both
@given(text=st.text(st.characters()))
@settings(max_examples=60, deadline=None)
def test_any_text_encodes_without_an_unknown(config: TokenizerConfig, text: str) -> None:
    tokenizer = WIDE[config]
    decoded = tokenizer.decode(tokenizer.encode(text))
    normalised = tokenizer.normalize(text)
    assert decoded.replace(" ", "") == normalised.replace(" ", "")


@both
@pytest.mark.parametrize(
    "text", ["\ud800", "a\udfffb", "\0", "a\0b", "\U0001f600\u200d\U0001f525", "\ufffe", "Ġ"]
)
def test_odd_text_survives(config: TokenizerConfig, text: str) -> None:
    tokenizer = TRAINED[config]
    assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.normalize(text)


def test_surrogate_pairs_join_and_lone_surrogates_become_the_replacement_character() -> None:
    tokenizer = TRAINED[PAPER]
    assert tokenizer.normalize("\ud83d\ude00") == "\U0001f600"
    assert tokenizer.normalize("\ud83d") == "\ufffd"


@pytest.mark.parametrize("unit", ["a", " ", "red apple "])
def test_a_megabyte_of_text_is_quick(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    start = time.perf_counter()
    n_tokens = TRAINED[SHORT].count(text)
    assert time.perf_counter() - start < 30  # a quadratic loop would take hours
    assert n_tokens > 0 or unit == " "


def test_one_long_word_under_dropout_is_quick() -> None:
    start = time.perf_counter()
    WIDE[PAPER].encode("apple" * 4000, dropout=0.1, rng=np.random.default_rng(0))
    assert time.perf_counter() - start < 10


def test_a_caption_that_is_too_long_says_how_long_it_may_be() -> None:
    tokenizer = TRAINED[PAPER]
    caption = "1" * 45
    expected = "caption has 45 tokens; the model reads 32: shorten it, or pass truncate=True"
    with pytest.raises(ValueError) as caught:
        tokenizer.encode(caption)
    assert str(caught.value) == expected
    assert tokenizer.count(caption) == 45
    assert tokenizer.encode(caption, truncate=True) == WIDE[PAPER].encode(caption)[:32]


def test_a_caption_that_is_not_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="caption is int"):
        TRAINED[PAPER].encode(3)  # type: ignore[arg-type]


@both
def test_the_empty_caption_is_all_pads(config: TokenizerConfig) -> None:
    tokenizer = TRAINED[config]
    assert tokenizer.encode("") == tokenizer.encode(" \n") == []
    padded = tokenizer.pad([])
    assert padded.dtype == np.int64
    assert padded.tolist() == list(range(tokenizer.n_vocab, tokenizer.n_ids))


def test_each_empty_position_has_its_own_pad() -> None:
    tokenizer = TRAINED[PAPER]
    ids = tokenizer.encode("a red apple")
    padded = tokenizer.pad(ids)
    assert padded.shape == (32,)
    assert padded[: len(ids)].tolist() == ids
    assert padded[len(ids) :].tolist() == [tokenizer.n_vocab + p for p in range(len(ids), 32)]
    assert tokenizer.decode(padded.tolist()) == "a red apple"


def test_pad_refuses_too_many_and_foreign_ids() -> None:
    tokenizer = TRAINED[PAPER]
    with pytest.raises(ValueError, match="33 token ids; the model reads 32"):
        tokenizer.pad([0] * 33)
    with pytest.raises(ValueError, match="is not in this vocabulary"):
        tokenizer.pad([tokenizer.n_vocab])
    with pytest.raises(ValueError, match="is not in this vocabulary"):
        tokenizer.decode([tokenizer.n_ids])


def test_training_twice_gives_the_same_tokenizer() -> None:
    for config in (PAPER, SHORT):
        again = Tokenizer.train(iter(CAPTIONS), config)
        assert again._json == TRAINED[config]._json
        assert again.fingerprint == TRAINED[config].fingerprint


def test_fingerprint_depends_on_captions_and_config() -> None:
    others = [
        Tokenizer.train(CAPTIONS[:-20], PAPER),
        Tokenizer.train(CAPTIONS, PAPER.model_copy(update={"max_tokens": 33})),
        TRAINED[SHORT],
    ]
    assert len({other.fingerprint for other in others} | {TRAINED[PAPER].fingerprint}) == 4


def test_small_data_gives_a_smaller_vocabulary_and_n_vocab_says_so() -> None:
    asked = TokenizerConfig(vocab_size=5000, max_tokens=8, space_tokens=True)
    tokenizer = Tokenizer.train(["red apple", "red pear"], asked)
    assert 256 < tokenizer.n_vocab < 300
    assert tokenizer.n_ids == tokenizer.n_vocab + 8
    assert TRAINED[PAPER].n_vocab <= PAPER.vocab_size


def test_a_vocabulary_below_the_base_alphabet_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 256 entries"):
        Tokenizer.train(CAPTIONS, PAPER.model_copy(update={"vocab_size": 255}))
    smallest = Tokenizer.train(CAPTIONS, PAPER.model_copy(update={"vocab_size": 256}))
    assert smallest.n_vocab == 256
    with pytest.raises(ValueError, match="0 captions"):
        Tokenizer.train([], PAPER)


def test_the_byte_alphabet_is_that_of_the_encoder() -> None:
    alphabet = tokenizer_module._byte_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    encoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character in map(chr, range(1, 0x800)):
        spelled = "".join(alphabet[byte] for byte in character.encode())
        assert encoder.pre_tokenize_str(character)[0][0] == spelled


@both
def test_save_and_load_round_trips(config: TokenizerConfig, tmp_path: Path) -> None:
    original = TRAINED[config]
    original.save_pretrained(tmp_path / "tokenizer")
    loaded = Tokenizer.from_pretrained(tmp_path / "tokenizer")
    assert loaded.config == config
    assert loaded.fingerprint == original.fingerprint
    assert loaded.encode("a café, flat") == original.encode("a café, flat")


def test_loading_verifies_the_manifest(tmp_path: Path) -> None:
    TRAINED[PAPER].save_pretrained(tmp_path / "tokenizer")
    manifest.write_manifest(tmp_path)
    Tokenizer.from_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path / "tokenizer")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
@pytest.mark.parametrize("contents", [b"", b"{", b"[]", b"{}", b'{"model": 3}', b"\xff\x00"])
def test_junk_files_are_one_line_errors_with_the_path(tmp_path: Path, name: str, contents: bytes) -> None:
    TRAINED[PAPER].save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_does_not_fit_its_config_is_an_error(tmp_path: Path) -> None:
    TRAINED[PAPER].save_pretrained(tmp_path)
    files.write_json(tmp_path / "config.json", SHORT.model_dump(mode="json"))
    with pytest.raises(ValueError, match="space_tokens is False"):
        Tokenizer.from_pretrained(tmp_path)
    broken = json.loads(TRAINED[PAPER]._json)
    broken["model"]["merges"] = []
    broken["model"]["vocab"] = {"a": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(broken))
    files.write_json(tmp_path / "config.json", PAPER.model_dump(mode="json"))
    with pytest.raises(ValueError, match="255 symbols of the base alphabet are missing"):
        Tokenizer.from_pretrained(tmp_path)
