"""Modules that are one component of a model folder: a config and its weights, which are mapped, not copied."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from dalle.config import Config, validate
from dalle.weights import (
    CONFIG,
    WEIGHTS,
    load_component,
    load_tensors,
    read_json,
    save_component,
)

INDEX = "model.safetensors.index.json"  # of weights in several files: in which one each tensor lies


def shard_name(number: int, n_shards: int) -> str:
    """Name one of several weight files, as the Hub does."""
    return f"model-{number:05d}-of-{n_shards:05d}.safetensors"


class SavedModule(nn.Module):
    """A module with `save_pretrained` and `from_pretrained`; a subclass names the schema of its config."""

    schema: ClassVar[type[Config]]
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors to `folder`."""
        save_component(Path(folder), self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Map what `save_pretrained` or an import wrote, in the dtype it is stored in, on the CPU, in eval mode.

        Raises ValueError for files that are missing, damaged or of another model.
        """
        folder = Path(folder)
        if (folder / INDEX).is_file():
            config = validate(cls.schema, read_json(folder / CONFIG), str(folder / CONFIG))
            tensors = _load_shards(folder)
        else:
            config, tensors = load_component(folder, cls.schema)
        with torch.device("meta"):  # no time spent on weights that are overwritten
            model = cls(config)
        own = model.state_dict()
        wrong = [name for name in own if name not in tensors or tensors[name].shape != own[name].shape]
        wrong += [name for name in tensors if name not in own]
        if wrong:
            raise ValueError(f"{folder}: the weights do not fit the config: {', '.join(wrong[:4])}")
        model.load_state_dict(tensors, assign=True)
        return model.eval()


def _load_shards(folder: Path) -> dict[str, Tensor]:
    index = read_json(folder / INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not name.endswith(WEIGHTS.rpartition(".")[2]):
            raise ValueError(f"{folder / INDEX} names {name!r}, which is no weight file beside it")
        tensors |= load_tensors(folder / name)
    if tensors.keys() != places.keys():
        raise ValueError(f"{folder}: the shards do not hold what {INDEX} says")
    return tensors
