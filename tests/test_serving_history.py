"""The history: nothing accepted is lost to a kill, pages stand still, and a PNG that is dropped on it does no harm."""

import base64
import contextlib
import io
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from fastapi.testclient import TestClient
from PIL import Image, PngImagePlugin

from dalle.images import read_recipe, save_png
from dalle.pipeline import DallePipeline
from dalle.serving import history as module
from dalle.serving.app import create_app
from dalle.serving.history import FILE, SCHEMA, History, NewPicture
from dalle.serving.settings import Settings
from tests.tiny import tiny_pipe

CAPTIONS = ["a red apple", "a blue boat"]


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    history = History(tmp_path)
    yield history
    history.close()


def new(caption: str = "a red apple", rank: int = 0, **changes: Any) -> NewPicture:
    fields = {
        "png": caption.encode("utf-8", "replace") * 10,
        "recipe": {"caption": caption, "rank": rank},
        "caption": caption,
        "seed": rank,
        "score": -float(rank),
        "rank": rank,
        "kept": True,
        "tokens": b"\x05\x01" * 16,
    }
    return NewPicture(**fields | changes)


def captions(history: History, **query: Any) -> list[str]:
    return [picture.caption for picture in history.search(**query).pictures]


# Adding and reading


def test_an_added_picture_comes_back_byte_for_byte(history: History) -> None:
    png = bytes(range(256)) * 40
    [id] = history.add([new(png=png, recipe={"b": [1, 2.5, None], "a": "x"}, score=None)], "job")
    picture, tokens = history.get(id), history.tokens(id)
    assert history.png(id) == png
    assert picture is not None and tokens is not None
    assert picture.recipe == {"a": "x", "b": [1, 2.5, None]}
    assert (picture.caption, picture.seed, picture.score, picture.job) == ("a red apple", 0, None, "job")
    assert tokens.shape == (4, 4) and tokens.unique().tolist() == [0x0105]


def test_an_id_that_no_picture_has_gives_none(history: History) -> None:
    for id in ("", "x", "' OR 1=1 --", "../history", "\udcff"):
        assert history.png(id) is None and history.tokens(id) is None and history.get(id) is None
        assert not history.delete(id) and not history.set_favourite(id, True)


def test_ids_are_128_random_bits_and_safe_in_an_address(history: History) -> None:
    ids = history.add([new(rank=rank) for rank in range(50)], "job")
    assert len(set(ids)) == 50
    for id in ids:
        assert re.fullmatch(r"[A-Za-z0-9_-]{22}", id)
        assert len(base64.urlsafe_b64decode(id + "==")) == 16
    bits = [bin(int.from_bytes(base64.urlsafe_b64decode(id + "=="), "big")).count("1") for id in ids]
    assert 50 < sum(bits) / 50 < 78  # of 128, half are set: no counter, no clock


def test_tokens_of_another_shape_are_refused_and_nothing_is_kept(history: History) -> None:
    for tokens in (b"", b"\x00" * 6, b"\x00" * 30):
        with pytest.raises(ValueError, match="tokens have"):
            history.add([new(), new(tokens=tokens)], "job")
    assert history.search().pictures == []


def test_a_recipe_finds_its_picture_whatever_the_order_of_its_keys(history: History) -> None:
    [id] = history.add([new(recipe={"a": 1, "b": {"c": 2, "d": 3}})], "job")
    assert history.find_recipe({"b": {"d": 3, "c": 2}, "a": 1}) == id
    assert history.find_recipe({"b": {"d": 3, "c": 2}, "a": 2}) is None


# Listing


