"""`dalle generate`: draw pictures from captions, and save them with their recipes."""

from pathlib import Path
from typing import Annotated

import typer

from dalle.commands.console import (
    Device,
    Dtype,
    Json,
    Model,
    RankerFolder,
    RowsBar,
    device_named,
    log_to_stderr,
    print_json,
)
from dalle.generation.fields import FIELDS


def generate(
    captions: Annotated[list[str], typer.Argument(metavar="CAPTION...", help=FIELDS["prompt"].help)],
    model: Model = None,
    n: Annotated[int, typer.Option("-n", help=FIELDS["num_images_per_prompt"].help)] = 4,
    candidates: Annotated[int | None, typer.Option(help=FIELDS["num_candidates"].help)] = None,
    ranker: RankerFolder = None,
    seed: Annotated[int, typer.Option(help=FIELDS["seed"].help + " -1 takes a random one.")] = 0,
    temperature: Annotated[float | None, typer.Option(help=FIELDS["temperature"].help)] = None,
    top_k: Annotated[int | None, typer.Option(help=FIELDS["top_k"].help)] = None,
    top_p: Annotated[float | None, typer.Option(help=FIELDS["top_p"].help)] = None,
    guidance: Annotated[float | None, typer.Option(help=FIELDS["guidance"].help)] = None,
    image: Annotated[Path | None, typer.Option(help=FIELDS["image"].help)] = None,
    keep_rows: Annotated[int | None, typer.Option(help=FIELDS["keep_rows"].help)] = None,
    mask: Annotated[Path | None, typer.Option(help=FIELDS["mask"].help)] = None,
    truncate: Annotated[bool, typer.Option(help=FIELDS["truncate"].help)] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    native: Annotated[
        bool, typer.Option("--native", help="Compiled attention: C on a CPU, Triton on a GPU.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads for drawing; from model and pictures if left out.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the PNGs.")] = Path("out"),
    grid: Annotated[bool, typer.Option(help="Also write grid.png.")] = True,
    as_json: Json = False,
) -> None:
    """Draw pictures from captions: 000_SEED.png ... (best first where they were ranked) and grid.png."""
    log_to_stderr(quiet=True)
    from dalle import images
    from dalle.generation.rerank import Ranker
    from dalle.model_folder import model_folder
    from dalle.pipeline import DallePipeline

    place = device_named(device)
    pipe = DallePipeline.from_pretrained(model, dtype=dtype, device=place, native=native)
    chosen = None if ranker is None else Ranker.from_pretrained(model_folder(ranker))
    if chosen is not None:
        chosen.name = str(ranker)
        chosen.clip.to(place)
    picture = images.open_image(image) if image is not None else None
    drawn_anew = images.open_mask(mask) if mask is not None else None
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; give a folder")
    with RowsBar("drawing", as_json) as progress:
        result = pipe(
            captions,
            num_images_per_prompt=n,
            num_candidates=candidates,
            seed=None if seed == -1 else seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance=guidance,
            image=picture,
            keep_rows=keep_rows,
            mask=drawn_anew,
            truncate=truncate,
            ranker=chosen,
            progress=progress,
            n_threads=threads,
        )
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for rank, (drawn, recipe) in enumerate(zip(result.images, result.recipes, strict=True)):
        path = out / f"{rank:03d}_{result.seeds[rank]}.png"
        images.save_png(drawn, path, recipe)
        score = result.scores[rank] if result.scores else None
        rows.append(
            {
                "path": str(path),
                "caption": result.captions[rank],
                "seed": result.seeds[rank],
                "score": score,
                "rank": rank,
            }
        )
    grid_path = None
    if grid and result.images:
        grid_path = out / "grid.png"
        images.save_png(images.grid(list(result.images)), grid_path, None)
    if as_json:
        print_json({"images": rows, "grid": None if grid_path is None else str(grid_path)})
        return
    for row in rows:
        print(f"{row['path']}  {row['caption']}")
    if grid_path:
        print(grid_path)
