"""The gradient of a contrastive loss over more pairs than fit into memory, or than one process holds.

Every pair of a batch is compared with every other, so such a loss is no sum over micro-batches. `cached_backward`
gives the exact gradient, that of scale and bias too, by running the towers twice (Gao et al. 2021, arXiv 2101.06983).
`gathered_loss` gives the exact gradient across processes: each compares its own rows with everybody's, and the
gradient flows back through the gathering (without that its direction is wrong, though the loss looks right).

Shapes: n pairs of a micro-batch or process, N pairs of all, E width of the embedding.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

Batch = TypeVar("Batch")
Encode = Callable[
    [Batch], tuple[Tensor, Tensor]
]  # a micro-batch -> unit vectors of images and texts, (n, E) each
Around = Callable[
    [bool], AbstractContextManager[None]
]  # is it the last micro-batch -> a context for its two passes
PairLoss = Callable[[Tensor, Tensor], Tensor]  # unit vectors of images and texts, (N, E) each -> a scalar


def cached_backward(
    encode: Encode[Batch],
    batches: Sequence[Batch],
    loss: PairLoss,
    around: Around = lambda is_last: nullcontext(),
) -> Tensor:
    """Add the gradient of `loss` over all micro-batches together to the parameters; returns the loss, detached.

    Exact where encoding a row does not depend on the other rows and draws no random numbers: batch normalisation
    in training mode sees micro-batches, as it does under any accumulation.
    """
    if len(batches) == 1:  # nothing to cache
        with around(True):
            value = loss(*encode(batches[0]))
            value.backward()  # type: ignore[no-untyped-call]
        return value.detach()
    with torch.no_grad():
        vectors = [encode(batch) for batch in batches]
    images, texts = (torch.cat(parts).requires_grad_() for parts in zip(*vectors, strict=True))  # (N, E)
    value = loss(images, texts)
    value.backward()  # type: ignore[no-untyped-call]  # reaches scale and bias, and stops at the vectors
    assert images.grad is not None and texts.grad is not None
    sizes = [len(image) for image, _ in vectors]
    gradients = zip(torch.split(images.grad, sizes), torch.split(texts.grad, sizes), strict=True)
    for number, (batch, both) in enumerate(zip(batches, gradients, strict=True), start=1):
        with around(number == len(batches)):
            pairs = zip(encode(batch), both, strict=True)
            learning = [(x, gradient) for x, gradient in pairs if x.requires_grad]  # not a frozen tower's
            torch.autograd.backward([x for x, _ in learning], [gradient for _, gradient in learning])
    return value.detach()


def gathered_loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """This process's share of the loss over all processes' pairs; the mean over processes is the whole loss.

    Averaged over processes, as DDP does, its gradient is that of one process with all N pairs. `images` and `texts`
    (n, E) are unit vectors; n differs where pictures could not be read. InfoNCE, or SigLIP where there is a bias.
    """
    sizes = _sizes(images)
    all_images, all_texts = _gather(images, sizes), _gather(texts, sizes)  # (N, E)
    first = sum(sizes[: dist.get_rank()])
    target = torch.arange(first, first + len(images), device=images.device)
    share = len(sizes) / len(all_images)  # of each row in a mean over processes
    if bias is None:
        of_images = F.cross_entropy(scale * images @ all_texts.T, target, reduction="sum")
        of_texts = F.cross_entropy(scale * texts @ all_images.T, target, reduction="sum")
        return (of_images + of_texts) / 2 * share
    logits = scale * images @ all_texts.T + bias  # (n, N)
    sign = 2 * F.one_hot(target, len(all_texts)).to(logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum() * share


def _sizes(vectors: Tensor) -> list[int]:
    """How many rows each process has."""
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64)  # on the CPU: no GPU waits for it
    counts[dist.get_rank()] = len(vectors)
    dist.all_reduce(counts)
    sizes: list[int] = counts.tolist()
    return sizes


def _gather(vectors: Tensor, sizes: list[int]) -> Tensor:
    gathered: Tensor = _Gather.apply(vectors, sizes)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    """Everybody's rows, (n, E) -> (N, E), by collectives that end before they return.

    PyTorch's own functional gather leaves work to threads that can outlive the process group.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        filled = vectors.new_zeros(max(sizes), *vectors.shape[1:])  # a gathering takes equal parts
        filled[: len(vectors)] = vectors
        parts = [torch.empty_like(filled) for _ in sizes]
        dist.all_gather(parts, filled)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        total = cotangents[0].clone(memory_format=torch.contiguous_format)  # (N, E)
        dist.all_reduce(total)
        return torch.split(total, ctx.sizes)[dist.get_rank()], None
