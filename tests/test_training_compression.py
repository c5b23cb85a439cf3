"""PowerSGD between replicas, under DDP and on FSDP2's shards: four processes, all cases in one start of them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dalle.attention import AttentionPlan
from dalle.config import load_preset, validate
from dalle.training.adamw16 import AdamW16
from dalle.training.compression import (
    Compressor,
    Part,
    compress_replicas,
    compress_shards,
    numbers_sent,
    orthogonal,
    shard_placement,
)
from dalle.training.optim import MovingAverage, adamw16
from dalle.training.precision import ResblockScaling
from dalle.training.processes import World
from dalle.training.recipe import Compression, Optimization, Recipe
from dalle.transformer import Layer, Transformer, TransformerConfig
from tests.spawned import spawn
from tests.tiny import GRID, N_CODES, N_TEXT, tiny_transformer

N_PROCESSES, N_VOCAB = 4, 20
FULL = Compression(rank=1000, always=True)
NOTHING = Compression(rank=1000)  # factors are never smaller, so all is sent as it is
WITH, WITHOUT = Compression(rank=4), Compression(rank=4, error_feedback=False)


def model_of(dtype: torch.dtype = torch.float32) -> Transformer:
    model = tiny_transformer(N_VOCAB).train()
    model.init_weights(torch.Generator().manual_seed(0))
    return model.to(dtype)


def batch_of(rank: int, step: int = 0, n: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    text = torch.randint(N_VOCAB, (n, N_TEXT), generator=generator)
    return text, torch.randint(N_CODES, (n, GRID**2), generator=generator)


class Loss(nn.Module):
    """The loss as a forward pass, which is what DDP watches."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        total: Tensor = self.model.loss(text, image).total
        return total


def sharded(model: Transformer, mesh: DeviceMesh, **options: Any) -> Transformer:
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights; all processes must ask."""
    return {
        name.removeprefix("module.").removeprefix("model."): whole(tensor)
        for name, tensor in model.state_dict().items()
    }


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Run:
    """A model over all processes: "ddp", "hybrid" (FSDP2's own mesh), or "shards" (compressed over replicas)."""

    def __init__(
        self,
        kind: str,
        settings: Compression | None = None,
        dtype: torch.dtype = torch.float32,
        is_scaled: bool = False,
        rate: float = 0.01,
    ) -> None:
        self.model = model_of(dtype)
        self.scaling = ResblockScaling(self.model) if is_scaled else None
        self.loss = Loss(self.model)
        self.compressor: Compressor | None = None
        placement = shard_placement(self.model)
        if kind == "ddp":
            self.loss = DistributedDataParallel(self.loss)
            if settings is not None:
                self.compressor = compress_replicas(self.loss, settings, self.scaling)
        else:
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
            used = mesh if kind == "hybrid" else mesh["shard"]
            sharded(self.model, used, shard_placement_fn=placement)
            if settings is not None:
                group = mesh.get_group("replicate")
                self.compressor = compress_shards(self.model, group, settings, self.scaling)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, betas=(0.9, 0.96))

    def backward(self, step: int, factor: float = 1.0) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(*batch_of(dist.get_rank(), step)) * factor
        loss.backward()
        return float(loss.detach())

    def update(self, step: int = 0) -> float:
        loss = self.backward(step)
        if self.scaling is None or self.scaling.unscale_():
            self.optimizer.step()
        mean = torch.tensor(loss, dtype=torch.float64)
        dist.all_reduce(mean, op=dist.ReduceOp.AVG)
        return float(mean)

    def gradients(self) -> dict[str, Tensor]:
        return {name: whole(p.grad) for name, p in self.model.named_parameters() if p.grad is not None}


# --- What each process does ----------------------------------------------------------------------------------


def uncompressed() -> dict[str, Any]:
    """Weights after three updates, with and without hooks that compress nothing."""
    found = {}
    for name, kind, settings in (
        ("ddp", "ddp", None),
        ("hooked ddp", "ddp", NOTHING),
        ("hybrid", "hybrid", None),
        ("hooked shards", "shards", NOTHING),
    ):
        run = Run(kind, settings)
        for step in range(3):
            run.update(step)
        found[name] = weights_of(run.model)
    return found


