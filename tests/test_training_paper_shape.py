"""The preset paper with every size divided, over machines of two shards: its own layers, masks, precision and sharding."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle.config import load_preset, override, validate
from dalle.data.pair import Pair
from dalle.training import loop
from dalle.training.distributed import Layout
from dalle.training.loop import Progress, train_stage
from dalle.training.optim import MovingAverage, Plateau, adamw16
from dalle.training.precision import ResblockScaling
from dalle.training.processes import World
from dalle.training.recipe import DistributedConfig, Recipe
from dalle.training.transformer import Sequences, TransformerStage
from dalle.transformer import Transformer, TransformerConfig
from tests.spawned import spawn
from tests.tiny import GRID, N_CODES, N_TEXT, tiny_dvae, tiny_tokenizer

STEPS = 20
PAPER = validate(
    Recipe,
    override(
        load_preset("paper"),
        [
            "transformer.n_heads=2",  # 62
            "transformer.d_head=8",  # 64
            "transformer.conv_kernel=3",  # 11
            f"transformer_training.steps={STEPS}",
            "transformer_training.batch_size=4",  # 1024: one for each process
            "transformer_training.warmup_steps=2",
            "transformer_training.learning_rate=0.02",
            "transformer_training.average_every=2",
            f"transformer_training.validate_every={STEPS}",
            "transformer_training.checkpoint_every=10",
            "transformer_training.n_validation=8",
            "transformer_training.compression.rank=2",  # 112
        ],
    ),
    "test",
)
LAYOUT = DistributedConfig(mode="hybrid", shard_size=2, checkpoint_blocks=True)


def paper_stage(world: World, n_layers: int) -> TransformerStage:
    captions = [f"a {colour} {thing}" for colour in ("red", "blue", "green", "grey") for thing in "abcdef"]
    tokenizer = tiny_tokenizer(captions)
    shape = PAPER.transformer
    config = TransformerConfig(
        **(shape.model_dump() | {"n_layers": n_layers}),
        n_text_tokens=N_TEXT,
        n_text_vocab=tokenizer.n_vocab,
        grid_size=GRID,
        n_image_vocab=N_CODES,
    )
    torch.manual_seed(0)
    pairs = [Pair(key=f"{i:02d}", captions=(caption,), split="train") for i, caption in enumerate(captions)]
    tokens = np.random.default_rng(0).integers(N_CODES, size=(len(pairs), GRID, GRID)).astype(np.uint16)
    sequences = Sequences(pairs, [tokens])
    return TransformerStage(
        Transformer(config),
        PAPER.transformer_training,
        tokenizer,
        tiny_dvae(),
        sequences,
        sequences,
        seed=0,
        balance=None,
        sampling=PAPER.sampling,
        world=world,
    )


def trained(world: World, folder: Path, n_layers: int) -> dict[str, Any]:
    """The averaged weights, and what this process holds of the last ones."""
    stage = paper_stage(world, n_layers)
    averaged = train_stage(stage, folder, torch.float32, quiet=True, world=world, config=LAYOUT)
    return {
        "average": averaged,
        "own": [parameter.detach().to_local() for parameter in stage.model.parameters()],
    }


def deep(world: World) -> dict[str, Any]:
    """Twenty updates of all 64 layers: what is logged, and what this process holds of the weights."""
    stage = paper_stage(world, PAPER.transformer.n_layers)
    settings, model = stage.settings, stage.model
    scaling = ResblockScaling(model)
    layout = Layout(model, world, LAYOUT, settings.compression, scaling)
    optimizer, average = adamw16(model, settings), MovingAverage(model, settings.average_decay, on_cpu=True)
    plateau, progress, rows = Plateau(), Progress(), []
    for step in range(1, STEPS + 1):
        rows.append(loop.update(stage, optimizer, plateau, progress, torch.float32, scaling, layout)[1])
        if step % settings.average_every == 0:
            average.update(model, step // settings.average_every)
    return {"rows": rows, "own": [parameter.detach().to_local() for parameter in model.parameters()]}


def shallow(world: World, folder: str) -> dict[str, Any]:
    """Twenty updates of 4 layers; then the second ten again, from the checkpoint between."""
    found = {"whole": trained(world, Path(folder), 4)}
    if world.is_main:
        shutil.rmtree(Path(folder) / "checkpoints" / "transformer" / f"step-{STEPS}")
    world.wait()
    found["resumed"] = trained(world, Path(folder), 4)
    return found


pytestmark = pytest.mark.long


def test_twenty_updates_of_64_layers_lower_the_loss(tmp_path: Path) -> None:
    assert PAPER.transformer.n_layers == 64
    found = spawn(4, deep, tmp_path)
    rows = found[0]["rows"]
    assert all(other["rows"] == rows for other in found[1:])
    assert sum(row["loss"] for row in rows[-5:]) < 0.97 * sum(row["loss"] for row in rows[:5])
    assert rows[-1]["n_non_finite"] == 0
    assert rows[-1]["lowest_scale_bits"] == pytest.approx(13.02)
    assert rows[-1]["compression_ratio"] < 0.6
    # Processes 0 and 2 hold the first shard, 1 and 3 the second.
    shards = [results["own"] for results in found]
    for first, second in ((0, 2), (1, 3)):
        assert all(torch.equal(*pair) for pair in zip(shards[first], shards[second], strict=True))
    assert not torch.equal(shards[0][-1], shards[1][-1])


def test_the_second_half_again_ends_with_the_same_weights(tmp_path: Path) -> None:
    found = spawn(4, shallow, tmp_path / "results", str(tmp_path / "run"))
    for results in found:
        for one, other in zip(results["whole"]["own"], results["resumed"]["own"], strict=True):
            assert torch.equal(one, other)
    averages: list[dict[str, Tensor]] = [found[0][name]["average"] for name in ("whole", "resumed")]
    assert all(torch.equal(tensor, averages[1][name]) for name, tensor in averages[0].items())
