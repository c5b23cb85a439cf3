"""VQGANs imported from taming's checkpoints compute what taming's code computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle.importers.vqgan import import_vqgan
from dalle.manifest import VerifiedFolder
from dalle.published.vqgan import VQGAN, VQGANConfig
from tests.published_code import needs_peers, run_published_code
from tests.tiny_published import one_thread  # noqa: F401 - every test here runs under it

TINY = VQGANConfig(
    image_size=16,
    n_codes=24,
    d_code=8,
    d_latent=32,
    d_hidden=32,
    multipliers=(1, 2),
    n_blocks=1,
    attention_sizes=(8,),
    quantizer="nearest",
)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_published_code("taming_vqgan", tmp_path_factory.mktemp("taming"))


@needs_peers
@pytest.mark.parametrize("name", ["nearest", "gumbel"])
def test_imported_vqgan_computes_what_tamings_code_computes(
    name: str, published: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"names .*VQ: it holds more than tensors\. Pass --allow-pickle"):
        import_vqgan(published / f"{name}.ckpt", None, tmp_path / "refused")
    import_vqgan(published / f"{name}.ckpt", published / "config.yaml", tmp_path / "model", allow_pickle=True)
    VerifiedFolder(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["components"] == {"dvae": "VQGAN"}
    assert [source["file"] for source in index["imported_from"]] == [f"{name}.ckpt", "config.yaml"]
    model = VQGAN.from_pretrained(tmp_path / "model" / "dvae")
    assert (model.image_size, model.grid_size, model.n_codes) == (32, 8, 48)
    assert model.config.quantizer == name
    expected = torch.load(published / f"{name}_expected.pt", weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(model.latents(expected["images"]), expected["latents"], atol=1e-4, rtol=0)
        assert torch.equal(model.encode(expected["images"]), expected["encoded"])
        pixels = ((expected["pixels"] + 1) / 2).clamp(0, 1)
        torch.testing.assert_close(model.decode(expected["tokens"]), pixels, atol=1e-4, rtol=0)


def test_saved_vqgan_loads_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VQGAN(TINY).eval()
    model.save_pretrained(tmp_path / "dvae")
    again = VQGAN.from_pretrained(tmp_path / "dvae")
    tokens = torch.randint(24, (1, 8, 8))
    assert torch.equal(model.decode(tokens), again.decode(tokens))
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(model.encode(images), again.encode(images))


def test_codes_of_images_are_the_nearest_ones() -> None:
    torch.manual_seed(0)
    model = VQGAN(TINY).eval()
    with torch.no_grad():
        model.codebook.weight.normal_()
        images = torch.rand(2, 3, 16, 16)
        latents = model.latents(images).permute(0, 2, 3, 1)  # (B, G, G, D)
        slow = torch.cdist(latents.reshape(-1, 8), model.codebook.weight).argmin(dim=1).view(2, 8, 8)
        assert torch.equal(model.encode(images), slow)


def test_a_vqgan_without_encoder_says_so() -> None:
    model = VQGAN(TINY.model_copy(update={"has_encoder": False}))
    with pytest.raises(ValueError, match="published without its encoder"):
        model.encode(torch.rand(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": torch.zeros(3)}, "holds no VQGAN: .*quantize.embedding.weight.* is missing"),
        ({"quantize.embedding.weight": torch.zeros(4, 8)}, "holds no VQGAN"),
        ({}, "holds no tensors"),
        ([1, 2], "holds a list"),
    ],
)
def test_other_files_are_refused_in_one_line(tensors: Any, message: str, tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=message) as caught:
        import_vqgan(tmp_path / "other.ckpt", None, tmp_path / "model")
    assert "other.ckpt" in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["other.ckpt"]
