"""The whole system on drawn shapes: what a caption says decides what is drawn, and only because training saw it."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.config import load_preset, validate
from dalle.data.shapes import COLOURS, SHAPES, write_shapes
from dalle.pipeline import DallePipeline
from dalle.training.recipe import Recipe
from dalle.training.train import train

CAPTIONS = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
N_DRAWS = 4  # a caption: 32 in all


def n_right_colours(model: Path) -> int:
    """How many of 32 draws have the colour that their caption names, by the nearest of the four."""
    out = DallePipeline.from_pretrained(model)(CAPTIONS, num_images_per_prompt=N_DRAWS, seed=0)
    return sum(
        nearest_colour(image) == caption.split()[1]
        for image, caption in zip(out.images, out.captions, strict=True)
    )


def nearest_colour(image: Image.Image) -> str | None:
    """The colour of the ink of a picture; None when there is none."""
    pixels = np.asarray(image).reshape(-1, 3).astype(float)
    ink = pixels[pixels.min(axis=1) < 200]
    if len(ink) == 0:
        return None
    return min(COLOURS, key=lambda name: float(((ink.mean(axis=0) - COLOURS[name]) ** 2).sum()))


def train_tiny(data: Path, out: Path) -> None:
    """`dalle train data --preset tiny` on one thread's worth of machine."""
    recipe = validate(Recipe, load_preset("tiny"), "tiny")
    train(str(data), out, recipe, device=torch.device("cpu"), dtype=torch.float32, quiet=True)


def test_draws_have_the_colour_of_their_caption(tmp_path: Path) -> None:
    write_shapes(tmp_path / "data", 64, seed=0)
    began = time.process_time()
    train_tiny(tmp_path / "data", tmp_path / "model")
    assert time.process_time() - began < 240, "two minutes of two cores"
    assert n_right_colours(tmp_path / "model") >= 30


@pytest.mark.long
def test_nothing_is_learned_from_shuffled_captions(tmp_path: Path) -> None:
    write_shapes(tmp_path / "data", 64, seed=0, shuffled=True)
    train_tiny(tmp_path / "data", tmp_path / "model")
    assert n_right_colours(tmp_path / "model") < 30
