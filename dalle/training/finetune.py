"""`dalle finetune`: a finished model goes on learning, from 20 to 5,000 pictures of your own.

The stages are those of `train`; what differs is how they are set. Lengths are epochs. The step sizes are a fraction of
those that the model was trained with, each stage ends where its held-out pictures gain no more, and the best validation
is what it ships. The dVAE is trained on where it shows the new pictures clearly worse than its own; the transformer
then reads tokens made with the new one. Components that are not trained are kept.

OUT/finetune.json    the figures before and after, and what the model came from
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import model_validator

from dalle import files, weights
from dalle.config import differences, override, validate
from dalle.data.pair import Pair
from dalle.data.source import Source
from dalle.dvae import DiscreteVAE
from dalle.evaluation.pictures import PictureReader
from dalle.evaluation.protocols import measure_reconstruction
from dalle.evaluation.sheets import spread
from dalle.manifest import VerifiedFolder
from dalle.model_folder import COMPONENTS, read_index
from dalle.training import train
from dalle.training.finetune_report import report, validations
from dalle.training.processes import ALONE, World
from dalle.training.recipe import CLIPShape, Recipe, TransformerShape
from dalle.training.run import CONTINUED, Run

logger = logging.getLogger(__name__)
N_MEASURED = 256  # pictures, the held-out ones first
WORTH_DB = 0.5  # a dVAE that shows the pictures worse than its own by more than this is trained on

# Of each stage the passes over the pictures: at most, with few; fewer where that would be more than so many pictures.
MAX_PICTURES, MIN_EPOCHS = 40_000, 4
N_VALIDATIONS = 40  # spread over a stage; it ends after `patience` of them without a better one
WARM_UP = 0.05  # of a stage's updates
CLIP_BATCH = 128  # pictures at most
CANDIDATES = 16  # a picture, of which the CLIP that has learned these pictures keeps the best

DEFAULTS: dict[str, dict[str, Any]] = {
    "dvae_training": {
        "epochs": 100,
        "batch_size": 32,
        "learning_rate": 1e-3,  # half of `laptop`'s
        "final_learning_rate": 2e-5,
        "weight_decay": 1e-4,
        "clip_norm": 1.0,
        "average_decay": 0.998,
        "patience": 10,
        "crop": "near",
    },
    "transformer_training": {
        "epochs": 160,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-5,
        "beta2": 0.96,
        "weight_decay": 4.5e-2,
        "clip_norm": 1.0,
        "average_decay": 0.998,
        "patience": 10,
        "crop": "center",
        "n_encodings": 8,
        "dropout": 0.1,
        "token_noise": 0.1,
        "bpe_dropout": 0.1,
        "caption_dropout": 0.1,
    },
    "clip_training": {
        "epochs": 40,
        "learning_rate": 2e-4,
        "final_learning_rate": 1e-5,
        "beta2": 0.98,
        "weight_decay": 0.2,
        "clip_norm": 1.0,
        "average_decay": 0.998,
        "patience": 10,
        "crop": "near",
        "bpe_dropout": 0.1,
        "reconstructed": 0.5,
    },
}


class FinetuneRecipe(Recipe):
    """A recipe whose components are given: a decoder that draws more than its encoder reads goes on together with it."""

    @model_validator(mode="after")
    def _large_decoder_is_trained(self) -> Self:
        return self


def finetune(
    data: str | Path | Source,
    out: Path,
    base: Path,
    *,
    name: str,
    settings: Sequence[str] = (),
    device: torch.device,
    dtype: torch.dtype,
    quiet: bool = False,
    world: World = ALONE,
) -> Path:
    """Train the model in folder `base` on, on the pairs in `data`; returns the model folder `out`.

    `name` is what the card calls the base. `settings` are `a.b=c` of the recipe, such as `transformer_training.epochs=30`.
    The same call resumes. Raises ValueError for bad data, a folder in use, settings that contradict the base, or a
    resume that differs; `Stopped` after a signal.
    """
    _refuse_incomplete(base)
    VerifiedFolder(base)  # every file as its manifest says
    with train.locked(out, world):
        given = train.init_identity(base, out, "--from")
        source = Source.of(data)
        pairs, bad = train.read(source, out, world)
        learned, held_out = train.split(source, pairs)
        recipe = recipe_for(base, len(learned), settings)
        train.refuse_unequal_parts(recipe, world)
        begun = out / "run" / "config.json"
        before = files.read_json(begun).get("finetune") if begun.is_file() else None
        if before is None:
            dvae = DiscreteVAE.from_pretrained(base / "dvae").to(device)
            psnr = measured_psnr(dvae, learned, held_out)
            before = {"base": name, "psnr": psnr, "own_psnr": own_psnr(base)}
        config = train.identity(recipe, pairs, dtype, given) | {"finetune": before}
        train.refuse_other_settings(out, config, world)
        continued = CONTINUED | ({"dvae"} if _pays(before["psnr"], before["own_psnr"]) else set())
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
            base,
            quiet,
            world,
            stages=tuple(s for s in train.STAGES if s == "tokenizer" or s in continued & _trainable(recipe)),
            base=name,
            continued=continued,
        )
        train.train_stages(run)
        train.finish(run, lambda run: report(run, before))
    return out


def _trainable(recipe: Recipe) -> set[str]:
    return {"dvae", "transformer"} | ({"clip"} if recipe.clip is not None else set())


def recipe_for(base: Path, n_train: int, settings: Sequence[str] = ()) -> Recipe:
    """Return how the model in `base` is trained on with `n_train` pictures; ValueError for settings it contradicts."""
    parts = _parts(base)
    sampling = read_index(base / "model_index.json")[0].model_dump()
    if "clip" in parts:
        sampling["candidates"] = max(CANDIDATES, sampling.get("candidates") or 1)
    tree: dict[str, Any] = {
        "weights": _stored_dtype(base),
        "sampling": sampling,
        **parts,
        **{
            stage: dict(table)
            for stage, table in DEFAULTS.items()
            if stage != "clip_training" or "clip" in parts
        },
    }
    if "clip_training" in tree:
        n_parts = -(-n_train // CLIP_BATCH)
        tree["clip_training"]["batch_size"] = max(1, n_train // n_parts)  # nearly all pictures in each epoch
    chosen = override(tree, settings)
    for part, given in parts.items():
        changed = differences({part: given}, {part: chosen[part]})
        if changed:
            raise ValueError(f"the given {part} cannot be changed ({changed[0]}): leave the setting out")
    if "clip_training" in chosen and "clip_training" not in tree:
        raise ValueError("clip_training has no effect: the given model has no CLIP that can be trained on")
    for stage in DEFAULTS:
        if isinstance(chosen.get(stage), dict):
            chosen[stage] = _with_length(chosen[stage], n_train, stage)
    return validate(FinetuneRecipe, chosen, "finetune")


def _with_length(table: Mapping[str, Any], n_train: int, stage: str) -> dict[str, Any]:
    """Turn a stage's epochs into updates, and lay out warm-up, validations, checkpoints and sheets along them."""
    found = dict(table)
    epochs = found.pop("epochs")
    if not isinstance(epochs, int | float) or isinstance(epochs, bool) or not epochs > 0:
        raise ValueError(f"{stage}.epochs is {epochs!r}: it must be a number above 0")
    n_update = found["batch_size"] * found.get("accumulation", 1)
    if epochs == DEFAULTS[stage]["epochs"]:  # nobody chose it
        epochs = min(epochs, max(MIN_EPOCHS, MAX_PICTURES / n_train))
    steps = found.setdefault("steps", max(2, round(epochs * n_train / n_update)))
    every = max(1, round(steps / N_VALIDATIONS))
    found.setdefault("warmup_steps", min(max(1, round(WARM_UP * steps)), steps - 1))
    found.setdefault("validate_every", every)
    found.setdefault("checkpoint_every", 2 * every)
    found.setdefault("sheet_every", 10 * every)
    return found


