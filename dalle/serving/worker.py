"""The worker: draws batches of mixed jobs, shows them row by row, ranks and stores what is finished.

Shapes: R candidates of a batch, G grid side, E width of CLIP's embedding.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from dalle.generation.batch import Batch, Slot
from dalle.generation.precision import threads
from dalle.generation.recipe import Recipe
from dalle.generation.request import ImageRequest
from dalle.generation.rerank import CHUNK, best_first
from dalle.images import to_images, to_png
from dalle.pipeline import DallePipeline
from dalle.serving.history import History, NewPicture
from dalle.serving.job import Candidate, Drawn, Failed, Job, Part, Row, ServingError, Settled

if TYPE_CHECKING:
    from dalle.serving.jobs import Jobs

logger = logging.getLogger(__name__)

GREY = 128  # where nothing is drawn yet
PREVIEW_SHARE = 0.3  # of a batch's time that may go into showing it


class Worker:
    """Owns the model; every method runs on one thread."""

    def __init__(self, pipe: DallePipeline, history: History, jobs: Jobs) -> None:
        self.pipe, self.history, self.jobs = pipe, history, jobs
        self.metrics = jobs.metrics

    def warm_up(self) -> None:
        """Draws, decodes and ranks once, so that the first client does not wait for libraries to set themselves up."""
        try:
            ranker = self.pipe.ranker
            [request] = self.pipe.sampler.prepare(
                ImageRequest("", num_images_per_prompt=4, num_candidates=4), ranker
            )
            n_threads = self.pipe.sampler.n_threads(4)
            batch = Batch((Slot(request, 0, 4),), 4)
            tokens = self.pipe.sampler.sample(batch, lambda *_: False, n_threads)
            self.pipe.sampler.decode_together(tokens[:, :1])
            pixels = self.pipe.sampler.decode(tokens)
            if ranker is not None:
                ranker.score(ranker.encode_captions([""])[0], [pixels])
            to_png(to_images(pixels)[0], {"model": self.pipe.model_sha256})
        except Exception:  # a broken model answers each request with its error
            logger.exception("the model could not be warmed up")

    def draw(self, parts: Sequence[Part]) -> None:
        """Draws one batch; whatever goes wrong ends the job at fault, and neither this thread nor its neighbours."""
        ready = [part for part in parts if self._prepare(part.job)]
        if not ready:
            return
        try:
            self._draw(ready)
        except Exception as error:
            if len(ready) > 1:  # who is at fault? Each alone finds out
                for part in ready:
                    self.draw([part])
            elif ready[0].n > 1 and isinstance(error, (torch.OutOfMemoryError, MemoryError)):
                [part] = ready
                half = part.n // 2
                self.draw([Part(part.job, part.first, half)])
                self.draw([Part(part.job, part.first + half, part.n - half)])
            else:
                self.fail(ready[0].job, error)

    def _prepare(self, job: Job) -> bool:
        """What a job needs of the model before its first candidate; False where it is over, or just failed."""
        if job.is_over:
            return False
        if job.is_prepared:
            return True
        try:
            [job.request] = self.pipe.sampler.encode([job.request])
            if self.pipe.ranker is not None:
                captions = [job.request.caption]
                [job.caption_vector] = self.pipe.ranker.encode_captions(captions, job.request.truncate)
            job.is_prepared = True
            return True
        except Exception as error:
            self.fail(job, error)
            return False

    def fail(self, job: Job, error: Exception) -> None:
        """Ends a job with an error; the log says which."""
        logger.error("job %s failed: %s", job.id, error, exc_info=error)
        is_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        told = ServingError(
            503 if is_memory else 500,
            "memory ran out: ask for fewer candidates, or try again later"
            if is_memory
            else "the pictures could not be drawn; the server's log says why",
            kind="server_error",
            code="out_of_memory" if is_memory else "drawing_failed",
            retry_after_s=10 if is_memory else None,
        )
        self.jobs.end(job, "failed", Failed(told))

    # --- One batch ------------------------------------------------------------------------------------------

    def _draw(self, parts: Sequence[Part]) -> None:
        n_rows = sum(part.n for part in parts)
        n_threads, start = self.pipe.sampler.n_threads(n_rows), time.monotonic()
        grid, shown_s = self.pipe.dvae.grid_size, 0.0
        self.metrics.batch_rows.set(n_rows)

        def on_row_end(row: int, tokens: Tensor) -> bool:
            nonlocal shown_s
            self.metrics.tokens.inc(n_rows * grid)
            self.jobs.expire()
            before = time.monotonic()
            for part in parts:
                if row == 0 and part.first == 0 and not part.job.is_over:
                    self.metrics.first_row.observe(before - part.job.accepted_at)
            is_late = row > 0 and shown_s > PREVIEW_SHARE * (before - start)
            self._show(parts, row, tokens, is_late)
            shown_s += time.monotonic() - before
            return all(part.job.is_over for part in parts)  # nobody wants this batch any more

        batch = Batch(tuple(part.slot for part in parts), n_rows, is_shared=True)
        tokens = self.pipe.sampler.sample(batch, on_row_end, n_threads)
        self.metrics.batch_rows.set(0)
        row = 0
        for part in parts:
            own = tokens[row : row + part.n]
            if not part.job.is_over:
                self._finish(part, own, batch, row, n_threads)
            row += part.n
        self.jobs.timed(n_rows, time.monotonic() - start)

    def _show(self, parts: Sequence[Part], row: int, tokens: Tensor, is_late: bool) -> None:
        """Decodes the first rows of all candidates that somebody looks at, in one go."""
        watched, rows, start = list[tuple[Part, int]](), list[int](), 0
        for part in parts:
            n = 0 if part.job.is_over else part.job.listener.n_looked_at(row, part.first, part.n, is_late)
            if n:
                watched.append((part, n))
                rows.extend(range(start, start + n))
            start += part.n
        if not watched:
            return
        top = self.pipe.sampler.decode_together(tokens[rows][:, : row + 1])  # (R, 3, h, W)
        side = self.pipe.dvae.output_size
        images = [_padded(image, side) for image in to_images(top)]
        start = 0
        for part, n in watched:
            part.job.listener.tell(Row(row, part.first, tuple(images[start : start + n])))
            start += n

    def _finish(self, part: Part, tokens: Tensor, batch: Batch, row: int, n_threads: int) -> None:
        """Decodes and scores a job's part of a batch; the last part settles the job."""
        job = part.job
        try:
            with threads(n_threads):
                pixels = self.pipe.sampler.decode(tokens)  # (n, 3, H, W)
            scores: list[float | None] = [None] * part.n
            if self.pipe.ranker is not None and job.caption_vector is not None:
                scores = self.pipe.ranker.score(job.caption_vector, torch.split(pixels, CHUNK)).tolist()
            images = to_images(pixels)
            for i, image in enumerate(images):
                job.candidates.append(Candidate(tokens[i], image, scores[i], batch, row + i, n_threads))
            self.metrics.pictures.inc(part.n)
            if len(job.candidates) == job.n_candidates:
                self._settle(job)
        except Exception as error:
            self.fail(job, error)

    def _settle(self, job: Job) -> None:
        """Ranks a job's candidates, stores them, and tells the client."""
        drawn = job.candidates
        scores = [candidate.score for candidate in drawn]
        is_ranked = None not in scores
        order = best_first([score or 0.0 for score in scores]) if is_ranked else [*range(len(drawn))]
        if not job.keeps_candidates:
            order = order[: job.request.n_images]
        new = [self._picture(job, index, rank) for rank, index in enumerate(order)]
        if job.is_over:
            return
        ids = self.history.add(new, job.id)
        pictures = tuple(
            Drawn(
                index=index,
                seed=one.seed,
                score=one.score,
                rank=one.rank,
                kept=one.kept,
                image=drawn[index].image,
                png=one.png,
                recipe=one.recipe,
                picture_id=picture_id,
            )
            for index, one, picture_id in zip(order, new, ids, strict=True)
        )
        if self.jobs.end(job, "settled", Settled(pictures)):
            self.metrics.latency.observe(time.monotonic() - job.accepted_at)

    def _picture(self, job: Job, index: int, rank: int) -> NewPicture:
        candidate, ranker = job.candidates[index], self.pipe.ranker
        recipe = Recipe.of(
            candidate.batch,
            candidate.row,
            candidate.tokens,
            self.pipe.origin(candidate.n_threads, ranker),
            (candidate.score, None if candidate.score is None else rank),
        ).model_dump(mode="json")
        return NewPicture(
            png=to_png(candidate.image, recipe),
            recipe=recipe,
            caption=job.request.caption,
            seed=job.request.seeds[index],
            score=candidate.score,
            rank=rank,
            kept=rank < job.request.n_images,
            tokens=candidate.tokens.numpy().astype("<u2").tobytes(),
        )


def _padded(top: Image.Image, side: int) -> Image.Image:
    """A picture's upper part on a grey square."""
    image = Image.new("RGB", (side, side), (GREY, GREY, GREY))
    image.paste(top, (0, 0))
    return image
