"""Checkpoints of a stage: written whole or not at all, checked when read, the last two kept.

CHECKPOINTS/step-N/  weights.safetensors  average.safetensors  optimizer.safetensors  state.json  manifest.json
"""

import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle import files, manifest, weights
from dalle.training.optim import MovingAverage

KEPT = 2
FILES = ("weights.safetensors", "average.safetensors", "optimizer.safetensors", "state.json")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint: the step it was taken after, and its folder."""

    step: int
    folder: Path


def _folders(root: Path) -> list[Checkpoint]:
    found = []
    for folder in root.glob("step-*") if root.is_dir() else ():
        match = re.fullmatch(r"step-(\d+)", folder.name)
        if match and folder.is_dir():
            found.append(Checkpoint(int(match[1]), folder))
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint whose files all have their checksums; broken ones are named and passed over."""
    broken = []
    for checkpoint in _folders(root):
        try:
            manifest.VerifiedFolder(checkpoint.folder)
        except (ValueError, OSError) as error:
            broken.append(str(error))
            logger.warning(
                "checkpoint %s is broken (%s): trying the one before", checkpoint.folder.name, error
            )
            continue
        return checkpoint
    if broken:
        raise ValueError(
            f"{root}: every checkpoint is broken ({broken[0]}): delete the folder to start the stage again"
        )
    return None


def save(
    root: Path,
    step: int,
    model: nn.Module,
    average: MovingAverage,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Path:
    """Write `root/step-N` atomically, then drop all but the last two; returns the folder."""
    target = cleared(root, step)
    with files.atomic_folder(target) as folder:
        weights.save_tensors(folder / FILES[0], model.state_dict())
        weights.save_tensors(folder / FILES[1], average.tensors)
        weights.save_tensors(folder / FILES[2], _optimizer_tensors(model, optimizer))
        files.write_json(folder / FILES[3], {"step": step, **state})
        manifest.write_manifest(folder, FILES)
    drop_old(root)
    return target


def cleared(root: Path, step: int) -> Path:
    """The folder that checkpoint `step` will be, with nothing in its way."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    target = root / f"step-{step}"
    if target.exists():
        shutil.rmtree(target)  # only a broken one can stand in the way: `newest` passed over it
    return target


def drop_old(root: Path) -> None:
    """Keep the last two checkpoints only."""
    for old in _folders(root)[KEPT:]:
        shutil.rmtree(old.folder)


def restore(
    checkpoint: Checkpoint, model: nn.Module, average: MovingAverage, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put everything back as it was after `checkpoint.step` updates; returns the saved state."""
    weights.load_strict(model, weights.load_tensors(checkpoint.folder / FILES[0]), FILES[0])
    averaged = weights.load_tensors(checkpoint.folder / FILES[1])
    for name, tensor in average.tensors.items():
        tensor.copy_(averaged[name])
    _restore_optimizer(model, optimizer, weights.load_tensors(checkpoint.folder / FILES[2]))
    state = files.read_json(checkpoint.folder / FILES[3])
    if not isinstance(state, dict) or state.get("step") != checkpoint.step:
        raise ValueError(f"{checkpoint.folder / FILES[3]}: not the state of step {checkpoint.step}")
    return state


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = torch.as_tensor(value)
    return tensors


def _restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    parameters = dict(model.named_parameters())
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("/")
        parameter = parameters[name]
        device = parameter.device
        optimizer.state[parameter][key] = value.to(device).contiguous(memory_format=torch.preserve_format)
        if value.shape == parameter.shape and parameter.ndim == 4:
            layout = torch.empty_like(parameter)  # moments keep the layout of their parameter (channels_last)
            optimizer.state[parameter][key] = layout.copy_(value.to(device))
