"""How well `dalle plan` foretells a CPU's training: its memory and seconds over those of real updates.

    python benchmarks/plan.py [--preset laptop] [--updates 8]
    python benchmarks/plan.py --calibrate

Compared: the preset's transformer, the same at half its depth, and the same at twice its width; each measured in a process of
its own (peak resident memory, median seconds of an update), on the machine's matrix rate and bandwidth measured just before.
The shares of those peaks that the plan counts on are kept in dalle/training/devices.py; --calibrate prints them anew, from
a profile of another model than those compared. Both need a quiet machine.
"""

import argparse
import json
import re
import subprocess
import sys
from collections import defaultdict
from typing import Any

import torch
from machine import bandwidth, gemm_peak
from torch.profiler import ProfilerActivity, profile
from train import arguments, in_a_process

from dalle.config import load_preset, override, validate
from dalle.training.cost import activations, parameters_by_part, transformer_flops
from dalle.training.devices import (
    EFFICIENCY,
    HEAP,
    LAYER_TRAFFIC,
    LOGIT_TRAFFIC,
    OPTIMIZER_TRAFFIC,
    PROCESS_BYTES,
    Machine,
)
from dalle.training.memory import keep_freed_memory
from dalle.training.optim import OPTIMIZERS, MovingAverage
from dalle.training.plan import muon_flops, plan_cpu
from dalle.training.recipe import Recipe, transformer_config
from dalle.transformer import Transformer, TransformerConfig

# 4 layers x 384 on 40 + 100 tokens, none of those compared.
CALIBRATION = (
    "transformer.n_layers=4",
    "transformer.n_heads=6",
    "tokenizer.max_tokens=40",
    "dvae.image_size=80",
)
CALIBRATION += ("transformer_training.batch_size=32",)
BASE = (
    "import torch; import dalle.training.train, pathlib; print(pathlib.Path('/proc/self/status').read_text())"
)


def sizes_of(recipe: Recipe) -> TransformerConfig:
    """The transformer of a recipe."""
    tokenizer = recipe.tokenizer
    return transformer_config(recipe.transformer, recipe.dvae, tokenizer.vocab_size, tokenizer.max_tokens)


def variants(recipe: Recipe) -> dict[str, list[str]]:
    """The settings of the models compared."""
    layers, heads = recipe.transformer.n_layers, recipe.transformer.n_heads
    return {
        "as it is": [],
        "half the depth": [f"transformer.n_layers={layers // 2}"],
        "twice the width": [f"transformer.n_heads={2 * heads}"],
    }


def compare(given: argparse.Namespace) -> None:
    """Print one line a model: predicted over measured."""
    machine = Machine(gemm_peak(), bandwidth())
    about = {
        "gemm_gflops": round(machine.flops / 1e9),
        "gigabytes_a_second": round(machine.bandwidth / 1e9, 1),
    }
    status = subprocess.run(
        [sys.executable, "-c", BASE], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    about["process_mb"] = round(int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) * 1024 / 1e6)
    print(json.dumps({**about, "threads": torch.get_num_threads()}), flush=True)
    tree = override(load_preset(given.preset), given.settings)
    for name, settings in variants(validate(Recipe, tree, given.preset)).items():
        recipe = validate(Recipe, override(tree, settings), given.preset)
        row = plan_cpu(sizes_of(recipe), recipe.transformer_training, machine)
        assert row.speed is not None
        given.settings, kept = [*given.settings, *settings], given.settings
        found = in_a_process("transformer", "now", given)
        given.settings = kept
        line = {
            "model": name,
            "predicted_mb": round(row.memory.total / 1e6),
            "measured_mb": round(found["bytes"] / 1e6),
            "memory": round(row.memory.total / found["bytes"], 2),
            "predicted_ms": round(1e3 * row.speed.step),
            "measured_ms": round(1e3 * found["seconds"]),
            "time": round(row.speed.step / found["seconds"], 2),
        }
        print(json.dumps(line), flush=True)


PROFILED = 6  # updates


