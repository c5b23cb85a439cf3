"""Captioned pictures: one reader for all common layouts, with the same splits, order and checks.

Source: section 2.3 of the paper (pairs of text and image); splits and file formats are not in it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import overload

from dalle.data.folder import NO_CAPTION_FILE
from dalle.data.layouts import LOOKED_FOR, read_samples
from dalle.data.pair import BadSample, Pair
from dalle.data.reading import MAX_BAD_FRACTION, first_reasons, is_too_many, too_many
from dalle.data.samples import ReadOptions
from dalle.data.splits import split_pairs


@dataclass(frozen=True)
class PairSet:
    """Pairs sorted by key, and the samples that were skipped."""

    pairs: tuple[Pair, ...]
    bad: list[BadSample] = field(default_factory=list)
    split_rules: Mapping[str, int] = field(default_factory=dict)  # pairs that each rule of splits decided
    notes: tuple[str, ...] = ()  # what lies there and was not read, one line each
    hashed: tuple[frozenset[str], ...] = ()  # keys whose split a hash decided, one set a data set
    contents: Mapping[str, str] | None = None  # sha256 of each picture by key, where they were checked

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> "PairSet": ...
    def __getitem__(self, index: int | slice) -> "Pair | PairSet":
        return PairSet(self.pairs[index]) if isinstance(index, slice) else self.pairs[index]

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 of all keys, captions and splits, and of the pictures' contents where they were checked, else sizes.

        The same wherever the set lies.
        """
        digest = hashlib.sha256()
        for pair in self.pairs:
            picture = pair.n_bytes if self.contents is None else self.contents[pair.key]
            weight = [] if pair.weight == 1 else [pair.weight]
            line = json.dumps([pair.key, pair.captions, pair.split, picture, *weight], ensure_ascii=True)
            digest.update(line.encode() + b"\n")
        return digest.hexdigest()

    @cached_property
    def counts(self) -> dict[str, int]:
        """Pairs per split, by name."""
        return dict(sorted(Counter(pair.split for pair in self.pairs).items()))

    def of_split(self, name: str) -> "PairSet":
        """The pairs of one split; empty when there is none of that name."""
        return PairSet(tuple(pair for pair in self.pairs if pair.split == name))

    def require_mostly_good(self, limit: float = MAX_BAD_FRACTION) -> None:
        """Raise ValueError, with counts and first reasons, when too many samples were skipped; see reading.py.

        A damaged shard or table holds a number of pictures that nobody knows: only a limit of 1 lets it pass.
        """
        total = len(self.pairs) + len(self.bad)
        containers = [sample for sample in self.bad if sample.is_container]
        if containers and limit < 1:
            raise ValueError(
                f"{len(containers)} shards or tables are damaged, and nobody knows how many pictures they hold: repair "
                f"or remove them, or pass --skip-bad. First: {first_reasons(containers)}"
            )
        if is_too_many(len(self.bad), total, limit):
            raise too_many(self.bad, total, limit)


def read_pairs(
    source: str | Path, options: ReadOptions | None = None, exclude: tuple[str, ...] = ()
) -> PairSet:
    """Read a data set in all the layouts that it has; no picture is opened.

    `source` is a folder; or a table, tar shard or COCO file; or an address of one (s3://, gs://, https://, hf://); or
    the id of a data set on the Hugging Face Hub (`owner/name` or `owner/name@revision`; a path that exists goes first).
    Folders in `exclude` are not read. ValueError when the source is missing and when no captions are found. Bad samples
    are listed in `PairSet.bad`.
    """
    found: list[Pair] = []
    bad: list[BadSample] = []
    taken: set[str] = set()
    samples, files = read_samples(source, options or ReadOptions(), exclude)
    for sample in samples:
        if isinstance(sample, BadSample):
            bad.append(sample)
        elif sample.key in taken:
            bad.append(BadSample(sample.key, "duplicate key"))
        else:
            taken.add(sample.key)
            found.append(sample)
    if not found and bad and all(sample.reason.startswith(NO_CAPTION_FILE) for sample in bad):
        raise ValueError(
            f"{source} holds {len(bad)} pictures and no captions: write a .txt of the same name beside each, or take the "
            "captions from the names of files or folders with --captions-from name or folder"
        )
    if not found:
        skipped = f"; {len(bad)} bad samples, first: {first_reasons(bad)}" if bad else ""
        raise ValueError(f"no captions found in {source}: {LOOKED_FOR}{skipped}")
    decided, rules, hashed = split_pairs(found)
    pairs = sorted((replace(pair, home="") for pair in decided), key=lambda pair: pair.key)
    return PairSet(tuple(pairs), sorted(bad), rules, tuple(files.notes), (hashed,))
