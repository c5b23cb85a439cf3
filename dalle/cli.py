"""The `dalle` command: parse, call, print. What a command does lives in the package; see `dalle COMMAND --help`."""

import io
import json
import logging
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="dalle",
    help="Train, draw with and look into a text-to-image model of your own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look over and build data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Model = Annotated[
    str | None, typer.Option("--model", help="Model folder or Hub id; the bundled model if left out.")
]
RankerFolder = Annotated[
    str | None,
    typer.Option("--ranker", help="Model folder or Hub id with a CLIP; the model's own if left out."),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16; to draw, int8 too.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or cuda:N; the first GPU if there is one.")
]


def main() -> None:
    """Run the command line: a user's mistake is one line on stderr and exit code 2, a full disk or the like 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a caption or path may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)  # typer returns the code of an Exit in this mode
    except (typer.Exit, typer.Abort) as stop:
        sys.exit(getattr(stop, "exit_code", 130))
    except KeyboardInterrupt:
        print("dalle: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, FloatingPointError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        # typer's own usage errors (unknown option, missing argument) know how to show themselves
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(error.exit_code)
        raise


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _log_to_stderr(quiet: bool = False) -> None:
    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO, format="%(message)s", stream=sys.stderr
    )
    for noisy in ("httpx", "httpx2", "httpcore", "huggingface_hub", "filelock", "PIL", "fontTools"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise ValueError(f"device {name!r} is unknown: use cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {name!r}: this machine has no CUDA GPU that torch can use: pass --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r}: this machine has {torch.cuda.device_count()} GPUs, from cuda:0")
    return device


def _launched(device: str | None) -> tuple[Any, Any]:
    """This process's place among those of a launcher such as torchrun, and its device; only the main one speaks."""
    from dalle.training.processes import ALONE, device_of, world_of_launcher

    world = world_of_launcher() or ALONE
    if not world.is_main:
        logging.disable(logging.WARNING)
    return world, device_of(world, _device(device))


def _dtype(name: str, device: Any) -> Any:
    import torch

    from dalle.generation.precision import default_dtype

    dtypes = {"auto": default_dtype(device), "float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        raise ValueError(f"dtype {name!r} is unknown: use {', '.join(dtypes)}")
    return dtypes[name]


def _print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=True))


def _print_folder(folder: Path, as_json: bool) -> None:
    if as_json:
        _print_json({"folder": str(folder)})
    else:
        print(folder)


@app.command()
def generate(
    captions: Annotated[list[str], typer.Argument(metavar="CAPTION...", help="What to draw.")],
    model: Model = None,
    n: Annotated[int, typer.Option("-n", help="Pictures a caption.")] = 4,
    candidates: Annotated[
        int | None, typer.Option(help="Drawn a caption, of which a CLIP keeps the best.")
    ] = None,
    ranker: RankerFolder = None,
    seed: Annotated[int, typer.Option(help="Picture i uses seed + i; -1 takes a random one.")] = 0,
    temperature: Annotated[float | None, typer.Option(help="0 draws the likeliest token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens; 0: all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the likeliest tokens that make up p.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="1: none; larger follows the caption more closely.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Complete this picture; with --keep-rows or --mask.")
    ] = None,
    keep_rows: Annotated[int | None, typer.Option(help="Token rows kept from the top of --image.")] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            help="Picture whose transparent (or, without transparency, white) parts are drawn anew."
        ),
    ] = None,
    truncate: Annotated[bool, typer.Option(help="Cut captions that are too long, and say so.")] = False,
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
    _log_to_stderr(quiet=True)
    from dalle import images
    from dalle.generation.rerank import Ranker
    from dalle.model_folder import model_folder
    from dalle.pipeline import DallePipeline

    place = _device(device)
    pipe = DallePipeline.from_pretrained(model, dtype=dtype, device=place, native=native)
    chosen = None if ranker is None else Ranker.from_pretrained(model_folder(ranker))
    if chosen is not None:
        chosen.name = str(ranker)
        chosen.clip.to(place)
    picture = images.open_image(image) if image is not None else None
    drawn_anew = images.open_mask(mask) if mask is not None else None
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; give a folder")
    with _rows_bar("drawing", as_json) as progress:
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
        _print_json({"images": rows, "grid": None if grid_path is None else str(grid_path)})
        return
    for row in rows:
        print(f"{row['path']}  {row['caption']}")
    if grid_path:
        print(grid_path)