def full_rank() -> dict[str, Any]:
    """Gradients of one update in fp64 and fp32, plain and by factors of full rank."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        for kind, settings in (("ddp", None), ("ddp", FULL), ("shards", FULL)):
            run = Run(kind, settings, dtype)
            run.backward(0)
            found[f"{dtype} {kind} {settings is not None}"] = run.gradients()
    return found


def low_rank() -> dict[str, Any]:
    """Losses at the end of training on one batch, and what was sent for it."""
    found: dict[str, Any] = {}
    for name, kind, settings in (
        ("plain", "ddp", None),
        ("with", "ddp", WITH),
        ("without", "ddp", WITHOUT),
        ("small errors", "ddp", Compression(rank=4, errors="1-6-9")),
        ("shards", "shards", WITH),
    ):
        run = Run(kind, settings)
        run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.3)
        losses = [run.update() for _ in range(30)]
        found[name] = sum(losses[-5:]) / 5
        if run.compressor is not None:
            found[f"{name} ratio"] = run.compressor.ratio
            found[f"{name} dtypes"] = sorted({str(t.dtype) for t in run.compressor.tensors().values()})
        found[f"{name} weights"] = weights_of(run.model)
    return found


def accumulated() -> dict[str, Any]:
    """Gradients of two micro-batches on shards: FSDP2's own mesh, and hooks that compress nothing or at full rank."""
    found = {}
    for name, kind, settings in (
        ("hybrid", "hybrid", None),
        ("nothing", "shards", NOTHING),
        ("full", "shards", FULL),
    ):
        run = Run(kind, settings)
        run.optimizer.zero_grad()
        for step, is_last in ((0, False), (1, True)):
            if run.compressor is None:
                run.model.set_requires_all_reduce(is_last)
            else:
                run.compressor.is_last = is_last
            run.loss(*batch_of(dist.get_rank(), step)).backward()
        found[name] = run.gradients()
    return found


def resumed() -> dict[str, Any]:
    """Gradients after a stop: going on, from each process's own buffers, and from their sums."""
    found: dict[str, Any] = {}
    first = Run("shards", WITH)
    for step in range(3):
        first.update(step)
    assert first.compressor is not None
    own, sums = first.compressor.tensors(), first.compressor.summed()
    own = {name: tensor.clone() for name, tensor in own.items()}
    weights = [parameter.detach().clone() for parameter in first.model.parameters()]
    first.backward(3)
    found["going on"] = first.gradients()
    for name in ("own", "sums"):
        other = Run("shards", WITH)
        with torch.no_grad():
            for parameter, value in zip(other.model.parameters(), weights, strict=True):
                parameter.copy_(value)
        assert other.compressor is not None
        if name == "own":
            other.compressor.restore(own)
        else:
            other.compressor.restore_summed(sums)
            found["sums before"], found["sums after"] = sums, other.compressor.summed()
        other.backward(3)
        found[name] = other.gradients()
    return found


def not_finite() -> dict[str, Any]:
    """One process's gradient is infinite in the second of three updates."""
    run = Run("ddp", WITH)
    assert run.compressor is not None
    found: dict[str, Any] = {}
    run.backward(0)
    before = {name: tensor.clone() for name, tensor in run.compressor.tensors().items()}
    bad = dist.get_rank() == 1
    run.backward(1, factor=float("inf") if bad else 1.0)
    found["second"] = run.gradients()
    after = run.compressor.tensors()
    found["kept"] = all(torch.equal(before[name], after[name]) for name in before)
    found["finite"] = all(bool(tensor.isfinite().all()) for tensor in after.values())
    run.backward(2)
    found["third"] = run.gradients()
    return found


def scaled() -> dict[str, Any]:
    """Gradients under fp16 scales, plain and compressed; error buffers; and what an overflow of one process does."""
    found: dict[str, Any] = {}
    for name, settings, is_scaled in (
        ("fp32", None, False),
        ("plain", None, True),
        ("full", FULL, True),
        ("low", WITH, True),
        ("low fp32", WITH, False),
    ):
        run = Run("ddp", settings, is_scaled=is_scaled)
        run.backward(0)
        if run.scaling is not None:
            assert run.scaling.unscale_()
        found[name] = run.gradients()
        if run.compressor is not None:
            found[f"{name} errors"] = run.compressor.tensors()
    for kind in ("ddp", "shards"):
        run = Run(kind, is_scaled=True)
        assert run.scaling is not None
        # Only process 1 overflows, in all its blocks.
        run.backward(0, factor=1e7 if dist.get_rank() == 1 else 1.0)
        found[f"{kind} overflow"] = (run.scaling.unscale_(), run.scaling.scales.steps)
    return found


