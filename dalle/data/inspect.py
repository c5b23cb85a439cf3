"""A look over a data set before training on it: splits, sizes, captions and problems.

Source: what the paper's filters speak of (App. C: short captions, aspect ratios outside [1/2, 2]).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from statistics import median

import numpy as np

from dalle.data.pair import BadSample
from dalle.data.pairs import PairSet
from dalle.data.reading import MAX_BAD_FRACTION, read_chunks

CHUNK = 64  # pictures read ahead
MAX_OPENED = 500  # pictures that are opened, evenly spread over the set
MAX_ASPECT_RATIO = 2.0  # App. C


@dataclass(frozen=True, slots=True)
class Range:
    """Least, middle and greatest of some numbers; all 0 when there are none."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, numbers: Sequence[int]) -> "Range":
        return cls(min(numbers), median(numbers), max(numbers)) if numbers else cls(0, 0, 0)

    def __str__(self) -> str:
        return f"{self.min:g} to {self.max:g}, median {self.median:g}"


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` found."""

    n_pairs: int
    splits: dict[str, int]  # pairs per split
    n_captions: int
    n_with_several_captions: int  # pictures
    n_repeated_captions: int  # captions that another caption before them equals
    caption_characters: Range
    caption_words: Range
    n_opened: int  # pictures that the sizes are of
    width: Range  # pixels
    height: Range  # pixels
    n_bad: int  # samples that were skipped on reading
    split_rules: dict[str, int]  # pairs that each rule of splits decided
    trains: str  # whether `dalle train` takes the data: "yes", or why not
    notes: tuple[str, ...]  # what lies there and was not read
    problems: tuple[str, ...]

    def lines(self) -> list[str]:
        """The findings as lines of text."""
        splits = ", ".join(f"{name} {n}" for name, n in self.splits.items())
        several = f"{self.n_with_several_captions} pictures have several"
        opened = "" if self.n_opened == self.n_pairs else f" (of {self.n_opened} pictures opened)"
        return [
            f"pictures  {self.n_pairs} ({splits})",
            f"captions  {self.n_captions}; {several}; {self.n_repeated_captions} repeat an earlier one",
            f"length    characters {self.caption_characters}; words {self.caption_words}",
            f"size      width {self.width}; height {self.height}{opened}",
            f"skipped   {self.n_bad} bad samples",
            *(f"split by  {rule}: {n} pictures" for rule, n in self.split_rules.items()),
            *(f"note      {note}" for note in self.notes),
            *(f"problem   {problem}" for problem in self.problems),
            f"train     {self.trains}",
        ]

    def to_json(self) -> dict[str, object]:
        """The findings as a tree of JSON values."""
        return asdict(self) | {"problems": list(self.problems), "notes": list(self.notes)}


def inspect(pairs: PairSet, max_bad: float = MAX_BAD_FRACTION) -> Inspection:
    """Look over all captions and up to 500 pictures; `max_bad` is the fraction of bad samples that train lets pass."""
    captions = [caption for pair in pairs for caption in pair.captions]
    sizes, unreadable, problems = _sizes(pairs)
    return Inspection(
        n_pairs=len(pairs),
        splits=pairs.counts,
        n_captions=len(captions),
        n_with_several_captions=sum(len(pair.captions) > 1 for pair in pairs),
        n_repeated_captions=len(captions) - len(set(captions)),
        caption_characters=Range.of([len(caption) for caption in captions]),
        caption_words=Range.of([len(caption.split()) for caption in captions]),
        n_opened=len(sizes),
        width=Range.of([width for width, _ in sizes]),
        height=Range.of([height for _, height in sizes]),
        n_bad=len(pairs.bad),
        split_rules=dict(pairs.split_rules),
        trains=_verdict(pairs, unreadable, max_bad),
        notes=pairs.notes,
        problems=(*_split_problems(pairs), *_bad_sample_problems(pairs), *problems),
    )


def _verdict(pairs: PairSet, unreadable: list[BadSample], max_bad: float) -> str:
    """Whether `dalle train` takes the data, as far as the pictures opened tell."""
    try:
        replace(pairs, bad=[*pairs.bad, *unreadable]).require_mostly_good(max_bad)
    except ValueError as error:
        return f"no: {error}"
    held_out = [name for name in pairs.counts if name not in ("train", "excluded")]
    if "train" not in pairs.counts or not held_out:
        return "no: it needs pictures of split train, and some that are held out"
    return f"yes: {pairs.counts['train']} pictures to learn from"


def _sizes(pairs: PairSet) -> tuple[list[tuple[int, int]], list[BadSample], list[str]]:
    """Width and height of the pictures opened, those that cannot be, and what is wrong with some of them."""
    chosen = np.unique(np.linspace(0, len(pairs) - 1, min(MAX_OPENED, len(pairs))).round().astype(int))
    opened = [pairs[index] for index in chosen.tolist()]
    sizes: list[tuple[int, int]] = []
    unreadable: list[BadSample] = []
    for pair, found in zip(
        opened, chain.from_iterable(read_chunks(opened, CHUNK, lambda _, picture: picture.size)), strict=True
    ):
        if isinstance(found, ValueError):
            unreadable.append(BadSample(pair.key, str(found)))
        else:
            sizes.append(found)
    problems = []
    if unreadable:
        n_bad = f"{len(unreadable)} of {len(chosen)}"
        problems.append(f"{n_bad} pictures opened are corrupt: {unreadable[0].reason}")
    n_long = sum(max(size) > MAX_ASPECT_RATIO * min(size) for size in sizes)
    if n_long:
        problems.append(
            f"{n_long} of {len(sizes)} pictures opened are longer than 2:1: a square crop misses much of them"
        )
    return sizes, unreadable, problems


def _split_problems(pairs: PairSet) -> list[str]:
    missing = [name for name in ("train", "validation") if name not in pairs.counts]
    return [
        f"no pictures in split {name}: there is {', '.join(pairs.counts) or 'nothing'}" for name in missing
    ]


def _bad_sample_problems(pairs: PairSet) -> list[str]:
    """One line a reason, the most frequent first, with the first sample as an example."""
    reasons = Counter(sample.reason for sample in pairs.bad)
    examples = {sample.reason: sample.key for sample in reversed(pairs.bad)}
    return [f"{n} skipped: {reason} (such as {examples[reason]})" for reason, n in reasons.most_common()]
