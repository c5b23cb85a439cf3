"""The distance of features: zero for equal pictures, sees blur, and folded norms change no number."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.evaluation.efficientnet import load_efficientnet
from dalle.training.perceptual import AFTER, FeatureDistance


@pytest.fixture(scope="module")
def distance() -> FeatureDistance:
    return FeatureDistance(torch.device("cpu"))


def stripes(n: int = 2) -> Tensor:
    """Pictures (n, 3, 64, 64) of sharp stripes, each of another period."""
    columns = torch.arange(64)
    one = [((columns // (4 + i)) % 2).float().expand(3, 64, 64) for i in range(n)]
    return torch.stack(one)


def test_equal_pictures_have_no_distance_and_blurred_ones_less_than_others(distance: FeatureDistance) -> None:
    true = stripes()
    blurred = F.avg_pool2d(F.pad(true, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    assert float(distance(true, true)) == 0
    near, far = float(distance(blurred, true)), float(distance(1 - true, true.transpose(2, 3)))
    assert 0 < near < far < 4 * len(AFTER)


def test_folded_norms_change_no_map(distance: FeatureDistance) -> None:
    true = stripes()
    for folded, plain in zip(
        distance.network.maps(true, AFTER), load_efficientnet().maps(true, AFTER), strict=True
    ):
        assert torch.allclose(folded, plain, atol=2e-4)


def test_the_gradient_leads_from_blur_to_the_true_picture(distance: FeatureDistance) -> None:
    true = stripes()
    drawn = F.avg_pool2d(F.pad(true, (1, 1, 1, 1), mode="replicate"), 3, stride=1).requires_grad_()
    before = distance(drawn, true)
    [slope] = torch.autograd.grad(before, drawn)
    with torch.no_grad():
        assert float(distance(drawn - 0.01 * slope / slope.abs().max(), true)) < float(before.detach())
