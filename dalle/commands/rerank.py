"""`dalle rerank`: order any pictures by how well they fit a caption."""

from pathlib import Path
from typing import Annotated

import typer

from dalle.commands.console import Json, RankerFolder, log_to_stderr, print_json


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
