"""A synthetic checkpoint of DALL·E mega's shape: imported, loaded, one picture drawn; what each takes.

    python benchmarks/published.py FOLDER [--size mega] [--dtype bfloat16] [--pictures 1] [--json]

Weights are random, in half precision, in min-dalle's format. Each step runs in a process of its own, whose peak memory
(VmHWM, mapped files included) and time are printed. FOLDER takes 11 GB for mega.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

SIZES = {  # layers, width, text ids, image ids, width inside the gated linear units
    "tiny": (1, 64, 300, 16385, 96),
    "mini": (12, 1024, 50264, 16385, 2730),
    "mega": (24, 2048, 50272, 16416, 4096),
}
VQGAN_LEVELS = (128, 128, 256, 256, 512)
CODE_WIDTH = 256


def random_side(size: str, is_decoder: bool) -> dict[str, torch.Tensor]:
    """min-dalle's encoder or decoder by its names, weights small enough that activations stay finite."""
    n_layers, width, n_text, n_image, gated = SIZES[size]
    generator = torch.Generator().manual_seed(int(is_decoder))

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).half()

    def norm(name: str, n: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": torch.ones(n).half(), f"{name}.bias": torch.zeros(n).half()}

    state = {"embed_tokens.weight": matrix(n_image if is_decoder else n_text, width)}
    state["embed_positions.weight"] = matrix(256 if is_decoder else 64, width)
    state |= norm("layernorm_embedding", width) | norm("final_ln", width)
    attentions = ("self_attn", "encoder_attn") if is_decoder else ("self_attn",)
    for i in range(n_layers):
        for name in attentions:
            for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
                state[f"layers.{i}.{name}.{part}.weight"] = matrix(width, width)
            state |= norm(f"layers.{i}.pre_{name}_layer_norm", width) | norm(
                f"layers.{i}.{name}_layer_norm", width
            )
        state |= norm(f"layers.{i}.glu.ln0", width) | norm(f"layers.{i}.glu.ln1", gated)
        state[f"layers.{i}.glu.fc0.weight"] = matrix(gated, width)
        state[f"layers.{i}.glu.fc1.weight"] = matrix(gated, width)
        state[f"layers.{i}.glu.fc2.weight"] = matrix(width, gated)
    if is_decoder:
        state["lm_head.weight"] = matrix(n_image, width)
    return state


def random_detoker() -> dict[str, torch.Tensor]:
    """min-dalle's VQGAN decoder by its names: 256 px from a 16x16 grid of 16384 codes."""
    generator = torch.Generator().manual_seed(2)
    state: dict[str, torch.Tensor] = {
        "embedding.weight": torch.randn(16384, CODE_WIDTH, generator=generator).half()
    }

    def conv(name: str, n_in: int, n_out: int, kernel: int) -> None:
        scale = (n_in * kernel**2) ** -0.5
        state[f"{name}.weight"] = (
            torch.randn(n_out, n_in, kernel, kernel, generator=generator) * scale
        ).half()
        state[f"{name}.bias"] = torch.zeros(n_out).half()

    def norm(name: str, n: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.ones(n).half(), torch.zeros(n).half()

    def block(name: str, n_in: int, n_out: int) -> None:
        norm(f"{name}.norm1", n_in)
        conv(f"{name}.conv1", n_in, n_out, 3)
        norm(f"{name}.norm2", n_out)
        conv(f"{name}.conv2", n_out, n_out, 3)
        if n_in != n_out:
            conv(f"{name}.nin_shortcut", n_in, n_out, 1)

    def attention(name: str, n: int) -> None:
        norm(f"{name}.norm", n)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", n, n, 1)

    n = VQGAN_LEVELS[-1]
    conv("post_quant_conv", CODE_WIDTH, CODE_WIDTH, 1)
    conv("decoder.conv_in", CODE_WIDTH, n, 3)
    block("decoder.mid.block_1", n, n)
    attention("decoder.mid.attn_1", n)
    block("decoder.mid.block_2", n, n)
    for level in range(len(VQGAN_LEVELS) - 1, -1, -1):
        width = VQGAN_LEVELS[level]
        for j in range(3):
            block(f"decoder.up.{level}.block.{j}", n if j == 0 else width, width)
            if level == len(VQGAN_LEVELS) - 1:
                attention(f"decoder.up.{level}.attn.{j}", width)
        if level:
            conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
        n = width
    norm("decoder.norm_out", n)
    conv("decoder.conv_out", n, 3, 3)
    return state


def write_checkpoint(folder: Path, size: str) -> list[Path]:
    """Write the five files of min-dalle's format."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("encoder.pt", "decoder.pt", "detoker.pt", "vocab.json", "merges.txt")
    paths = [folder / name for name in names]
    if not all(path.exists() for path in paths):
        torch.save(random_side(size, False), paths[0])
        torch.save(random_side(size, True), paths[1])
        torch.save(random_detoker(), paths[2])
        words = ["<s>", "<pad>", "</s>", "<unk>", "Ġ", *"abcdefghijklmnopqrstuvwxyz"]
        paths[3].write_text(json.dumps({word: i for i, word in enumerate(words)}))
        paths[4].write_text("#version: 0.2\n")
    return paths


MEASURED = """
import json, sys, time
from pathlib import Path
{body}
peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps({{"peak_gib": round(int(peak) / 2**20, 2), **times}}))
"""
IMPORT = """
import torch
from dalle.importers.min_dalle import import_min_dalle
start = time.perf_counter()
heads = {} if sys.argv[8] != "tiny" else {"n_heads": 1}
import_min_dalle(*map(Path, sys.argv[1:6]), Path(sys.argv[6]), changes=heads)
times = {"seconds": round(time.perf_counter() - start, 1)}
"""
DRAW = """
import torch
from dalle.pipeline import DallePipeline
start = time.perf_counter()
pipe = DallePipeline.from_pretrained(sys.argv[6], dtype=sys.argv[7])
loaded = time.perf_counter()
out = pipe("a red apple", num_images_per_prompt=int(sys.argv[9]))
drawn = time.perf_counter()
assert len({int(t) for t in out.tokens.flatten()}) > 10
times = {"load_seconds": round(loaded - start, 1), "draw_seconds": round(drawn - loaded, 1)}
"""


def measured(body: str, *arguments: object) -> dict[str, float]:
    """Run a step in a process of its own; its figures."""
    command = [sys.executable, "-c", MEASURED.format(body=body), *map(str, arguments)]
    found: dict[str, float] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    return found


def main() -> None:
    """Write, import, load, draw; print what each took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="mega")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--no-draw", action="store_true")
    options = parser.parse_args()
    start = time.perf_counter()
    paths = write_checkpoint(options.folder / options.size, options.size)
    model = options.folder / f"{options.size}-model"
    gib = sum(path.stat().st_size for path in paths) / 2**30
    figures: dict[str, object] = {"size": options.size, "checkpoint_gib": round(gib, 2)}
    figures["write_seconds"] = round(time.perf_counter() - start, 1)
    arguments = (*paths, model, options.dtype, options.size, options.pictures)
    if not model.exists():
        figures["import"] = measured(IMPORT, *arguments)
    if not options.no_draw:
        figures["draw"] = {"dtype": options.dtype} | measured(DRAW, *arguments)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
