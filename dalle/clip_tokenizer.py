"""The byte-level BPE of OpenAI's CLIP, for published weights; a CLIP of our own reads `dalle.tokenizer.Tokenizer`.

Source: openai/CLIP, `clip/simple_tokenizer.py` and `clip.tokenize`. The merges are not shipped here: they come from
a file of theirs (`bpe_simple_vocab_16e6.txt.gz`) or from the folder of a published model. Splitting and merging are
Hugging Face `tokenizers`.

differs: the text `<|endoftext|>` in a caption is text; in OpenAI's code it ends the caption early.
"""

from __future__ import annotations

import gzip
import html
import json
import zlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import ftfy
import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from dalle import files

N_MERGES = 48_894  # of the file's 262,144 lines: 49,152 - 256 - 2
END_OF_WORD = "</w>"
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
MERGES = "merges.txt"
MAX_BYTES = 2**24  # of a merges file; the published one inflates to 3.2 MB


class CLIPTokenizer:
    """Captions to token ids: 256 bytes, 256 bytes that end a word, one id a merge, start of text, end of text."""

    def __init__(self, merges: Sequence[tuple[str, str]], max_tokens: int = 77) -> None:
        """Build the vocabulary from its merges, best first; ValueError when one names an unknown symbol."""
        symbols = _byte_symbols()
        names = [*symbols, *(symbol + END_OF_WORD for symbol in symbols)]
        names += [left + right for left, right in merges]
        vocab = {name: index for index, name in enumerate(names)}
        for left, right in merges:
            if left not in vocab or right not in vocab:
                raise ValueError(f"merge {left!r} + {right!r} names a symbol that is not in the vocabulary")
        self.merges, self.max_tokens = list(merges), max_tokens
        self.n_vocab = len(names) + 2
        self.start_of_text, self.end_of_text = len(names), len(names) + 1
        self._bpe = tokenizers.Tokenizer(models.BPE(vocab, self.merges, end_of_word_suffix=END_OF_WORD))
        pieces = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])

    @property
    def vocab(self) -> dict[str, int]:
        """Bytes and merges by name, without the two specials."""
        return dict(self._bpe.get_vocab())

    def to_huggingface(self) -> str:
        """Return the merges and their splitting as the JSON of Hugging Face `tokenizers`."""
        return str(self._bpe.to_str())

    def encode(self, caption: str) -> list[int]:
        """Return the ids of a caption, without start and end."""
        caption = caption.encode("utf-8", "replace").decode()  # lone surrogates have no bytes
        caption = html.unescape(html.unescape(ftfy.fix_text(caption)))
        return list(self._bpe.encode(" ".join(caption.split()).lower()).ids)

    def count(self, caption: str) -> int:
        """How many ids a caption has, start and end included."""
        return len(self.encode(caption)) + 2

    def pad(self, ids: Sequence[int]) -> npt.NDArray[np.int64]:
        """Start, ids, end, then zeros: (T,) int64; ValueError when they are more than T."""
        if len(ids) + 2 > self.max_tokens:
            raise ValueError(
                f"caption has {len(ids) + 2} tokens; this CLIP reads {self.max_tokens}: shorten it"
            )
        row = np.zeros(self.max_tokens, dtype=np.int64)
        row[: len(ids) + 2] = [self.start_of_text, *ids, self.end_of_text]
        return row

    def __call__(self, caption: str, truncate: bool = False) -> npt.NDArray[np.int64]:
        """Return a caption as the text tower reads it, (T,) int64; with `truncate` a long one is cut before its end."""
        ids = self.encode(caption)
        return self.pad(ids[: self.max_tokens - 2] if truncate else ids)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the merges, one a line."""
        lines = "".join(f"{left} {right}\n" for left, right in self.merges)
        files.write_bytes(Path(folder) / MERGES, lines.encode())

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], max_tokens: int = 77) -> CLIPTokenizer:
        """Read what `save_pretrained` wrote; ValueError when it is missing or damaged."""
        path = Path(folder) / MERGES
        return cls(_merges_of(_read(path).decode(), path), max_tokens)

    @classmethod
    def from_openai(cls, path: str | Path, max_tokens: int = 77) -> CLIPTokenizer:
        """Read `bpe_simple_vocab_16e6.txt.gz`, or the same file inflated; ValueError for another."""
        path = Path(path)
        lines = _read(path).decode(errors="replace").split("\n")
        if len(lines) <= N_MERGES or "version" not in lines[0]:
            raise ValueError(f"{path} is not bpe_simple_vocab_16e6.txt.gz: it has {len(lines)} lines")
        return cls(_merges_of("\n".join(lines[1 : N_MERGES + 1]), path), max_tokens)

    @classmethod
    def from_huggingface(cls, path: str | Path, max_tokens: int = 77) -> CLIPTokenizer:
        """Read the `tokenizer.json` of a published CLIP on the Hub; ValueError when its ids are not OpenAI's."""
        path = Path(path)
        try:
            model = json.loads(_read(path))["model"]
            merges = []
            for merge in model["merges"]:  # "a b" in older files
                left, right = merge.split(" ") if isinstance(merge, str) else merge
                merges.append((left, right))
            vocab = model["vocab"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not the tokenizer.json of a CLIP: {error}") from error
        tokenizer = cls(merges, max_tokens)
        if any(vocab.get(name) != index for name, index in tokenizer.vocab.items()):
            raise ValueError(f"{path}: its ids are not those of OpenAI's CLIP")
        return tokenizer


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if data[:2] == b"\x1f\x8b":
            with gzip.open(path) as inflated:
                data = inflated.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} holds more than {MAX_BYTES} bytes: no merges of a CLIP")
    return data


def _merges_of(text: str, path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(text.rstrip("\n").split("\n"), start=1):
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"{path}: merge {number} is {line[:40]!r}, not two symbols")
        merges.append((parts[0], parts[1]))
    return merges


def _byte_symbols() -> list[str]:
    """Return the printable stand-in of each byte, in the order of the ids: bytes that print first (GPT-2's alphabet)."""
    printing = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printing]
    return [*map(chr, printing), *(chr(256 + n) for n in range(len(others)))]
