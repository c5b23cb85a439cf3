"""Masks against the paper's figures, fast attention against the dense masked one, and the key-value cache."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dalle.attention import (
    LAYER_KINDS,
    SPLIT_FROM_GRID,
    AttentionPlan,
    allowed_image_keys,
    attend,
    dense_mask,
    explicit_attention,
    flex_attention,
    image_offsets,
    layer_kinds,
    masked_attention,
    split_attention,
)
from dalle.generation.cache import ImageCache


def random_heads(plan: AttentionPlan, batch: int = 2, d_head: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 2, plan.n_stream, d_head)
    return [torch.randn(shape, generator=generator).requires_grad_() for _ in range(3)]


def test_masks_are_those_of_figure_11() -> None:
    assert allowed_image_keys("row", 9, 4, 3) == [5, 6, 7, 8, 9]
    assert allowed_image_keys("column", 9, 4, 3) == [1, 5, 9]
    assert allowed_image_keys("conv", 9, 4, 3) == [4, 5, 6, 8, 9]
    assert allowed_image_keys("dense", 9, 4, 3) == list(range(10))


def test_masks_wrap_over_row_ends() -> None:
    assert allowed_image_keys("row", 8, 4, 3) == [4, 5, 6, 7, 8]  # the first cell of a row sees the row above
    assert allowed_image_keys("conv", 8, 4, 3) == [
        3,
        4,
        5,
        7,
        8,
    ]  # and what stands to its left in the flat order


@pytest.mark.parametrize(("kind", "most"), [("row", 33), ("column", 32), ("conv", 61)])
def test_key_counts_at_the_papers_size(kind: str, most: int) -> None:
    counts = [len(allowed_image_keys(kind, position, 32, 11)) for position in range(1024)]
    assert max(counts) == most
    assert counts[0] == 1


def test_layer_order_is_the_papers() -> None:
    kinds = layer_kinds(64, "paper")
    assert [kinds.count(kind) for kind in LAYER_KINDS] == [47, 16, 1, 0]  # row, column, conv, dense
    assert kinds[:7] == ("row", "column", "row", "row", "row", "column", "row")
    assert [i for i, kind in enumerate(kinds, start=1) if kind == "column"] == list(range(2, 63, 4))
    assert kinds[-1] == "conv"
    assert layer_kinds(4, "paper") == ("row", "column", "row", "conv")


def test_layers_can_be_given_one_by_one() -> None:
    assert layer_kinds(3, ["conv", "dense", "row"]) == ("conv", "dense", "row")
    assert layer_kinds(2, "dense") == ("dense", "dense")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("papers", "allowed: 'paper', 'dense'"),
        (("row",), "names 1 layer kinds; n_layers is 2"),
        (("row", "diagonal"), "'diagonal'; allowed: row, column, conv, dense"),
    ],
)
def test_unknown_layer_orders_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_kinds(2, pattern)


def test_even_kernels_and_positions_outside_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="positive odd"):
        image_offsets("conv", 8, 4)
    with pytest.raises(ValueError, match=r"0 \.\. 15"):
        allowed_image_keys("row", 16, 4, 3)


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize(("grid", "kernel"), [(4, 3), (5, 11)])
def test_dense_mask_shows_the_caption_and_the_allowed_image_keys(kind: str, grid: int, kernel: int) -> None:
    n_text = 3
    mask = dense_mask(kind, n_text, grid, kernel)
    assert mask.shape == (n_text + grid * grid, n_text + grid * grid)
    assert not mask.triu(1).any()
    for slot, row in enumerate(mask):
        seen = row.nonzero().flatten().tolist()
        if slot <= n_text:
            assert seen == list(range(slot + 1))
        else:
            image = allowed_image_keys(kind, slot - n_text - 1, grid, kernel)
            assert seen == [*range(n_text + 1), *(n_text + 1 + key for key in image)]


def assert_equals_masked_attention(fast: Callable[..., Tensor], plan: AttentionPlan, n_slots: int) -> None:
    """`fast` and the dense masked twin agree on the first slots of a stream, gradients included."""
    heads = random_heads(plan)
    cut = [x[:, :, :n_slots] for x in heads]
    mine, theirs = fast(*cut, plan), masked_attention(*cut, plan)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad(out, heads, cotangent) for out in (mine, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize(("grid", "kernel"), [(2, 3), (5, 3), (5, 11), (12, 11)])
def test_split_attention_equals_dense_masked_attention(kind: str, grid: int, kernel: int) -> None:
    plan = AttentionPlan(kind, 5, grid, kernel)
    assert_equals_masked_attention(split_attention, plan, plan.n_stream)


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("n_slots", [4, 7, 14])
def test_explicit_attention_equals_dense_masked_attention(kind: str, n_slots: int) -> None:
    assert_equals_masked_attention(explicit_attention, AttentionPlan(kind, 5, 3, 3), n_slots)


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("grid", [3, 12])
def test_attend_equals_dense_masked_attention(kind: str, grid: int) -> None:
    plan = AttentionPlan(kind, 4, grid, 3)
    heads = random_heads(plan)
    torch.testing.assert_close(attend(*heads, plan), masked_attention(*heads, plan), rtol=1e-5, atol=1e-5)
    drawing = [x.detach() for x in heads]
    torch.testing.assert_close(attend(*drawing, plan), masked_attention(*heads, plan), rtol=1e-5, atol=1e-5)
    assert SPLIT_FROM_GRID["row"] == SPLIT_FROM_GRID["column"] == 12  # so that both paths were compared


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("n_slots", [1, 5, 9])
def test_cut_streams_see_what_whole_streams_see(kind: str, n_slots: int) -> None:
    plan = AttentionPlan(kind, 4, 3, 3)
    heads = random_heads(plan)
    cut = attend(*(x[:, :, :n_slots] for x in heads), plan)
    torch.testing.assert_close(cut, attend(*heads, plan)[:, :, :n_slots], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize(("grid", "kernel"), [(2, 3), (4, 3), (4, 1), (5, 3), (5, 9), (8, 11)])
def test_an_image_cache_shows_each_token_exactly_its_masks_keys(kind: str, grid: int, kernel: int) -> None:
    plan = AttentionPlan(kind, 3, grid, kernel)
    cache = ImageCache(plan, 2, 1, 1, torch.zeros(()))
    cache.memory.fill_(torch.nan)  # what was never stored must never be read
    memory = cache.memory.data_ptr()
    for position in range(grid * grid - 1):
        marks = (
            torch.tensor([0.25, -0.25]).view(2, 1, 1, 1) + position
        )  # keys and values tell themselves apart
        cache.store_(position, marks.expand(2, 1, 2, 1))
        seen = cache.visible(position)[..., 0]  # (2, H, R, W)
        expected = torch.tensor(allowed_image_keys(kind, position, grid, kernel), dtype=torch.float32)
        for half, mark in enumerate((0.25, -0.25)):
            assert torch.equal(seen[half, 0].sort(dim=-1).values, (expected + mark).expand(2, -1))
    assert cache.memory.data_ptr() == memory


def test_an_image_cache_holds_what_the_ring_formula_says() -> None:
    slots = {kind: AttentionPlan(kind, 256, 32, 11).n_slots for kind in LAYER_KINDS}
    assert slots == {"row": 33, "column": 1024, "conv": 5 * 32 + 5 + 1, "dense": 1023}


@pytest.mark.parametrize("grid", [3, 12])
def test_a_plan_first_used_for_inference_still_trains(grid: int) -> None:
    plan = AttentionPlan("row", 4, grid, 3)
    heads = random_heads(plan)
    with torch.inference_mode():
        attend(*heads, plan)
    attend(*heads, plan).sum().backward()


def test_a_plan_made_on_the_meta_device_has_a_real_mask() -> None:
    with torch.device("meta"):
        plan = AttentionPlan("conv", 4, 3, 3)
        mask = plan.mask(torch.device("cpu"))
    assert torch.equal(mask, dense_mask("conv", 4, 3, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_flex_attention_equals_dense_masked_attention(kind: str) -> None:
    plan = AttentionPlan(kind, 32, 23, 11)
    heads = [x.detach().cuda().requires_grad_() for x in random_heads(plan, d_head=32)]
    fast, slow = flex_attention(*heads, plan), masked_attention(*heads, plan)
    torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-3)
    gradients = [torch.autograd.grad(out.square().sum(), heads) for out in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-2)
