"""Row, column, convolutional and dense attention masks as data, the attention call, the cache of image keys.

Source: DALL·E paper (arXiv 2102.12092), section 2.2, footnote 7, appendix B.1 and figure 11; Child et al.
2019.

Every image mask is a set of offsets: the image token at raster index i sees the one at index j when i - j is
in the set. No offset is negative, so no mask can leak the future, and offsets are flat: all masks wrap over
the row ends, as in figure 11.

A stream of S = T + N slots reads [BOS, t_1 .. t_T, z_0 .. z_(N-2)], so slot 0 .. T is the caption part and
slot T + 1 + i holds the image token at raster index i (and predicts index i + 1). Masks are defined on the
index of the token that a slot *holds*. settled: the paper does not say which of the two it counts; held
indices make the offset 0 "the token itself", which is what the figure draws, and they are what other
re-implementations use.

Caption slots see the caption causally. Image slots see all 1 + T caption slots (BOS and pads included) in
every layer, and the image keys of their layer's mask, in one joint softmax (footnote 7).

Shapes: B batch, T text tokens, N = G * G image tokens, G grid side, S = T + N stream, H heads, D head width.
"""

import bisect
import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

LayerKind = Literal["row", "column", "conv", "dense"]
LAYER_KINDS: tuple[LayerKind, ...] = get_args(LayerKind)

# From this grid side on, a CPU splits caption keys from image windows instead of masking a dense score
# matrix. Forward + backward, fp32, one AVX2 thread, 4 heads of 64, other work on the machine (the ratios
# count), masked / split in ms: row 25/30 at G=8, 23/20 at 12, 24/15 at 16, 111/64 at 32; column 19/22, 22/17,
# 24/14, 129/41; conv 19/35, 22/36, 24/34, 132/74. Batch 16, 8, 4, 1; T = 64, at G=32 256.
SPLIT_FROM_GRID = {"row": 12, "column": 12, "conv": 32}
# Up to this stream length, a CPU that trains forms the whole score matrix itself: PyTorch's fused attention is
# fast forwards there, but not backwards. `benchmarks/attention.py` times the paths.
EXPLICIT_TO_STREAM = 160
# From this stream length on, a GPU uses FlexAttention, which skips empty 128 x 128 tiles of the mask. Chosen
# for its four tiles a side, not measured.
FLEX_FROM_STREAM = 512


# --- Masks as data ------------------------------------------------------------------------------------------


def layer_kinds(n_layers: int, pattern: str | Sequence[str]) -> tuple[LayerKind, ...]:
    """Names the attention mask of each layer, first layer first.

    `pattern` is "paper" (with 1-based i: the last layer conv, else column where (i - 2) mod 4 = 0, else row),
    "dense", or one kind per layer. Raises ValueError for another name or a tuple of another length. Source:
    appendix B.1.
    """
    if n_layers < 1:
        raise ValueError(f"n_layers is {n_layers}; a transformer has at least 1 layer")
    if pattern == "paper":
        columns = ("column" if (i - 2) % 4 == 0 else "row" for i in range(1, n_layers))
        return cast(tuple[LayerKind, ...], (*columns, "conv"))
    if pattern == "dense":
        pattern = ("dense",) * n_layers
    if isinstance(pattern, str):
        raise ValueError(
            f"layers is {pattern!r}; allowed: 'paper', 'dense', or a list of {n_layers} layer kinds"
        )
    for kind in pattern:
        _check_kind(kind)
    if len(pattern) != n_layers:
        raise ValueError(
            f"layers names {len(pattern)} layer kinds; n_layers is {n_layers}: give one kind per layer"
        )
    return cast(tuple[LayerKind, ...], tuple(pattern))


