"""`dalle rerun`: draw a picture again from the recipe inside it."""

from pathlib import Path
from typing import Annotated

import typer

from dalle.commands.console import Json, Model, RowsBar, device_named, log_to_stderr, print_json


def rerun(
    image: Annotated[Path, typer.Argument(help="A PNG that `dalle generate` wrote.")],
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the new picture.")] = None,
    as_json: Json = False,
) -> None:
    """Draw a picture again from the recipe inside it, and say whether every token came out the same."""
    log_to_stderr(quiet=True)
    from dalle import images
    from dalle.pipeline import DallePipeline

    recipe = images.read_recipe(image)
    # Where it was drawn, if this machine has that: another device rounds otherwise.
    pipe = DallePipeline.from_pretrained(
        model, device=device_named("cpu" if recipe.get("device") == "cpu" else None)
    )
    with RowsBar("drawing", as_json) as progress:
        drawn, agrees = pipe.rerun(recipe, progress=progress)
    path = out or image.with_name(f"{image.stem}_rerun.png")
    images.save_png(drawn, path, recipe if agrees else None)  # of other tokens it would not be the recipe
    if as_json:
        print_json({"path": str(path), "agrees": agrees})
    else:
        print(f"{path}: {'the same tokens' if agrees else 'other tokens than the recipe records'}")
    if not agrees:
        raise typer.Exit(3)
