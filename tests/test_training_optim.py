"""Schedules, AdamW's groups and the moving average, against the paper's numbers and hand computations."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dalle.config import load_preset, validate
from dalle.training import checkpoint
from dalle.training.optim import (
    MAX_HALVINGS,
    PLATEAU_WINDOW,
    MovingAverage,
    Plateau,
    adamw,
    half_cosine,
    learning_rate,
    muon,
)
from dalle.training.recipe import Optimization, Recipe

PAPER = validate(Recipe, load_preset("paper"), "paper")


def optimization(**changes: object) -> Optimization:
    settings: dict[str, object] = {
        "steps": 100,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-4,
        "weight_decay": 0.1,
        "average_decay": 0.9,
        "validate_every": 10,
        "checkpoint_every": 10,
        "sheet_every": 10,
    }
    return validate(Optimization, settings | changes, "test")


@pytest.mark.parametrize(
    ("step", "start", "end", "steps", "expected"),
    [
        (0, 1.0, 1 / 16, 150_000, 1.0),  # tau
        (75_000, 1.0, 1 / 16, 150_000, 0.53125),
        (150_000, 1.0, 1 / 16, 150_000, 1 / 16),
        (2_999_999, 1.0, 1 / 16, 150_000, 1 / 16),
        (2_500, 0.0, 6.6, 5_000, 3.3),  # beta
        (5_001, 0.0, 6.6, 5_000, 6.6),
        (600_000, 1e-4, 1.25e-6, 1_200_000, 5.0625e-5),  # learning rate
    ],
)
def test_half_cosine_takes_the_papers_values(
    step: int, start: float, end: float, steps: int, expected: float
) -> None:
    assert half_cosine(step, start, end, steps) == pytest.approx(expected, rel=1e-12)


def test_half_cosine_is_a_cosine_and_no_line() -> None:
    assert half_cosine(25, 0.0, 1.0, 100) == pytest.approx(0.146447, abs=1e-6)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 1e-4), (600_000, 5.0625e-5), (1_200_000, 1.25e-6), (2_999_999, 1.25e-6)]
)
def test_the_dvaes_learning_rate_is_the_papers(step: int, expected: float) -> None:
    assert learning_rate(PAPER.dvae_training, step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 9e-8), (2_499, 2.25e-4), (4_999, 4.5e-4), (5_000, 4.5e-4)]
)
def test_the_transformers_learning_rate_warms_up_linearly_over_5000_updates(
    step: int, expected: float
) -> None:
    assert learning_rate(PAPER.transformer_training, step) == pytest.approx(expected, rel=1e-12)


def test_the_transformers_learning_rate_is_halved_and_five_times_reach_the_final_one() -> None:
    rates = [learning_rate(PAPER.transformer_training, 100_000, n) for n in range(MAX_HALVINGS + 1)]
    assert rates == pytest.approx([4.5e-4 / 2**n for n in range(6)])
    assert rates[-1] == pytest.approx(PAPER.transformer_training.final_learning_rate)


def test_without_decay_steps_the_cosine_ends_with_the_run() -> None:
    settings = optimization(steps=110, warmup_steps=10)
    assert learning_rate(settings, 9) == learning_rate(settings, 10) == 1e-3
    assert learning_rate(settings, 60) == pytest.approx(5.5e-4)
    assert learning_rate(settings, 110) == pytest.approx(1e-4)


def feed(plateau: Plateau, loss: float, n_windows: int = 1) -> None:
    for _ in range(n_windows * PLATEAU_WINDOW):
        plateau.update(loss)


def test_a_plateau_halves_once_a_window_and_five_times_at_most() -> None:
    plateau = Plateau()
    feed(plateau, 5.0)
    assert plateau.n_halvings == 0, "a first window has nothing to be compared with"
    feed(plateau, 4.0)
    assert plateau.n_halvings == 0, "it fell by a fifth"
    feed(plateau, 4.0 * 0.999)
    assert plateau.n_halvings == 1, "a thousandth is less than PLATEAU_GAIN"
    feed(plateau, 3.0)
    assert plateau.n_halvings == 1
    feed(plateau, 3.0, 9)
    assert plateau.n_halvings == MAX_HALVINGS == 5


def test_plateau_state_survives_json_in_the_middle_of_a_window() -> None:
    for n_before in (0, PLATEAU_WINDOW // 2, PLATEAU_WINDOW + 7):
        whole, cut = Plateau(), Plateau()
        losses = [4.0 + (step % 7) / 10 for step in range(3 * PLATEAU_WINDOW)]
        for loss in losses[:n_before]:
            whole.update(loss)
            cut.update(loss)
        resumed = Plateau()
        resumed.restore(json.loads(json.dumps(cut.state(), allow_nan=False)))
        for loss in losses[n_before:]:
            whole.update(loss)
            resumed.update(loss)
        assert whole.n_halvings > 0
        assert resumed.state() == whole.state()


class Parts(nn.Module):
    """One of each kind of weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 3)
        self.convolution = nn.Conv2d(3, 2, 3)
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.count: Tensor


