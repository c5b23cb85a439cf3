"""The model card that a run writes: what the model was trained on and how; figures come from `dalle evaluate`."""

from pathlib import Path

from dalle import __version__, weights
from dalle.data.pairs import PairSet
from dalle.training.recipe import Recipe


def write_card(out: Path, recipe: Recipe, data: str, pairs: PairSet) -> None:
    """Write OUT/README.md, unless a person has put one there."""
    path = out / "README.md"
    if path.exists():
        return
    counts = ", ".join(f"{split} {count:,}" for split, count in sorted(pairs.counts.items()))
    licences = sorted({str(pair.fields["license"]) for pair in pairs if pair.fields.get("license")})
    dvae, shape = recipe.dvae, recipe.transformer
    lines = [
        "---",
        "library_name: dalle",
        "pipeline_tag: text-to-image",
        "---",
        f"# {out.resolve().name}",
        "",
        f"A DALL·E trained with `dalle train` {__version__}.",
        "",
        f"- Data: `{Path(data).name}`, {len(pairs):,} captioned pictures ({counts}); fingerprint `{pairs.fingerprint[:16]}`.",
        f"- Licences of the pictures: {', '.join(licences) or 'not recorded in the data'}.",
        f"- dVAE: {dvae.image_size} px -> {dvae.grid_size}x{dvae.grid_size} tokens of {dvae.n_codes} ({dvae.quantizer}); "
        f"{recipe.dvae_training.steps:,} updates of {recipe.dvae_training.batch_size} pictures.",
        f"- Transformer: {shape.n_layers} layers x {shape.n_heads * shape.d_head}, {recipe.tokenizer.max_tokens} text tokens; "
        f"{recipe.transformer_training.steps:,} updates of "
        f"{recipe.transformer_training.batch_size * recipe.transformer_training.accumulation} pictures.",
        "- Figures: run `dalle evaluate MODEL DATA`.",
        "",
    ]
    weights.write_bytes(path, "\n".join(lines).encode())
