"""How fast a CPU trains the transformer of a preset: share of the machine's best bf16 matrix product, and what helps.

    python benchmarks/train.py [--preset laptop] [--batch 64] [--updates 8]

One JSON line a variant, all in one run on random tokens, best of two rounds in turns: `now`; `default_allocator`
(glibc hands freed memory back, see dalle/training/memory.py); `masked_attention` (PyTorch's fused attention in
place of the score matrix); `fp32_heads` (no bf16 in the heads' backward). `share_of_gemm` is the model's own
arithmetic (6 FLOPs a weight and token, the attention's score matrices, no recompute) over the time that the best
measured product would take for it. Each variant runs in a process of its own: an allocator cannot be changed back.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from machine import gemm_peak

from dalle import attention, transformer
from dalle.config import load_preset, validate
from dalle.training.memory import keep_freed_memory
from dalle.training.optim import OPTIMIZERS
from dalle.training.recipe import Recipe, transformer_config
from dalle.transformer import Transformer, TransformerConfig

VARIANTS = ("now", "default_allocator", "masked_attention", "fp32_heads")


def flops(config: TransformerConfig, batch: int) -> float:
    """Of one update of `batch` sequences: weights forwards and twice backwards, and the mask's own pairs."""
    n_stream = config.n_text_tokens + config.n_image_tokens
    weights = 12 * config.n_layers * config.d_model**2 * n_stream
    weights += config.d_model * config.n_text_ids * config.n_text_tokens
    weights += config.d_model * config.n_image_vocab * config.n_image_tokens
    kinds = attention.layer_kinds(config.n_layers, config.layers)
    pairs = sum(
        int(attention.dense_mask(k, config.n_text_tokens, config.grid_size, config.conv_kernel).sum())
        for k in kinds
    )
    return 6.0 * batch * (weights + 2 * pairs * config.d_model)


def time_variant(name: str, preset: str, batch: int, updates: int) -> dict[str, float]:
    """Seconds an update, the median of `updates`, and page faults an update."""
    if name != "default_allocator":
        keep_freed_memory()
    if name == "masked_attention":
        attention.EXPLICIT_TO_STREAM = 0
    if name == "fp32_heads":
        transformer._logits = lambda head, x: torch.nn.functional.linear(x.float(), head.weight.float())
    recipe = validate(Recipe, load_preset(preset), preset)
    config = transformer_config(
        recipe.transformer, recipe.dvae, recipe.tokenizer.vocab_size, recipe.tokenizer.max_tokens
    )
    torch.manual_seed(0)
    model = Transformer(config)
    optimizer = OPTIMIZERS[recipe.transformer_training.optimizer](model, recipe.transformer_training)
    text = torch.randint(0, config.n_text_vocab, (batch, config.n_text_tokens))
    image = torch.randint(0, config.n_image_vocab, (batch, config.n_image_tokens))
    seconds = []
    for update in range(updates + 3):
        if update == 3:
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss(text, image).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return {
        "seconds": sorted(seconds[3:])[updates // 2],
        "faults": faults / updates,
        "flops": flops(config, batch),
    }


def main() -> None:
    """Print the table, or with --variant one line for the parent process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="laptop")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--variant", choices=VARIANTS)
    given = parser.parse_args()
    if given.variant:
        print(json.dumps(time_variant(given.variant, given.preset, given.batch, given.updates)))
        return
    best: dict[str, dict[str, float]] = {}
    for _ in range(2):
        for name in VARIANTS:
            command = [sys.executable, __file__, "--preset", given.preset, "--batch", str(given.batch)]
            command += ["--updates", str(given.updates), "--variant", name]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            if name not in best or found["seconds"] < best[name]["seconds"]:
                best[name] = found
    peak = gemm_peak()
    print(json.dumps({"gemm_gflops": round(peak / 1e9), "threads": torch.get_num_threads()}))
    for name, found in best.items():
        row = {
            "variant": name,
            "ms_an_update": round(1e3 * found["seconds"]),
            "sequences_a_second": round(given.batch / found["seconds"], 1),
            "page_faults_an_update": round(found["faults"]),
            "share_of_gemm": round(found["flops"] / peak / found["seconds"], 3),
            "time_over_now": round(found["seconds"] / best["now"]["seconds"], 2),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