def test_the_listing_is_newest_first_and_best_first_within_a_job(history: History) -> None:
    history.add([new("old")], "1")
    history.add([new(f"rank {rank}", rank) for rank in (2, 0, 1)], "2")
    assert captions(history) == ["rank 0", "rank 1", "rank 2", "old"]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("apple", ["100% RED apple"]),
        ("APPLE red", ["100% RED apple"]),
        ("%", ["100% RED apple"]),
        ("_", ["a_b"]),
        ("äpfel", ["Ein paar ÄPFEL"]),
        ("strasse", ["Straße"]),
        ("ﬁ", ["a fish"]),
        ("red boat", []),
        ("' OR 1=1 --", []),
        ("\\", []),
        ("", ["a fish", "Straße", "Ein paar ÄPFEL", "a_b", "100% RED apple"]),
        ("   ", ["a fish", "Straße", "Ein paar ÄPFEL", "a_b", "100% RED apple"]),
    ],
)
def test_search_finds_every_word_in_any_case_and_takes_no_letter_for_a_wildcard(
    history: History, query: str, found: list[str]
) -> None:
    for caption in ("100% RED apple", "a_b", "Ein paar ÄPFEL", "Straße", "a fish"):
        history.add([new(caption)], caption)
    assert captions(history, query=query) == found


def test_a_caption_with_lone_surrogates_is_stored_and_found(history: History) -> None:
    [id] = history.add([new("a \ud800 cat")], "job")
    picture = history.get(id)
    assert captions(history, query="cat \udfff") == ["a ? cat"]
    assert picture is not None and picture.recipe["caption"] == "a ? cat"
    assert history.find_recipe({"caption": "a \ud800 cat", "rank": 0}) == id


def test_pages_stand_still_while_pictures_come_and_go(history: History) -> None:
    for i in range(7):
        history.add([new(f"picture {i}")], str(i))
    first = history.search(limit=3)
    assert [picture.caption for picture in first.pictures] == ["picture 6", "picture 5", "picture 4"]
    history.add([new("newer")], "new")
    history.delete(first.pictures[-1].id)  # the one that the cursor names
    second = history.search(limit=3, before=first.next)
    assert [picture.caption for picture in second.pictures] == ["picture 3", "picture 2", "picture 1"]
    last = history.search(limit=3, before=second.next)
    assert [picture.caption for picture in last.pictures] == ["picture 0"] and last.next is None


