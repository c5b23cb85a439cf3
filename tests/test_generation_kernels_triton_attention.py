"""The Triton kernel against plain attention; on a GPU, or anywhere in Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch

from dalle.attention import AttentionPlan, LayerKind
from dalle.generation.cache import ImageCache, RecordedImageCache
from dalle.generation.decoder import attend_step, group
from dalle.generation.kernels import triton_attention
from tests.test_generation_engine import KINDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_RUNNABLE = triton_attention.can_run(16) and (
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
)


@pytest.mark.gpu
@pytest.mark.skipif(not IS_RUNNABLE, reason="needs Triton, and a CUDA device or its interpreter")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_pictures", [[1], [3, 3, 20]])
def test_the_kernel_attends_as_plain_steps_do(kind: LayerKind, n_pictures: list[int]) -> None:
    plan, n_heads, d_head, n_rows = AttentionPlan(kind, 70, 4, 3), 2, 16, sum(n_pictures)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    captions = (random(n_heads, len(n_pictures), 71, d_head), random(n_heads, len(n_pictures), 71, d_head))
    plain = ImageCache(plan, n_rows, n_heads, d_head, captions[0])
    recorded = RecordedImageCache.of(ImageCache(plan, n_rows, n_heads, d_head, captions[0]))
    recorded.memory.fill_(torch.nan)  # what was never stored must never be read
    for position in range(15):
        heads = random(n_rows, 3 * n_heads * d_head)
        expected = attend_step(group(n_pictures), heads, captions, plain, position)
        place = torch.tensor([position], device=DEVICE)
        found = triton_attention.attend(group(n_pictures), heads, captions, recorded, place)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_head_widths_that_the_kernel_cannot_take_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention.importlib.util, "find_spec", lambda name: name == "triton")
    assert [d_head for d_head in (8, 16, 24, 64, 96, 128) if triton_attention.can_run(d_head)] == [
        16,
        64,
        128,
    ]
    monkeypatch.setattr(triton_attention.importlib.util, "find_spec", lambda name: None)
    assert not triton_attention.can_run(64)
