"""`dalle plan`: its arithmetic against the real models, the paper's own figures, and its table."""

import json
import math
import time
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from dalle.attention import LAYER_KINDS, dense_mask
from dalle.cli import app
from dalle.config import validate
from dalle.dvae import DiscreteVAE
from dalle.training import cpu
from dalle.training import plan as plan_file
from dalle.training.cost import (
    activations,
    allowed_pairs,
    count_parameters,
    dvae_flops,
    parameters_by_part,
    transformer_flops,
)
from dalle.training.cpu import Machine, newton_schulz_flops, plan_cpu
from dalle.training.devices import DEVICES
from dalle.training.log import duration
from dalle.training.peaks import bandwidth, gemm_peak
from dalle.training.plan import Plan, make_plan, paper_rank, paper_ratio
from dalle.training.plan_table import lines
from dalle.training.recipe import Recipe, load_recipe, transformer_config
from dalle.training.rows import Row
from dalle.transformer import Transformer, TransformerConfig

PRESETS = ("tiny", "laptop", "gpu", "paper")
# Two quiet cores with native bfloat16, and the same as if without it.
CPU = Machine(0.43e12, 0.21e12, 34.7e9, "bfloat16", 2)
OLD_CPU = Machine(0.21e12, 0.21e12, 34.7e9, "float32", 2)


def recipe_of(preset: str, *settings: str) -> Recipe:
    return load_recipe(preset, settings)


def config_of(recipe: Recipe) -> TransformerConfig:
    tokenizer = recipe.tokenizer
    return transformer_config(recipe.transformer, recipe.dvae, tokenizer.vocab_size, tokenizer.max_tokens)


def only_row(plan: Plan) -> Row:
    (row,) = plan.rows
    return row


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_equal_the_real_model_and_the_parts_add_up(preset: str) -> None:
    recipe = recipe_of(preset)
    config = config_of(recipe)
    plan = make_plan(recipe, 1, "h100")
    assert plan.parameters == count_parameters(lambda: Transformer(config))
    width, n_text = config.d_model, config.n_text_tokens
    by_hand = {
        "text embeddings": width * (1 + config.n_text_vocab + 2 * n_text),
        "image embeddings": width * (config.n_image_vocab + 2 * config.grid_size),
        "norms": 2 * width * (2 * config.n_layers + 1),
        "attention": config.n_layers * (4 * width**2 + 4 * width),
        "mlp": config.n_layers * (8 * width**2 + 5 * width),
        "heads": width * (config.n_text_vocab + n_text + config.n_image_vocab),
    }
    assert plan.parameters_by_part == by_hand


def test_parameters_equal_those_of_a_model_with_memory() -> None:
    config = config_of(recipe_of("tiny"))
    real = sum(parameter.numel() for parameter in Transformer(config).parameters())
    assert sum(parameters_by_part(config).values()) == real


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_pairs_are_those_of_the_mask(kind: str) -> None:
    config = config_of(recipe_of("laptop"))
    mask = dense_mask(kind, config.n_text_tokens, config.grid_size, config.conv_kernel)
    assert allowed_pairs(kind, config) == int(mask.sum())


@pytest.mark.parametrize(("preset", "gflop"), [("gpu", 3298), ("paper", 94158)])
def test_flops_are_those_of_the_reference_table(preset: str, gflop: float) -> None:
    assert transformer_flops(config_of(recipe_of(preset))).update / 1e9 == pytest.approx(gflop, rel=2e-3)


def test_the_papers_run_takes_what_six_times_parameters_times_tokens_say() -> None:
    stage = make_plan(recipe_of("paper"), 1024, "h100").stages["transformer"]
    assert stage.flops == pytest.approx(4.15e22, rel=5e-3)
    matrices, tokens = 12 * 64 * 3968**2, 1280 * 1024 * 430_000
    assert stage.flops == pytest.approx(6 * matrices * tokens, rel=0.05)


def test_flops_of_the_papers_dvae() -> None:
    encode, decode = dvae_flops(recipe_of("paper").dvae)
    assert encode / 1e9 == pytest.approx(272, rel=5e-3) and decode / 1e9 == pytest.approx(307, rel=5e-3)


