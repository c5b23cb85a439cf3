"""What the layers remember of image tokens while pictures are drawn; its memory never grows.

Shapes: R pictures, H heads, D head width, N image tokens, L slots, W keys that a token sees, itself included.
"""

from __future__ import annotations

from torch import Tensor

from dalle.attention import AttentionPlan

Position = int | Tensor  # a raster index; on a GPU as a tensor, see `RecordedImageCache`


class ImageCache:
    """Keys and values of the image tokens that later ones may still read, in one layer, for R half-drawn pictures.

    It has as many slots as the mask reaches back, all taken at the start: nothing grows while a picture is drawn.
    Where the mask allows all of them (row, dense) they are a ring; column layers keep column after column, so that
    what a token reads lies together; the convolution picks from its ring. Softmax asks for no order.

    Shapes: R pictures, W keys that a token sees, itself included, L slots.
    """

    def __init__(self, plan: AttentionPlan, n_pictures: int, n_heads: int, d_head: int, like: Tensor) -> None:
        self.plan = plan
        self.memory = like.new_zeros(2, n_heads, n_pictures, plan.n_slots, d_head)  # keys, then values

    def store_(self, position: Position, keys_values: Tensor) -> None:
        """Take in the keys and values, (2, H, R, D), of the image tokens at raster index `position`."""
        self.memory[:, :, :, self.plan.slot(int(position))] = keys_values

    def visible(self, position: Position) -> Tensor:
        """Return the keys and values that the tokens at `position` may read, their own too: (2, H, R, W, D)."""
        slots = self.plan.visible_slots(int(position), self.memory.device)
        return self.memory[:, :, :, slots] if isinstance(slots, slice) else self.memory.index_select(3, slots)

    def bias(self, position: Position) -> Tensor | None:
        """Return what to add to the scores of `visible`, (W,): here nothing, all of it may be read."""
        return None


class RecordedImageCache(ImageCache):
    """An `ImageCache` whose positions are int64 tensors (1,) on the device and whose shapes never change.

    `visible` always has as many keys as the widest step; `bias` is -inf where one is not to be read. So a step can
    be recorded once, as a CUDA graph, and replayed at every position.
    """

    @classmethod
    def of(cls, cache: ImageCache) -> RecordedImageCache:
        """Take over a cache's memory."""
        recorded = cls.__new__(cls)
        recorded.plan, recorded.memory = cache.plan, cache.memory
        return recorded

    def positions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return on the device, for every position: its slot (N,), the slots it sees (N, W), and how many (N,); int64."""
        slots, visible, _ = self.plan.tables(self.memory.device, self.memory.dtype)
        return slots, visible, self.plan.counts(self.memory.device)

    def store_(self, position: Position, keys_values: Tensor) -> None:
        slots, _, _ = self.plan.tables(self.memory.device, self.memory.dtype)
        self.memory.index_copy_(3, slots[position], keys_values[:, :, :, None])

    def visible(self, position: Position) -> Tensor:
        _, visible, _ = self.plan.tables(self.memory.device, self.memory.dtype)
        return self.memory.index_select(3, visible[position][0])

    def bias(self, position: Position) -> Tensor | None:
        _, _, bias = self.plan.tables(self.memory.device, self.memory.dtype)
        return bias[position][0]
