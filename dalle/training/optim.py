"""AdamW groups, learning-rate and relaxation schedules, and the moving average of the weights (App. A.2, B.2)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
    """AdamW over the trainable weights; only matrices of layers are decayed (the paper is silent on exclusions)."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
            (decayed if is_matrix else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(0.9, settings.beta2),
        eps=1e-8,
        fused=True,
    )


def muon(model: nn.Module, settings: Optimization) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024) over the matrices of the model's repeated layers, AdamW over all else.

    The size of Muon's steps is matched to AdamW's (Liu et al. 2025, arXiv 2502.16982, eq. 4), so that one learning
    rate and one weight decay serve both.
    """
    in_layers = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        for parameter in module.parameters()
        if parameter.ndim == 2
    }
    others = adamw(model, settings)
    matrices = []
    for group in others.param_groups:
        matrices += [parameter for parameter in group["params"] if id(parameter) in in_layers]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in in_layers]
    if not matrices:
        raise ValueError("optimizer muon: this model has no repeated layers with matrices: use adamw")
    return Together(
        torch.optim.Muon(
            matrices,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        ),
        others,
    )


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


OPTIMIZERS = {"adamw": adamw, "muon": muon}


class MovingAverage:
    """Exponential moving average of a model's floating-point state (A.2: 0.999 an update; B.2: 0.99 every 25)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, n_updates: int) -> None:
        """Move towards the model; early on the decay is (1 + n)/(10 + n), so that the start is forgotten."""
        decay = min(self.decay, (1 + n_updates) / (10 + n_updates))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                self.tensors[name].lerp_(tensor, 1 - decay)
            else:
                self.tensors[name].copy_(tensor)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Let the model hold the averaged weights inside the block, and its own again after it."""
        own: dict[str, Tensor] = {
            name: tensor.detach().clone() for name, tensor in model.state_dict().items()
        }
        model.load_state_dict(self.tensors)
        try:
            yield
        finally:
            model.load_state_dict(own)
