"""The paper's filters: which captions and pictures are worth training on, and which training pictures would cheat.

Source: paper App. C: captions that are too short, not English, or mostly boiler-plate with a date; pictures longer than
2:1, whose square crop would miss what the caption names. §3.1 and 3.2: pictures that an evaluation set holds too. The
paper gives the rules and the aspect ratio; the other thresholds are marked `settled:`.
"""

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from PIL.Image import Image
from pydantic import Field

from dalle import files, images
from dalle.config import Config
from dalle.data.duplicates import CLIP_SIMILARITY, HASH_SIMILARITY, Describe, Known, hashes
from dalle.data.language import language_of
from dalle.data.pair import Pair
from dalle.data.pairs import PairSet
from dalle.data.reading import read_chunks
from dalle.data.selection import common_folder, write_selection

DUPLICATE = "near-duplicate of an evaluation picture"
CHUNK = 64  # pictures that are open at once
MAX_SHOWN, SHEET_SIDE, SHEET_COLUMNS = (
    64,
    96,
    8,
)  # of duplicates.png: pairs, pixels of a picture, pictures a row
MAX_SIDE = 256  # pixels that a picture is compared at

MONTH = r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"  # noqa: E501
YEAR, DAY = r"(?:1[89]|20)\d\d", r"[0-3]?\d(?:st|nd|rd|th)?"
DATES = re.compile(
    rf"\b(?:{YEAR}[-/.]\d\d?[-/.]\d\d?|\d\d?[-/.]\d\d?[-/.](?:{YEAR}|\d\d)"  # 2011-05-03, 3.5.2011, 5/3/11
    rf"|{DAY}(?: of)? {MONTH},?(?: {YEAR})?|{MONTH} {DAY}(?:,? {YEAR})?\b|{MONTH},? {YEAR}"  # 3 May 2011, May 3
    rf"|\d\d?:\d\d(?::\d\d)?(?: ?[ap]\.?m\b)?|{YEAR})",
    re.IGNORECASE,
)
FILE_NAMES = re.compile(
    r"\b\w*\d+\w*\.(?:jpe?g|png|gif|tiff?|webp)\b|\b(?:img|dsc|dscn|pict)[_-]?\d+\b", re.IGNORECASE
)
WORDS = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
BOILERPLATE = frozenset(
    "photographed photograph photographs photo photos picture pictures pic image images taken shot captured uploaded "
    "posted created published updated modified retrieved accessed dated date time circa file untitled copyright stock "
    "monday tuesday wednesday thursday friday saturday sunday on in at by from of the a an and".split()
)


class FilterSettings(Config):
    """What is dropped."""

    min_words: int = Field(3, ge=0)  # settled: of a caption; fewer say too little
    languages: tuple[str, ...] = (
        "en",
    )  # ISO 639-1; empty: any. A caption whose language is undecided is kept
    drop_boilerplate: bool = True  # a date or file name, and no word besides set phrases
    max_aspect_ratio: float = Field(2.0, ge=1)  # App. C: the longer side over the shorter
    drop_duplicates: bool = True  # of train, what nearly equals a picture of another split or of --against
    similarity: float | None = Field(
        None, gt=0, le=1
    )  # cosine from which on; None: 0.75 of hashes, 0.95 of a CLIP


@dataclass(frozen=True)
class Filtering:
    """What `filter_pairs` did."""

    folder: str
    read: int  # pairs of the source
    kept: int
    splits: dict[str, int]  # kept pairs of each
    dropped: dict[str, int]  # pairs, by reason
    captions_dropped: dict[str, int]  # of pairs that kept others, by reason
    captions_undecided: int  # kept, though no language had a say
    unreadable: int  # samples that the source's own reader skipped

    def lines(self) -> list[str]:
        """As lines of text."""
        lines = [f"kept      {self.kept} of {self.read} pairs ({_listed(self.splits) or 'none'})"]
        lines += [f"dropped   {n} {reason}" for reason, n in self.dropped.items()]
        lines += [f"captions  {n} more: {reason}" for reason, n in self.captions_dropped.items()]
        lines += [f"language  {self.captions_undecided} captions kept, though undecided"]
        if self.dropped.get(DUPLICATE):
            lines += [f"look at   {self.folder}/duplicates.png: what was dropped, beside what it equals"]
        return [*lines, f"skipped   {self.unreadable} bad samples of the source", self.folder]

    def to_json(self) -> dict[str, object]:
        """As a tree of JSON values."""
        return asdict(self)


