"""fp16 under a gradient scale for each resblock, the 16-bit formats, and the optimizer that stores its moments in them."""

import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dalle import files
from dalle.config import load_preset, override, validate
from dalle.training import loop, precision
from dalle.training.adamw16 import MAX_VARIANCE, AdamW16
from dalle.training.distributed import Layout
from dalle.training.loop import MAX_NON_FINITE, Progress
from dalle.training.optim import MovingAverage, Plateau, adamw, adamw16
from dalle.training.precision import BACK_OFF_EVERY, HIGHEST, LOWEST, ResblockScaling, Scales, resblocks
from dalle.training.recipe import DistributedConfig, Optimization, Recipe, transformer_config
from dalle.training.small_floats import SIGNED, UNSIGNED, SmallFloat
from dalle.transformer import AttentionResblock, Transformer
from tests.tiny import GRID, N_CODES, N_TEXT, tiny_transformer

N_VOCAB = 20


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """A CPU's fp16 products are so small here that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings_of(**changes: Any) -> Optimization:
    settings: dict[str, Any] = {
        "steps": 6,
        "batch_size": 4,
        "learning_rate": 0.01,
        "final_learning_rate": 0.01,
        "beta2": 0.96,
        "weight_decay": 0.0,
        "clip_norm": 4.0,
        "average_decay": 0.9,
        "validate_every": 100,
        "checkpoint_every": 100,
        "sheet_every": 100,
        "precision": "fp16_resblock",
    }
    return validate(Optimization, settings | changes, "test")


def model_of(n_layers: int = 2) -> Transformer:
    model = tiny_transformer(N_VOCAB, n_layers=n_layers, layers="paper").train()
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def batch_of(number: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    text = torch.randint(N_VOCAB, (4, N_TEXT), generator=generator)
    return text, torch.randint(N_CODES, (4, GRID**2), generator=generator)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- The rules of the scales (App. D.1) ----------------------------------------------------------------------


def test_scales_start_at_2_to_the_13_times_the_replicas_and_stay_within_2_to_the_7_and_the_24() -> None:
    for n_replicas in (1, 1024):
        scales = Scales(1, n_replicas)
        assert scales.values() == [n_replicas * 2.0**13]
        for _ in range(12_000):
            scales.update([True])
        assert scales.values() == [n_replicas * 2.0**24]
        for _ in range(40 * BACK_OFF_EVERY):
            scales.update([False])
        assert scales.values() == [n_replicas * 2.0**7]


def test_a_thousand_clean_updates_double_a_scale_exactly_and_11000_take_it_to_the_highest() -> None:
    scales = Scales(1)
    for _ in range(1000):
        scales.update([True])
    assert scales.values() == [2.0**14]
    for _ in range(9_999):
        scales.update([True])
    assert scales.values()[0] < 2.0**24
    scales.update([True])
    assert scales.values() == [2.0**24]


def test_an_overflow_divides_by_the_root_of_two_at_most_once_in_125_updates() -> None:
    scales = Scales(1)
    seen = []
    for _ in range(2 * BACK_OFF_EVERY + 1):
        scales.update([False])
        seen.append(math.log2(scales.values()[0]))
    assert BACK_OFF_EVERY == 125
    assert seen == pytest.approx([12.5] * 125 + [12.0] * 125 + [11.5])


def test_between_two_divisions_clean_updates_still_grow_and_others_change_nothing() -> None:
    scales = Scales(1)
    scales.update([False])
    scales.update([True])
    scales.update([False])
    assert scales.steps == [12_501]


def test_each_block_has_a_scale_of_its_own() -> None:
    scales = Scales(3)
    scales.update([True, False, True])
    assert scales.steps == [13_001, 12_500, 13_001]


def test_scales_survive_json_between_two_divisions() -> None:
    whole, cut = Scales(2), Scales(2)
    events = [[n % 7 != 0, n % 50 != 0] for n in range(400)]
    for are_finite in events[:130]:
        whole.update(are_finite)
        cut.update(are_finite)
    resumed = Scales(2)
    resumed.restore(json.loads(json.dumps(cut.state())))
    for are_finite in events[130:]:
        whole.update(are_finite)
        resumed.update(are_finite)
    assert resumed.state() == whole.state()
    with pytest.raises(ValueError, match="of 2 blocks; the model has 3"):
        Scales(3).restore(cut.state())


# --- The model under them (figure 4, App. D.2) ---------------------------------------------------------------


def test_resblocks_compute_in_fp16_and_the_stream_the_gains_and_the_logits_stay_in_fp32() -> None:
    model = model_of()
    scaling = ResblockScaling(model)
    seen: dict[str, tuple[torch.dtype, torch.dtype]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.Embedding | AttentionResblock):
            module.register_forward_hook(
                lambda _, inputs, output, name=name: seen.__setitem__(name, (inputs[0].dtype, output.dtype))
            )
    text, image = model(*batch_of())
    half, full = torch.float16, torch.float32
    assert len(scaling.blocks) == 4 and text.dtype == image.dtype == full
    assert seen["layers.0.attention"] == seen["layers.0.mlp.norm"] == seen["norm"] == (full, full)
    assert seen["layers.0.attention.qkv"][1] == seen["layers.1.mlp.expand"][1] == half
    assert seen["layers.0.attention.out"] == seen["layers.1.mlp.contract"] == (half, full), "fp32 at its end"
    assert seen["image_token"][1] == full
    assert {parameter.dtype for parameter in model.parameters()} == {full}


def test_unscaled_gradients_are_those_of_fp32_to_fp16s_precision() -> None:
    model, twin = model_of(), model_of()
    scaling = ResblockScaling(model)
    model.loss(*batch_of()).total.backward()
    scaled = gradients(model)
    assert scaling.unscale_()
    twin.loss(*batch_of()).total.backward()
    found, expected = gradients(model), gradients(twin)
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 0.02 * float(gradient.norm()), name
        in_block = "layers" in name
        assert torch.equal(scaled[name], found[name]) == (not in_block) or not gradient.any()
        if in_block:
            torch.testing.assert_close(scaled[name], found[name] * 2.0**13)


def test_all_of_a_blocks_parameters_and_no_other_come_under_its_scale() -> None:
    model = model_of()
    scaling = ResblockScaling(model)
    for index, block in enumerate(resblocks(model)):
        for module in block.modules():
            factor = scaling.factor(module)
            assert factor is not None and factor.data_ptr() == scaling._factors[index].data_ptr()
    assert scaling.factor(model.norm) is scaling.factor(model.image_head) is None


@pytest.mark.parametrize("overflowing", [0, 3])
def test_an_overflow_stays_in_its_own_block_and_skips_the_update(overflowing: int) -> None:
    model = model_of()
    scaling = ResblockScaling(model)
    state = scaling.state()
    state["steps"][overflowing] = 40 * precision.STEPS_PER_BIT  # 2^40: no fp16 gradient survives it
    scaling.restore(state)
    model.loss(*batch_of()).total.backward()
    are_finite = [
        all(bool(p.grad.isfinite().all()) for p in block.parameters() if p.grad is not None)
        for block in resblocks(model)
    ]
    assert are_finite == [index != overflowing for index in range(4)]
    assert all(bool(e.weight.grad.isfinite().all()) for e in (model.image_token, model.text_token))
    assert not scaling.unscale_()
    expected = [13_001] * 4
    expected[overflowing] = 39_500
    assert scaling.scales.steps == expected


@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler warns of its own doings
@pytest.mark.parametrize("how", ["recomputed", "compiled"])
def test_blocks_that_are_recomputed_or_compiled_whole_have_the_same_gradients(how: str) -> None:
    found = []
    for is_plain in (True, False):
        model = model_of()
        scaling = ResblockScaling(model)
        if how == "recomputed" and not is_plain:
            Layout(model, config=DistributedConfig(checkpoint_blocks=True))
        elif not is_plain:
            for layer in model.layers:
                layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
        for bits in (13, 10):  # the second scales were not there when it was compiled
            state = scaling.state()
            scaling.restore(state | {"steps": [bits * precision.STEPS_PER_BIT] * 4})
            model.zero_grad()
            model.loss(*batch_of()).total.backward()
            found.append(gradients(model))
    for plain, other in zip(found[:2], found[2:], strict=True):
        for name, gradient in plain.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-3)
    ratio = found[0]["layers.1.mlp.expand.weight"].norm() / found[1]["layers.1.mlp.expand.weight"].norm()
    assert float(ratio) == pytest.approx(8, rel=0.02)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_filtered_on_both_sides_of_a_block(value: float) -> None:
    factor = torch.tensor(4.0)
    x = torch.ones(3, requires_grad=True)
    for through, expected in ((precision._enter, 4.0), (precision._leave, 0.25)):
        x.grad = None
        through(x, factor).backward(torch.tensor([1.0, value, -1.0]))
        assert x.grad is not None and x.grad.tolist() == [expected, 0.0, -expected]


def test_the_papers_model_has_128_scales() -> None:
    paper = validate(Recipe, load_preset("paper"), "paper")
    config = transformer_config(paper.transformer, paper.dvae, 16384, 256)
    with torch.device("meta"):
        model = Transformer(config)
    assert len(list(resblocks(model))) == 128  # B.1


def test_a_model_without_resblocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no residual blocks"):
        ResblockScaling(nn.Linear(2, 2))


# --- What one global scale loses -----------------------------------------------------------------------------


class Amplify(torch.autograd.Function):
    """Nothing forwards; backwards times 13.5: gradients that fall from the first block to the last, as in §2.4."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return 13.5 * cotangents[0]