def _refuse_incomplete(base: Path) -> None:
    missing = [part for part in COMPONENTS if not (base / part).is_dir()]
    if missing or not (base / "model_index.json").is_file():
        lacks = missing[0] if missing else "model_index.json"
        raise ValueError(f"--from {base} has no {lacks}: give a finished model folder")


def _parts(base: Path) -> dict[str, Any]:
    """The sizes of the given components as a recipe's tables."""
    found: dict[str, Any] = {
        part: files.read_json(base / part / "config.json") for part in ("tokenizer", "dvae", "transformer")
    }
    found["transformer"] = _only(found["transformer"], TransformerShape.model_fields)
    if (base / "clip").is_dir():
        clip = files.read_json(base / "clip" / "config.json")
        if clip.get("text_tokens") == "dalle":  # a published CLIP is kept as it is
            found["clip"] = _only(clip, CLIPShape.model_fields)
    return found


def _only(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name in fields}


def _stored_dtype(base: Path) -> str:
    """How the given transformer is stored: so will the new one be."""
    tensors = weights.load_header(base / "transformer" / "model.safetensors")
    is_small = any(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    return "bfloat16" if is_small else "float32"


# --- does the dVAE show these pictures? ---


def measured_psnr(dvae: DiscreteVAE, learned: Sequence[Pair], held_out: Sequence[Pair]) -> float:
    """PSNR in dB of pictures after the dVAE, hard tokens, error pooled: the held-out ones first; ValueError when none."""
    chosen = [*held_out, *spread(learned, N_MEASURED)][:N_MEASURED]
    reader = PictureReader(dvae.config.output_size)
    batches = (pictures for _, pictures in reader.batches(chosen))
    psnr = measure_reconstruction(dvae, batches)[0].seen.psnr
    if psnr is None:
        raise ValueError(
            f"no picture can be read, the first because: {next(iter(reader.unreadable.values()))}"
        )
    return round(psnr, 2)


def own_psnr(base: Path) -> float | None:
    """PSNR in dB that the model in `base` reached on held-out pictures of its own data; None where nothing says so.

    Read from what `dalle evaluate` or `dalle finetune` left there, or else from its run.
    """
    # report.json was called evaluation.json, and its image tokenizer dvae, until format 2.
    for file, part, figure in (
        ("report.json", "image_tokenizer", "psnr"),
        ("evaluation.json", "dvae", "psnr"),
        ("finetune.json", "dvae", "psnr_after"),
    ):
        report = files.read_json(base / file) if (base / file).is_file() else {}
        found = report.get(part, {}).get(figure)
        if found is not None:
            return round(float(found), 2)
    rows = validations(base / "run", "dvae")
    return round(float(rows[-1]["validation_psnr"]), 2) if rows else None


def is_worth_training(psnr: float, own: float | None) -> bool:
    """Whether a dVAE is trained on: its best validation is kept, so that it costs time, and nothing else."""
    return own is None or psnr < own - WORTH_DB


def _pays(psnr: float, own: float | None) -> bool:
    """Say what was measured and what follows from it."""
    is_worth = is_worth_training(psnr, own)
    logger.info(
        "PSNR of your pictures through this dVAE: %.1f dB (%s); %s",
        psnr,
        "what it reached on its own is not recorded" if own is None else f"{own:.1f} on its own",
        "it is trained on" if is_worth else "it is kept as it is",
    )
    return is_worth
