"""Modules that are one component of a model folder: a config and its weights, which are mapped, not copied."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import ClassVar, Protocol, Self, cast

import torch
from torch import Tensor, nn

from dalle.config import Config, validate
from dalle.files import read_json
from dalle.manifest import CONFIG, checked_component
from dalle.weights import WEIGHTS, load_tensors, save_component

SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")  # as on the Hub


def shard_name(number: int, n_shards: int) -> str:
    """Name one of several weight files; the first is 1."""
    return f"model-{number:05d}-of-{n_shards:05d}.safetensors"


def weight_files(folder: Path) -> list[str]:
    """Name the weight files of a component: one, or all shards of it; ValueError where one is missing."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    found = [
        match for path in sorted(folder.glob("model-*.safetensors")) if (match := SHARD.fullmatch(path.name))
    ]
    n_shards = int(found[0][2]) if found else 0
    names = [shard_name(number, n_shards) for number in range(1, n_shards + 1)]
    if not names or [match[0] for match in found] != names:
        raise ValueError(f"{folder} has {len(found)} of {n_shards} weight files: copy the model again")
    return names


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
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Map what `save_pretrained` or an import wrote, in the dtype it is stored in, on the CPU, in eval mode.

        Raises ValueError for files that are missing, damaged or of another model.
        """
        path = Path(folder)
        if not path.is_dir():
            raise ValueError(f"{path}: no such folder")
        names = weight_files(path)
        component = checked_component(folder, (CONFIG, *names))
        config = validate(cls.schema, read_json(component.path / CONFIG), str(component.path / CONFIG))
        with torch.device("meta"):  # no time is spent on first weights that are overwritten
            model = cls(config)
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= load_tensors(component.path / name)
        own = model.state_dict()
        wrong = [name for name in own if name not in tensors or tensors[name].shape != own[name].shape]
        wrong += [name for name in tensors if name not in own]
        if wrong:
            raise ValueError(f"{path}: the weights do not fit the config: {', '.join(wrong[:4])}")
        model.load_state_dict(tensors, assign=True)
        return model.eval()


class ImageTokenizerSizes(Protocol):
    """What the config of a published image tokenizer says."""

    @property
    def image_size(self) -> int:
        """Return the pixels a side."""

    @property
    def grid_size(self) -> int:
        """Return the tokens a side, G."""

    @property
    def n_codes(self) -> int:
        """Return the size of the codebook, K."""


class SavedImageTokenizer(SavedModule):
    """A published image tokenizer: it draws pictures of the size that it reads."""

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return self._sizes.image_size

    @property
    def output_size(self) -> int:
        """Pixels a side of what `decode` gives: the same."""
        return self._sizes.image_size

    @property
    def grid_size(self) -> int:
        """Tokens a side, G."""
        return self._sizes.grid_size

    @property
    def n_codes(self) -> int:
        """Size of the codebook, K."""
        return self._sizes.n_codes

    @property
    def _sizes(self) -> ImageTokenizerSizes:
        return cast(ImageTokenizerSizes, self.config)
