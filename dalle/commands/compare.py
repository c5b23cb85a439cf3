"""`dalle compare`: what changed between two reports, with an exit status for CI."""

from pathlib import Path
from typing import Annotated

import typer

from dalle.commands.console import Json, print_json, wide_console


def compare(
    before: Annotated[
        Path, typer.Argument(metavar="REPORT", help="Folder or report.json of `dalle evaluate`.")
    ],
    after: Annotated[Path, typer.Argument(metavar="REPORT", help="Another one, on the same pictures.")],
    as_json: Json = False,
) -> None:
    """Say what changed beyond the intervals; exit with 1 where a figure became worse."""
    from rich.table import Table

    from dalle.evaluation.compare import compare as changes_of
    from dalle.evaluation.compare import read_report

    changes = changes_of(read_report(before), read_report(after))
    is_worse = any(change.verdict == "worse" for change in changes)
    if as_json:
        print_json({"changes": [change._asdict() for change in changes], "is_worse": is_worse})
    else:
        table = Table("figure", "before", "after", "change", "", box=None, pad_edge=False)
        for change in changes:
            error = "" if change.error is None else f" ± {change.error:.4g}"
            if change.verdict in ("better", "worse") or (
                change.error is None and change.before != change.after
            ):
                moved = f"{change.after - change.before:+.4g}{error}"
                table.add_row(
                    change.path, f"{change.before:.4g}", f"{change.after:.4g}", moved, change.verdict
                )
        wide_console().print(table)
        same = sum(change.verdict == "same" for change in changes)
        print(f"{same} of {len(changes)} figures did not change beyond their intervals")
    if is_worse:
        raise typer.Exit(1)
