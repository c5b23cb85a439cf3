"""Distances between sets: closed forms, scipy's own roots, torchmetrics on the same features, refusals."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor

from dalle.evaluation.distances import (
    frechet,
    frechet_estimate,
    inception_score,
    kernel,
    kernel_estimate,
    precision_and_recall,
)
from dalle.evaluation.features import EfficientNetFeatures, ScriptedFeatures, extract


def normal(n: int, d: int, seed: int, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + deviation * torch.randn(n, d, generator=generator, dtype=torch.float64)


def whitened(n: int, d: int, seed: int) -> Tensor:
    """Features whose sample mean is exactly 0 and whose covariance is exactly the identity."""
    x = normal(n, d, seed)
    x = x - x.mean(dim=0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov()).T)


def test_frechet_of_two_gaussians_is_the_closed_form() -> None:
    x, shift = whitened(500, 4, 0), torch.tensor([1.0, 2.0, 0.0, -1.0], dtype=torch.float64)
    scale = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)
    y = whitened(700, 4, 1) * scale + shift
    expected = float(shift.square().sum() + (1 - scale).square().sum())
    assert frechet(x, y) == pytest.approx(expected, abs=1e-6)
    assert frechet(x, x) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("n", [30, 400])  # a singular and a regular covariance of 40 features
def test_frechet_agrees_with_the_matrix_root_of_scipy(n: int) -> None:
    x, y = normal(n, 40, 0).numpy(), (normal(n, 40, 1, 0.3) @ normal(40, 40, 2)).numpy()
    c, e = np.cov(x.T), np.cov(y.T)
    # the root of a singular product is scipy's worst case: a little of the identity makes it regular
    root = linalg.sqrtm((c + 1e-9 * np.eye(40)) @ (e + 1e-9 * np.eye(40)))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c + e - 2 * root.real)
    assert frechet(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-3)


def test_frechet_agrees_with_torchmetrics_on_random_features() -> None:
    from torchmetrics.image.fid import _compute_fid

    x, y = normal(300, 16, 3), normal(300, 16, 4, 0.5, 2.0)
    theirs = _compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert frechet(x, y) == pytest.approx(float(theirs), rel=1e-5)


def test_kernel_distance_agrees_with_torchmetrics_and_is_unbiased() -> None:
    from torchmetrics.image.kid import poly_mmd

    x, y = normal(120, 16, 5), normal(120, 16, 6, 0.4)
    assert kernel(x, y) == pytest.approx(float(poly_mmd(x, y)), rel=1e-6)
    same = [kernel(normal(60, 8, seed), normal(60, 8, seed + 1000)) for seed in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / math.sqrt(200)


def test_kernel_estimate_covers_nothing_between_equals_and_something_between_others() -> None:
    same, other = (kernel_estimate(normal(400, 8, 1), normal(400, 8, 2, mean)) for mean in (0.0, 1.0))
    assert same["low"] < 0 < same["high"]
    assert other["low"] > 0


@pytest.mark.parametrize(
    "n", [50, 64, 71]
)  # chunks of 7 would leave one of a single picture, which has no distance
def test_kernel_estimate_cuts_any_number_into_ten_blocks(n: int) -> None:
    found = kernel_estimate(normal(n, 8, 1), normal(70, 8, 2))
    assert found["low"] < found["value"] < found["high"]


def test_inception_score_is_one_for_equal_pictures_and_the_number_of_classes_for_even_ones() -> None:
    certain = torch.eye(10).repeat(100, 1)
    assert inception_score(torch.full((400, 10), 0.1))["value"] == pytest.approx(1)
    # each of ten splits of 100 has nearly ten of each class
    assert 9 < inception_score(certain)["value"] <= 10


def test_precision_falls_with_strange_pictures_and_recall_with_missing_ones() -> None:
    reference = torch.cat([normal(200, 4, 1), normal(200, 4, 2, 50.0)])
    strange = torch.cat([normal(200, 4, 3), normal(200, 4, 4, -50.0)])
    one = normal(200, 4, 5)
    both = precision_and_recall(strange, reference)
    assert both["precision"]["value"] == pytest.approx(0.5, abs=0.05)
    assert both["recall"]["value"] == pytest.approx(0.5, abs=0.05)
    half = precision_and_recall(one, reference)
    assert half["precision"]["value"] > 0.9 and half["recall"]["value"] == pytest.approx(0.5, abs=0.05)


def test_small_sets_are_refused() -> None:
    few = normal(30, 4, 0)
    assert frechet_estimate(few, few)["refused"] == "30 pictures: at least 200 are needed for a figure"
    assert kernel_estimate(few, few)["value"] is None
    assert precision_and_recall(few, few)["recall"]["value"] is None
    assert inception_score(torch.ones(30, 2) / 2)["value"] is None


def test_every_extractor_names_itself_and_its_weights() -> None:
    pictures = torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    extractor = EfficientNetFeatures("lite0", 64)
    features, classes = extract(extractor, [pictures, pictures[:1]])
    assert features.shape == (4, 1280) and classes is not None and classes.shape == (4, 1000)
    torch.testing.assert_close(features[0], features[3])
    assert extractor.name == "efficientnet-lite0@64" and extractor.sha256.startswith("57934424")


class Scripted(torch.nn.Module):
    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        means = x.float().mean(dim=(2, 3))
        return means if return_features else means.softmax(dim=1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_file_is_an_extractor_and_another_file_is_refused(tmp_path: Path) -> None:
    torch.jit.script(Scripted()).save(str(tmp_path / "inception.pt"))
    extractor = ScriptedFeatures(tmp_path / "inception.pt")
    features, classes = extractor(torch.full((2, 3, 8, 8), 0.5))
    assert features.tolist() == [[128.0] * 3] * 2
    assert classes is not None and classes.sum(dim=1).tolist() == pytest.approx([1, 1])
    assert extractor.name == "inception.pt" and len(extractor.sha256) == 64
    (tmp_path / "text.pt").write_text("no module")
    with pytest.raises(ValueError, match=r"text\.pt is no TorchScript module"):
        ScriptedFeatures(tmp_path / "text.pt")