def saved_bytes(config: TransformerConfig, batch: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps for the backward pass of a CPU's training in `dtype`, weights left out."""
    model = Transformer(config).train()
    model.set_dropout(0.1)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        n_slots = batch * (config.n_text_tokens + config.n_image_tokens)
        is_cast = tensor.ndim == 2 and tensor.dtype == torch.bfloat16 and n_slots not in tensor.shape
        if tensor.untyped_storage().data_ptr() not in own and not is_cast:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    text = torch.randint(config.n_text_vocab, (batch, config.n_text_tokens))
    image = torch.randint(config.n_image_vocab, (batch, config.n_image_tokens))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        model.loss(text, image)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("n_text", "grid", "kind", "tolerance"),
    [(32, 8, "row", 0.01), (32, 8, "column", 0.01), (64, 16, "row", 0.1), (64, 16, "column", 0.1)],
)
def test_a_layer_keeps_the_bytes_that_the_plan_says(
    n_text: int, grid: int, kind: str, tolerance: float, dtype: torch.dtype
) -> None:
    sizes = {"n_heads": 2, "d_head": 32, "n_text_tokens": n_text, "n_text_vocab": 64, "grid_size": grid}
    one, two = (
        validate(TransformerConfig, {**sizes, "n_layers": n, "n_image_vocab": 64, "layers": [kind] * n}, "")
        for n in (1, 2)
    )
    found = (saved_bytes(two, 3, dtype) - saved_bytes(one, 3, dtype)) / 3
    assert activations(one, "cpu", dtype.itemsize).layer == pytest.approx(found, rel=tolerance)


def test_checkpointing_keeps_inputs_alone() -> None:
    kept = activations(config_of(recipe_of("paper")), "cuda")
    assert kept.kept(True) < kept.kept(False) / 8
    assert kept.layer_input == 4 * 3968 * 1280


def test_the_papers_own_gpus_held_what_the_paper_says() -> None:
    row = only_row(make_plan(recipe_of("paper"), 1024, "v100"))
    memory = row.memory
    assert (row.n_shards, row.micro_batch, row.is_checkpointed) == (8, 1, True)
    assert memory.weights + memory.gradients + memory.moments == pytest.approx(12.5e9, rel=0.03)
    assert memory.total < 16.9e9 and memory.available == pytest.approx(16.9e9)


@pytest.mark.parametrize(("width", "rank", "rate"), [(1920, 512, 0.83), (2688, 640, 0.85), (3968, 896, 0.86)])
def test_ranks_and_rates_are_those_of_table_1(width: int, rank: int, rate: float) -> None:
    assert paper_rank(width) == rank
    assert 1 - paper_ratio(width, rank) == pytest.approx(rate, abs=5e-3)
    assert paper_ratio(width, rank) == pytest.approx(5 * rank / (8 * width))


def test_more_devices_take_less_time_and_never_more_memory() -> None:
    plan = make_plan(recipe_of("paper"), device="h100")
    rows = [row for row in plan.rows if row.speed is not None]
    assert [row.n_devices for row in rows] == [8, 64, 256, 512, 1024]
    assert plan.rows[0].n_devices == 1 and plan.rows[0].speed is None  # 12 billion weights on one GPU
    days = [row.speed.days for row in rows if row.speed]
    assert days == sorted(days, reverse=True)
    assert all(row.memory.total <= 0.94 * 84e9 for row in rows)
    hours = [row.speed.device_hours for row in rows if row.speed]
    assert min(hours) == pytest.approx(26_000, rel=0.02)  # at 45 %


def test_compression_pays_on_slow_networks_only() -> None:
    slow = only_row(make_plan(recipe_of("paper"), 1024, "v100")).speed
    assert slow is not None
    assert slow.step_compressed < 0.75 * slow.step
    few = only_row(make_plan(recipe_of("paper"), 256, "h100")).speed
    assert few is not None and few.step_compressed == few.step  # it hides behind the backward pass
    assert slow.between_compressed / slow.between == pytest.approx(0.17, abs=0.01)  # 14 % and what stays fp32


def test_mfu_is_what_was_asked_for_where_nothing_waits() -> None:
    half = only_row(make_plan(recipe_of("gpu"), 1, "h100", mfu=0.5)).speed
    quarter = only_row(make_plan(recipe_of("gpu"), 1, "h100", mfu=0.25)).speed
    assert half is not None and quarter is not None
    assert half.mfu == pytest.approx(0.5) and quarter.days == pytest.approx(2 * half.days)


