"""Makes `dalle/bundled/` out of a trained model and the art set: the model, its figures, and the card that states them.

    python benchmarks/bundle.py MODEL ART --hours "dVAE 0.5 h, transformer 0.7 h on two CPU cores"
    python benchmarks/bundle.py dalle/bundled ART --clip RANKER --judge OTHER --hours "clip/ 0.3 h, judge/ 0.2 h"

The second form adds the CLIPs of two ranker folders to the model that is there, whose other files stay as they are.
Every figure of the card is read from the evaluation.json that this run writes beside it; recipe.json says how each part
was trained.
"""

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from PIL.Image import Image, Resampling

from dalle import files, images
from dalle.data.pairs import read_pairs
from dalle.evaluation.report import evaluate
from dalle.model_folder import write_index
from dalle.pipeline import DallePipeline

BUNDLED = Path(__file__).parent.parent / "dalle" / "bundled"
MAX_BYTES = 40_000_000
COMPONENTS = ("tokenizer", "dvae", "transformer")
RANKERS = ("clip", "judge")


def main() -> None:
    """Copy the components, evaluate the copy, write the card, and check the size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("art", type=Path)
    parser.add_argument("--hours", required=True, help="what this was trained on and for how long")
    parser.add_argument(
        "--temperature", type=float, help="of the model's draws, from benchmarks/sampling_sweep.py"
    )
    parser.add_argument("--guidance", type=float, help="likewise")
    parser.add_argument("--clip", type=Path, help="a ranker folder, whose clip/ will choose")
    parser.add_argument("--judge", type=Path, help="another, whose clip/ will judge")
    arguments = parser.parse_args()
    chosen = {"temperature": arguments.temperature, "guidance": arguments.guidance}
    defaults = DallePipeline.from_pretrained(arguments.model).defaults.model_copy(
        update={name: value for name, value in chosen.items() if value is not None}
    )
    art_card, pairs = (arguments.art / "README.md").read_text(encoding="utf-8"), read_pairs(arguments.art)
    with tempfile.TemporaryDirectory() as temporary:  # the old model stays until the new one is whole
        folder = Path(temporary) / "bundled"
        for component in COMPONENTS:
            shutil.copytree(arguments.model / component, folder / component)
        parts = recipes(arguments.model, "model", arguments.hours)
        for name in RANKERS:
            source = getattr(arguments, name)
            if source is not None:
                shutil.copytree(source / "clip", folder / name)
                parts |= recipes(source, name, arguments.hours)
            elif (arguments.model / name).is_dir():
                shutil.copytree(arguments.model / name, folder / name)
        files.write_json(folder / "recipe.json", parts)
        write_index(folder, defaults)
        pipe = DallePipeline.from_pretrained(folder)
        pipe.name = "bundled"
        report = evaluate(pipe, pairs, folder)
        files.write_bytes(folder / "README.md", write_card(report, parts, art_card).encode())
        for name in report["sheets"]:
            enlarge(folder / name, 2)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if size > MAX_BYTES:
            raise SystemExit(f"the model takes {size / 1e6:.1f} MB; {MAX_BYTES / 1e6:.0f} MB are allowed")
        shutil.rmtree(BUNDLED, ignore_errors=True)
        shutil.copytree(folder, BUNDLED)
    print(json.dumps({"bundled": str(BUNDLED), "megabytes": round(size / 1e6, 1)}))


def recipes(model: Path, part: str, hours: str) -> dict[str, Any]:
    """How a part of the model was trained: of a run from its settings, of a bundled model what it says itself."""
    told = model / "recipe.json"
    if told.is_file():
        found: dict[str, Any] = files.read_json(told)
        return found
    return {part: {"recipe": files.read_json(model / "run" / "config.json")["recipe"], "hours": hours}}


def write_card(report: dict[str, Any], parts: dict[str, Any], art_card: str) -> str:
    """The model card in Markdown."""
    recipe, hours = parts["model"]["recipe"], parts["model"]["hours"]
    dvae, codes = report["dvae"], report["dvae"]["n_codes"]
    nearest = report["nearest_of_100"]
    draws, ceiling = nearest["draws"], nearest["reconstructions"]
    training_ids = re.search(r"sha256 of the sorted training [^`]*`([0-9a-f]{64})`", art_card)
    if training_ids is None:
        raise ValueError("the art set's card does not state the sha256 of its training ids: build it again")
    rows = [
        f"| {split} | {figures['n_pictures']} | {dvae['splits'][split]['psnr']:.1f} | {figures['image_loss']:.2f} "
        f"| {figures['image_loss_shuffled']:.2f} | {figures['text_loss']:.2f} |"
        for split, figures in report["transformer"].items()
    ]
    captions = "\n".join(
        f"{n}. {entry['caption']}" for n, entry in enumerate(report["sheets"]["draws.png"], start=1)
    )
    steps = {name: recipe[f"{name}_training"]["steps"] for name in ("dvae", "transformer")}
    batches = {
        name: recipe[f"{name}_training"]["batch_size"] * recipe[f"{name}_training"]["accumulation"]
        for name in steps
    }
    sampling = report["settings"]["sampling"]
    image_size, shape = recipe["dvae"]["image_size"], recipe["transformer"]
    licences = art_card[art_card.index("| style |") : art_card.index("## Splits")].strip()
    attributions = art_card[art_card.index("## Attributions") :].strip()
    return f"""---
