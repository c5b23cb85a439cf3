"""How fast each stage of a preset trains: achieved model FLOP/s over the machine's best product of the same dtype.

    python benchmarks/train.py [--preset laptop] [--stages dvae,transformer,clip] [--updates 8] [--device cuda] [--variants]
    python benchmarks/train.py --stages transformer --without-bfloat16     # as on a CPU without native bfloat16

One JSON line a stage, fresh weights on random data, since speed depends on sizes alone: the best of two rounds in
turns, each the median of its updates, each in a process of its own. An update is forward, backward, clipping,
optimizer and moving average. `share_of_gemm` is the model's own FLOPs (`dalle.training.cost`: the mask's own pairs,
nothing recomputed, neither optimizer nor average) over what the best product measured in the same run would do in that
time. One thread (OMP_NUM_THREADS=1) is timed by the CPU seconds that it computes, so that other work on the machine hardly
counts. `update_over_passes` is what a whole update costs over its forward and backward pass, the median over updates.
With --variants the transformer also as it would be without what helps it on a CPU: `default_allocator` (glibc hands
freed memory back, see dalle/training/memory.py); `masked_attention` (PyTorch's fused attention in place of the score
matrix); `fp32_heads` (no bf16 in the heads' backward).
"""

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dalle import attention, transformer
from dalle.clip import CLIP
from dalle.dvae import DiscreteVAE
from dalle.generation.precision import DTYPES, default_dtype, dtype_name
from dalle.training.cost import BACKWARD, clip_flops, dvae_flops, transformer_flops
from dalle.training.cpu import kind_of_cpu
from dalle.training.distributed import Layout
from dalle.training.memory import keep_freed_memory
from dalle.training.optim import OPTIMIZERS, MovingAverage
from dalle.training.peaks import gemm_peak
from dalle.training.recipe import (
    Optimization,
    Recipe,
    clip_config,
    load_recipe,
    transformer_config,
)
from dalle.transformer import Transformer

STAGES = ("dvae", "transformer", "clip")
VARIANTS = ("default_allocator", "masked_attention", "fp32_heads")
CLOCKS = {False: time.perf_counter, True: time.process_time}
WARM_UP = 3  # updates before the clock starts: the allocator has to learn the blocks' sizes


def workload(
    recipe: Recipe, stage: str, device: torch.device
) -> tuple[torch.nn.Module, Optimization, Callable[[], torch.Tensor], int]:
    """A stage's model, its settings, a function that gives its loss on a random batch, and that batch's FLOPs."""
    n_text = recipe.tokenizer.max_tokens
    if stage == "dvae":
        training, side = recipe.dvae_training, recipe.dvae.image_size
        dvae = DiscreteVAE(recipe.dvae).to(device)
        pictures = torch.rand(training.batch_size, 3, side, side, device=device)
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        noise = torch.Generator(device).manual_seed(0)
        flops = (1 + BACKWARD) * sum(dvae_flops(recipe.dvae)) * training.batch_size
        return (
            dvae,
            training,
            lambda: dvae.loss(pictures, temperature=1.0, kl_weight=1.0, generator=noise)[0],
            flops,
        )
    if stage == "transformer":
        config = transformer_config(recipe.transformer, recipe.dvae, recipe.tokenizer.vocab_size, n_text)
        training = recipe.transformer_training
        model = Transformer(config).to(device)
        model.set_dropout(training.dropout)
        text = torch.randint(config.n_text_vocab, (training.batch_size, n_text), device=device)
        shape = (training.batch_size, config.n_image_tokens)
        tokens = torch.randint(config.n_image_vocab, shape, device=device)
        flops = transformer_flops(config).update * training.batch_size
        return model, training, lambda: model.loss(text, tokens).total, flops
    assert recipe.clip is not None and recipe.clip_training is not None
    sizes, training = clip_config(recipe.clip, recipe.tokenizer.vocab_size, n_text), recipe.clip_training
    clip = CLIP(sizes).to(device)
    text = torch.randint(sizes.n_text_vocab, (training.batch_size, n_text), device=device)
    pictures = torch.rand(training.batch_size, 3, sizes.image_size, sizes.image_size, device=device)
    pictures = pictures.contiguous(memory_format=torch.channels_last)

    def loss() -> torch.Tensor:
        vectors = clip.encode_image(pictures), clip.encode_text(text)
        with torch.autocast(device.type, enabled=False):
            return clip.pair_loss(*vectors)

    return clip, training, loss, (1 + BACKWARD) * clip_flops(sizes) * training.batch_size