def test_checkpointing_is_paid_with_a_forward_pass() -> None:
    row = only_row(make_plan(recipe_of("paper"), 8, "v100"))
    assert row.is_checkpointed and row.speed is not None
    assert row.speed.mfu == pytest.approx(0.75 * DEVICES["v100"].mfu)


def test_muon_keeps_one_moment_of_the_matrices() -> None:
    adamw, muon = (
        only_row(make_plan(recipe_of("gpu", f"transformer_training.optimizer={name}"), 1, "h100")).memory
        for name in ("adamw", "muon")
    )
    assert adamw.moments - muon.moments == 4 * 12 * 32 * 1024**2


@pytest.mark.parametrize("machine", [CPU, OLD_CPU])
def test_a_cpu_plan_follows_the_machine_and_the_model(machine: Machine) -> None:
    recipe = recipe_of("laptop")
    config, training = config_of(recipe), recipe.transformer_training
    row = plan_cpu(config, training, machine)
    doubled = {name: 2 * getattr(machine, name) for name in ("flops", "float32_flops", "bandwidth")}
    twice = plan_cpu(config, training, replace(machine, **doubled))
    assert row.speed is not None and twice.speed is not None
    assert twice.speed.step == pytest.approx(row.speed.step / 2)
    wider = plan_cpu(config.model_copy(update={"n_heads": 8}), training, machine)
    assert wider.speed is not None and wider.speed.step > 2 * row.speed.step
    assert row.memory.total < wider.memory.total < 3 * row.memory.total
    assert 0.2 < row.speed.mfu < 1


def test_a_cpu_without_bfloat16_keeps_wider_activations_and_no_copies_of_the_weights() -> None:
    recipe = recipe_of("laptop")
    of_new, of_old = (
        plan_cpu(config_of(recipe), recipe.transformer_training, m).memory for m in (CPU, OLD_CPU)
    )
    assert of_new.gathered == 2 * 8_962_304 and of_old.gathered == 0
    assert 1.3 < of_old.activations_per_sequence / of_new.activations_per_sequence < 2


