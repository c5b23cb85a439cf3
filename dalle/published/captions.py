"""Tokenizers of published models, behind one interface: that of `dalle.tokenizer.Tokenizer`.

Most are files of Hugging Face `tokenizers`. YouTokenToMe's is not, since two of its merges may spell the same word: its
merges are followed by id. Both are one JSON file here; what stands before and after a caption is in the config.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Self

import ftfy
import numpy as np
import numpy.typing as npt
import tokenizers
from pydantic import Field

from dalle.config import Config, validate
from dalle.files import read_json, write_bytes, write_json
from dalle.tokenizer import fingerprint_of

WORD_START = "▁"  # begins every word of YouTokenToMe
SPACES = " \t\n\v\f\r" + WORD_START
MAX_WORD = 1000  # characters that one id may spell
Id = Annotated[int, Field(ge=0)]


class CaptionTokenizerConfig(Config):
    """How a published model frames its captions."""

    max_tokens: Annotated[int, Field(gt=0)]  # text slots T, what frames a caption included
    n_vocab: Annotated[int, Field(gt=0)]  # ids that a caption may hold
    before: tuple[Id, ...] = ()  # ids that begin each caption
    after: tuple[Id, ...] = ()  # ids that end each caption
    pad_id: Id = 0  # fills the slots behind
    mends_text: bool = False  # ftfy, HTML entities, single spaces and lower case first, as OpenAI's CLIP does


class MergeTable:
    """YouTokenToMe's BPE: characters, then merges of two ids into one, the first merges first."""

    def __init__(self, tree: Any) -> None:
        """Take {"characters": {...}, "merges": [[left, right, merged], ...], "unknown": id}; ValueError for others."""
        try:
            self._id_of = {str(character): int(index) for character, index in tree["characters"].items()}
            self._merges = {(int(x), int(y)): (rank, int(z)) for rank, (x, y, z) in enumerate(tree["merges"])}
            self._unknown = int(tree["unknown"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"no table of merges: {error!r}") from None
        self._text_of = {index: character for character, index in self._id_of.items()}
        for x, y, z in tree["merges"]:
            self._text_of[int(z)] = self._text_of.get(int(x), "") + self._text_of.get(int(y), "")
            if len(self._text_of[int(z)]) > MAX_WORD:
                raise ValueError(f"merge {z} spells a word of more than {MAX_WORD} characters")

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; a run of unknown characters is one unknown id."""
        for space in SPACES:
            text = text.replace(space, " ")
        return [index for word in text.split() for index in self._encode_word(word)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids."""
        return "".join(self._text_of.get(i, "") for i in ids).replace(WORD_START, " ").strip()

    def _encode_word(self, word: str) -> list[int]:
        ids: list[int] = [self._id_of[WORD_START]]
        was_unknown = False
        for character in word:
            index = self._id_of.get(character)
            if index is not None or not was_unknown:
                ids.append(self._unknown if index is None else index)
            was_unknown = index is None
        while len(ids) > 1:
            pairs = enumerate(pairwise(ids))
            ranked = [(self._merges[pair][0], i) for i, pair in pairs if pair in self._merges]
            if not ranked:
                break
            _, at = min(ranked)
            ids[at : at + 2] = [self._merges[ids[at], ids[at + 1]][1]]
        return ids


class CaptionTokenizer:
    """Captions to the ids that a published model reads, and back."""

    def __init__(self, tokenizer_json: str, config: CaptionTokenizerConfig) -> None:
        """Take the JSON of Hugging Face `tokenizers`, or of a `MergeTable`; ValueError for another."""
        self.config, self._json = config, tokenizer_json
        tree = json.loads(tokenizer_json)
        self._bpe: tokenizers.Tokenizer | MergeTable
        if isinstance(tree, dict) and "characters" in tree:
            self._bpe = MergeTable(tree)
        else:
            try:
                self._bpe = tokenizers.Tokenizer.from_str(tokenizer_json)
            except Exception as error:  # the library raises plain Exception
                raise ValueError(f"not a tokenizer of Hugging Face: {' '.join(str(error).split())}") from None
            self._bpe.no_padding()
            self._bpe.no_truncation()

    @property
    def n_vocab(self) -> int:
        """Ids that a caption may hold, V."""
        return self.config.n_vocab

    @property
    def max_tokens(self) -> int:
        """Text slots T."""
        return self.config.max_tokens

    @property
    def fingerprint(self) -> str:
        """Return the sha256 (hexadecimal) of the tokenizer and its config."""
        return fingerprint_of(self._json, self.config)

    def count(self, caption: str) -> int:
        """Return the number of ids of a caption, whatever the limit."""
        return len(self._framed(caption))

    def encode(
        self,
        caption: str,
        *,
        truncate: bool = False,
        dropout: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> list[int]:
        """Return the ids of a caption, without pads.

        With `truncate` the first T of a longer one, as the published code cuts. Raises ValueError for a caption that is
        longer, and for dropout, which these tokenizers do not have.
        """
        if dropout:
            raise ValueError("a published tokenizer has no BPE dropout: set it to 0")
        ids = self._framed(caption)
        if len(ids) > self.max_tokens and not truncate:
            raise ValueError(
                f"caption has {len(ids)} tokens; the model reads {self.max_tokens}: shorten it, or pass truncate=True"
            )
        return ids[: self.max_tokens]

    def pad(self, ids: Sequence[int]) -> npt.NDArray[np.int64]:
        """Fill ids up to (T,) int64; ValueError for more than T of them, or ids that the model does not know."""
        if len(ids) > self.max_tokens:
            raise ValueError(
                f"there are {len(ids)} token ids; the model reads {self.max_tokens}: cut them first"
            )
        wrong = next((i for i in ids if not 0 <= i < self.n_vocab), None)
        if wrong is not None:
            raise ValueError(f"token id {wrong} is not in this vocabulary; ids are 0 to {self.n_vocab - 1}")
        padded = np.full(self.max_tokens, self.config.pad_id, dtype=np.int64)
        padded[: len(ids)] = ids
        return padded

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, without what frames it."""
        framing = {*self.config.before, *self.config.after, self.config.pad_id}
        return str(self._bpe.decode([int(i) for i in ids if int(i) not in framing]))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json and config.json into a folder."""
        write_bytes(Path(folder) / "tokenizer.json", self._json.encode())
        write_json(Path(folder) / "config.json", self.config.model_dump(mode="json"))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Read what `save_pretrained` wrote; ValueError when a file is missing or damaged."""
        config_path, path = Path(folder) / "config.json", Path(folder) / "tokenizer.json"
        config = validate(CaptionTokenizerConfig, read_json(config_path), str(config_path))
        try:
            return cls(json.dumps(read_json(path), ensure_ascii=False), config)
        except ValueError as error:
            raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error

    def _framed(self, caption: str) -> list[int]:
        if not isinstance(caption, str):
            raise ValueError(f"caption is {type(caption).__name__}; it must be text: pass a string")
        caption = caption.encode("utf-8", "replace").decode()  # lone surrogates have no bytes
        if self.config.mends_text:
            caption = html.unescape(html.unescape(ftfy.fix_text(caption)))
            caption = " ".join(caption.split()).lower()
        if isinstance(self._bpe, MergeTable):
            ids = self._bpe.encode(caption)
        else:
            ids = self._bpe.encode(caption, add_special_tokens=False).ids
        return [*self.config.before, *ids, *self.config.after]
