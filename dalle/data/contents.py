"""What the pictures of a run hold: read and hashed once, so that data that changed are noticed and bad ones listed at once.

Every picture is read, hashed and, in sets of up to 100,000, decoded when a run begins. The record (`data.jsonl`, one
line a picture) keeps size and times of its file beside the hash: a later call only looks at these, and reads again what
was touched. A file that was touched and holds the same is no change. Of tar shards and tables the whole file's size and
times count; its pictures are hashed one by one, so that an unrelated member added to a shard changes none of them.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from dalle import files
from dalle.data import places
from dalle.data.pair import BadSample, Pair
from dalle.data.pairs import PairSet
from dalle.data.reading import in_chunks
from dalle.data.splits import by_hash

MAX_DECODED = (
    100_000  # pictures of a set that are decoded as well: beyond, unreadable ones are met on the way
)
CHUNK = 64  # pictures read ahead
LINE_SECONDS = 10.0
N_NAMED = 3  # samples of each kind that an error names
logger = logging.getLogger(__name__)


class Seen(NamedTuple):
    """One picture as a run knows it."""

    n_bytes: int  # of its file, or of the shard or table that holds it
    mark: str  # when that was changed last; see places.State
    picture: str  # sha256 of the picture's bytes
    text: str  # sha256 of captions and weight
    split: str
    reason: str | None  # why it cannot be read


def check_contents(pairs: PairSet, record: Path, must_match: bool = False) -> PairSet:
    """The readable pairs with the hashes of their contents, from which their fingerprint is made; others become bad.

    `record` is read and written. With `must_match` the pairs have to be those of the record: ValueError that names
    what was changed, added or removed. Unreadable pictures that were taken away since are no change.
    """
    old = _read(record)
    seen = _look(pairs, old)
    bad = [BadSample(key, found.reason) for key, found in seen.items() if found.reason is not None]
    good = _split_anew([pair for pair in pairs if seen[pair.key].reason is None], pairs.hashed)
    for pair in good:  # splits may be others without the unreadable ones
        seen[pair.key] = seen[pair.key]._replace(split=pair.split)
    if must_match and old:
        _refuse_changes(record, old, seen)
    if seen != old:
        lines = (json.dumps([key, *found]) for key, found in seen.items())
        files.write_bytes(record, "".join(f"{line}\n" for line in lines).encode())
    hashes = {pair.key: seen[pair.key].picture for pair in good}
    return replace(pairs, pairs=tuple(good), bad=sorted([*pairs.bad, *bad]), contents=hashes)


def _split_anew(good: list[Pair], hashed: tuple[frozenset[str], ...]) -> list[Pair]:
    """The pairs with splits that do not depend on the unreadable ones, so that these can be removed later."""
    splits = {p.key: p.split for keys in hashed for p in by_hash([pair for pair in good if pair.key in keys])}
    return [replace(pair, split=splits.get(pair.key, pair.split)) for pair in good]


def _look(pairs: PairSet, old: Mapping[str, Seen]) -> dict[str, Seen]:
    """Every pair as it is now; read and hashed is what is new or was touched."""
    states: dict[str, places.State] = {}
    for path in dict.fromkeys(pair.path for pair in pairs):
        states[path] = places.state_of(path) or places.State(-1, "")
    decode = len(pairs) <= MAX_DECODED
    seen: dict[str, Seen] = {}
    touched: list[Pair] = []
    for pair in pairs:
        before, state = old.get(pair.key), states[pair.path]
        if before is not None and state.mark and (before.n_bytes, before.mark) == state:
            seen[pair.key] = before._replace(text=_text_hash(pair), split=pair.split)
        else:
            seen[pair.key] = Seen(*state, "", _text_hash(pair), pair.split, None)
            touched.append(pair)
    last = time.monotonic()
    for number, chunk in enumerate(in_chunks(touched, CHUNK, lambda pair: _hashed(pair, decode))):
        start = number * CHUNK
        for pair, found in zip(touched[start : start + CHUNK], chunk, strict=True):
            picture, reason = ("", str(found)) if isinstance(found, ValueError) else found
            seen[pair.key] = seen[pair.key]._replace(picture=picture, reason=reason)
        if time.monotonic() - last > LINE_SECONDS:
            last = time.monotonic()
            logger.info("reading every picture once: %d of %d", start + len(chunk), len(touched))
    n_same = sum(pair.key in old and old[pair.key].picture == seen[pair.key].picture for pair in touched)
    if n_same:
        logger.info("%d pictures were touched since the run was begun, and hold the same", n_same)
    return seen


def _hashed(pair: Pair, decode: bool) -> tuple[str, str | None]:
    """The hash of a picture's bytes, and why it cannot be read."""
    data = pair.read()
    reason = None
    if decode:
        try:
            pair.decode(data)
        except ValueError as error:
            reason = str(error).removeprefix(f"{pair.key}: ")
    return hashlib.sha256(data).hexdigest(), reason


def _text_hash(pair: Pair) -> str:
    line = json.dumps([pair.captions, pair.weight])
    return hashlib.sha256(line.encode()).hexdigest()


def _read(record: Path) -> dict[str, Seen]:
    if not record.is_file():
        return {}
    with record.open(encoding="utf-8") as lines:
        try:
            return {key: Seen(*found) for key, *found in map(json.loads, lines)}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{record} is damaged ({error}): delete it to read the data anew") from error


def _refuse_changes(record: Path, old: Mapping[str, Seen], new: Mapping[str, Seen]) -> None:
    before = {key: found for key, found in old.items() if found.reason is None}
    after = {key: found for key, found in new.items() if found.reason is None}
    both = before.keys() & after.keys()
    kinds = {
        "pictures changed": [key for key in both if before[key].picture != after[key].picture],
        "with other captions or weight": [key for key in both if before[key].text != after[key].text],
        "in another split": [key for key in both if before[key].split != after[key].split],
        "added": list(after.keys() - before.keys()),
        "gone": [key for key in before.keys() - after.keys() if key not in new],
        "unreadable now": [key for key in before.keys() - after.keys() if key in new],
    }
    changes = [
        f"{len(keys)} {kind} ({', '.join(sorted(keys)[:N_NAMED])}{', ...' * (len(keys) > N_NAMED)})"
        for kind, keys in kinds.items()
        if keys
    ]
    if changes:
        raise ValueError(
            f"the data have changed since {record.parent} was begun: {'; '.join(changes)}: put back what was there to "
            "go on, or give another --out to begin anew"
        )
