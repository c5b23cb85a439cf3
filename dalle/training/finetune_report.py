"""What a fine-tuned model shows: sheets before and after, figures before and after, and a card with them."""

import json
import logging
from pathlib import Path
from typing import Any

from PIL.Image import Image, Resampling
from torch import Tensor

from dalle import files, images
from dalle.clip import CLIP
from dalle.data.pair import Pair
from dalle.dvae import DiscreteVAE
from dalle.evaluation.protocols import reconstruct
from dalle.evaluation.sheets import spread
from dalle.generation.rerank import Ranker
from dalle.pipeline import DallePipeline
from dalle.tokenizer import Tokenizer
from dalle.training.card import write_card
from dalle.training.pictures import load_all
from dalle.training.run import Run
from dalle.transformer import Transformer

logger = logging.getLogger(__name__)
N_RECONSTRUCTIONS, N_DRAWS, COLUMNS = 8, 16, 8
RECONSTRUCTIONS, DRAWS = "reconstructions.png", "draws.png"
MIN_SIDE = 128  # pixels that a picture of a sheet has at least, or a multiple that is near


def report(run: Run, before: dict[str, Any]) -> None:
    """Write the sheets, finetune.json and the card of a run whose stages are done."""
    figures = _figures(run, before)
    files.write_json(run.out / "finetune.json", figures)
    shown = [*run.held_out, *spread(run.train, N_DRAWS)]
    pairs, pictures = load_all(shown[:N_DRAWS], lambda pair: _square(run, pair), run.bad)
    _save(_reconstructions(run, pictures[:N_RECONSTRUCTIONS]), run.out / RECONSTRUCTIONS)
    _save(_draws(run, pairs, pictures), run.out / DRAWS)
    for line in _said(figures):
        logger.info("on %d held-out pictures: %s", len(run.held_out), line)
    logger.info("sheets: %s and %s", run.out / RECONSTRUCTIONS, run.out / DRAWS)
    write_card(run, "finetune", [*_table(figures), *_sheets(run, pairs)])