def image_offsets(kind: str, grid: int, kernel: int) -> list[int]:
    """List the offsets i - j, ascending from 0, at which an image token i sees the image token j.

    Raises ValueError for an unknown kind or an even kernel. Source: figure 11; the conv set is the causal
    half of a `kernel` x `kernel` square around the token, flattened, so that it wraps over row ends like the
    row mask.
    """
    _check_kind(kind)
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"conv_kernel is {kernel}; it must be a positive odd number")
    if kind == "row":
        offsets: Sequence[int] = range(grid + 1)  # the last of them is the cell directly above
    elif kind == "column":
        offsets = range(0, grid * grid, grid)
    elif kind == "dense":
        offsets = range(grid * grid)
    else:
        reach = range(-(kernel // 2), kernel // 2 + 1)
        offsets = sorted({up * grid + left for up in reach for left in reach})
    return [offset for offset in offsets if 0 <= offset < grid * grid]


def allowed_image_keys(kind: str, position: int, grid: int, kernel: int) -> list[int]:
    """List the raster indices, ascending and ending in `position`, that the image token at `position` sees.

    Raises ValueError for an unknown kind, an even kernel or a position outside the grid. Source: figure 11.
    """
    if not 0 <= position < grid * grid:
        raise ValueError(f"image position is {position}; a {grid} x {grid} grid has 0 .. {grid * grid - 1}")
    return [position - offset for offset in reversed(image_offsets(kind, grid, kernel)) if offset <= position]


def dense_mask(kind: str, n_text: int, grid: int, kernel: int) -> Tensor:
    """Draws the mask of the whole stream, True where a query slot (row) may see a key slot: bool (S, S).

    Raises ValueError for an unknown kind or an even kernel. Source: section 2.2, figure 11.
    """
    n_caption, n_stream = 1 + n_text, n_text + grid * grid
    mask = torch.ones(n_stream, n_stream, dtype=torch.bool, device="cpu").tril_()
    raster = torch.arange(n_stream - n_caption, device="cpu")
    mask[n_caption:, n_caption:] = _sees(kind, raster[:, None], raster[None, :], grid, kernel)
    return mask


def _sees(kind: str, query: Tensor, key: Tensor, grid: int, kernel: int) -> Tensor:
    """Tells elementwise whether the image token `query` sees the image token `key` (raster indices)."""
    is_allowed = torch.zeros(grid * grid, dtype=torch.bool, device="cpu")
    is_allowed[image_offsets(kind, grid, kernel)] = True
    offset = query - key
    return (offset >= 0) & is_allowed[offset.clamp(min=0)]


def _check_kind(kind: str) -> None:
    if kind not in LAYER_KINDS:
        raise ValueError(f"layer kind is {kind!r}; allowed: {', '.join(LAYER_KINDS)}")


# --- Plan: what one kind of layer needs to know -------------------------------------------------------------


class AttentionPlan:
    """The mask of one kind of layer for one stream shape, in the forms that the attention paths read.

    Layers of the same kind share one plan. A plan is not a module and holds no weights: its tensors are
    derived from four settings, made on first use for each device, so a model built on the meta device gets
    right masks too.
    """

    def __init__(self, kind: str, n_text: int, grid: int, kernel: int) -> None:
        _check_kind(kind)
        self.kind, self.n_text, self.grid, self.kernel = kind, n_text, grid, kernel
        self.n_caption = 1 + n_text  # BOS and the text tokens: what every image slot sees
        self.n_image = grid * grid
        self.n_stream = n_text + grid * grid
        self._offsets = image_offsets(kind, grid, kernel)
        largest = max(self._offsets)
        # Of an `ImageCache`: as far as the mask reaches back, and no more than the tokens that are ever read.
        self.n_slots = self.n_image if kind == "column" else max(1, min(largest + 1, self.n_image - 1))
        self._has_no_gaps = self._offsets[: self.n_slots] == list(range(self.n_slots))
        # How many grid rows above its own a query reaches; column layers are laid out transposed: none.
        self.n_rows_back = 0 if kind == "column" else min(math.ceil(largest / grid), grid - 1)
        self._made: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self._block_masks: dict[torch.device, object] = {}
        self._lists: tuple[list[int], Tensor, list[int]] | None = None
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

    def mask(self, device: torch.device) -> Tensor:
        """Return `dense_mask` on `device`, bool (S, S)."""
        draw = functools.partial(dense_mask, self.kind, self.n_text, self.grid, self.kernel)
        return self._make("mask", device, torch.bool, draw)

    def bias(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return what is added to the scores of the whole stream, 0 or -inf: (S, S)."""

        def draw() -> Tensor:
            seen = dense_mask(self.kind, self.n_text, self.grid, self.kernel)
            return torch.zeros(seen.shape, device="cpu").masked_fill_(~seen, -math.inf)

        return self._make("bias", device, dtype, draw)

    def window_bias(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return what is added to window scores, 0 or -inf: (G, G, K), K keys for a row; see `windows`."""
        return self._make("window", device, dtype, self._draw_window_bias)

    def slot(self, position: int) -> int:
        """Names the slot of an `ImageCache` that holds the image token at raster index `position`."""
        if self.kind == "column":
            return (position % self.grid) * self.grid + position // self.grid
        return position % self.n_slots

    def visible_slots(self, position: int, device: torch.device) -> slice | Tensor:
        """Names the slots that the image token at `position` reads: a slice, or int64 indices."""
        if self.kind == "column":
            first = (position % self.grid) * self.grid
            return slice(first, first + position // self.grid + 1)
        if self._has_no_gaps:
            return slice(0, min(position + 1, self.n_slots))
        reach = self._make("offsets", device, torch.int64, lambda: torch.tensor(self._offsets, device="cpu"))
        return (position - reach[: bisect.bisect_right(self._offsets, position)]) % self.n_slots

    def tables(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return `slot` and `visible_slots` of every position as tensors: (N,), (N, W), and 0 or -inf, (N, W)."""
        if (device, dtype) not in self._tables:
            slots, visible, counts = self.lists()
            width = visible.shape[1]
            bias = torch.tensor([[0.0] * count + [-math.inf] * (width - count) for count in counts])
            self._tables[device, dtype] = (
                torch.tensor(slots).to(device),
                visible.to(device),
                bias.to(device, dtype),
            )
        return self._tables[device, dtype]

    def counts(self, device: torch.device) -> Tensor:
        """Return how many of the `visible_slots` in `tables` count, of every position: (N,) int64."""
        return self._make("counts", device, torch.int64, lambda: torch.tensor(self.lists()[2], device="cpu"))

    def lists(self) -> tuple[list[int], Tensor, list[int]]:
        """Return for every position its `slot`, its `visible_slots` (N, W) int64, and how many of them count."""
        if self._lists is None:
            # The last image token is never read; a recorded step that follows it stores it all the same.
            read = [self.visible_slots(position, torch.device("cpu")) for position in range(self.n_image)]
            rows = [list(range(x.start, x.stop)) if isinstance(x, slice) else x.tolist() for x in read]
            counts = [len(row) for row in rows]
            visible = torch.tensor([row + [0] * (max(counts) - len(row)) for row in rows])
            self._lists = ([self.slot(position) for position in range(self.n_image)], visible, counts)
        return self._lists

    def block_mask(self, device: torch.device) -> object:
        """Return the mask as FlexAttention's BlockMask, which lists the 128 x 128 tiles to visit."""
        if device not in self._block_masks:
            from torch.nn.attention.flex_attention import create_block_mask

            mask = self.mask(device)

            def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return mask[query, key]

            with torch.inference_mode(False):
                self._block_masks[device] = create_block_mask(
                    sees, None, None, self.n_stream, self.n_stream, device=str(device)
                )
        return self._block_masks[device]

    def _draw_window_bias(self) -> Tensor:
        back, grid = self.n_rows_back, self.grid
        raster = torch.arange(self.n_image, device="cpu").view(grid, grid)
        if self.kind == "column":
            raster = raster.T
        # Rows above the picture get an index later than every query, which no mask allows.
        above = torch.full((back, grid), self.n_image, device="cpu")
        keys = torch.cat([above, raster]).unfold(0, back + 1, 1).transpose(1, 2).flatten(1)  # (G, K)
        seen = _sees(self.kind, raster[:, :, None], keys[:, None, :], grid, self.kernel)  # (G, G, K)
        return torch.zeros(seen.shape, device="cpu").masked_fill_(~seen, -math.inf)

    def _make(
        self, name: str, device: torch.device, dtype: torch.dtype, draw: Callable[[], Tensor]
    ) -> Tensor:
        key = (name, device, dtype)
        if key not in self._made:
            # A mask first needed while sampling must still be usable by a later training step.
            with torch.inference_mode(False):
                self._made[key] = draw().to(device, dtype)
        return self._made[key]


# --- Attention over the whole stream ------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Attends over the whole stream under the plan's mask: (B, H, S, D) three times -> (B, H, S, D).

    A stream cut after any slot is allowed; it sees what it would see in the whole one. The path is chosen by
    device and shape alone: plain causal attention where the mask is plain causal, FlexAttention on GPUs,
    explicit attention where a CPU trains on short streams, split attention on CPUs from `SPLIT_FROM_GRID`,
    else masked SDPA. All give the same numbers up to rounding.
    """
    n_stream = q.shape[2]
    if q.device.type == "cpu" and q.requires_grad and n_stream <= EXPLICIT_TO_STREAM:
        return explicit_attention(q, k, v, plan)
    if plan.kind == "dense" or n_stream <= plan.n_caption:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    is_whole = n_stream == plan.n_stream
    if is_whole and q.device.type == "cuda" and n_stream >= FLEX_FROM_STREAM and _has_flex(q.shape[3]):
        return flex_attention(q, k, v, plan)
    if is_whole and q.device.type == "cpu" and plan.grid >= SPLIT_FROM_GRID[plan.kind]:
        return split_attention(q, k, v, plan)
    return masked_attention(q, k, v, plan)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Attends through the dense boolean mask: any kind, device and length up to S. Shapes as `attend`."""
    n_stream = q.shape[2]
    mask = plan.mask(q.device)[:n_stream, :n_stream]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Attends as `masked_attention` does, through a score matrix in memory, with a fast backward on CPUs."""
    n_stream = q.shape[2]
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, S, S)
    scores = scores + plan.bias(q.device, scores.dtype)[:n_stream, :n_stream]
    shares: Tensor = scores.softmax(dim=-1).to(v.dtype)  # autocast may have widened the softmax
    return shares @ v


def split_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Attends with one GEMM over the caption keys and small windows of image keys, whole streams only.

    Each grid row of queries reads only its own row of keys and the `n_rows_back` rows above; column layers
    transpose the grid first, as in figure 11c. Both score blocks share one softmax, so the result is exact.
    """
    # Split and not sliced: its backward joins the parts; that of a slice fills a whole tensor with zeros.
    parts = [plan.n_caption, plan.n_image - 1]
    caption_q, image_q = q.split_with_sizes(parts, dim=2)
    caption_k, image_k = k.split_with_sizes(parts, dim=2)
    caption_v, image_v = v.split_with_sizes(parts, dim=2)
    caption = F.scaled_dot_product_attention(caption_q, caption_k, caption_v, is_causal=True)

    grid_q = _to_grid(image_q * q.shape[-1] ** -0.5, plan)  # (B, H, G, G, D)
    window_k = windows(_to_grid(image_k, plan), plan.n_rows_back)  # (B, H, G, K, D)
    window_v = windows(_to_grid(image_v, plan), plan.n_rows_back)  # (B, H, G, K, D)
    caption_scores = grid_q.flatten(2, 3) @ caption_k.mT  # (B, H, N, 1 + T)
    window_scores = grid_q @ window_k.mT  # (B, H, G, G, K)
    window_scores.add_(plan.window_bias(q.device, window_scores.dtype))
    caption_scores = caption_scores.view(*grid_q.shape[:4], -1)  # (B, H, G, G, 1 + T)
    scores = torch.cat([caption_scores, window_scores], dim=-1)
    joint = scores.softmax(dim=-1).to(v.dtype)  # (B, H, G, G, 1 + T + K); autocast may have widened it
    caption_share, window_share = joint.split_with_sizes([plan.n_caption, window_k.shape[3]], dim=-1)

    image = window_share @ window_v  # (B, H, G, G, D)
    image = image + (caption_share.flatten(2, 3) @ caption_v).view_as(image)
    if plan.kind == "column":
        image = image.transpose(2, 3)
    return torch.cat([caption, image.flatten(2, 3)[:, :, :-1]], dim=2)  # (B, H, S, D)


def windows(rows: Tensor, n_rows_back: int) -> Tensor:
    """Give each grid row the rows above it and itself: (B, H, G, G, D) -> (B, H, G, K, D).

    K is (n_rows_back + 1) * G; rows above the picture are zeros. Shifted copies and not `unfold`, whose
    backward is slow on CPUs.
    """
    shifted = [F.pad(rows, (0, 0, 0, 0, up, -up)) for up in range(n_rows_back, 0, -1)]
    return torch.cat([*shifted, rows], dim=3) if shifted else rows


def _to_grid(x: Tensor, plan: AttentionPlan) -> Tensor:
    """Lays image slots out as a grid: (B, H, N - 1, D) -> (B, H, G, G, D); zeros for the last token."""
    grid = F.pad(x, (0, 0, 0, 1)).reshape(*x.shape[:2], plan.grid, plan.grid, -1)
    return grid.transpose(2, 3) if plan.kind == "column" else grid


def flex_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Attends through PyTorch's FlexAttention, which skips empty tiles, whole streams only."""
    return cast(Tensor, _compiled_flex()(q, k, v, block_mask=plan.block_mask(q.device)))


@functools.cache
def _has_flex(d_head: int) -> bool:
    """Tells whether FlexAttention can be compiled; it has no heads narrower than 16."""
    return d_head >= 16 and importlib.util.find_spec("triton") is not None


@functools.cache
def _compiled_flex() -> Callable[..., object]:
    from torch.nn.attention.flex_attention import flex_attention as flex

    return torch.compile(flex, dynamic=False)
