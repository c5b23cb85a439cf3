"""The model folder: which components a model has, whether they belong together; load, save, and the Hub.

The layout is the Hub's habit: a folder a component, model_index.json that lists them, manifest.json that is written
last and checked at every load.
"""

from __future__ import annotations

import importlib.resources
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dalle import __version__
from dalle.config import validate
from dalle.dvae import DiscreteVAE
from dalle.files import atomic_folder, file_sha256, read_json, write_bytes, write_json
from dalle.generation.request import ModelDefaults
from dalle.generation.rerank import Ranker
from dalle.image_tokenizer import ImageTokenizer
from dalle.manifest import MANIFEST, VerifiedFolder, write_manifest
from dalle.published.captions import CaptionTokenizer
from dalle.published.dalle_pytorch import DallePytorch
from dalle.published.dalle_pytorch_vae import DallePytorchVAE
from dalle.published.min_dalle import MinDalle
from dalle.published.min_dalle_e import MinDalleE
from dalle.published.ru_dalle import RuDalle
from dalle.published.vqgan import VQGAN
from dalle.token_model import TokenModel
from dalle.tokenizer import TextTokenizer, Tokenizer
from dalle.transformer import Transformer

TOKENIZERS = {kind.__name__: kind for kind in (Tokenizer, CaptionTokenizer)}
IMAGE_TOKENIZERS = {kind.__name__: kind for kind in (DiscreteVAE, VQGAN, DallePytorchVAE)}
TOKEN_MODELS = {kind.__name__: kind for kind in (Transformer, MinDalle, DallePytorch, RuDalle, MinDalleE)}
COMPONENTS: dict[str, Collection[str]] = {  # and the classes that each may be of
    "tokenizer": TOKENIZERS,
    "dvae": IMAGE_TOKENIZERS,
    "transformer": TOKEN_MODELS,
}
OURS = {"tokenizer": "Tokenizer", "dvae": "DiscreteVAE", "transformer": "Transformer"}
OPTIONAL = {"clip": "CLIP", "judge": "CLIP"}  # ranks what is drawn; scores it in evaluations only
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
HUB_FILES = ["*.json", "README.md", "tokenizer/*", "dvae/*", "transformer/*", "clip/*", "judge/*"]


@dataclass(frozen=True)
class Model:
    """The components of a model, and the folder that they came from."""

    tokenizer: TextTokenizer
    dvae: ImageTokenizer
    transformer: TokenModel
    defaults: ModelDefaults
    ranker: Ranker | None = None
    source: VerifiedFolder | None = None  # None: it was made here


def load_model(folder: Path) -> Model:
    """Load every component, each file of the folder hashed once; ValueError for what is missing, changed or misfit."""
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} has no model_index.json: it is no model folder, or its training has not finished"
        )
    verified = VerifiedFolder(folder)
    defaults, kinds = read_index(folder / "model_index.json")
    return Model(
        defaults=defaults,
        tokenizer=TOKENIZERS[kinds["tokenizer"]].from_pretrained(verified.component("tokenizer")),
        dvae=load_image_tokenizer(verified.component("dvae"), kinds["dvae"]),
        transformer=load_token_model(verified.component("transformer"), kinds["transformer"]),
        ranker=Ranker.from_pretrained(verified) if (folder / "clip").is_dir() else None,
        source=verified,
    )


def load_image_tokenizer(folder: str | os.PathLike[str], kind: str) -> ImageTokenizer:
    """Load an image tokenizer of a class that model_index.json names, in float32."""
    return IMAGE_TOKENIZERS[kind].from_pretrained(folder).float()


def load_token_model(folder: str | os.PathLike[str], kind: str) -> TokenModel:
    """Load a token model of a class that model_index.json names, in the dtype that it is stored in (ours in float32)."""
    return TOKEN_MODELS[kind].from_pretrained(folder)


def save_model(model: Model, folder: Path) -> str:
    """Write a model folder, weights as they are held, and return the sha256 of its manifest.

    A new folder appears whole; an existing one counts as a model only once all is written.
    """
    if folder.is_dir() and any(folder.iterdir()):  # a run's folder: other files live beside the model
        (folder / MANIFEST).unlink(missing_ok=True)
        _write(model, folder)
    else:
        with atomic_folder(folder) as partial:
            _write(model, partial)
    return file_sha256(folder / MANIFEST)


def model_sha256(model: Model) -> str:
    """Return the sha256 of the manifest that saving would give."""
    with tempfile.TemporaryDirectory() as folder:
        _write(model, Path(folder))
        return file_sha256(Path(folder) / MANIFEST)


