"""`dalle evaluate`: every section of a report in one JSON file, and the sheets of pictures beside it.

Source: DALL·E §3.1 and Figures 6 and 9 for what is measured; none for the rest.
"""

from __future__ import annotations

import platform
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle import __version__, files, images
from dalle.data.pairs import PairSet
from dalle.evaluation.components import image_tokenizer, pictures_for_codes, transformer
from dalle.evaluation.composition import composition, scene_rows
from dalle.evaluation.curves import curve_rows, curves
from dalle.evaluation.galleries import zero_shot_rows
from dalle.evaluation.memorisation import memorisation
from dalle.evaluation.page import write_page
from dalle.evaluation.protocols import BATCH, decode, reconstruct
from dalle.evaluation.ranking import MAX_PROBE_PICTURES, RankerReport
from dalle.evaluation.retrieval import zero_shot
from dalle.evaluation.samples import sampled_rows, samples
from dalle.evaluation.sheets import pairs_sheet, spread
from dalle.evaluation.subject import Parts, Progress, Report, Settings, Subject, choose, indices_of
from dalle.generation.recipe import Versions
from dalle.generation.request import ImageRequest
from dalle.generation.rerank import Ranker
from dalle.pipeline import DallePipeline

FORMAT = 2  # of report.json
SHEET_PICTURES = 16
MAX_REASONS = 10  # listed of unreadable pictures

Section = Callable[[Subject], dict[str, Any]]


def evaluate(
    pipe: DallePipeline,
    pairs: PairSet,
    out: Path,
    settings: Settings | None = None,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Measure a model on held-out pairs; write OUT/report.json, report.html and sheets of pictures.

    What is finished lies in OUT/parts until the end: the same call goes on after a kill.

    Args:
        pipe: the model.
        pairs: the data set, the training pictures included: copies and galleries come from them.
        out: the folder of the report.
        settings: splits, limit, seed, candidates.
        progress: called with (units done, of how many); a unit is about a picture read, encoded or drawn.

    Returns:
        What is in report.json: PSNR in dB, losses in nats per token, recalls and shares in 0..1.

    Raises:
        ValueError: an unknown split, nothing held out, no readable picture, a bad limit, seed or folder.
    """
    out, settings = Path(out), settings or Settings()
    if out.exists() and not out.is_dir():
        raise ValueError(f"out is {out}, which is a file: give a folder")
    members = choose(pairs, settings.splits, settings.limit)
    origin = _origin(pipe, pairs, members, settings)
    subject = Subject(pipe, pairs, settings, members, out, Parts(out / "parts", origin))
    ImageRequest("", seed=settings.seed).seeds(
        len(subject.rows) * subject.n_candidates
    )  # refused now, not later
    sizes = _sizes(subject)
    subject.advance = advance = Progress(progress, sizes)
    began, report, seconds = time.perf_counter(), dict[str, Any](), dict[str, float]()
    for name in sizes:
        advance.start(name)
        started = time.perf_counter()
        report[name] = _finished(subject, name)
        seconds[name] = round(time.perf_counter() - started, 1)
        advance.finish()
    unreadable = sorted(subject.reader.unreadable.values())
    report = {
        "format": FORMAT,
        "command": _command(pipe.name, settings),
        **origin,
        "unreadable": {"n": len(unreadable), "first": unreadable[:MAX_REASONS]},
        **report,
        "times": {"seconds": round(time.perf_counter() - began, 1), "sections": seconds},
    }
    files.write_json(out / "report.json", report)
    write_page(report, out)
    subject.parts.remove()
    return report


def evaluate_ranker(
    ranker: Ranker,
    pairs: PairSet,
    out: Path,
    settings: Settings | None = None,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Measure a CLIP alone on held-out pairs and write OUT/report.json; arguments and errors as `evaluate`."""
    settings = settings or Settings()
    members = choose(pairs, settings.splits, settings.limit)
    n = sum(map(len, members.values())) + len(spread(indices_of(pairs, "train"), MAX_PROBE_PICTURES))
    advance = Progress(progress, {"clip": n})
    advance.start("clip")
    report = {
        "format": FORMAT,
        "model": {"name": ranker.name, "clip_sha256": ranker.sha256},
        "data": _data(pairs, members),
        "settings": settings.model_dump(mode="json"),
        "versions": _versions(),
        "clip": RankerReport(ranker, pairs, advance, settings.probe).figures(members, zero_shot_rows(pairs)),
    }
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "report.json", report)
    advance.finish()
    return report


# ---- sections ------------------------------------------------------------------------------------


def _finished(subject: Subject, name: str) -> Any:
    """A section's figures, computed now or by an evaluation that was killed; unreadable pictures are remembered too."""
    found = subject.parts.figures(
        name,
        lambda: {"figures": _section(name)(subject), "unreadable": dict(subject.reader.unreadable)},
    )
    subject.reader.unreadable.update(found["unreadable"])
    return found["figures"]


def _section(name: str) -> Section:
    """What computes a section of the report."""
    sections: dict[str, Section] = {
        "image_tokenizer": image_tokenizer,
        "transformer": transformer,
        "retrieval": zero_shot,
        "samples": samples,
        "curves": curves,
        "memorisation": memorisation,
        "composition": composition,
        "clip": lambda subject: _ranker(subject, "clip"),
        "judge": lambda subject: _ranker(subject, "judge"),
        "sheets": _sheets,
    }
    return sections[name]


