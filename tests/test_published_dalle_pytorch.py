"""DALLE-pytorch's checkpoints, imported, compute what DALLE-pytorch computes, of every kind and every layout of names."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle.importers.conversion import write_converted
from dalle.importers.dalle_pytorch import import_dalle_pytorch, vae_conversion
from dalle.importers.tensor_files import open_tensors
from dalle.manifest import VerifiedFolder
from dalle.published.dalle_pytorch import DallePytorch
from dalle.published.dalle_pytorch_vae import DallePytorchVAE
from tests.published_code import needs_peers, run_published_code
from tests.tiny_published import one_thread  # noqa: F401 - every test here runs under it

MODELS = ("default", "full", "axial_row", "axial_col", "conv_like", "mixed", "reversible", "tied")
N_TEXT, N_TEXT_IDS = 6, 46


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run_published_code("dalle_pytorch_models", tmp_path_factory.mktemp("dalle_pytorch"))
    letters = "abcdefghijklmnopqrstuvwxyz "
    words = ["[PAD]", "[UNK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words[:40]) + "\n")
    return folder


def expected_of(published: Path, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(published / f"{name}_expected.pt", weights_only=True)
    return loaded


def imported(published: Path, name: str, out: Path, **changes: Any) -> DallePytorch:
    import_dalle_pytorch(published / f"{name}.pt", published / "vocab.txt", out, changes=changes)
    VerifiedFolder(out)
    return DallePytorch.from_pretrained(out / "transformer")


@needs_peers
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_loss_are_dalle_pytorchs(name: str, published: Path, tmp_path: Path) -> None:
    model, expected = imported(published, name, tmp_path / "model"), expected_of(published, name)
    with torch.no_grad():
        text_logits, image_logits = model(expected["text"], expected["image"])
        losses = model.loss(expected["text"], expected["image"])
    theirs = expected["logits"]
    torch.testing.assert_close(text_logits, theirs[:, :N_TEXT, :N_TEXT_IDS], atol=1e-4, rtol=0)
    torch.testing.assert_close(image_logits, theirs[:, N_TEXT:, N_TEXT_IDS:], atol=1e-4, rtol=0)
    torch.testing.assert_close(losses.total, expected["loss"], atol=1e-4, rtol=0)
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["components"] == {
        "tokenizer": "CaptionTokenizer",
        "dvae": "DallePytorchVAE",
        "transformer": "DallePytorch",
    }


@needs_peers
@pytest.mark.parametrize("n_blocks", [0, 1])
def test_dvae_computes_what_dalle_pytorchs_does(n_blocks: int, published: Path, tmp_path: Path) -> None:
    with open_tensors(published / f"vae{n_blocks}.pt", "dVAE") as file:
        write_converted(vae_conversion(file, "", file.beside["hparams"]), tmp_path / "dvae")
    model, expected = (
        DallePytorchVAE.from_pretrained(tmp_path / "dvae"),
        expected_of(published, f"vae{n_blocks}"),
    )
    with torch.no_grad():
        torch.testing.assert_close(model.logits(expected["images"]), expected["logits"], atol=1e-4, rtol=0)
        assert torch.equal(model.encode(expected["images"]).flatten(1), expected["encoded"])
        pixels = (expected["decoded"] * 0.5 + 0.5).clamp(0, 1)  # back from normalised space
        torch.testing.assert_close(model.decode(expected["tokens"].view(2, 4, 4)), pixels, atol=1e-4, rtol=0)


def fewer_wrappers(n: int) -> Callable[[str], str]:
    return lambda name: re.sub(r"(\.[01]|\.[fg]\.net)(\.fn)+\.(to_|net)", rf"\1{'.fn' * n}.\3", name)


OLDER = {  # version: what its names are, made from today's
    "1.0": ("default", fewer_wrappers(3), {"version": "1.0.0"}),
    "0.9": ("full", fewer_wrappers(2), {"version": "0.9.0"}),
    "0.2": ("full", fewer_wrappers(1), {}),
    "reversible 1.0": ("reversible", fewer_wrappers(3), {}),
}


@needs_peers
@pytest.mark.parametrize("version", OLDER)
def test_older_layouts_of_names_are_read(version: str, published: Path, tmp_path: Path) -> None:
    name, rename, _ = OLDER[version]
    checkpoint = torch.load(published / f"{name}.pt", weights_only=True)
    checkpoint["weights"] = {rename(key): value for key, value in checkpoint["weights"].items()}
    if version == "0.2":  # no scale of layers, and a mask among the weights
        scales = [key for key in checkpoint["weights"] if key.endswith(".scale")]
        for key in scales:
            del checkpoint["weights"][key]
        checkpoint["weights"]["logits_mask"] = torch.ones(1, 22, 70, dtype=torch.bool)
    torch.save(checkpoint, tmp_path / f"{name}.pt")
    (tmp_path / "vocab.txt").write_bytes((published / "vocab.txt").read_bytes())
    old, today = imported(tmp_path, name, tmp_path / "old"), imported(published, name, tmp_path / "today")
    for (key, ours), theirs in zip(old.state_dict().items(), today.state_dict().values(), strict=True):
        is_new = version == "0.2" and key.endswith(".scale")
        assert torch.equal(ours, torch.ones_like(ours) if is_new else theirs), key


@needs_peers
def test_what_no_tensor_tells_is_asked_for(published: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(published / "full.pt", weights_only=True)
    del checkpoint["hparams"]["shift_tokens"]
    torch.save(checkpoint, tmp_path / "full.pt")
    (tmp_path / "vocab.txt").write_bytes((published / "vocab.txt").read_bytes())
    with pytest.raises(ValueError, match="does not say whether it shifts tokens: pass --set shifts_tokens"):
        imported(tmp_path, "full", tmp_path / "model")
    assert not imported(tmp_path, "full", tmp_path / "model", shifts_tokens=False).config.shifts_tokens


@needs_peers
def test_deepspeed_gets_a_clear_answer(published: Path, tmp_path: Path) -> None:
    (tmp_path / "dalle-ds-cp").mkdir()
    with pytest.raises(ValueError, match=r"is a folder of DeepSpeed: .*zero_to_fp32\.py"):
        import_dalle_pytorch(tmp_path / "dalle-ds-cp", published / "vocab.txt", tmp_path / "model")
    torch.save({"hparams": {}, "weights": "see dalle-ds-cp"}, tmp_path / "auxiliary.pt")
    with pytest.raises(ValueError, match="DeepSpeed's auxiliary file"):
        import_dalle_pytorch(tmp_path / "auxiliary.pt", published / "vocab.txt", tmp_path / "model")
    checkpoint = torch.load(published / "full.pt", weights_only=True)
    checkpoint["hparams"]["attn_types"] = ("full", "sparse")
    torch.save(checkpoint, tmp_path / "sparse.pt")
    with pytest.raises(ValueError, match="block-sparse kernels"):
        import_dalle_pytorch(tmp_path / "sparse.pt", published / "vocab.txt", tmp_path / "model")
    assert not (tmp_path / "model").exists() and not (tmp_path / "model.partial").exists()
