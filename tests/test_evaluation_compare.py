"""Comparing reports: changes beyond the intervals have a direction, others have none, and strange pairs are refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dalle.cli import app
from dalle.evaluation.compare import compare, read_report


def share(value: float, error: float = 0.03) -> dict[str, Any]:
    return {
        "value": value,
        "low": value - 2 * error,
        "high": value + 2 * error,
        "standard_error": error,
        "n": 213,
    }


def report() -> dict[str, Any]:
    queries = {
        "draws": {"recall_at_1": share(0.3), "median_rank": share(5.0, 0.5)},
        "donor_copy": {"recall_at_1": share(0.45)},
    }
    return {
        "format": 2,
        "data": {"fingerprint": "f", "measured": {"combo": 213}},
        "settings": {"limit": None},
        "image_tokenizer": {"psnr": 23.0},
        "transformer": {"combo": {"image_loss": 4.2}},
        "retrieval": {"galleries": {"style": {"queries": queries}}},
        "samples": {
            "networks": {"n": {"blur": [{"blur": 0, "draws": {"frechet": {"value": 9.0, "n": 800}}}]}}
        },
    }


def changed(value: float, figure: str = "recall_at_1", query: str = "draws") -> dict[str, Any]:
    other = copy.deepcopy(report())
    other["retrieval"]["galleries"]["style"]["queries"][query][figure]["value"] = value
    return other


def verdicts(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    return {change.path.split("/")[-1]: change.verdict for change in compare(before, after)}


def test_only_changes_beyond_two_combined_errors_count_and_they_have_a_direction() -> None:
    assert verdicts(report(), changed(0.37))["recall_at_1"] == "same"  # two errors are 0.085
    assert verdicts(report(), changed(0.40))["recall_at_1"] == "better"
    assert verdicts(report(), changed(0.20))["recall_at_1"] == "worse"
    assert verdicts(report(), changed(3.0, "median_rank"))["median_rank"] == "better"
    assert verdicts(report(), changed(7.0, "median_rank"))["median_rank"] == "worse"


def test_baselines_are_not_the_models_to_answer_for_and_sets_without_errors_fail_nothing() -> None:
    found = compare(report(), changed(0.1, query="donor_copy"))
    assert not [change for change in found if "donor" in change.path]
    by_path = {change.path: change.verdict for change in found}
    assert by_path["image_tokenizer/psnr"] == by_path["transformer/combo/image_loss"] == "no interval"
    assert by_path["samples/networks/n/blur/0/draws/frechet"] == "no interval"


def test_reports_of_different_data_or_settings_are_refused(tmp_path: Path) -> None:
    other = report()
    other["data"] = {"fingerprint": "g", "measured": {"combo": 213}}
    with pytest.raises(ValueError, match="the reports differ in data fingerprint: f and g"):
        compare(report(), other)
    short = report()
    short["settings"] = {"limit": 20}
    with pytest.raises(ValueError, match="differ in limit: None and 20"):
        compare(report(), short)
    with pytest.raises(ValueError, match=r"holds no report\.json"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(ValueError, match="is no report of `dalle evaluate`"):
        read_report(tmp_path)


def test_the_command_ends_with_1_only_where_a_figure_became_worse(tmp_path: Path) -> None:
    for name, tree in (("a", report()), ("worse", changed(0.1)), ("better", changed(0.6))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(tree))

    def run(*names: str) -> Any:
        return CliRunner().invoke(app, ["compare", *(str(tmp_path / name) for name in names)])

    assert run("a", "better").exit_code == run("a", "a").exit_code == 0
    ended = run("a", "worse")
    assert ended.exit_code == 1 and "worse" in ended.stdout
    shown = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "worse"), "--json"])
    assert shown.exit_code == 1 and json.loads(shown.stdout)["is_worse"] is True