def validations(run_folder: Path, stage: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that hold a stage's validations, by update; of a repeated one the last."""
    path = run_folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    found = {
        row["step"]: row
        for row in rows
        if row["stage"] == stage and any(name.startswith("validation_") for name in row)
    }
    return [found[step] for step in sorted(found)]


# --- figures ---

# Of each stage: the figure of its validations, what a reader calls it, its unit, and whether the higher is the better.
FIGURES = {
    "transformer": ("image_loss", "image loss", "nats a token", False),
    "clip": ("loss", "loss of its CLIP among them", "nats", False),
}


def _figures(run: Run, before: dict[str, Any]) -> dict[str, Any]:
    """Before and after, on the held-out pictures; the transformer's and CLIP's "before" is with the new tokens."""
    found: dict[str, Any] = {
        "base": before["base"],
        "n_held_out": len(run.held_out),
        "dvae": {"psnr_given": before["psnr"], "psnr_own": before["own_psnr"]},
    }
    rows = {stage: _kept(run, stage) for stage in ("dvae", *FIGURES)}
    first, kept = rows["dvae"] or ({"validation_psnr": before["psnr"]},) * 2
    found["dvae"] |= {
        "psnr_before": first["validation_psnr"],
        "psnr_after": kept["validation_psnr"],
        "is_trained": rows["dvae"] is not None,
    }
    for stage, (name, *_) in FIGURES.items():
        pair = rows[stage]
        if pair is not None:
            found[stage] = {
                f"{name}_before": pair[0][f"validation_{name}"],
                f"{name}_after": pair[1][f"validation_{name}"],
                "kept_update": pair[1]["step"],
            }
    return found


def _kept(run: Run, stage: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The first validation of a stage, and the one whose weights were kept; None for a stage that was not run."""
    rows = validations(run.folder, stage)
    if not rows or not (run.folder / "checkpoints" / stage).is_dir():
        return None
    name, is_higher = ("psnr", True) if stage == "dvae" else (FIGURES[stage][0], FIGURES[stage][3])
    best = (max if is_higher else min)(rows, key=lambda row: row[f"validation_{name}"])
    return rows[0], best


def _rows(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was measured, its figure before, and after."""
    dvae = figures["dvae"]
    rows = [("PSNR through the dVAE, dB", f"{dvae['psnr_before']:.1f}", f"{dvae['psnr_after']:.1f}")]
    for stage, (name, words, unit, _) in FIGURES.items():
        if stage in figures:
            before, after = (figures[stage][f"{name}_{when}"] for when in ("before", "after"))
            rows.append((f"{words}, {unit}", f"{before:.2f}", f"{after:.2f}"))
    return rows


def _said(figures: dict[str, Any]) -> list[str]:
    return [f"{what}: {before} before, {after} after" for what, before, after in _rows(figures)]


def _table(figures: dict[str, Any]) -> list[str]:
    return [
        f"## Figures on {figures['n_held_out']} held-out pictures",
        "",
        "| what | before | after |",
        "|---|---|---|",
        *(f"| {what} | {before} | {after} |" for what, before, after in _rows(figures)),
        "",
        "Before: the given weights; those of transformer and CLIP with the new dVAE's tokens.",
        "",
    ]


# --- sheets ---


def _square(run: Run, pair: Pair) -> Image:
    return images.center_crop(pair.open(), run.recipe.dvae.output_size)


def _reconstructions(run: Run, pictures: Tensor) -> Image:
    """Three rows: pictures (B, 3, H, W), what the given dVAE makes of them, and what the new one does."""
    assert run.init_from is not None
    rows = [pictures]
    for folder in (run.init_from / "dvae", run.out / "dvae"):
        rows.append(reconstruct(DiscreteVAE.from_pretrained(folder).to(run.device), pictures)[1])
    return _grid(rows, len(pictures))


def _draws(run: Run, pairs: list[Pair], pictures: Tensor) -> Image:
    """Rows in pairs: pictures (B, 3, H, W), and what the new model draws from their captions."""
    tokenizer = Tokenizer.from_pretrained(run.out / "tokenizer")
    pipe = DallePipeline(
        tokenizer,
        DiscreteVAE.from_pretrained(run.out / "dvae").eval(),
        Transformer.from_pretrained(run.out / "transformer").eval(),
        run.recipe.sampling,
        _own_ranker(run, tokenizer),
    ).to(run.device)
    drawn = images.to_tensor(pipe([pair.captions[0] for pair in pairs], seed=0, truncate=True).images)
    rows = []
    for start in range(0, len(pictures), COLUMNS):
        rows += [pictures[start : start + COLUMNS], drawn[start : start + COLUMNS]]
    return _grid(rows, min(COLUMNS, len(pictures)))


def _own_ranker(run: Run, tokenizer: Tokenizer) -> Ranker | None:
    """The model's own CLIP, where it reads the model's own tokens."""
    if run.recipe.clip is None:
        return None
    return Ranker(CLIP.from_pretrained(run.out / "clip").to(run.device), tokenizer, str(run.out))


def _grid(rows: list[Tensor], columns: int) -> Image:
    """A grid of rows of pictures, all of them as large as the largest, and large enough to be seen."""
    side = max(max(len(row[0][0]) for row in rows), MIN_SIDE)
    cells: list[Image] = []
    for row in rows:
        cells += [picture.resize((side, side), Resampling.NEAREST) for picture in images.to_images(row)]
        cells += [cells[-1].point(lambda _: 255)] * (columns - len(row))  # the last may be short
    return images.grid(cells, columns)


def _save(sheet: Image, path: Path) -> None:
    images.save_png(sheet, path, None)


def _sheets(run: Run, pairs: list[Pair]) -> list[str]:
    n_held_out = sum(pair.split != "train" for pair in pairs)
    captions = [f"{place}. {pair.captions[0]}" for place, pair in enumerate(pairs, start=1)]
    return [
        "Held-out pictures, through the given dVAE, and through this one:",
        "",
        f"![reconstructions]({RECONSTRUCTIONS})",
        "",
        f"{len(pairs)} draws, one a caption and not picked by looks, each below its true picture. The first {n_held_out} are "
        "held-out pictures.",
        "",
        f"![draws]({DRAWS})",
        "",
        *captions,
        "",
    ]
