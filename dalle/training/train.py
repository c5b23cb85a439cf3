"""`dalle train`: tokenizer -> dVAE -> its decoder -> picture tokens -> transformer -> CLIP -> model folder; resumable.

OUT/                 the model folder, complete when the last stage ends
OUT/run/config.json  the recipe and what it was run on: a resume with anything else is refused
OUT/run/stages.json  each finished stage: what it was made from, and the hash of what came out
OUT/run/checkpoints/STAGE/inputs.json  what an unfinished stage is being made from
"""

import logging
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from dalle import files
from dalle.config import differences
from dalle.data.contents import MAX_DECODED, check_contents
from dalle.data.pair import Pair
from dalle.data.pairs import PairSet
from dalle.data.reading import BadSampleLog
from dalle.data.source import Source
from dalle.generation.precision import has_native_bfloat16
from dalle.generation.request import ModelDefaults
from dalle.model_folder import COMPONENTS, read_index, write_index, write_ranker_index
from dalle.training.card import write_card
from dalle.training.loop import DTYPES
from dalle.training.order import epoch_line
from dalle.training.processes import ALONE, World
from dalle.training.recipe import Recipe, with_given
from dalle.training.run import Run
from dalle.training.stages import (
    clip_stage,
    decoder_stage,
    dvae_stage,
    keep_given_clips,
    keep_given_transformer,
    refuse_misfit,
    tokenizer_stage,
    transformer_stage,
)

STAGES = ("tokenizer", "dvae", "decoder", "transformer", "clip")
logger = logging.getLogger(__name__)


def train(
    data: str | Path | Source,
    out: Path,
    recipe: Recipe,
    *,
    init_from: Path | None = None,
    stages: tuple[str, ...] = STAGES,
    device: torch.device,
    dtype: torch.dtype,
    quiet: bool = False,
    world: World = ALONE,
) -> Path:
    """Train all `stages` of `recipe` on the pairs in `data`; returns the model folder `out`.

    With `init_from`, its tokenizer and dVAE are reused and its transformer is continued; what it lacks is trained. The
    sizes of these parts take the place of the recipe's, which is said and recorded. Stage decoder without stage dvae
    gives its dVAE another decoder; its transformer and CLIPs are kept where no stage trains them.
    All processes of `world` make the same call; `data` and `out` must be the same folders for all of them.
    Raises ValueError for bad data, a folder in use, or a resume that differs; `Stopped` after a signal.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise ValueError(f"stage {unknown[0]!r} is unknown: choose from {', '.join(STAGES)}")
    refuse_unequal_parts(recipe, world)
    if init_from is not None:
        recipe, changed = with_given(recipe, init_from)
        if changed:
            logger.warning("settings that the given parts decide: %s", "; ".join(changed))
    stages = _with_settings(recipe, stages)
    with locked(out, world):
        given = init_identity(init_from, out)
        source = Source.of(data)
        pairs, bad = read(source, out, world)
        refuse_other_settings(out, identity(recipe, pairs, dtype, given), world)
        learned, held_out = split(source, pairs)
        run = Run(
            out,
            recipe,
            source,
            pairs,
            learned,
            held_out,
            bad,
            device,
            dtype,
            init_from,
            quiet,
            world,
            stages,
            base=init_from.name if init_from else None,
        )
        logger.info("%s: %s", source, epoch_line(learned, recipe.balance))
        train_stages(run)
        finish(run)
    return out


@contextmanager
def locked(out: Path, world: World) -> Iterator[None]:
    """Hold the lock of a run's folder; ValueError when another run holds it."""
    (out / "run").mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / "run" / "lock")
    with world.main_first():
        try:
            if world.is_main:  # it stands for all processes
                lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"{out}: another run is training in this folder; wait for it, or choose another --out"
            ) from None
    try:
        yield
    finally:
        lock.release()


def refuse_unequal_parts(recipe: Recipe, world: World) -> None:
    """Every stage's micro-batch must fall into equal parts: said before the first stage begins."""
    for training in recipe.trainings.values():
        world.part(training.batch_size)


