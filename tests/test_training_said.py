"""What a run says: its epoch, its first update, where its sheets are, what it reuses, and the next command."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dalle import files
from dalle.config import load_preset, override, validate
from dalle.data.pairs import read_pairs
from dalle.data.shapes import write_shapes
from dalle.evaluation.report import evaluate
from dalle.evaluation.subject import Settings
from dalle.generation.precision import default_dtype
from dalle.pipeline import DallePipeline
from dalle.training.recipe import Recipe
from dalle.training.train import STAGES, _warn_of_emulation, train
from tests.test_training_train import MICRO, recipe, rows, run


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread, and wait long for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 captioned shapes, of which 4 are held out."""
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", 16, seed=0)


def said_by(
    caplog: pytest.LogCaptureFixture, data: Path, out: Path, *settings: str, **options: Any
) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        train(str(data), out, recipe(*settings), device=torch.device("cpu"), dtype=torch.float32, **options)
    return [record.getMessage() for record in caplog.records]


def test_a_run_says_its_epoch_first_update_sheets_and_next_command(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "a model"
    said = said_by(caplog, data, out, "balance.fields=['okey']", "balance.cap=2")
    assert (
        f"{data}: an epoch has 12 of 12 pictures to learn from: [balance] takes at most 2 that agree in okey; "
        in ("\n".join(said))
    )
    for stage in ("dvae", "transformer"):
        assert f"{stage}: 2 updates of 2 pictures; sample sheets in {out / 'run' / 'samples' / stage}" in said
        assert any(line.startswith(f"{stage} 1/2  loss ") for line in said)
    assert any(row["step"] == 1 and "loss" in row for row in rows(out)), "the first update is logged"
    assert said[-1].startswith(f"{out} is a model now; next: dalle generate 'a ")
    assert said[-1].endswith(f" --model '{out}'")
    said = said_by(caplog, data, out, "balance.fields=['okey']", "balance.cap=2")
    for stage in ("tokenizer", "dvae", "transformer"):
        assert f"{stage}: finished before, kept" in said


def test_a_run_of_some_stages_says_how_to_go_on(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = said_by(caplog, data, tmp_path / "model", stages=("dvae",))
    assert (
        said[-1] == f"{tmp_path / 'model'} has tokenizer and dvae; next: the same command with --stages all"
    )


def test_given_parts_are_said_and_their_sizes_recorded_in_place_of_settings_without_effect(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained, out = run(data, tmp_path / "trained"), tmp_path / "model"
    said = said_by(caplog, data, out, "transformer.n_heads=7", "dvae.d_hidden=16", init_from=trained)
    changes = "dvae.d_hidden: 16 -> 8; transformer.n_heads: 7 -> 2"
    assert f"settings that the given parts decide: {changes}" in said
    assert f"dvae: reused from {trained / 'dvae'}, not trained; [dvae_training] has no effect" in said
    assert f"transformer: goes on from the weights in {trained / 'transformer'}" in said
    recorded = files.read_json(out / "run" / "config.json")["recipe"]
    assert recorded["transformer"]["n_heads"] == 2 and recorded["dvae"]["d_hidden"] == 8


@pytest.mark.parametrize(
    ("setting", "dtype", "said"),
    [
        ("seed=0", torch.bfloat16, ["dvae", "transformer"]),
        ("transformer_training.precision=bf16", torch.float32, ["transformer"]),
        ("transformer_training.precision=fp32", torch.bfloat16, ["dvae"]),
        ("seed=0", torch.float32, []),
    ],
)
def test_16_bits_on_a_processor_that_emulates_them_are_said(
    setting: str,
    dtype: torch.dtype,
    said: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    _warn_of_emulation(recipe(setting), STAGES, torch.device("cpu"), dtype)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == said
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    caplog.clear()
    _warn_of_emulation(recipe(setting), STAGES, torch.device("cpu"), dtype)
    assert not caplog.records


class FloatsSeen(TorchDispatchMode):
    """Notes the dtypes of all floating-point tensors that any operation reads or makes."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes = set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                self.dtypes.add(leaf.dtype)
        return result


def test_without_native_bfloat16_nothing_computes_in_16_bits_from_training_to_drawing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    clip = {"d_embed": 16, "image_size": 32, "image_tower": "resnet", "image_layers": [1, 1, 1, 1]}
    clip |= {"image_width": 4, "text_layers": 1, "text_width": 64}
    tree = override(load_preset("tiny"), [*MICRO, "transformer_training.optimizer=muon"])
    few = {"steps": 2, "warmup_steps": 1, "batch_size": 4, "n_validation": 2}
    tree |= {"clip": clip, "clip_training": load_preset("laptop")["clip_training"] | few}
    cpu = torch.device("cpu")
    with FloatsSeen() as seen:
        settings = validate(Recipe, tree, "micro")
        dtype = default_dtype(cpu)
        out = train(str(data), tmp_path / "model", settings, device=cpu, dtype=dtype, quiet=True)
        pipe = DallePipeline.from_pretrained(out, dtype="auto")
        pipe("a red circle", num_candidates=2)
        evaluate(pipe, read_pairs(str(data)), tmp_path / "report", Settings(limit=2))
    assert torch.float32 in seen.dtypes
    assert not seen.dtypes & {torch.bfloat16, torch.float16}
