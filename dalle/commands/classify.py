"""`dalle classify`: say which label fits each picture best."""

from pathlib import Path
from typing import Annotated

import typer

from dalle.commands.console import Json, RankerFolder, log_to_stderr, print_json

DEFAULT_TEMPLATES = ("a {}", "a picture of a {}", "a drawing of a {}")


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