def _sizes(subject: Subject) -> dict[str, int]:
    """The sections of this report in their order, and about how much work each is."""
    n, n_rows = len(subject.everyone), len(subject.rows)
    n_ranked = n + len(spread(subject.train, MAX_PROBE_PICTURES))
    return {
        "image_tokenizer": n + len(pictures_for_codes(subject)),
        "transformer": 2 * n,
        "retrieval": n_rows * (subject.n_candidates + 1) + (len(subject.pairs) if subject.extractors else 0),
        "samples": len(subject.extractors) * 15 * len(sampled_rows(subject)) + 1,
        "curves": 2 * len(curve_rows(subject)) * subject.settings.curve_candidates,
        "memorisation": 2 * n_rows,
        "composition": sum(map(len, scene_rows(subject).values())) * (subject.n_candidates + 1) + 1,
        **dict.fromkeys(subject.rankers, n_ranked),
        "sheets": n + 2 * SHEET_PICTURES,
    }


def _ranker(subject: Subject, name: str) -> dict[str, Any]:
    """What a CLIP of the model makes of held-out pictures; and of the draws, if it did not choose among them."""
    report = RankerReport(subject.rankers[name], subject.pairs, subject.advance, subject.settings.probe)
    figures = report.figures(subject.members, subject.hard)
    if name == "judge":
        figures["draws"] = report.draws(subject.rows, decode(subject.pipe.dvae, subject.draws().tokens[:, 0]))
    return figures


def _origin(
    pipe: DallePipeline, pairs: PairSet, members: dict[str, list[int]], settings: Settings
) -> dict[str, Any]:
    """What the figures were taken on, and with what."""
    return {
        "model": {"name": pipe.name, "sha256": pipe.model_sha256},
        "data": _data(pairs, members),
        "settings": {
            **settings.model_dump(mode="json"),
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


def _command(model: str, settings: Settings) -> str:
    """What to type for the same figures; DATA stands for where the pictures lie."""
    options = ["--splits", ",".join(settings.splits)] if settings.splits else []
    for name in ("limit", "candidates", "curve_candidates"):
        if (value := getattr(settings, name)) != Settings.model_fields[name].default:
            options += [f"--{name.replace('_', '-')}", str(value)]
    if settings.networks != Settings.model_fields["networks"].default:
        options += ["--networks", ",".join(settings.networks) or "none"]
    return shlex.join(["dalle", "evaluate", model, "DATA", *options, "--seed", str(settings.seed)])


# ---- sheets --------------------------------------------------------------------------------------


def _sheets(subject: Subject) -> dict[str, Any]:
    """Pictures above their reconstructions, and above the draws from their captions; none picked by looks."""
    shown, pictures = _readable(subject, subject.everyone)
    sheet = pairs_sheet(pictures, reconstruct(subject.pipe.dvae, pictures)[1])
    images.save_png(sheet, subject.out / "reconstructions.png", None)
    listed: dict[str, Any] = {"reconstructions.png": [{"key": subject.pairs[index].key} for index in shown]}
    listed["worst.png"] = _worst_sheet(subject)
    draws = subject.draws()
    shown, pictures = _readable(subject, subject.rows)
    places = [subject.rows.index(row) for row in shown]
    kinds = {"draws.png": draws.tokens[:, 0]}
    if draws.of_choice is not None:
        kinds["chosen.png"] = draws.of_choice
    for name, tokens in kinds.items():
        images.save_png(
            pairs_sheet(pictures, decode(subject.pipe.dvae, tokens[places])), subject.out / name, None
        )
        listed[name] = [
            {"key": subject.pairs[row].key, "caption": subject.captions([row])[0]} for row in shown
        ]
    return listed


def _worst_sheet(subject: Subject) -> list[dict[str, Any]]:
    """The measured pictures of the largest squared error above their reconstructions, worst first."""
    errors = list[tuple[float, int]]()
    for positions, pictures in subject.reader.batches([subject.pairs[index] for index in subject.everyone]):
        apart = (pictures - reconstruct(subject.pipe.dvae, pictures)[1]).square().mean(dim=(1, 2, 3))
        errors += zip(apart.tolist(), (subject.everyone[position] for position in positions), strict=True)
    worst = [index for _, index in sorted(errors, reverse=True)[:SHEET_PICTURES]]
    [(positions, pictures)] = subject.reader.batches([subject.pairs[index] for index in worst])
    sheet = pairs_sheet(pictures, reconstruct(subject.pipe.dvae, pictures)[1])
    images.save_png(sheet, subject.out / "worst.png", None)
    return [{"key": subject.pairs[worst[position]].key} for position in positions]


def _readable(subject: Subject, indices: Sequence[int]) -> tuple[list[int], Tensor]:
    """Up to 16 of `indices`, spread evenly over those with a readable picture, and the pictures."""
    good = [index for index in indices if subject.pairs[index].key not in subject.reader.unreadable]
    if not good:
        raise ValueError(f"none of the {len(indices)} pictures to show can be read: repair them")
    shown = spread(good, SHEET_PICTURES)
    [(positions, pictures)] = subject.reader.batches([subject.pairs[index] for index in shown])
    return [shown[position] for position in positions], pictures
