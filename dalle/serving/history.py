"""The history: every picture that the server drew, with its recipe, in one SQLite file that survives any kill.

Pictures are kept as blobs beside their recipes, not as files: one transaction then holds a whole job, and no
kill can leave a row without its picture or a picture without its row. SQLite measured blobs below about 100 KB to
be read faster than files (sqlite.org/intern-v-extern-blob.html); our PNGs have 5-20 KB.

Write-ahead log: readers never wait for a writer. `synchronous=FULL`: the log is on the disk before `add` returns.
A job's *candidates* that were not kept stay for a day, so that the page can rank them again, hidden from the listing.
"""

import contextlib
import hashlib
import json
import logging
import math
import secrets
import sqlite3
import sys
import threading
import time
import unicodedata
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

FILE = "history.sqlite"
SCHEMA = 1  # of the tables below; a file with a higher one was written by a newer dalle
APPLICATION = 0x44414C45  # "DALE": tells our file from any other SQLite file
CANDIDATE_SECONDS = 86_400.0  # candidates live for a day
CANDIDATE_BYTES = 512 * 1024 * 1024  # of PNGs not kept, all jobs; the oldest jobs' go first
HELD_BYTES = 256 * 1024 * 1024  # of PNGs in memory, while the file cannot be written
HURRIED_SECONDS = 0.5  # wait of the thread that draws
BUSY_SECONDS = 10.0  # wait for a second server on the same folder before giving up
ID_BYTES = 16  # 128 random bits: ids cannot be guessed, and tell nothing about their neighbours
MAX_PAGE = 200  # pictures of one page of the listing
MAX_QUERY = 1000  # characters

_TABLES = """
CREATE TABLE pictures (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of the listing, never used again
    id TEXT NOT NULL UNIQUE,
    job TEXT NOT NULL,
    created_at REAL NOT NULL,       -- seconds since 1970, UTC
    caption TEXT NOT NULL,
    folded TEXT NOT NULL,           -- caption as it is searched
    seed INTEGER NOT NULL,
    score REAL,
    rank INTEGER NOT NULL,          -- among all candidates of the job, 0 is best
    kept INTEGER NOT NULL,
    favourite INTEGER NOT NULL DEFAULT 0,
    n_bytes INTEGER NOT NULL,       -- of the PNG
    recipe_sha256 TEXT NOT NULL,
    recipe TEXT NOT NULL,           -- JSON
    tokens BLOB NOT NULL,           -- (G, G) uint16, little endian
    png BLOB NOT NULL               -- last: a scan of the other columns does not read it
);
CREATE INDEX by_job ON pictures(job);
CREATE INDEX by_recipe ON pictures(recipe_sha256);
CREATE INDEX listed ON pictures(number) WHERE kept;
CREATE INDEX candidates ON pictures(number, created_at, n_bytes) WHERE NOT kept;
"""
_COLUMNS = "number, id, job, created_at, caption, seed, score, rank, kept, favourite, recipe"


@dataclass(frozen=True)
class NewPicture:
    """A picture to add."""

    png: bytes  # with the recipe inside, as `images.save_png` writes it
    recipe: dict[str, Any]
    caption: str
    seed: int
    score: float | None
    rank: int  # among all candidates of the job, 0 is best
    kept: bool  # False: a candidate, hidden from the listing and deleted after a day
    tokens: bytes  # (G, G) uint16, little endian, raster order


@dataclass(frozen=True)
class Picture:
    """A picture of the history, without its pixels."""

    number: int  # order of the listing
    id: str
    job: str
    created_at: float  # seconds since 1970, UTC
    caption: str
    seed: int
    score: float | None
    rank: int
    kept: bool
    favourite: bool
    recipe: dict[str, Any]


@dataclass(frozen=True)
class Page:
    """A part of the listing, newest first."""

    pictures: list[Picture]
    next: str | None  # cursor of the part that follows; None: this is the last