license: other
license_name: licences-of-the-training-art
library_name: dalle
pipeline_tag: text-to-image
tags: [dall-e, discrete-vae, emoji]
---
# The model that ships with dalle

Draws {image_size} px pictures in twelve emoji styles from captions such as `a red apple, flat fluent style`. It is a
small model for learning and for trying things out: it knows emoji and nothing else, confuses objects it has seen
rarely, cannot write text or count, and blurs faces and groups of people. It cannot draw photographs.

## How it was trained

With `dalle train` (preset `laptop`) on the open art set of `dalle data emoji`: {report["data"]["splits"]["train"]:,} pictures
of split `train` (sha256 of the sorted training ids `{training_ids[1]}`). {hours}.

- Tokenizer: BPE with {recipe["tokenizer"]["vocab_size"]} entries, {recipe["tokenizer"]["max_tokens"]} text tokens.
- dVAE: {image_size} px -> {image_size // 8}x{image_size // 8} tokens of {codes} codes ({recipe["dvae"]["quantizer"]}), {steps["dvae"]:,} updates of {batches["dvae"]} pictures.
- Transformer: {shape["n_layers"]} layers x {shape["n_heads"] * shape["d_head"]}, {steps["transformer"]:,} updates of {batches["transformer"]} pictures.
{ranker_recipes(parts)}- Stored in {recipe["weights"]}. It draws at temperature {sampling["temperature"]:g} with guidance {sampling["guidance"]:g} unless told otherwise.

## Figures

All from `{report["command"]}` ([evaluation.json](evaluation.json)).

- dVAE on all held-out pictures, hard tokens, error pooled: **{dvae["psnr"]:.1f} dB** PSNR, {dvae["ink_psnr"]:.1f} dB where there is ink;
  {dvae["codes_used"]:.1%} of {codes} codes used on {dvae["n_pictures_for_codes"]:,} pictures, perplexity {dvae["perplexity"]:.0f}.
- Objects never seen in the style asked for (`combo_hard`, {nearest["n"]} captions, one draw each): the true picture is the nearest
  of 100 of its style (16x16 RGB) in **{draws["recall_at_1"]:.1%}** (± {draws["recall_at_1_standard_error"]:.1%}), among the five nearest in {draws["recall_at_5"]:.1%}.
  Chance is {nearest["chance"]["recall_at_1"]:.1%}; with the dVAE's own reconstruction in place of the draw it is {ceiling["recall_at_1"]:.1%}.

| split | pictures | PSNR, dB | image loss, nats/token | with other captions | text loss |
|---|---|---|---|---|---|
{chr(10).join(rows)}

{ranker_figures(report)}Held-out pictures above their reconstructions:

![reconstructions](reconstructions.png)

Sixteen `combo_hard` draws, evenly spread and not picked by looks, below the true pictures:

![draws](draws.png)

{captions}

## Data and licences

The pictures are not shipped. The model was trained on:

{licences}

{attributions}
"""


def ranker_recipes(parts: dict[str, Any]) -> str:
    """A line for each CLIP on how it was trained."""
    lines = []
    for name, use in (("clip", "chooses among candidates"), ("judge", "only scores, in evaluations")):
        if name in parts:
            recipe, hours = parts[name]["recipe"], parts[name]["hours"]
            shape, training = recipe["clip"], recipe["clip_training"]
            of = f", on one half of the values of `{training['half_of']}`" if training["half_of"] else ""
            lines.append(
                f"- CLIP `{name}/` ({use}): {shape['image_tower']} at {shape['image_size']} px, {training['steps']:,} "
                f"updates of {training['batch_size'] * training['accumulation']} pairs{of}, seed {recipe['seed']}. {hours}.\n"
            )
    return "".join(lines)


def ranker_figures(report: dict[str, Any]) -> str:
    """What the CLIPs are worth on held-out pictures, each figure beside what chance gives."""
    if "clip" not in report:
        return ""
    lines = [
        "What its CLIPs make of held-out pictures. R-precision: the true caption is nearer than 99 captions of other "
        "objects in\nthe same style. Retrieval: among all pictures of the split.\n",
        "| CLIP | split | pictures | style | R-precision | caption at 1 / 5 / 10 | picture at 1 / 5 / 10 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in RANKERS:
        if name not in report:
            continue
        splits = dict(report[name]["splits"])
        if "combo_hard" in report[name]:
            splits["combo_hard"] = report[name]["combo_hard"]
        for split, found in splits.items():
            precision, retrieval = found["r_precision"], found["retrieval"]
            recalls = [
                " / ".join(f"{retrieval[way][f'recall_at_{k}']:.0%}" for k in (1, 5, 10))
                for way in ("picture_to_caption", "caption_to_picture")
            ]
            chance = " / ".join(f"{retrieval['chance'][f'recall_at_{k}']:.1%}" for k in (1, 5, 10))
            lines.append(
                f"| `{name}` | {split} | {found['n_pictures']} | {found['style_accuracy']:.1%} (chance "
                f"{found['style_chance']:.1%}) | {precision['share']:.1%} ± {precision['standard_error']:.1%} (chance "
                f"{precision['chance']:.1%}) | {recalls[0]} (chance {chance}) | {recalls[1]} |"
            )
        probe = report[name].get("probe")
        if probe:
            lines.append(
                f"| `{name}` | linear probe, {probe['n_classes']} values of `{probe['field']}` | {probe['n']} "
                f"| {probe['accuracy']:.1%} (always the commonest: {probe['always_the_commonest']:.1%}) | | | |"
            )
    judged = report.get("judge", {}).get("draws")
    if judged:
        score = judged["clip_score"]
        lines.append(
            f"\nThe judge's CLIPScore of {judged['n']} draws, one a caption: {score['draws']:.3f}; of the true pictures "
            f"{score['true_pictures']:.3f}, of the draws with other captions {score['draws_with_other_captions']:.3f}. "
            f"R-precision of the draws by the judge: {judged['r_precision']['share']:.1%} (chance "
            f"{judged['r_precision']['chance']:.1%})."
        )
    return "\n".join(lines) + "\n\n"


def enlarge(path: Path, factor: int) -> None:
    """Enlarge a sheet in place, pixel by pixel, so that it can be seen on a page."""
    sheet: Image = images.open_image(path)
    size = (sheet.width * factor, sheet.height * factor)
    images.save_png(sheet.resize(size, Resampling.NEAREST), path, None)


if __name__ == "__main__":
    main()
