"""Commands that look at pictures: rerank, classify."""

from pathlib import Path
from typing import Annotated

import typer

from dalle.commands.console import Json, RankerFolder, log_to_stderr, print_json

DEFAULT_TEMPLATES = ("a {}", "a picture of a {}", "a drawing of a {}")  # of `classify`


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
