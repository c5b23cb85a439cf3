"""AdamW groups, learning-rate and relaxation schedules, and the moving average of the weights (App. A.2, B.2)."""

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dalle.training.adamw16 import AdamW16, local_part
from dalle.training.muon import Muon
from dalle.training.recipe import Optimization

PLATEAU_WINDOW = 2000  # updates averaged before two windows are compared; the paper does not say
PLATEAU_GAIN = 0.002  # a window that improves the training loss by less than this share is a plateau
MAX_HALVINGS = 5  # App. B.2


def half_cosine(step: int, start: float, end: float, steps: int) -> float:
    """Go from `start` to `end` over `steps` updates along half a cosine, then stay (App. A.2; form settled)."""
    progress = min(step / steps, 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate(settings: Optimization, step: int, n_halvings: int = 0) -> float:
    """The learning rate of update `step` (from 0): linear warm-up, then half-cosine or halvings at plateaus."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.decay == "plateau":
        return settings.learning_rate / 2.0**n_halvings
    decay_steps = settings.decay_steps or settings.steps - settings.warmup_steps
    return half_cosine(
        step - settings.warmup_steps, settings.learning_rate, settings.final_learning_rate, decay_steps
    )


class Plateau:
    """Counts halvings: one whenever the mean training loss of a window hardly beats the window before (App. B.2)."""

    def __init__(self) -> None:
        self.n_halvings = 0
        self.total = 0.0
        self.count = 0
        self.previous = math.inf

    def update(self, loss: float) -> None:
        """Take one update's training loss, in nats."""
        self.total += loss
        self.count += 1
        if self.count < PLATEAU_WINDOW:
            return
        mean = self.total / self.count
        if mean > self.previous - PLATEAU_GAIN * abs(self.previous) and self.n_halvings < MAX_HALVINGS:
            self.n_halvings += 1
        self.previous, self.total, self.count = mean, 0.0, 0

    def state(self) -> dict[str, float | int | None]:
        """What a checkpoint needs; infinity is written as null."""
        previous = None if math.isinf(self.previous) else self.previous
        return {"n_halvings": self.n_halvings, "total": self.total, "count": self.count, "previous": previous}

    def restore(self, state: dict[str, float | int | None]) -> None:
        """Go on from a checkpoint's state."""
        self.n_halvings = int(state["n_halvings"] or 0)
        self.total, self.count = float(state["total"] or 0.0), int(state["count"] or 0)
        self.previous = math.inf if state["previous"] is None else float(state["previous"])


def adamw(model: nn.Module, settings: Optimization) -> torch.optim.AdamW:
    """AdamW over the trainable weights; only matrices are decayed (the paper is silent on exclusions)."""
    return torch.optim.AdamW(
        _groups(model, settings),
        lr=settings.learning_rate,
        betas=(0.9, settings.beta2),
        eps=1e-8,
        fused=True,
    )


def adamw16(model: nn.Module, settings: Optimization) -> AdamW16:
    """`adamw` with the paper's variance clip, and the moments of the layers' matrices in 16 bits (App. B.2)."""
    small = _layer_matrices(model)
    groups = []
    for group in _groups(model, settings):
        for is_small in (True, False):
            chosen = [parameter for parameter in group["params"] if (id(parameter) in small) == is_small]
            groups.append({**group, "params": chosen, "is_small": is_small})
    return AdamW16(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(0.9, settings.beta2),
    )


def _groups(model: nn.Module, settings: Optimization) -> list[dict[str, Any]]:
    """The trainable weights: those that are decayed, which are matrices and kernels, and the others."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
            (decayed if is_matrix else plain).append(parameter)
    groups = []
    for parameters, weight_decay in ((decayed, settings.weight_decay), (plain, 0.0)):
        for is_sharded in (
            True,
            False,
        ):  # of a sharded model the scalars are not, and a kernel takes one kind
            chosen = [p for p in parameters if isinstance(p, DTensor) == is_sharded]
            groups.append({"params": chosen, "weight_decay": weight_decay})
    return [group for group in groups if group["params"]]


def _layer_matrices(model: nn.Module) -> set[int]:
    """The ids of the matrices of the model's repeated layers."""
    return {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        for parameter in module.parameters()
        if parameter.ndim == 2
    }


def muon(model: nn.Module, settings: Optimization) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024) over the matrices of the model's repeated layers, AdamW over all else.

    The size of Muon's steps is matched to AdamW's (Liu et al. 2025, arXiv 2502.16982, eq. 4), so that one learning
    rate and one weight decay serve both.
    """
    in_layers = _layer_matrices(model)
    others = adamw(model, settings)
    matrices = []
    for group in others.param_groups:
        matrices += [parameter for parameter in group["params"] if id(parameter) in in_layers]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in in_layers]
    if not matrices:
        raise ValueError("optimizer muon: this model has no repeated layers with matrices: use adamw")
    return Together(Muon(matrices, settings.learning_rate, settings.weight_decay), others)


class Together(torch.optim.Optimizer):
    """Several optimizers of different weights that step as one; groups and state are those of all of them."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        for optimizer in optimizers:
            optimizer.param_groups = [
                group for group in self.param_groups if _same(group["params"], optimizer.param_groups)
            ]
            optimizer.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Let each optimizer step."""
        for optimizer in self.optimizers:
            optimizer.step()


def _same(parameters: list[nn.Parameter], groups: list[dict[str, Any]]) -> bool:
    return any([*map(id, parameters)] == [*map(id, group["params"])] for group in groups)


OPTIMIZERS = {"adamw": adamw, "adamw16": adamw16, "muon": muon}


class MovingAverage:
    """Exponential moving average of a model's floating-point state (A.2: 0.999 an update; B.2: 0.99 every 25).

    With `on_cpu` it is held in main memory: an update only starts a copy, and a thread moves the average while the
    model trains on (B.2). The numbers are the same. Of sharded weights, each process averages what it holds.
    """

    def __init__(self, model: nn.Module, decay: float, on_cpu: bool = False) -> None:
        self.decay, self.on_cpu = decay, on_cpu
        self._tensors = {name: self._held(tensor) for name, tensor in model.state_dict().items()}
        self._staged: dict[str, Tensor] = {}  # the model's state on its way to the average
        self._thread = ThreadPoolExecutor(1, "moving-average") if on_cpu else None
        self._moving: Future[None] | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The averaged state, by its names in the model's, once all updates have reached it."""
        self._finish()
        return self._tensors

    @torch.no_grad()
    def update(self, model: nn.Module, n_updates: int) -> None:
        """Move towards the model; early on the decay is (1 + n)/(10 + n), so that the start is forgotten."""
        decay = min(self.decay, (1 + n_updates) / (10 + n_updates))
        if self._thread is None:
            self._move(model.state_dict(), decay)
            return
        self._finish()
        copied = self._stage(model)
        self._moving = self._thread.submit(self._move, self._staged, decay, copied)

    @torch.no_grad()
    def _move(self, state: dict[str, Tensor], decay: float, copied: torch.cuda.Event | None = None) -> None:
        if copied is not None:
            copied.synchronize()
        for name, tensor in state.items():
            if tensor.is_floating_point():
                self._tensors[name].lerp_(tensor, 1 - decay)
            else:
                self._tensors[name].copy_(tensor)

    def _stage(self, model: nn.Module) -> torch.cuda.Event | None:
        """Start copying the model's state to main memory; gives what tells that the copies have arrived."""
        event = None
        for name, tensor in model.state_dict().items():
            source = local_part(tensor.detach())
            if name not in self._staged:
                pinned = source.device.type == "cuda"
                self._staged[name] = torch.empty(source.shape, dtype=source.dtype, pin_memory=pinned)
            self._staged[name].copy_(source, non_blocking=True)
            if source.device.type == "cuda" and event is None:
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        if event is not None:
            event.record()
        return event

    def _held(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return local_part(tensor).to("cpu", copy=True) if self.on_cpu else tensor.clone()

    def _finish(self) -> None:
        if self._moving is not None:
            self._moving.result()
            self._moving = None

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Let the model hold the averaged weights inside the block, and its own again after it."""
        state = model.state_dict()
        own: dict[str, Tensor] = {name: tensor.detach().clone() for name, tensor in state.items()}
        _fill_(state, self.tensors)
        try:
            yield
        finally:
            _fill_(model.state_dict(), own)


@torch.no_grad()
def _fill_(state: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Give a model's state other values, on whatever device they are."""
    for name, tensor in state.items():
        local_part(tensor).copy_(local_part(values[name]))
