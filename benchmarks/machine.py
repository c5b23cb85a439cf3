"""What this machine can do at best: bytes a second from memory, and bf16 operations a second."""

import time

import torch

GIBIBYTE = 2**30


def bandwidth(n_bytes: int = GIBIBYTE) -> float:
    """Bytes a second, the best of several passes over a buffer of `n_bytes` by all threads: read, or copied."""
    buffer = torch.ones(n_bytes // 4, dtype=torch.int32)
    other, best = torch.empty_like(buffer), 0.0
    for _ in range(4):
        for work, moved in ((buffer.amax, n_bytes), (lambda: other.copy_(buffer), 2 * n_bytes)):
            began = time.perf_counter()
            work()
            best = max(best, moved / (time.perf_counter() - began))
    return best


def gemm_peak() -> float:
    """The best of several bf16 matrix products, FLOP/s."""
    best = 0.0
    for m, k, n in ((6144, 256, 1024), (6144, 1024, 256), (4096, 4096, 4096)):
        a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
        for _ in range(8):
            began = time.perf_counter()
            torch.nn.functional.linear(a, b)
            best = max(best, 2 * m * k * n / (time.perf_counter() - began))
    return best
