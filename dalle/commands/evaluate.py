"""`dalle evaluate`: measure a model beside its baselines."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dalle.commands.console import (
    Device,
    Json,
    RowsBar,
    device_named,
    log_to_stderr,
    print_json,
    wide_console,
)

if TYPE_CHECKING:
    from dalle.evaluation.summary import Line


def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder, Hub id, or `bundled`.")],
    data: Annotated[str, typer.Argument(help="Any data set that `dalle train` reads.")],
    out: Annotated[Path, typer.Option(help="Folder for report.json and the sheets.")] = Path("report"),
    splits: Annotated[
        str | None, typer.Option(help="Comma list; all that are not train if left out.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="At most this many pictures a split, spread evenly.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    candidates: Annotated[
        int | None,
        typer.Option(help="Candidates per caption; CLIP chooses one. The model's default if left out."),
    ] = None,
    probe: Annotated[str, typer.Option(help="Metadata field that the linear probe predicts.")] = "group",
    networks: Annotated[
        str,
        typer.Option(
            help="For distances, a comma list: lite0, lite1, judge, a TorchScript Inception; or none."
        ),
    ] = "lite0",
    curve_candidates: Annotated[
        int, typer.Option(help="Candidates of 32 captions for the curves over rerank size.")
    ] = 512,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure a model, or a CLIP alone, on held-out pictures, beside baselines that need no model."""
    log_to_stderr(as_json)
    from dalle.config import validate
    from dalle.data.pairs import read_pairs
    from dalle.evaluation.report import evaluate as run
    from dalle.evaluation.report import evaluate_ranker
    from dalle.evaluation.subject import Settings
    from dalle.evaluation.summary import lines
    from dalle.generation.rerank import Ranker
    from dalle.model_folder import is_ranker, model_folder
    from dalle.pipeline import DallePipeline

    tree: dict[str, Any] = {
        "splits": [part.strip() for part in splits.split(",")] if splits else None,
        "limit": limit,
        "seed": seed,
        "candidates": candidates,
        "probe": probe,
        "networks": [] if networks == "none" else [part.strip() for part in networks.split(",")],
        "curve_candidates": curve_candidates,
    }
    settings = validate(Settings, tree, "evaluate")
    pairs = read_pairs(data)
    pairs.require_mostly_good()
    source = None if model == "bundled" else model
    folder, place = model_folder(source), device_named(device)
    with RowsBar("evaluating", as_json) as progress:
        if is_ranker(folder):
            ranker = Ranker.from_pretrained(folder)
            ranker.clip.to(place)
            report = evaluate_ranker(ranker, pairs, out, settings, progress)
        else:
            pipe = DallePipeline.from_pretrained(source, device=place)
            report = run(pipe, pairs, out, settings, progress)
    if as_json:
        print_json(report)
    else:
        print_lines(lines(report))
        print(out)


def print_lines(lines: Iterable[Line]) -> None:
    """Print figures as a table to standard output."""
    from rich.table import Table

    table, previous = Table("section", "what", "figure (95 %)", "beside", box=None, pad_edge=False), ""
    for line in lines:
        table.add_row(line.section if line.section != previous else "", line.what, line.figure, line.note)
        previous = line.section
    wide_console().print(table)
