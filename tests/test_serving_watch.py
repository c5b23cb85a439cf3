"""Watching a run: read while it is written, never outside its folder; each remark is earned, and none is a false alarm."""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from dalle.serving import watch
from dalle.serving.app import create_app
from dalle.serving.diagnosis import Remark, diagnose
from dalle.serving.settings import Settings
from dalle.serving.watch import Run, Runs, RunSnapshot
from dalle.training.log import RunLog
from tests.tiny import tiny_pipe

Values = dict[str, Any]


class Written:
    """A run's folder as `dalle train` writes it, a row at a time."""

    def __init__(self, root: Path, name: str = "a run", **config: Any) -> None:
        self.out, self.folder = root / name, root / name / "run"
        self.folder.mkdir(parents=True)
        training = {"steps": 4000, "warmup_steps": 50, "batch_size": 64, "n_validation": 512}
        recipe = {f"{stage}_training": training for stage in watch.STAGES}
        recipe["dvae"] = {"n_codes": 4096, "quantizer": "fsq"}
        recipe["transformer"], recipe["clip"] = {"n_layers": 6}, {"d_embed": 256}
        self.config = {"recipe": recipe, "init_from": {}} | config
        (self.folder / "config.json").write_text(json.dumps(self.config))
        self.root = root

    def add(self, stage: str, step: int, **values: Any) -> None:
        row = {"stage": stage, "step": step, "seconds": step * 1.0} | values
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def losses(self, stage: str, points: list[tuple[int, float]], **values: Any) -> None:
        """Training rows every ten updates, on straight lines between the points."""
        for (start, before), (end, after) in itertools.pairwise(points):
            for step in range(start, end, 10):
                share = (step - start) / (end - start)
                self.add(stage, step, loss=before + share * (after - before), **values)
        step, loss = points[-1]
        self.add(stage, step, loss=loss, **values)

    def finish(self, *stages: str) -> None:
        (self.folder / "stages.json").write_text(json.dumps({stage: {"inputs": {}} for stage in stages}))

    def run(self) -> Run:
        return Runs(self.root).all()[0]

    def look(self) -> RunSnapshot:
        return self.run().look()


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return Written(tmp_path)


def remarks(written: Written, later: float = 5.0) -> list[Remark]:
    look = written.look()
    return diagnose(look, look.updated_at + later)


def said(written: Written, later: float = 5.0) -> list[tuple[str, str]]:
    """Severity and first word of each remark."""
    return [(remark.severity, remark.text.split()[0]) for remark in remarks(written, later)]


def steps(look: RunSnapshot) -> list[int]:
    return [row.step for row in look.rows]


# Reading


def test_what_the_training_log_writes_is_read(tmp_path: Path) -> None:
    written = Written(tmp_path)
    with RunLog(written.folder, "transformer", steps=100, done=0, quiet=True) as log:
        log.metrics(10, {"loss": 4.5, "learning_rate": 1e-3, "n_non_finite": 0})
        log.metrics(20, {"loss": float("nan"), "n_non_finite": 1})
        log.metrics(20, {"validation_image_loss": 4.25})
    look = written.look()
    assert [(row.stage, row.step) for row in look.rows] == [("transformer", step) for step in (10, 20, 20)]
    assert look.rows[0].values["loss"] == 4.5 and look.rows[1].values["loss"] is None
    assert look.rows[2].values["validation_image_loss"] == 4.25 and look.problems == []


def test_half_a_line_waits_for_its_other_half(written: Written) -> None:
    written.add("dvae", 10, loss=1.0)
    run, file = written.run(), written.folder / "metrics.jsonl"
    whole = json.dumps({"stage": "dvae", "step": 20, "loss": 0.5}) + "\n"
    with file.open("a") as stream:
        stream.write(whole[:15])
    assert steps(run.look()) == [10]
    with file.open("a") as stream:
        stream.write(whole[15:])
    assert steps(run.look()) == [10, 20]


