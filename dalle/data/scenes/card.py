"""The README of a folder of scenes: counts, splits, licences and attributions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dalle.data.art.packages import STYLES
from dalle.data.scenes.lettering import FONTS
from dalle.data.scenes.objects import Source

_SPLITS = ("train", "validation", "test")


def write_card(
    folder: Path,
    kinds: Mapping[str, Mapping[str, int]],
    n_too_near: int,
    seed: int,
    size: int,
    sources: Sequence[Source],
) -> None:
    """Write README.md; kinds: pictures by kind and split."""
    table = [
        f"| {kind} | {' | '.join(str(counts.get(split, 0)) for split in _SPLITS)} |"
        for kind, counts in kinds.items()
    ]
    used = {source.style for source in sources}
    credits = [f"- {style.name}: {style.credit} ({style.licence})" for style in STYLES if style.name in used]
    if "word" in kinds:
        credits += [f"- letters: {font.credit} ({font.licence})" for font in FONTS]
    total = sum(sum(counts.values()) for counts in kinds.values())
    lines = [
        "# Composed scenes",
        "",
        f"{total} pictures of {size} x {size} pixels, composed by `dalle data scenes` with seed {seed} from the "
        "train drawings of the open emoji art set, plain shapes and lettering. Captions and fields are exact: "
        "they say what was composed. `metadata.jsonl` holds one row a picture.",
        "",
        "| scene | train | validation | test |",
        "|---|---|---|---|",
        *table,
        "",
        "Held out are combinations, by a hash: object x colour, object x count, thing x relation x thing, "
        "object x size, big x small thing, object x ground, word, object x two styles. No other held-out "
        "combination is in a scene of any split.",
        "",
        f"{n_too_near} train scenes were dropped because they are nearly a held-out picture of the art set.",
        "",
        "## Attributions",
        "",
        "Drawings were cut out, scaled, placed together and in part given another colour. `license` names the "
        "licences of everything that a picture shows, `sources` where it is from.",
        "",
        *credits,
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