@pytest.mark.parametrize(
    "wrong", [{"before": "-1"}, {"before": "x"}, {"before": "9" * 30}, {"limit": 0}, {"query": "x" * 2000}]
)
def test_a_wrong_cursor_limit_or_query_is_one_clear_line(history: History, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        history.search(**wrong)


# Favourites, candidates, deletion


def test_candidates_are_hidden_until_one_becomes_a_favourite(history: History) -> None:
    ids = history.add([new("kept"), new("second", 1, kept=False), new("third", 2, kept=False)], "job")
    assert captions(history) == ["kept"]
    assert history.set_favourite(ids[1], True)
    assert captions(history) == ["kept", "second"]
    assert captions(history, favourite=True) == ["second"]
    assert history.set_favourite(ids[1], False)
    assert captions(history, favourite=True) == [] and captions(history) == ["kept", "second"]


def test_with_the_last_kept_picture_of_a_job_its_candidates_go(history: History) -> None:
    ids = history.add([new("a"), new("b", 1), new("c", 2, kept=False)], "job")
    [other] = history.add([new("other", kept=False)], "other job")
    assert history.delete(ids[0]) and history.png(ids[2]) is not None
    assert history.delete(ids[1]) and history.png(ids[2]) is None
    assert history.png(other) is not None


def test_candidates_older_than_a_day_are_deleted_and_kept_pictures_are_not(tmp_path: Path) -> None:
    first = History(tmp_path)
    old = first.add([new("old"), new("old", 1, kept=False)], "old")
    recent = first.add([new("recent", 1, kept=False)], "recent")
    first.close()
    connection = sqlite3.connect(tmp_path / FILE)
    with connection:
        connection.execute("UPDATE pictures SET created_at = created_at - 86500 WHERE job = 'old'")
    connection.close()
    again = History(tmp_path)
    assert again.png(old[0]) is not None and again.png(old[1]) is None and again.png(recent[0]) is not None
    again.close()


def test_candidates_beyond_the_limit_of_bytes_are_deleted_oldest_job_first(tmp_path: Path) -> None:
    history = History(tmp_path, candidate_bytes=2500)
    ids = [
        history.add([new(png=b"x" * 100), new(rank=1, png=b"x" * 1000, kept=False)], str(job))
        for job in range(4)
    ]
    assert [history.png(candidate) is not None for _, candidate in ids] == [False, False, True, True]
    assert all(history.png(kept) is not None for kept, _ in ids)
    history.close()


def test_deleted_pictures_give_their_disk_space_back(tmp_path: Path) -> None:
    history = History(tmp_path)
    ids = history.add([new(rank=rank, png=os.urandom(100_000)) for rank in range(20)], "job")
    history.close()
    full = (tmp_path / FILE).stat().st_size
    history = History(tmp_path)
    for id in ids[1:]:
        history.delete(id)
    history.close()
    assert (tmp_path / FILE).stat().st_size < full / 5


# Kills, threads, damage

ADDER = """
import hashlib, sys
from pathlib import Path
from dalle.serving.history import History, NewPicture

history = History(Path(sys.argv[1]))
for job in range(10**6):
    pictures = []
    for rank in range(3):
        png = hashlib.sha256(f"{job} {rank}".encode()).digest() * 2000
        pictures.append(NewPicture(png, {"job": job}, f"{job}", job, None, rank, rank == 0, b"\\x01\\x00" * 16))
    print(job, *history.add(pictures, f"{sys.argv[2]}-{job}"), flush=True)
"""


def kill_while_adding(folder: Path, run: str, n_jobs: int) -> dict[str, list[str]]:
    """Add jobs of three pictures in another process, kill it after `n_jobs`; the ids that it was given."""
    process = subprocess.Popen(
        [sys.executable, "-c", ADDER, str(folder), run], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    accepted = {}
    with process:
        for line in process.stdout:
            job, *ids = line.split()
            accepted[job] = ids
            if len(accepted) == n_jobs:
                process.send_signal(signal.SIGKILL)  # in the midst of the next job, most likely
    return {job: ids for job, ids in accepted.items() if len(ids) == 3}


def check_whole(folder: Path, accepted: dict[str, list[str]]) -> None:
    from hashlib import sha256

    history = History(folder)
    for job, ids in accepted.items():
        for rank, id in enumerate(ids):
            assert history.png(id) == sha256(f"{job} {rank}".encode()).digest() * 2000
    history.close()
    connection = sqlite3.connect(folder / FILE)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    sizes = connection.execute("SELECT count(*) FROM pictures GROUP BY job").fetchall()
    connection.close()
    assert set(sizes) == {(3,)}  # no job in part


def test_a_kill_while_adding_loses_nothing_accepted_and_leaves_no_job_in_part(tmp_path: Path) -> None:
    accepted = kill_while_adding(tmp_path, "run", 20)
    assert len(accepted) >= 20
    check_whole(tmp_path, accepted)


def test_what_is_accepted_is_on_the_disk_itself(history: History) -> None:
    """No test can cut the power; SQLite promises it for these settings (sqlite.org/pragma.html#pragma_synchronous)."""
    assert history._writer.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert history._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.long
def test_ten_kills_in_a_row_lose_nothing(tmp_path: Path) -> None:
    for n_jobs in range(1, 11):
        accepted = kill_while_adding(tmp_path, f"run {n_jobs}", n_jobs**2)
        assert len(accepted) >= n_jobs**2
        check_whole(tmp_path, accepted)


def test_threads_and_a_second_server_may_add_at_once(tmp_path: Path) -> None:
    histories = [History(tmp_path), History(tmp_path)]
    wrong: list[BaseException] = []

    def work(history: History, name: str) -> None:
        try:
            for i in range(10):
                [id] = history.add([new(f"{name} {i}")], f"{name} {i}")
                assert history.png(id) is not None and history.search(query=name).pictures
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(histories[i % 2], f"thread{i}")) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(histories[0].search(limit=100).pictures) == 40
    for history in histories:
        history.close()


def test_a_full_disk_is_an_os_error_and_keeps_nothing_of_the_job(history: History) -> None:
    [id] = history.add([new()], "before")
    (n_pages,) = history._writer.execute("PRAGMA page_count").fetchone()
    history._writer.execute(f"PRAGMA max_page_count={n_pages + 2}")
    with pytest.raises(OSError, match="full"):
        history.add([new("small"), new("large", 1, png=b"x" * 100_000)], "job")
    assert captions(history) == ["a red apple"] and history.png(id) is not None
    history._writer.execute("PRAGMA max_page_count=1000000")
    history.add([new("again")], "job")


def test_a_locked_file_delays_drawing_little_and_loses_no_picture(history: History) -> None:
    """It held the thread that draws for ten seconds, and the pictures were gone."""
    other = sqlite3.connect(history.path, isolation_level=None)
    with contextlib.closing(other):
        other.execute("BEGIN IMMEDIATE")
        start = time.monotonic()
        [id] = history.keep([new("held")], "job")
        assert time.monotonic() - start < 5
        assert history.png(id) == b"held" * 10 and captions(history) == []
        other.execute("ROLLBACK")
    history.keep([new("later")], "job 2")
    assert sorted(captions(history)) == ["held", "later"] and history.png(id) == b"held" * 10


def test_what_is_held_in_memory_is_bounded(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELD_BYTES", 100)
    with monkeypatch.context() as patch:
        patch.setattr(history, "add", Mock(side_effect=OSError("full")))
        ids = [history.keep([new(png=b"x" * 60)], "job")[0] for _ in range(3)]
    assert [history.png(id) is not None for id in ids] == [False, False, True]


def make_overwritten(file: Path) -> None:
    history = History(file.parent)
    history.add([new(png=b"x" * 60_000)], "job")
    history.close()
    data = bytearray(file.read_bytes())
    data[4096 * 6 : 4096 * 8] = b"\xff" * 8192
    file.write_bytes(data)


def make_foreign(file: Path) -> None:
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE bookmarks (url)")
    connection.close()


def make_newer(file: Path) -> None:
    History(file.parent).close()
    connection = sqlite3.connect(file)
    connection.execute(f"PRAGMA user_version={SCHEMA + 1}")
    connection.close()


def make_cut(file: Path) -> None:
    History(file.parent).close()
    file.write_bytes(file.read_bytes()[:3000])


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda file: file.write_bytes(b"hello" * 1000), "history cannot be read"),
        (make_cut, "history cannot be"),
        (make_overwritten, "history cannot be read"),
        (make_foreign, "not a history of dalle"),
        (make_newer, "update dalle"),
    ],
)
def test_a_file_that_is_no_history_of_ours_is_one_clear_line(tmp_path: Path, damage: Any, line: str) -> None:
    damage(tmp_path / FILE)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises((ValueError, OSError), match=rf"^[^\n]*{FILE}[^\n]*{line}[^\n]*$"):
        History(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


def test_only_the_owner_may_read_the_history(tmp_path: Path) -> None:
    History(tmp_path / "new" / "folder").close()
    assert (tmp_path / "new" / "folder").stat().st_mode & 0o077 == 0
    assert (tmp_path / "new" / "folder" / FILE).stat().st_mode & 0o077 == 0


# Over HTTP


@pytest.fixture(scope="module")
def pipe() -> DallePipeline:
    return tiny_pipe(CAPTIONS)


@pytest.fixture(scope="module")
def client(pipe: DallePipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    app = create_app(Settings(data_dir=tmp_path_factory.mktemp("data")), pipe)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        yield client


@pytest.fixture(scope="module")
def drawn(
    pipe: DallePipeline, client: TestClient, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, bytes]:
    """A picture that the model drew, in the history: its id and PNG."""
    out = pipe("a red apple", seed=7)
    file = tmp_path_factory.mktemp("png") / "a.png"
    save_png(out.images[0], file, out.recipes[0])
    png, recipe = file.read_bytes(), dict(out.recipes[0])
    tokens = out.tokens[0].numpy().astype("<u2").tobytes()
    picture = NewPicture(png, recipe, "a red apple", 7, None, 0, True, tokens)
    [id] = client.app.state.serving.history.add([picture], "job")  # type: ignore[attr-defined]
    return id, png


def png_with(text: dict[str, str]) -> bytes:
    chunks = PngImagePlugin.PngInfo()
    for name, value in text.items():
        chunks.add_itxt(name, value)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def test_a_picture_is_served_for_ever_with_its_recipe_inside(
    client: TestClient, drawn: tuple[str, bytes]
) -> None:
    id, png = drawn
    answer = client.get(f"/api/pictures/{id}.png")
    assert answer.content == png and answer.headers["content-type"] == "image/png"
    assert "immutable" in answer.headers["cache-control"] and "private" in answer.headers["cache-control"]
    assert read_recipe(answer.content)["caption"] == "a red apple"


def test_the_listing_has_what_the_page_shows(client: TestClient, drawn: tuple[str, bytes]) -> None:
    id, png = drawn
    answer = client.get("/api/history", params={"query": "apple", "limit": 5}).json()
    assert answer["next"] is None
    [picture] = answer["pictures"]
    assert picture["id"] == id and picture["url"] == f"/api/pictures/{id}.png"
    assert picture["recipe"] == read_recipe(png) and picture["favourite"] is False


def test_a_favourite_is_marked_and_unmarked(client: TestClient, drawn: tuple[str, bytes]) -> None:
    path = f"/api/history/{drawn[0]}"
    assert client.patch(path, json={"favourite": True}).json()["favourite"] is True
    assert len(client.get("/api/history", params={"favourite": "true"}).json()["pictures"]) == 1
    assert client.patch(path, json={"favourite": False}).json()["favourite"] is False
    assert client.get("/api/history", params={"favourite": "true"}).json()["pictures"] == []


@pytest.mark.parametrize(
    "body", [{}, {"favourite": "yes"}, {"favourite": 1}, {"favourite": True, "caption": "x"}, []]
)
def test_a_wrong_change_is_refused(client: TestClient, drawn: tuple[str, bytes], body: Any) -> None:
    answer = client.patch(f"/api/history/{drawn[0]}", json=body)
    assert 400 <= answer.status_code < 500


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/pictures/AAAAAAAAAAAAAAAAAAAAAA.png"),
        ("GET", "/api/pictures/%2e%2e%2fhistory.sqlite.png"),
        ("GET", "/api/pictures/AAAAAAAAAAAAAAAAAAAAAA/microscope"),
        ("PATCH", "/api/history/AAAAAAAAAAAAAAAAAAAAAA"),
        ("DELETE", "/api/history/AAAAAAAAAAAAAAAAAAAAAA"),
    ],
)
def test_an_unknown_picture_is_a_404_in_the_envelope(client: TestClient, method: str, path: str) -> None:
    answer = client.request(method, path, json={"favourite": True} if method == "PATCH" else None)
    assert answer.status_code == 404 and set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_deleting_takes_a_picture_away(client: TestClient) -> None:
    [id] = client.app.state.serving.history.add([new()], "to delete")  # type: ignore[attr-defined]
    assert client.delete(f"/api/history/{id}").status_code == 204
    assert client.get(f"/api/pictures/{id}.png").status_code == 404
    assert client.delete(f"/api/history/{id}").status_code == 404


