"""Two reports on the same pictures: what changed beyond the intervals, and in which direction.

A figure with standard errors has changed when the difference is above two of their combined ones. Figures of the whole
set without an error (PSNR, losses) are listed with their difference and fail nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dalle import files
from dalle.evaluation.intervals import TWO_ERRORS

OURS = ("draws", "chosen", "reconstructions")  # what a model answers for; baselines may not change at all
LOWER_IS_BETTER = ("median_rank", "frechet", "kernel", "near", "excess_near", "nearer_than_true")
PLAIN = ("psnr", "ink_psnr", "output_psnr", "codes_used", "perplexity")  # of the image tokenizer
LOSSES = ("text_loss", "image_loss", "nats_per_token")

Verdict = Literal["better", "worse", "same", "no interval"]


class Change(NamedTuple):
    """One figure in both reports."""

    path: str
    before: float
    after: float
    error: float | None  # of the difference
    verdict: Verdict


def read_report(path: Path) -> dict[str, Any]:
    """Read a report.json, or the one in a folder; ValueError where there is none or it is another file."""
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} holds no report.json: give what `dalle evaluate --out` wrote")
    report = files.read_json(file)
    if not isinstance(report, dict) or "data" not in report or "format" not in report:
        raise ValueError(f"{file} is no report of `dalle evaluate`")
    return report


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Return the figures that both reports have; ValueError for reports of other formats, data or settings."""
    _require_same(before, after)
    found = [
        _change(path, one, other)
        for path, one in _estimates(before)
        if (other := _at(after, path)) is not None and other.get("value") is not None
    ]
    return [*found, *_plain(before, after)]


def _require_same(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    pairs = [("format", before["format"], after["format"])]
    pairs += [
        (f"data {name}", before["data"][name], after["data"][name]) for name in ("fingerprint", "measured")
    ]
    names = ("splits", "limit", "candidates", "networks")
    pairs += [(name, before["settings"].get(name), after["settings"].get(name)) for name in names]
    for name, one, other in pairs:
        if one != other:
            raise ValueError(
                f"the reports differ in {name}: {one} and {other}: only reports of the same pictures and settings compare"
            )


def _estimates(
    tree: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield every figure with a value that the model answers for, with its path."""
    if "value" in tree:
        if tree["value"] is not None and any(name in OURS for name in path):
            yield path, tree
        return
    for name, child in tree.items():
        children = enumerate(child) if isinstance(child, list) else [(None, child)]
        for place, one in children:
            if isinstance(one, Mapping):
                yield from _estimates(one, (*path, name) if place is None else (*path, name, str(place)))


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        if isinstance(tree, list):
            tree = tree[int(name)] if int(name) < len(tree) else None
        else:
            tree = tree.get(name) if isinstance(tree, Mapping) else None
        if tree is None:
            return None
    return tree


def _change(path: tuple[str, ...], one: Mapping[str, Any], other: Mapping[str, Any]) -> Change:
    before, after = float(one["value"]), float(other["value"])
    name = "/".join(path)
    if "standard_error" not in one or "standard_error" not in other:
        return Change(name, before, after, None, "no interval")
    error = math.hypot(one["standard_error"], other["standard_error"])
    if abs(after - before) <= TWO_ERRORS * error or after == before:
        return Change(name, before, after, error, "same")
    is_better = (after < before) == any(part in LOWER_IS_BETTER for part in path)
    return Change(name, before, after, error, "better" if is_better else "worse")


def _plain(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    """The figures over whole sets, without an error of their own."""
    paths: list[tuple[str, ...]] = [("image_tokenizer", name) for name in PLAIN]
    paths += [("transformer", split, loss) for split in before.get("transformer", {}) for loss in LOSSES]
    for path in paths:
        one, other = _at(before, path), _at(after, path)
        if isinstance(one, float) and isinstance(other, float):
            yield Change("/".join(path), one, other, None, "no interval")
