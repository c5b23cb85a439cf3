"""Muon beside `torch.optim.Muon`, its slow twin: equal to the bit in bfloat16, and in float32 where a CPU lacks it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dalle.generation.precision import has_native_bfloat16
from dalle.training.muon import MOMENTUM, Muon, orthogonalized
from dalle.training.optim import OPTIMIZERS
from dalle.training.processes import World
from tests.spawned import spawn
from tests.test_training_optim import optimization
from tests.tiny import tiny_transformer

SHAPES = ((48, 16), (16, 48), (16, 16), (1, 7))
RATES = (0.02, 0.01)
needs_bfloat16 = pytest.mark.skipif(not has_native_bfloat16("cpu"), reason="no native bfloat16 here")


@pytest.fixture
def avx2_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})


@pytest.fixture
def dtypes_multiplied(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[torch.dtype]]:
    """The dtypes of all products with `addmm`."""
    seen = set[torch.dtype]()
    product: Callable[..., Tensor] = torch.addmm

    def noted(*given: Tensor, **options: float) -> Tensor:
        seen.update(tensor.dtype for tensor in given)
        return product(*given, **options)

    monkeypatch.setattr(torch, "addmm", noted)
    return seen


def updates(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> list[list[Tensor]]:
    """Random matrices and momentum after each of two updates, the last matrix without a gradient in the second."""
    generator = torch.Generator().manual_seed(0)
    matrices = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer, found = make(matrices), []
    for number, rate in enumerate(RATES):
        optimizer.param_groups[0]["lr"] = rate
        for matrix in matrices[: len(SHAPES) - number]:
            matrix.grad = torch.randn(matrix.shape, generator=generator) * 10.0**-number
        for matrix in matrices[len(SHAPES) - number :]:
            matrix.grad = None
        optimizer.step()
        state = [optimizer.state[matrix]["momentum_buffer"].clone() for matrix in matrices]
        found.append([*(matrix.detach().clone() for matrix in matrices), *state])
    return found


def ours(matrices: list[nn.Parameter]) -> torch.optim.Optimizer:
    return Muon(matrices, lr=1.0, weight_decay=0.1)


def theirs(matrices: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Muon(
        matrices, lr=1.0, weight_decay=0.1, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
    )


@needs_bfloat16
def test_steps_equal_those_of_torch_to_the_bit_where_bfloat16_is_native() -> None:
    for mine, reference in zip(updates(ours), updates(theirs), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, reference, strict=True))


def test_without_native_bfloat16_steps_are_float32_and_near_those_of_torch(
    avx2_only: None, dtypes_multiplied: set[torch.dtype]
) -> None:
    steps = updates(ours)
    assert dtypes_multiplied == {torch.float32}
    for mine, reference in zip(steps, updates(theirs), strict=True):
        for index, (a, b) in enumerate(zip(mine, reference, strict=True)):
            if index < len(SHAPES):  # bfloat16 keeps 8 bits, and five iterations enlarge what it loses
                torch.testing.assert_close(a, b, atol=0.02 * RATES[0] * max(a.shape) ** 0.5, rtol=0)
            else:
                assert torch.equal(a, b), "momentum is float32 in both"


def test_the_laptops_optimizer_multiplies_no_16_bit_numbers_without_native_bfloat16(
    avx2_only: None, dtypes_multiplied: set[torch.dtype]
) -> None:
    model = tiny_transformer(280)
    optimizer = OPTIMIZERS["muon"](model, optimization())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    dtypes_multiplied.clear()
    optimizer.step()
    assert dtypes_multiplied == {torch.float32}


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (6, 6)])
def test_a_direction_has_the_singular_vectors_of_its_matrix_and_values_near_one(
    shape: tuple[int, int],
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = matrix.clone()
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = u.T @ orthogonalized(matrix, torch.float32).double() @ v.T
    assert torch.equal(matrix, before)
    diagonal = values.diagonal()
    assert 0.5 < float(diagonal.min()) and float(diagonal.max()) < 1.3
    torch.testing.assert_close(values, torch.diag(diagonal), atol=1e-4, rtol=0)


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert not orthogonalized(torch.zeros(3, 4), torch.float32).any()


def dtype_beside_an_old_processor(world: World) -> torch.dtype:
    capabilities = {"avx512_bf16": world.rank != 1}
    torch.cpu.get_capabilities = lambda: capabilities  # in a process of its own
    return Muon([nn.Parameter(torch.zeros(2, 2))], lr=1.0, weight_decay=0.0).dtype


def test_one_processor_without_native_bfloat16_makes_all_processes_step_in_float32(tmp_path: Path) -> None:
    assert spawn(2, dtype_beside_an_old_processor, tmp_path) == [torch.float32, torch.float32]
