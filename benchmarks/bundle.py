"""Makes `dalle/bundled/` out of a trained model and the art set: the model, its figures, and the card that states them.

    python benchmarks/bundle.py MODEL ART [--hours "dVAE 0.5 h, transformer 0.7 h on two CPU cores"]

Every figure of the card is read from the evaluation.json that this run writes beside it.
"""

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from PIL.Image import Image, Resampling

from dalle import images, weights
from dalle.data.pairs import read_pairs
from dalle.evaluation.report import evaluate
from dalle.model_folder import write_index
from dalle.pipeline import DallePipeline

BUNDLED = Path(__file__).parent.parent / "dalle" / "bundled"
MAX_BYTES = 40_000_000
COMPONENTS = ("tokenizer", "dvae", "transformer")


def main() -> None:
    """Copy the components, evaluate the copy, write the card, and check the size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("art", type=Path)
    parser.add_argument("--hours", required=True, help="what it was trained on and for how long")
    parser.add_argument(
        "--temperature", type=float, help="of the model's draws, from benchmarks/sampling_sweep.py"
    )
    parser.add_argument("--guidance", type=float, help="likewise")
    arguments = parser.parse_args()
    chosen = {"temperature": arguments.temperature, "guidance": arguments.guidance}
    defaults = DallePipeline.from_pretrained(arguments.model).defaults.model_copy(
        update={name: value for name, value in chosen.items() if value is not None}
    )
    recipe = weights.read_json(arguments.model / "run" / "config.json")["recipe"]
    art_card, pairs = (arguments.art / "README.md").read_text(encoding="utf-8"), read_pairs(arguments.art)
    with tempfile.TemporaryDirectory() as temporary:  # the old model stays until the new one is whole
        folder = Path(temporary) / "bundled"
        for component in COMPONENTS:
            shutil.copytree(arguments.model / component, folder / component)
        write_index(folder, defaults)
        pipe = DallePipeline.from_pretrained(folder)
        pipe.name = "bundled"
        report = evaluate(pipe, pairs, folder)
        card = write_card(report, recipe, art_card, arguments.hours)
        weights.write_bytes(folder / "README.md", card.encode())
        for name in report["sheets"]:
            enlarge(folder / name, 2)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if size > MAX_BYTES:
            raise SystemExit(f"the model takes {size / 1e6:.1f} MB; {MAX_BYTES / 1e6:.0f} MB are allowed")
        shutil.rmtree(BUNDLED, ignore_errors=True)
        shutil.copytree(folder, BUNDLED)
    print(json.dumps({"bundled": str(BUNDLED), "megabytes": round(size / 1e6, 1)}))


def write_card(report: dict[str, Any], recipe: dict[str, Any], art_card: str, hours: str) -> str:
    """The model card in Markdown."""
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
- Stored in {recipe["weights"]}. It draws at temperature {sampling["temperature"]:g} with guidance {sampling["guidance"]:g} unless told otherwise.

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

Held-out pictures above their reconstructions:

![reconstructions](reconstructions.png)

Sixteen `combo_hard` draws, evenly spread and not picked by looks, below the true pictures:

![draws](draws.png)

{captions}

## Data and licences

The pictures are not shipped. The model was trained on:

{licences}

{attributions}
"""


def enlarge(path: Path, factor: int) -> None:
    """Enlarge a sheet in place, pixel by pixel, so that it can be seen on a page."""
    sheet: Image = images.open_image(path)
    size = (sheet.width * factor, sheet.height * factor)
    images.save_png(sheet.resize(size, Resampling.NEAREST), path, None)


if __name__ == "__main__":
    main()
