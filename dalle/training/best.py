"""The weights of a stage's best validation: kept on disk beside its checkpoints, and what ends a stage early.

CHECKPOINTS/best-N/  weights.safetensors: the averaged weights after N updates
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle import files, weights

FILE = "weights.safetensors"


class Best:
    """Remember the best of a stage's validations, and count those since then.

    `patience` is the number of validations in a row without a better one that ends the stage. `is_main`: of several
    processes, which all make the same calls with the same numbers, one writes.
    """

    def __init__(self, root: Path, patience: int, is_main: bool = True) -> None:
        self.root, self.patience, self.is_main = root, patience, is_main
        self.step: int | None = None  # of the best validation
        self.score = 0.0  # the higher, the better
        self.n_since = 0  # validations
        self._before: int | None = None  # the best at the checkpoint before: that one may have to serve

    @property
    def is_over(self) -> bool:
        """Whether so many validations were no better that the stage has ended."""
        return self.n_since >= self.patience

    def take(self, step: int, score: float, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Take the score of a validation after `step` updates; `tensors` gives the weights that it was made with."""
        if self.step is not None and not score > self.score:
            self.n_since += 1
            return
        kept = tensors()  # all processes gather them
        if self.is_main:
            folder = self._folder(step)
            if folder.exists():  # of a process that was killed before its next checkpoint
                shutil.rmtree(folder)
            with files.atomic_folder(folder) as partial:
                weights.save_tensors(partial / FILE, kept)
        self.step, self.score, self.n_since = step, score, 0

    def load(self) -> dict[str, Tensor]:
        """Read the best weights; only the main process has any."""
        assert self.step is not None, "a stage that keeps its best weights validates before its first update"
        return weights.load_tensors(self._folder(self.step) / FILE) if self.is_main else {}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        return {"step": self.step, "score": self.score, "n_since": self.n_since}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state; ValueError when the weights that it names are gone."""
        self.step, self.score, self.n_since = state["step"], state["score"], state["n_since"]
        self._before = self.step
        if self.is_main and self.step is not None and not (self._folder(self.step) / FILE).is_file():
            raise ValueError(
                f"{self._folder(self.step)}: the best weights so far are gone: delete {self.root} to start the stage again"
            )

    def checkpoint_written(self) -> None:
        """Drop the weights that neither this checkpoint nor the one before names."""
        named = {self._folder(step) for step in (self.step, self._before) if step is not None}
        for folder in self.root.glob("best-*") if self.is_main else ():
            if folder not in named:
                shutil.rmtree(folder)
        self._before = self.step

    def _folder(self, step: int) -> Path:
        return self.root / f"best-{step}"
