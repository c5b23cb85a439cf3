"""The worker: the thread that owns the model draws batches of mixed jobs, shows, ranks and stores them.

Shapes: R candidates of a batch, G grid side, E width of CLIP's embedding.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

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
from dalle.serving.errors import ServingError
from dalle.serving.history import History, NewPicture
from dalle.serving.job import Candidate, Drawn, Failed, Job, RowDrawn, Settled, Turn
from dalle.serving.queue import JobQueue

logger = logging.getLogger(__name__)

GREY = 128  # where nothing is drawn yet
PREVIEW_SHARE = 0.3  # of a batch's time that may go into showing it


class Worker:
    """Owns the model from `start` on; `draw` and what it calls run on its thread alone."""

    def __init__(self, pipe: DallePipeline, history: History, queue: JobQueue) -> None:
        self.pipe, self.history, self.queue = pipe, history, queue
        self.metrics = queue.metrics
        self._is_warm = False
        self._thread = threading.Thread(target=self._work, name="dalle-worker", daemon=True)

    def start(self) -> None:
        """Start the thread, which warms the model up first."""
        self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop the queue, and wait for the thread."""
        self.queue.stop()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def is_ready(self) -> bool:
        """Say whether the model is warm and requests are taken."""
        return self._is_warm and self.queue.is_open and self._thread.is_alive()

    def _work(self) -> None:
        self.warm_up()
        with self.queue.changed:
            self._is_warm = True
            self.queue.changed.notify_all()
        while (work := self.queue.wait()) is not None:
            calls, turns = work
            for call in calls:
                call.make()
            try:
                self.draw(turns)
            except Exception as error:  # ours, or a listener's: this batch ends, the thread does not
                logger.exception("a batch could not be drawn")
                for turn in turns:
                    self.fail(turn.job, error)

    def warm_up(self) -> None:
        """Draws, decodes and ranks once, so that the first client does not wait for libraries to set themselves up."""
        try:
            ranker = self.pipe.ranker
            [request] = self.pipe.sampler.prepare(ImageRequest("", num_images_per_prompt=4), ranker)
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

    def draw(self, turns: Sequence[Turn]) -> None:
        """Draws one batch; whatever goes wrong ends the job at fault, and neither this thread nor its neighbours."""
        ready = [turn for turn in turns if self._prepare(turn.job)]
        if not ready:
            return
        try:
            self._draw(ready)
        except Exception as error:
            if len(ready) > 1:  # who is at fault? Each alone finds out
                for turn in ready:
                    self.draw([turn])
            elif ready[0].n > 1 and isinstance(error, (torch.OutOfMemoryError, MemoryError)):
                [turn] = ready
                half = turn.n // 2
                self.draw([Turn(turn.job, turn.first, half)])
                self.draw([Turn(turn.job, turn.first + half, turn.n - half)])
            else:
                self.fail(ready[0].job, error)

    def _prepare(self, job: Job) -> bool:
        """Do what a job needs of the model before its first candidate; False where it is over, or just failed."""
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
        """End a job with an error; the log says which."""
        logger.error("job %s failed: %s", job.id, error, exc_info=error)
        is_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        failure = ServingError(
            503 if is_memory else 500,
            "memory ran out: ask for fewer candidates, or try again later"
            if is_memory
            else "the pictures could not be drawn; the server's log says why",
            kind="server_error",
            code="out_of_memory" if is_memory else "drawing_failed",
            retry_after_s=10 if is_memory else None,
        )
        self.queue.end(job, "failed", Failed(failure))

    # --- One batch ------------------------------------------------------------------------------------------

    def _draw(self, turns: Sequence[Turn]) -> None:
        n_rows = sum(turn.n for turn in turns)
        n_threads, start = self.pipe.sampler.n_threads(n_rows), time.monotonic()
        grid, shown_s = self.pipe.dvae.grid_size, 0.0
        self.metrics.batch_rows.set(n_rows)

        def on_row_end(row: int, tokens: Tensor) -> bool:
            nonlocal shown_s
            self.metrics.tokens.inc(n_rows * grid)
            self.queue.expire()
            before = time.monotonic()
            for turn in turns:
                if row == 0 and turn.first == 0 and not turn.job.is_over:
                    self.metrics.first_row.observe(before - turn.job.accepted_at)
            is_late = row > 0 and shown_s > PREVIEW_SHARE * (before - start)
            self._show(turns, row, tokens, is_late)
            shown_s += time.monotonic() - before
            return all(turn.job.is_over for turn in turns)  # nobody wants this batch any more

        batch = Batch(tuple(turn.slot for turn in turns), n_rows, is_shared=True)
        tokens = self.pipe.sampler.sample(batch, on_row_end, n_threads)
        self.metrics.batch_rows.set(0)
        row = 0
        for turn in turns:
            own = tokens[row : row + turn.n]
            if not turn.job.is_over:
                self._finish(turn, own, batch, row, n_threads)
            row += turn.n
        self.queue.timed(n_rows, time.monotonic() - start)

    def _show(self, turns: Sequence[Turn], row: int, tokens: Tensor, is_late: bool) -> None:
        """Decode the first rows of all candidates that somebody looks at, in one go."""
        watched, rows, start = list[tuple[Turn, int]](), list[int](), 0
        for turn in turns:
            n = 0 if turn.job.is_over else turn.job.listener.n_looked_at(row, turn.first, turn.n, is_late)
            if n:
                watched.append((turn, n))
                rows.extend(range(start, start + n))
            start += turn.n
        if not watched:
            return
        top = self.pipe.sampler.decode_together(tokens[rows][:, : row + 1])  # (R, 3, h, W)
        side = self.pipe.dvae.output_size
        images = [_padded(image, side) for image in to_images(top)]
        start = 0
        for turn, n in watched:
            turn.job.listener.tell(RowDrawn(row, turn.first, tuple(images[start : start + n])))
            start += n

    def _finish(self, turn: Turn, tokens: Tensor, batch: Batch, row: int, n_threads: int) -> None:
        """Decode and score a job's part of a batch; the last part settles the job."""
        job = turn.job
        try:
            with threads(n_threads):
                pixels = self.pipe.sampler.decode(tokens)  # (n, 3, H, W)
            scores: list[float | None] = [None] * turn.n
            if self.pipe.ranker is not None and job.caption_vector is not None:
                scores = self.pipe.ranker.score(job.caption_vector, torch.split(pixels, CHUNK)).tolist()
            images = to_images(pixels)
            for i, image in enumerate(images):
                job.candidates.append(Candidate(tokens[i], image, scores[i], batch, row + i, n_threads))
            self.metrics.pictures.inc(turn.n)
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
        ids = self.history.keep(new, job.id)
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
        if self.queue.end(job, "settled", Settled(pictures)):
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
    """Return a picture's upper part on a grey square."""
    image = Image.new("RGB", (side, side), (GREY, GREY, GREY))
    image.paste(top, (0, 0))
    return image
