"""Tokenizer files of published models -> `CaptionTokenizer`.

Sources: kuprel/min-dalle's `text_tokenizer.py`; kakaobrain/minDALL-E's `tokenizer.py`; DALLE-pytorch's `tokenizer.py`;
VKCOM/YouTokenToMe's model files; OpenAI's CLIP.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from dalle.clip_tokenizer import CLIPTokenizer
from dalle.published.captions import WORD_START, CaptionTokenizer, CaptionTokenizerConfig

MAX_BYTES = 2**25  # of any such file
BART_SPACE = "Ġ"  # begins every word of min-dalle's


def min_dalle_tokenizer(vocab: Path, merges: Path, max_tokens: int, n_vocab: int) -> CaptionTokenizer:
    """Read min-dalle's vocab.json and merges.txt; ValueError for others.

    differs: min-dalle first spells emoji in words by the package `emoji`; here, as all that is not ASCII, they are left
    out.
    """
    ids = _vocabulary(vocab)
    for needed in ("<s>", "</s>", "<unk>", "<pad>"):
        if needed not in ids:
            raise ValueError(f"{vocab} has no {needed}: it is not min-dalle's vocabulary")
    bpe = tokenizers.Tokenizer(models.BPE(ids, _merges(merges, ids), unk_token="<unk>"))
    not_ascii = normalizers.Replace(Regex(r"[^\x00-\x7f]"), "")
    spaces = normalizers.Replace(Regex(" +"), " ")
    bpe.normalizer = normalizers.Sequence([normalizers.Lowercase(), not_ascii, spaces, _trimmed()])
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(BART_SPACE, prepend_scheme="always")
    bpe.decoder = decoders.Metaspace(BART_SPACE)
    config = CaptionTokenizerConfig(
        max_tokens=max_tokens,
        n_vocab=n_vocab,
        before=(ids["<s>"],),
        after=(ids["</s>"],),
        pad_id=ids["<pad>"],
    )
    return CaptionTokenizer(bpe.to_str(), config)


def min_dalle_e_tokenizer(vocab: Path, merges: Path, max_tokens: int, n_vocab: int) -> CaptionTokenizer:
    """Read minDALL-E's bpe-16k-vocab.json and bpe-16k-merges.txt; ValueError for others."""
    ids = _vocabulary(vocab)
    if "[PAD]" not in ids or "[UNK]" not in ids:
        raise ValueError(f"{vocab} has no [PAD] or no [UNK]: it is not minDALL-E's vocabulary")
    # As Hugging Face's CharBPETokenizer sets itself up, with lower case.
    bpe = tokenizers.Tokenizer(
        models.BPE(ids, _merges(merges, ids), unk_token="[UNK]", end_of_word_suffix="</w>")
    )
    bert = normalizers.BertNormalizer(lowercase=False)
    bpe.normalizer = normalizers.Sequence([bert, normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bpe.decoder = decoders.BPEDecoder(suffix="</w>")
    config = CaptionTokenizerConfig(max_tokens=max_tokens, n_vocab=n_vocab, pad_id=ids["[PAD]"])
    return CaptionTokenizer(bpe.to_str(), config)


def youtokentome(path: Path, max_tokens: int, n_vocab: int, is_framed: bool) -> CaptionTokenizer:
    """Read a model file of YouTokenToMe; with `is_framed` its start and end tokens frame each caption (ru-dalle's)."""
    lines = _text(path).split("\n")
    try:
        n_characters, n_merges = map(int, lines[0].split())
        if len(lines) < n_characters + n_merges + 2:
            raise ValueError("it is cut short")
        pairs = [[int(x) for x in line.split()] for line in lines[1 : n_characters + 1]]
        merges = [[int(x) for x in line.split()] for line in lines[n_characters + 1 :][:n_merges]]
        unknown, pad, start, end = map(int, lines[n_characters + n_merges + 1].split())
        characters = {chr(code): index for code, index in pairs}
        if WORD_START not in characters or any(len(merge) != 3 for merge in merges):
            raise ValueError("it has no word start, or a merge is not one of three ids")
        tree = {"characters": characters, "merges": merges, "unknown": unknown}
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path} is not a model file of YouTokenToMe: {error}") from None
    config = CaptionTokenizerConfig(
        max_tokens=max_tokens,
        n_vocab=n_vocab,
        before=(start,) if is_framed else (),
        after=(end,) if is_framed else (),
        pad_id=max(pad, 0),
    )
    return CaptionTokenizer(json.dumps(tree, ensure_ascii=False), config)


def dalle_pytorch_tokenizer(path: Path, max_tokens: int, n_vocab: int) -> CaptionTokenizer:
    """Read whichever tokenizer a DALLE-pytorch model was trained with, told by the file's content.

    A tokenizer.json of Hugging Face, OpenAI's bpe_simple_vocab_16e6.txt, bert-base-chinese's vocab.txt, or a model file of
    YouTokenToMe. Raises ValueError for others.
    """
    config = CaptionTokenizerConfig(max_tokens=max_tokens, n_vocab=n_vocab)
    with path.open("rb") as file:
        head = file.read(200)
    if head[:2] == b"\x1f\x8b" or b"version" in head.split(b"\n")[0]:
        clip = CLIPTokenizer.from_openai(path, max_tokens)
        return CaptionTokenizer(clip.to_huggingface(), config.model_copy(update={"mends_text": True}))
    if head.lstrip()[:1] == b"{":
        return CaptionTokenizer(_text(path), config)
    if head.startswith(b"[PAD]"):
        lines = _text(path).rstrip("\n").split("\n")
        bert = tokenizers.Tokenizer(
            models.WordPiece({line: i for i, line in enumerate(lines)}, unk_token="[UNK]")
        )
        bert.normalizer = normalizers.BertNormalizer(lowercase=True)
        bert.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        bert.decoder = decoders.WordPiece()
        return CaptionTokenizer(bert.to_str(), config)
    return youtokentome(path, max_tokens, n_vocab, is_framed=False)


def _trimmed() -> normalizers.Normalizer:
    return normalizers.Replace(Regex("^ +| +$"), "")


def _vocabulary(path: Path) -> dict[str, int]:
    try:
        tree: Any = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a vocabulary in JSON: {error}") from None
    if not isinstance(tree, dict) or not all(type(index) is int for index in tree.values()):
        raise ValueError(f"{path} is not a vocabulary: a JSON object of tokens and their ids")
    return tree


def _merges(path: Path, ids: dict[str, int]) -> list[tuple[str, str]]:
    lines = _text(path).rstrip("\n").split("\n")
    pairs = [tuple(line.split()) for line in lines if not line.startswith("#version")]
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    if len(merges) != len(pairs):
        raise ValueError(f"{path} is not a list of merges: a line does not hold two symbols")
    # Merges whose result has no id would be merges into the unknown.
    return [pair for pair in merges if {*pair, "".join(pair)} <= ids.keys()]


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"{path} is larger than {MAX_BYTES:,} bytes: no tokenizer file")
        return data.decode().replace("\r\n", "\n")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
