"""Commands of data sets: inspect, filter, emoji, scenes."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dalle.commands.console import Device, Json, RowsBar, device_named, log_to_stderr, print_json, say
from dalle.commands.data_options import takes_data


@takes_data
def inspect(
    source: Any,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Folder, Hub id or `bundled`: how well its dVAE shows the pictures."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print counts, splits and why, picture sizes, caption lengths, problems, and whether train takes the data."""
    log_to_stderr(as_json)
    from dalle.data.inspect import inspect as look
    from dalle.dvae import DiscreteVAE
    from dalle.model_folder import model_folder
    from dalle.training.finetune import measured_psnr, own_psnr

    pairs = source.read()
    found = look(pairs, max_bad=source.max_bad)
    figures: dict[str, float | None] = {}
    if model is not None:
        base = model_folder(None if model == "bundled" else model)
        held_out = [pair for pair in pairs if pair.split not in ("train", "excluded")]
        psnr = measured_psnr(
            DiscreteVAE.from_pretrained(base / "dvae"), pairs.of_split("train").pairs, held_out
        )
        figures = {"psnr": psnr, "own_psnr": own_psnr(base)}
    if as_json:
        print_json(found.to_json() | figures)
        return
    print("\n".join(found.lines()))
    if figures:
        own = "not recorded" if figures["own_psnr"] is None else f"{figures['own_psnr']:.1f}"
        print(
            f"dVAE      PSNR of your pictures through this dVAE: {figures['psnr']:.1f} dB ({own} on its own)"
        )


@takes_data
def filter_data(
    source: Any,
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
    log_to_stderr(as_json)
    from dalle.config import override, validate
    from dalle.data.filters import FilterSettings, filter_pairs
    from dalle.data.pairs import read_pairs
    from dalle.generation.rerank import Ranker
    from dalle.model_folder import model_folder

    chosen = validate(FilterSettings, override({}, settings or []), "filter")
    compared_by = None if ranker is None else Ranker.from_pretrained(model_folder(ranker))
    if compared_by is not None:
        compared_by.clip.to(device_named(device))
    pairs = source.read(exclude=(str(out),))
    others = [read_pairs(other) for other in against or []]
    describe = None if compared_by is None else compared_by.describe
    with RowsBar("filtering", as_json) as progress:
        found = filter_pairs(pairs, out, chosen, against=others, describe=describe, progress=progress)
    if as_json:
        print_json(found.to_json())
    else:
        print("\n".join(found.lines()))


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
    log_to_stderr(as_json)
    from dalle.data.art.emoji import build_emoji_set

    summary = build_emoji_set(out, size=size, extra=tuple(add or ()), progress=None if as_json else say)
    if as_json:
        print_json(asdict(summary))
    else:
        print(out)


def scenes(
    art: Annotated[Path, typer.Argument(help="The art set that `dalle data emoji` built.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    n: Annotated[int, typer.Option("--n", help="Number of scenes, of all splits.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Seed; the same one gives the same scenes.")] = 0,
    size: Annotated[int, typer.Option(help="Picture side in pixels.")] = 128,
    letters: Annotated[int, typer.Option(help="Longest word, in letters: 2 to 6.")] = 4,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this kind: color, count, position, size, ground, word, top_bottom; repeatable."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compose scenes from the art set: colours, counts, positions, sizes, grounds, words, two styles."""
    log_to_stderr(as_json)
    from dalle.data.scenes import build_scenes
    from dalle.data.scenes.scene import named_kinds

    kinds = named_kinds(kind or ())
    progress = None if as_json else say
    report = build_scenes(
        art, out, n=n, seed=seed, size=size, max_letters=letters, kinds=kinds, progress=progress
    )
    if as_json:
        print_json(asdict(report))
    else:
        print(out)
