"""No move of code changes a number: hashes of draws, of a tiny run's weights and of a saved model, taken before.

They stay while files are moved. Sums round by the processor, so those of floats are compared on its kind alone.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle.config import load_preset, override, validate
from dalle.data.shapes import write_shapes
from dalle.generation.recipe import tokens_sha256
from dalle.generation.rerank import Ranker
from dalle.pipeline import DallePipeline, PipelineOutput
from dalle.training.recipe import Recipe
from dalle.training.train import train
from tests.tiny import tiny_clip, tiny_dvae, tiny_tokenizer, tiny_transformer

CAPTIONS = ["a red apple", "a pear", "a dog"]
PROCESSOR = "AVX512"  # where the hashes of weights were taken
RUN = [
    "tokenizer.vocab_size=280",
    "dvae.d_hidden=8",
    "dvae.d_code=8",
    "transformer.n_layers=2",
    "transformer.layers=['row', 'conv']",
    "transformer.n_heads=2",
    "transformer.d_head=8",
    *(
        f"{stage}_training.{setting}"
        for stage in ("dvae", "transformer")
        for setting in ("steps=4", "warmup_steps=1", "batch_size=2", "n_validation=2", "checkpoint_every=2")
    ),
]


def digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def drawn(out: PipelineOutput) -> str:
    """Tokens, seeds and order of a call in one hash."""
    return digest(*(tokens_sha256(tokens) for tokens in out.tokens), str(out.seeds), str(out.captions))


def files_of(folder: Path, pattern: str = "*") -> str:
    """Names and bytes of a folder's files in one hash."""
    paths = sorted(path for path in folder.rglob(pattern) if path.is_file())
    return digest(
        *(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in paths)
    )


def name_splits(folder: Path) -> None:
    """Write a table with the splits that the run was taken with: of file names the smallest hashes were held out."""
    names = sorted(path.name for path in folder.glob("*.png"))
    held_out = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[: len(names) // 4]
    rows = []
    for name in names:
        caption = folder / name.replace(".png", ".txt")
        split = "validation" if name in held_out else "train"
        rows.append({"file_name": name, "text": caption.read_text(encoding="utf-8"), "split": split})
        caption.unlink()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")


@pytest.fixture(scope="module")
def tiny() -> DallePipeline:
    tokenizer = tiny_tokenizer(CAPTIONS)
    ranker = Ranker(tiny_clip(tokenizer), tokenizer)
    return DallePipeline(tokenizer, tiny_dvae(), tiny_transformer(tokenizer.n_vocab), ranker=ranker)


@pytest.fixture(scope="module")
def bundled() -> DallePipeline:
    return DallePipeline.from_pretrained(dtype="float32")


def test_the_tiny_model_draws_the_same_tokens(tiny: DallePipeline) -> None:
    picture = Image.linear_gradient("L").convert("RGB")
    found = [
        drawn(tiny(CAPTIONS, num_images_per_prompt=3, seed=5)),
        drawn(tiny(CAPTIONS, num_images_per_prompt=2, num_candidates=5, seed=7, guidance=3.0, top_k=9)),
        drawn(tiny("a dog", num_images_per_prompt=5, seed=1, temperature=0.6, top_p=0.8, rows_per_batch=2)),
        drawn(tiny("a dog", num_images_per_prompt=2, seed=3, image=picture, keep_rows=2)),
        drawn(tiny("a dog", num_images_per_prompt=2, seed=3, temperature=0)),
    ]
    assert found == TINY_DRAWS


def test_the_bundled_model_draws_the_same_tokens(bundled: DallePipeline) -> None:
    captions = ["a red apple, flat fluent style", "a dog"]
    found = [
        drawn(bundled(captions, num_images_per_prompt=2, num_candidates=3, seed=0)),
        drawn(bundled("a smiling face", num_images_per_prompt=2, seed=11, guidance=1.0, temperature=1.0)),
    ]
    assert found == BUNDLED_DRAWS


def test_a_saved_model_has_the_same_bytes(
    tiny: DallePipeline, bundled: DallePipeline, tmp_path: Path
) -> None:
    tiny.save_pretrained(tmp_path / "tiny")
    bundled.save_pretrained(tmp_path / "bundled")
    found = [files_of(tmp_path / "tiny"), files_of(tmp_path / "bundled", "*.json"), bundled.model_sha256[:16]]
    assert found == SAVED


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != PROCESSOR, reason="another processor rounds otherwise"
)
def test_a_tiny_run_trains_the_same_weights(tmp_path: Path) -> None:
    data = write_shapes(tmp_path / "data", 16, seed=0)
    name_splits(data)
    recipe = validate(Recipe, override(load_preset("tiny"), RUN), "tiny")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cpu = torch.device("cpu")
        folder = train(str(data), tmp_path / "model", recipe, device=cpu, dtype=torch.float32, quiet=True)
    finally:
        torch.set_num_threads(before)
    weights = ("tokenizer/tokenizer.json", "dvae/model.safetensors", "transformer/model.safetensors")
    found = [hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16] for name in weights]
    assert found == TRAINED


TINY_DRAWS = [
    "5a88cb7db59f769a",
    "3db8cc6fe7fd6ed4",
    "af0ab421279dc879",
    "6c85984a4d33da61",
    "9812ac6bb12af7c2",
]
BUNDLED_DRAWS = ["33d356731f38386c", "8b47c9fdbd258028"]
SAVED = ["52b79d09df3549e5", "f140c26b41c27af9", "30a4bc725da8a758"]
TRAINED = ["f3eea87cc7d22972", "cbcd736d2b0e92df", "e0b47d5750174839"]
