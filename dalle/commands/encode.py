"""`dalle encode`: turn pictures into tokens once."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dalle.commands.console import Device, Json, Model, RowsBar, launched, log_to_stderr, print_json
from dalle.commands.data_options import takes_data


@takes_data
def encode(
    source: Any,
    out: Annotated[Path, typer.Option(help="Folder for the token shards.")],
    model: Model = None,
    crop: Annotated[str, typer.Option(help="center, or paper (Listing 2).")] = "center",
    seed: Annotated[int, typer.Option(help="Of the paper's random crop.")] = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Encode pictures to tokens once; the same command goes on where it stopped."""
    log_to_stderr(as_json)
    from dalle.data.contents import check_contents
    from dalle.data.tokens import TokenStore, encode_part
    from dalle.pipeline import DallePipeline
    from dalle.training.processes import joined

    world, place = launched(device)
    with joined(world, place), RowsBar("encoding", as_json or not world.is_main) as progress:
        if crop not in ("center", "paper"):
            raise ValueError(f"--crop {crop!r} is unknown: use center or paper")
        found = source.read(exclude=(str(out),))
        found.require_mostly_good(source.max_bad)
        with world.main_first():
            pairs = check_contents(found, out / "data.jsonl")
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
            max_bad=source.max_bad,
        )
    if not world.is_main:
        return
    store = TokenStore(folder)
    summary = {
        "folder": str(store.folder),
        "pictures": len(store.valid),
        "bad": len(pairs.bad) + len(store.keys) - len(store.valid),
    }
    if as_json:
        print_json(summary)
    else:
        print(f"{summary['folder']}: {summary['pictures']} pictures, {summary['bad']} bad")
