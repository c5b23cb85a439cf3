"""The page of a report: whole by itself, every figure with its interval, hostile names escaped."""

import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from dalle.evaluation.page import _curves, write_page
from dalle.evaluation.plots import Curve, plot
from tests.test_evaluation_compare import report


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found = list[tuple[str, dict[str, str | None]]]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_needs_no_other_file_and_runs_no_script(tmp_path: Path) -> None:
    tree = report()
    hostile = '<span class="good"><script>alert(1)</script>'
    gallery = {
        "n": 213,
        "chance": {"recall_at_1": 0.01},
        "queries": {},
        "by_style": {
            hostile: {"draws": tree["retrieval"]["galleries"]["style"]["queries"]["draws"]["recall_at_1"]}
        },
        "against_copying": {},
    }
    tree |= {
        "model": {"name": hostile},
        "versions": {},
        "transformer": {},
        "samples": {"refused": "no network"},
    }
    tree["image_tokenizer"] = {
        "psnr": 23.0,
        "ink_psnr": None,
        "codes_used": 0.5,
        "perplexity": 9.0,
        "n_codes": 64,
    }
    tree["retrieval"] = {"rows": "combo_hard", "n_candidates": 4, "galleries": {"style": gallery}}
    Image.new("RGB", (8, 8), "red").save(tmp_path / "draws.png")
    write_page(tree, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert "script" not in {tag for tag, _ in tags.found}
    sources = [attributes["src"] for _, attributes in tags.found if "src" in attributes]
    assert len(sources) == 1 and str(sources[0]).startswith("data:image/png;base64,")
    assert not any("href" in attributes for _, attributes in tags.found)
    assert "30.0% (24.0% to 36.0%, n 213)" in text and "no network" in text


def test_a_curve_over_candidates_is_plotted_over_candidates_and_not_over_pictures() -> None:
    rows = [{"candidates": count, "n": 256, "value": 0.1, "standard_error": 0.01} for count in (1, 2, 4)]
    section = {"n_captions": 32, "n_candidates": 4, "chosen_by_clip": {}, "best_possible": {}}
    text = _curves(section | {"kernel": {"network": {"counts": rows}}})
    assert re.findall(r'text-anchor="middle">(\d+)<', text) == ["1", "2", "4"]


def test_a_plot_places_its_points_in_order_and_within_its_frame() -> None:
    svg = plot("a <b>", "n", [Curve("one", [1, 4, 16], [0.1, 0.2, 0.3], [0.01] * 3)], is_log=True)
    places = [tuple(map(float, pair)) for pair in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    (x1, y1), (x2, y2), (x3, y3) = places
    assert x2 - x1 == x3 - x2 > 0 and y1 > y2 > y3  # a logarithmic axis; up is more
    assert all(0 < x < 440 and 0 < y < 260 for x, y in places)
    assert "a &lt;b&gt;" in svg and "<b>" not in svg
