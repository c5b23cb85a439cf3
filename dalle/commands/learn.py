"""`dalle train`: every stage, resumable."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dalle.commands.console import (
    Device,
    Dtype,
    Json,
    log_to_stderr,
    print_folder,
    trained_on,
    training_dtype,
)
from dalle.commands.data_options import takes_data


@takes_data
def train(
    source: Any,
    out: Annotated[Path, typer.Option(help="Model folder; the same command resumes.")],
    preset: Annotated[
        str, typer.Option(help="tiny, laptop, gpu, grid16, paper, or a .toml file.")
    ] = "laptop",
    stages: Annotated[
        str, typer.Option(help="all, or a comma list of tokenizer, dvae, decoder, transformer, clip.")
    ] = "all",
    init_from: Annotated[
        str | None, typer.Option(help="Start from these components: a model folder, or `bundled`.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="K=V", help="Override a setting.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    quiet: Annotated[bool, typer.Option(help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Train every stage: tokenizer, dVAE, picture tokens, transformer. Stop it at any time; run it again to go on."""
    log_to_stderr(quiet)
    from dalle.model_folder import bundled_folder
    from dalle.training.recipe import load_recipe
    from dalle.training.train import STAGES
    from dalle.training.train import train as run

    with trained_on(device) as (world, place):
        recipe = load_recipe(preset, settings or [])
        folder = run(
            source,
            out,
            recipe,
            init_from=bundled_folder() if init_from == "bundled" else Path(init_from) if init_from else None,
            stages=STAGES if stages == "all" else tuple(part.strip() for part in stages.split(",")),
            device=place,
            dtype=training_dtype(dtype, place),
            quiet=quiet,
            world=world,
        )
    if world.is_main:
        print_folder(folder, as_json)