def seconds_by_class(recipe: Recipe) -> dict[str, float]:
    """Seconds of an update of the calibration model, by the plan's parts.

    Of each operation, told by its name and shapes, the fastest of all its calls counts: other work on the machine
    disturbs it least.
    """
    keep_freed_memory()
    torch.manual_seed(0)
    config, training = sizes_of(recipe), recipe.transformer_training
    model = Transformer(config)
    model.set_dropout(training.dropout)
    optimizer, average = OPTIMIZERS[training.optimizer](model, training), MovingAverage(model, 0.99)
    text = torch.randint(config.n_text_vocab, (training.batch_size, config.n_text_tokens))
    image = torch.randint(config.n_image_vocab, (training.batch_size, config.n_image_tokens))

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss(text, image).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model, 1)

    for _ in range(6):
        update()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        for _ in range(PROFILED):
            update()
    calls = defaultdict[tuple[str, str], list[Any]](list)
    for event in found.events():
        if not event.name.startswith(("autograd::", "Optimizer.")):
            calls[event.name, str(event.input_shapes)].append(event)
    taken = dict.fromkeys(EFFICIENCY, 0.0)
    for events in calls.values():
        fastest = min(event.self_cpu_time_total for event in events) / 1e6
        taken[class_of(events[0], config, training.batch_size)] += fastest * len(events) / PROFILED
    return taken


def class_of(event: Any, config: TransformerConfig, batch: int) -> str:
    """The part of the plan that an operation belongs to, by its name and the shapes of its inputs."""
    if event.name == "aten::bmm":
        return "attention"
    if event.name not in ("aten::mm", "aten::addmm"):
        return "bytes"
    shapes = [tuple(shape) for shape in event.input_shapes if len(shape) == 2]
    every = {size for shape in shapes for size in shape}
    n_slots = {
        batch * config.n_text_tokens: config.n_text_ids,
        batch * config.n_image_tokens: config.n_image_vocab,
    }
    for rows, ids in n_slots.items():
        if rows in every and ids in every:
            is_forward = shapes[-2:] == [(rows, config.d_model), (config.d_model, ids)]
            return "head_forward" if is_forward else "head_backward"
    return "layers" if batch * (config.n_text_tokens + config.n_image_tokens) in every else "muon"


def calibrate(given: argparse.Namespace) -> None:
    """Print the shares of the peaks that each part of an update reaches."""
    recipe = validate(
        Recipe, override(load_preset(given.preset), [*CALIBRATION, *given.settings]), "calibration"
    )
    config, training = sizes_of(recipe), recipe.transformer_training
    machine = Machine(gemm_peak(), bandwidth())
    batch, flops = training.batch_size, transformer_flops(config)
    n_stream = config.n_text_tokens + config.n_image_tokens
    logits = config.n_text_tokens * config.n_text_ids + config.n_image_tokens * config.n_image_vocab
    elementwise = LAYER_TRAFFIC * config.n_layers * activations(config, "cpu").layer + LOGIT_TRAFFIC * logits
    at_peak = {
        "layers": 3 * batch * flops.layers / machine.flops,
        "head_forward": batch * flops.heads / machine.flops,
        "head_backward": 2 * batch * flops.heads / machine.flops,
        "attention": 3 * batch * 4 * config.d_model * config.n_layers * n_stream**2 / machine.flops,
        "muon": muon_flops(config, training) / machine.flops,
        "bytes": (batch * elementwise + OPTIMIZER_TRAFFIC * sum(parameters_by_part(config).values()))
        / machine.bandwidth,
    }
    taken = seconds_by_class(recipe)
    given.settings, given.updates = [*CALIBRATION, *given.settings], 4
    grown = in_a_process("transformer", "now", given)["bytes"]
    given.preset, given.settings = "tiny", []
    process = in_a_process("transformer", "now", given)["bytes"]  # whose own tensors count for nothing
    alive = (plan_cpu(config, training, machine).memory.total - PROCESS_BYTES) / HEAP
    heap = (grown - process) / alive
    line = {"process_gb": round(process / 1e9, 2), "kept": PROCESS_BYTES / 1e9}
    print(json.dumps({**line, "heap": round(heap, 2), "kept_heap": HEAP}), flush=True)
    for name, ideal in at_peak.items():
        seconds = taken[name]
        line = {"part": name, "ms": round(1e3 * seconds, 1), "efficiency": round(ideal / seconds, 2)}
        print(json.dumps({**line, "kept": EFFICIENCY[name]}), flush=True)


def main() -> None:
    parser = arguments()
    parser.description = __doc__.splitlines()[0]
    parser.add_argument("--calibrate", action="store_true")
    given = parser.parse_args()
    given.device = "cpu"
    (calibrate if given.calibrate else compare)(given)


if __name__ == "__main__":
    main()
