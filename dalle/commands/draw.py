"""Commands that draw: generate, rerun, serve."""

import logging
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
    mask: Annotated[
        Path | None,
        typer.Option(help=FIELDS["mask"].help),
    ] = None,
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


def serve(
    model: Model = None,
    host: Annotated[
        str, typer.Option(help="Address; others than this machine's need an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="DALLE_API_KEY", help="What every request must bring.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A further name that the server is reached by, such as a proxy's."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the history; ~/.local/share/dalle if left out.")
    ] = None,
    runs: Annotated[Path | None, typer.Option(help="Folder of training runs to watch.")] = None,
    templates: Annotated[Path | None, typer.Option(help="TOML file with captions for the explorer.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="K=V", help="Override a limit, such as max_queue=8.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    native: Annotated[bool, typer.Option("--native", help="Compiled attention, see `generate`.")] = False,
) -> None:
    """Serve the page and an OpenAI-compatible images API until it is stopped."""
    log_to_stderr()
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # one line for each damaged upload
    from dalle.config import override, validate
    from dalle.pipeline import DallePipeline
    from dalle.serving.app import create_app
    from dalle.serving.server import Server, listen
    from dalle.serving.settings import Settings

    given = {"host": host, "port": port, "api_key": api_key, "data_dir": data_dir, "runs": runs}
    given |= {"templates": templates, "allowed_hosts": tuple(allow_host or ())}
    tree = override({key: value for key, value in given.items() if value is not None}, settings or [])
    chosen = validate(Settings, tree, "serve")
    place = listen(chosen)  # a wrong setting and a port in use are told before the model is loaded
    pipe = DallePipeline.from_pretrained(model, dtype=dtype, device=device_named(device), native=native)
    Server(create_app(chosen, pipe), chosen).run(sockets=[place])
