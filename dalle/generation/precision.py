"""What a drawing is computed in: the dtype of the transformer's weights, and CPU threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Of one layer's step: below both, waking a second thread costs about what it saves, and more on a busy machine.
SHARED_FROM_FLOPS = 50e6
SHARED_FROM_WEIGHTS = 2e6  # that have to be read
# int8: the linear maps' weights in 8 bits, one scale a row, all else bfloat16; half the memory to read for one picture.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


# What PyTorch calls bfloat16 products of x86 (AVX-512, AMX) and ARM processors.
BFLOAT16_CAPABILITIES = ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16")


def has_native_bfloat16(device: str | torch.device) -> bool:
    """Whether a GPU or CPU multiplies in bfloat16 itself; emulated, it takes many times as long as float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if kind == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in BFLOAT16_CAPABILITIES)
    return False


def default_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 on a GPU or CPU that computes in it natively, else float32."""
    return torch.bfloat16 if has_native_bfloat16(device) else torch.float32


def as_dtype(dtype: str | torch.dtype, device: str | torch.device) -> torch.dtype:
    """Return the dtype of a name such as "bfloat16"; "auto" is the device's default. ValueError for another."""
    if dtype == "auto":
        return default_dtype(device)
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype is {dtype}; allowed are auto, {', '.join(DTYPES)}")
    return found


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the transformer's parameters are held in for a dtype of drawing: int8 is made from bfloat16."""
    return torch.bfloat16 if dtype == torch.int8 else dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The name that `as_dtype` takes."""
    return str(dtype).removeprefix("torch.")


def decode_threads(d_model: int, n_rows: int) -> int:
    """CPU threads of a decoding step: one while a layer is small, to compute and to read, else PyTorch's number.

    A rule of shape alone: the number of threads decides how sums round, so it must not follow the clock.
    """
    n_weights = 12 * d_model**2
    is_small = n_weights < SHARED_FROM_WEIGHTS and 2 * n_weights * n_rows < SHARED_FROM_FLOPS
    return 1 if is_small else torch.get_num_threads()


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Runs PyTorch with n threads: their number decides how sums are split, and so how they round."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