def _warn_of_emulation(
    recipe: Recipe, stages: tuple[str, ...], device: torch.device, dtype: torch.dtype
) -> None:
    """Say which stages compute in 16 bits on a device that only emulates it."""
    if has_native_bfloat16(device):
        return
    for name, training in recipe.trainings.items():
        is_16_bits = (
            training.precision == "fp16_resblock" or DTYPES.get(training.precision, dtype) != torch.float32
        )
        if name in stages and is_16_bits:
            logger.warning(
                "%s: computes in 16 bits, which this %s emulates and float32 is many times faster: use --dtype float32 "
                "and %s_training.precision=auto",
                name,
                device.type,
                name,
            )


def _with_settings(recipe: Recipe, stages: tuple[str, ...]) -> tuple[str, ...]:
    """The stages that the recipe has settings for; ValueError when that is none of those asked for."""
    needed = {"decoder": ("decoder_training",), "clip": ("clip", "clip_training")}
    missing = {stage for stage, names in needed.items() if getattr(recipe, names[-1]) is None}
    kept = tuple(stage for stage in stages if stage not in missing)
    if not kept:
        names = " and ".join(needed[stages[0]])
        raise ValueError(f"stage {stages[0]} needs the settings {names}, which this preset has not")
    return kept


def train_stages(run: Run) -> None:
    """Run the stages in their order, each with what it needs of those before."""
    stages = run.stages
    _warn_of_emulation(run.recipe, stages, run.device, run.dtype)
    tokenizer, dvae = tokenizer_stage(run), None
    clip = run.recipe.clip_training if "clip" in stages else None
    if {"dvae", "decoder", "transformer"} & set(stages) or (clip is not None and clip.reconstructed > 0):
        if "dvae" not in stages and not run.exists("dvae"):
            raise ValueError(
                f"stage {stages[0]} needs a dVAE, and {run.out} has none: add dvae to --stages, or give --init-from"
            )
        if "transformer" in stages:
            refuse_misfit(run, tokenizer)
        dvae = dvae_stage(run)
        if run.recipe.decoder_training is not None and (
            "decoder" in stages or run.exists("decoder") or run.given("dvae") is not None
        ):
            dvae = decoder_stage(run, stages)
    if "decoder" in stages and not {"transformer", "clip"} & set(stages):
        keep_given_transformer(run)
    if "transformer" in stages and dvae is not None:
        transformer_stage(run, tokenizer, dvae)
    if clip is not None:
        clip_stage(run, tokenizer, dvae)


def read(source: Source, out: Path, world: World) -> tuple[PairSet, BadSampleLog]:
    """Read the captioned pictures that a run is made from, and open its list of bad samples, each process's own.

    ValueError when too many are bad, or when the data are not those that the run in `out` was begun with.
    """
    is_begun = (out / "run" / "config.json").exists()
    with world.main_first():  # the others find the pictures hashed
        found = source.read(exclude=(str(out),))
        pairs = check_contents(found, out / "run" / "data.jsonl", must_match=is_begun)
    file = f"bad_samples-{world.rank}.jsonl" if world.rank else "bad_samples.jsonl"
    keys = {pair.key for pair in pairs} if len(found) > MAX_DECODED else set()  # else they are readable
    keys |= {sample.key for sample in pairs.bad}
    bad = BadSampleLog(out / "run" / file, len(pairs) + len(pairs.bad), source.max_bad, keys)
    bad.add_all(pairs.bad)
    pairs.require_mostly_good(source.max_bad)
    counts = ", ".join(f"{split} {count}" for split, count in sorted(pairs.counts.items()))
    logger.info("%s: %d captioned pictures (%s); training uses split train", source, len(pairs), counts)
    for note in pairs.notes:
        logger.info("%s: %s", source, note)
    if pairs.bad:
        logger.warning("%s: %d bad samples are left out; see run/bad_samples.jsonl", source, len(pairs.bad))
    return pairs, bad


