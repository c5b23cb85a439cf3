"""The one reader of pictures: who reads a picture gets it or its error, and one rule says how many may be bad.

The rule: an unreadable picture is left out, written down with its reason and counted; more than max(5, 1 %) of the
samples end the run, unless `--skip-bad` lets any number pass.
"""

import itertools
import json
import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from PIL.Image import Image

from dalle.data.pair import BadSample, Pair
from dalle.data.samples import json_object

MAX_BAD_FRACTION = 0.01
MAX_BAD = 5  # a small set would allow none
N_READERS = 8  # threads; decoding gives up Python's lock

T = TypeVar("T")


def read_chunks(
    pairs: Sequence[Pair], size: int, prepare: Callable[[Pair, Image], T]
) -> Iterator[list[T | ValueError]]:
    """What `prepare` makes of pictures, in order, `size` at a time; the error in place of an unreadable one."""
    return in_chunks(pairs, size, lambda pair: prepare(pair, pair.open()))


def in_chunks(pairs: Sequence[Pair], size: int, read: Callable[[Pair], T]) -> Iterator[list[T | ValueError]]:
    """What `read` gives for each pair, in order, `size` at a time, by threads one chunk ahead; or its ValueError."""

    def attempt(pair: Pair) -> T | ValueError:
        try:
            return read(pair)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(min(N_READERS, os.cpu_count() or 1)) as readers:

        def submit(start: int) -> list[Future[T | ValueError]]:
            return [readers.submit(attempt, pair) for pair in pairs[start : start + size]]

        ahead = submit(0)
        for start in itertools.count(size, size):
            if not ahead:
                return
            current, ahead = ahead, submit(start)
            yield [picture.result() for picture in current]


def is_too_many(n_bad: int, total: int, limit: float = MAX_BAD_FRACTION) -> bool:
    """Whether so many bad ones of `total` samples end a run; a `limit` of 0 lets none pass, of 1 any number."""
    return n_bad > (max(MAX_BAD, limit * total) if limit > 0 else 0)


def too_many(bad: Sequence[BadSample], total: int, limit: float, listed_in: str = "") -> ValueError:
    """The error that ends a run with too many bad samples."""
    allowed = f"max({MAX_BAD}, {limit:.1%})" if limit > 0 else "none"
    return ValueError(
        f"{len(bad)} of {total} samples are bad; at most {allowed} may be: repair or remove "
        f"{f'those listed in {listed_in}' if listed_in else 'them'}, or pass --skip-bad. First: {first_reasons(bad)}"
    )


def first_reasons(bad: Sequence[BadSample], n: int = 3) -> str:
    """The first samples with their reasons, in one line."""
    return "; ".join(f"{sample.key}: {sample.reason.removeprefix(f'{sample.key}: ')}" for sample in bad[:n])


class BadSampleLog:
    """Samples that turn out bad while a run reads them: written to a .jsonl file, counted and limited.

    A key counts once. What an earlier run wrote into the file counts too: a resumed run meets the same limit.
    """

    def __init__(
        self,
        path: Path,
        total: int,
        limit: float = MAX_BAD_FRACTION,
        keys: Collection[str] | None = None,
    ) -> None:
        """`total` is the number of samples of the run; `limit` the fraction of them that may be bad.

        With `keys`, what the file says of other samples does not count: it is of another data set.
        """
        self.path = Path(path)
        self._lock = threading.Lock()
        self.total = total
        self.limit = limit
        self._reasons: dict[str, str] = {}
        self._ends_torn = False
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8", errors="replace")
            self._ends_torn = bool(text) and not text.endswith("\n")  # killed within a line
            for line in text.splitlines():
                record = json_object(line)
                if record and isinstance(record.get("key"), str) and (keys is None or record["key"] in keys):
                    self._reasons[record["key"]] = str(record.get("reason", ""))

    def __len__(self) -> int:
        return len(self._reasons)

    def __contains__(self, key: object) -> bool:
        return key in self._reasons

    def add(self, key: str, reason: str) -> None:
        """Write one bad sample; ValueError when more than max(5, limit * total) samples are bad by now."""
        self.add_all([BadSample(key, reason)])

    def add_all(self, samples: Sequence[BadSample]) -> None:
        """Write bad samples, all of them before any error; ValueError as `add`."""
        with self._lock:  # pictures are read by several threads
            for sample in samples:
                if sample.key not in self._reasons:
                    self._reasons[sample.key] = sample.reason
                    self._write(sample)
        if is_too_many(len(self), self.total, self.limit):
            bad = [BadSample(*item) for item in list(self._reasons.items())]
            raise too_many(bad, self.total, self.limit, str(self.path))

    def _write(self, sample: BadSample) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": sample.key, "reason": sample.reason}) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + line if self._ends_torn else line)
        self._ends_torn = False