def measure(
    recipe: Recipe, stage: str, variant: str, device: torch.device, dtype: torch.dtype, updates: int
) -> dict[str, float]:
    """Median seconds of an update and of its parts, and the process's largest memory (on a GPU: the GPU's)."""
    if device.type == "cpu" and variant != "default_allocator":
        keep_freed_memory()
    if variant == "masked_attention":
        attention.EXPLICIT_TO_STREAM = 0
    if variant == "fp32_heads":
        transformer._logits = lambda head, x: torch.nn.functional.linear(x.float(), head.weight.float())
    torch.manual_seed(0)
    model, training, loss_of, flops = workload(recipe, stage, device)
    Layout(model, config=recipe.distributed)  # blocks compiled or checkpointed, as the recipe says
    optimizer = OPTIMIZERS[training.optimizer](model, training)
    average = MovingAverage(model, training.average_decay)
    parts: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}
    for update in range(updates + WARM_UP):
        if update == WARM_UP:
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        began = clock(device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_of()
        forward = clock(device)
        loss.backward()
        backward = clock(device)
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm or torch.inf)
        optimizer.step()
        average.update(model, update)
        ended = clock(device)
        for name, seconds in zip(parts, (forward - began, backward - forward, ended - backward), strict=True):
            parts[name].append(seconds)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    taken = [sum(times) for times in zip(*parts.values(), strict=True)][WARM_UP:]
    passes = [sum(times) for times in zip(parts["forward"], parts["backward"], strict=True)][WARM_UP:]
    peak = 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[0])
    return {
        "seconds": statistics.median(taken),
        **{name: statistics.median(times[WARM_UP:]) for name, times in parts.items()},
        "over_passes": statistics.median(whole / part for whole, part in zip(taken, passes, strict=True)),
        "faults": faults / updates,
        "flops": flops,
        "rows": training.batch_size,
        "bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak,
    }


def clock(device: torch.device) -> float:
    """The time when the device has done all it was given; of one CPU thread, the seconds that it has computed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return CLOCKS[torch.get_num_threads() == 1 and device.type == "cpu"]()


def in_a_process(stage: str, variant: str, given: argparse.Namespace) -> dict[str, float]:
    """`measure` in a process of its own: an allocator cannot be changed back, and memory only grows."""
    command = [sys.executable, __file__, "--preset", given.preset, "--updates", str(given.updates)]
    command += ["--device", given.device, "--dtype", given.dtype, "--stages", stage, "--measure", variant]
    command += ["--without-bfloat16"] if given.without_bfloat16 else []
    for setting in given.settings:
        command += ["--set", setting]
    found: dict[str, float] = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    )
    return found


def arguments() -> argparse.ArgumentParser:
    """The options, which benchmarks/plan.py takes too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="laptop", help="a preset's name or a .toml file")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument(
        "--without-bfloat16", action="store_true", help="hide the CPU's native bfloat16: auto is float32 then"
    )
    parser.add_argument("--set", dest="settings", action="append", default=[], help="override a setting, k=v")
    return parser


def hide_bfloat16(given: argparse.Namespace) -> None:
    """Let this process take its CPU for one without native bfloat16, if that was asked for."""
    if given.without_bfloat16:
        torch.cpu.get_capabilities = dict


def cpu_name() -> str:
    """What the system calls this CPU; empty where it does not say."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", path.read_text()) if path.is_file() else None
    return found[1] if found else ""


def main() -> None:
    """Print the table, or with --measure one line for the parent process."""
    parser = arguments()
    parser.add_argument("--variants", action="store_true", help="the transformer without what helps it")
    parser.add_argument("--measure", choices=("now", *VARIANTS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    hide_bfloat16(given)
    device = torch.device(given.device)
    dtype = default_dtype(device) if given.dtype == "auto" else DTYPES[given.dtype]
    recipe = load_recipe(given.preset, given.settings)
    stages = [stage for stage in given.stages.split(",") if stage != "clip" or recipe.clip is not None]
    if given.measure:
        print(json.dumps(measure(recipe, stages[0], given.measure, device, dtype, given.updates)))
        return
    runs = [(stage, "now") for stage in stages]
    runs += [("transformer", variant) for variant in VARIANTS if given.variants]
    best = dict[tuple[str, str], dict[str, float]]()
    for _ in range(2):
        for run in runs:
            found = in_a_process(*run, given)
            if run not in best or found["seconds"] < best[run]["seconds"]:
                best[run] = found
    is_alone = torch.get_num_threads() == 1 and device.type == "cpu"
    peak = gemm_peak(device, dtype, largest=1024 if is_alone else 4096, clock=CLOCKS[is_alone])
    about = {"preset": given.preset, "device": device.type, "dtype": dtype_name(dtype)}
    if device.type == "cpu":
        about |= {"kind": kind_of_cpu(dtype), "name": cpu_name(), "threads": torch.get_num_threads()}
        about["clock"] = "cpu seconds" if is_alone else "wall"
    print(json.dumps({**about, "torch": torch.__version__, "gemm_gflops": round(peak / 1e9)}))
    for (stage, variant), found in best.items():
        row = {
            "stage": stage,
            "variant": variant,
            "ms_an_update": round(1e3 * found["seconds"]),
            **{f"ms_{name}": round(1e3 * found[name]) for name in ("forward", "backward", "optimizer")},
            "update_over_passes": round(found["over_passes"], 2),
            "pictures_a_second": round(found["rows"] / found["seconds"], 1),
            "achieved_gflops": round(found["flops"] / found["seconds"] / 1e9, 1),
            "share_of_gemm": round(found["flops"] / peak / found["seconds"], 3),
            "page_faults_an_update": round(found["faults"]),
            "memory_mb": round(found["bytes"] / 1e6),
        }
        if (stage, "now") in best:
            row["time_over_now"] = round(found["seconds"] / best[stage, "now"]["seconds"], 2)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
