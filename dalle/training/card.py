"""The model card that a run writes: what the model was trained on and how; figures come from `dalle evaluate`."""

from pathlib import Path

from dalle import __version__, weights
from dalle.data.pairs import PairSet
from dalle.training.recipe import Recipe


def write_card(out: Path, recipe: Recipe, data: str, pairs: PairSet, init_from: Path | None) -> None:
    """Write OUT/README.md from the finished components, unless a person has put one there."""
    path = out / "README.md"
    if path.exists():
        return
    dvae, transformer = (weights.read_json(out / part / "config.json") for part in ("dvae", "transformer"))
    counts = ", ".join(f"{split} {count:,}" for split, count in sorted(pairs.counts.items()))
    licences = sorted({str(pair.fields["license"]) for pair in pairs if pair.fields.get("license")})
    start = f"started from the components in `{init_from.name}`" if init_from else "trained from nothing"
    lines = [
        "---",
        "library_name: dalle",
        "pipeline_tag: text-to-image",
        "---",
        f"# {out.resolve().name}",
        "",
        f"A DALL·E trained with `dalle train` {__version__}, {start}.",
        "",
        f"- Data: `{data}`, {len(pairs):,} captioned pictures ({counts}); fingerprint",
        f"  `{pairs.fingerprint}`.",
        f"- Licences of the pictures: {', '.join(licences) or 'not recorded in the data'}.",
        f"- dVAE: {dvae['image_size']} px -> {dvae['image_size'] // 8}x{dvae['image_size'] // 8} tokens of "
        f"{dvae['n_codes']} ({dvae['quantizer']}).",
        f"- Transformer: {transformer['n_layers']} layers x {transformer['n_heads'] * transformer['d_head']}, "
        f"{transformer['n_text_tokens']} text tokens.",
        *_updates(recipe, out),
        "- Figures: run `dalle evaluate MODEL DATA`.",
        "",
    ]
    weights.write_bytes(path, "\n".join(lines).encode())


def _updates(recipe: Recipe, out: Path) -> list[str]:
    """How long each stage was trained here; a component that was given has no checkpoints."""
    lines = []
    for name, training in (("dvae", recipe.dvae_training), ("transformer", recipe.transformer_training)):
        if (out / "run" / "checkpoints" / name).is_dir():
            n_pictures = training.batch_size * training.accumulation
            lines.append(f"- Stage {name}: {training.steps:,} updates of {n_pictures} pictures.")
    return lines
