"""What an evaluation is about: the model, the held-out pictures, the settings; and where its finished parts lie."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from dalle import files, weights
from dalle.config import Config
from dalle.data.pairs import PairSet
from dalle.evaluation.efficientnet import VARIANTS
from dalle.evaluation.features import (
    ClipFeatures,
    EfficientNetFeatures,
    FeatureExtractor,
    ScriptedFeatures,
    extract,
)
from dalle.evaluation.galleries import Galleries, Thumbnails, zero_shot_rows
from dalle.evaluation.pictures import PictureReader
from dalle.evaluation.protocols import Draws, draw
from dalle.evaluation.sheets import spread
from dalle.generation.rerank import Ranker
from dalle.pipeline import DallePipeline

NOT_HELD_OUT = ("train", "excluded")
CANDIDATES = 16  # a caption, where the model has a CLIP and says nothing itself
CAPTIONS_A_PART = 16
N_NEIGHBOURS = 16
Report = Callable[[int, int], None]  # called with (units of work done, of how many)


class Settings(Config):
    """What is asked of an evaluation; the same settings, model and data give the same figures."""

    splits: tuple[str, ...] | None = None  # None: all but train and excluded
    limit: Annotated[int, Field(ge=1)] | None = None  # pictures of a split, and captions drawn
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    candidates: Annotated[int, Field(ge=1)] | None = None  # a caption; None: the model's default
    probe: str = "group"  # field that the linear probe predicts
    curve_candidates: Annotated[int, Field(ge=2, le=2**13)] = (
        512  # a caption, for the curves over rerank size
    )
    networks: tuple[str, ...] = ("lite0",)  # "lite0", "lite1", "judge", or a TorchScript file


class Parts:
    """Finished parts of an evaluation on disk, so that a killed one goes on; those of other settings are dropped."""

    def __init__(self, folder: Path, identity: object) -> None:
        text = json.dumps(identity, sort_keys=True, default=str)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]

    def figures(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the JSON tree of a part, computed if it is not there."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            files.write_json(path, compute())
        return files.read_json(path)

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors of a part, computed if they are not there."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            weights.save_tensors(path, compute())
        return weights.load_tensors(path)

    def remove(self) -> None:
        """Remove all parts, those of other settings too: the report that they were for is written."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)


class Progress:
    """Counts units of work (about a picture read, drawn or encoded) over sections of known sizes."""

    def __init__(self, report: Report | None, sizes: dict[str, int]) -> None:
        self._report, self._sizes, self._before, self._done = report, sizes, 0, 0
        self._section = 0

    def start(self, section: str) -> None:
        """Begin a section."""
        self._section = self._sizes[section]
        self._done = 0

    def __call__(self, n: int) -> None:
        self._done = min(self._section, self._done + n)
        if self._report is not None:
            self._report(self._before + self._done, sum(self._sizes.values()))

    def finish(self) -> None:
        """Count the rest of the section, whatever was left out or known already."""
        self(self._section)
        self._before += self._section
        self._section = self._done = 0