def sharded_optimizer() -> dict[str, Any]:
    """Weights and averages after three updates of AdamW16, sharded and whole, from the same gradients."""
    settings = Optimization(
        steps=3,
        batch_size=1,
        learning_rate=0.01,
        final_learning_rate=0.0,
        weight_decay=0.1,
        average_decay=0.9,
        validate_every=1,
        checkpoint_every=1,
        sheet_every=1,
    )
    found = {}
    for name in ("whole", "shards"):
        model = model_of()
        if name == "shards":
            sharded(model, init_device_mesh("cpu", (N_PROCESSES,)))
        optimizer, average = adamw16(model, settings), MovingAverage(model, 0.9, on_cpu=True)
        assert isinstance(optimizer, AdamW16)
        for step in range(3):
            optimizer.zero_grad()
            model.loss(*batch_of(0, step)).total.backward()
            optimizer.step()
            average.update(model, step)
        found[name] = weights_of(model)
        with average.applied(model):
            found[f"{name} average"] = weights_of(model)
    return found


CASES = (
    uncompressed,
    full_rank,
    low_rank,
    accumulated,
    resumed,
    not_finite,
    scaled,
    sharded_optimizer,
)


def all_cases(world: World) -> dict[str, Any]:
    return {case.__name__: case() for case in CASES}


Found = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each process found in each case."""
    processes = spawn(N_PROCESSES, all_cases, tmp_path_factory.mktemp("processes"))
    return {case.__name__: [results[case.__name__] for results in processes] for case in CASES}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of a tensor, relative to its largest value."""
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).abs().max() / other[n].abs().max().clamp(min=1e-6)) for n in one)


# --- What must hold ------------------------------------------------------------------------------------------


def test_uncompressed_the_hooks_give_the_plain_weights_to_the_bit(found: Found) -> None:
    for rank in range(N_PROCESSES):
        weights = found["uncompressed"][rank]
        assert same(weights["ddp"], weights["hooked ddp"])
        assert same(weights["hybrid"], weights["hooked shards"])
        assert not same(weights["ddp"], weights_of(model_of()))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.float64, 1e-10)])
def test_full_rank_gives_the_plain_gradient(found: Found, dtype: torch.dtype, limit: float) -> None:
    gradients = found["full_rank"][3]
    plain = gradients[f"{dtype} ddp False"]
    assert distance(gradients[f"{dtype} ddp True"], plain) < limit
    assert distance(gradients[f"{dtype} shards True"], plain) < limit


def test_error_feedback_ends_below_no_error_feedback_and_every_replica_has_the_same_weights(
    found: Found,
) -> None:
    results = found["low_rank"]
    last = results[0]
    assert last["plain"] < 0.85 * math.log(N_CODES), "it learns"
    for name in ("with", "small errors", "shards"):
        assert last[name] < 0.985 * last["without"], "rank 4 without error feedback ends higher"
        assert last[name] == pytest.approx(last["plain"], rel=0.01)
    for name in ("with", "without", "small errors", "shards"):
        assert all(same(results[0][f"{name} weights"], other[f"{name} weights"]) for other in results[1:])


def test_numbers_sent_are_counted(found: Found) -> None:
    model = model_of()
    thin = {
        name: (3 if "qkv" in name else 1)
        for name, _ in model.named_parameters()
        if name.endswith(("qkv.weight", "out.weight", "expand.weight", "contract.weight"))
    }
    assert len(thin) == 8
    n_plain = sum(parameter.numel() for parameter in model.parameters())
    n_sent = sum(
        numbers_sent(parameter.shape, thin[name], 4) if name in thin else parameter.numel()
        for name, parameter in model.named_parameters()
    )
    assert found["low_rank"][0]["with ratio"] == pytest.approx(n_sent / n_plain)
    assert found["low_rank"][0]["small errors dtypes"] == ["torch.int16"]
    assert found["low_rank"][0]["with dtypes"] == ["torch.float32"]


