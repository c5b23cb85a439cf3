"""How near drawing comes to what the machine allows: time of a token step over its floor, memory, and start-up.

    python benchmarks/decode.py [--quick] [--device cuda]          # `make bench`

Everything in one run on this machine. The floor of a step is the larger of two times: that of reading what must be
read (weights and image head once, a caption's keys and values once, of each picture the image keys that its masks
allow) at the measured bandwidth, and that of the arithmetic at the best measured bf16 product. Two models with fresh
weights, which decide nothing here: the bundled model's sizes, and 25 million weights at the paper's 256 + 1024
positions. Drawn at temperature 1 without guidance; each measurement is a process of its own, the median of its rows.
"""

import argparse
import copy
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from dalle.attention import allowed_image_keys, layer_kinds
from dalle.config import load_preset, validate
from dalle.generation.decoder import TransformerDecoder
from dalle.generation.engine import Engine, cache_bytes
from dalle.generation.precision import decode_threads, default_dtype, threads
from dalle.generation.request import GenerationOptions
from dalle.pipeline import DallePipeline
from dalle.training.peaks import bandwidth, gemm_peak
from dalle.training.recipe import Recipe, transformer_config
from dalle.transformer import Transformer, TransformerConfig

ROWS = (1, 8, 64, 512)
CAPTIONS = [
    "a red apple, flat fluent style",
    "a blue heart, twemoji style",
    "a yellow cat face, noto emoji style",
    "an umbrella, openmoji style",
]
WAYS = {
    "cpu": ("bfloat16", "native", "int8"),
    "cuda": ("recorded", "plain"),
}  # the first: as the pipeline draws
WEIGHT_BYTES = 2  # bfloat16


def ways(device: str, n_rows: int) -> tuple[str, ...]:
    """Those timed for so many rows: on a CPU, 8 bits pay for one alone, and 512 rows take minutes."""
    if device == "cuda" or n_rows == 1:
        return WAYS[device]
    return WAYS[device][:1] if n_rows > 64 else WAYS[device][:2]


def sizes(model: str) -> TransformerConfig:
    """The sizes of a benchmarked model."""
    if model == "25M":
        return TransformerConfig(
            n_layers=8,
            n_heads=8,
            d_head=64,
            n_text_tokens=256,
            n_text_vocab=16384,
            grid_size=32,
            n_image_vocab=8192,
        )
    recipe = validate(Recipe, load_preset("laptop"), "laptop")
    return transformer_config(
        recipe.transformer, recipe.dvae, recipe.tokenizer.vocab_size, recipe.tokenizer.max_tokens
    )


def keys_per_step(config: TransformerConfig) -> float:
    """Image keys that a step reads, of all layers together, mean over the steps."""
    kinds, n_steps = layer_kinds(config.n_layers, config.layers), config.n_image_tokens - 1
    keys = {
        kind: sum(
            len(allowed_image_keys(kind, t, config.grid_size, config.conv_kernel)) for t in range(n_steps)
        )
        for kind in set(kinds)
    }
    return sum(keys[kind] for kind in kinds) / n_steps


def floor(config: TransformerConfig, n_rows: int, bytes_a_second: float, flops_a_second: float) -> float:
    """Seconds that a step of `n_rows` pictures of one caption takes at least."""
    width = config.d_model
    weights = 12 * config.n_layers * width**2 + config.n_image_vocab * width
    caption, image = config.n_layers * (1 + config.n_text_tokens), keys_per_step(config)
    moved = WEIGHT_BYTES * (weights + 2 * width * caption + n_rows * 2 * width * image)
    flops = n_rows * (2 * weights + 4 * width * (caption + image))
    return max(moved / bytes_a_second, flops / flops_a_second)


