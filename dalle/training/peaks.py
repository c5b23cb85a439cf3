"""What this machine can do at best: bytes a second from memory, and operations a second in products of a dtype."""

import time
from collections.abc import Callable

import torch

GIBIBYTE = 2**30
Clock = Callable[[], float]  # seconds; time.thread_time where one thread is to be judged on a busy machine
SHAPES = ((6144, 256, 1024), (6144, 1024, 256), (4096, 4096, 4096), (8192, 8192, 8192))  # m, k, n
N_TIMES = 8


def seconds_of(work: Callable[[], object], device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Seconds that one call takes, finished on the device."""
    began = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began


def bandwidth(
    device: torch.device | str = "cpu", n_bytes: int = GIBIBYTE, clock: Clock = time.perf_counter
) -> float:
    """Bytes a second, the best of several passes over a buffer of `n_bytes` by all threads: read, or copied."""
    device = torch.device(device)
    buffer = torch.ones(n_bytes // 4, dtype=torch.int32, device=device)
    other, best = torch.empty_like(buffer), 0.0
    for _ in range(5):
        best = max(best, n_bytes / seconds_of(buffer.amax, device, clock))
        best = max(best, 2 * n_bytes / seconds_of(lambda: other.copy_(buffer), device, clock))
    return best


def gemm_peak(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    largest: int = 4096,
    patience: float = 10.0,
    clock: Clock = time.perf_counter,
) -> float:
    """FLOP/s of the best of several matrix products in `dtype`.

    Args:
        largest: size of the products that a CPU is asked for; a GPU is asked for all.
        patience: seconds for the products of one shape, each of which is taken once at least.
    """
    device = torch.device(device)
    best = 0.0
    for m, k, n in SHAPES:
        if device.type == "cpu" and n > largest:
            continue
        a, b = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))
        began = time.perf_counter()
        for _ in range(N_TIMES):
            taken = seconds_of(lambda: torch.nn.functional.linear(a, b), device, clock)  # noqa: B023
            best = max(best, 2 * m * k * n / taken)
            if time.perf_counter() - began > patience:
                break
    return best
