"""A published image tokenizer is the first stage of a new model: its tokens, its grid, its codes."""

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.config import load_preset, override, validate
from dalle.data.pairs import read_pairs
from dalle.data.shapes import write_shapes
from dalle.files import file_sha256
from dalle.images import center_crop, to_tensor
from dalle.importers.vqgan import import_vqgan
from dalle.pipeline import DallePipeline
from dalle.published.vqgan import VQGAN, nearest_codes
from dalle.training.recipe import Recipe
from dalle.training.train import train
from tests.test_end_to_end import n_right_colours
from tests.tiny_published import (
    one_thread,  # noqa: F401 - every test here runs under it
    published_pipe,
    taming_state,
    tiny_vqgan,
)

MICRO = (
    "transformer_training.steps=6",
    "transformer_training.warmup_steps=1",
    "transformer_training.validate_every=3",
)
MICRO += ("transformer_training.checkpoint_every=3", "transformer_training.sheet_every=3")


def write_taming(model: VQGAN, folder: Path) -> Path:
    """The model folder that `dalle import vqgan` makes of a checkpoint with these weights."""
    folder.mkdir(exist_ok=True)
    torch.save({"state_dict": taming_state(model)}, folder / "last.ckpt")
    size = model.config.image_size
    (folder / "config.yaml").write_text(f"model:\n  params:\n    ddconfig:\n      resolution: {size}\n")
    import_vqgan(folder / "last.ckpt", folder / "config.yaml", folder / "vqgan")
    return folder / "vqgan"


def run(data: Path, out: Path, given: Path, *settings: str) -> Path:
    recipe = validate(Recipe, override(load_preset("tiny"), settings), "tiny")
    return train(
        str(data), out, recipe, init_from=given, device=torch.device("cpu"), dtype=torch.float32, quiet=True
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(folder, 16, seed=0)
    return folder


def test_sizes_follow_from_the_given_vqgan_and_are_said(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vqgan = tiny_vqgan(n_codes=48, multipliers=(1, 1, 1), attention_sizes=(8,))
    given = write_taming(vqgan, tmp_path / "taming")
    with caplog.at_level(logging.WARNING):
        out = run(data, tmp_path / "out", given, *MICRO)
    assert (
        "dvae: the given VQGAN has image_size 32, grid_size 8 (preset: 4), n_codes 48 (preset: 64)"
        in caplog.text
    )
    pipe = DallePipeline.from_pretrained(out)
    assert isinstance(pipe.dvae, VQGAN) and pipe.transformer.config.grid_size == 8
    assert pipe.transformer.config.n_image_vocab == 48
    assert pipe("a red circle").images[0].size == (32, 32)
    index = json.loads((out / "model_index.json").read_text())
    assert index["components"]["dvae"] == "VQGAN"
    assert file_sha256(out / "dvae" / "model.safetensors") == file_sha256(
        given / "dvae" / "model.safetensors"
    )
    assert "8x8 tokens of 48 (nearest)" in (out / "README.md").read_text()
    # Finished stages are not made again, nor under another tokenizer.
    assert run(data, out, given, *MICRO) == out


def test_what_cannot_be_a_first_stage_is_refused_before_anything_runs(data: Path, tmp_path: Path) -> None:
    blind = tiny_vqgan(has_encoder=False)
    (tmp_path / "blind").mkdir()
    blind.save_pretrained(tmp_path / "blind" / "dvae")
    (tmp_path / "blind" / "model_index.json").write_text(json.dumps({"components": {"dvae": "VQGAN"}}))
    with pytest.raises(ValueError, match="published without its encoder: it cannot be a first stage"):
        run(data, tmp_path / "out", tmp_path / "blind")
    published_pipe("min-dalle").save_pretrained(tmp_path / "mega")
    with pytest.raises(
        ValueError, match="CaptionTokenizer, which train does not go on from: use dalle finetune"
    ):
        run(data, tmp_path / "out", tmp_path / "mega")
    assert not (tmp_path / "out").exists()


def learn_autoencoder(model: VQGAN, pictures: Tensor) -> None:
    """Teach a VQGAN pictures (M, 3, H, W) by squared error: without codes first, then with the codes of some cells."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)

    def fit(steps: int, has_codes: bool) -> None:
        for _ in range(steps):
            images = pictures[torch.randint(len(pictures), (16,), generator=generator)]
            latents, distance = model.latents(images), torch.zeros(())
            if has_codes:  # straight through, with the losses of the VQ-VAE
                codes = model.codebook(nearest_codes(latents, model.codebook.weight)).permute(0, 3, 1, 2)
                distance = F.mse_loss(codes, latents.detach()) + 0.25 * F.mse_loss(latents, codes.detach())
                latents = latents + (codes - latents).detach()
            pixels = model.decoder(model.from_code(latents))
            loss = F.mse_loss(pixels, 2 * images - 1) + 0.1 * distance
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    fit(150, has_codes=False)
    with torch.no_grad():
        cells = model.latents(pictures[:64]).permute(0, 2, 3, 1).flatten(0, 2)
        chosen = [int(torch.randint(len(cells), (1,), generator=generator))]
        for _ in range(model.n_codes - 1):  # the cell farthest from all chosen ones
            chosen.append(int(torch.cdist(cells, cells[chosen]).amin(dim=1).argmax()))
        model.codebook.weight.copy_(cells[chosen])
    fit(300, has_codes=True)


@pytest.mark.long
def test_a_model_on_a_vqgans_tokens_learns_the_colours_of_shapes(tmp_path: Path) -> None:
    write_shapes(tmp_path / "data", 64, seed=0)
    pairs = read_pairs(str(tmp_path / "data"))
    pictures = to_tensor([center_crop(pair.open(), 32) for pair in pairs])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vqgan = VQGAN(tiny_vqgan(multipliers=(1, 1, 1, 1), attention_sizes=()).config)
    learn_autoencoder(vqgan, pictures)
    out = run(tmp_path / "data", tmp_path / "out", write_taming(vqgan.eval(), tmp_path / "taming"))
    assert n_right_colours(out) >= 28