@dataclass
class Subject:
    """A model on a data set, as every section of a report sees them."""

    pipe: DallePipeline
    pairs: PairSet
    settings: Settings
    members: dict[str, list[int]]  # split -> pairs measured
    out: Path
    parts: Parts
    advance: Callable[[int], None] = lambda n: None

    @cached_property
    def reader(self) -> PictureReader:
        """Reads pictures at the model's size, and knows the unreadable ones."""
        return PictureReader(self.pipe.dvae.output_size)

    @cached_property
    def galleries(self) -> Galleries:
        """The galleries of the whole data set; the neighbours of a row need a network."""
        if self.memory_network is None:
            return Galleries(self.pairs)
        every = F.normalize(self.picture_features(), dim=-1)
        nearest = (every[self.rows] @ every.T).topk(min(N_NEIGHBOURS + 1, len(every)), dim=1).indices.tolist()
        return Galleries(
            self.pairs,
            {
                row: [index for index in found if index != row][:N_NEIGHBOURS]
                for row, found in zip(self.rows, nearest, strict=True)
            },
        )

    def picture_features(self) -> Tensor:
        """Features (M, D) of all pictures by the network that looks for copies; zeros of unreadable ones."""
        network = self.memory_network
        assert network is not None

        def compute() -> dict[str, Tensor]:
            found: dict[int, Tensor] = {}
            for positions, pictures in self.reader.batches(self.pairs.pairs):
                found.update(zip(positions, extract(network, [pictures], self.advance)[0], strict=True))
            width = len(next(iter(found.values()), torch.zeros(1)))
            return {
                "features": torch.stack([found.get(i, torch.zeros(width)) for i in range(len(self.pairs))])
            }

        return self.parts.tensors(f"pictures-{network.sha256[:8]}", compute)["features"]

    @cached_property
    def small(self) -> Thumbnails:
        """The thumbnails of the whole data set, as far as they are needed."""
        return Thumbnails(self.pairs, self.reader)

    @cached_property
    def everyone(self) -> list[int]:
        """All measured pairs."""
        return [index for found in self.members.values() for index in found]

    @cached_property
    def hard(self) -> list[int]:
        """All pairs marked as hard combinations."""
        return zero_shot_rows(self.pairs)

    @cached_property
    def rows(self) -> list[int]:
        """The pairs whose captions are drawn: the hard ones, or the measured ones where none is marked."""
        return spread(self.hard or self.everyone, self.settings.limit or len(self.pairs))

    @cached_property
    def train(self) -> list[int]:
        """The pairs of split train."""
        return indices_of(self.pairs, "train")

    @cached_property
    def rankers(self) -> dict[str, Ranker]:
        """The model's CLIPs: `clip` chooses among candidates, `judge` only judges."""
        both = {"clip": self.pipe.ranker, "judge": self.pipe.load_judge()}
        return {name: ranker for name, ranker in both.items() if ranker is not None}

    @cached_property
    def extractors(self) -> list[FeatureExtractor]:
        """The networks that measure distances; ValueError for one that is not there."""
        return [self._extractor(name) for name in self.settings.networks]

    @cached_property
    def memory_network(self) -> FeatureExtractor | None:
        """The network that looks for copies: one that no loss and no choice uses."""
        return EfficientNetFeatures("lite1", 64) if self.settings.networks else None

    def _extractor(self, name: str) -> FeatureExtractor:
        if name in VARIANTS:
            return EfficientNetFeatures(name)
        if name == "judge":
            if name not in self.rankers:
                raise ValueError("network 'judge' is not in the model folder: leave it out")
            return ClipFeatures(self.rankers[name])
        if not Path(name).is_file():
            known = ", ".join((*VARIANTS, "judge"))
            raise ValueError(f"network {name!r} is unknown: use {known}, or a TorchScript file")
        return ScriptedFeatures(Path(name))

    @cached_property
    def n_candidates(self) -> int:
        """Drawn for each caption; without a CLIP one suffices, and another seed's."""
        default = self.pipe.defaults.candidates or CANDIDATES
        return self.settings.candidates or (max(2, default) if "clip" in self.rankers else 2)

    def captions(self, rows: Sequence[int]) -> list[str]:
        """The first caption of each pair."""
        return [self.pairs[row].captions[0] for row in rows]

    def draws(self) -> Draws:
        """The candidates of every row, drawn once; a killed evaluation loses at most 16 captions of them."""
        return self.draw(self.rows, self.n_candidates, "draws")

    def draw(self, rows: Sequence[int], n_candidates: int, name: str) -> Draws:
        """Candidates of these pairs' captions, kept under a name; candidate j of caption i has seed + i * C + j."""
        found = list[dict[str, Tensor]]()
        for start in range(0, len(rows), CAPTIONS_A_PART):
            part = rows[start : start + CAPTIONS_A_PART]

            def compute(part: Sequence[int] = part, start: int = start) -> dict[str, Tensor]:
                seed = self.settings.seed + start * n_candidates
                drawn = draw(self.pipe, self.captions(part), seed, n_candidates, self.advance)
                return {"tokens": drawn.tokens} | ({} if drawn.chosen is None else {"chosen": drawn.chosen})

            found.append(self.parts.tensors(f"{name}-{start:05d}", compute))
        chosen = [part["chosen"] for part in found if "chosen" in part]
        return Draws(torch.cat([part["tokens"] for part in found]), torch.cat(chosen) if chosen else None)


def choose(pairs: PairSet, splits: Sequence[str] | None, limit: int | None) -> dict[str, list[int]]:
    """Indices of the pairs to measure, by split; ValueError when a split is unknown or none is held out."""
    there = ", ".join(f"{name} {count}" for name, count in pairs.counts.items()) or "no pictures"
    if splits is None:
        splits = [name for name in pairs.counts if name not in NOT_HELD_OUT]
    unknown = [name for name in splits if name not in pairs.counts]
    if unknown:
        raise ValueError(f"split {unknown[0]!r} is not in the data, which have {there}: choose among these")
    if not splits:
        raise ValueError(f"nothing is held out, the data have {there}: name the splits to measure on")
    return {name: spread(indices_of(pairs, name), limit or len(pairs)) for name in dict.fromkeys(splits)}


def indices_of(pairs: PairSet, split: str) -> list[int]:
    """The pairs of a split."""
    return [index for index, pair in enumerate(pairs) if pair.split == split]