class History:
    """All pictures drawn; safe to use from many threads, and from two servers on one folder.

    Raises:
        ValueError: the file is damaged, is another program's, or was written by a newer dalle.
        OSError: a read or write fails, as when the disk is full; nothing of the transaction is kept.
    """

    def __init__(
        self,
        folder: Path,
        candidate_bytes: int = CANDIDATE_BYTES,
        candidate_seconds: float = CANDIDATE_SECONDS,
    ) -> None:
        """Open `folder`/history.sqlite, or make both, readable only for their owner."""
        self.path = folder / FILE
        self._candidate_bytes = candidate_bytes
        self._candidate_seconds = candidate_seconds
        self._write_lock, self._read_lock, self._held_lock = (threading.Lock() for _ in range(3))
        self._held = deque[
            tuple[Sequence[NewPicture], list[str], str]
        ]()  # pictures, ids and job, not stored yet
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.ExitStack() as undo:
            try:
                self.path.touch(mode=0o600)
                self._writer = undo.enter_context(contextlib.closing(self._connect()))
                self._prepare()
                self._reader = undo.enter_context(contextlib.closing(self._connect()))
                self._reader.execute("PRAGMA query_only=ON")
                self.clean()
            except sqlite3.DatabaseError as error:
                raise self._unusable(error) from error
            undo.pop_all()

    def close(self) -> None:
        """Close the file; whatever was added is on the disk already."""
        with self._write_lock, self._read_lock:
            self._reader.close()
            self._writer.close()

    # Adding and reading

    def add(
        self,
        pictures: Sequence[NewPicture],
        job: str,
        ids: list[str] | None = None,
        busy_s: float = BUSY_SECONDS,
    ) -> list[str]:
        """Store the pictures of a job, all or none, under new or given ids; return these in the order given.

        Waits `busy_s` seconds at most for another process that writes.
        """
        now = time.time()
        ids = [_new_id() for _ in pictures] if ids is None else ids
        rows = [_row(picture, id, job, now) for picture, id in zip(pictures, ids, strict=True)]
        rows.sort(key=lambda row: -int(row["rank"]))  # newest first then lists the best of a job first
        with self._writing(busy_s) as connection:
            connection.executemany(_INSERT, rows)
            self._drop_candidates(connection, now)
        return ids

    def keep(self, pictures: Sequence[NewPicture], job: str) -> list[str]:
        """As `add`, but while the file cannot be written the pictures stay in memory, and are added later.

        They are not listed meanwhile, and the oldest are given up above `HELD_BYTES`; the log says so.
        """
        with self._held_lock:
            try:
                while self._held:
                    held, ids, held_job = self._held[0]
                    self.add(held, held_job, ids, HURRIED_SECONDS)
                    self._held.popleft()
                return self.add(pictures, job, None, HURRIED_SECONDS)
            except OSError as error:
                ids = [_new_id() for _ in pictures]
                self._held.append((pictures, ids, job))
                n_lost = 0
                while len(self._held) > 1 and self._n_held_bytes() > HELD_BYTES:
                    n_lost += len(self._held.popleft()[0])
                logger.error(
                    "%s: the pictures of %d jobs are kept in memory until it can be written; %d were given up",
                    error,
                    len(self._held),
                    n_lost,
                )
                return ids

    def _n_held_bytes(self) -> int:
        return sum(len(picture.png) for pictures, _, _ in self._held for picture in pictures)

    def png(self, id: str) -> bytes | None:
        """Return the PNG of a picture, or None when there is none of that id."""
        for pictures, ids, _ in [*self._held]:
            if id in ids:
                return pictures[ids.index(id)].png
        row = self._one("SELECT png FROM pictures WHERE id = ?", id)
        return None if row is None else bytes(row[0])

    def tokens(self, id: str) -> Tensor | None:
        """Return the image tokens (G, G) of a picture, int64, or None when there is none of that id."""
        row = self._one("SELECT tokens FROM pictures WHERE id = ?", id)
        return None if row is None else _read_tokens(row[0])

    def get(self, id: str) -> Picture | None:
        """Return a picture without its pixels, or None when there is none of that id."""
        row = self._one(f"SELECT {_COLUMNS} FROM pictures WHERE id = ?", id)
        return None if row is None else _picture(row)

    def find_recipe(self, recipe: Mapping[str, Any]) -> str | None:
        """Return the id of the newest picture drawn by exactly this recipe, or None."""
        query = "SELECT id FROM pictures WHERE recipe_sha256 = ? ORDER BY number DESC LIMIT 1"
        row = self._one(query, _sha256(_json(recipe)))
        return None if row is None else str(row[0])

    def search(
        self, query: str = "", *, favourite: bool = False, before: str | None = None, limit: int = 50
    ) -> Page:
        """List kept pictures whose captions hold every word of `query`, newest first; case does not count.

        `before` is the `next` of the page above: pictures that are added or deleted meanwhile shift nothing.

        Raises:
            ValueError: `before` is no cursor, `limit` is out of range, or the query is too long.
        """
        if not 1 <= limit <= MAX_PAGE:
            raise ValueError(f"limit is {limit}; a page of the history has 1 to {MAX_PAGE} pictures")
        if len(query) > MAX_QUERY:
            raise ValueError(f"query has {len(query)} characters; at most {MAX_QUERY} are searched for")
        conditions, values = ["kept"], list[Any]()
        if favourite:
            conditions.append("favourite")
        if before is not None:
            conditions.append("number < ?")
            values.append(_read_cursor(before))
        for word in dict.fromkeys(_folded(query).split()):
            conditions.append("instr(folded, ?) > 0")  # not LIKE: % and _ are letters like any other
            values.append(word)
        statement = f"SELECT {_COLUMNS} FROM pictures WHERE {' AND '.join(conditions)}"
        with self._reading() as connection:
            rows = connection.execute(f"{statement} ORDER BY number DESC LIMIT ?", [*values, limit + 1])
            pictures = [_picture(row) for row in rows]
        is_last = len(pictures) <= limit
        return Page(pictures[:limit], None if is_last else str(pictures[limit - 1].number))

    # Changing

    def set_favourite(self, id: str, favourite: bool) -> bool:
        """Mark a picture or unmark it; a candidate that is marked is kept from then on. False: no such id."""
        with self._writing() as connection:
            change = "UPDATE pictures SET favourite = ?, kept = kept OR ? WHERE id = ?"
            return connection.execute(change, (favourite, favourite, _storable(id))).rowcount > 0

    def delete(self, id: str) -> bool:
        """Delete a picture, and with the last kept one of a job its candidates. False: no such id."""
        with self._writing() as connection:
            delete = "DELETE FROM pictures WHERE id = ? RETURNING job"
            row = connection.execute(delete, (_storable(id),)).fetchone()
            if row is None:
                return False
            left = "SELECT 1 FROM pictures WHERE job = :job AND kept"
            connection.execute(
                f"DELETE FROM pictures WHERE job = :job AND NOT EXISTS ({left})", {"job": row[0]}
            )
            return True

    def clean(self) -> None:
        """Delete candidates that are older than a day or beyond the limit of bytes, as every `add` does."""
        with self._writing() as connection:
            self._drop_candidates(connection, time.time())

    def _drop_candidates(self, connection: sqlite3.Connection, now: float) -> None:
        connection.execute(
            "DELETE FROM pictures WHERE NOT kept AND created_at < ?", (now - self._candidate_seconds,)
        )
        (n_bytes,) = connection.execute("SELECT total(n_bytes) FROM pictures WHERE NOT kept").fetchone()
        while n_bytes > self._candidate_bytes:
            oldest = "SELECT job FROM pictures WHERE NOT kept ORDER BY number LIMIT 1"
            (job,) = connection.execute(oldest).fetchone()
            dropped = connection.execute(
                "DELETE FROM pictures WHERE NOT kept AND job = ? RETURNING n_bytes", (job,)
            ).fetchall()
            n_bytes -= sum(n for (n,) in dropped)

    # The file

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    def _prepare(self) -> None:
        """Make the tables of a new file; refuse a file that is not ours or not of our time, and leave it as it is."""
        connection = self._writer
        if self._is_new():
            connection.execute("PRAGMA auto_vacuum=FULL")  # what is deleted gives its disk space back
        connection.execute("PRAGMA journal_mode=WAL")
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(" ".join(str(found).split()))
        with self._writing():
            if self._is_new():  # of two servers that start at once, one makes the tables
                for statement in _TABLES.split(";\n"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id={APPLICATION}")
                connection.execute(f"PRAGMA user_version={SCHEMA}")

    def _is_new(self) -> bool:
        (n_tables,) = self._writer.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (application,) = self._writer.execute("PRAGMA application_id").fetchone()
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        if n_tables == 0:
            return True
        if application != APPLICATION:
            raise ValueError(f"{self.path}: not a history of dalle: move it away, or choose another folder")
        if version != SCHEMA:
            raise ValueError(
                f"{self.path}: history has format {version}; this dalle reads {SCHEMA}: update dalle, or choose "
                "another folder"
            )
        return False

    def _unusable(self, error: sqlite3.Error) -> ValueError:
        return ValueError(
            f"{self.path}: history cannot be read ({error}): move it away to start a new one, or restore a copy"
        )

    @contextlib.contextmanager
    def _writing(self, busy_s: float = BUSY_SECONDS) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is on the disk at the end, or nothing."""
        with self._write_lock, self._failing_clearly():
            self._writer.execute(f"PRAGMA busy_timeout={round(1000 * busy_s)}")
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._read_lock, self._failing_clearly():
            yield self._reader

    @contextlib.contextmanager
    def _failing_clearly(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.ProgrammingError, sqlite3.IntegrityError):  # ours: closed, or an id drawn twice
            raise
        except sqlite3.DatabaseError as error:  # disk full, read-only, locked by another program, damaged
            raise OSError(f"{self.path}: history cannot be used ({error})") from error

    def _one(self, query: str, value: str) -> Any:
        with self._reading() as connection:
            return connection.execute(query, (_storable(value),)).fetchone()


_FIELDS = "id, job, created_at, caption, folded, seed, score, rank, kept, n_bytes, recipe_sha256, recipe, tokens, png"
_INSERT = f"INSERT INTO pictures ({_FIELDS}) VALUES ({', '.join(f':{name}' for name in _FIELDS.split(', '))})"


def _new_id() -> str:
    return secrets.token_urlsafe(ID_BYTES)


def _row(picture: NewPicture, id: str, job: str, now: float) -> dict[str, Any]:
    _read_tokens(picture.tokens)
    recipe = _json(picture.recipe)
    return {
        "id": id,
        "job": job,
        "created_at": now,
        "caption": _storable(picture.caption),
        "folded": _folded(picture.caption),
        "seed": picture.seed,
        "score": picture.score,
        "rank": picture.rank,
        "kept": picture.kept,
        "n_bytes": len(picture.png),
        "recipe_sha256": _sha256(recipe),
        "recipe": recipe,
        "tokens": picture.tokens,
        "png": picture.png,
    }


def _picture(row: Sequence[Any]) -> Picture:
    number, id, job, created_at, caption, seed, score, rank, kept, favourite, recipe = row
    return Picture(
        number,
        id,
        job,
        created_at,
        caption,
        seed,
        score,
        rank,
        bool(kept),
        bool(favourite),
        json.loads(recipe),
    )


def _read_tokens(data: bytes) -> Tensor:
    values = array("H", data)
    side = math.isqrt(len(values))
    if side == 0 or side * side != len(values):
        raise ValueError(f"tokens have {len(data)} bytes; a grid of G x G tokens has 2 G G")
    if sys.byteorder == "big":
        values.byteswap()
    return torch.tensor(values.tolist()).view(side, side)  # (G, G)


def _read_cursor(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise ValueError("before is no cursor: pass the `next` of the page above")
    return int(text)


def _json(recipe: Mapping[str, Any]) -> str:
    """One text for equal recipes, whichever order their keys came in."""
    return _storable(json.dumps(recipe, sort_keys=True, allow_nan=False, ensure_ascii=False))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _folded(text: str) -> str:
    """Text as it is searched: without case, and with compatible letters made equal."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", _storable(text)).casefold())


def _storable(text: str) -> str:
    """Text that SQLite can hold: lone surrogates, which UTF-8 has not, become question marks."""
    return text.encode("utf-8", "replace").decode()
