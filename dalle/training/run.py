"""One call of `train`: what its stages share, and what it remembers of those that are done."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from dalle import files, manifest
from dalle.config import differences
from dalle.data.pairs import PairSet
from dalle.data.reading import BadSampleLog
from dalle.data.source import Source
from dalle.model_folder import OURS, component_kind
from dalle.training.processes import ALONE, World
from dalle.training.recipe import Recipe

logger = logging.getLogger(__name__)

CONTINUED = frozenset({"transformer", "clip"})  # by `train`, which keeps a given dVAE as it is


@dataclass(frozen=True)
class Run:
    """One call of `train`: everything its stages share."""

    out: Path
    recipe: Recipe
    data: Source
    pairs: PairSet
    train: list[Any]
    held_out: list[Any]
    bad: BadSampleLog
    device: torch.device
    dtype: torch.dtype
    init_from: Path | None
    quiet: bool
    world: World = ALONE
    stages: tuple[str, ...] = ()  # in their order
    base: str | None = None  # the name of the model in --init-from
    continued: frozenset[str] = CONTINUED  # components that are trained on where they are given

    @property
    def data_name(self) -> str:
        """What a card calls the data: no path of this machine."""
        return f"`{self.data.name}`"

    @property
    def folder(self) -> Path:
        """Where everything lives that is not the model."""
        return self.out / "run"

    def given(self, component: str) -> Path | None:
        """The folder of `component` in --init-from, if it is there."""
        folder = self.init_from / component if self.init_from else None
        return folder if folder and folder.is_dir() else None

    def kind(self, component: str) -> str:
        """Return the class of a component: ours, or that of the given one."""
        if self.init_from is None or self.given(component) is None:
            return OURS[component]
        return component_kind(self.init_from, component)

    def records(self) -> dict[str, dict[str, Any]]:
        """What run/stages.json says of each finished stage: its inputs and the hash of its result."""
        path = self.folder / "stages.json"
        return dict(files.read_json(path)) if path.exists() else {}

    def exists(self, stage: str) -> bool:
        """Whether a stage's component is there, or is given."""
        return stage in self.records() or self.given(stage) is not None

    def finished(self, stage: str, inputs: dict[str, Any], result: str | None) -> bool:
        """Whether `stage` is done, from these very inputs, and its result untouched; a stale one is an error."""
        record = self.records().get(stage)
        if record is None:
            # The folder is no finished model from now on; its new parts would not be those of the old manifest.
            for name in (manifest.MANIFEST, "model_index.json"):
                (self.out / name).unlink(missing_ok=True)
            return False
        changed = differences(record["inputs"], inputs)
        if changed or record["result"] != result:
            self._refuse_stale(
                stage, changed or [f"the files in {self.out / stage} are not what the stage wrote"]
            )
        logger.info("%s: finished before, kept", stage)
        return True

    def begin(self, stage: str, inputs: dict[str, Any]) -> None:
        """Note beside its checkpoints what `stage` is made from; those that were made from other things are an error."""
        begun = self.folder / "checkpoints" / stage / "inputs.json"
        with self.world.main_first():
            if not begun.exists():
                files.write_json(begun, inputs)
        changed = differences(files.read_json(begun), inputs)
        if changed:
            self._refuse_stale(stage, changed)

    def _refuse_stale(self, stage: str, changed: list[str]) -> NoReturn:
        raise ValueError(
            f"stage {stage} in {self.out} is stale ({'; '.join(changed)}): delete {self.out / stage} and "
            f"{self.folder / 'checkpoints' / stage}, and its entry in {self.folder / 'stages.json'}, to run it again"
        )

    def record(self, stage: str, inputs: dict[str, Any], result: str) -> None:
        """Note that `stage` is done: what it was made from, and the hash of what came out."""
        records = self.records()
        records[stage] = {"inputs": inputs, "result": result}
        files.write_json(self.folder / "stages.json", records)
