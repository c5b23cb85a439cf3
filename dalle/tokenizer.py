"""Byte-pair encoding of captions, with one pad token per text position.

Source: DALL·E paper §2.2 and App. B.2 (16,384 entries, 256 tokens, lower case, 10 % BPE dropout); the
splitting rule is the authors' (openai/DALL-E issue 22): everything that is not a-z stands alone, spaces
included. BPE dropout is Provilkov et al. 2020, algorithm 1. Training and plain encoding are Hugging Face
`tokenizers`; dropout is our own merge loop, because its random numbers must come from a generator that is
passed in.

Shapes: T text positions (`max_tokens`), V vocabulary entries (`n_vocab`); the pad of position p is id V + p.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import string
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import tokenizers
from pydantic import Field
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from dalle import files
from dalle.config import Config, validate
from dalle.manifest import checked_component

# A pair seen once says nothing about language: merging it would spend entries on whole rare words.
MIN_PAIR_COUNT = 2
# Marks a symbol that does not start its word, where spaces are dropped: so word starts survive without a
# token of their own, and a word has the same ids wherever it stands. It cannot be mistaken for text: "#" is
# always alone.
CONTINUATION = "##"
# Decoding without space tokens: after these a word is set apart as after a word.
CLOSING_MARKS = ",.;:!?)"


class TextTokenizer(Protocol):
    """What turns captions into the ids that a token model reads, ours or other people's."""

    @property
    def n_vocab(self) -> int:
        """Return the ids that a caption may hold, V."""

    @property
    def max_tokens(self) -> int:
        """Return the text positions, T."""

    @property
    def fingerprint(self) -> str:
        """Return a sha256 (hexadecimal) of the tokenizer."""

    def count(self, caption: str) -> int:
        """Return the number of tokens of a caption, whatever the limit."""

    def encode(
        self,
        caption: str,
        *,
        truncate: bool = False,
        dropout: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> list[int]:
        """Return the ids of a caption, without pads; ValueError where it is too long."""

    def pad(self, ids: Sequence[int]) -> npt.NDArray[np.int64]:
        """Fill ids up to (T,) int64."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a component folder."""


class TokenizerConfig(Config):
    """Size and splitting of the vocabulary."""

    vocab_size: int = Field(gt=0)  # entries asked for; small data gives fewer (paper: 16384)
    max_tokens: int = Field(gt=0)  # text positions T (paper: 256)
    # True: a space is a token of its own (paper). False differs: spaces are dropped, which nearly halves
    # the length ("a red apple" is 3 tokens, not 5), so that short text contexts hold whole captions.
    space_tokens: bool


def fingerprint_of(tokenizer_json: str, config: Config) -> str:
    """Return the sha256 (hexadecimal) of a tokenizer's JSON and its config, whatever their spacing."""
    contents = {"tokenizer": json.loads(tokenizer_json), "config": config.model_dump(mode="json")}
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


class Tokenizer:
    """Turn a caption into BPE ids and back; every Unicode text has ids, and none is unknown.

    A caption is brought to NFC and lower case, runs of whitespace become one space, the ends are stripped.
    Then a-z words are BPE words, and every other character is one: digits, punctuation and spaces never
    merge. What is outside ASCII is spelled in UTF-8 bytes, all 256 of which are in the vocabulary.
    """

    def __init__(self, tokenizer_json: str, config: TokenizerConfig) -> None:
        """Wrap a trained tokenizer; ValueError when the JSON is not ours or does not fit the config."""
        self.config = config
        self._json = tokenizer_json
        self._bpe = _read_bpe(tokenizer_json, config)
        model = json.loads(tokenizer_json)["model"]
        self._id_of: dict[str, int] = model["vocab"]
        self._token_of = sorted(self._id_of, key=self._id_of.__getitem__)
        # (left id, right id) -> (rank, merged id); the lowest rank merges first.
        self._merges: dict[tuple[int, int], tuple[int, int]] = {}
        for rank, (left, right) in enumerate(model["merges"]):
            merged = left + right.removeprefix(_prefix(config))
            self._merges[self._id_of[left], self._id_of[right]] = (rank, self._id_of[merged])
        self._byte_of = {character: byte for byte, character in enumerate(_byte_alphabet())}

    @classmethod
    def train(cls, captions: Iterable[str], config: TokenizerConfig) -> Tokenizer:
        """Learn the merges from captions; the same captions give the same tokenizer.

        Small data may give fewer entries than `config.vocab_size`: `n_vocab` is the true number. ValueError
        when there is no caption, or when the vocabulary cannot hold the base alphabet.
        """
        base = _base_symbols(config)
        if config.vocab_size < len(base):
            raise ValueError(
                f"tokenizer.vocab_size is {config.vocab_size}; the base alphabet alone needs {len(base)}: "
                f"ask for at least {len(base)} entries"
            )
        bpe = _pipeline(models.BPE(continuing_subword_prefix=_prefix(config)), config)
        # The base alphabet enters as special tokens only to fix its order, which decides between pairs of
        # equal count; left to itself the trainer takes it in hash order, another one each time.
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            min_frequency=MIN_PAIR_COUNT,
            special_tokens=base,
            continuing_subword_prefix=_prefix(config),
            show_progress=False,
        )
        n_captions = 0

        def counted() -> Iterator[str]:
            nonlocal n_captions
            for caption in captions:
                n_captions += 1
                yield _without_surrogates(caption)

        bpe.train_from_iterator(counted(), trainer)
        if n_captions == 0:
            raise ValueError(
                "there are 0 captions to train a tokenizer on; at least 1 is needed: check the data"
            )
        model = json.loads(bpe.to_str())["model"]
        merges = [(left, right) for left, right in model["merges"]]
        trained = models.BPE(model["vocab"], merges, continuing_subword_prefix=_prefix(config))
        return cls(_pipeline(trained, config).to_str(), config)

    @property
    def n_vocab(self) -> int:
        """BPE entries really in the vocabulary, V."""
        return len(self._token_of)

    @property
    def max_tokens(self) -> int:
        """Text positions T."""
        return self.config.max_tokens

    @property
    def n_ids(self) -> int:
        """All text ids: V BPE entries, then T pads."""
        return self.n_vocab + self.max_tokens

    @property
    def fingerprint(self) -> str:
        """Return the sha256 (hexadecimal) of tokenizer.json and the config, whatever their spacing."""
        return fingerprint_of(self._json, self.config)

    def normalize(self, caption: str) -> str:
        """Return the caption as the model reads it: NFC, lower case, single spaces, stripped ends."""
        return str(self._bpe.normalizer.normalize_str(_without_surrogates(caption)))

    def count(self, caption: str) -> int:
        """Return the number of BPE tokens of a caption, whatever the limit."""
        return len(self._plain(caption))

    def encode(
        self,
        caption: str,
        *,
        truncate: bool = False,
        dropout: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> list[int]:
        """Return the BPE ids of a caption, without pads; an empty caption gives [].

        Args:
            caption: any text.
            truncate: keep the first `max_tokens` of a longer caption instead of raising.
            dropout: probability in [0, 1] of skipping each candidate merge (paper: 0.1 in training, App.
            B.2).
                A caption that fits only without dropout is encoded without it: noise never cuts a caption.
            rng: the source of dropout; needed when dropout > 0.

        Raises:
            ValueError: the caption is longer than `max_tokens`; dropout is out of range or has no generator.
        """
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout is {dropout}; it is a probability: choose a number from 0 to 1")
        if dropout > 0.0:
            if rng is None:
                raise ValueError(f"dropout is {dropout} but there is no generator: pass rng as well")
            ids = self._with_dropout(caption, dropout, rng)
            if len(ids) <= self.max_tokens:
                return ids
        ids = self._plain(caption)
        if len(ids) > self.max_tokens and not truncate:
            raise ValueError(
                f"caption has {len(ids)} tokens; the model reads {self.max_tokens}: "
                "shorten it, or pass truncate=True"
            )
        return ids[: self.max_tokens]

    def pad(self, ids: Sequence[int]) -> npt.NDArray[np.int64]:
        """Fill ids up to (T,) int64 with the pad of each empty position, V + p (paper §2.2).

        ValueError when there are more than T ids, or an id is not a BPE entry.
        """
        if len(ids) > self.max_tokens:
            raise ValueError(
                f"there are {len(ids)} token ids; the model reads {self.max_tokens}: cut them first"
            )
        self._check_ids(ids, self.n_vocab)
        padded = self.n_vocab + np.arange(self.max_tokens, dtype=np.int64)  # (T,)
        padded[: len(ids)] = ids
        return padded

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, without pads; ValueError for an id beyond the pads.

        With space tokens this is exactly the normalised caption. Without them spaces are put back between
        words and after closing punctuation: the words are exact, the spaces a convention ("12" and "1 2" are
        the same ids).
        """
        ids = [int(i) for i in ids]
        self._check_ids(ids, self.n_ids)
        tokens = [self._token_of[i] for i in ids if i < self.n_vocab]
        if self.config.space_tokens:
            return self._text("".join(tokens))
        words: list[str] = []  # in byte symbols
        for token in tokens:
            if token.startswith(CONTINUATION) and words:
                words[-1] += token.removeprefix(CONTINUATION)
            else:
                words.append(token.removeprefix(CONTINUATION))
        text = ""
        for word in map(self._text, words):
            text += f" {word}" if _stand_apart(text, word) else word
        return text

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json (the Hugging Face format) and config.json into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files.write_bytes(folder / "tokenizer.json", self._json.encode())
        files.write_json(folder / "config.json", self.config.model_dump(mode="json"))

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str]) -> Tokenizer:
        """Read a folder that `save_pretrained` wrote, checked against ../manifest.json when there is one.

        ValueError when a file is missing, was changed, or is not a tokenizer of ours.
        """
        folder = checked_component(folder, ("config.json", "tokenizer.json")).path
        config_path, tokenizer_path = folder / "config.json", folder / "tokenizer.json"
        config = validate(TokenizerConfig, files.read_json(config_path), str(config_path))
        try:
            return cls(json.dumps(files.read_json(tokenizer_path), ensure_ascii=False), config)
        except ValueError as error:
            text = str(error)
            raise ValueError(text if str(tokenizer_path) in text else f"{tokenizer_path}: {text}") from error

    def _plain(self, caption: str) -> list[int]:
        # The encoder caches word -> ids by itself.
        ids: list[int] = self._bpe.encode(_without_surrogates(caption), add_special_tokens=False).ids
        return ids

    def _with_dropout(self, caption: str, dropout: float, rng: np.random.Generator) -> list[int]:
        prefix = _prefix(self.config)
        ids: list[int] = []
        for word, _ in self._bpe.pre_tokenizer.pre_tokenize_str(self.normalize(caption)):
            symbols = [self._id_of[prefix + s if i else s] for i, s in enumerate(word)]
            ids += self._merge(symbols, dropout, rng)
        return ids

    def _merge(self, symbols: list[int], dropout: float, rng: np.random.Generator) -> list[int]:
        """Merge one word by the best candidate that is not skipped, again and again (Provilkov, algorithm 1).

        The paper draws for every candidate at every step; drawing only until one is kept has the same
        distribution, and leaves a word of n symbols at O(n log n).
        """
        ids: list[int | None] = list(symbols)  # None: merged into the symbol before it
        following = list(range(1, len(ids) + 1))  # index of the next living symbol; len(ids) is the end
        previous = list(range(-1, len(ids) - 1))
        candidates: list[tuple[int, int, int]] = []  # (rank, position of the left symbol, merged id)

        def pair_at(left: int) -> tuple[int, int, int] | None:
            right = following[left] if left >= 0 else len(ids)
            if right >= len(ids):
                return None
            left_id, right_id = ids[left], ids[right]
            if left_id is None or right_id is None or (left_id, right_id) not in self._merges:
                return None
            rank, merged = self._merges[left_id, right_id]
            return rank, left, merged

        candidates = [pair for left in range(len(ids)) if (pair := pair_at(left)) is not None]
        heapq.heapify(candidates)
        skipped: list[tuple[int, int, int]] = []
        while candidates:
            best = heapq.heappop(candidates)
            _, left, merged = best
            if pair_at(left) != best:  # a neighbour has merged since
                continue
            if rng.random() < dropout:
                skipped.append(best)
                continue
            right = following[left]
            ids[left], ids[right] = merged, None
            following[left] = following[right]
            if following[left] < len(ids):
                previous[following[left]] = left
            for pair in (*skipped, pair_at(previous[left]), pair_at(left)):
                if pair is not None:
                    heapq.heappush(candidates, pair)
            skipped.clear()
        return [i for i in ids if i is not None]

    def _text(self, symbols: str) -> str:
        return bytes(self._byte_of[s] for s in symbols).decode("utf-8", "replace")

    def _check_ids(self, ids: Sequence[int], n_allowed: int) -> None:
        wrong = next((i for i in ids if not 0 <= i < n_allowed), None)
        if wrong is not None:
            raise ValueError(f"token id {wrong} is not in this vocabulary; ids are 0 to {n_allowed - 1}")


def _without_surrogates(caption: str) -> str:
    """Join surrogate pairs (half-decoded JSON), replace lone ones by U+FFFD: neither is Unicode text."""
    if not isinstance(caption, str):
        raise ValueError(f"caption is {type(caption).__name__}; it must be text: pass a string")
    try:
        caption.encode()
        return caption
    except UnicodeEncodeError:
        return caption.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _byte_alphabet() -> list[str]:
    """Return the character that stands for each byte, in the byte-level alphabet of `tokenizers`."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    stand_in = {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [stand_in.get(byte, chr(byte)) for byte in range(256)]


def _prefix(config: TokenizerConfig) -> str:
    return "" if config.space_tokens else CONTINUATION


def _base_symbols(config: TokenizerConfig) -> list[str]:
    """Return what every vocabulary holds: all bytes, and marked, those that can continue a word."""
    alphabet = _byte_alphabet()
    if config.space_tokens:
        return alphabet
    utf8_continuation = alphabet[0x80:0xC0]
    return alphabet + [CONTINUATION + symbol for symbol in (*string.ascii_lowercase, *utf8_continuation)]


def _pipeline(model: models.BPE, config: TokenizerConfig) -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(model)
    bpe.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.NFC(),  # lower-casing can take a text out of NFC
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    steps = [
        pre_tokenizers.Split(Regex("[a-z]+|[^a-z]"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    if config.space_tokens:
        bpe.decoder = decoders.ByteLevel()
    else:
        steps.insert(0, pre_tokenizers.Split(" ", "removed"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return bpe


def _read_bpe(tokenizer_json: str, config: TokenizerConfig) -> tokenizers.Tokenizer:
    """Parse tokenizer.json and check all that the methods above rely on."""
    try:
        bpe = tokenizers.Tokenizer.from_str(tokenizer_json)
        contents = json.loads(tokenizer_json)
        model, vocab = contents["model"], contents["model"]["vocab"]
        prefix = model["continuing_subword_prefix"] or ""
        added = contents["added_tokens"]
        is_bpe = model["type"] == "BPE" and bpe.normalizer is not None and bpe.pre_tokenizer is not None
    except Exception as error:  # `tokenizers` raises plain Exception
        raise ValueError(f"not a readable BPE tokenizer ({error})") from error
    if not is_bpe or added:
        raise ValueError("not a tokenizer that this package wrote: train one with `dalle train`")
    if prefix != _prefix(config):
        raise ValueError(f"space_tokens is {config.space_tokens} in config.json, but the vocabulary differs")
    if sorted(vocab.values()) != list(range(len(vocab))) or len(vocab) > config.vocab_size:
        raise ValueError(f"the ids of {len(vocab)} entries are not 0 to at most {config.vocab_size - 1}")
    missing = [symbol for symbol in _base_symbols(config) if symbol not in vocab]
    if missing:
        raise ValueError(
            f"{len(missing)} symbols of the base alphabet are missing, the first is {missing[0]!r}"
        )
    return bpe


def _stand_apart(text: str, word: str) -> bool:
    """Say whether a space is set between decoded text and its next word, where spaces were dropped."""
    if not text or not word:
        return False
    left, right = text[-1], word[0]
    letters_digits = string.ascii_letters + string.digits
    if left in string.digits and right in string.digits:
        return False
    return left in letters_digits + CLOSING_MARKS and right in letters_digits + "("
