"""How well `dalle plan` foretells a CPU's training: its memory and seconds over those of real updates.

    python benchmarks/plan.py [--preset laptop] [--updates 8]
    python benchmarks/plan.py --calibrate

Compared: the preset's transformer, the same at half its depth, and the same at twice its width; each measured in a process of
its own (peak resident memory, median seconds of an update), on the machine's matrix rate and bandwidth measured just before.
The shares of those peaks that the plan counts on are kept in dalle/training/cpu.py, for three kinds of CPU; --calibrate
prints this one's anew, from another model than those compared, operation by operation, in CPU seconds of one thread, which
other work on the machine does not add to (--without-bfloat16: as a CPU without it). The comparison needs a quiet machine.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from train import arguments, hide_bfloat16, in_a_process

from dalle.generation.precision import DTYPES, default_dtype
from dalle.training.cost import BACKWARD, parameters_by_part, transformer_flops
from dalle.training.cpu import (
    HEAP,
    OPTIMIZER_TRAFFIC,
    PROCESS_BYTES,
    Machine,
    elementwise_bytes,
    kind_of_cpu,
    muon_flops,
    plan_cpu,
)
from dalle.training.memory import keep_freed_memory
from dalle.training.optim import OPTIMIZERS, MovingAverage
from dalle.training.peaks import Clock, bandwidth, gemm_peak
from dalle.training.recipe import Recipe, load_recipe, transformer_config
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


def this_machine(dtype: torch.dtype, clock: Clock = time.perf_counter) -> Machine:
    """This CPU, asked for longer than `dalle plan` asks it."""
    float32_flops = gemm_peak("cpu", torch.float32, largest=1024, clock=clock)
    flops = float32_flops if dtype == torch.float32 else gemm_peak("cpu", dtype, clock=clock)
    threads = torch.get_num_threads()
    return Machine(flops, float32_flops, bandwidth(clock=clock), kind_of_cpu(dtype), threads)


def compare(given: argparse.Namespace, dtype: torch.dtype) -> None:
    """Print one line a model: predicted over measured."""
    machine = this_machine(dtype)
    about = {
        "kind": machine.kind,
        "gemm_gflops": round(machine.flops / 1e9),
        "float32_gflops": round(machine.float32_flops / 1e9),
        "gigabytes_a_second": round(machine.bandwidth / 1e9, 1),
    }
    status = subprocess.run(
        [sys.executable, "-c", BASE], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    about["process_mb"] = round(int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) * 1024 / 1e6)
    print(json.dumps({**about, "threads": torch.get_num_threads()}), flush=True)
    for name, settings in variants(load_recipe(given.preset, given.settings)).items():
        recipe = load_recipe(given.preset, [*given.settings, *settings])
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


TIMED = 4  # updates
PARTS = ("layers", "head_forward", "head_backward", "attention", "muon", "bytes")


class Timed(TorchDispatchMode):
    """Adds up the CPU seconds of this thread in each operation, by the plan's parts."""

    def __init__(self, config: TransformerConfig, batch: int) -> None:
        super().__init__()
        self.config, self.batch = config, batch
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        began = time.thread_time()
        result = func(*args, **(kwargs or {}))
        taken = time.thread_time() - began
        shapes = [tuple(tensor.shape) for tensor in args if isinstance(tensor, torch.Tensor)]
        self.seconds[self._part(func.overloadpacket.__name__, shapes)] += taken
        return result

    def _part(self, name: str, shapes: list[tuple[int, ...]]) -> str:
        """The part of the plan that an operation belongs to, by its name and the shapes of its inputs."""
        if name in ("bmm", "baddbmm"):
            return "attention"
        if name not in ("mm", "addmm"):
            return "bytes"
        config, shapes = self.config, [shape for shape in shapes if len(shape) == 2]
        every = {size for shape in shapes for size in shape}
        n_slots = {
            self.batch * config.n_text_tokens: config.n_text_ids,
            self.batch * config.n_image_tokens: config.n_image_vocab,
        }
        for rows, ids in n_slots.items():
            if rows in every and ids in every:
                is_forward = shapes[-2:] == [(rows, config.d_model), (config.d_model, ids)]
                return "head_forward" if is_forward else "head_backward"
        return "layers" if self.batch * (config.n_text_tokens + config.n_image_tokens) in every else "muon"


def seconds_by_part(recipe: Recipe, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of an update of the calibration model, by the plan's parts."""
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
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model.loss(text, image).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model, 1)

    for _ in range(3):
        update()
    with Timed(config, training.batch_size) as timed:
        for _ in range(TIMED):
            update()
    return {name: seconds / TIMED for name, seconds in timed.seconds.items()}


def calibrate(given: argparse.Namespace, dtype: torch.dtype) -> None:
    """Print the shares of the peaks that each part of an update reaches, on one thread."""
    torch.set_num_threads(1)
    recipe = load_recipe(given.preset, [*CALIBRATION, *given.settings])
    config, training = sizes_of(recipe), recipe.transformer_training
    machine = this_machine(dtype, time.thread_time)
    batch, flops = training.batch_size, transformer_flops(config)
    n_stream = config.n_text_tokens + config.n_image_tokens
    attention = 4 * config.d_model * config.n_layers * n_stream**2
    moved = batch * elementwise_bytes(config, machine.n_bytes)
    moved += OPTIMIZER_TRAFFIC * sum(parameters_by_part(config).values())
    at_peak = {
        "layers": (1 + BACKWARD) * batch * flops.layers / machine.flops,
        "head_forward": batch * flops.heads / machine.float32_flops,
        "head_backward": BACKWARD * batch * flops.heads / machine.flops,
        "attention": (1 + BACKWARD) * batch * attention / machine.flops,
        "muon": muon_flops(config, training) / machine.flops,
        "bytes": moved / machine.bandwidth,
    }
    taken = seconds_by_part(recipe, dtype)
    given.settings, given.updates = [*CALIBRATION, *given.settings], 4
    grown = in_a_process("transformer", "now", given)["bytes"]
    given.preset, given.settings = "tiny", []
    process = in_a_process("transformer", "now", given)["bytes"]  # whose own tensors count for nothing
    alive = (plan_cpu(config, training, machine).memory.total - PROCESS_BYTES) / HEAP
    heap = (grown - process) / alive
    line: dict[str, object] = {"kind": machine.kind, "machine": str(machine)}
    line |= {"process_gb": round(process / 1e9, 2), "kept": PROCESS_BYTES / 1e9}
    print(json.dumps({**line, "heap": round(heap, 2), "kept_heap": HEAP}), flush=True)
    for name, ideal in at_peak.items():
        seconds = taken[name]
        line = {"part": name, "ms": round(1e3 * seconds, 1), "efficiency": round(ideal / seconds, 2)}
        print(json.dumps({**line, "kept": getattr(machine.efficiency, name)}), flush=True)


def main() -> None:
    parser = arguments()
    parser.description = __doc__.splitlines()[0]
    parser.add_argument("--calibrate", action="store_true")
    given = parser.parse_args()
    given.device = "cpu"
    hide_bfloat16(given)
    dtype = default_dtype("cpu") if given.dtype == "auto" else DTYPES[given.dtype]
    (calibrate if given.calibrate else compare)(given, dtype)


if __name__ == "__main__":
    main()