def test_only_new_bytes_are_read(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    run, n_parsed = written.run(), 0
    parse = watch._object

    def count(data: bytes) -> Any:
        nonlocal n_parsed
        n_parsed += b"loss" in data
        return parse(data)

    monkeypatch.setattr(watch, "_object", count)
    for step in range(10, 110, 10):
        written.add("dvae", step, loss=1.0)
        assert steps(run.look())[-1] == step
    assert n_parsed == 10


def test_rows_that_a_resumed_stage_writes_again_count_once(written: Written) -> None:
    for step in (10, 20, 30, 40):
        written.add("transformer", step, loss=float(step))
    run = written.run()
    seen = run.look()
    written.add("transformer", 20, resumed=True)
    written.add("transformer", 30, loss=3.5)
    look = run.look()
    assert steps(look) == [10, 20, 20, 30] and look.rows[-1].values["loss"] == 3.5
    assert seen.end < look.rewritten_at  # whoever has the dropped rows is told


def test_a_run_begun_anew_forgets_the_old_one(written: Written) -> None:
    for step in (10, 20, 30):
        written.add("dvae", step, loss=1.0)
    run = written.run()
    assert steps(run.look()) == [10, 20, 30]
    (written.folder / "metrics.jsonl").unlink()
    written.add("dvae", 10, loss=2.0)
    assert [row.values["loss"] for row in run.look().rows] == [2.0]


@pytest.mark.parametrize(
    "line",
    [
        "not JSON",
        "[1]",
        '{"stage": "dvae"}',
        '{"stage": "../x", "step": 1}',
        '{"stage": "dvae", "step": "1"}',
        '{"stage": "dvae", "step": true}',
        '{"stage": "dvae", "step": -1}',
        "[" * 100_000,
        '{"a": "' + "x" * 2_000_000 + '"}',
    ],
)
def test_a_broken_line_is_left_out_and_named(written: Written, line: str) -> None:
    written.add("dvae", 10, loss=1.0)
    with (written.folder / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    written.add("dvae", 20, loss=1.0)
    look = written.look()
    assert steps(look) == [10, 20] and look.problems == [
        "1 lines of metrics.jsonl are not JSON and were left out"
    ]


def test_numbers_that_json_cannot_carry_become_none_and_text_is_left_out(written: Written) -> None:
    with (written.folder / "metrics.jsonl").open("a") as file:
        file.write(
            '{"stage": "dvae", "step": 1, "a": 1e999, "b": NaN, "c": "\\ud800<b>", "d": [1], "\\ud800": 2}\n'
        )
    [row] = written.look().rows
    assert row.values == {"a": None, "b": None, "?": 2}


def test_a_long_run_is_thinned_and_keeps_its_validations_and_its_last_row(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "MAX_ROWS", 50)
    for step in range(10, 2010, 10):
        written.add("transformer", step, loss=1.0)
        if step % 500 == 0:
            written.add("transformer", step, validation_image_loss=1.0)
    look = written.look()
    assert len(look.rows) <= 50 and look.rows[-2].step == 2000
    assert sum("validation_image_loss" in row.values for row in look.rows) == 4


def test_stages_say_where_they_stand(tmp_path: Path) -> None:
    written = Written(tmp_path, init_from={"dvae": "hash", "transformer": "hash"})
    (written.folder / "stages.json").write_text(json.dumps({"dvae": {"inputs": {"given": "hash"}}}))
    written.add("transformer", 10, loss=1.0)
    states = {state.stage: state for state in written.look().stages}
    assert [(stage, state.status) for stage, state in states.items()] == [
        ("dvae", "given"),
        ("decoder", "waiting"),
        ("transformer", "running"),
        ("clip", "waiting"),
    ]
    assert (states["transformer"].step, states["transformer"].steps) == (10, 4000)
    assert states["transformer"].is_continued and not states["clip"].is_continued


# Nothing outside the folder


def test_a_link_that_leads_out_is_not_followed(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "runs"
    secret = Written(outside, "secret")
    secret.add("dvae", 10, loss=1.0)
    root.mkdir()
    (root / "linked").symlink_to(secret.out)
    assert Runs(root).all() == []

    written = Written(root, "real")
    (written.folder / "metrics.jsonl").symlink_to(secret.folder / "metrics.jsonl")
    (written.folder / "samples").symlink_to(outside)
    look = Runs(root).all()[0].look()
    assert look.rows == [] and look.sheets == []
    assert look.problems == [
        "metrics.jsonl cannot be read: it is a link that leads out of the watched folder"
    ]


def test_a_sheet_that_is_a_link_outwards_or_no_png_is_not_served(written: Written) -> None:
    folder = written.folder / "samples" / "dvae"
    folder.mkdir(parents=True)
    (written.root.parent / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\n secret")
    (folder / "step-0000001.png").symlink_to(written.root.parent / "secret.png")
    (folder / "step-0000002.png").write_text("<script>")
    Image.new("RGB", (8, 8)).save(folder / "step-0000003.png")
    run = written.run()
    assert [sheet.name for sheet in run.look().sheets] == ["dvae-2", "dvae-3"]
    assert run.sheet("dvae-1") is None and run.sheet("../../config") is None
    with pytest.raises(ValueError, match="no PNG"):
        run.sheet("dvae-2")
    assert run.sheet("dvae-3") == (folder / "step-0000003.png").read_bytes()


def test_a_pipe_in_place_of_a_file_is_not_waited_for(written: Written) -> None:
    os.mkfifo(written.folder / "metrics.jsonl")
    assert written.look().problems == ["metrics.jsonl cannot be read: it is no plain file"]


def test_a_run_folder_itself_can_be_watched(tmp_path: Path) -> None:
    written = Written(tmp_path)
    assert [run.name for run in Runs(written.out).all()] == ["a run"]
    assert Runs(written.out).all()[0].id == written.run().id


def test_no_folder_of_runs_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder of training runs"):
        Runs(tmp_path / "nothing")


# Remarks: real runs earn none. Numbers of the bundled model's transformer and CLIP and of its dVAE, thinned.

REAL_IMAGE = [4.5104, 4.4626, 4.4234, 4.3864, 4.3535, 4.3221, 4.2976, 4.278, 4.2663, 4.2584]
REAL_SHUFFLED = [5.1987, 5.1869, 5.1972, 5.2059, 5.2165, 5.2317, 5.2537, 5.2663, 5.2806, 5.2896]
REAL_LOSS = """4.574 4.328 4.556 4.453 4.552 4.286 4.338 4.486 4.572 4.399 4.418 4.228 4.557 4.3 4.172 4.322 4.166 4.114 4.315
4.116 4.031 4.044 4.039 3.936 4.1 3.928 4.024 4.157 3.936 3.998 4.029 3.836 4.053 4.052 3.74 3.882 3.953 3.864 3.819 3.871"""
REAL_RECALL = [0.209, 0.4609, 0.5547, 0.5977, 0.6035, 0.6367, 0.6504, 0.6445, 0.6582, 0.6621, 0.6621, 0.6621]
REAL_CLIP_LOSS = """5.492 4.247 3.603 3.302 2.508 2.329 2.098 1.859 1.795 1.462 1.289 1.15 1.116 1.148 1.027 0.893 0.938 1.052
0.695 0.656 0.753 0.588 0.615 0.553 0.511 0.547 0.48 0.438 0.399 0.434 0.395 0.349 0.334 0.368 0.307 0.305 0.234 0.292 0.451"""
REAL_DVAE = [
    (250, 18.4786, 0.4968),
    (1250, 21.4888, 0.7522),
    (2250, 22.1125, 0.8125),
    (3250, 22.4614, 0.8347),
]
REAL_DVAE_LOSS = (
    "0.17 0.027 0.024 0.017 0.015 0.012 0.012 0.011 0.01 0.011 0.013 0.01 0.009 0.009 0.007 0.011 0.011"
)


def real_transformer(written: Written) -> Iterator[None]:
    for i, loss in enumerate(REAL_LOSS.split()):
        written.add(
            "transformer", 10 + 100 * i, loss=float(loss), learning_rate=2e-3 - 4.75e-5 * i, n_non_finite=0
        )
        if i % 4 == 3:
            figures = {"image_loss": REAL_IMAGE[i // 4], "image_loss_shuffled": REAL_SHUFFLED[i // 4]}
            written.add(
                "transformer", 100 + 100 * i, **{f"validation_{name}": it for name, it in figures.items()}
            )
        yield


def real_clip(written: Written) -> Iterator[None]:
    for i, loss in enumerate(REAL_CLIP_LOSS.split()):
        written.add("clip", 10 + 60 * i, loss=float(loss), learning_rate=1e-3, n_non_finite=0)
        if i % 3 == 2 and i // 3 < len(REAL_RECALL):
            written.add("clip", 60 + 60 * i, validation_recall_caption_to_picture=REAL_RECALL[i // 3])
        yield


def real_dvae(written: Written) -> Iterator[None]:
    validations = {step: (psnr, used) for step, psnr, used in REAL_DVAE}
    for i, loss in enumerate(REAL_DVAE_LOSS.split()):
        written.add("dvae", 10 + 200 * i, loss=float(loss), learning_rate=2e-3, n_non_finite=0)
        for step in range(10 + 200 * i, 210 + 200 * i):
            if step in validations:
                psnr, used = validations[step]
                written.add("dvae", step, validation_psnr=psnr, validation_codes_used=used)
        yield


@pytest.mark.parametrize("real", [real_transformer, real_clip, real_dvae])
def test_real_runs_earn_no_remark_at_any_time(tmp_path: Path, real: Any) -> None:
    given = {"transformer": "hash"} if real is real_transformer else {}  # that run went on from given weights
    written = Written(tmp_path, init_from=given)
    run = written.run()
    for _ in real(written):
        look = run.look()
        assert diagnose(look, look.updated_at + 60) == []


def test_the_worst_remark_stands_first_and_each_has_its_reason(written: Written) -> None:
    written.losses("transformer", [(10, 8.0), (600, 8.0)], n_non_finite=1, learning_rate=0.0)
    found = remarks(written)
    assert [remark.severity for remark in found] == ["error", "warning", "info"]
    for remark in found:
        assert remark.stage == "transformer" and remark.why and "\n" not in remark.text + remark.why


# Remarks: the loss


def test_a_loss_that_does_not_fall_is_an_error(written: Written) -> None:
    written.losses("transformer", [(10, 8.3), (500, 8.28)])
    assert said(written) == [("error", "The")] and "does not fall" in remarks(written)[0].text


@pytest.mark.parametrize(
    "points", [[(10, 8.3), (240, 8.3)], [(10, 8.3), (500, 7.9)], [(10, -1.0), (500, -1.5)]]
)
def test_a_loss_that_falls_or_is_still_in_its_warm_up_is_none(written: Written, points: list[Any]) -> None:
    written.losses("transformer", points)
    assert said(written) == []


def test_a_stage_that_goes_on_from_given_weights_may_stay_where_it_was(tmp_path: Path) -> None:
    written = Written(tmp_path, init_from={"transformer": "hash"})
    written.losses("transformer", [(10, 4.5), (2000, 4.5)])
    assert said(written) == []


@pytest.mark.parametrize(
    "points", [[(10, 8.0), (1000, 4.0), (1200, 7.0)], [(10, 0.3), (900, -1.6), (1000, -0.2)]]
)
def test_a_loss_that_rises_again_is_an_error(written: Written, points: list[Any]) -> None:
    written.losses("dvae", points)
    assert said(written) == [("error", "The")] and "diverges" in remarks(written)[0].text


def test_a_warm_up_that_shakes_given_weights_is_no_divergence(tmp_path: Path) -> None:
    written = Written(tmp_path, init_from={"transformer": "hash"})
    written.losses(
        "transformer", [(10, 3.86), (100, 3.74), (260, 3.99)]
    )  # as seen in a run that then did well
    assert said(written) == []


def test_a_single_spike_is_no_divergence(written: Written) -> None:
    written.losses("transformer", [(10, 8.0), (1000, 4.0)])
    written.add("transformer", 1010, loss=30.0)
    written.losses("transformer", [(1020, 4.0), (1200, 3.9)])
    assert said(written) == []


def test_a_loss_that_is_no_number_is_an_error(written: Written) -> None:
    written.losses("transformer", [(10, 8.0), (500, 4.0)])
    written.add("transformer", 510, loss=None, n_non_finite=0)
    assert said(written) == [("error", "The")] and "not a number" in remarks(written)[0].text


@pytest.mark.parametrize(("n_skipped", "severity"), [(0, None), (3, "info"), (11, "warning")])
def test_skipped_updates_are_said_and_many_are_a_warning(
    written: Written, n_skipped: int, severity: Any
) -> None:
    written.losses("transformer", [(10, 8.0), (1000, 4.0)], n_non_finite=n_skipped)
    assert [it for it, _ in said(written)] == ([severity] if severity else [])


@pytest.mark.parametrize(("rate", "is_said"), [(0.0, True), (1e-12, True), (1e-5, False)])
def test_a_learning_rate_of_zero_is_a_warning(written: Written, rate: float, is_said: bool) -> None:
    written.losses("transformer", [(10, 8.0), (500, 4.0)], learning_rate=2e-3)
    written.add("transformer", 510, loss=4.0, learning_rate=rate)
    assert said(written) == ([("warning", "The")] if is_said else [])
    written.finish("transformer")
    assert said(written) == []  # the stage is done


# Remarks: held-out pictures


def add_validations(written: Written, stage: str, name: str, figures: list[float]) -> None:
    for i, figure in enumerate(figures, start=1):
        written.losses(stage, [(400 * i - 390, 8.0 - i), (400 * i - 10, 7.1 - i)])
        written.add(stage, 400 * i, **{name: figure})


@pytest.mark.parametrize(
    ("stage", "name", "figures", "is_said"),
    [
        ("transformer", "validation_image_loss", [4.5, 4.39, 4.4, 4.42, 4.45], True),
        ("transformer", "validation_image_loss", [4.5, 4.39, 4.4, 4.42, 4.43], False),
        ("transformer", "validation_image_loss", [4.39, 4.45], False),  # two figures are no trend
        ("dvae", "validation_psnr", [20.0, 23.0, 22.4], True),
        ("dvae", "validation_psnr", [20.0, 23.0, 22.6], False),
        ("clip", "validation_recall_caption_to_picture", [0.3, 0.66, 0.58], True),
        ("clip", "validation_recall_caption_to_picture", [0.3, 0.66, 0.62], False),
    ],
)
def test_overfitting_is_said_beyond_its_threshold(
    written: Written, stage: str, name: str, figures: list[float], is_said: bool
) -> None:
    add_validations(written, stage, name, figures)
    assert said(written) == ([("warning", "Overfitting:")] if is_said else [])


def test_held_out_and_training_loss_that_rise_together_are_no_overfitting(written: Written) -> None:
    written.losses("transformer", [(10, 8.0), (800, 4.0)])
    written.add("transformer", 400, validation_image_loss=5.0)
    written.losses("transformer", [(810, 4.0), (2000, 4.5)])
    for step, figure in ((2000, 4.3), (2010, 4.6), (2020, 4.6)):
        written.add("transformer", step, validation_image_loss=figure, loss=4.5 + (step - 2000) / 50)
    assert ("warning", "Overfitting:") not in said(written)


@pytest.mark.parametrize(("shuffled", "is_said"), [(4.42, True), (4.38, True), (4.5, False)])
def test_captions_that_are_not_read_are_a_warning(written: Written, shuffled: float, is_said: bool) -> None:
    written.losses("transformer", [(10, 8.0), (800, 4.0)])
    for step in (400, 800):
        figures = {"validation_image_loss": 4.4, "validation_image_loss_shuffled": shuffled}
        written.add("transformer", step, **figures)
        if step == 400:
            assert said(written) == []  # the first validation comes early
    assert said(written) == ([("warning", "Captions")] if is_said else [])


@pytest.mark.parametrize(
    ("step", "share", "expected"),
    [
        (500, 37 / 4096, [("error", "The")]),
        (500, 0.3, []),  # early
        (1500, 0.3, [("warning", "Much")]),
        (1500, 0.6, []),
    ],
)
def test_a_collapsed_codebook_is_an_error_and_an_idle_one_a_warning(
    written: Written, step: int, share: float, expected: Any
) -> None:
    written.losses("dvae", [(10, 0.17), (step, 0.01)])
    written.add("dvae", step // 2, validation_codes_used=share)
    assert said(written) == []  # one validation says nothing
    written.add("dvae", step, validation_codes_used=share)
    assert said(written) == expected
    if share < 0.1:
        assert "37 of 4096 codes" in remarks(written)[0].text


# Remarks: the run


def test_bad_samples_are_said_and_many_are_a_warning(written: Written) -> None:
    written.add("dvae", 10, loss=1.0)  # 640 pictures seen
    bad = written.folder / "bad_samples.jsonl"
    bad.write_text('{"key": "a", "reason": "truncated"}\n{"key": "b", "rea')
    assert said(written) == [("info", "1")] and "truncated" in remarks(written)[0].text
    bad.write_text("".join(json.dumps({"key": str(i), "reason": "not a picture"}) + "\n" for i in range(4)))
    assert said(written) == [("warning", "4")] and "not a picture" in remarks(written)[0].text


def test_a_run_without_news_is_a_warning_until_its_stage_is_done(written: Written) -> None:
    written.losses("transformer", [(10, 8.0), (500, 4.0)])
    assert said(written, later=590) == []
    assert said(written, later=610) == [("warning", "No")]
    written.add(
        "transformer", 510, loss=4.0, seconds=500.0 + 1000
    )  # validation of 1000 s: silence is its habit
    assert said(written, later=4900) == []
    assert said(written, later=5100) == [("warning", "No")]
    written.finish("transformer")
    assert said(written, later=10**6) == []


# Over HTTP


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Written, TestClient]]:
    """A run, and a server that watches it."""
    written = Written(tmp_path_factory.mktemp("runs"))
    settings = Settings(data_dir=tmp_path_factory.mktemp("data"), runs=written.root)
    with TestClient(create_app(settings, tiny_pipe(["a cat"])), base_url="http://127.0.0.1:8000") as client:
        yield written, client


def test_a_run_is_followed_by_its_cursor(served: tuple[Written, TestClient]) -> None:
    written, client = served
    written.losses("dvae", [(10, 0.2), (300, 0.01)], perplexity=900.0)
    written.add("dvae", 300, validation_codes_used=0.8, validation_psnr=22.0)
    folder = written.folder / "samples" / "dvae"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "step-0000300.png")
    [summary] = client.get("/api/runs").json()["runs"]
    assert (summary["name"], summary["stage"], summary["step"]) == ("a run", "dvae", 300)
    path = f"/api/runs/{summary['id']}"

    first = client.get(path).json()
    assert len(first["metrics"]) == 31 and first["reset"] is False and first["remarks"] == []
    assert first["codebook"] == {"n_codes": 4096, "share_used": 0.8, "perplexity": 900.0}
    assert first["stages"][0] == {"stage": "dvae", "status": "running", "step": 300, "steps": 4000}
    [sheet] = first["sheets"]
    assert (sheet["stage"], sheet["step"], sheet["kind"]) == ("dvae", 300, "reconstructions")
    answer = client.get(sheet["url"])
    assert answer.content.startswith(b"\x89PNG") and answer.headers["content-type"] == "image/png"

    assert client.get(path, params={"since": first["next"]}).json()["metrics"] == []
    written.add("dvae", 310, loss=0.01)
    second = client.get(path, params={"since": first["next"]}).json()
    assert [row["step"] for row in second["metrics"]] == [310]
    written.add("dvae", 250, resumed=True)
    third = client.get(path, params={"since": second["next"]}).json()
    assert third["reset"] is True and third["metrics"][-1]["step"] == 250
    assert max(row["step"] for row in third["metrics"]) == 250


@pytest.mark.parametrize(
    "path", ["/api/runs/{id}x", "/api/runs/..", "/api/runs/a%20run", "/api/runs/{id}/sheets/dvae-1.png"]
)
def test_what_is_no_run_or_sheet_is_a_404(served: tuple[Written, TestClient], path: str) -> None:
    written, client = served
    answer = client.get(path.format(id=written.run().id))
    assert answer.status_code == 404 and "error" in answer.json()


@pytest.mark.parametrize("since", ["-1", "x", "9" * 30])
def test_a_wrong_cursor_is_refused(served: tuple[Written, TestClient], since: str) -> None:
    written, client = served
    assert 400 <= client.get(f"/api/runs/{written.run().id}", params={"since": since}).status_code < 500


def test_without_a_folder_of_runs_there_are_none(tmp_path: Path) -> None:
    with TestClient(
        create_app(Settings(data_dir=tmp_path), tiny_pipe(["a cat"])), base_url="http://127.0.0.1:8000"
    ) as it:
        assert it.get("/api/runs").json() == {"runs": []}
        assert it.get("/api/runs/x").status_code == 404