def test_embeddings_gains_and_biases_are_not_decayed_and_frozen_weights_are_left_out() -> None:
    model = Parts()
    optimizer = adamw(model, optimization(weight_decay=0.1, beta2=0.96))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        group["weight_decay"]: {names[id(parameter)] for parameter in group["params"]}
        for group in optimizer.param_groups
    }
    assert groups == {
        0.1: {"linear.weight", "convolution.weight"},
        0.0: {"embedding.weight", "norm.weight", "norm.bias", "linear.bias", "convolution.bias"},
    }
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.9, 0.96), 1e-8)}


class Layered(nn.Module):
    """Repeated layers between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        out: Tensor = self.head(x)
        return out


def test_muon_moves_the_matrices_of_layers_by_orthogonal_steps_and_all_else_by_adamw() -> None:
    steps = {}
    for make in (muon, adamw):
        torch.manual_seed(0)
        model = Layered()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = make(model, optimization(weight_decay=0.0, learning_rate=0.1, beta2=0.96))
        for group in optimizer.param_groups:
            group["lr"] = 0.01  # as the loop does: it must reach both
        model(torch.arange(5)).square().sum().backward()
        optimizer.step()
        steps[make] = {
            name: parameter.detach() - before[name] for name, parameter in model.named_parameters()
        }
    for name in steps[muon]:
        if name in ("layers.0.weight", "layers.1.weight"):
            # match_rms_adamw: 0.2 * sqrt(4) * an approximately orthogonal matrix (Liu et al. 2025, eq. 4)
            singular = torch.linalg.svdvals(steps[muon][name] / (0.01 * 0.2 * 2))
            assert 0.6 < float(singular.min()) and float(singular.max()) < 1.3
        else:
            assert torch.equal(steps[muon][name], steps[adamw][name]), name


def test_muon_is_refused_for_a_model_without_repeated_layers() -> None:
    with pytest.raises(ValueError, match="no repeated layers"):
        muon(Parts(), optimization())


def test_muon_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def made() -> tuple[Layered, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = Layered()
        return model, muon(model, optimization(beta2=0.96))

    def updates(model: Layered, optimizer: torch.optim.Optimizer, n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            model(torch.arange(5)).square().sum().backward()
            optimizer.step()

    whole, begun, resumed = made(), made(), made()
    updates(*whole, 5)
    updates(*begun, 3)
    checkpoint.save(tmp_path, 3, begun[0], MovingAverage(begun[0], 0.9), begun[1], {})
    found = checkpoint.newest(tmp_path)
    assert found is not None
    checkpoint.restore(found, resumed[0], MovingAverage(resumed[0], 0.9), resumed[1])
    updates(*resumed, 2)
    for name, tensor in whole[0].state_dict().items():
        assert torch.equal(tensor, resumed[0].state_dict()[name]), name


def test_moving_average_equals_a_hand_computation() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    average = MovingAverage(model, decay=0.24)
    by_hand = 0.0
    # decay (1 + n) / (10 + n), at most 0.24: 2/11, then 3/12 is above it
    for n_updates, value, decay in [(1, 1.0, 2 / 11), (2, 3.0, 0.24), (3, -2.0, 0.24)]:
        model.weight.data.fill_(value)
        average.update(model, n_updates)
        by_hand = decay * by_hand + (1 - decay) * value
        assert float(average.tensors["weight"]) == pytest.approx(by_hand, rel=1e-6)


def test_moving_average_copies_whole_numbers() -> None:
    model = Parts()
    average = MovingAverage(model, decay=0.9)
    model.count.fill_(7)
    average.update(model, 100)
    assert int(average.tensors["count"]) == 7


def test_applied_holds_the_average_and_restores_the_own_weights_after_an_error_too() -> None:
    torch.manual_seed(0)
    model = Parts()
    average = MovingAverage(model, decay=0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averaged = {name: tensor.clone() for name, tensor in average.tensors.items()}
    with pytest.raises(KeyError, match="in validation"), average.applied(model):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, averaged[name]), name
        raise KeyError("in validation")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, own[name]), name
        assert torch.equal(average.tensors[name], averaged[name]), name
