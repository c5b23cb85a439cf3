"""DallePipeline: tokenizer, dVAE and transformer as one object that turns captions into pictures.

Source: DALL·E §2 (the two stages) and §2.6 (sampling); the shape of the interface is that of `diffusers`.
Shapes: B captions, R pictures (rows), G grid side, N = G * G image tokens.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Unpack

import torch
from PIL import Image
from torch import Tensor, nn

from dalle import __version__
from dalle.config import validate
from dalle.dvae import DiscreteVAE
from dalle.files import atomic_folder, file_sha256, write_bytes
from dalle.generation.batch import Batch, plan_batches
from dalle.generation.completion import complete, region_to_draw
from dalle.generation.engine import Engine, rows_that_pay
from dalle.generation.precision import (
    as_dtype,
    decode_threads,
    default_dtype,
    dtype_name,
    held_dtype,
    threads,
)
from dalle.generation.recipe import MAX_THREADS, Origin, Recipe, batch_to_rerun, tokens_sha256
from dalle.generation.request import (
    CaptionRequest,
    Completion,
    GenerationOptions,
    ImageRequest,
    ModelDefaults,
    RequestFields,
    Truncation,
    blaming,
)
from dalle.generation.rerank import CHUNK, Ranker, best_first
from dalle.images import center_crop, to_images, to_tensor
from dalle.manifest import VerifiedFolder
from dalle.model_folder import check_fit, model_folder, one_line, read_index, write_index
from dalle.tokenizer import Tokenizer
from dalle.transformer import Transformer

logger = logging.getLogger(__name__)


RowCallback = Callable[["DallePipeline", int, Tensor], bool | None]
Progress = Callable[[int, int], None]


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
        tokenizer: Tokenizer,
        dvae: DiscreteVAE,
        transformer: Transformer,
        defaults: GenerationOptions | None = None,
        ranker: Ranker | None = None,
    ) -> None:
        check_fit(tokenizer, dvae, transformer)
        self.tokenizer = tokenizer
        self.dvae = dvae
        self.transformer = transformer
        self.ranker = ranker  # orders what is drawn; a model folder with a clip/ has one of its own
        self.defaults = ModelDefaults.of(defaults)
        self.name = "unsaved"  # folder or Hub id, for people
        self._folder: Path | None = None  # where it was loaded from
        self._verified: VerifiedFolder | None = None  # the same, as it was at load
        self._model_sha256: str | None = None
        self._has_auto_dtype = False
        self._is_int8 = False
        self.is_native = False  # draws with compiled attention
        self._engine = Engine(transformer)  # keeps the weights ready to draw from call to call

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
        """Loads a model folder, a Hugging Face Hub id, or, with None, the model that ships in the package.

        Args:
            source: an existing folder wins over a Hub id of the same name.
            dtype: of the transformer: "float32", "bfloat16", "int8" (linear maps in 8 bits: faster for one or two
                pictures on a CPU, at some loss), or "auto": the device's `default_dtype`.
            device: where to put the model.
            native: draw with compiled attention, see `dalle.generation.native`.
            revision: branch, tag or commit on the Hub.
            cache_dir: of the Hub; HF_HOME and HF_HUB_OFFLINE are honoured.

        Raises:
            ValueError: nothing there, a file missing or changed, components that do not fit together, or no C
                compiler for `native`.
        """
        folder = model_folder(source, revision, cache_dir)
        if not (folder / "model_index.json").is_file():
            raise ValueError(
                f"{folder} has no model_index.json: it is no model folder, or its training has not finished"
            )
        verified = VerifiedFolder(folder)
        defaults = read_index(folder / "model_index.json")
        pipe = cls(
            Tokenizer.from_pretrained(verified.component("tokenizer")),
            DiscreteVAE.from_pretrained(verified.component("dvae")),
            Transformer.from_pretrained(verified.component("transformer")),
            defaults,
            Ranker.from_pretrained(verified) if (folder / "clip").is_dir() else None,
        )
        pipe.name = "bundled" if source is None else str(source)
        if pipe.ranker is not None:
            pipe.ranker.name = pipe.name
        pipe._verified, pipe._folder, pipe._model_sha256 = verified, folder, verified.sha256
        pipe.is_native = native
        pipe._engine = Engine(
            pipe.transformer, is_native=native
        )  # compiles now, and not at the first drawing
        return pipe.to(device, dtype)

    def to(self, device: str | torch.device, dtype: str | torch.dtype | None = None) -> DallePipeline:
        """Moves the models and casts the transformer; "auto" takes the device's `default_dtype`."""
        device = torch.device(device)
        if dtype is not None:
            self._has_auto_dtype = dtype == "auto"
        if self._has_auto_dtype:
            dtype = default_dtype(device)
        target = self.dtype if dtype is None else as_dtype(dtype)
        held = held_dtype(target)
        if held.itemsize > held_dtype(self.dtype).itemsize and self._folder is not None:
            self.transformer = self._transformer_in(held)
        self.transformer.to(device, held)
        self._is_int8 = target == torch.int8
        # The dVAE stays in float32: it costs little, and a kept picture's tokens must not depend on dtype.
        self.dvae.to(device)
        if self.ranker is not None:
            self.ranker.clip.to(device)
        return self

    @property
    def components(self) -> dict[str, Tokenizer | nn.Module]:
        """The parts by name, as the constructor takes them."""
        return {"tokenizer": self.tokenizer, "dvae": self.dvae, "transformer": self.transformer}

    def load_judge(self) -> Ranker | None:
        """The second CLIP of the model folder, which only evaluations ask; None where there is none."""
        if self._verified is None or not (self._verified.path / "judge").is_dir():
            return None
        return Ranker.from_pretrained(self._verified, "judge")

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer computes in; torch.int8 where its linear maps are rounded to that."""
        return torch.int8 if self._is_int8 else next(self.transformer.parameters()).dtype

    @property
    def model_sha256(self) -> str:
        """The sha256 of the model folder's manifest.json; of an unsaved model, what saving would give."""
        if self._model_sha256 is None:
            with tempfile.TemporaryDirectory() as folder:
                self._write(Path(folder))
                self._model_sha256 = file_sha256(Path(folder) / "manifest.json")
        return self._model_sha256

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a model folder, weights in the dtype they are held in.

        A new folder appears whole; an existing one counts as a model only once all is written.
        """
        folder = Path(folder)
        held = held_dtype(self.dtype)
        if self._folder is not None and held != torch.float32:
            logger.warning("saving %s weights: load with dtype='float32' to keep all their digits", held)
        if folder.is_dir() and any(folder.iterdir()):  # a run's folder: other files live beside the model
            (folder / "manifest.json").unlink(missing_ok=True)
            self._write(folder)
        else:
            with atomic_folder(folder) as partial:
                self._write(partial)
        self._model_sha256 = file_sha256(folder / "manifest.json")
        self.name = str(folder) if self._folder is None else self.name

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Uploads the model folder to the Hugging Face Hub and returns its address.

        Raises:
            ValueError: the Hub refused; the reason is in the message.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder))
            try:
                url = api.create_repo(repo_id, private=private, exist_ok=True)
                api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"dalle {__version__}")
            except Exception as error:  # those of the client's HTTP library, which differs by version, too
                raise ValueError(f"cannot push to {repo_id!r}: {one_line(error)}") from error
        return str(url)

    def _write(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.dvae.save_pretrained(folder / "dvae")
        self.transformer.save_pretrained(folder / "transformer")
        if self.ranker is not None:
            self.ranker.save_pretrained(folder)
        judge = None if self._folder is None else self._folder / "judge"
        if judge is not None and judge.is_dir() and judge.resolve() != (folder / "judge").resolve():
            shutil.copytree(judge, folder / "judge", dirs_exist_ok=True)
        card = None if self._folder is None else self._folder / "README.md"
        if card is not None and card.is_file() and card.resolve() != (folder / "README.md").resolve():
            write_bytes(folder / "README.md", card.read_bytes())
        write_index(folder, self.defaults)

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
        requests = self.prepare(request, ranker)
        seeds = [seed for one in requests for seed in one.seeds]
        captions = [one.caption for one in requests for _ in one.seeds]
        completion = self.completion(requests[0])  # of the same picture for all
        requests = [replace(one, completion=completion) for one in requests]
        vectors = None if ranker is None else ranker.encode_captions(request.prompt, request.truncate)
        rows_per_batch = rows_that_pay(self.transformer) if rows_per_batch is None else rows_per_batch
        batches = plan_batches(requests, rows_per_batch)
        grid, n_candidates = self.transformer.config.grid_size, len(requests[0].seeds)
        n_done, n_total = 0, len(batches) * grid
        n_total += 0 if ranker is None else len(requests) * math.ceil(n_candidates / CHUNK)
        is_stopped = False
        tokens = torch.full((len(seeds), grid, grid), -1)

        def advance(_: int = 1) -> None:
            nonlocal n_done
            n_done += 1
            if progress is not None:
                progress(n_done, n_total)

        def on_row_end(row: int, part: Tensor) -> bool:
            nonlocal is_stopped
            advance()
            if callback_on_row_end is not None:
                so_far = torch.cat([tokens[:start], part.cpu(), tokens[start + len(part) :]])
                is_stopped = bool(callback_on_row_end(self, row, so_far))
            return is_stopped

        if n_threads is None:
            n_threads = decode_threads(self.transformer.config.d_model, min(len(seeds), rows_per_batch))
        elif not 1 <= n_threads <= MAX_THREADS:
            raise ValueError(f"n_threads is {n_threads}; choose 1..{MAX_THREADS}")
        start = 0
        for batch in batches:
            drawn = self.draw_batch(batch, on_row_end, n_threads)
            tokens[start : start + len(drawn)] = drawn
            start += len(drawn)
            if is_stopped:
                break
        finished = [row for row in range(len(seeds)) if int(tokens[row].min()) >= 0]
        kept: dict[int, tuple[float | None, int | None]] = dict.fromkeys(finished, (None, None))
        if ranker is not None and vectors is not None:
            kept = self._rank(ranker, vectors, tokens, finished, request.num_images_per_prompt, advance)
        with threads(n_threads):
            pictures = tuple(self._decode(tokens[[*kept]])) if output_type == "pil" else ()
        places = [(batch, row) for batch in batches for row in range(len(batch.seeds))]
        origin = self.origin(n_threads, ranker)
        recipes = [Recipe.of(*places[row], tokens[row], origin, scored) for row, scored in kept.items()]
        scores = tuple(score for score, _ in kept.values() if score is not None)
        return PipelineOutput(
            images=pictures,
            scores=None if ranker is None else scores,
            seeds=tuple(seeds[row] for row in kept),
            tokens=tokens[[*kept]],
            captions=tuple(captions[row] for row in kept),
            recipes=tuple(recipe.model_dump(mode="json") for recipe in recipes),
            is_stopped=is_stopped,
        )

    def prepare(self, request: ImageRequest, ranker: Ranker | None) -> list[CaptionRequest]:
        """Check a request against the model and read its captions, one `CaptionRequest` each; no model is run.

        `ranker` will choose among the candidates; None: nothing. Raises InvalidRequest as a call.
        """
        n = request.count_candidates(self.defaults.candidates, ranker is not None)
        seeds, options = request.seeds(len(request.prompt) * n), request.options(self.defaults)
        region = region_to_draw(request, self.transformer.config.grid_size)
        picture = None if request.image is None else self._fit(request.image)
        with blaming("prompt"):
            texts = [self._read(caption, request.truncate) for caption in request.prompt]
            if ranker is not None:
                ranker.read(request.prompt, request.truncate)  # its own tokenizer may find one too long
        return [
            CaptionRequest(
                caption=caption,
                text=texts[i][0],
                n_images=request.num_images_per_prompt,
                seeds=seeds[i * n : (i + 1) * n],
                first=i * n,
                options=options,
                truncate=request.truncate,
                truncation=texts[i][1],
                picture=picture,
                region=region,
                keep_rows=request.keep_rows,
            )
            for i, caption in enumerate(request.prompt)
        ]

    def completion(self, request: CaptionRequest) -> Completion | None:
        """Encodes the picture that a request completes, and says which of its tokens stay; None without one."""
        if request.picture is None or request.region is None:
            return None
        with torch.no_grad():
            pixels = request.picture[None].to(next(self.dvae.parameters()).device)  # (1, 3, H, W)
            tokens = self.dvae.encode(pixels)[0].cpu()  # (G, G)
        return complete(tokens, request.region, request.keep_rows)

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

    def draw_batch(
        self, batch: Batch, on_row_end: Callable[[int, Tensor], bool | None], n_threads: int
    ) -> Tensor:
        """Draw a batch -> tokens (R, G, G) on the CPU, -1 where `on_row_end` stopped.

        In float32 each picture has the tokens that a call for it alone gives.

        Raises:
            FloatingPointError: the transformer's logits hold NaN.
        """
        with threads(n_threads):
            return self._draw(self.transformer, (self.dtype, self.is_native), batch, on_row_end)

    def preview(self, tokens: Tensor, n_rows: int) -> Tensor:
        """What the first `n_rows` grid rows of tokens (R, G, G) look like so far: (R, 3, h, S) in [0, 1].

        S is the side of a whole picture in pixels, h its share of the first `n_rows` of G rows.
        """
        with torch.no_grad():
            out = self.dvae.decoder.from_tokens(tokens[:, :n_rows].to(next(self.dvae.parameters()).device))
            return self.dvae.pixels(out).cpu()

    def pixels(self, tokens: Tensor) -> Tensor:
        """Pictures (R, 3, H, W) in [0, 1] of tokens (R, G, G), decoded one by one: none depends on its neighbours."""
        return torch.cat([self._pixels(one[None]) for one in tokens]).cpu()

    def _rank(
        self,
        ranker: Ranker,
        vectors: Tensor,
        tokens: Tensor,
        finished: Sequence[int],
        n_kept: int,
        advance: Callable[[int], None],
    ) -> dict[int, tuple[float | None, int | None]]:
        """Score and rank of the `n_kept` best of the `finished` rows of each caption, best first."""
        n_per_caption, kept = len(tokens) // len(vectors), dict[int, tuple[float | None, int | None]]()
        for caption, vector in enumerate(vectors):
            rows = [row for row in finished if row // n_per_caption == caption]
            parts = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
            scores = ranker.score(vector, (self._pixels(tokens[part]) for part in parts), advance)
            for rank, place in enumerate(best_first(scores, n_kept)):
                kept[rows[place]] = (float(scores[place]), rank)
        return kept

    def rerun(
        self, recipe: Mapping[str, object], *, progress: Progress | None = None
    ) -> tuple[Image.Image, bool]:
        """Draws a picture again from its recipe and says whether the tokens agree with the recorded hash.

        The whole recorded batch is sampled, with the recorded number of threads.

        Args:
            recipe: of a picture's PNG, or one of `PipelineOutput.recipes`.
            progress: called with (grid rows done, of how many).

        Raises:
            ValueError: not a recipe, or one of another model.
        """
        plan = validate(Recipe, dict(recipe), "recipe")
        if plan.model_sha256 != self.model_sha256:
            raise ValueError(
                f"recipe is of model {plan.model} ({plan.model_sha256[:12]}); this one is {self.name}"
                f" ({self.model_sha256[:12]}): load the recipe's model"
            )
        dtype = as_dtype(plan.dtype)
        transformer = self._transformer_in(held_dtype(dtype))
        batch, is_consistent = batch_to_rerun(plan, lambda caption: self._read(caption, plan.truncate))
        n_rows = self.transformer.config.grid_size

        def on_row_end(row: int, _: Tensor) -> bool:
            if progress is not None:
                progress(row + 1, n_rows)
            return False

        with threads(plan.threads):
            tokens = self._draw(transformer, (dtype, plan.native), batch, on_row_end)
            drawn = tokens[plan.batch.position]
            image = self._decode(drawn[None])[0]
        return image, is_consistent and tokens_sha256(drawn) == plan.tokens_sha256

    def _transformer_in(self, dtype: torch.dtype) -> Transformer:
        """The transformer in another dtype than it is held in, read again so that no digits are missing."""
        held = held_dtype(self.dtype)
        if dtype == held:
            return self.transformer
        if self._folder is None:
            raise ValueError(
                f"recipe is of {dtype_name(dtype)}; this model is held in {dtype_name(held)} only:"
                " load it from its folder"
            )
        return Transformer.from_pretrained(self._folder / "transformer").to(self.device, dtype)

    def _draw(
        self,
        transformer: Transformer,
        arithmetic: tuple[torch.dtype, bool],
        batch: Batch,
        on_row_end: Callable[[int, Tensor], bool | None],
    ) -> Tensor:
        dtype, is_native = arithmetic
        wanted = (transformer, dtype == torch.int8, is_native)
        if (self._engine.transformer, self._engine.is_int8, self._engine.is_native) != wanted:
            self._engine = Engine(transformer, is_int8=dtype == torch.int8, is_native=is_native)
        tokens = self._engine.generate(
            batch.text,
            batch.seeds,
            batch.options,
            known=batch.known,
            n_pictures=batch.n_pictures,
            on_row_end=on_row_end,
        )
        return tokens.cpu()  # (R, G, G)

    def _fit(self, image: Image.Image) -> Tensor:
        """Return the central square of a picture, on white, at the model's size: (3, H, W) in [0, 1]."""
        rgba = image.convert("RGBA")
        opaque = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return to_tensor([center_crop(opaque, self.dvae.config.image_size)])[0]

    def _read(self, caption: str, truncate: bool) -> tuple[Tensor, Truncation | None]:
        """Return a caption's padded tokens (T,) int64, and what was cut from it."""
        ids = self.tokenizer.encode(caption, truncate=truncate)
        text = torch.as_tensor(self.tokenizer.pad(ids), dtype=torch.int64)
        n_tokens = self.tokenizer.count(caption)
        if n_tokens <= len(ids):
            return text, None
        logger.warning("caption has %d tokens, read are the first %d: %.80r", n_tokens, len(ids), caption)
        return text, Truncation(n_tokens=n_tokens, n_kept=len(ids))

    def _decode(self, tokens: Tensor) -> list[Image.Image]:
        # One by one: the pixels, too, of a picture do not depend on its neighbours.
        return [to_images(self._pixels(one[None]))[0] for one in tokens]

    def _pixels(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return self.dvae.decode(tokens.to(next(self.dvae.parameters()).device))  # (R, 3, H, W) in [0, 1]
