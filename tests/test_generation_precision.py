"""Dtypes and threads of a drawing."""

import pytest
import torch

from dalle.generation.precision import as_dtype, decode_threads, default_dtype, dtype_name, threads


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, torch.bfloat16), ({"avx512_bf16": False, "avx2": True}, torch.float32)],
)
def test_the_default_dtype_is_bfloat16_only_where_the_cpu_has_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert default_dtype("cpu") == expected


def test_dtypes_are_read_by_name_or_as_they_are() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        assert as_dtype(dtype, "cpu") == as_dtype(dtype_name(dtype), "cpu") == dtype
    with pytest.raises(ValueError, match="dtype is int4; allowed are auto, float32, bfloat16, int8"):
        as_dtype("int4", "cpu")


def test_the_number_of_threads_is_put_back_even_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyboardInterrupt
    assert torch.get_num_threads() == before


def test_small_steps_run_on_one_thread_and_large_ones_on_all() -> None:
    with threads(3):
        assert decode_threads(d_model=192, n_rows=8) == 1
        assert decode_threads(d_model=512, n_rows=1) == 3
        assert decode_threads(d_model=1024, n_rows=64) == 3
