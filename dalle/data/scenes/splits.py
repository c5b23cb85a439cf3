"""Held-out combinations of scenes, by a hash of the combination.

train       every combination of the scene is one of train
validation  5 % of the combinations; test 10 %: object x colour, object x count, thing x relation x thing,
            object x size, big thing x small thing, object x ground, word, object x two styles

The kind of a scene decides which combination is tested; all others in it are of train, so that a test of
positions is none of colours. A combination has one split in scenes of every kind, style and seed: a held-out
blue apple is neither left nor right of anything in train.
"""

import hashlib

from dalle.data.scenes.scene import Scene

VALIDATION_SHARE = 0.05
TEST_SHARE = 0.10


def split_of_combination(combination: tuple[str, ...]) -> str:
    """Return `train`, `validation` or `test`; it depends on nothing but the combination."""
    digest = hashlib.sha256("\0".join(("scene", *combination)).encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < TEST_SHARE:
        return "test"
    return "validation" if place < TEST_SHARE + VALIDATION_SHARE else "train"


def split_of(scene: Scene) -> str | None:
    """Return a scene's split; None for one that may be shown in none, as it would test two things at once."""
    primary, *others = scene.combinations()
    if any(split_of_combination(other) != "train" for other in others):
        return None
    return split_of_combination(primary)
