"""How often the checkers of scenes are right: on true pictures, on a dVAE's copies of them, and by chance.

    python benchmarks/scene_checkers.py SCENES [--art ART] [--model MODEL] [--limit 300]

SCENES is a folder of `dalle data scenes`. Copies are the model's dVAE's, from hard tokens. By chance: the picture is
asked for the attributes of another scene of its kind. With `--art`, 100 pairs of scenes that differ in one attribute
word are drawn from the art set, and each picture is asked for its own attribute and for the other's.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dalle import images
from dalle.data.art.packages import DEFAULT_STYLES
from dalle.data.pair import Pair
from dalle.data.pairs import read_pairs
from dalle.data.scenes.checkers import Pixels, shows
from dalle.data.scenes.drawing import draw_scene
from dalle.data.scenes.objects import find_sources, load_objects, read_art
from dalle.data.scenes.reader import WordReader
from dalle.data.scenes.scene import KINDS, Scene
from dalle.data.scenes.swaps import make_swaps
from dalle.dvae import DiscreteVAE
from dalle.evaluation.protocols import reconstruct
from dalle.model_folder import model_folder

N_SWAPS, BATCH = 100, 50


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenes", type=Path)
    parser.add_argument("--art", type=Path)
    parser.add_argument("--model", help="folder or Hub id; the bundled model without it")
    parser.add_argument("--limit", type=int, default=300, help="pictures of each row of the table")
    arguments = parser.parse_args()
    dvae = DiscreteVAE.from_pretrained(model_folder(arguments.model) / "dvae")
    reader = WordReader()

    def is_shown(picture: Pixels, scene: Scene) -> bool:
        return reader.shows(picture, scene.word) if scene.word is not None else shows(picture, scene)

    pairs = read_pairs(arguments.scenes)
    print(f"size {dvae.config.image_size} px -> {dvae.config.grid_size} x {dvae.config.grid_size} tokens")
    print("| scene | ground | pictures | true | copies | by chance |")
    print("|---|---|---|---|---|---|")
    for kind in KINDS:
        if kind == "top_bottom":
            continue
        for ground in ("white", "coloured"):
            found = [
                pair
                for pair in pairs
                if pair.fields["scene"] == kind and (pair.fields["ground"] == "white") == (ground == "white")
            ]
            if kind == "ground" and ground == "white":
                continue
            random.Random(0).shuffle(found)
            print(_row(kind, ground, found[: arguments.limit], dvae, is_shown), flush=True)
    if arguments.art is not None:
        _print_swaps(arguments.art, [Scene.from_fields(pair.fields) for pair in pairs])


def _row(
    kind: str,
    ground: str,
    pairs: Sequence[Pair],
    dvae: DiscreteVAE,
    is_shown: Callable[[Pixels, Scene], bool],
) -> str:
    scenes = [Scene.from_fields(pair.fields) for pair in pairs]
    pictures = [pair.open() for pair in pairs]
    others = random.Random(1).sample(scenes, len(scenes))
    shares = [
        np.mean([is_shown(np.asarray(p), scene) for p, scene in zip(shown, asked, strict=True)])
        for shown, asked in (
            (pictures, scenes),
            (_copies(pictures, dvae), scenes),
            (pictures, others),
        )
    ]
    figures = " | ".join(f"{100 * share:.1f} %" for share in shares)
    return f"| {kind} | {ground} | {len(pairs)} | {figures} |"


def _copies(pictures: Sequence[Image.Image], dvae: DiscreteVAE) -> list[Image.Image]:
    copies = []
    for start in range(0, len(pictures), BATCH):
        cropped = [images.center_crop(p, dvae.config.image_size) for p in pictures[start : start + BATCH]]
        copies += images.to_images(reconstruct(dvae, images.to_tensor(cropped))[1])
    return copies


def _print_swaps(art: Path, scenes: Sequence[Scene]) -> None:
    styles = frozenset(style.name for style in DEFAULT_STYLES)
    sources = {(s.object, s.style): s for s in find_sources(art, read_art(art), load_objects(), styles)}
    swaps = make_swaps(scenes, N_SWAPS, seed=0)
    own = other = 0
    for swap in swaps:
        for here, there in ((swap.before, swap.after), (swap.after, swap.before)):
            picture = np.asarray(draw_scene(here, sources, {}, 128))
            own += shows(picture, here)
            other += shows(picture, there)
    print(
        f"{len(swaps)} pairs, true pictures: own attribute seen in {own / 2 / len(swaps):.1%}, "
        f"the other's in {other / 2 / len(swaps):.1%}; for example"
    )
    for swap in swaps[:: len(swaps) // 5]:
        print(f"  {swap.captions[0]} -> {swap.captions[1]}")


if __name__ == "__main__":
    main()