def test_micro_batches_are_summed_before_they_are_averaged(found: Found) -> None:
    gradients = found["accumulated"][2]
    assert same(gradients["hybrid"], gradients["nothing"])
    assert distance(gradients["full"], gradients["hybrid"]) < 2e-5


def test_a_resumed_compressor_goes_on_exactly_and_from_the_sum_of_its_buffers_to_rounding(
    found: Found,
) -> None:
    results = found["resumed"][1]
    assert same(results["own"], results["going on"])
    assert distance(results["sums"], results["going on"]) < 1e-4
    assert distance(results["sums after"], results["sums before"]) < 1e-6
    fresh = found["full_rank"][1]["torch.float32 ddp True"]
    assert distance(fresh, results["going on"]) > 0.1


def test_a_gradient_that_is_not_finite_in_one_replica_is_so_in_all_and_spoils_no_buffer(found: Found) -> None:
    for rank, results in enumerate(found["not_finite"]):
        assert all(
            not gradient.isfinite().any() for n, gradient in results["second"].items() if "out.weight" in n
        )
        assert results["kept"] == (rank == 1), "the others add what they had to send"
        assert results["finite"]
        assert all(gradient.isfinite().all() for gradient in results["third"].values())


def test_under_gradient_scales_buffers_hold_unscaled_gradients(found: Found) -> None:
    results = found["scaled"][0]
    assert distance(results["plain"], results["fp32"]) < 0.05
    assert distance(results["full"], results["plain"]) < 1e-3
    assert distance(results["low errors"], results["low fp32 errors"]) < 0.1
    assert distance(results["low"], results["low fp32"]) < 0.1


def test_an_overflow_in_one_process_moves_the_scales_of_all(found: Found) -> None:
    for kind in ("ddp", "shards"):
        results = [result[f"{kind} overflow"] for result in found["scaled"]]
        assert all(result == results[0] for result in results)
        is_finite, steps = results[0]
        assert not is_finite and set(steps) == {12_500}


def test_sharded_16_bit_moments_and_averages_equal_whole_ones(found: Found) -> None:
    results = found["sharded_optimizer"][0]
    assert distance(results["shards"], results["whole"]) < 1e-5
    assert distance(results["shards average"], results["whole average"]) < 1e-5


def test_orthogonal_columns_span_those_given() -> None:
    p = torch.randn(3, 12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-9
    q = orthogonal(p)
    torch.testing.assert_close(q.mT @ q, torch.eye(4, dtype=torch.float64).expand(3, 4, 4))
    torch.testing.assert_close(q @ (q.mT @ p), p, rtol=1e-4, atol=1e-14)


def test_columns_that_depend_on_each_other_or_vanish_are_completed() -> None:
    for p in (torch.ones(1, 6, 3), torch.zeros(1, 6, 3)):
        q = orthogonal(p)
        torch.testing.assert_close(q.mT @ q, torch.eye(3)[None], rtol=1e-4, atol=1e-4)


def test_the_papers_ratio_is_0_1411() -> None:
    """d = 3968, r = 896, m = 8 (Table 1 and 2), from the shards that the model really has."""
    paper = validate(Recipe, load_preset("paper"), "paper")
    compression = paper.transformer_training.compression
    assert compression is not None and compression.rank * 8 == 896
    width, m = 3968, 8
    with torch.device("meta"):
        config = TransformerConfig(
            n_layers=1,
            n_heads=62,
            d_head=64,
            n_text_tokens=256,
            n_text_vocab=9,
            grid_size=32,
            n_image_vocab=9,
        )
        layer = Layer(config, AttentionPlan("row", 256, 32, 11))
    placement = shard_placement(layer)
    n_sent = n_plain = 0
    for name, parameter in layer.named_parameters():
        if parameter.ndim != 2:
            continue
        axis = placement(parameter)
        shape = list(parameter.shape)
        shape[0 if axis is None else axis.dim] //= m
        n_sent += numbers_sent(tuple(shape), 3 if "qkv" in name else 1, compression.rank)
        n_plain += shape[0] * shape[1]
    assert n_plain == 12 * width**2 // m
    assert n_sent / n_plain == pytest.approx(5 * 896 / (8 * width)) == pytest.approx(0.1411, abs=5e-5)


def test_parts_are_told_apart_by_identity() -> None:
    factor = torch.tensor([1.0, 2.0])
    assert len({Part("a", 1, factor), Part("a", 1, factor)}) == 2