def split(source: Source, pairs: PairSet) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs to learn from and those held out; ValueError when there are none of either."""
    learned = [pair for pair in pairs if pair.split == "train"]
    held_out = [pair for pair in pairs if pair.split == "validation"]
    held_out = held_out or [pair for pair in pairs if pair.split not in ("train", "excluded")]
    if not learned or not held_out:
        counts = ", ".join(f"{split} {count}" for split, count in sorted(pairs.counts.items()))
        raise ValueError(
            f"{source}: training needs pictures of split train and some held out; found {counts or 'none'}"
        )
    return learned, held_out


def identity(recipe: Recipe, pairs: PairSet, dtype: torch.dtype, given: dict[str, str]) -> dict[str, Any]:
    """Return everything that decides a run's weights, for its config.json."""
    return {
        "recipe": recipe.identity(),
        "data": pairs.fingerprint,
        "dtype": str(dtype).removeprefix("torch."),
        "init_from": given,
    }


def refuse_other_settings(out: Path, config: dict[str, Any], world: World) -> None:
    """Note what a new run is made from; ValueError when the folder's was begun with anything else."""
    with world.main_first():
        _refuse_other_settings(out / "run" / "config.json", config, out)


def _refuse_other_settings(path: Path, config: dict[str, Any], out: Path) -> None:
    if path.exists():
        changed = differences(files.read_json(path), config)
        if changed:
            raise ValueError(
                f"{out} was begun with other settings or data ({'; '.join(changed)}): give the old ones to go on, or "
                f"another --out (--init-from {out} reuses its finished stages)"
            )
    elif (out / "model_index.json").exists():
        raise ValueError(
            f"{out} holds a model that was not trained there: choose another --out (--init-from {out} starts from it)"
        )
    else:
        files.write_json(path, config)


def init_identity(init_from: Path | None, out: Path, option: str = "--init-from") -> dict[str, str]:
    """The hashes of the components in `init_from`, so that a resume notices another one."""
    if init_from is None:
        return {}
    if not init_from.is_dir():
        raise ValueError(f"{option} {init_from}: no such folder")
    if init_from.resolve() == out.resolve():
        raise ValueError(
            f"{option} {init_from} is --out as well, and would be overwritten: choose another --out"
        )
    names = {
        name: "tokenizer.json" if name == "tokenizer" else "model.safetensors" for name in (*STAGES, "judge")
    }
    found = {
        name: files.file_sha256(init_from / name / file)
        for name, file in names.items()
        if (init_from / name / file).is_file()
    }
    if not found:
        raise ValueError(f"{option} {init_from}: holds no tokenizer, dvae, transformer or clip folder")
    return found


def finish(run: Run, write: Callable[[Run], None] = write_card) -> None:
    """Write the card, model_index.json and, last, the manifest: the folder is a model from then on.

    Without a transformer, a CLIP and its tokenizer are a ranker. Given CLIPs that were not trained are kept.
    """
    if not run.world.is_main:
        return
    done = run.records()
    caption, out = shlex.quote(run.held_out[0].captions[0]), shlex.quote(str(run.out))
    if "transformer" in done and run.recipe.decoder_training is not None and "decoder" not in done:
        logger.info("%s: the model is complete once stage decoder has run", run.out)
    elif "transformer" in done:
        keep_given_clips(run)
        write(run)
        write_index(run.out, _defaults(run), {name: run.kind(name) for name in COMPONENTS})
        logger.info("%s is a model now; next: dalle generate %s --model %s", run.out, caption, out)
    elif "clip" in done:
        write_ranker_index(run.out)
        logger.info("%s is a ranker now; next: dalle rerank %s IMAGE... --ranker %s", run.out, caption, out)
    else:
        logger.info("%s has %s; next: the same command with --stages all", run.out, " and ".join(done))


def _defaults(run: Run) -> ModelDefaults:
    """How the finished model draws: by the recipe; a transformer that was kept as given, as it did."""
    index = run.init_from / "model_index.json" if run.init_from else None
    kept = set(run.records()["transformer"]["inputs"]) == {"given"}
    return read_index(index)[0] if kept and index is not None and index.is_file() else run.recipe.sampling
