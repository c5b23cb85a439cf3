"""The report on a model: every figure of its model card in one JSON file, and two sheets of pictures.

Source: none; the figures are those of `dalle.evaluation.protocols`.
"""

from __future__ import annotations

import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle import __version__, files, images
from dalle.data.pairs import PairSet
from dalle.evaluation.metrics import Reconstruction
from dalle.evaluation.protocols import (
    BATCH,
    PictureReader,
    decode,
    draw,
    first_captions,
    measure_losses,
    measure_reconstruction,
    nearest_of_100,
    reconstruct,
    zero_shot_rows,
)
from dalle.evaluation.ranking import MAX_PROBE_PICTURES, PROBE_FIELD, RankerReport
from dalle.evaluation.sheets import pairs_sheet, spread
from dalle.generation.recipe import Versions
from dalle.generation.request import ImageRequest
from dalle.generation.rerank import Ranker
from dalle.pipeline import DallePipeline

FORMAT = 1  # of evaluation.json
MAX_TRAIN_PICTURES = 4096  # looked at for the use of codes only
SHEET_PICTURES = 16
MAX_REASONS = 10  # listed of unreadable pictures
NOT_HELD_OUT = ("train", "excluded")


def evaluate(
    pipe: DallePipeline,
    pairs: PairSet,
    out: Path,
    *,
    splits: tuple[str, ...] | None = None,
    limit: int | None = None,
    seed: int = 0,
    probe: str = PROBE_FIELD,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures a model on held-out pairs; writes OUT/evaluation.json, reconstructions.png and draws.png.

    Args:
        splits: to measure on; all but `train` and `excluded` when None.
        limit: the most pictures of a split, spread evenly over it, and the most draws.
        seed: row i of the draws uses seed + i.
        probe: the field that a linear probe on the vectors of the model's CLIPs tells pictures by.
        progress: called with (pictures done, of how many); a picture counts once for each pass over it.

    Returns:
        What is in evaluation.json: PSNR in dB, losses in nats per token, recalls and shares in 0..1. Of a model with
        CLIPs also what these are worth (`clip`, `judge`), and what the judge says of the draws.

    Raises:
        ValueError: an unknown split, nothing held out, no readable picture, a bad limit, seed or folder.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out is {out}, which is a file: give a folder")
    members = choose(pairs, splits, limit)
    everyone = [index for found in members.values() for index in found]
    hard = zero_shot_rows(pairs)
    rows = spread(hard or everyone, limit or len(pairs))
    ImageRequest("", seed=seed).seeds(len(rows))  # refuses now what would be refused after minutes
    for_codes = [] if "train" in members else spread(_indices(pairs, "train"), _train_limit(limit))
    both = {"clip": pipe.ranker, "judge": pipe.load_judge()}
    rankers = {name: ranker for name, ranker in both.items() if ranker is not None}
    n_ranked = len(everyone) + len(spread(_indices(pairs, "train"), MAX_PROBE_PICTURES))
    advance = _Advance(
        progress,
        2 * len(everyone)
        + len(for_codes)
        + 2 * len(rows)
        + len(rankers) * n_ranked
        + ("judge" in rankers) * len(rows),
    )
    reader = PictureReader(pipe.dvae.config.output_size)

    dvae_figures, transformer_figures = _model_figures(pipe, pairs, members, for_codes, reader, advance)
    tokens, seconds = draw(pipe, [pairs[row].captions[0] for row in rows], seed, advance)
    nearest = nearest_of_100(pipe, pairs, rows, tokens, reader, advance)
    ranked = {
        name: _ranker_figures(
            pipe,
            RankerReport(ranker, pairs, advance, probe),
            members,
            hard,
            (rows, tokens) if name == "judge" else None,
        )
        for name, ranker in rankers.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    sheets = {
        "reconstructions.png": _reconstruction_sheet(pipe, pairs, everyone, reader, out),
        "draws.png": _draw_sheet(pipe, pairs, rows, tokens, seed, reader, out),
    }
    report = {
        "format": FORMAT,
        "command": _command(pipe.name, splits, limit, seed),
        **_origin(pipe, pairs, members, splits, limit, seed),
        "unreadable": {
            "n": len(reader.unreadable),
            "first": [reason for _, reason in sorted(reader.unreadable.items())][:MAX_REASONS],
        },
        "dvae": dvae_figures,
        "transformer": transformer_figures,
        "nearest_of_100": {"rows": "combo_hard" if hard else "splits", **nearest},
        **ranked,
        "speed": {"n_draws": len(rows), "seconds": seconds, "draws_per_second": len(rows) / seconds},
        "sheets": sheets,
    }
    files.write_json(out / "evaluation.json", report)
    advance.finish()
    return report


def evaluate_ranker(
    ranker: Ranker,
    pairs: PairSet,
    out: Path,
    *,
    splits: tuple[str, ...] | None = None,
    limit: int | None = None,
    probe: str = PROBE_FIELD,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures a CLIP alone on held-out pairs and writes OUT/evaluation.json; arguments and errors as `evaluate`."""
    members = choose(pairs, splits, limit)
    n = sum(map(len, members.values())) + len(spread(_indices(pairs, "train"), MAX_PROBE_PICTURES))
    advance = _Advance(progress, n)
    report = {
        "format": FORMAT,
        "model": {"name": ranker.name, "clip_sha256": ranker.sha256},
        "data": _data(pairs, members),
        "settings": {"splits": None if splits is None else list(splits), "limit": limit, "probe": probe},
        "versions": _versions(),
        "clip": RankerReport(ranker, pairs, advance, probe).figures(members, zero_shot_rows(pairs)),
    }
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "evaluation.json", report)
    advance.finish()
    return report


def choose(pairs: PairSet, splits: Sequence[str] | None, limit: int | None) -> dict[str, list[int]]:
    """Indices of the pairs to measure, by split; ValueError when a split is unknown or none is held out."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or left out for all pictures")
    there = ", ".join(f"{name} {count}" for name, count in pairs.counts.items()) or "no pictures"
    if splits is None:
        splits = [name for name in pairs.counts if name not in NOT_HELD_OUT]
    unknown = [name for name in splits if name not in pairs.counts]
    if unknown:
        raise ValueError(f"split {unknown[0]!r} is not in the data, which have {there}: choose among these")
    if not splits:
        raise ValueError(f"nothing is held out, the data have {there}: name the splits to measure on")
    return {name: spread(_indices(pairs, name), limit or len(pairs)) for name in dict.fromkeys(splits)}


def _indices(pairs: PairSet, split: str) -> list[int]:
    return [index for index, pair in enumerate(pairs) if pair.split == split]


def _train_limit(limit: int | None) -> int:
    return MAX_TRAIN_PICTURES if limit is None else min(limit, MAX_TRAIN_PICTURES)


class _Advance:
    """Counts pictures done and tells `progress`."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self._progress, self._n_done, self._total = progress, 0, total

    def __call__(self, n: int) -> None:
        self._n_done += n
        if self._progress is not None:
            self._progress(self._n_done, self._total)

    def finish(self) -> None:
        """Whatever was left out is done too."""
        self(self._total - self._n_done)


# ---- figures -------------------------------------------------------------------------------------


def _model_figures(
    pipe: DallePipeline,
    pairs: PairSet,
    members: dict[str, list[int]],
    for_codes: list[int],
    reader: PictureReader,
    advance: _Advance,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The dVAE's figures over all splits and by split, and the transformer's by split."""
    dvae_by_split, losses_by_split = {}, {}
    pooled = Reconstruction(pipe.dvae.config.n_codes, pipe.dvae.config.image_size)
    for split, indices in members.items():
        measured, kept, tokens = _measured(pipe, pairs, indices, reader, advance)
        pooled += measured
        dvae_by_split[split] = _dvae_figures(measured)
        if not kept:
            losses_by_split[split] = {"n_pictures": 0}
            continue
        text, n_truncated = first_captions([pairs[index] for index in kept], pipe.tokenizer)
        losses = measure_losses(pipe.transformer, text, tokens.flatten(1))
        losses_by_split[split] = {**asdict(losses), "n_pictures": len(kept), "n_captions_cut": n_truncated}
        advance(len(kept))
    if not pooled.n_pictures:
        reason = next(iter(reader.unreadable.values()))
        raise ValueError(f"none of the {len(reader.unreadable)} pictures can be read; the first: {reason}")
    all_codes = pooled + _measured(pipe, pairs, for_codes, reader, advance)[0]
    codes = {
        "codes_used": all_codes.codes_used,
        "perplexity": all_codes.perplexity,
        "n_codes": pipe.dvae.config.n_codes,
        "n_pictures_for_codes": all_codes.n_pictures,
    }
    return {**_dvae_figures(pooled), **codes, "splits": dvae_by_split}, losses_by_split


def _ranker_figures(
    pipe: DallePipeline,
    report: RankerReport,
    members: dict[str, list[int]],
    hard: list[int],
    drawn: tuple[list[int], Tensor] | None,
) -> dict[str, Any]:
    """What a CLIP of the model makes of held-out pictures; and of the draws (rows, tokens), if it judges them."""
    figures = report.figures(members, hard)
    if drawn is not None:
        rows, tokens = drawn
        figures["draws"] = report.draws(rows, decode(pipe.dvae, tokens))
    return figures


def _measured(
    pipe: DallePipeline, pairs: PairSet, indices: list[int], reader: PictureReader, advance: _Advance
) -> tuple[Reconstruction, list[int], Tensor]:
    """Sums, the indices of the pictures that could be read, and the tokens (M, G, G) of these."""
    kept: list[int] = []

    def batches() -> Any:
        for positions, pictures in reader.batches([pairs[index] for index in indices]):
            kept.extend(indices[position] for position in positions)
            yield pictures
            advance(len(positions))

    sums, tokens = measure_reconstruction(pipe.dvae, batches())
    return sums, kept, tokens


def _dvae_figures(sums: Reconstruction) -> dict[str, Any]:
    """PSNR at the size that the tokens are made of; and at that which is drawn, if this is another."""
    figures = {"psnr": sums.seen.psnr, "ink_psnr": sums.seen.ink_psnr}
    if sums.drawn.n_values != sums.seen.n_values:
        figures |= {"output_psnr": sums.drawn.psnr, "output_ink_psnr": sums.drawn.ink_psnr}
    return {**figures, "n_pictures": sums.n_pictures}


def _origin(
    pipe: DallePipeline,
    pairs: PairSet,
    members: dict[str, list[int]],
    splits: Sequence[str] | None,
    limit: int | None,
    seed: int,
) -> dict[str, Any]:
    """What the figures were taken on, and with what."""
    return {
        "model": {"name": pipe.name, "sha256": pipe.model_sha256},
        "data": _data(pairs, members),
        "settings": {
            "splits": None if splits is None else list(splits),
            "limit": limit,
            "seed": seed,
            "sampling": pipe.defaults.model_dump(mode="json"),
            "rows_per_batch": BATCH,
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "device": pipe.device.type,
            "threads": torch.get_num_threads(),
        },
        "versions": _versions(),
    }


def _data(pairs: PairSet, members: dict[str, list[int]]) -> dict[str, Any]:
    return {
        "fingerprint": pairs.fingerprint,
        "splits": dict(pairs.counts),
        "n_bad": len(pairs.bad),
        "measured": {split: len(indices) for split, indices in members.items()},
    }


def _versions() -> dict[str, str]:
    versions = Versions(dalle=__version__, torch=str(torch.__version__), python=platform.python_version())
    found: dict[str, str] = versions.model_dump(mode="json")
    return found


def _command(model: str, splits: Sequence[str] | None, limit: int | None, seed: int) -> str:
    """What to type for the same figures; DATA stands for where the pictures lie."""
    options = ["--splits", ",".join(splits)] if splits else []
    options += ["--limit", str(limit)] if limit is not None else []
    return shlex.join(["dalle", "evaluate", model, "DATA", *options, "--seed", str(seed)])


# ---- sheets --------------------------------------------------------------------------------------


def _reconstruction_sheet(
    pipe: DallePipeline, pairs: PairSet, indices: list[int], reader: PictureReader, out: Path
) -> list[dict[str, Any]]:
    """Writes pictures above their reconstructions, and says which they are."""
    shown, pictures = _readable(pairs, indices, reader)
    sheet = pairs_sheet(pictures, reconstruct(pipe.dvae, pictures)[1])
    images.save_png(sheet, out / "reconstructions.png", None)
    return [{"key": pairs[index].key} for index in shown]


def _draw_sheet(
    pipe: DallePipeline,
    pairs: PairSet,
    rows: list[int],
    tokens: Tensor,
    seed: int,
    reader: PictureReader,
    out: Path,
) -> list[dict[str, Any]]:
    """Writes true pictures above the draws from their captions, none picked by looks; says which they are."""
    shown, pictures = _readable(pairs, rows, reader)
    places = [rows.index(row) for row in shown]
    sheet = pairs_sheet(pictures, decode(pipe.dvae, tokens[places]))
    images.save_png(sheet, out / "draws.png", None)
    return [
        {"key": pairs[row].key, "caption": pairs[row].captions[0], "seed": seed + place}
        for row, place in zip(shown, places, strict=True)
    ]


def _readable(pairs: PairSet, indices: Sequence[int], reader: PictureReader) -> tuple[list[int], Tensor]:
    """Up to 16 of `indices`, spread evenly over those with a readable picture, and the pictures."""
    good = [index for index in indices if pairs[index].key not in reader.unreadable]
    if not good:
        raise ValueError(f"none of the {len(indices)} pictures to show can be read: repair them")
    shown = spread(good, SHEET_PICTURES)
    [(positions, pictures)] = reader.batches([pairs[index] for index in shown])
    return [shown[position] for position in positions], pictures