def draw(model: str, n_rows: int, n_grid_rows: int, way: str, device: str) -> dict[str, float]:
    """Seconds a step, the median of the grid rows, and the largest memory, bytes: of the process, or on the GPU."""
    config = sizes(model)
    n_threads = decode_threads(config.d_model, n_rows)
    transformer = Transformer(config).eval().to(device, default_dtype(device))
    engine = Engine(
        transformer,
        is_int8=way == "int8",
        is_native=way == "native",
        is_recorded=False if way == "plain" else None,
    )
    text = torch.randint(config.n_text_vocab, (1, config.n_text_tokens))
    seconds = list[float]()
    last = time.perf_counter()

    def on_row_end(row: int, tokens: torch.Tensor) -> bool:
        nonlocal last
        if device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds.append((now - last) / config.grid_size)
        last = now
        return row + 1 == n_grid_rows

    with threads(n_threads):
        for _ in range(1 if n_rows > 64 else 2):  # the first pass of few rows warms up
            seconds.clear()
            last = time.perf_counter()
            engine.generate(
                text,
                range(n_rows),
                GenerationOptions(),
                on_row_end=on_row_end,
            )
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:  # not getrusage: that begins with what the parent process held
        peak = 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[0])
    return {"step": statistics.median(seconds[1:]), "peak": peak, "threads": n_threads}


def in_a_process(*arguments: str) -> dict[str, float]:
    """What this script prints in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    found: dict[str, float] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    return found


START_UP = """
import json, time
began = time.perf_counter()
from dalle import DallePipeline
pipe = DallePipeline.from_pretrained()
loaded = time.perf_counter()
pipe("a red apple, flat fluent style", num_images_per_prompt=4)
print(json.dumps({"load": loaded - began, "draw_4": time.perf_counter() - loaded}))
"""

CANDIDATES = """
import json, time
from dalle import DallePipeline
found = {}
for name, is_native in (("candidates_512", False), ("candidates_512_native", True)):
    pipe = DallePipeline.from_pretrained(native=is_native)
    pipe("a red apple, flat fluent style", num_candidates=2)
    began = time.perf_counter()
    pipe("a red apple, flat fluent style", num_images_per_prompt=32, num_candidates=512)
    found[name] = time.perf_counter() - began