class _rows_bar:
    """A progress bar on stderr for `progress(done, total)` callbacks; silent with --json."""

    def __init__(self, name: str, silent: bool) -> None:
        self.name, self.silent = name, silent

    def __enter__(self) -> Any:
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), disable=self.silent or not sys.stderr.isatty())
        self._bar.start()
        task = self._bar.add_task(self.name, total=None)
        return lambda done, total: self._bar.update(task, completed=done, total=total)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


@app.command()
def train(
    data: Annotated[str, typer.Argument(help="Folder, table, tar shards, COCO captions or Hub data set id.")],
    out: Annotated[Path, typer.Option(help="Model folder; the same command resumes.")],
    preset: Annotated[str, typer.Option(help="tiny, laptop, gpu, paper, or a .toml file.")] = "laptop",
    stages: Annotated[
        str, typer.Option(help="all, or a comma list of tokenizer, dvae, transformer, clip.")
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
    _log_to_stderr(quiet)
    from dalle.config import load_preset, override, validate
    from dalle.model_folder import bundled_folder
    from dalle.training.loop import Stopped
    from dalle.training.memory import keep_freed_memory
    from dalle.training.processes import joined
    from dalle.training.recipe import Recipe
    from dalle.training.train import STAGES
    from dalle.training.train import train as run

    world, place = _launched(device)
    if place.type == "cpu":
        keep_freed_memory()
    try:
        with joined(world, place):
            recipe = validate(Recipe, override(load_preset(preset), settings or []), preset)
            folder = run(
                data,
                out,
                recipe,
                init_from=bundled_folder()
                if init_from == "bundled"
                else Path(init_from)
                if init_from
                else None,
                stages=STAGES if stages == "all" else tuple(part.strip() for part in stages.split(",")),
                device=place,
                dtype=_dtype(dtype, place),
                quiet=quiet,
                world=world,
            )
    except Stopped as stop:
        if world.is_main:
            print(f"dalle: {stop}", file=sys.stderr)
        raise typer.Exit(128 + stop.signal_number) from None
    if world.is_main:
        _print_folder(folder, as_json)


@app.command()
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
    _log_to_stderr(as_json)
    from dalle.data.pairs import read_pairs
    from dalle.data.tokens import TokenStore, encode_part
    from dalle.pipeline import DallePipeline
    from dalle.training.processes import joined

    world, place = _launched(device)
    with joined(world, place), _rows_bar("encoding", as_json or not world.is_main) as progress:
        if crop not in ("center", "paper"):
            raise ValueError(f"--crop {crop!r} is unknown: use center or paper")
        pairs = read_pairs(data)
        pairs.require_mostly_good()
        dvae = DallePipeline.from_pretrained(model).dvae.to(place)
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
        _print_json(summary)
    else:
        print(f"{summary['folder']}: {summary['pictures']} pictures, {summary['bad']} bad")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder, Hub id, or `bundled`.")],
    data: Annotated[str, typer.Argument(help="Any data set that `dalle train` reads.")],
    out: Annotated[Path, typer.Option(help="Folder for evaluation.json and the sheets.")] = Path(
        "evaluation"
    ),
    splits: Annotated[
        str | None, typer.Option(help="Comma list; all that are not train if left out.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="At most this many pictures a split, spread evenly.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    probe: Annotated[
        str, typer.Option(help="Field of the data that a linear probe on CLIP's vectors tells pictures by.")
    ] = "group",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure a model, or a CLIP alone, on held-out pictures: figures to evaluation.json, sheets to PNG."""
    _log_to_stderr(as_json)
    from dalle.data.pairs import read_pairs
    from dalle.evaluation.report import evaluate as run
    from dalle.evaluation.report import evaluate_ranker
    from dalle.generation.rerank import Ranker
    from dalle.model_folder import is_ranker, model_folder
    from dalle.pipeline import DallePipeline

    pairs = read_pairs(data)
    pairs.require_mostly_good()
    source = None if model == "bundled" else model
    folder, place = model_folder(source), _device(device)
    chosen = tuple(part.strip() for part in splits.split(",")) if splits else None
    with _rows_bar("evaluating", as_json) as progress:
        settings: dict[str, Any] = {"splits": chosen, "limit": limit, "probe": probe, "progress": progress}
        if is_ranker(folder):
            judge = Ranker.from_pretrained(folder)
            judge.clip.to(place)
            figures = evaluate_ranker(judge, pairs, out, **settings)
        else:
            pipe = DallePipeline.from_pretrained(source, device=place)
            figures = run(pipe, pairs, out, seed=seed, **settings)
    if as_json:
        _print_json(figures)
    else:
        print(json.dumps(figures, indent=2))
        print(out)


@app.command()
def rerun(
    image: Annotated[Path, typer.Argument(help="A PNG that `dalle generate` wrote.")],
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the new picture.")] = None,
    as_json: Json = False,
) -> None:
    """Draw a picture again from the recipe inside it, and say whether every token came out the same."""
    _log_to_stderr(quiet=True)
    from dalle import images
    from dalle.pipeline import DallePipeline

    recipe = images.read_recipe(image)
    # Where it was drawn, if this machine has that: another device rounds otherwise.
    pipe = DallePipeline.from_pretrained(
        model, device=_device("cpu" if recipe.get("device") == "cpu" else None)
    )
    with _rows_bar("drawing", as_json) as progress:
        drawn, agrees = pipe.rerun(recipe, progress=progress)
    path = out or image.with_name(f"{image.stem}_rerun.png")
    images.save_png(drawn, path, recipe if agrees else None)  # of other tokens it would not be the recipe
    if as_json:
        _print_json({"path": str(path), "agrees": agrees})
    else:
        print(f"{path}: {'the same tokens' if agrees else 'other tokens than the recipe records'}")
    if not agrees:
        raise typer.Exit(3)


@app.command()
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
    _log_to_stderr()
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
    pipe = DallePipeline.from_pretrained(model, dtype=dtype, device=_device(device), native=native)
    Server(create_app(chosen, pipe), chosen).run(sockets=[place])


DEFAULT_TEMPLATES = ("a {}", "a picture of a {}", "a drawing of a {}")  # of `classify`


@app.command()
def rerank(
    caption: Annotated[str, typer.Argument(help="What the pictures should show.")],
    pictures: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures of any size.")],
    ranker: RankerFolder = None,
    truncate: Annotated[bool, typer.Option(help="Cut a caption that is too long.")] = False,
    as_json: Json = False,
) -> None:
    """Order pictures by how well they fit a caption, best first, by a CLIP's cosine."""
    _log_to_stderr(quiet=True)
    from dalle import images
    from dalle.generation.rerank import Ranker, best_first
    from dalle.model_folder import model_folder

    judge = Ranker.from_pretrained(model_folder(ranker))
    opened = [images.open_image(path) for path in pictures]
    scores = judge.score_images(caption, opened, truncate)
    order = best_first(scores)
    if as_json:
        rows = [{"path": str(pictures[i]), "score": scores[i], "rank": n} for n, i in enumerate(order)]
        _print_json({"caption": caption, "images": rows})
        return
    for index in order:
        print(f"{scores[index]:.4f}  {pictures[index]}")


@app.command()
def classify(
    pictures: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures of any size.")],
    labels: Annotated[Path, typer.Option(help="A text file with one label a line.")],
    template: Annotated[
        list[str] | None, typer.Option(help="A caption with {} for the label; several make an ensemble.")
    ] = None,
    ranker: RankerFolder = None,
    as_json: Json = False,
) -> None:
    """Say which label fits each picture best, by a CLIP that was never trained on these labels."""
    _log_to_stderr(quiet=True)
    from dalle.evaluation.zero_shot import class_vectors, read_labels
    from dalle.evaluation.zero_shot import classify as probabilities_of
    from dalle.generation.rerank import Ranker
    from dalle.model_folder import model_folder

    names = read_labels(labels)
    judge = Ranker.from_pretrained(model_folder(ranker))
    classes = class_vectors(names, template or DEFAULT_TEMPLATES, judge.encode_captions)
    vectors = judge.encode_files(pictures)
    rows = []
    for path, chances in zip(pictures, probabilities_of(vectors, classes), strict=True):
        best = int(chances.argmax())
        rows.append({"path": str(path), "label": names[best], "probability": float(chances[best])})
    if as_json:
        _print_json({"images": rows})
        return
    for row in rows:
        print(f"{row['path']}  {row['label']}  {row['probability']:.3f}")


@app.command()
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
    _log_to_stderr(as_json)
    from dalle.config import load_preset, override, validate
    from dalle.training.plan import make_plan
    from dalle.training.plan_table import lines
    from dalle.training.recipe import Recipe

    recipe = validate(Recipe, override(load_preset(preset), settings or []), preset)
    made = make_plan(recipe, gpus, gpu, mfu)
    if as_json:
        _print_json(made.to_json())
    else:
        print("\n".join(lines(made)))


@app.command(name="import")
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
    _log_to_stderr(as_json)
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
    _print_folder(out, as_json)


@data_app.command()
def inspect(
    data: Annotated[str, typer.Argument(help="Any data set that `dalle train` reads.")],
    as_json: Json = False,
) -> None:
    """Print counts, picture sizes, caption lengths and problems."""
    _log_to_stderr(as_json)
    from dalle.data.inspect import inspect as look
    from dalle.data.pairs import read_pairs

    found = look(read_pairs(data))
    if as_json:
        _print_json(found.to_json())
    else:
        print("\n".join(found.lines()))


@data_app.command(name="filter")
def filter_data(
    data: Annotated[str, typer.Argument(help="Any data set that `dalle train` reads.")],
    out: Annotated[Path, typer.Option(help="New folder; it names the pairs, and copies no picture.")],
    against: Annotated[
        list[str] | None, typer.Option(help="A further evaluation set, whose pictures train must not hold.")
    ] = None,
    ranker: Annotated[
        str | None, typer.Option("--ranker", help="Compare by this CLIP, not by perceptual hashes.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="K=V",
            help="min_words, languages, drop_boilerplate, max_aspect_ratio, drop_duplicates, similarity.",
        ),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """The paper's filters, and no training picture that an evaluation set holds: a data set that train reads."""
    _log_to_stderr(as_json)
    from dalle.config import override, validate
    from dalle.data.filters import FilterSettings, filter_pairs
    from dalle.data.pairs import read_pairs
    from dalle.generation.rerank import Ranker
    from dalle.model_folder import model_folder

    chosen = validate(FilterSettings, override({}, settings or []), "filter")
    judge = None if ranker is None else Ranker.from_pretrained(model_folder(ranker))
    if judge is not None:
        judge.clip.to(_device(device))
    pairs = read_pairs(data)
    others = [read_pairs(other) for other in against or []]
    describe = None if judge is None else judge.describe
    with _rows_bar("filtering", as_json) as progress:
        found = filter_pairs(pairs, out, chosen, against=others, describe=describe, progress=progress)
    if as_json:
        _print_json(found.to_json())
    else:
        print("\n".join(found.lines()))


@data_app.command()
def emoji(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    size: Annotated[int, typer.Option(help="Picture side in pixels.")] = 128,
    add: Annotated[
        list[str] | None,
        typer.Option(help="Further sets: openmoji, openmoji-black, emojione-v1 (share-alike), symbola."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Build the open art set from npm packages: emoji in 12 styles with captions, splits and licences."""
    _log_to_stderr(as_json)
    from dalle.data.art.emoji import build_emoji_set

    summary = build_emoji_set(out, size=size, extra=tuple(add or ()), progress=None if as_json else _say)
    if as_json:
        _print_json(asdict(summary))
    else:
        print(out)


def _say(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    main()
