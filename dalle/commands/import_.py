"""`dalle import`: other people's checkpoints become model folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from dalle.commands.console import Json, RowsBar, log_to_stderr, print_folder

DTYPES = ("float32", "bfloat16", "float16")


class Kind(NamedTuple):
    """One kind of checkpoint: what it takes, and what its importer can be told."""

    files: str  # in words
    n_files: tuple[int, ...]  # how many of them, and other numbers that do too
    module: str  # in dalle.importers
    function: str
    is_pickled: bool = False  # always: nothing else is published
    may_be_pickled: bool = False  # what is more than tensors needs leave
    is_large: bool = False  # written in shards, with a choice of dtype, and facts that no tensor tells


KINDS = {
    "openai-dvae": Kind(
        "encoder.pkl and decoder.pkl", (2,), "openai_dvae", "import_openai_dvae", is_pickled=True
    ),
    "openai-clip": Kind(
        "an archive such as ViT-B-32.pt and bpe_simple_vocab_16e6.txt.gz",
        (2,),
        "openai_clip",
        "import_openai_clip",
        is_pickled=True,
    ),
    "hf-clip": Kind(
        "the folder of a transformers CLIPModel", (1,), "published_clip", "import_huggingface_clip"
    ),
    "open-clip": Kind(
        "a folder of open_clip and OpenAI's bpe_simple_vocab_16e6.txt.gz",
        (2,),
        "published_clip",
        "import_open_clip",
    ),
    "vqgan": Kind(
        "a checkpoint such as last.ckpt, and its config.yaml if there is one",
        (2, 1),
        "vqgan",
        "import_vqgan",
        may_be_pickled=True,
    ),
    "min-dalle": Kind(
        "encoder.pt decoder.pt detoker.pt vocab.json merges.txt",
        (5,),
        "min_dalle",
        "import_min_dalle",
        is_large=True,
    ),
    "dalle-mini": Kind(
        "flax_model.msgpack config.json VQGAN vocab.json merges.txt (VQGAN: its flax_model.msgpack, or detoker.pt)",
        (5,),
        "min_dalle",
        "import_dalle_mini",
        is_large=True,
    ),
    "dalle-pytorch": Kind(
        "dalle.pt and the tokenizer it was trained with",
        (2,),
        "dalle_pytorch",
        "import_dalle_pytorch",
        may_be_pickled=True,
        is_large=True,
    ),
    "ru-dalle": Kind(
        "pytorch_model.bin, its VQGAN's checkpoint and bpe.model",
        (3,),
        "ru_dalle",
        "import_ru_dalle",
        may_be_pickled=True,
        is_large=True,
    ),
    "min-dalle-e": Kind(
        "the folder that 1.3B.tar.gz unpacks to",
        (1,),
        "min_dalle_e",
        "import_min_dalle_e",
        may_be_pickled=True,
        is_large=True,
    ),
}
NOT_READ = {  # and why
    "llamagen": "its text-to-image models read features of a frozen Flan-T5-XL of 3 billion parameters, which is not"
    " part of them",
    "cogview": "its 4 billion parameters are split over Megatron's processes, with SentencePiece for Chinese alone",
}


def import_checkpoint(
    kind: Annotated[str, typer.Argument(help=f"One of {', '.join(KINDS)}.")],
    files: Annotated[
        list[Path], typer.Argument(help="What that kind takes; a wrong number of files says what.")
    ],
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    allow_pickle: Annotated[
        bool,
        typer.Option(help="Read the tensors of a pickle that holds more than tensors. Nothing in it is run."),
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}; as stored if left out.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="K=V", help="A fact that no tensor tells: n_heads=16, start_token=16383."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn other people's checkpoints into a model folder; the same command goes on where it stopped."""
    log_to_stderr(as_json)
    if kind in NOT_READ:
        raise ValueError(f"{kind} is not read: {NOT_READ[kind]}. What is: {', '.join(KINDS)}")
    if kind not in KINDS:
        raise ValueError(f"import kind {kind!r} is unknown: use {', '.join(KINDS)}")
    chosen = KINDS[kind]
    if len(files) not in chosen.n_files:
        raise ValueError(f"{kind} takes {chosen.files}; got {len(files)} files")
    if chosen.is_pickled and not allow_pickle:
        raise ValueError(
            f"{kind} files are pickles: pass --allow-pickle to read their tensors through a restricted class list "
            "(no code in them is run)"
        )
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype is {dtype}; allowed are {', '.join(DTYPES)}")
    if not chosen.is_large and (settings or dtype):
        raise ValueError(f"{kind} takes neither --set nor --dtype: its files tell all")
    given: list[Path | None] = [*files, *[None] * (chosen.n_files[0] - len(files))]
    with RowsBar("importing", as_json) as progress:
        _importer(chosen)(*given, out, **_choices(chosen, allow_pickle, dtype, settings, progress))
    print_folder(out, as_json)


def _importer(kind: Kind) -> Callable[..., None]:
    import importlib  # the importers load torch

    function: Callable[..., None] = getattr(
        importlib.import_module(f"dalle.importers.{kind.module}"), kind.function
    )
    return function


def _choices(
    kind: Kind, allow_pickle: bool, dtype: str | None, settings: list[str] | None, progress: Any
) -> dict[str, Any]:
    import torch  # a second to import

    from dalle.config import override  # pydantic takes a quarter of a second

    choices: dict[str, Any] = {}
    if kind.may_be_pickled:
        choices["allow_pickle"] = allow_pickle
    if kind.is_large:
        choices |= {
            "changes": override({}, settings or []),
            "dtype": None if dtype is None else getattr(torch, dtype),
            "progress": progress,
        }
    return choices
