"""The model card that a run writes: what the model was trained on and how, and what it owes to the one it came from."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from dalle import __version__, files
from dalle.training.run import Run

INHERITED = ("license", "license_name", "license_link", "language", "tags")  # of the base's metadata
OWED = re.compile(
    r"licen[cs]|attribution|credit|copyright|citation", re.IGNORECASE
)  # headings of sections kept
NOTICES = ("LICENSE*", "LICENCE*", "NOTICE*")


def write_card(run: Run, command: str = "train", results: Sequence[str] = ()) -> None:
    """Write OUT/README.md from the finished components, unless a person has put one there.

    Of a base model it inherits licence and attributions, and the files that hold them. `results` are lines of Markdown:
    sheets and figures.
    """
    path, out = run.out / "README.md", run.out
    if path.exists():
        return
    dvae, transformer = (files.read_json(out / part / "config.json") for part in ("dvae", "transformer"))
    counts = ", ".join(f"{split} {count:,}" for split, count in sorted(run.pairs.counts.items()))
    licences = sorted({str(pair.fields["license"]) for pair in run.pairs if pair.fields.get("license")})
    start = f"started from `{run.base}`" if run.base else "trained from nothing"
    lines = [
        "---",
        str(ModelCardData(**_metadata(run))),
        "---",
        f"# {out.resolve().name}",
        "",
        f"A DALL·E trained with `dalle {command}` {__version__}, {start}.",
        "",
        "```python",
        "from dalle import DallePipeline",
        "",
        f'pipe = DallePipeline.from_pretrained("{out.resolve().name}")  # this folder, or its id on the Hub',
        f'pipe({_quoted(run.held_out[0].captions[0])}).images[0].save("drawn.png")',
        "```",
        "",
        *results,
        "## How it was trained",
        "",
        f"- Data: {run.data_name}, {len(run.pairs):,} captioned pictures ({counts}); fingerprint",
        f"  `{run.pairs.fingerprint}`.",
        f"- Licences of the pictures: {', '.join(licences) or 'not recorded in the data'}.",
        f"- dVAE: {dvae['image_size']} px -> {transformer['grid_size']}x{transformer['grid_size']} tokens of "
        f"{dvae['n_codes']} ({dvae.get('quantizer', 'likeliest code')}){_drawn(dvae)}.",
        *_features(run),
        f"- Transformer: {transformer['n_layers']} layers x {transformer['n_heads'] * transformer['d_head']}, "
        f"{transformer['n_text_tokens']} text tokens.",
        *_updates(run),
        *([] if results else ["- Figures: run `dalle evaluate MODEL DATA`."]),
        "",
        *_owed(run),
    ]
    files.write_bytes(path, "\n".join(lines).encode())
    _copy_notices(run)


def _drawn(dvae: dict[str, Any]) -> str:
    return f", drawn at {dvae['output_size']} px" if "output_size" in dvae else ""


def _features(run: Run) -> list[str]:
    """Whose features a loss looked at, of the stages that were trained here."""
    recipe, out = run.recipe, run.out
    weights_of = {"dvae": recipe.dvae_training, "decoder": recipe.decoder_training}
    stages = [
        name
        for name, training in weights_of.items()
        if training is not None and training.feature_weight and (out / "run" / "checkpoints" / name).is_dir()
    ]
    if not stages:
        return []
    return [f"- The loss of {' and '.join(stages)} compares features of EfficientNet-Lite0 (Apache-2.0) too."]


def _quoted(caption: str) -> str:
    """A caption as a Python literal on one line, in double quotes where it can be."""
    return f'"{caption}"' if caption.isprintable() and not {'"', "\\"} & set(caption) else repr(caption)


def _updates(run: Run) -> list[str]:
    """How long each stage was trained here; a component that was given has no checkpoints."""
    lines = []
    for name, training in run.recipe.trainings.items():
        if (run.folder / "checkpoints" / name).is_dir():
            n_pictures = training.batch_size * training.accumulation
            at_most = "at most " if training.patience else ""
            lines.append(f"- Stage {name}: {at_most}{training.steps:,} updates of {n_pictures} pictures.")
    return lines


def _metadata(run: Run) -> dict[str, Any]:
    """What stands above a card for the Hub."""
    base = _base_card(run)
    inherited: dict[str, Any] = base.data.to_dict() if base is not None else {}  # type: ignore[no-untyped-call]
    return {
        "library_name": "dalle",
        "pipeline_tag": "text-to-image",
        **({"base_model": run.base, "base_model_relation": "finetune"} if run.base else {}),
        **{name: inherited[name] for name in INHERITED if inherited.get(name)},
    }


def _base_card(run: Run) -> ModelCard | None:
    """The card of the model that was given, if it has one that can be read."""
    path = run.init_from / "README.md" if run.init_from else None
    if path is None or not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return ModelCard(text, ignore_metadata_errors=True)
    except Exception:  # of the YAML parser, or metadata that are no mapping
        return ModelCard(re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL))


def _owed(run: Run) -> list[str]:
    """The sections of the base's card that say whose work it is, and under which licence."""
    if run.base is None:
        return []
    card = _base_card(run)
    parts = re.split(r"^## +(.*)$", card.text, flags=re.MULTILINE)[1:] if card is not None else []
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    owed = {heading: text.strip() for heading, text in sections.items() if OWED.search(heading)}
    lines = [f"## Licences and attributions of the base model, `{run.base}`", ""]
    if not owed:
        licence = _metadata(run).get("license")
        said = f"licence {licence}" if licence else "no licence"
        return [*lines, f"Its card names {said}, and nobody else's work.", ""]
    for heading, text in owed.items():
        lines += [f"### {heading}", "", re.sub(r"^(#+) ", r"#\1 ", text, flags=re.MULTILINE), ""]
    return lines


def _copy_notices(run: Run) -> None:
    """Keep the licence files of the base model, which its card may point to."""
    for pattern in NOTICES if run.init_from else ():
        for path in sorted(Path(run.init_from or "").glob(pattern)):
            if path.is_file() and not (run.out / path.name).exists():
                files.write_bytes(run.out / path.name, path.read_bytes())
