"""Contrastive gradients in parts equal those of the whole batch: in micro-batches, and across processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist

from dalle.clip import infonce_loss, siglip_loss
from dalle.training.contrastive import cached_backward, gathered_loss


class Towers(nn.Module):
    """Two small towers, a scale and a bias, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
        self.text = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 4)).double()
        self.scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))

    def encode(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, texts = self.image(batch[0]), self.text(batch[1])
        return nn.functional.normalize(images, dim=-1), nn.functional.normalize(texts, dim=-1)

    def loss(self, name: str, images: Tensor, texts: Tensor) -> Tensor:
        if name == "infonce":
            return infonce_loss(images, texts, self.scale.exp())
        return siglip_loss(images, texts, self.scale.exp(), self.bias)

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}


def data(n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return images, torch.randn(n, 3, generator=generator, dtype=torch.float64)


def whole_gradients(name: str) -> tuple[float, dict[str, Tensor]]:
    towers = Towers()
    loss = towers.loss(name, *towers.encode(data()))
    loss.backward()
    return float(loss.detach()), towers.gradients()


@pytest.mark.parametrize("name", ["infonce", "siglip"])
@pytest.mark.parametrize("sizes", [[12], [4, 4, 4], [5, 6, 1]])
def test_micro_batches_give_the_gradient_of_the_whole_batch_scale_and_bias_included(
    name: str, sizes: list[int]
) -> None:
    expected_loss, expected = whole_gradients(name)
    towers = Towers()
    images, texts = data()
    parts = list(zip(images.split(sizes), texts.split(sizes), strict=True))
    loss = cached_backward(towers.encode, parts, lambda *vectors: towers.loss(name, *vectors))
    assert float(loss) == pytest.approx(expected_loss, rel=1e-12)
    found = towers.gradients()
    assert found.keys() == expected.keys() and ("bias" in found) == (name == "siglip")
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-10, atol=1e-12)


def one_process(rank: int, n_processes: int, folder: str, name: str) -> None:
    """The gradient of one process, averaged over all, as DDP does; written to a file of its own."""
    store = dist.FileStore(f"{folder}/store", n_processes)
    dist.init_process_group("gloo", rank=rank, world_size=n_processes, store=store)
    towers = Towers()
    images, texts = (x.chunk(n_processes)[rank] for x in data())
    bias = towers.bias if name == "siglip" else None
    vectors = towers.encode((images, texts))
    gathered_loss(*vectors, towers.scale.exp(), bias).backward()
    gradients: dict[str, Any] = towers.gradients()
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= n_processes
    torch.save(gradients, f"{folder}/{rank}.pt")
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


@pytest.mark.parametrize(("name", "n_processes"), [("infonce", 2), ("infonce", 4), ("siglip", 2)])
def test_processes_together_have_the_gradient_of_one_with_all_pairs(
    name: str, n_processes: int, tmp_path: Path
) -> None:
    multiprocessing.spawn(one_process, (n_processes, str(tmp_path), name), nprocs=n_processes)
    _, expected = whole_gradients(name)
    for rank in range(n_processes):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-10, atol=1e-12)
