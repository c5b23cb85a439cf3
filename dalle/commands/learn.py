"""Commands of training: plan, encode, train, and import of what others trained."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dalle.commands.console import (
    Device,
    Dtype,
    Json,
    Model,
    RowsBar,
    dtype_named,
    launched,
    log_to_stderr,
    print_folder,
    print_json,
)
from dalle.commands.data_options import takes_data


@takes_data
def train(
    source: Any,
    out: Annotated[Path, typer.Option(help="Model folder; the same command resumes.")],
    preset: Annotated[str, typer.Option(help="tiny, laptop, gpu, paper, or a .toml file.")] = "laptop",
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
    from dalle.training.loop import Stopped
    from dalle.training.memory import keep_freed_memory
    from dalle.training.processes import joined
    from dalle.training.recipe import load_recipe
    from dalle.training.train import STAGES
    from dalle.training.train import train as run

    world, place = launched(device)
    if place.type == "cpu":
        keep_freed_memory()
    try:
        with joined(world, place):
            recipe = load_recipe(preset, settings or [])
            folder = run(
                source,
                out,
                recipe,
                init_from=bundled_folder()
                if init_from == "bundled"
                else Path(init_from)
                if init_from
                else None,
                stages=STAGES if stages == "all" else tuple(part.strip() for part in stages.split(",")),
                device=place,
                dtype=dtype_named(dtype, place),
                quiet=quiet,
                world=world,
            )
    except Stopped as stop:
        if world.is_main:
            print(f"dalle: {stop}", file=sys.stderr)
        raise typer.Exit(128 + stop.signal_number) from None
    if world.is_main:
        print_folder(folder, as_json)


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


def plan(
    preset: Annotated[str, typer.Option(help="tiny, laptop, gpu, paper, or a .toml file.")],
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


def import_checkpoint(
    kind: Annotated[str, typer.Argument(help="openai-dvae, openai-clip, hf-clip or open-clip.")],
    files: Annotated[
        list[Path],
        typer.Argument(help="encoder.pkl decoder.pkl; FILE.pt VOCAB.txt.gz; FOLDER; or FOLDER VOCAB.txt.gz."),
    ],
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    allow_pickle: Annotated[
        bool, typer.Option(help="Read a pickle, through a restricted class list.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn other people's checkpoints into a model folder."""
    log_to_stderr(as_json)
    from dalle.importers.openai_clip import import_openai_clip
    from dalle.importers.openai_dvae import import_openai_dvae
    from dalle.importers.published_clip import import_huggingface_clip, import_open_clip

    kinds: dict[str, tuple[Any, str, int, bool]] = {  # its importer, what it takes, how many, and if pickled
        "openai-dvae": (import_openai_dvae, "encoder.pkl and decoder.pkl", 2, True),
        "openai-clip": (
            import_openai_clip,
            "an archive such as ViT-B-32.pt and bpe_simple_vocab_16e6.txt.gz",
            2,
            True,
        ),
        "hf-clip": (import_huggingface_clip, "the folder of a transformers CLIPModel", 1, False),
        "open-clip": (
            import_open_clip,
            "a folder of open_clip and OpenAI's bpe_simple_vocab_16e6.txt.gz",
            2,
            False,
        ),
    }
    if kind not in kinds:
        raise ValueError(f"import kind {kind!r} is unknown: use {', '.join(kinds)}")
    run, wanted, n_files, is_pickled = kinds[kind]
    if len(files) != n_files:
        raise ValueError(f"{kind} takes {wanted}; got {len(files)} files")
    if is_pickled and not allow_pickle:
        raise ValueError(
            f"{kind} files are pickles: pass --allow-pickle to read their tensors through a restricted class list "
            "(no code in them is run)"
        )
    run(*files, out)
    print_folder(out, as_json)
