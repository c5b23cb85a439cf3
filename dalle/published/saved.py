"""Modules that are one component of a model folder: a config and its weights."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import ClassVar, Self

from torch import nn

from dalle.config import Config
from dalle.weights import load_module, save_component


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
    def from_pretrained(cls, folder: str | PathLike[str]) -> Self:
        """Read what `save_pretrained` wrote, in float32 on the CPU, in eval mode; ValueError if it is damaged."""
        return load_module(folder, cls.schema, cls, cls.__name__)
