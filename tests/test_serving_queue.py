"""The queue and its worker: every slot comes back, jobs share batches fairly, and no job harms another."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from PIL import Image, ImageChops

from dalle.generation.recipe import Recipe
from dalle.generation.request import ImageRequest
from dalle.images import read_recipe
from dalle.pipeline import DallePipeline
from dalle.serving.errors import ServingError
from dalle.serving.history import History
from dalle.serving.job import Failed, Job, Queued, RowDrawn, Settled, Started
from dalle.serving.queue import JobQueue, Reservation, share_out
from dalle.serving.settings import Settings
from dalle.serving.worker import Worker
from tests.live import GatedPipeline, Recorder, gated_pipe
from tests.tiny import GRID

N_TOKENS = GRID * GRID


@pytest.fixture(scope="module")
def shared() -> GatedPipeline:
    return gated_pipe()


@pytest.fixture
def pipe(shared: GatedPipeline) -> Iterator[GatedPipeline]:
    """Shared by the tests, as making one takes a while; reset for each."""
    yield shared
    shared.gate.set()
    shared.at_gate.clear()
    shared.failing.clear()
    shared.most_rows = 1000


@dataclass
class Jobs:
    """A queue with its worker and history, as `create_app` makes them."""

    queue: JobQueue
    worker: Worker
    history: History

    def __getattr__(self, name: str) -> Any:
        return getattr(self.queue, name)

    def close(self) -> None:
        self.worker.close()
        self.history.close()


def make_jobs(pipe: DallePipeline, folder: Path, **limits: Any) -> Jobs:
    history, queue = History(folder), JobQueue(Settings.model_validate({"data_dir": folder} | limits))
    return Jobs(queue, Worker(pipe, history, queue), history)


@pytest.fixture
def jobs(pipe: GatedPipeline, tmp_path: Path) -> Iterator[Jobs]:
    """A running queue; batches of 8."""
    made = make_jobs(pipe, tmp_path, rows_per_batch=8)
    made.worker.start()
    with made.queue.changed:
        assert made.queue.changed.wait_for(lambda: made.worker.is_ready, 30)
    pipe.batches.clear()
    yield made
    pipe.gate.set()
    made.close()
    assert (made.queue.n_jobs, made.queue.n_slots) == (0, 0)


def submit(
    jobs: Jobs, pipe: DallePipeline, caption: str = "a dog", n: int = 1, **asked: Any
) -> tuple[Job, Recorder]:
    fields = {"num_images_per_prompt": n, "seed": 0} | asked
    [request] = pipe.sampler.prepare(ImageRequest(caption, **fields), pipe.ranker)  # type: ignore[arg-type]
    recorder = Recorder()
    return jobs.submit(jobs.reserve(len(request.seeds)), request, recorder, keeps_candidates=True), recorder


def hold(jobs: Jobs, pipe: GatedPipeline) -> tuple[Job, Recorder]:
    """A job of one candidate at whose first row the worker waits."""
    pipe.gate.clear()
    held = submit(jobs, pipe, "a red apple")
    assert pipe.at_gate.wait(30)
    return held


# --- Slots --------------------------------------------------------------------------------------------------


def test_slots_are_refused_above_either_limit_with_a_time_to_come_again(
    pipe: GatedPipeline, tmp_path: Path
) -> None:
    jobs = make_jobs(pipe, tmp_path, max_queue=2, max_slots=10, max_candidates=8)
    first = jobs.reserve(6)
    with pytest.raises(ServingError) as caught:
        jobs.reserve(5)
    assert caught.value.status == 503 and caught.value.code == "server_overloaded"
    assert caught.value.retry_after_s is not None and 1 <= caught.value.retry_after_s <= 60
    second = jobs.reserve(4)
    first.release()
    first.release()  # a second time does nothing
    assert (jobs.n_jobs, jobs.n_slots) == (1, 4)
    jobs.reserve(1)
    with pytest.raises(ServingError):
        jobs.reserve(1)
    second.release()
    jobs.reserve(9)
    assert (jobs.n_jobs, jobs.n_slots) == (2, 10)


class Queue(RuleBasedStateMachine):
    """Requests come, fail their checks, leave and are drawn in any order; slots always add up."""

    pipe: GatedPipeline
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.jobs = make_jobs(
            self.pipe, self.folder, rows_per_batch=8, max_queue=6, max_slots=40, max_candidates=20
        )
        self.held: list[Reservation] = []
        self.live: dict[str, tuple[Job, Recorder]] = {}
        self.all: list[tuple[Job, Recorder]] = []
        self.cancelled: set[str] = set()

    @rule(n=st.integers(1, 20))
    def reserve(self, n: int) -> None:
        n_before, slots_before = self.jobs.n_jobs, self.jobs.n_slots
        try:
            self.held.append(self.jobs.reserve(n))
        except ServingError:
            assert n_before == 6 or slots_before + n > 40
            assert (self.jobs.n_jobs, self.jobs.n_slots) == (n_before, slots_before)

    @precondition(lambda self: self.held)
    @rule()
    def fail_a_check(self) -> None:
        self.held.pop(0).release()

    @precondition(lambda self: self.held)
    @rule(caption=st.sampled_from(["a dog", "a red apple", "broken"]))
    def queue(self, caption: str) -> None:
        reservation, recorder = self.held.pop(0), Recorder()
        n = reservation.n_slots
        [request] = self.pipe.sampler.prepare(
            ImageRequest(caption, num_images_per_prompt=n), self.pipe.ranker
        )
        job = self.jobs.submit(reservation, request, recorder)
        self.live[job.id] = job, recorder
        self.all.append((job, recorder))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.live)))
        assert self.jobs.cancel(job_id)
        assert not self.jobs.cancel(job_id)
        self.live.pop(job_id)
        self.cancelled.add(job_id)

    @rule()
    def draw_a_batch(self) -> None:
        with self.jobs.queue.changed:
            turns = self.jobs.queue.take()
        assert sum(turn.n for turn in turns) <= 8
        self.jobs.worker.draw(turns)
        self.live = {job_id: one for job_id, one in self.live.items() if not one[1].is_over.is_set()}

    @invariant()
    def slots_add_up(self) -> None:
        expected = [one.n_slots for one in self.held] + [job.n_candidates for job, _ in self.live.values()]
        assert (self.jobs.n_jobs, self.jobs.n_slots) == (len(expected), sum(expected))
        assert self.jobs.n_jobs <= 6 and self.jobs.n_slots <= 40

    def teardown(self) -> None:
        while self.live:
            self.draw_a_batch()
        for job, recorder in self.all:
            end, caption = recorder.last(), job.request.caption
            assert isinstance(end, Settled) == (job.id not in self.cancelled and caption != "broken")
            assert not isinstance(end, Settled) or len(end.pictures) == job.n_candidates
        for one in self.held:
            one.release()
        assert (self.jobs.n_jobs, self.jobs.n_slots) == (0, 0)
        self.jobs.history.close()


def test_slots_add_up_whatever_happens_and_nothing_accepted_is_lost(
    pipe: GatedPipeline, tmp_path: Path
) -> None:
    Queue.pipe, Queue.folder = pipe, tmp_path
    pipe.failing.add("broken")
    Queue.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None, database=None)
    Queue.TestCase().runTest()


@given(st.integers(1, 64), st.lists(st.integers(1, 600), max_size=40))
@settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_batch_is_shared_out_in_turn(capacity: int, wanted: list[int]) -> None:
    shares = share_out(capacity, wanted)
    assert all(0 <= share <= n for share, n in zip(shares, wanted, strict=True))
    assert sum(shares) == min(capacity, sum(wanted)), "no place stays empty while somebody waits"
    first = shares[: capacity // 8]
    assert all(share >= min(8, n) for share, n in zip(first, wanted, strict=False))


# --- Drawing ------------------------------------------------------------------------------------------------


def test_a_mixed_batch_draws_what_each_request_alone_draws(jobs: Jobs, pipe: GatedPipeline) -> None:
    picture = Image.radial_gradient("L").convert("RGB")
    asked: list[tuple[str, dict[str, Any]]] = [
        ("a red apple", {"num_images_per_prompt": 3, "seed": 5}),
        ("a dog", {"num_images_per_prompt": 2, "num_candidates": 11, "seed": 70, "guidance": 3.0}),
        ("a green pear", {"num_images_per_prompt": 1, "seed": 2, "temperature": 0.5, "top_k": 7}),
        ("a dog", {"num_images_per_prompt": 2, "seed": 3, "image": picture, "keep_rows": 2, "guidance": 0.0}),
        ("pear " * 40, {"num_images_per_prompt": 2, "top_p": 0.6, "truncate": True}),
    ]
    hold(jobs, pipe)
    recorders = [submit(jobs, pipe, caption, **fields)[1] for caption, fields in asked]
    pipe.gate.set()
    for (caption, fields), recorder in zip(asked, recorders, strict=True):
        pictures = recorder.settled().pictures
        twin = pipe(caption, **fields)
        n = len(twin.images)
        assert [one.kept for one in pictures] == [True] * n + [False] * (len(pictures) - n)
        assert [one.seed for one in pictures[:n]] == list(twin.seeds)
        assert twin.scores is not None
        assert [one.score for one in pictures[:n]] == pytest.approx(twin.scores, abs=1e-5)
        for one, image, recipe in zip(pictures, twin.images, twin.recipes, strict=False):
            assert one.recipe["tokens_sha256"] == recipe["tokens_sha256"]
            assert one.image.tobytes() == image.tobytes()
            stored = jobs.history.png(one.picture_id)
            assert stored == one.png and read_recipe(one.png) == one.recipe
    assert max(map(len, pipe.batches)) >= 3, "nothing was mixed"


def test_a_picture_of_a_mixed_batch_is_drawn_again_from_its_recipe(jobs: Jobs, pipe: GatedPipeline) -> None:
    hold(jobs, pipe)
    recorders = [
        submit(jobs, pipe, "a dog", 3, guidance=2.0)[1],
        submit(jobs, pipe, "a red apple", 1)[1],
        submit(jobs, pipe, "a green pear", 2, guidance=4.0)[1],
    ]
    pipe.gate.set()
    for recorder in recorders:
        for one in recorder.settled().pictures:
            plan = Recipe.model_validate(one.recipe).batch
            assert plan.n_pictures == (1, 2, 3) and plan.guided == (1, 2, 3, 4, 5)
            image, agrees = pipe.rerun(one.recipe)
            assert agrees and image.tobytes() == one.image.tobytes()
            assert not pipe.rerun(one.recipe | {"seed": one.seed + 50})[1]


def test_four_candidates_do_not_wait_for_the_last_of_many(jobs: Jobs, pipe: GatedPipeline) -> None:
    hold(jobs, pipe)
    _, many = submit(jobs, pipe, "a dog", 2, num_candidates=40)
    _, few = submit(jobs, pipe, "a red apple", 4)
    pipe.gate.set()
    assert len(few.settled().pictures) == 4
    assert len(many.settled().pictures) == 40
    assert pipe.batches[1:3] == [[8], [4, 4]], "the many had a batch, then the few had their turn"


def test_rows_are_shown_as_they_are_drawn_and_the_rest_is_grey(jobs: Jobs, pipe: GatedPipeline) -> None:
    _, recorder = submit(jobs, pipe, "a dog", 3)
    pictures = sorted(recorder.settled().pictures, key=lambda one: one.index)
    rows = [event for event in recorder.events if isinstance(event, RowDrawn)]
    assert [event.row for event in rows] == [0, 1, 2, 3]
    assert [type(event) for event in recorder.events[:2]] == [Queued, Started]
    for event in rows:
        for image in event.images:
            assert image.getpixel((5, 31)) == ((128, 128, 128) if event.row < 3 else image.getpixel((5, 31)))
            assert image.getpixel((5, 8 * event.row + 7)) != (128, 128, 128)
    for shown, one in zip(rows[-1].images, pictures, strict=True):
        assert ImageChops.difference(shown, one.image).getextrema() <= ((0, 1),) * 3


def test_a_job_whose_client_left_stops_between_rows(jobs: Jobs, pipe: GatedPipeline) -> None:
    job, recorder = hold(jobs, pipe)
    drawn = jobs.metrics.tokens._value.get()
    assert jobs.cancel(job.id)
    assert (jobs.n_jobs, jobs.n_slots) == (0, 0), "its slots are free at once"
    assert recorder.failed().code == "cancelled"
    pipe.gate.set()
    jobs.run(lambda: None).result(30)  # after the batch
    assert jobs.metrics.tokens._value.get() - drawn == GRID, "the batch went on after its first row"


def test_a_batch_goes_on_for_the_clients_that_are_left(jobs: Jobs, pipe: GatedPipeline) -> None:
    hold(jobs, pipe)
    leaving, _ = submit(jobs, pipe, "a dog", 2)
    _, staying = submit(jobs, pipe, "a red apple", 2)
    pipe.at_gate.clear()
    step = threading.Event()
    original = staying.n_looked_at

    def leave_at_first_row(row: int, first: int, n: int, is_late: bool) -> int:
        if not step.is_set():
            step.set()
            jobs.cancel(leaving.id)
        return original(row, first, n, is_late)

    staying.n_looked_at = leave_at_first_row  # type: ignore[method-assign]
    pipe.gate.set()
    pictures = staying.settled().pictures
    assert pipe.batches[1] == [2, 2]
    twin = pipe("a red apple", num_images_per_prompt=2)
    assert [one.recipe["tokens_sha256"] for one in pictures] == [
        recipe["tokens_sha256"] for recipe in twin.recipes
    ]


def test_positions_are_told_as_they_change(jobs: Jobs, pipe: GatedPipeline) -> None:
    hold(jobs, pipe)
    submitted = [submit(jobs, pipe, "a dog") for _ in range(3)]
    assert [recorder.events for _, recorder in submitted] == [[Queued(0)], [Queued(1)], [Queued(2)]]
    jobs.cancel(submitted[0][0].id)
    assert [recorder.events[-1] for _, recorder in submitted[1:]] == [Queued(0), Queued(1)]


# --- What goes wrong ----------------------------------------------------------------------------------------


def test_a_job_that_cannot_be_drawn_harms_no_neighbour(jobs: Jobs, pipe: GatedPipeline) -> None:
    pipe.failing.add("a broken dog")
    hold(jobs, pipe)
    _, first = submit(jobs, pipe, "a red apple", 2)
    _, broken = submit(jobs, pipe, "a broken dog", 2)
    _, last = submit(jobs, pipe, "a green pear", 2)
    pipe.gate.set()
    assert (broken.failed().status, broken.failed().code) == (500, "drawing_failed")
    assert len(first.settled().pictures) == len(last.settled().pictures) == 2
    assert pipe.batches[1:] == [[2, 2, 2], [2], [2], [2]]


def test_weights_that_are_not_numbers_fail_the_job_and_not_the_worker(
    jobs: Jobs, pipe: GatedPipeline
) -> None:
    weight = pipe.transformer.norm.weight
    good = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    try:
        assert submit(jobs, pipe)[1].failed().code == "drawing_failed"
    finally:
        with torch.no_grad():
            weight.copy_(good)
    assert submit(jobs, pipe)[1].settled().pictures


def test_a_batch_too_large_for_memory_is_drawn_in_halves(jobs: Jobs, pipe: GatedPipeline) -> None:
    pipe.most_rows = 3
    _, recorder = submit(jobs, pipe, "a dog", 8)
    pictures = recorder.settled().pictures
    assert {one.seed for one in pictures} == set(range(8))
    assert [sum(batch) for batch in pipe.batches] == [8, 4, 2, 2, 4, 2, 2]
    pipe.most_rows = 0
    error = submit(jobs, pipe)[1].failed()
    assert (error.status, error.code, error.retry_after_s) == (503, "out_of_memory", 10)


def test_a_history_that_cannot_be_written_loses_no_picture(
    jobs: Jobs, pipe: GatedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> list[str]:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(jobs.history, "add", full)
        held = submit(jobs, pipe)[1].settled().pictures[0]
        assert jobs.history.png(held.picture_id) == held.png and jobs.history.get(held.picture_id) is None
    assert submit(jobs, pipe)[1].settled().pictures
    assert jobs.history.get(held.picture_id) is not None, "stored with the next ones"


def test_a_listener_that_raises_harms_nobody_else(jobs: Jobs, pipe: GatedPipeline) -> None:
    hold(jobs, pipe)
    _, broken = submit(jobs, pipe, "a dog")
    _, good = submit(jobs, pipe, "a red apple")

    def raises(*_: Any) -> int:
        raise RuntimeError("a listener's mistake")

    broken.n_looked_at = raises  # type: ignore[method-assign]
    pipe.gate.set()
    assert good.settled().pictures
    assert broken.failed().status == 500
    assert submit(jobs, pipe)[1].settled().pictures


def test_a_job_past_its_deadline_is_told_so(pipe: GatedPipeline, tmp_path: Path) -> None:
    jobs = make_jobs(pipe, tmp_path, deadline_s=1e-6)
    jobs.worker.start()
    error = submit(jobs, pipe)[1].failed()
    assert (error.status, error.code) == (503, "deadline_exceeded") and error.retry_after_s
    assert jobs.n_slots == 0
    jobs.close()


def test_draining_ends_what_was_accepted_and_takes_nothing_more(jobs: Jobs, pipe: GatedPipeline) -> None:
    _, first = hold(jobs, pipe)
    _, second = submit(jobs, pipe, "a dog", 2)
    jobs.drain()
    assert not jobs.worker.is_ready
    with pytest.raises(ServingError, match="shutting down") as caught:
        jobs.reserve(1)
    assert caught.value.status == 503 and caught.value.retry_after_s
    assert not jobs.wait_idle(0.01)
    pipe.gate.set()
    assert jobs.wait_idle(30)
    assert first.settled() and second.settled()


def test_stopping_tells_everybody_who_still_waits(jobs: Jobs, pipe: GatedPipeline) -> None:
    _, first = hold(jobs, pipe)
    _, second = submit(jobs, pipe)
    errand = jobs.run(lambda: 1)
    jobs.stop()
    for recorder in (first, second):
        assert recorder.failed().code == "server_shutting_down"
    with pytest.raises(ServingError):
        errand.result(30)
    with pytest.raises(ServingError):
        jobs.run(lambda: 1).result(30)


def test_errands_run_on_the_thread_that_owns_the_model(jobs: Jobs) -> None:
    assert jobs.run(lambda: threading.current_thread().name).result(30) == "dalle-worker"
    with pytest.raises(ZeroDivisionError):
        jobs.run(lambda: 1 // 0).result(30)
    assert jobs.run(lambda: 2).result(30) == 2


def test_a_job_is_told_its_end_once(jobs: Jobs, pipe: GatedPipeline) -> None:
    job, recorder = submit(jobs, pipe)
    recorder.settled()
    assert not jobs.cancel(job.id)
    assert sum(isinstance(event, Settled | Failed) for event in recorder.events) == 1
