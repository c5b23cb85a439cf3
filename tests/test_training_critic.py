"""The critic: patches tell true from drawn, and each side's gradient stays its own."""

import pytest
import torch
from torch import Tensor

from dalle.training.critic import Critic, balanced


def made() -> tuple[Critic, Tensor, Tensor]:
    torch.manual_seed(0)
    return Critic(8), torch.rand(2, 3, 32, 32, requires_grad=True), torch.rand(2, 3, 32, 32)


def test_each_patch_has_a_score_and_training_tells_true_from_drawn() -> None:
    critic, drawn, true = made()
    assert critic(true).shape == (2, 1, 4, 4)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = critic.loss(drawn, true * 0.5)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        assert float(critic(true * 0.5).mean()) > float(critic(drawn).mean())


def test_the_critics_loss_moves_no_picture_and_its_doubt_moves_no_critic() -> None:
    critic, drawn, true = made()
    critic.loss(drawn, true).backward()  # type: ignore[no-untyped-call]
    assert drawn.grad is None and all(parameter.grad is not None for parameter in critic.parameters())
    critic.zero_grad(set_to_none=True)
    critic.doubt(drawn).backward()  # type: ignore[no-untyped-call]
    assert drawn.grad is not None and all(parameter.grad is None for parameter in critic.parameters())


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_doubt_has_its_share_of_the_gradient_and_the_value_is_the_losss(share: float) -> None:
    critic, source, true = made()
    pictures = source * 2  # any graph behind the pictures
    loss = (pictures - true).square().mean()
    total, weight = balanced(pictures, loss, critic.doubt(pictures), share)
    [found] = torch.autograd.grad(total, source)
    again = source * 2
    [of_loss] = torch.autograd.grad((again - true).square().mean(), source)
    again = source * 2
    [of_doubt] = torch.autograd.grad(critic.doubt(again), source)
    assert float(total.detach()) == pytest.approx(float(loss.detach()))
    assert torch.allclose(found, of_loss + weight * of_doubt, atol=1e-7)
    assert float((weight * of_doubt).norm() / of_loss.norm()) == pytest.approx(share, rel=1e-4)
