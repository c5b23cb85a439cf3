"""What people wait for at `dalle serve`: the first row, settled pictures, and everybody under load. Prints Markdown.

python benchmarks/serve.py            # the bundled model, a server process of its own
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psutil

CLIENTS, QUEUE = 64, 16
CAPTION = "a red apple, flat fluent style"


@contextlib.contextmanager
def server(folder: str) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a `dalle serve` that is ready, and its process."""
    command = [sys.executable, "-m", "dalle.cli", "serve", "--port", "0", "--data-dir", folder]
    command += ["--set", f"max_queue={QUEUE}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "dalle serves on http://" in line)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        address = line.split("http://")[1].split()[0]
        while request(address, "GET", "/ready")[0] != 200:
            time.sleep(0.05)
        yield address, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def request(address: str, method: str, path: str, body: Any = None) -> tuple[int, dict[str, str], bytes]:
    with contextlib.closing(http.client.HTTPConnection(address, timeout=300)) as connection:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def draw(address: str, **fields: Any) -> tuple[float, float]:
    """Seconds until the first row, and until the pictures are settled."""
    with contextlib.closing(http.client.HTTPConnection(address, timeout=300)) as connection:
        start, first = time.perf_counter(), 0.0
        body = json.dumps({"prompt": CAPTION} | fields)
        connection.request("POST", "/api/draw", body, {"content-type": "application/json"})
        for line in connection.getresponse():
            if line.startswith(b"event: row") and not first:
                first = time.perf_counter() - start
            if line.startswith(b"event: settled"):
                return first, time.perf_counter() - start
    raise RuntimeError("the stream ended without pictures")


def waits(address: str, asked: int) -> list[str]:
    """The quiet server: medians and the worst of several drawings."""
    rows = []
    for name, fields, times in (
        ("4 pictures", {"num_images": 4}, asked),
        ("4 of 32 candidates", {"num_images": 4, "num_candidates": 32}, max(2, asked // 2)),
        ("32 of 512 candidates", {"num_images": 32, "num_candidates": 512}, 1),
    ):
        found = [draw(address, **fields) for _ in range(times)]
        first, settled = (sorted(column) for column in zip(*found, strict=True))
        rows.append(
            f"| {name} | {first[len(first) // 2]:.2f} | {first[-1]:.2f} | {settled[len(settled) // 2]:.2f} |"
            f" {settled[-1]:.2f} |"
        )
    return rows


def load(address: str, process: psutil.Process, rounds: int) -> list[str]:
    """All clients at once, some times; health is asked throughout."""
    counts, health, sizes = Counter[str](), list[float](), [process.memory_info().rss]
    lock, stop = threading.Lock(), threading.Event()

    def ask(barrier: threading.Barrier) -> None:
        barrier.wait()
        body = {"prompt": CAPTION, "n": 1, "num_candidates": 4}
        status, headers, _ = request(address, "POST", "/v1/images/generations", body)
        kind = str(status) if status != 503 or "retry-after" in headers else "503 without Retry-After"
        with lock:
            counts[kind] += 1

    def watch() -> None:
        while not stop.is_set():
            start = time.perf_counter()
            request(address, "GET", "/health")
            health.append(time.perf_counter() - start)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(rounds):
        barrier = threading.Barrier(CLIENTS)
        threads = [threading.Thread(target=ask, args=(barrier,)) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sizes.append(process.memory_info().rss)
    stop.set()
    watcher.join()
    health.sort()
    p99 = health[int(0.99 * len(health))]
    answers = ", ".join(f"{n} x {kind}" for kind, n in sorted(counts.items()))
    grown = (sizes[-1] - sizes[1]) / 1e6
    return [
        f"| {CLIENTS} clients at once, {rounds} times, on a queue of {QUEUE} | {answers} |",
        f"| `/health` meanwhile, median and p99 of {len(health)}, ms | {1e3 * health[len(health) // 2]:.1f},"
        f" {1e3 * p99:.1f} |",
        f"| memory after the first round, and growth to the last, MB | {sizes[1] / 1e6:.0f}, {grown:+.0f} |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="drawings of four pictures, and rounds of load")
    repeat = parser.parse_args().repeat
    with tempfile.TemporaryDirectory() as folder, server(folder) as (address, process):
        print("| asked of a quiet server | first row, median, s | worst | settled, median, s | worst |")
        print("|---|---|---|---|---|")
        print("\n".join(waits(address, repeat)), flush=True)
        print("\n| under load | |\n|---|---|")
        print("\n".join(load(address, process, repeat)))


if __name__ == "__main__":
    main()
