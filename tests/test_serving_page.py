"""The page's files over HTTP: a fixed list, the right types, no copies sent twice, and few bytes."""

import re
from collections.abc import Iterator
from importlib import resources

import pytest
from fastapi.testclient import TestClient

from dalle.serving.app import create_app
from dalle.serving.routes.page import ENTRY, page_files
from dalle.serving.settings import Settings
from tests.tiny import tiny_pipe

STATIC = resources.files("dalle.serving").joinpath("static")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    app = create_app(Settings(data_dir=tmp_path_factory.mktemp("data")), tiny_pipe(["a dog"]))
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        yield client


def test_every_file_is_sent_with_its_type_and_only_once(client: TestClient) -> None:
    types = {"css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml"}
    for name, file in page_files().items():
        path = "/" if name == ENTRY else f"/static/{name}"
        answer = client.get(path)
        assert answer.status_code == 200 and answer.content == file.data, name
        assert answer.headers["content-type"].startswith(types[name.rpartition(".")[2]])
        assert answer.headers["cache-control"] == "no-cache"
        for known in (
            answer.headers["etag"],
            f"W/{answer.headers['etag']}",
            f'"old", {answer.headers["etag"]}',
        ):
            again = client.get(path, headers={"if-none-match": known})
            assert again.status_code == 304 and again.content == b""
        assert client.get(path, headers={"if-none-match": '"old"'}).status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        "index.html",
        "none.js",
        "..%2Fpage.py",
        "%2e%2e/page.py",
        "....//page.py",
        "page.css%00",
        ".",
        "PAGE.CSS",
        "",
    ],
)
def test_nothing_else_is_sent(client: TestClient, name: str) -> None:
    assert client.get(f"/static/{name}").status_code == 404


def test_the_page_is_under_300_kilobytes() -> None:
    assert {item.name for item in STATIC.iterdir()} == set(page_files())  # nothing lies there unsent
    assert sum(len(file.data) for file in page_files().values()) < 300_000


def test_what_the_page_names_exists_and_comes_from_here() -> None:
    files = {name: file.data.decode() for name, file in page_files().items()}
    for name, text in files.items():
        named = re.findall(r'(?:from|import)\s+"\./([\w.]+)"', text) + re.findall(
            r'(?:src|href)="/static/([\w.]+)"', text
        )
        assert set(named) <= set(files), name
        outside = set(re.findall(r"https?://[\w./-]+", text)) - {"http://www.w3.org/2000/svg"}
        assert outside == set(), name


def test_no_text_becomes_markup_and_the_content_policy_holds() -> None:
    for name, file in page_files().items():
        text = file.data.decode()
        for banned in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "DOMParser",
        ):
            assert banned not in text, f"{name}: {banned}"
        if name == ENTRY:
            assert not re.search(r"\sstyle=|\son\w+=|<style|<script>", text)
