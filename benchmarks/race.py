"""Our sampler against other people's, on equal terms, on this machine: a table of medians, spread and ratios.

    python benchmarks/race.py [--rounds 3] [--rows 1 8 64] [--grid 32]        # `make race`

The same number of weights outside of embeddings and heads (25 million), the same captions' length, top-k and number of
image tokens, the same threads, no dVAE. Each draws in a process of its own, in turns (ABCABC), and each in the dtype
that its code can use: bfloat16, but min-dalle float32. dalle-pytorch as released ignores its cache without guidance:
it is timed so at one row, 64 tokens of 1,024 and its time multiplied (later tokens cost it more: this flatters it), and
repaired everywhere. min-dalle always guides, with two rows a picture, and draws square batches: no 8.
What ours leaves out on purpose: logits of text, and image keys that the masks of its layers do not allow. Peers live in
.venv-peers (benchmarks/install_peers.sh).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PEERS_PYTHON = HERE.parent / ".venv-peers" / "bin" / "python"
NAMES = (
    "ours",
    "ours native",
    "dalle-pytorch",
    "min-dalle",
    "transformers",
    "transformers static",
    "x-transformers",
)
STOCK, STOCK_STEPS = "dalle-pytorch stock", 64


def draw(name: str, rows: int, grid: int, threads: int) -> dict[str, float]:
    """What one process of benchmarks/peers.py prints."""
    python = sys.executable if name.startswith("ours") else str(PEERS_PYTHON)
    command = [python, str(HERE / "peers.py"), name, "--rows", str(rows), "--grid", str(grid)]
    command += ["--dtype", "float32" if name == "min-dalle" else "bfloat16"]
    if name == STOCK:
        command += ["--steps", str(STOCK_STEPS)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Race, and print a table in Markdown for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument(
        "--samplers", nargs="+", choices=[*NAMES, STOCK], default=[*NAMES, STOCK], metavar="NAME"
    )
    parser.add_argument("--grid", type=int, default=32)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    if not PEERS_PYTHON.exists():
        raise SystemExit("the peers are not installed: run benchmarks/install_peers.sh")
    for rows in arguments.rows:
        names = [name for name in NAMES if name != "min-dalle" or round(rows**0.5) ** 2 == rows]
        names += [STOCK] if rows == 1 else []
        names = [name for name in names if name in arguments.samplers or name == "ours"]
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(arguments.rounds):
            for name in names:
                found[name].append(draw(name, rows, arguments.grid, arguments.threads))
        mine = statistics.median(one["ms_per_step"] for one in found["ours"])
        print(
            f"\n{rows} pictures of {arguments.grid**2} tokens, {arguments.threads} threads, "
            f"{arguments.rounds} rounds; load {os.getloadavg()[0]:.1f}\n"
        )
        print(
            "| sampler | dtype | weights, M | ms a step, median (least to most) | CPU ms a step | ours is faster by |"
        )
        print("|---|---|---|---|---|---|")
        for name in names:
            times = sorted(one["ms_per_step"] for one in found[name])
            cpu = statistics.median(1e3 * one["cpu_seconds"] / one["steps"] for one in found[name])
            middle = statistics.median(times)
            note = f" ({STOCK_STEPS} tokens)" if name == STOCK else ""
            print(
                f"| {name}{note} | {found[name][0]['dtype']} | {found[name][0]['core_parameters'] / 1e6:.1f} "
                f"| {middle:.2f} ({times[0]:.2f} to {times[-1]:.2f}) | {cpu:.2f} | {middle / mine:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
