"""`dalle plan`: say what a run will need before it is started."""

from typing import Annotated

import typer

from dalle.commands.console import Json, log_to_stderr, print_json


def plan(
    preset: Annotated[str, typer.Option(help="tiny, laptop, gpu, grid16, paper, or a .toml file.")],
    gpus: Annotated[int | None, typer.Option(help="Devices; several numbers of them if left out.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="h100, a100, v100 or cpu; the three GPUs if left out.")
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(help="Share of the GPU's peak that training reaches, 0..1.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="K=V", help="Override a setting.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a run will need before it is started: parameters, memory, FLOPs, tokens a second, days."""
    log_to_stderr(as_json)
    from dalle.training.plan import make_plan
    from dalle.training.plan_table import lines
    from dalle.training.recipe import load_recipe

    recipe = load_recipe(preset, settings or [])
    made = make_plan(recipe, gpus, gpu, mfu)
    if as_json:
        print_json(made.to_json())
    else:
        print("\n".join(lines(made)))