N_DEEP, SHARE = 6, 2.0**-32  # layers; of the loss, so that the first block's gradients suit the lowest scale


def deep_model() -> Transformer:
    """Twelve resblocks; the last one's gradients are 2^42 times smaller than the first one's."""
    model = model_of(N_DEEP)
    for block in list(resblocks(model))[:-1]:
        block.register_forward_hook(lambda _, __, output: Amplify.apply(output))
    return model


def deep_loss(model: Transformer) -> Tensor:
    return model.loss(*batch_of()).total * SHARE


def deep_optimizer(model: Transformer) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-30)  # moves all, however small their gradient


def last_weights(model: Transformer) -> list[nn.Parameter]:
    last = model.layers[-1].mlp
    return [last.expand.weight, last.contract.weight]


def test_one_global_scale_overflows_in_the_first_block_or_underflows_in_the_last() -> None:
    model = deep_model()
    for block in resblocks(model):  # all as the paper has it, but for the scales
        block.forward = precision._in_fp16(block.forward)
    n_sound = 0
    for bits in range(-12, 42, 3):
        model.zero_grad()
        (deep_loss(model) * 2.0**bits).backward()
        is_finite = all(bool(gradient.isfinite().all()) for gradient in gradients(model).values())
        is_lost = not any(bool(weight.grad.any()) for weight in last_weights(model))
        assert is_lost or not is_finite, f"2^{bits} serves all blocks"
        first = model.layers[0].mlp.contract.weight.grad
        n_sound += is_finite and bool(first.any())
    assert n_sound > 3, "the first blocks have scales that serve them"


