"""The command finetune: a finished model goes on learning from pictures of your own."""

from functools import partial
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
def finetune(
    source: Any,
    out: Annotated[Path, typer.Option(help="Model folder to write; the same command resumes.")],
    start: Annotated[
        str | None,
        typer.Option("--from", help="Model folder or Hub id to start from; the bundled model if left out."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="K=V", help="Override a setting, such as transformer_training.epochs=30."
        ),
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(
            help="Train adapters of this rank alone, a few MB; published models, or ours. Needs dalle[lora]."
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    quiet: Annotated[bool, typer.Option(help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Train a finished model on, on your own captioned pictures. Stop it at any time; run it again to go on."""
    log_to_stderr(quiet)
    from dalle.model_folder import model_folder
    from dalle.training.finetune import finetune as train_on
    from dalle.training.finetune_published import finetune_published, is_for

    given = None if start == "bundled" else start
    base = model_folder(given)
    name = "bundled" if given is None else base.resolve().name if Path(given).is_dir() else given
    with trained_on(device) as (world, place):
        run = partial(finetune_published, rank=lora) if is_for(base, lora) else train_on
        folder = run(
            source,
            out,
            base,
            name=name,
            settings=settings or [],
            device=place,
            dtype=training_dtype(dtype, place),
            quiet=quiet,
            world=world,
        )
    if world.is_main:
        print_folder(folder, as_json)
