"""The model folder: which components a model has, where it lies, and whether its parts belong together.

The layout is the Hub's habit: a folder a component, model_index.json that lists them, manifest.json that is written
last and checked at every load.
"""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path

from dalle import __version__
from dalle.config import validate
from dalle.dvae import DiscreteVAE
from dalle.files import read_json, write_json
from dalle.generation.request import ModelDefaults
from dalle.manifest import write_manifest
from dalle.tokenizer import Tokenizer
from dalle.transformer import Transformer

COMPONENTS = {"tokenizer": "Tokenizer", "dvae": "DiscreteVAE", "transformer": "Transformer"}
OPTIONAL = {"clip": "CLIP", "judge": "CLIP"}  # ranks what is drawn; scores it in evaluations only
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
HUB_FILES = ["*.json", "README.md", "tokenizer/*", "dvae/*", "transformer/*", "clip/*", "judge/*"]


def check_fit(tokenizer: Tokenizer, dvae: DiscreteVAE, transformer: Transformer) -> None:
    """Raises ValueError when the components were not made for each other."""
    config = transformer.config
    pairs = [
        ("the dVAE has", dvae.config.n_codes, "codes", config.n_image_vocab),
        ("the dVAE's grid side is", dvae.config.grid_size, "tokens", config.grid_size),
        ("the tokenizer has", tokenizer.n_vocab, "vocabulary entries", config.n_text_vocab),
        ("the tokenizer pads captions to", tokenizer.max_tokens, "tokens", config.n_text_tokens),
    ]
    for what, has, unit, needs in pairs:
        if has != needs:
            raise ValueError(
                f"{what} {has} {unit}; the transformer was made for {needs}: use parts of one training run"
            )


def write_index(folder: Path, defaults: ModelDefaults) -> None:
    """Turns a folder that holds the components into a model folder: model_index.json, then the manifest."""
    index = {
        "_class_name": "DallePipeline",
        "_dalle_version": __version__,
        "components": COMPONENTS
        | {name: kind for name, kind in OPTIONAL.items() if (folder / name).is_dir()},
        "defaults": defaults.model_dump(),
    }
    write_json(folder / "model_index.json", index)
    write_manifest(folder)  # last: without it the folder is not a model


def write_ranker_index(folder: Path) -> None:
    """Turns a folder with a CLIP and its tokenizer into one that can rank: model_index.json, then the manifest."""
    index = {"_class_name": "CLIP", "_dalle_version": __version__, "components": {"clip": "CLIP"}}
    write_json(folder / "model_index.json", index)
    write_manifest(folder)


def is_ranker(folder: Path) -> bool:
    """Whether a folder holds a CLIP and no pipeline, as `write_ranker_index` leaves it."""
    path = folder / "model_index.json"
    index = read_json(path) if path.is_file() else None
    return isinstance(index, dict) and index.get("_class_name") == "CLIP"


def bundled_folder() -> Path:
    """Where the model that ships in the package lies."""
    return Path(str(importlib.resources.files("dalle") / "bundled"))


def model_folder(
    source: str | Path | None, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """The local folder of a source (None: the bundled model), fetched from the Hub where it is not local.

    Raises:
        ValueError: neither a folder nor to be had from the Hub.
    """
    if source is None:
        folder = bundled_folder()
        if not (folder / "model_index.json").is_file():
            raise ValueError(
                "this installation has no bundled model: give a model folder or a Hugging Face Hub id"
            )
        return folder
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, Path) or not HUB_ID.fullmatch(source):
        raise ValueError(
            f"{source} is not a folder: give a model folder or a Hugging Face Hub id such as owner/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(source, revision=revision, cache_dir=cache_dir, allow_patterns=HUB_FILES)
        )
    except Exception as error:  # as in push_to_hub
        raise ValueError(
            f"{source} is neither a folder nor to be had from the Hub: {one_line(error)}"
        ) from error


def read_index(path: Path) -> ModelDefaults:
    """Checks model_index.json and gives the model's default settings."""
    index = read_json(path)
    name = index.get("_class_name") if isinstance(index, dict) else None
    if name != "DallePipeline":
        raise ValueError(f"{path} describes {name!r}; dalle reads models of class 'DallePipeline'")
    components = index.get("components")
    there = {name: kind for name, kind in OPTIONAL.items() if (path.parent / name).is_dir()}
    if components != COMPONENTS | there:
        raise ValueError(
            f"{path} lists components {components}; dalle {__version__} reads {COMPONENTS | there} here:"
            f" install the dalle that wrote it ({index.get('_dalle_version')})"
        )
    return validate(ModelDefaults, index.get("defaults", {}), f"{path}: defaults")


def one_line(error: Exception) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())