def test_a_scale_for_each_resblock_trains_where_one_global_scale_underflows() -> None:
    losses = {}
    for kind in ("fp32", "resblock"):
        model = deep_model()
        scaling = None
        if kind == "resblock":
            scaling = ResblockScaling(model)
            state = scaling.state()  # where thousands of updates take them
            n = len(scaling.blocks)
            state["steps"] = [LOWEST + (HIGHEST - LOWEST) * min(2 * i, n - 1) // (n - 1) for i in range(n)]
            scaling.restore(state)
        optimizer = deep_optimizer(model)
        before = [weight.detach().clone() for weight in last_weights(model)]
        seen = []
        for _ in range(25):
            optimizer.zero_grad()
            loss = deep_loss(model)
            loss.backward()
            assert scaling is None or scaling.unscale_()
            optimizer.step()
            seen.append(float(loss.detach()) / SHARE)
        losses[kind] = seen
        assert not any(torch.equal(*pair) for pair in zip(before, last_weights(model), strict=True))
    assert losses["fp32"][-1] < 0.6 * losses["fp32"][0]
    assert losses["resblock"] == pytest.approx(losses["fp32"], rel=0.03)


# --- In the loop ---------------------------------------------------------------------------------------------


class BatchStage:
    """Trains a transformer on one batch after the other."""

    name = "transformer"

    def __init__(self, **changes: Any) -> None:
        self.settings = settings_of(**changes)
        self.model = model_of()
        self.broken: dict[int, float] = {}  # what the loss of an update is multiplied by

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        return batch_of(number)

    def loss(self, batch: Any, step: int, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model.loss(*batch).total * self.broken.get(step, 1.0), {}

    def validate(self) -> dict[str, float]:
        return {}

    def score(self, figures: dict[str, float]) -> float:
        return 0.0

    def sheet(self) -> Image.Image:
        return Image.new("RGB", (4, 4))


def test_the_loop_trains_in_it_and_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    def run(
        folder: str, stop: bool = False, **changes: Any
    ) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        stage = BatchStage(optimizer="adamw16", average_every=2, average_on_cpu=True, **changes)
        stage.broken = {1: 1e9, 4: 1e9}  # overflows before and after the stop
        if stop:
            loss = stage.loss

            def signalled(batch: Any, step: int, number: int) -> tuple[Tensor, dict[str, Tensor]]:
                if step == 2:
                    signal.raise_signal(signal.SIGTERM)
                return loss(batch, step, number)

            stage.loss = signalled  # type: ignore[method-assign]
            with pytest.raises(loop.Stopped):
                loop.train_stage(stage, tmp_path / folder, torch.bfloat16, quiet=True)
            return {}, []
        averaged = loop.train_stage(stage, tmp_path / folder, torch.bfloat16, quiet=True)
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return averaged | stage.model.state_dict(), [json.loads(line) for line in lines]

    whole, rows = run("whole")
    run("cut", stop=True)
    resumed, _ = run("cut")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    last = next(row for row in rows if row.get("step") == 6 and "n_non_finite" in row)
    assert last["n_non_finite"] == 2
    # Both overflows came within 125 updates: one division, and four clean updates.
    assert last["lowest_scale_bits"] == last["highest_scale_bits"] == pytest.approx(12.504)
    state = files.read_json(tmp_path / "cut/checkpoints/transformer/step-6/state.json")
    assert state["scales"]["steps"] == [12_504] * 4


def test_a_skipped_update_changes_neither_weights_nor_moments() -> None:
    stage = BatchStage()
    stage.broken = {1: 1e9}
    scaling = ResblockScaling(stage.model)
    layout, optimizer = Layout(stage.model), adamw(stage.model, stage.settings)
    plateau, progress = Plateau(), Progress()
    loop.update(stage, optimizer, plateau, progress, torch.float32, scaling, layout)
    before = {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}
    moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
    loop.update(stage, optimizer, plateau, progress, torch.float32, scaling, layout)
    assert (progress.step, progress.n_non_finite, progress.n_non_finite_in_a_row) == (2, 1, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage.model.state_dict().items())
    after = [value for state in optimizer.state.values() for value in state.values()]
    assert all(torch.equal(*pair) for pair in zip(moments, after, strict=True))


def test_overflows_do_not_end_a_run_while_a_scale_can_go_down_and_do_when_none_can(tmp_path: Path) -> None:
    stage = BatchStage(steps=MAX_NON_FINITE + 5)
    stage.broken = dict.fromkeys(range(100), 1e12)
    scaling = ResblockScaling(stage.model)
    optimizer, progress = adamw(stage.model, stage.settings), Progress()
    for _ in range(MAX_NON_FINITE + 1):
        loop.update(stage, optimizer, Plateau(), progress, torch.float32, scaling)
    assert progress.n_non_finite == MAX_NON_FINITE + 1
    state = scaling.state()
    state["steps"] = [LOWEST] * 4
    scaling.restore(state)
    with pytest.raises(ValueError, match="were not finite"):
        for _ in range(MAX_NON_FINITE):
            loop.update(stage, optimizer, Plateau(), progress, torch.float32, scaling)


def test_the_preset_paper_trains_as_the_paper_does() -> None:
    training = validate(Recipe, load_preset("paper"), "paper").transformer_training
    assert (training.precision, training.optimizer, training.average_on_cpu) == (
        "fp16_resblock",
        "adamw16",
        True,
    )
    for other in ("laptop", "gpu", "tiny"):
        assert validate(Recipe, load_preset(other), other).transformer_training.precision == "auto"
    with pytest.raises(ValueError, match="precision"):
        validate(Recipe, override(load_preset("tiny"), ["transformer_training.precision=fp16"]), "tiny")


# --- The 16-bit formats (App. B.2, E.2) ----------------------------------------------------------------------


def slow_decode(form: SmallFloat, code: int) -> float:
    """What a code means, written out."""
    sign = -1.0 if form.is_signed and code & 0x8000 else 1.0
    magnitude = code & 0x7FFF if form.is_signed else code
    exponent, significand = divmod(magnitude, 1 << form.n_significand_bits)
    if exponent == (1 << form.n_exponent_bits) - 1:
        return sign * math.inf if significand == 0 else math.nan
    share = significand / (1 << form.n_significand_bits)
    if exponent == 0:
        return sign * share * 2.0 ** (1 - form.bias)
    return sign * (1 + share) * 2.0 ** (exponent - form.bias)


def as_codes(codes: Tensor) -> list[int]:
    return [code & 0xFFFF for code in codes.tolist()]


FORMATS = pytest.mark.parametrize("form", [SIGNED, UNSIGNED], ids=["1-6-9", "0-6-10"])
ALL_CODES = torch.arange(2**16, dtype=torch.int32).to(torch.int16)


def same_numbers(found: list[float], expected: list[float]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(
        (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
        for a, b in pairs
    )


@FORMATS
def test_every_code_decodes_as_its_scalar_twin_and_encodes_back(form: SmallFloat) -> None:
    numbers = form.decode(ALL_CODES)
    assert same_numbers(numbers.tolist(), [slow_decode(form, code) for code in range(2**16)])
    is_number = ~numbers.isnan()
    assert torch.equal(form.encode(numbers)[is_number], ALL_CODES[is_number])
    assert form.decode(form.encode(numbers[~is_number])).isnan().all()


@FORMATS
def test_numbers_between_two_codes_round_to_the_nearer_and_ties_to_the_even_one(form: SmallFloat) -> None:
    """All neighbours: their middle, and the float32 numbers just below and above it."""
    low = torch.arange(
        form.infinity, dtype=torch.int32
    )  # non-negative finite codes; the last rounds to infinity
    values = form.decode(low.to(torch.int16)).double()
    above = torch.cat([values[1:], torch.tensor([2.0 ** (2**form.n_exponent_bits - 1 - form.bias)])])
    middle = ((values + above) / 2).float()
    even = low + (low & 1)
    for number, expected in (
        (middle, even),
        (torch.nextafter(middle, torch.tensor(0.0)), low),
        (torch.nextafter(middle, torch.tensor(math.inf)), low + 1),
    ):
        assert torch.equal(form.encode(number).to(torch.int32) & 0xFFFF, expected)
        if form.is_signed:
            assert as_codes(form.encode(-number)) == (expected | 0x8000).tolist()


def test_the_formats_have_the_papers_range() -> None:
    assert (SIGNED.largest, SIGNED.smallest_normal, SIGNED.smallest) == (15.984375, 2.0**-58, 2.0**-67)
    assert UNSIGNED.largest == (2 - 2**-10) * 8 > MAX_VARIANCE
    huge = torch.tensor([1e9, -1e9, math.inf, -math.inf, math.nan, 15.99, 3.0])
    assert SIGNED.decode(SIGNED.encode(huge))[:4].isinf().all()
    assert SIGNED.decode(SIGNED.encode(SIGNED.clamp(huge)))[[0, 1, 2, 3, 5, 6]].tolist() == [
        15.984375,
        -15.984375,
        15.984375,
        -15.984375,
        15.984375,
        3.0,
    ]
    assert SIGNED.clamp(huge)[4].isnan()


def test_a_negative_number_has_no_code_without_a_sign() -> None:
    found = UNSIGNED.decode(UNSIGNED.encode(torch.tensor([-1.0, -0.0, 0.0, -1e-30])))
    assert found.isnan().tolist() == [True, False, False, True]
    assert found[1:3].tolist() == [0.0, 0.0]


def test_codes_keep_shape_and_other_dtypes_are_taken() -> None:
    x = torch.tensor([[1.0, -0.5], [3.0, 0.25]], dtype=torch.float64).mT
    assert torch.equal(SIGNED.decode(SIGNED.encode(x)), x.float())


# --- The optimizer that stores moments in them (App. B.2) ----------------------------------------------------


def updates_of(model: nn.Module, optimizer: torch.optim.Optimizer, n: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
        optimizer.step()


def test_with_fp32_moments_it_is_adamw() -> None:
    ours, theirs = model_of(), model_of()
    settings = settings_of(weight_decay=0.1)
    optimizer = adamw16(ours, settings)
    for group in optimizer.param_groups:
        group["is_small"] = False
    updates_of(ours, optimizer, 5)
    updates_of(theirs, adamw(theirs, settings), 5)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_moments_of_resblock_matrices_alone_are_in_16_bits_and_decay_is_as_in_adamw() -> None:
    model = model_of()
    optimizer = adamw16(model, settings_of(weight_decay=0.1))
    updates_of(model, optimizer, 1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_small = "layers" in name and parameter.ndim == 2
        state = optimizer.state[parameter]
        expected = torch.int16 if is_small else torch.float32
        assert {state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {expected}, name
        is_decayed = (parameter.ndim == 2 and "head" in name) or is_small
        assert decay[id(parameter)] == (0.1 if is_decayed else 0.0), name


def test_one_update_by_hand_rounds_the_moments_and_clips_the_variance() -> None:
    for gradient in (0.3, 30.0):
        weight = nn.Parameter(torch.tensor([[1.0]]))
        optimizer = AdamW16([{"params": [weight], "is_small": True}], lr=0.1, betas=(0.9, 0.96))
        mean = variance = 0.0
        expected = 1.0
        for step in (1, 2, 3):
            weight.grad = torch.tensor([[gradient]])
            optimizer.step()
            mean = 0.9 * mean + 0.1 * gradient
            variance = min(0.96 * variance + 0.04 * gradient**2, 5.0)
            expected -= 0.1 * (mean / (1 - 0.9**step)) / (math.sqrt(variance / (1 - 0.96**step)) + 1e-8)
            mean = float(SIGNED.decode(SIGNED.encode(torch.tensor(mean))))
            variance = float(UNSIGNED.decode(UNSIGNED.encode(torch.tensor(variance))))
        assert float(weight.detach()) == pytest.approx(expected, rel=1e-5)
        state = optimizer.state[weight]
        assert float(SIGNED.decode(state["exp_avg"])) == pytest.approx(mean, rel=1e-6)
        assert float(UNSIGNED.decode(state["exp_avg_sq"])) == pytest.approx(variance, rel=1e-6)
        assert (variance == MAX_VARIANCE) == (gradient == 30.0)


def test_training_with_16_bit_moments_follows_fp32_ones() -> None:
    losses = {}
    for make in (adamw, adamw16):
        model = model_of()
        optimizer = make(model, settings_of())
        for _ in range(25):
            optimizer.zero_grad()
            loss = model.loss(*batch_of()).total
            loss.backward()
            optimizer.step()
        losses[make] = float(loss.detach())
    assert losses[adamw] < 0.6 * math.log(N_CODES)
    assert losses[adamw16] == pytest.approx(losses[adamw], rel=0.02)


# --- The average in main memory ------------------------------------------------------------------------------


def test_an_average_on_the_cpu_has_the_numbers_of_one_on_the_device_and_sees_no_later_weights() -> None:
    model = model_of()
    here, there = MovingAverage(model, 0.99), MovingAverage(model, 0.99, on_cpu=True)
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        here.update(model, n)
        there.update(model, n)
        with torch.no_grad():  # at once: the thread must have its own copy
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    assert all(torch.equal(tensor, there.tensors[name]) for name, tensor in here.tensors.items())
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with there.applied(model):
        assert all(torch.equal(tensor, here.tensors[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


def test_an_error_in_the_averages_thread_is_raised() -> None:
    model = model_of()
    average = MovingAverage(model, 0.99, on_cpu=True)
    average.update(model, 1)
    assert average.tensors
    average._tensors["norm.weight"] = torch.zeros(3)
    average.update(model, 2)
    with pytest.raises(RuntimeError):
        _ = average.tensors