def push_model(model: Model, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a model folder to the Hugging Face Hub and return its address; ValueError where the Hub refuses."""
    from huggingface_hub import HfApi  # a second to import, and only needed here

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        _write(model, Path(folder))
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"dalle {__version__}")
        except Exception as error:  # those of the client's HTTP library, which differs by version, too
            raise ValueError(f"cannot push to {repo_id!r}: {one_line(error)}") from error
    return str(url)


def _write(model: Model, folder: Path) -> None:
    model.tokenizer.save_pretrained(folder / "tokenizer")
    model.dvae.save_pretrained(folder / "dvae")
    model.transformer.save_pretrained(folder / "transformer")
    if model.ranker is not None:
        model.ranker.save_pretrained(folder)
    source = None if model.source is None else model.source.path
    if source is not None and source.resolve() != folder.resolve():
        if (source / "judge").is_dir():
            shutil.copytree(source / "judge", folder / "judge", dirs_exist_ok=True)
        if (source / "README.md").is_file():
            write_bytes(folder / "README.md", (source / "README.md").read_bytes())
    parts = {"tokenizer": model.tokenizer, "dvae": model.dvae, "transformer": model.transformer}
    write_index(folder, model.defaults, {name: type(part).__name__ for name, part in parts.items()})


def check_fit(tokenizer: TextTokenizer, dvae: ImageTokenizer, transformer: TokenModel) -> None:
    """Raise ValueError when the components were not made for each other."""
    config = transformer.config
    pairs = [
        ("the dVAE has", dvae.n_codes, "codes", config.n_image_vocab),
        ("the dVAE's grid side is", dvae.grid_size, "tokens", config.grid_size),
        ("the tokenizer has", tokenizer.n_vocab, "vocabulary entries", config.n_text_vocab),
        ("the tokenizer pads captions to", tokenizer.max_tokens, "tokens", config.n_text_tokens),
    ]
    for what, has, unit, needs in pairs:
        if has != needs:
            raise ValueError(
                f"{what} {has} {unit}; the transformer was made for {needs}: use parts of one training run"
            )


def write_index(
    folder: Path,
    defaults: ModelDefaults,
    kinds: Mapping[str, str] | None = None,
    imported_from: Sequence[Mapping[str, object]] = (),
) -> None:
    """Turn a folder that holds the components into a model folder: model_index.json, then the manifest.

    `kinds` names the class of each component, ours when None; `imported_from` the files that it was made of.
    """
    index: dict[str, object] = {
        "_class_name": "DallePipeline",
        "_dalle_version": __version__,
        "components": {**(OURS if kinds is None else kinds), **_optional(folder)},
        "defaults": defaults.model_dump(),
    }
    if imported_from:
        index["imported_from"] = list(imported_from)
    write_json(folder / "model_index.json", index)
    write_manifest(folder)  # last: without it the folder is not a model


def write_ranker_index(folder: Path) -> None:
    """Turn a folder with a CLIP and its tokenizer into one that can rank: model_index.json, then the manifest."""
    index = {"_class_name": "CLIP", "_dalle_version": __version__, "components": {"clip": "CLIP"}}
    write_json(folder / "model_index.json", index)
    write_manifest(folder)


def is_ranker(folder: Path) -> bool:
    """Say whether a folder holds a CLIP and no pipeline, as `write_ranker_index` leaves it."""
    path = folder / "model_index.json"
    index = read_json(path) if path.is_file() else None
    return isinstance(index, dict) and index.get("_class_name") == "CLIP"


def bundled_folder() -> Path:
    """Return where the model that ships in the package lies."""
    return Path(str(importlib.resources.files("dalle") / "bundled"))


def model_folder(
    source: str | Path | None, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """Return the local folder of a source (None: the bundled model), fetched from the Hub where it is not local.

    Raises:
        ValueError: not found locally or on the Hub.
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
    from huggingface_hub import snapshot_download  # a second to import, and only needed here

    try:
        return Path(
            snapshot_download(source, revision=revision, cache_dir=cache_dir, allow_patterns=HUB_FILES)
        )
    except Exception as error:  # as in push_to_hub
        raise ValueError(f"{source} not found locally or on the Hub: {one_line(error)}") from error


def read_index(path: Path) -> tuple[ModelDefaults, dict[str, str]]:
    """Check model_index.json and return the model's default settings, and the class of each component."""
    index = read_json(path)
    name = index.get("_class_name") if isinstance(index, dict) else None
    if name != "DallePipeline":
        raise ValueError(f"{path} describes {name!r}; dalle reads models of class 'DallePipeline'")
    components = index.get("components")
    own = {name: str(components.get(name)) for name in COMPONENTS} if isinstance(components, dict) else {}
    is_known = all(own.get(name) in kinds for name, kinds in COMPONENTS.items())
    if not is_known or components != own | _optional(path.parent):
        raise ValueError(
            f"{path} lists components {components}; dalle {__version__} reads {OURS | _optional(path.parent)} here,"
            f" or those of an import: install the dalle that wrote it ({index.get('_dalle_version')})"
        )
    return validate(ModelDefaults, index.get("defaults", {}), f"{path}: defaults"), own


def component_kind(folder: Path, name: str) -> str:
    """Return the class of one component of a model folder, or of a component that stands alone; ours where none is named.

    Raises ValueError for a class that is not known here.
    """
    path = folder / "model_index.json"
    index = read_json(path) if path.is_file() else None
    components = index.get("components") if isinstance(index, dict) else None
    kind = components.get(name, OURS[name]) if isinstance(components, dict) else OURS[name]
    if kind not in COMPONENTS[name]:
        raise ValueError(f"{path}: {name} is of class {kind!r}; known are {', '.join(COMPONENTS[name])}")
    return str(kind)


def _optional(folder: Path) -> dict[str, str]:
    return {name: kind for name, kind in OPTIONAL.items() if (folder / name).is_dir()}


def one_line(error: Exception) -> str:
    """Return what an error says, on one line."""
    return " ".join(str(error).split())
