"""What this machine can do at best: bytes a second from memory, and bf16 operations a second."""

import time
from collections.abc import Callable

import torch

GIBIBYTE = 2**30


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes, finished on the device."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def bandwidth(device: torch.device | str = "cpu", n_bytes: int = GIBIBYTE) -> float:
    """Bytes a second, the best of several passes over a buffer of `n_bytes` by all threads: read, or copied."""
    device = torch.device(device)
    buffer = torch.ones(n_bytes // 4, dtype=torch.int32, device=device)
    other, best = torch.empty_like(buffer), 0.0
    for _ in range(5):
        best = max(best, n_bytes / seconds_of(buffer.amax, device))
        best = max(best, 2 * n_bytes / seconds_of(lambda: other.copy_(buffer), device))
    return best


def gemm_peak(device: torch.device | str = "cpu") -> float:
    """The best of several bf16 matrix products, FLOP/s."""
    device = torch.device(device)
    best = 0.0
    for m, k, n in ((6144, 256, 1024), (6144, 1024, 256), (4096, 4096, 4096), (8192, 8192, 8192)):
        if device.type == "cpu" and n > 4096:
            continue
        a, b = (torch.randn(rows, k, device=device).bfloat16() for rows in (m, n))
        for _ in range(8):
            taken = seconds_of(lambda: torch.nn.functional.linear(a, b), device)  # noqa: B023
            best = max(best, 2 * m * k * n / taken)
    return best
