"""Commands that look at pictures: evaluate, rerank, classify."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dalle.commands.console import (
    Device,
    Json,
    RankerFolder,
    RowsBar,
    device_named,
    log_to_stderr,
    print_json,
)

DEFAULT_TEMPLATES = ("a {}", "a picture of a {}", "a drawing of a {}")  # of `classify`


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
    log_to_stderr(as_json)
    from dalle.data.pairs import read_pairs
    from dalle.evaluation.report import evaluate as run
    from dalle.evaluation.report import evaluate_ranker
    from dalle.generation.rerank import Ranker
    from dalle.model_folder import is_ranker, model_folder
    from dalle.pipeline import DallePipeline

    pairs = read_pairs(data)
    pairs.require_mostly_good()
    source = None if model == "bundled" else model
    folder, place = model_folder(source), device_named(device)
    chosen = tuple(part.strip() for part in splits.split(",")) if splits else None
    with RowsBar("evaluating", as_json) as progress:
        settings: dict[str, Any] = {"splits": chosen, "limit": limit, "probe": probe, "progress": progress}
        if is_ranker(folder):
            judge = Ranker.from_pretrained(folder)
            judge.clip.to(place)
            figures = evaluate_ranker(judge, pairs, out, **settings)
        else:
            pipe = DallePipeline.from_pretrained(source, device=place)
            figures = run(pipe, pairs, out, seed=seed, **settings)
    if as_json:
        print_json(figures)
    else:
        print(json.dumps(figures, indent=2))
        print(out)


def rerank(
    caption: Annotated[str, typer.Argument(help="What the pictures should show.")],
    pictures: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures of any size.")],
    ranker: RankerFolder = None,
    truncate: Annotated[bool, typer.Option(help="Cut a caption that is too long.")] = False,
    as_json: Json = False,
) -> None:
    """Order pictures by how well they fit a caption, best first, by a CLIP's cosine."""
    log_to_stderr(quiet=True)
    from dalle import images
    from dalle.generation.rerank import Ranker, best_first
    from dalle.model_folder import model_folder

    judge = Ranker.from_pretrained(model_folder(ranker))
    opened = [images.open_image(path) for path in pictures]
    scores = judge.score_images(caption, opened, truncate)
    order = best_first(scores)
    if as_json:
        rows = [{"path": str(pictures[i]), "score": scores[i], "rank": n} for n, i in enumerate(order)]
        print_json({"caption": caption, "images": rows})
        return
    for index in order:
        print(f"{scores[index]:.4f}  {pictures[index]}")


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
    log_to_stderr(quiet=True)
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
        print_json({"images": rows})
        return
    for row in rows:
        print(f"{row['path']}  {row['label']}  {row['probability']:.3f}")
