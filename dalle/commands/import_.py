"""`dalle import`: turn other people's checkpoints into a model folder."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dalle.commands.console import Json, log_to_stderr, print_folder


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