# Restoring


def test_a_dropped_png_restores_caption_and_settings(client: TestClient, drawn: tuple[str, bytes]) -> None:
    id, png = drawn
    answer = client.post("/api/restore", content=png).json()
    assert answer["caption"] == "a red apple" and answer["id"] == id and answer["same_model"] is True
    assert answer["settings"]["seed"] == 7 and answer["settings"]["temperature"] == 1.0
    assert answer["recipe"] == read_recipe(png)


def test_a_png_of_ours_that_is_not_in_the_history_restores_too(
    client: TestClient, drawn: tuple[str, bytes]
) -> None:
    recipe = read_recipe(drawn[1]) | {"caption": "a blue boat"}
    answer = client.post("/api/restore", content=png_with({"dalle": json.dumps(recipe)})).json()
    assert answer["caption"] == "a blue boat" and answer["id"] is None


HTML = "<script>alert(1)</script>"


def wide_png() -> bytes:
    """The header of a picture of 10^9 pixels."""
    header = b"IHDR" + (32000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    length, check = (13).to_bytes(4, "big"), zlib.crc32(header).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + length + header + check


def text_bomb() -> bytes:
    """A text chunk that inflates to 50 MB."""
    chunk = b"iTXtdalle\x00\x01\x00\x00\x00" + zlib.compress(b"[" * 50_000_000)
    plain = png_with({})
    packed = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    return plain[:33] + packed + plain[33:]


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="JPEG", comment=HTML)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        HTML.encode(),
        jpeg(),
        png_with({}),
        png_with({"dalle": HTML}),
        png_with({"dalle": json.dumps([HTML])}),
        png_with({"dalle": json.dumps({"caption": HTML})}),
        png_with({"dalle": "[" * 100_000}),
        png_with({"dalle": '{"score": NaN}'}),
        png_with({"dalle": '{"seed": ' + "9" * 5000 + "}"}),
        png_with({"parameters": HTML}),
        png_with({})[:40],
        wide_png(),
        text_bomb(),
    ],
)
def test_what_is_no_picture_of_ours_is_one_clear_line_that_repeats_nothing_of_it(
    client: TestClient, body: bytes
) -> None:
    answer = client.post("/api/restore", content=body)
    assert answer.status_code == 400 and answer.headers["content-type"] == "application/json"
    message = answer.json()["error"]["message"]
    assert "\n" not in message and "script" not in message and len(message) < 200