def test_a_cpu_plan_measures_this_machine_in_the_dtype_it_trains_in(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def peak(device: str, dtype: torch.dtype, **_: float) -> float:
        asked.append(dtype)
        return 3e12 if dtype == torch.bfloat16 else 1e12

    monkeypatch.setattr(cpu, "gemm_peak", peak)
    monkeypatch.setattr(cpu, "bandwidth", lambda *_: 1e10)
    for capabilities, precision, kind in (
        ({"amx_bf16": True, "avx512_bf16": True}, "auto", "amx"),
        ({"avx512_bf16": True}, "auto", "bfloat16"),
        ({"avx512_bf16": True}, "fp32", "float32"),
        ({"avx2": True}, "auto", "float32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)  # noqa: B023
        asked.clear()
        plan = make_plan(recipe_of("laptop", f"transformer_training.precision={precision}"), device="cpu")
        assert set(asked) == {torch.float32} | ({torch.bfloat16} if kind != "float32" else set())
        (said,) = [line for line in plan.assumptions if "measured just now" in line]
        flops = 1e12 if kind == "float32" else 3e12
        assert str(Machine(flops, 1e12, 1e10, kind, torch.get_num_threads())) in said
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.raises(ValueError, match=r"no native bfloat16, .* precision fp32"):
        make_plan(recipe_of("laptop", "transformer_training.precision=bf16"), device="cpu")


def test_this_machine_is_measured_briefly() -> None:
    began = time.monotonic()
    flops, moved = gemm_peak("cpu", torch.float32, largest=1024, patience=0.05), bandwidth("cpu", 2**22)
    assert flops > 1e8 and moved > 1e7 and time.monotonic() - began < 20


def test_a_machine_is_told_by_its_kind_threads_and_rates() -> None:
    assert str(CPU) == (
        "native bfloat16, 2 threads; best products 0.43 TFLOP/s in bfloat16, 0.21 TFLOP/s in float32; 35 GB/s"
    )
    assert str(replace(OLD_CPU, n_threads=1)) == (
        "float32, 1 thread; best products 0.21 TFLOP/s in float32; 35 GB/s"
    )
    assert (CPU.dtype, OLD_CPU.dtype) == (torch.bfloat16, torch.float32)


def test_a_cpu_plan_foretells_every_stage_in_words() -> None:
    plan = make_plan(recipe_of("laptop"), device="cpu", machine=CPU)
    stages, step = plan.stages, only_row(plan).speed
    assert step is not None and stages["transformer"].seconds == pytest.approx(4500 * step.step)
    for name, share in (("dvae", CPU.efficiency.dvae), ("clip", CPU.efficiency.clip)):
        assert stages[name].seconds == pytest.approx(stages[name].flops / share / CPU.flops)
    text = "\n".join(lines(plan))
    total = sum(stage.seconds or 0 for stage in stages.values())
    assert f"all stages   {duration(total)}" in text and "days" not in text and "GPU" not in text
    short = make_plan(recipe_of("tiny"), device="cpu", machine=CPU)
    assert "seconds" in "\n".join(lines(short))


def test_newton_schulz_costs_three_products_an_iteration() -> None:
    short, long = 3, 7
    iteration = 2 * short * long * short + 2 * short**3 + 2 * short * short * long
    assert newton_schulz_flops(long, short, 1) == newton_schulz_flops(short, long, 1) == iteration


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_devices": 1000}, "gpus is 1000; it has to divide the batch of 1024"),
        ({"n_devices": 0}, "gpus is 0"),
        ({"device": "tpu"}, "use h100, a100, v100 or cpu"),
        ({"device": "cpu", "n_devices": 2}, "for one process"),
        ({"mfu": 1.5}, "mfu is 1.5"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(recipe_of("paper"), **arguments)  # type: ignore[arg-type]


def test_the_command_prints_the_table_with_its_assumptions() -> None:
    result = CliRunner().invoke(app, ["plan", "--preset", "paper", "--gpus", "1024"])
    assert result.exit_code == 0, result.output
    assert "12,293,828,224 parameters" in result.stdout
    for kind in DEVICES:
        assert any(line.split()[:2] == [kind, "1024"] for line in result.stdout.splitlines())
    assert "MFU is assumed" in result.stdout and "has not been measured" in result.stdout


def test_json_is_one_object_with_the_transformers_parameters_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_file, "measured", lambda dtype: CPU)
    result = CliRunner().invoke(app, ["plan", "--preset", "laptop", "--gpu", "cpu", "--json"])
    tree = json.loads(result.stdout)
    assert list(tree)[:2] == ["parameters", "parameters_by_part"]
    assert tree["parameters"] == sum(tree["parameters_by_part"].values()) == 8_962_304
    assert set(tree["stages"]) == {"dvae", "transformer", "clip"}
    assert tree["rows"][0]["memory"]["available"] is None
    assert all(math.isfinite(value) for value in tree["rows"][0]["speed"].values())


def test_a_setting_changes_the_plan() -> None:
    deeper = make_plan(recipe_of("laptop", "transformer.n_layers=12"), 1, "h100")
    plain = make_plan(recipe_of("laptop"), 1, "h100")
    assert deeper.parameters - plain.parameters == 6 * (12 * 256**2 + 13 * 256)


def test_what_does_not_fit_is_shown_as_such() -> None:
    (row,) = [
        line for line in lines(make_plan(recipe_of("paper"), 1, "h100")) if line.lstrip().startswith("h100")
    ]
    assert "none" in row.split() and row.split()[-1] == "-"


def test_a_decoder_of_its_own_is_a_stage_and_the_dvae_before_it_has_the_mirror() -> None:
    alone = make_plan(recipe_of("tiny"), 1, "h100").stages
    more = ["dvae.output_size=64", "dvae.decoder_widths=[64, 32, 16]", "decoder_training.steps=9"]
    rest = ["batch_size=4", "crop=center", "learning_rate=1", "final_learning_rate=0", "weight_decay=0"]
    rest += ["warmup_steps=0", "average_decay=0", "validate_every=1", "checkpoint_every=1", "sheet_every=1"]
    recipe = recipe_of("tiny", *more, *(f"decoder_training.{setting}" for setting in rest))
    stages = make_plan(recipe, 1, "h100").stages
    assert list(stages) == ["dvae", "decoder", "transformer"] and stages["dvae"] == alone["dvae"]
    n_decoder = sum(parameter.numel() for parameter in DiscreteVAE(recipe.dvae).decoder.parameters())
    assert stages["decoder"].parameters == n_decoder
    encode, decode = dvae_flops(recipe.dvae)
    assert stages["decoder"].steps == 9 and stages["decoder"].flops_per_picture == encode + 3 * decode
