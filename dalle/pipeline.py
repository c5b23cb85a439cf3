"""DallePipeline: tokenizer, dVAE and transformer as one object that turns captions into pictures.

Source: DALL·E §2 (the two stages) and §2.6 (sampling); the shape of the interface is that of `diffusers`.
Shapes: R pictures (rows), G grid side.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Unpack

import torch
from PIL import Image
from torch import Tensor

from dalle.config import validate
from dalle.generation.engine import Engine
from dalle.generation.precision import as_dtype, dtype_name, held_dtype, threads
from dalle.generation.recipe import MAX_THREADS, Origin, Recipe
from dalle.generation.request import GenerationOptions, ImageRequest, ModelDefaults, RequestFields
from dalle.generation.rerank import CHUNK, Ranker
from dalle.generation.rerun import Progress, rerun
from dalle.generation.sampler import Sampler
from dalle.image_tokenizer import ImageTokenizer
from dalle.manifest import VerifiedFolder
from dalle.model_folder import (
    Model,
    check_fit,
    load_model,
    load_token_model,
    model_folder,
    model_sha256,
    push_model,
    save_model,
)
from dalle.token_model import TokenModel
from dalle.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

RowCallback = Callable[["DallePipeline", int, Tensor], bool | None]


@dataclass(frozen=True)
class PipelineOutput:
    """Pictures of one call, best first where they were ranked; every field has one entry for each picture."""

    images: tuple[Image.Image, ...]  # RGB; empty with output_type="tokens"
    scores: tuple[float, ...] | None  # by CLIP; None without one
    seeds: tuple[int, ...]
    tokens: Tensor  # (R, G, G) int64 on the CPU
    captions: tuple[str, ...]
    recipes: tuple[dict[str, object], ...]  # JSON-ready; what `rerun` takes
    is_stopped: bool = False  # the callback ended the run: only finished pictures are here


class DallePipeline:
    """Draws pictures from captions.

    Raises:
        ValueError: the components do not fit together.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        dvae: ImageTokenizer,
        transformer: TokenModel,
        defaults: GenerationOptions | None = None,
        ranker: Ranker | None = None,
    ) -> None:
        check_fit(tokenizer, dvae, transformer)
        self.tokenizer, self.dvae = tokenizer, dvae
        self.sampler = Sampler(tokenizer, dvae, transformer, ModelDefaults.of(defaults))
        self.ranker = ranker  # orders what is drawn; a model folder with a clip/ has one of its own
        self.name = "unsaved"  # folder or Hub id, for people
        self._source: VerifiedFolder | None = None  # as it was when it was loaded
        self._model_sha256: str | None = None
        self._has_auto_dtype = False

    # Load, place, save

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        native: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> DallePipeline:
        """Load a model folder, a Hugging Face Hub id, or, with None, the model that ships in the package.

        Args:
            source: an existing folder wins over a Hub id of the same name.
            dtype: of the transformer: "float32", "bfloat16", "int8" (linear maps in 8 bits: faster for one or two
                pictures on a CPU, at some loss), or "auto": the device's `default_dtype`.
            device: where to put the model.
            native: draw with compiled attention, see `dalle.generation.kernels.native`.
            revision: branch, tag or commit on the Hub.
            cache_dir: of the Hub; HF_HOME and HF_HUB_OFFLINE are honoured.

        Raises:
            ValueError: nothing there, a file missing or changed, components that do not fit together, or no C
                compiler for `native`.
        """
        model = load_model(model_folder(source, revision, cache_dir))
        pipe = cls(model.tokenizer, model.dvae, model.transformer, model.defaults, model.ranker)
        pipe.name = "bundled" if source is None else str(source)
        if pipe.ranker is not None:
            pipe.ranker.name = pipe.name
        pipe._source, pipe._model_sha256 = model.source, model.source.sha256 if model.source else None
        # Compiles now, and not at the first drawing.
        pipe.sampler.engine = Engine(model.transformer, is_native=native)
        return pipe.to(device, dtype)

    def to(self, device: str | torch.device, dtype: str | torch.dtype | None = None) -> DallePipeline:
        """Move the models and cast the transformer; "auto" takes the device's `default_dtype`."""
        device, transformer = torch.device(device), self.transformer
        if dtype is not None:
            self._has_auto_dtype = dtype == "auto"
        wanted = "auto" if self._has_auto_dtype else dtype
        target = self.dtype if wanted is None else as_dtype(wanted, device)
        held = held_dtype(target)
        if held.itemsize > held_dtype(self.dtype).itemsize and self._source is not None:
            transformer = self._load_transformer(held)
        transformer.to(device, held)
        if transformer is not self.transformer or target != self.dtype:
            self.sampler.engine = Engine(transformer, is_int8=target == torch.int8, is_native=self.is_native)
        # The dVAE stays in float32: it costs little, and a kept picture's tokens must not depend on dtype.
        self.dvae.to(device)
        if self.ranker is not None:
            self.ranker.clip.to(device)
        return self

    @property
    def transformer(self) -> TokenModel:
        """Return what draws image tokens."""
        return self.sampler.transformer

    @property
    def defaults(self) -> ModelDefaults:
        """Return the settings where a call says nothing."""
        return self.sampler.defaults

    @property
    def components(self) -> dict[str, TextTokenizer | ImageTokenizer | TokenModel]:
        """Return the parts by name, as the constructor takes them."""
        return {"tokenizer": self.tokenizer, "dvae": self.dvae, "transformer": self.transformer}

    @property
    def device(self) -> torch.device:
        """Return where the transformer is."""
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Return what the transformer computes in; torch.int8 where its linear maps are rounded to that."""
        return self.sampler.engine.dtype

    @property
    def is_native(self) -> bool:
        """Say whether it draws with compiled attention."""
        return self.sampler.engine.is_native

    @property
    def model_sha256(self) -> str:
        """Return the sha256 of the model folder's manifest.json; of an unsaved model, what saving would give."""
        if self._model_sha256 is None:
            self._model_sha256 = model_sha256(self._model)
        return self._model_sha256

    def load_judge(self) -> Ranker | None:
        """Load the second CLIP of the model folder, which only evaluations ask; None where there is none."""
        if self._source is None or not (self._source.path / "judge").is_dir():
            return None
        return Ranker.from_pretrained(self._source, "judge")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a model folder, weights in the dtype they are held in.

        A new folder appears whole; an existing one counts as a model only once all is written.
        """
        held = held_dtype(self.dtype)
        if self._source is not None and held != torch.float32:
            logger.warning("saving %s weights: load with dtype='float32' to keep all their digits", held)
        self._model_sha256 = save_model(self._model, Path(folder))
        self.name = str(folder) if self._source is None else self.name

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the model folder to the Hugging Face Hub and return its address; ValueError where the Hub refuses."""
        return push_model(self._model, repo_id, private=private, token=token)

    @property
    def _model(self) -> Model:
        parts = (self.tokenizer, self.dvae, self.transformer, self.defaults, self.ranker)
        return Model(*parts, source=self._source)

    def _load_transformer(self, dtype: torch.dtype) -> TokenModel:
        """Read the transformer again, in another dtype than it is held in, so that no digits are missing."""
        if self._source is None:
            raise ValueError(
                f"recipe is of {dtype_name(dtype)}; this model is held in {dtype_name(held_dtype(self.dtype))} only:"
                " load it from its folder"
            )
        model = load_token_model(self._source.path / "transformer", type(self.transformer).__name__)
        model.to(self.device, dtype)
        return model

    # Draw

    def __call__(
        self,
        prompt: str | Sequence[str] | ImageRequest,
        *,
        output_type: Literal["pil", "tokens"] = "pil",
        ranker: Ranker | None = None,
        progress: Progress | None = None,
        callback_on_row_end: RowCallback | None = None,
        rows_per_batch: int | None = None,
        n_threads: int | None = None,
        **fields: Unpack[RequestFields],
    ) -> PipelineOutput:
        """Draw `num_images_per_prompt` pictures for each caption; candidate i of the call uses seed + i.

        Args:
            prompt: one caption or several, described further by the keywords of `ImageRequest`; or such a request.
            output_type: "tokens" leaves out the pictures.
            ranker: a CLIP to order the candidates by, in place of the model's own.
            progress: called with (grid rows done, of how many) over all batches; ranking counts as one row a chunk.
            callback_on_row_end: called with (pipe, grid row, tokens (R, G, G) with -1 where not drawn yet);
                returning True stops the run, and finished pictures are returned.
            rows_per_batch: the most pictures drawn side by side; part of the recipe. None: 64, small models up to 256.
            n_threads: of the CPU, for drawing; None follows from the model's width and the number of pictures.

        Raises:
            InvalidRequest: a ValueError that names the field at fault, such as a caption too long.
            ValueError: another argument is outside what is allowed.
        """
        ranker = self.ranker if ranker is None else ranker
        if output_type not in ("pil", "tokens"):
            raise ValueError(f'output_type is {output_type!r}; allowed are "pil" and "tokens"')
        request = prompt if isinstance(prompt, ImageRequest) else ImageRequest(prompt, **fields)
        if n_threads is not None and not 1 <= n_threads <= MAX_THREADS:
            raise ValueError(f"n_threads is {n_threads}; choose 1..{MAX_THREADS}")
        sampler, requests = self.sampler, self.sampler.prepare(request, ranker)
        vectors = None if ranker is None else ranker.encode_captions(request.prompt, request.truncate)
        batches = sampler.plan(sampler.encode(requests), rows_per_batch)
        places = [(batch, row) for batch in batches for row in range(len(batch.seeds))]
        n_threads = n_threads or sampler.n_threads(min(len(places), batches[0].rows_per_batch))
        n_candidates, n_total = len(requests[0].seeds), len(batches) * self.dvae.grid_size
        n_total += 0 if ranker is None else len(requests) * math.ceil(n_candidates / CHUNK)
        counter = itertools.count(1)

        def advance(_: int = 1) -> None:
            n_done = next(counter)
            if progress is not None:
                progress(n_done, n_total)

        def on_row_end(row: int, tokens: Tensor) -> bool:
            advance()
            return callback_on_row_end is not None and bool(callback_on_row_end(self, row, tokens))

        tokens, is_stopped = sampler.sample_all(batches, on_row_end, n_threads)
        finished = [row for row in range(len(places)) if int(tokens[row].min()) >= 0]
        kept: dict[int, tuple[float | None, int | None]] = dict.fromkeys(finished, (None, None))
        if ranker is not None and vectors is not None:
            kept = {}
            for caption, vector in enumerate(vectors):
                rows = [row for row in finished if row // n_candidates == caption]
                best = sampler.choose(ranker, vector, tokens[rows], request.num_images_per_prompt, advance)
                kept |= {rows[place]: (score, rank) for rank, (place, score) in enumerate(best)}
        with threads(n_threads):
            pictures = sampler.pictures(tokens[[*kept]]) if output_type == "pil" else []
        origin = self.origin(n_threads, ranker)
        recipes = [Recipe.of(*places[row], tokens[row], origin, scored) for row, scored in kept.items()]
        return PipelineOutput(
            images=tuple(pictures),
            scores=None if ranker is None else tuple(float(score or 0) for score, _ in kept.values()),
            seeds=tuple(recipe.seed for recipe in recipes),
            tokens=tokens[[*kept]],
            captions=tuple(recipe.caption for recipe in recipes),
            recipes=tuple(recipe.model_dump(mode="json") for recipe in recipes),
            is_stopped=is_stopped,
        )

    def origin(self, n_threads: int, ranker: Ranker | None) -> Origin:
        """Return what a recipe says of this model, of a drawing with so many threads, and of who ranked it."""
        return Origin(
            model=self.name,
            model_sha256=self.model_sha256,
            dtype=dtype_name(self.dtype),
            device=self.device.type,
            threads=n_threads,
            native=self.is_native,
            ranker=None if ranker is None else ranker.name,
            ranker_sha256=None if ranker is None else ranker.sha256,
        )

    def rerun(
        self, recipe: Mapping[str, object], *, progress: Progress | None = None
    ) -> tuple[Image.Image, bool]:
        """Draw a picture again from a recipe, and say whether its tokens agree with the recorded hash.

        `recipe` is that of a PNG, or one of `PipelineOutput.recipes`. Raises ValueError for another model's.
        """
        wanted = validate(Recipe, dict(recipe), "recipe")
        if wanted.model_sha256 != self.model_sha256:
            raise ValueError(
                f"the recipe was made with model {wanted.model} ({wanted.model_sha256[:12]}), but {self.name}"
                f" ({self.model_sha256[:12]}) is loaded: load the recipe's model"
            )
        return rerun(wanted, self.sampler, self._load_transformer, progress)
