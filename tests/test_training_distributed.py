"""Several processes train as one would: the same losses and weights, each from its own part of the data."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle.config import validate
from dalle.data.pair import Pair
from dalle.data.pairs import read_pairs
from dalle.data.reading import BadSampleLog
from dalle.data.shapes import write_shapes
from dalle.generation.request import GenerationOptions
from dalle.training import loop
from dalle.training.clip import CLIPStage
from dalle.training.distributed import Layout, _mesh
from dalle.training.dvae import DVAEStage
from dalle.training.loop import Progress
from dalle.training.optim import OPTIMIZERS, MovingAverage, Plateau
from dalle.training.processes import World
from dalle.training.recipe import CLIPTraining, DistributedConfig, DVAETraining, TransformerTraining
from dalle.training.transformer import Sequences, TransformerStage
from tests.spawned import learned, spawn
from tests.tiny import GRID, N_CODES, needs_compiler, tiny_clip, tiny_dvae, tiny_tokenizer, tiny_transformer

N_PAIRS, UPDATES = 24, 4
SETTINGS: dict[str, Any] = {
    "steps": UPDATES,
    "batch_size": 8,
    "accumulation": 2,
    "learning_rate": 3e-3,
    "final_learning_rate": 1e-3,
    "weight_decay": 0.05,
    "clip_norm": 0.5,  # of gradients several times as long
    "average_decay": 0.9,
    "validate_every": 2,
    "checkpoint_every": 2,
    "sheet_every": 100,
    "n_validation": 8,
    "crop": "center",
    "bpe_dropout": 0.1,
    "caption_dropout": 0.2,
    "token_noise": 0.2,
}
CASES: dict[str, dict[str, Any]] = {
    "ddp": {"mode": "ddp"},
    "shard": {"mode": "shard"},
    "hybrid": {"mode": "hybrid", "shard_size": 2},
    "ddp, recomputed": {"mode": "ddp", "checkpoint_blocks": True},
    "shard, recomputed": {"mode": "shard", "checkpoint_blocks": True},
    "shard, Muon": {"mode": "shard"},
    "hybrid, Muon": {"mode": "hybrid", "shard_size": 2},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread, and wait long for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def transformer_stage(world: World, dtype: torch.dtype = torch.float64, **changes: Any) -> TransformerStage:
    """The second stage on 24 captions and random tokens, in fp64."""
    captions = [f"a {colour} {thing}" for colour in ("red", "blue", "green", "grey") for thing in "abcdef"]
    tokenizer = tiny_tokenizer(captions)
    pairs = [Pair(key=f"{i:02d}", captions=(caption,), split="train") for i, caption in enumerate(captions)]
    tokens = np.random.default_rng(0).integers(N_CODES, size=(N_PAIRS, GRID, GRID)).astype(np.uint16)
    sequences = Sequences(pairs, [tokens])
    return TransformerStage(
        tiny_transformer(tokenizer.n_vocab).to(dtype),
        validate(TransformerTraining, SETTINGS | changes, "test"),
        tokenizer,
        tiny_dvae(),
        sequences,
        sequences,
        seed=0,
        balance=None,
        sampling=GenerationOptions(),
        world=world,
    )


def trained(
    stage: Any, world: World, config: dict[str, Any], dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Losses and norms of some updates, the weights and the average after them, what validation says."""
    layout = Layout(stage.model, world, DistributedConfig(**config))
    optimizer = OPTIMIZERS[stage.settings.optimizer](stage.model, stage.settings)
    average = MovingAverage(stage.model, 0.9)
    plateau, progress, seen = Plateau(), Progress(), []
    for step in range(1, UPDATES + 1):
        _, figures = loop.update(stage, optimizer, plateau, progress, dtype, None, layout)
        seen.append(figures)
        average.update(stage.model, step)
    stage.model.eval()
    with average.applied(stage.model), torch.no_grad():
        validation = stage.validate()
    stage.model.train()
    return {
        "figures": seen,
        "weights": layout.whole(stage.model.state_dict()),
        "average": layout.whole(average.tensors),
        "validation": validation,
    }


