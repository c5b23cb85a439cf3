"""Make `dalle/bundled/` of a trained model: the model, its report, and the card that states its figures.

    python benchmarks/bundle.py MODEL DATA... --hours "tokens 1.5 h, decoder 2 h, transformer 6 h on two CPU cores"

DATA are the art set and the scenes that the model was trained on. Every figure of the card is read from the report.json
that this run writes beside it, and stands beside its baseline; recipe.json says how the model was trained.
"""

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from dalle import files
from dalle.data.source import Source
from dalle.evaluation.report import evaluate
from dalle.evaluation.subject import Settings
from dalle.evaluation.summary import lines
from dalle.generation.request import ModelDefaults
from dalle.model_folder import write_index
from dalle.pipeline import DallePipeline

BUNDLED = Path(__file__).parent.parent / "dalle" / "bundled"
MAX_BYTES = 60_000_000
COMPONENTS = ("tokenizer", "dvae", "transformer", "clip")


def main() -> None:
    """Copy the components, evaluate the copy, write the card, and check the size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--hours", required=True, help="what this was trained on and for how long")
    parser.add_argument("--temperature", type=float, help="of its draws, from benchmarks/sampling_sweep.py")
    parser.add_argument("--guidance", type=float, help="likewise")
    parser.add_argument("--candidates", type=int, help="a caption, of which its CLIP keeps the best")
    parser.add_argument("--limit", type=int, help="pictures of a split that are measured; all if left out")
    parser.add_argument("--out", type=Path, default=BUNDLED, help="folder that is replaced")
    given = parser.parse_args()
    cards = [(Path(data) / "README.md").read_text(encoding="utf-8") for data in given.data]
    chosen = {"temperature": given.temperature, "guidance": given.guidance, "candidates": given.candidates}
    defaults = DallePipeline.from_pretrained(given.model).defaults.model_dump()
    defaults |= {name: value for name, value in chosen.items() if value is not None}
    with tempfile.TemporaryDirectory() as temporary:  # the old model stays until the new one is whole
        folder = Path(temporary) / "bundled"
        for component in COMPONENTS:
            shutil.copytree(given.model / component, folder / component)
        recipe = files.read_json(given.model / "run" / "config.json")["recipe"]
        files.write_json(folder / "recipe.json", {"recipe": recipe, "hours": given.hours})
        write_index(folder, ModelDefaults(**defaults))
        pipe = DallePipeline.from_pretrained(folder)
        pipe.name = "bundled"
        report = evaluate(pipe, Source(tuple(given.data)).read(), folder, Settings(limit=given.limit))
        files.write_bytes(folder / "README.md", write_card(report, recipe, given.hours, cards).encode())
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if size > MAX_BYTES:
            raise SystemExit(f"the model takes {size / 1e6:.1f} MB; {MAX_BYTES / 1e6:.0f} MB are allowed")
        shutil.rmtree(given.out, ignore_errors=True)
        shutil.copytree(folder, given.out)
    print(json.dumps({"bundled": str(given.out), "megabytes": round(size / 1e6, 1)}))


def write_card(report: dict[str, Any], recipe: dict[str, Any], hours: str, cards: list[str]) -> str:
    """Return the model card in Markdown."""
    dvae, shape = recipe["dvae"], recipe["transformer"]
    drawn = dvae.get("output_size") or dvae["image_size"]
    defaults = report["settings"]["sampling"]
    stages = ("dvae", "decoder", "transformer", "clip")
    updates = [
        f"- {stage}: {training['steps']:,} updates of {training['batch_size'] * training['accumulation']}."
        for stage in stages
        if (training := recipe.get(f"{stage}_training"))
    ]
    rows = [f"| {line.section} | {line.what} | {line.figure} | {line.note} |" for line in lines(report)]
    sheets = [
        text
        for name, entries in report["sheets"].items()
        for text in (f"![{Path(name).stem}]({name})", "", *_captions(entries), "")
    ]
    return "\n".join(
        [
            "---",
            "license: other",
            "license_name: licences-of-the-training-art",
            "library_name: dalle",
            "pipeline_tag: text-to-image",
            "tags: [dall-e, discrete-vae, emoji]",
            "---",
            "# The model that ships with dalle",
            "",
            f"Draws {drawn} px pictures in twelve emoji styles from captions such as `a red apple, flat fluent style`. It is",
            "small, for learning and for trying things out: it knows emoji and scenes composed of them, and nothing else.",
            "It cannot draw photographs.",
            "",
            "## How it was trained",
            "",
            f"With `benchmarks/release.sh` on {report['data']['splits']['train']:,} pictures of split train. {hours}.",
            "",
            f"- Tokenizer: BPE with {recipe['tokenizer']['vocab_size']} entries, {recipe['tokenizer']['max_tokens']} text tokens.",
            f"- dVAE: {dvae['image_size']} px -> {dvae['image_size'] // 8}x{dvae['image_size'] // 8} tokens of "
            f"{dvae['n_codes']} codes ({dvae['quantizer']}), drawn at {drawn} px.",
            f"- Transformer: {shape['n_layers']} layers x {shape['n_heads'] * shape['d_head']}.",
            *updates,
            f"- Stored in {recipe['weights']}. Draws at temperature {defaults['temperature']:g} with guidance "
            f"{defaults['guidance']:g}; its CLIP keeps the best of {defaults.get('candidates') or 1} candidates a picture.",
            "",
            "## Figures",
            "",
            f"From `{report['command']}` ([report.json](report.json), [report.html](report.html)); intervals are of 95 %.",
            "",
            "| section | what | figure | beside |",
            "|---|---|---|---|",
            *rows,
            "",
            "## Pictures",
            "",
            "Evenly spread over the held-out pictures, none picked by looks.",
            "",
            *sheets,
            "## Data and licences",
            "",
            "The pictures are not shipped.",
            "",
            *[part for card in cards for part in _of_card(card)],
        ]
    )


def _captions(entries: object) -> list[str]:
    """The captions of a sheet as a numbered list."""
    found = entries if isinstance(entries, list) else []
    return [f"{n}. {entry['caption']}" for n, entry in enumerate(found, start=1) if "caption" in entry]


def _of_card(card: str) -> list[str]:
    """A data set's title, its table of licences, and its attributions."""
    title = card.splitlines()[0].removeprefix("# ")
    table = re.findall(r"^\|.*\|$", card.split("\n## ")[0], re.MULTILINE)
    attributions = card[card.index("## Attributions") :].splitlines()[1:] if "## Attributions" in card else []
    return [f"### {title}", "", *table, *attributions, ""]


if __name__ == "__main__":
    main()
