"""The arguments that say which data a command reads: `@takes_data` gives them to it as one `source: Source`."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

CAPTION_PLACES = ("folder", "name")


def _arguments(
    data: Annotated[
        list[str],
        typer.Argument(
            help="Folders, tables, tar shards, COCO captions, addresses (s3://...) or Hub data set ids."
        ),
    ],
    weight: Annotated[
        str | None,
        typer.Option(help="How often each data set's pictures are seen, such as 2,1: in their order."),
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Column of tables that names or holds the pictures.")
    ] = None,
    caption_column: Annotated[
        str | None, typer.Option(help="Column of tables that holds the captions.")
    ] = None,
    captions_from: Annotated[
        str | None, typer.Option(help="folder or name: what captions a picture without a caption file.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out any number of bad samples; max(5, 1 %) else.")
    ] = False,
) -> Any:
    from dalle.data.samples import ReadOptions
    from dalle.data.source import Source

    if captions_from not in (None, *CAPTION_PLACES):
        raise ValueError(f"--captions-from {captions_from!r} is unknown: use {' or '.join(CAPTION_PLACES)}")
    place: Literal["folder", "name"] | None = captions_from  # type: ignore[assignment]
    try:
        weights = tuple(float(part) for part in weight.split(",")) if weight else ()
    except ValueError:
        raise ValueError(f"--weight {weight}: give numbers with commas between them, such as 2,1") from None
    return Source(tuple(data), weights, ReadOptions(image_column, caption_column, place), skip_bad)


def takes_data(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter `source` by the arguments that say which data are read."""
    own = inspect.signature(_arguments, eval_str=True).parameters
    others = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "source"]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        source = _arguments(**{name: given.pop(name) for name in own})
        command(source=source, **given)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own.values(), *others)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    del run.__wrapped__  # else its signature would be asked
    return run