def caption_problem(caption: str, settings: FilterSettings) -> str | None:
    """Why a caption is dropped; None when it is kept."""
    words = WORDS.findall(caption)
    if len(words) < settings.min_words:
        return "caption too short"
    if settings.drop_boilerplate and is_boilerplate(caption):
        return "caption is boiler-plate"
    language = language_of(caption) if settings.languages else None
    if language is not None and language not in settings.languages:
        return "caption in another language"
    return None


def is_boilerplate(caption: str) -> bool:
    """Whether a caption holds a date or a file's name, and no word besides it and set phrases."""
    rest, n_dates = DATES.subn(" ", FILE_NAMES.sub(" 2000 ", caption))
    return n_dates > 0 and all(word.lower() in BOILERPLATE for word in WORDS.findall(rest))


def filter_pairs(
    pairs: PairSet,
    out: str | Path,
    settings: FilterSettings,
    *,
    against: Sequence[PairSet] = (),
    describe: Describe | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Filtering:
    """Write the pairs that pass as a data set by reference into the new folder `out`.

    Pictures stay where they are. `dropped.jsonl` names every pair that is left out, and why; `duplicates.png` shows up
    to 64 near-duplicates, each beside the evaluation picture that it equals; `filter.json` holds settings and counts.
    `against` are further evaluation sets; `describe` gives unit vectors of pictures, a CLIP's, and perceptual hashes
    where it is left out. Captions are held in memory, pictures a few at a time.
    Raises ValueError where there is nothing to filter, nothing is kept, or `out` exists.
    """
    if not len(pairs):
        raise ValueError("there are no pairs to filter: the set is empty")
    run = _Filter(settings, describe, progress, len(pairs) + sum(map(len, against)))
    for others in against:
        run.remember(others)
    source = common_folder(pair.path for pair in pairs)
    with files.atomic_folder(out) as folder:
        with (folder / "dropped.jsonl").open("w", encoding="utf-8") as dropped:
            rows = run.passing(pairs, lambda record: dropped.write(json.dumps(record) + "\n"))
            kept = write_selection(folder, rows, source, Path(out))
        if not kept:
            raise ValueError(f"no pair is left of {len(pairs)}: {_listed(dict(run.dropped.most_common()))}")
        if run.twins:
            images.save_png(images.grid(run.twins, SHEET_COLUMNS), folder / "duplicates.png", None)
        filtering = Filtering(
            folder=str(out),
            read=len(pairs),
            kept=kept,
            splits=dict(sorted(run.splits.items())),
            dropped=dict(run.dropped.most_common()),
            captions_dropped=dict(run.captions_dropped.most_common()),
            captions_undecided=run.n_undecided,
            unreadable=len(pairs.bad),
        )
        files.write_json(
            folder / "filter.json", {"settings": settings.model_dump(mode="json"), **filtering.to_json()}
        )
    return filtering


class _Filter:
    """One pass over a set: evaluation pictures first, since training pictures are compared with them."""

    def __init__(
        self,
        settings: FilterSettings,
        describe: Describe | None,
        progress: Callable[[int, int], None] | None,
        total: int,
    ) -> None:
        self.settings, self.describe = settings, describe or hashes
        self.similarity = settings.similarity or (CLIP_SIMILARITY if describe else HASH_SIMILARITY)
        self.known = Known()
        self.remembered: list[Pair] = []  # those of `known`
        self.twins: list[Image] = []  # dropped pictures, each before the one that it equals
        self.splits, self.dropped, self.captions_dropped = Counter[str](), Counter[str](), Counter[str]()
        self.n_undecided, self.n_seen, self.total, self.progress = 0, 0, total, progress

    def remember(self, pairs: PairSet) -> None:
        """Look for the pictures of another set, all of those that can be read."""
        for chunk in _opened(pairs.pairs):
            good = [(pair, picture) for pair, picture, _ in chunk if not isinstance(picture, ValueError)]
            if good and self.settings.drop_duplicates:
                self._remember([pair for pair, _ in good], [picture for _, picture in good])
            self._advance(len(chunk))

    def _remember(self, pairs: Sequence[Pair], pictures: Sequence[Image]) -> None:
        self.known.add([pair.key for pair in pairs], pictures, self.describe)
        self.remembered += pairs

    def passing(self, pairs: PairSet, drop: Callable[[dict[str, str]], object]) -> Iterator[Pair]:
        """The pairs that pass, evaluation pairs first; each other pair is given to `drop`."""
        evaluation = [pair for pair in pairs if pair.split != "train"]
        training = [pair for pair in pairs if pair.split == "train"]
        for pair, captions, reason, detail in itertools.chain(
            self._passed(evaluation, is_training=False), self._passed(training, is_training=True)
        ):
            if reason is None:
                self.splits[pair.split] += 1
                yield replace(pair, captions=captions, path=os.path.abspath(pair.path))
            else:
                self.dropped[reason] += 1
                drop({"key": pair.key, "reason": reason, **({"detail": detail} if detail else {})})

    def _passed(
        self, pairs: Sequence[Pair], is_training: bool
    ) -> Iterator[tuple[Pair, tuple[str, ...], str | None, str]]:
        """Each pair with its good captions, the reason to drop it, and what the reason is about."""
        wanted = []
        for pair in pairs:
            captions, reason = self._captions(pair)
            if reason is None:
                wanted.append((pair, captions))
            else:
                self._advance(1)
                yield pair, (), reason, pair.captions[0][:100]
        captions_of = {pair.key: captions for pair, captions in wanted}
        for chunk in _opened([pair for pair, _ in wanted]):
            good = [
                (pair, picture)
                for pair, picture, shape in chunk
                if not isinstance(picture, ValueError) and self._fits(shape)
            ]
            twins = dict[str, int | None]()
            if good and self.settings.drop_duplicates:
                own, pictures = [pair for pair, _ in good], [picture for _, picture in good]
                if is_training:
                    found = self.known.nearest_places(pictures, self.describe, self.similarity)
                    twins = dict(zip((pair.key for pair in own), found, strict=True))
                else:
                    self._remember(own, pictures)
            for pair, picture, shape in chunk:
                reason, detail = None, ""
                if isinstance(picture, ValueError):
                    reason, detail = "picture unreadable", str(picture)
                elif not self._fits(shape):
                    reason, detail = "picture too long", f"{shape[0]} x {shape[1]} pixels"
                elif (twin := twins.get(pair.key)) is not None:
                    reason, detail = DUPLICATE, self.known.keys[twin]
                    self._show(picture, self.remembered[twin])
                yield pair, captions_of[pair.key], reason, detail
            self._advance(len(chunk))

    def _show(self, dropped: Image, twin: Pair) -> None:
        """Put a dropped picture and the one that it equals on the sheet, while there is room."""
        if len(self.twins) < 2 * MAX_SHOWN:
            self.twins += [images.center_crop(picture, SHEET_SIDE) for picture in (dropped, twin.open())]

    def _captions(self, pair: Pair) -> tuple[tuple[str, ...], str | None]:
        """The captions that pass, and where none does, why the first one did not."""
        problems = [caption_problem(caption, self.settings) for caption in pair.captions]
        kept = tuple(caption for caption, problem in zip(pair.captions, problems, strict=True) if not problem)
        if not kept:
            return (), problems[0]
        self.captions_dropped.update(problem for problem in problems if problem)
        if self.settings.languages:
            self.n_undecided += sum(language_of(caption) is None for caption in kept)
        return kept, None

    def _fits(self, shape: tuple[int, int]) -> bool:
        return max(shape) <= self.settings.max_aspect_ratio * min(shape)

    def _advance(self, n: int) -> None:
        self.n_seen += n
        if self.progress is not None:
            self.progress(self.n_seen, self.total)


Opened = tuple[Pair, Image | ValueError, tuple[int, int]]  # with the sides before the picture was made small


def _opened(pairs: Sequence[Pair]) -> Iterator[list[Opened]]:
    """Pictures in order, small, a chunk at a time; the error instead of an unreadable one."""
    start = 0
    for chunk in read_chunks(pairs, CHUNK, _small):
        found = zip(pairs[start : start + len(chunk)], chunk, strict=True)
        yield [
            (pair, read, (0, 0)) if isinstance(read, ValueError) else (pair, *read) for pair, read in found
        ]
        start += len(chunk)


def _small(pair: Pair, picture: Image) -> tuple[Image, tuple[int, int]]:
    shape = picture.size
    picture.thumbnail((MAX_SIDE, MAX_SIDE))  # enough to compare; a chunk of photographs would fill the memory
    return picture, shape


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items())
