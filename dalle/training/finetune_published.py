"""`dalle finetune` from a published model, or with adapters: the token model alone is trained on, whole or by LoRA.

Its tokenizer and image tokenizer are kept. OUT is a model folder as any other; with adapters it also holds them alone:

OUT/adapter.safetensors    a few MB: what was added to the base's weights, before the two were merged
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dalle import files, weights
from dalle.config import override, validate
from dalle.data.source import Source
from dalle.data.tokens import TokenStore, encode_part
from dalle.manifest import VerifiedFolder
from dalle.model_folder import OURS, Model, component_kind, load_model, write_index
from dalle.training import train
from dalle.training.loop import train_stage
from dalle.training.lora import AdapterStage, add_adapters_, load_adapters_, merged
from dalle.training.processes import ALONE, World
from dalle.training.recipe import TransformerTraining
from dalle.training.stages import sequences
from dalle.training.transformer import TransformerStage

logger = logging.getLogger(__name__)

ADAPTER = "adapter.safetensors"
SEED = 0
N_VALIDATIONS = 20  # spread over the training
DEFAULTS: dict[str, Any] = {
    "epochs": 100,
    "batch_size": 16,
    "learning_rate": 1e-3,  # of adapters; a whole model takes a tenth
    "final_learning_rate": 1e-5,
    "weight_decay": 0.0,
    "clip_norm": 1.0,
    "average_decay": 0.99,
    "patience": 6,
    "crop": "center",
    "bpe_dropout": 0.0,  # published tokenizers have none
    "caption_dropout": 0.1,
}


def is_for(base: Path, rank: int | None) -> bool:
    """Tell whether a fine-tuning is this file's: of a model with a published part, or by adapters."""
    return rank is not None or any(
        component_kind(base, part) != OURS[part] for part in ("dvae", "transformer")
    )


def finetune_published(
    data: str | Source,
    out: Path,
    base: Path,
    *,
    name: str,
    rank: int | None = None,
    settings: Sequence[str] = (),
    device: torch.device,
    dtype: torch.dtype,
    quiet: bool = False,
    world: World = ALONE,
) -> Path:
    """Train the token model of `base` on, on the pairs in `data`; return the model folder `out`.

    Args:
        rank: of the adapters; None trains all weights.
        settings: `transformer_training.K=V`, such as `transformer_training.epochs=30`.
        others: as of `dalle.training.finetune.finetune`.

    Raises:
        ValueError: bad data, a folder in use, settings that are none, or a resume that differs.
        Stopped: after a signal; the same call goes on.
    """
    if world.size != 1:
        raise ValueError("a published model is fine-tuned by one process: start one")
    verified = VerifiedFolder(base)
    with train.locked(out, world):
        source = Source.of(data)
        pairs, _ = train.read(source, out, world)
        learned, held_out = train.split(source, pairs)
        training = training_for(len(learned), settings, rank)
        identity = {
            "training": training.model_dump(mode="json"),
            "lora": rank,
            "base": {"name": name, "sha256": verified.sha256},
            "data": pairs.fingerprint,
            "dtype": str(dtype).removeprefix("torch."),
        }
        train.refuse_other_settings(out, identity, world)
        if (out / "manifest.json").exists():
            logger.info("%s is finished", out)
            return out
        model = load_model(base)
        if not model.dvae.has_encoder:
            raise ValueError(
                f"{base}: its image tokenizer was published without its encoder: it cannot read pictures"
            )
        model.dvae.to(device)
        folder = encode_part(pairs, model.dvae, out / "run", crop="center", seed=SEED)
        store = TokenStore(folder)
        stage = _stage(
            model, training, [sequences([store], part) for part in (learned, held_out)], rank, device
        )
        state = train_stage(stage, out / "run", dtype, quiet, world)
        _write(out, base, stage, state, rank, model)
    logger.info("%s is a model now; next: dalle generate CAPTION --model %s", out, out)
    return out


def training_for(n_train: int, settings: Sequence[str], rank: int | None) -> TransformerTraining:
    """Return how long and by which steps `n_train` pictures are learned; ValueError for settings that are none."""
    defaults = dict(DEFAULTS)
    if rank is None:
        defaults["learning_rate"] /= 10
    tree = override({"transformer_training": defaults}, settings)
    unknown = [key for key in tree if key != "transformer_training"]
    if unknown:
        raise ValueError(f"{unknown[0]} is not a setting here; only transformer_training is trained")
    table = dict(tree["transformer_training"])
    epochs = table.pop("epochs")
    if not isinstance(epochs, int | float) or isinstance(epochs, bool) or not epochs > 0:
        raise ValueError(f"transformer_training.epochs is {epochs!r}: it must be a number above 0")
    steps = table.setdefault("steps", max(2, round(epochs * n_train / table["batch_size"])))
    every = max(1, round(steps / N_VALIDATIONS))
    table = {
        "warmup_steps": max(1, steps // 20),
        "validate_every": every,
        "checkpoint_every": every,
        "sheet_every": 5 * every,
    } | table
    training = validate(TransformerTraining, table, "finetune")
    if training.dropout or training.token_noise or training.bpe_dropout:
        raise ValueError("dropout, token_noise and bpe_dropout are of our own transformer: leave them out")
    return training


def _stage(
    model: Model, training: TransformerTraining, parts: Sequence[Any], rank: int | None, device: torch.device
) -> TransformerStage:
    network = cast(nn.Module, model.transformer)
    network.to(device=device, dtype=torch.float32)
    torch.manual_seed(SEED)
    kind: type[TransformerStage] = TransformerStage
    if rank is not None:
        add_adapters_(network, rank)
        kind = AdapterStage
    return kind(
        network,
        training,
        model.tokenizer,
        model.dvae,
        *parts,
        seed=SEED,
        balance=None,
        sampling=model.defaults,
    )


def _write(
    out: Path, base: Path, stage: TransformerStage, state: dict[str, Tensor], rank: int | None, model: Model
) -> None:
    """Write the model folder: the kept components byte for byte, the token model in the dtype that it had."""
    for part in ("tokenizer", "dvae", "clip", "judge"):
        if (base / part).is_dir() and not (out / part).is_dir():
            with files.atomic_folder(out / part) as partial:
                shutil.copytree(base / part, partial, dirs_exist_ok=True)
    network = cast(nn.Module, stage.network)
    if rank is None:
        network.load_state_dict(state)
        tensors: Mapping[str, Tensor] = network.state_dict()
    else:
        load_adapters_(network, state)
        weights.save_tensors(out / ADAPTER, state, {"rank": str(rank), "format": "dalle LoRA"})
        tensors = merged(network)
    stored = _stored_dtype(base)
    tensors = {key: x.to(stored) if x.is_floating_point() else x for key, x in tensors.items()}
    config: Any = model.transformer.config
    weights.save_component(out / "transformer", config, tensors)
    kinds = {part: component_kind(base, part) for part in ("tokenizer", "dvae", "transformer")}
    write_index(out, model.defaults, kinds)


def _stored_dtype(base: Path) -> torch.dtype:
    file = sorted((base / "transformer").glob("*.safetensors"))[0]
    dtypes = [x.dtype for x in weights.load_header(file).values() if x.is_floating_point()]
    return max(set(dtypes), key=dtypes.count)