print(json.dumps(found))
"""


def chain_floor(n: int, bytes_a_second: float, flops_a_second: float) -> dict[str, float]:
    """Seconds that `n` candidates of the bundled model take at least: to draw, to decode and to rank."""
    pipe = DallePipeline.from_pretrained()
    assert pipe.ranker is not None
    config, n_rows = pipe.transformer.config, n if pipe.defaults.guidance == 1 else 2 * n
    tokens = torch.zeros(1, config.grid_size, config.grid_size, dtype=torch.int64)
    flops = dict[str, int]()
    with torch.no_grad():
        for name, work in (
            ("decode", lambda: pipe.dvae.decode(tokens)),
            ("rank", lambda: pipe.ranker.encode_pictures(pipe.dvae.decode(tokens))),
        ):
            with FlopCounterMode(display=False) as counter:
                work()
            flops[name] = counter.get_total_flops()
    flops["rank"] -= flops["decode"]
    return {
        "draw": config.n_image_tokens * floor(config, n_rows, bytes_a_second, flops_a_second),
        **{name: n * count / flops_a_second for name, count in flops.items()},
    }


def divergences() -> dict[str, float]:
    """KL divergence of the bundled model's next tokens from float32's, nats a token, without guidance."""
    pipe = DallePipeline.from_pretrained(dtype="float32")
    text = torch.stack([torch.as_tensor(pipe.tokenizer.pad(pipe.tokenizer.encode(one))) for one in CAPTIONS])
    tokens = pipe(CAPTIONS, num_images_per_prompt=8, output_type="tokens").tokens.flatten(1)

    def predicted(decoder: TransformerDecoder) -> torch.Tensor:
        state, stream = decoder.start(text, [8] * len(CAPTIONS))
        logits = [decoder.head(decoder.norm(state))]
        for column in tokens[:, :-1].T:
            logits.append(decoder.head(decoder.norm(decoder.step(column, stream))))
        return torch.stack(logits, 1).float().log_softmax(-1)

    exact = predicted(TransformerDecoder(pipe.transformer))
    half = copy.deepcopy(pipe.transformer).to(torch.bfloat16)
    found = {
        "bfloat16": predicted(TransformerDecoder(half)),
        "int8": predicted(TransformerDecoder(half, is_int8=True)),
    }
    return {name: float((exact.exp() * (exact - one)).sum(-1).mean()) for name, one in found.items()}


def start_up() -> dict[str, float]:
    """Seconds of what a person waits for, the best of three."""

    def best(command: list[str]) -> dict[str, float]:
        found = list[dict[str, float]]()
        for _ in range(3):
            began = time.perf_counter()
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            whole = time.perf_counter() - began
            found.append(json.loads(out.splitlines()[-1]) if out.startswith("{") else {"whole": whole})
        return {name: min(one[name] for one in found) for name in found[0]}

    times = best([sys.executable, "-c", START_UP])
    times["help"] = best([sys.executable, "-m", "dalle.cli", "--help"])["whole"]
    times |= best([sys.executable, "-c", CANDIDATES])
    return times


def main() -> None:
    """Measure, and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a few grid rows, and no 512 pictures side by side"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--only", nargs=4, metavar=("MODEL", "ROWS", "GRID_ROWS", "WAY"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    device = arguments.device
    if arguments.only:
        model, n_rows, n_grid_rows, way = arguments.only
        print(json.dumps(draw(model, int(n_rows), int(n_grid_rows), way, device)))
        return
    moved, computed = bandwidth(device), gemm_peak(device)
    what = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"torch {torch.__version__}, {what}: {moved / 1e9:.1f} GB/s from memory, "
        f"{computed / 1e12:.2f} TFLOP/s in bf16\n"
    )
    print(
        "| model | rows | way | threads | floor, ms a step | ours, ms a step | of the floor | whole pictures, s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    peaks = dict[tuple[str, int], float]()
    for model in ("bundled", "25M"):
        config = sizes(model)
        for n_rows in ROWS[:-1] if arguments.quick else ROWS:
            n_grid_rows = min(4, config.grid_size) if arguments.quick else config.grid_size
            for way in ways(device, n_rows):
                found = in_a_process("--device", device, "--only", model, str(n_rows), str(n_grid_rows), way)
                if way == WAYS[device][0]:
                    peaks[model, n_rows] = found["peak"]
                least = floor(config, n_rows, moved, computed)
                print(
                    f"| {model} | {n_rows} | {way} | {found['threads']} | {1e3 * least:.2f} "
                    f"| {1e3 * found['step']:.2f} | {least / found['step']:.0%} "
                    f"| {found['step'] * config.n_image_tokens:.2f} |",
                    flush=True,
                )
    if not arguments.quick:
        print(
            "\n| model | a row more (64 to 512), MB | by the formula of the masks, MB | a dense cache, MB |"
        )
        print("|---|---|---|---|")
        for model in ("bundled", "25M"):
            config = sizes(model)
            grown = (peaks[model, 512] - peaks[model, 64]) / (512 - 64)
            dense = WEIGHT_BYTES * 2 * config.d_model * config.n_layers * (config.n_image_tokens - 1)
            print(
                f"| {model} | {grown / 1e6:.2f} | {cache_bytes(config, WEIGHT_BYTES) / 1e6:.2f} | {dense / 1e6:.2f} |"
            )
    if device == "cuda":
        return
    print("\n| dtype | divergence from float32, nats a token |\n|---|---|")
    for name, nats in divergences().items():
        print(f"| {name} | {nats:.1e} |")
    times = start_up()
    print("\n| what a person waits for (bundled model, best of 3) | s |\n|---|---|")
    for name, label in (
        ("help", "`dalle --help`"),
        ("load", "import and load"),
        ("draw_4", "4 pictures after that"),
        ("candidates_512", "512 candidates drawn, decoded and ranked, the best 32 kept"),
        ("candidates_512_native", "the same with `--native`"),
    ):
        print(f"| {label} | {times[name]:.2f} |")
    parts = chain_floor(512, moved, computed)
    least = sum(parts.values())
    told = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())
    plain, native = (times[name] / least for name in ("candidates_512", "candidates_512_native"))
    print(
        f"\nFloor of the 512 candidates: {least:.2f} s ({told}). Ours takes {plain:.1f} times as long,"
        f" with `--native` {native:.1f} times."
    )


if __name__ == "__main__":
    main()
