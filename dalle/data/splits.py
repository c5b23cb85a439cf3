"""Which split a pair belongs to: one rule for every layout.

1. A `split` column, where the row has one.
2. Else the names of folders and files: train, validation | valid | val | dev, test (in any case, and the Hub's other
   words for them), of the table, shard or annotation file first, then of the nearest folder.
3. Else the hash of the sample's own key, without container and suffix, so that the same pairs as a folder, tar or
   table hold out the same ones, and resharding moves none.

Source: the Hub's rules for names (huggingface.co/docs/hub/datasets-file-names-and-splits).
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from dalle.data.pair import Pair

WORDS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),  # restval: Karpathy's split of COCO
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# Words that may stand beside a split's in a folder's name; with others it is the name of what the pictures show.
NEUTRAL = frozenset(
    "images image imgs img pictures pics photos data dataset set split captions annotations coco".split()
)
CONTAINERS = (".tar", ".parquet", ".arrow", ".csv", ".tsv", ".jsonl", ".json")

HELD_OUT_FRACTION = 0.02  # of the pairs whose layout names no split
MIN_HELD_OUT = 8
MAX_HELD_OUT_FRACTION = 0.25


def split_pairs(pairs: Sequence[Pair]) -> tuple[list[Pair], dict[str, int], frozenset[str]]:
    """The pairs with their splits, how many pairs each rule decided, and the keys of those that the hash decided."""
    rules = Counter[str]()
    named = names_of_homes(pairs)
    decided: list[Pair] = []
    open_pairs: list[Pair] = []
    for pair in pairs:
        if pair.split:
            rules["the split column"] += 1
            decided.append(replace(pair, split=WORDS.get(pair.split.strip().lower(), pair.split)))
        elif (split := named[_names(pair)]) is not None:
            rules["names of folders and files"] += 1
            decided.append(replace(pair, split=split))
        else:
            open_pairs.append(pair)
    if open_pairs:
        rules["a hash of each sample's own key"] += len(open_pairs)
    return [*decided, *by_hash(open_pairs)], dict(rules), frozenset(pair.key for pair in open_pairs)


def by_hash(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with the splits that the hash of each sample's own key decides."""
    held_out = _held_out(pairs)
    return [replace(pair, split="validation" if pair.key in held_out else "train") for pair in pairs]


def names_of_homes(pairs: Sequence[Pair]) -> dict[tuple[str, ...], str | None]:
    """The split that each path of names in the set says; None for what is to be hashed.

    All None when `train` is the only split named: so the Hub calls a set that is not divided at all. Where a
    validation split is named, what has no name is trained on.
    """
    named = {names: _named(names) for names in dict.fromkeys(map(_names, pairs))}
    found = set(named.values()) - {None}
    if found <= {"train"} or found.isdisjoint(WORDS.values()):
        return dict.fromkeys(named)
    rest = "train" if "validation" in found else None
    return {names: rest if split is None else split for names, split in named.items()}


def _names(pair: Pair) -> tuple[str, ...]:
    """The names that may say a pair's split, the first to be asked first: its home's, then the nearest folder's."""
    folders = PurePosixPath(pair.key).parent.parts
    home = PurePosixPath(pair.home)
    own = (home.name,) if pair.home else ()
    parts = [*own, *reversed(folders), *reversed(home.parent.parts)]
    return tuple(dict.fromkeys(parts))


def _named(names: tuple[str, ...]) -> str | None:
    is_file = [name.lower().endswith(CONTAINERS) for name in names]
    for name, is_container in zip(names, is_file, strict=True):
        split = _of_file(name) if is_container else _of_folder(name)
        if split is not None:
            return split
    for name in itertools.compress(names, is_file):  # testA-00000-of-00001: must not become train
        other = re.fullmatch(r"(.+)-\d+-of-\d+", PurePosixPath(name).stem)
        if other:
            return other.group(1)
    return None


def _of_file(name: str) -> str | None:
    """train-00000-of-00001.parquet, captions_val2017.json, cc3m-train-0001.tar; of two different words neither."""
    found = {WORDS[word] for word in _words(PurePosixPath(name).stem) if word in WORDS}
    return found.pop() if len(found) == 1 else None


def _of_folder(name: str) -> str | None:
    """train, val2017, images_test; but not `test tube`, which is what its pictures show."""
    words = _words(name)
    found = {WORDS[word] for word in words if word in WORDS}
    return found.pop() if len(found) == 1 and all(w in WORDS or w in NEUTRAL for w in words) else None


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", name.lower())


def _held_out(pairs: Sequence[Pair]) -> frozenset[str]:
    """The keys with the smallest hashes: the same ones on every machine, and spread over the whole set."""
    ranked = sorted(pairs, key=lambda p: (hashlib.sha256(p.sample.encode()).digest(), p.captions, p.key))
    wanted = max(MIN_HELD_OUT, round(HELD_OUT_FRACTION * len(ranked)))
    return frozenset(p.key for p in ranked[: min(wanted, int(MAX_HELD_OUT_FRACTION * len(ranked)))])