def test_a_png_with_any_damage_is_restored_or_refused(client: TestClient, drawn: tuple[str, bytes]) -> None:
    rng = random.Random(0)
    answers = set()
    for _ in range(200):
        data = bytearray(drawn[1][: rng.choice([len(drawn[1]), rng.randrange(len(drawn[1]))])])
        for _ in range(rng.randrange(4)):
            if data:
                data[rng.randrange(min(len(data), 3000))] = rng.randrange(256)  # most of the recipe
        answer = client.post("/api/restore", content=bytes(data))
        answers.add(answer.status_code)
        assert answer.status_code == 200 or "error" in answer.json()
    assert answers == {200, 400}


@pytest.mark.parametrize(
    "change",
    [
        {"caption": "a \ud800 cat"},
        {"seed": -1},
        {"seed": 1e999},
        {"extra": HTML},
        {"options": {"temperature": HTML}},
        {"format": 2},
        {"score": 10**400},
    ],
)
def test_a_recipe_that_was_changed_by_hand_is_refused(
    client: TestClient, drawn: tuple[str, bytes], change: dict[str, Any]
) -> None:
    recipe = json.dumps(read_recipe(drawn[1]) | change).replace("Infinity", "1e999")
    answer = client.post("/api/restore", content=png_with({"dalle": recipe}))
    assert answer.status_code == 400 and answer.json()["error"]["code"] in ("no_recipe", "bad_recipe")
    assert "script" not in answer.text
