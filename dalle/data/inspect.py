"""A look over a data set before training on it: splits, sizes, captions and problems.

Source: what the paper's filters speak of (App. C: short captions, aspect ratios outside [1/2, 2]).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np

from dalle.data.pairs import PairSet

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
            *(f"problem   {problem}" for problem in self.problems),
        ]

    def to_json(self) -> dict[str, object]:
        """The findings as a tree of JSON values."""
        return asdict(self) | {"problems": list(self.problems)}


def inspect(pairs: PairSet) -> Inspection:
    """Look over all captions and up to 500 pictures."""
    captions = [caption for pair in pairs for caption in pair.captions]
    sizes, problems = _sizes(pairs)
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
        problems=(*_split_problems(pairs), *_bad_sample_problems(pairs), *problems),
    )


def _sizes(pairs: PairSet) -> tuple[list[tuple[int, int]], list[str]]:
    """Width and height of the pictures opened, and what is wrong with some of them."""
    chosen = np.unique(np.linspace(0, len(pairs) - 1, min(MAX_OPENED, len(pairs))).round().astype(int))
    sizes: list[tuple[int, int]] = []
    unreadable: list[str] = []
    for index in chosen.tolist():
        try:
            sizes.append(pairs[index].open().size)
        except ValueError as error:
            unreadable.append(str(error))
    problems = []
    if unreadable:
        problems.append(f"{len(unreadable)} of {len(chosen)} pictures opened are corrupt: {unreadable[0]}")
    n_long = sum(max(size) > MAX_ASPECT_RATIO * min(size) for size in sizes)
    if n_long:
        problems.append(
            f"{n_long} of {len(sizes)} pictures opened are longer than 2:1: a square crop misses much of them"
        )
    return sizes, problems


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
