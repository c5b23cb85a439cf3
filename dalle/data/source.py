"""Which data a command reads, and how: one record that train, encode, inspect and filter share."""

import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from dalle.data.pairs import PairSet, read_pairs
from dalle.data.places import is_address
from dalle.data.reading import MAX_BAD_FRACTION
from dalle.data.samples import ReadOptions


@dataclass(frozen=True)
class Source:
    """One or several data sets, each a folder, file, address or Hub id."""

    data: tuple[str, ...]
    weights: tuple[
        float, ...
    ] = ()  # how often a set's pictures are seen, relative to the others; (): equally
    options: ReadOptions = field(default_factory=ReadOptions)
    skip_bad: bool = False  # any number of bad samples may be left out

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("no data given: give a folder, a table, a .tar, an address or a Hub id")
        if self.weights and len(self.weights) != len(self.data):
            raise ValueError(
                f"--weight has {len(self.weights)} numbers for {len(self.data)} data sets: give one each"
            )
        if any(not 0 < weight < float("inf") for weight in self.weights):
            raise ValueError(
                f"--weight {','.join(f'{w:g}' for w in self.weights)}: weights have to be above 0"
            )

    @classmethod
    def of(cls, data: "str | Path | Source") -> "Source":
        """The source of one data set; itself when it is one already."""
        return data if isinstance(data, Source) else cls((str(data),))

    def __str__(self) -> str:
        return ", ".join(self.data)

    @property
    def name(self) -> str:
        """The data sets' own names, without their folders."""
        return ", ".join(Path(data.rstrip("/")).name for data in self.data)

    @property
    def max_bad(self) -> float:
        """The fraction of samples that may be bad; see reading.py."""
        return 1.0 if self.skip_bad else MAX_BAD_FRACTION

    def read(self, exclude: tuple[str, ...] = ()) -> PairSet:
        """Read all data sets; keys of several begin with the name of theirs. Errors as `read_pairs`."""
        for data in self.data:
            if not is_address(data) and os.path.realpath(data) in map(os.path.realpath, exclude):
                raise ValueError(f"{data} is --out as well: choose another folder for what is written")
        sets = [read_pairs(data, self.options, exclude) for data in self.data]
        if len(sets) == 1:
            return sets[0]
        names = [Path(data.rstrip("/")).name for data in self.data]
        names = [f"{i}-{name}" if names.count(name) > 1 else name for i, name in enumerate(names, start=1)]
        pairs, bad, hashed, notes = [], [], [], []
        rules = Counter[str]()
        for name, found, weight in zip(names, sets, self.weights or [1.0] * len(sets), strict=True):
            pairs += [replace(pair, key=f"{name}/{pair.key}", weight=weight) for pair in found]
            bad += [sample._replace(key=f"{name}/{sample.key}") for sample in found.bad]
            hashed += [frozenset(f"{name}/{key}" for key in keys) for keys in found.hashed]
            notes += [f"{name}: {note}" for note in found.notes]
            rules.update(found.split_rules)
        pairs.sort(key=lambda pair: pair.key)
        return PairSet(tuple(pairs), sorted(bad), dict(rules), tuple(notes), tuple(hashed))
