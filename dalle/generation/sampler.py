"""Sampler: from a request to tokens and pictures, for the pipeline, a rerun and the server alike.

The way of a request: `prepare` checks it and reads its captions, `encode` its picture, `plan` makes batches, `sample`
draws one, `decode` turns tokens into pixels.

Shapes: R pictures, T text tokens, G grid side, H = W side of a picture that is read, S of one that is drawn.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from dalle.generation.batch import Batch, plan_batches
from dalle.generation.completion import complete, region_to_draw, square_on_white
from dalle.generation.engine import Engine, RowCallback, default_rows_per_batch
from dalle.generation.precision import decode_threads, threads
from dalle.generation.request import (
    CaptionRequest,
    ImageRequest,
    InvalidRequest,
    ModelDefaults,
    Truncation,
    blaming,
)
from dalle.generation.rerank import CHUNK, Ranker
from dalle.image_tokenizer import ImageTokenizer
from dalle.images import to_images, to_tensor
from dalle.token_model import TokenModel
from dalle.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)


class Sampler:
    """Draws with one tokenizer, image tokenizer and token model; keeps nothing of a request."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        dvae: ImageTokenizer,
        transformer: TokenModel,
        defaults: ModelDefaults | None = None,
    ) -> None:
        self.tokenizer, self.dvae = tokenizer, dvae
        self.defaults = ModelDefaults() if defaults is None else defaults
        self.engine = Engine(transformer)  # keeps the weights ready to draw from call to call

    @property
    def transformer(self) -> TokenModel:
        """Return the token model that the engine draws with."""
        return self.engine.model

    # What needs no model

    def prepare(self, request: ImageRequest, ranker: Ranker | None) -> list[CaptionRequest]:
        """Check a request against the model and read its captions, one `CaptionRequest` each.

        Args:
            request: what is to be drawn.
            ranker: what will choose among the candidates; None: nothing.

        Raises:
            InvalidRequest: it cannot be drawn by this model; the field at fault is named.
        """
        n = request.count_candidates(self.defaults.candidates, ranker is not None)
        seeds, options = request.seeds(len(request.prompt) * n), request.options(self.defaults)
        region, picture = region_to_draw(request, self.dvae.grid_size), None
        if request.image is not None:
            if not self.dvae.has_encoder:
                raise InvalidRequest(
                    "image",
                    "this model's image tokenizer was published without its encoder: it cannot read a picture to complete",
                )
            picture = to_tensor([square_on_white(request.image, self.dvae.image_size)])[0]  # (3, H, W)
        with blaming("prompt"):
            texts = [self.read(caption, request.truncate) for caption in request.prompt]
            if ranker is not None:
                ranker.read(request.prompt, request.truncate)  # its own tokenizer may find one too long
        return [
            CaptionRequest(
                caption=caption,
                text=text,
                n_images=request.num_images_per_prompt,
                seeds=seeds[i * n : (i + 1) * n],
                first=i * n,
                options=options,
                truncate=request.truncate,
                truncation=truncation,
                picture=picture,
                region=region,
                keep_rows=request.keep_rows,
            )
            for i, (caption, (text, truncation)) in enumerate(zip(request.prompt, texts, strict=True))
        ]

    def read(self, caption: str, truncate: bool) -> tuple[Tensor, Truncation | None]:
        """Return a caption's padded tokens (T,) int64, and what was cut from it; ValueError when it is too long."""
        ids = self.tokenizer.encode(caption, truncate=truncate)
        text = torch.as_tensor(self.tokenizer.pad(ids), dtype=torch.int64)
        n_tokens = self.tokenizer.count(caption)
        if n_tokens <= len(ids):
            return text, None
        logger.warning("caption has %d tokens, read are the first %d: %.80r", n_tokens, len(ids), caption)
        return text, Truncation(n_tokens=n_tokens, n_kept=len(ids))

    def plan(self, requests: Sequence[CaptionRequest], rows_per_batch: int | None) -> list[Batch]:
        """Return the batches of a call; None takes as many pictures side by side as pay for this model."""
        rows = default_rows_per_batch(self.transformer) if rows_per_batch is None else rows_per_batch
        return plan_batches(requests, rows)

    def n_threads(self, n_rows: int) -> int:
        """Return the CPU threads that draw so many pictures side by side: by shape alone, as sums round by it."""
        return decode_threads(self.transformer.config.d_model, n_rows)

    # What needs it

    def encode(self, requests: Sequence[CaptionRequest]) -> list[CaptionRequest]:
        """Return one call's requests with the tokens that stay of the picture they complete, if they do."""
        picture, region = requests[0].picture, requests[0].region
        if picture is None or region is None:
            return list(requests)
        with torch.no_grad():
            tokens = self.dvae.encode(picture[None].to(self._dvae_device))[0].cpu()  # (G, G)
        completion = complete(tokens, region, requests[0].keep_rows)
        return [replace(request, completion=completion) for request in requests]

    def sample(self, batch: Batch, on_row_end: RowCallback, n_threads: int) -> Tensor:
        """Draw a batch -> tokens (R, G, G) on the CPU, -1 where `on_row_end` stopped.

        In float32 each picture has the tokens that a call for it alone gives.

        Raises:
            FloatingPointError: the model's logits hold NaN.
        """
        with threads(n_threads):
            return self.engine.draw(batch, on_row_end)

    def sample_all(
        self, batches: Sequence[Batch], on_row_end: RowCallback, n_threads: int
    ) -> tuple[Tensor, bool]:
        """Draw the batches of a call -> tokens (R, G, G), and whether `on_row_end`, which sees all of them, stopped it."""
        grid, n_rows = self.dvae.grid_size, sum(len(batch.seeds) for batch in batches)
        tokens, start, is_stopped = torch.full((n_rows, grid, grid), -1), 0, False

        def finish_row(row: int, part: Tensor) -> bool:
            nonlocal is_stopped
            so_far = torch.cat([tokens[:start], part.cpu(), tokens[start + len(part) :]])
            is_stopped = bool(on_row_end(row, so_far))
            return is_stopped

        for batch in batches:
            drawn = self.sample(batch, finish_row, n_threads)
            tokens[start : start + len(drawn)] = drawn
            start += len(drawn)
            if is_stopped:
                break
        return tokens, is_stopped

    def decode(self, tokens: Tensor) -> Tensor:
        """Return pictures (R, 3, S, S) in [0, 1] of tokens (R, G, G), one by one: none depends on its neighbours."""
        return torch.cat([self.decode_together(one[None]) for one in tokens])

    def pictures(self, tokens: Tensor) -> list[Image.Image]:
        """Return the pictures of tokens (R, G, G), as `decode`."""
        return [to_images(self.decode_together(one[None]))[0] for one in tokens]

    def choose(
        self, ranker: Ranker, caption: Tensor, tokens: Tensor, n: int, advance: Callable[[int], None]
    ) -> list[tuple[int, float]]:
        """Return places and scores of the n of tokens (R, G, G) that fit a caption's vector (E,) best, best first."""
        chunks = (self.decode_together(part) for part in torch.split(tokens, CHUNK) if len(part))
        return ranker.choose(caption, chunks, n, advance)

    def decode_together(self, tokens: Tensor) -> Tensor:
        """Return pictures (R, 3, h, S) in [0, 1] of the first grid rows of tokens, (R, g, G), in one go."""
        with torch.no_grad():
            return self.dvae.decode(tokens.to(self._dvae_device)).cpu()

    @property
    def _dvae_device(self) -> torch.device:
        return next(self.dvae.parameters()).device
