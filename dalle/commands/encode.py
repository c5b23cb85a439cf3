"""`dalle encode`: turn pictures into tokens once."""

from pathlib import Path
from typing import Annotated

import typer

from dalle.commands.console import Device, Json, Model, RowsBar, launched, log_to_stderr, print_json


def encode(
    data: Annotated[str, typer.Argument(help="Any data set that `dalle train` reads.")],
    out: Annotated[Path, typer.Option(help="Folder for the token shards.")],
    model: Model = None,
    crop: Annotated[str, typer.Option(help="center, or paper (Listing 2).")] = "center",
    seed: Annotated[int, typer.Option(help="Of the paper's random crop.")] = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Encode pictures to tokens once; the same command goes on where it stopped."""
    log_to_stderr(as_json)
    from dalle.data.pairs import read_pairs
    from dalle.data.tokens import TokenStore, encode_part
    from dalle.pipeline import DallePipeline
    from dalle.training.processes import joined

    world, place = launched(device)
    with joined(world, place), RowsBar("encoding", as_json or not world.is_main) as progress:
        if crop not in ("center", "paper"):
            raise ValueError(f"--crop {crop!r} is unknown: use center or paper")
        pairs = read_pairs(data)
        pairs.require_mostly_good()
        dvae = DallePipeline.from_pretrained(model, device=place).dvae
        folder = encode_part(
            pairs,
            dvae,
            out,
            crop=crop,  # type: ignore[arg-type]
            seed=seed,
            progress=progress,
            rank=world.rank,
            n_processes=world.size,
        )
    if not world.is_main:
        return
    store = TokenStore(folder)
    summary = {
        "folder": str(store.folder),
        "pictures": len(store.valid),
        "bad": len(store.keys) - len(store.valid),
    }
    if as_json:
        print_json(summary)
    else:
        print(f"{summary['folder']}: {summary['pictures']} pictures, {summary['bad']} bad")
