"""The model card that a run writes: what the model was trained on and how; figures come from `dalle evaluate`."""

from pathlib import Path
from typing import Any

from dalle import __version__, files
from dalle.data.pairs import PairSet
from dalle.training.recipe import Recipe


def write_card(out: Path, recipe: Recipe, data: str, pairs: PairSet, init_from: Path | None) -> None:
    """Write OUT/README.md from the finished components, unless a person has put one there."""
    path = out / "README.md"
    if path.exists():
        return
    dvae, transformer = (files.read_json(out / part / "config.json") for part in ("dvae", "transformer"))
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
        f"{dvae['n_codes']} ({dvae['quantizer']}){_drawn(dvae)}.",
        *_features(recipe, out),
        f"- Transformer: {transformer['n_layers']} layers x {transformer['n_heads'] * transformer['d_head']}, "
        f"{transformer['n_text_tokens']} text tokens.",
        *_updates(recipe, out),
        "- Figures: run `dalle evaluate MODEL DATA`.",
        "",
    ]
    files.write_bytes(path, "\n".join(lines).encode())


def _drawn(dvae: dict[str, Any]) -> str:
    return f", drawn at {dvae['output_size']} px" if "output_size" in dvae else ""


def _features(recipe: Recipe, out: Path) -> list[str]:
    """Whose features a loss looked at, of the stages that were trained here."""
    weights_of = {"dvae": recipe.dvae_training, "decoder": recipe.decoder_training}
    stages = [
        name
        for name, training in weights_of.items()
        if training is not None and training.feature_weight and (out / "run" / "checkpoints" / name).is_dir()
    ]
    if not stages:
        return []
    return [f"- The loss of {' and '.join(stages)} compares features of EfficientNet-Lite0 (Apache-2.0) too."]


def _updates(recipe: Recipe, out: Path) -> list[str]:
    """How long each stage was trained here; a component that was given has no checkpoints."""
    lines = []
    for name, training in recipe.trainings.items():
        if (out / "run" / "checkpoints" / name).is_dir():
            n_pictures = training.batch_size * training.accumulation
            lines.append(f"- Stage {name}: {training.steps:,} updates of {n_pictures} pictures.")
    return lines
