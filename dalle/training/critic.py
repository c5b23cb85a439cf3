"""A small network that tells patches of true pictures from drawn ones: the adversarial part of the decoder's loss.

Source: Isola et al. 2017 (patches); Esser et al. 2021 ("Taming Transformers", VQGAN), §3.1: the hinge loss, and a weight
that adapts to the size of the other losses' gradient.
Shapes: B batch, S picture side in pixels.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

N_NORM_GROUPS = 8
MAX_WEIGHT = 1e4  # of the adaptive weight, as in VQGAN


class Critic(nn.Module):
    """Pictures (B, 3, S, S) in [0, 1] -> a score for each patch of 46 px, (B, 1, S / 8, S / 8); high: true."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),
            nn.GroupNorm(N_NORM_GROUPS, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1, bias=False),
            nn.GroupNorm(N_NORM_GROUPS, 4 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 3, padding=1),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        scores: Tensor = self.layers(2 * pictures - 1)
        return scores

    def loss(self, drawn: Tensor, true: Tensor) -> Tensor:
        """Hinge loss of the critic itself; no gradient reaches `drawn`."""
        of_true, of_drawn = self(true).float(), self(drawn.detach()).float()
        return (F.relu(1 - of_true).mean() + F.relu(1 + of_drawn).mean()) / 2

    def doubt(self, drawn: Tensor) -> Tensor:
        """What the decoder lowers: minus the mean score of `drawn`; no gradient reaches the critic."""
        frozen = {name: parameter.detach() for name, parameter in self.named_parameters()}
        scores: Tensor = functional_call(self, frozen, (drawn,))
        return -scores.float().mean()


def balanced(pictures: Tensor, loss: Tensor, doubt: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The two losses as one, the critic's weighted so that its gradient is `share` times the other's; and that weight.

    differs: VQGAN compares the gradients at the decoder's last layer, which takes the backward pass through the losses
    three times; at the pixels, where both begin, it takes once. The value of the sum is that of `loss` alone.
    """
    [of_loss] = torch.autograd.grad(loss, pictures, retain_graph=False)
    [of_doubt] = torch.autograd.grad(doubt, pictures, retain_graph=False)
    weight = (share * of_loss.norm() / (of_doubt.norm() + 1e-12)).clamp(max=MAX_WEIGHT)
    surrogate = (pictures * (of_loss + weight * of_doubt)).sum()
    return loss.detach() + surrogate - surrogate.detach(), weight