def changes_of(case: str) -> dict[str, Any]:
    return {"optimizer": "muon"} if case.endswith("Muon") else {}


def all_cases(world: World) -> dict[str, Any]:
    cases = {name: case for name, case in CASES.items() if world.size > 2 or case["mode"] != "hybrid"}
    return {
        name: trained(transformer_stage(world, **changes_of(name)), world, case)
        for name, case in cases.items()
    }


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of 2 or 4 processes saw in every case."""
    return spawn(request.param, all_cases, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """What one process sees, by the optimizer."""
    return {
        name: trained(transformer_stage(World(), optimizer=name), World(), {}) for name in ("adamw", "muon")
    }


def assert_equal(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    for ours, theirs in zip(found["figures"], expected["figures"], strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)
    for part in ("weights", "average"):
        assert found[part].keys() == expected[part].keys()
        for name, tensor in expected[part].items():
            torch.testing.assert_close(found[part][name], tensor, rtol=tolerance, atol=tolerance)
    assert found["validation"] == pytest.approx(expected["validation"], rel=tolerance)


@pytest.mark.parametrize(
    ("runs", "name"),
    [
        (n, name) for n in (2, 4) for name, case in CASES.items() if n > 2 or case["mode"] != "hybrid"
    ],  # a mesh needs four
    indirect=["runs"],
)
def test_processes_give_the_losses_and_weights_of_one(
    name: str, runs: list[dict[str, Any]], alone: dict[str, dict[str, Any]]
) -> None:
    expected = alone[changes_of(name).get("optimizer", "adamw")]
    assert expected["figures"][0]["gradient_norm"] > 2 * SETTINGS["clip_norm"]
    assert_equal(runs[0][name], expected, 1e-10)
    for other in runs[1:]:
        assert other[name]["figures"] == runs[0][name]["figures"], "all processes agree"


def gradients(config: dict[str, Any]) -> dict[str, Tensor]:
    """Of one update with dropout, in one process."""
    stage = transformer_stage(World(), dropout=0.3, accumulation=1)
    layout = Layout(stage.model, World(), DistributedConfig.model_validate(config))
    loop._accumulate(stage, 0, torch.float32, layout)
    return {name: p.grad.clone() for name, p in stage.model.named_parameters() if p.grad is not None}


def test_recomputed_blocks_draw_the_same_dropout_and_give_the_same_gradient_to_the_bit() -> None:
    plain, recomputed = gradients({}), gradients({"checkpoint_blocks": True})
    assert len(plain) > 20 and plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], gradient) for name, gradient in recomputed.items())


def test_recomputed_blocks_keep_no_activations_inside() -> None:
    kept: dict[bool, int] = {}
    for recomputes in (False, True):
        stage = transformer_stage(World())
        Layout(stage.model, World(), DistributedConfig(checkpoint_blocks=recomputes))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):  # noqa: B023
            stage.loss(stage.batch(0), 0, 0)
        kept[recomputes] = sum(sizes)
    assert kept[True] < kept[False] / 2


@needs_compiler
@pytest.mark.filterwarnings("ignore")  # the compiler's own, of several kinds
@pytest.mark.long
@pytest.mark.parametrize("recomputes", [False, True])
def test_compiled_blocks_give_the_gradient_of_plain_ones(recomputes: bool) -> None:
    stages = {}
    for compiles in (False, True):
        stage = stages[compiles] = transformer_stage(World(), accumulation=1)
        config = DistributedConfig(compile_blocks=compiles, checkpoint_blocks=recomputes and compiles)
        loop._accumulate(stage, 0, torch.float32, Layout(stage.model, World(), config))
    for plain, compiled in zip(*(stages[c].model.parameters() for c in (False, True)), strict=True):
        torch.testing.assert_close(compiled.grad, plain.grad, rtol=1e-9, atol=1e-9)


def test_layouts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="shard_size belongs to mode hybrid, and mode is shard"):
        validate(DistributedConfig, {"mode": "shard", "shard_size": 2}, "test")
    hybrid = DistributedConfig(mode="hybrid", shard_size=3)
    with pytest.raises(ValueError, match="shard_size is 3, which does not divide 4 processes"):
        _mesh(World(0, 4), hybrid, torch.device("cpu"))
    with pytest.raises(ValueError, match="the launcher does not say how many processes a machine has"):
        _mesh(World(0, 4), DistributedConfig(mode="hybrid"), torch.device("cpu"))
    with pytest.raises(ValueError, match="a batch of 8 cannot be split over 3 processes: set batch_size to"):
        transformer_stage(World(0, 3)).batch(0)


# Pictures and contrast


def picture_stage(kind: str, world: World, folder: str) -> DVAEStage | CLIPStage:
    """The first or the third stage on 24 shapes, one of which cannot be read."""
    pairs = list(read_pairs(f"{folder}/data"))
    bad = BadSampleLog(Path(folder) / f"bad-{world.rank}.jsonl", total=len(pairs), limit=0.5)
    train, held_out = pairs[:16], pairs[16:]
    settings = SETTINGS | {"batch_size": 8, "learning_rate": 3e-4, "final_learning_rate": 1e-4}
    for name in ("crop", "bpe_dropout", "caption_dropout", "token_noise"):
        del settings[name]
    if kind == "dvae":
        found = validate(DVAETraining, settings | {"crop": "center"}, "test")
        return DVAEStage(tiny_dvae(), found, train, held_out, bad, seed=0, balance=None, world=world)
    tokenizer = tiny_tokenizer(caption for pair in pairs for caption in pair.captions)
    return CLIPStage(
        tiny_clip(tokenizer, loss="siglip" if kind == "clip, siglip" else "infonce"),
        validate(CLIPTraining, settings | {"crop": "near"}, "test"),
        tokenizer,
        None,
        train,
        held_out,
        bad,
        seed=0,
        balance=None,
        world=world,
    )


KINDS = ("dvae", "clip", "clip, siglip")


def picture_cases(world: World, folder: str) -> dict[str, Any]:
    return {
        f"{kind}, {mode}": trained(picture_stage(kind, world, folder), world, {"mode": mode})
        for kind in KINDS
        for mode in ("ddp", "shard")
    }


@pytest.fixture(scope="module")
def picture_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What two processes see in each stage and layout, and what one sees in each stage."""
    folder = tmp_path_factory.mktemp("pictures")
    write_shapes(folder / "data", 24, seed=0)
    (folder / "data" / "000003.png").write_bytes(b"not a picture")
    found = spawn(2, picture_cases, folder / "results", str(folder))[0]
    alone = {kind: trained(picture_stage(kind, World(), str(folder)), World(), {}) for kind in KINDS}
    return {**found, **alone}


@pytest.mark.parametrize("mode", ["ddp", "shard"])
@pytest.mark.parametrize("kind", KINDS)
def test_dvae_and_clip_train_as_in_one_process_though_a_picture_is_unreadable(
    kind: str, mode: str, picture_runs: dict[str, dict[str, Any]]
) -> None:
    ours, expected = picture_runs[f"{kind}, {mode}"], picture_runs[kind]
    for figures, others in zip(ours["figures"], expected["figures"], strict=True):
        for name in ("loss", "gradient_norm"):
            assert figures[name] == pytest.approx(others[name], rel=1e-4)
    for name, tensor in expected["weights"].items():
        found = learned(name, ours["weights"][name])
        torch.testing.assert_close(found, learned(name, tensor), rtol=1e-5, atol=1e-5)
    assert ours["validation"] == pytest.approx(expected["validation"], rel=1e-3)
