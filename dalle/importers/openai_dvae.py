"""OpenAI's published dVAE, `encoder.pkl` and `decoder.pkl`, becomes a model folder; nothing in them is run.

Source: github.com/openai/DALL-E, whose files are whole modules written by `torch.save`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle import __version__
from dalle.config import validate
from dalle.dvae import DiscreteVAE, DVAEConfig
from dalle.files import atomic_folder, write_json
from dalle.importers.restricted_pickle import (
    MAX_KEY,
    Inert,
    Module,
    Parameter,
    TensorRecord,
    kind_of,
    plain_set,
)
from dalle.importers.torch_archive import open_archive
from dalle.manifest import write_manifest
from dalle.weights import load_strict

N_GROUPS = 4  # of OpenAI's encoder and decoder


def import_openai_dvae(encoder: Path, decoder: Path, out: Path, *, image_size: int = 256) -> None:
    """Write the model folder `out` (dvae/, model_index.json, manifest.json) from OpenAI's two files.

    `image_size` in pixels is not stored in them; the published ones were trained at 256. Raises ValueError
    for a file that is not such a pickle, names anything that such a module does not, or does not fit the architecture.
    """
    encoder, decoder = Path(encoder), Path(decoder)
    tensors_of = {"encoder": read_module(encoder, "Encoder"), "decoder": read_module(decoder, "Decoder")}
    config = config_of(tensors_of["encoder"], tensors_of["decoder"], image_size)
    model = DiscreteVAE(config)
    load_strict(model.encoder, tensors_of["encoder"], str(encoder))
    load_strict(model.decoder, tensors_of["decoder"], str(decoder))
    with atomic_folder(out) as folder:
        model.save_pretrained(folder / "dvae")
        index = {
            "_class_name": "DiscreteVAE",
            "_dalle_version": __version__,
            "components": {"dvae": "DiscreteVAE"},
        }
        write_json(folder / "model_index.json", index)
        write_manifest(folder)


def config_of(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor], image_size: int) -> DVAEConfig:
    """Read the sizes off the tensors' shapes; ValueError when the two halves do not belong together."""
    source = "OpenAI's dVAE"
    try:
        d_hidden = encoder["blocks.input.w"].shape[0]
        n_codes = encoder["blocks.output.conv.w"].shape[0]
        d_code, n_codes_decoder = decoder["blocks.input.w"].shape[:2]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"the files do not hold {source}: {error} is missing or misshapen") from error
    if n_codes != n_codes_decoder:
        raise ValueError(
            f"the encoder has {n_codes} codes, the decoder {n_codes_decoder}: they are not a pair"
        )
    blocks = {name.split(".")[2] for name in encoder if name.startswith("blocks.group_1.block_")}
    sizes = {"image_size": image_size, "n_codes": n_codes, "d_hidden": d_hidden, "d_code": d_code}
    kind = {"quantizer": "gumbel", "trunk": "paper", "likelihood": "logit_laplace"}
    return validate(DVAEConfig, {**sizes, **kind, "n_blocks": len(blocks)}, source)


def read_module(path: Path, expected: str) -> dict[str, Tensor]:
    """Tensors of the pickled module in `path` by dotted name; ValueError unless its class is `expected`."""
    with open_archive(path, _lookup, "OpenAI dVAE") as archive:
        root = archive.root
        if not isinstance(root, Module):
            raise ValueError(f"{path} holds {kind_of(root)}; expected a pickled dall_e {expected}")
        if root.name != expected:
            raise ValueError(
                f"{path} holds a dall_e {root.name}; expected {expected}: the encoder comes first"
            )
        records = _parameters(root, path)
        archive.check_total(list(records.values()))
        return {name: archive.read(record) for name, record in records.items()}


def _parameters(root: Module, path: Path) -> dict[str, TensorRecord]:
    records: dict[str, TensorRecord] = {}
    n_blocks: Any = root.state.get("n_blk_per_group")
    for name, module in _walk(root, path):
        gain = module.state.get("post_gain")
        is_count = isinstance(n_blocks, int) and n_blocks > 0
        if gain is not None and not (is_count and gain == 1 / (N_GROUPS * n_blocks) ** 2):
            said = gain if isinstance(gain, float) else kind_of(gain)
            raise ValueError(
                f"{path}: {name} scales its branch by {said}; OpenAI's is 1 / (number of blocks)²"
            )
        for key, value in _entries(module, "_parameters", path):
            value = value.tensor if isinstance(value, Parameter) else value
            if value is None:
                continue
            if not isinstance(value, TensorRecord):
                raise ValueError(f"{path}: parameter {name}{key} is {kind_of(value)}, not a tensor")
            records[name + key] = value
    return records


# --- what a pickle may name ---

MODULES = (
    ("dall_e.encoder", "Encoder"),
    ("dall_e.encoder", "EncoderBlock"),
    ("dall_e.decoder", "Decoder"),
    ("dall_e.decoder", "DecoderBlock"),
    ("dall_e.utils", "Conv2d"),
    ("torch.nn.modules.activation", "ReLU"),
    ("torch.nn.modules.container", "Sequential"),
    ("torch.nn.modules.linear", "Identity"),
    ("torch.nn.modules.pooling", "MaxPool2d"),
    ("torch.nn.modules.upsampling", "Upsample"),
)
# Beyond `restricted_pickle.COMMON`.
ALLOWED: dict[tuple[str, str], object] = {
    **{(module, name): type(name, (Module,), {"name": name}) for module, name in MODULES},
    ("functools", "partial"): type("partial", (Inert,), {}),
    ("builtins", "set"): plain_set,
    ("__builtin__", "set"): plain_set,
}


def _lookup(module: str, name: str) -> object | None:
    return ALLOWED.get((module, name))


def _walk(root: Module, path: Path) -> Iterator[tuple[str, Module]]:
    """Every module once, with its dotted name and a final dot ("" for the root)."""
    waiting, seen = [("", root)], {id(root)}
    while waiting:
        name, module = waiting.pop()
        yield name, module
        for key, child in _entries(module, "_modules", path):
            if child is None:
                continue
            if not isinstance(child, Module) or id(child) in seen or len(name) > MAX_KEY:
                raise ValueError(
                    f"{path}: {name[:80]}{key[:80]} is {kind_of(child)}, or a module that stands there twice"
                )
            seen.add(id(child))
            waiting.append((f"{name}{key}.", child))


def _entries(module: Module, attribute: str, path: Path) -> list[tuple[str, Any]]:
    entries = module.state.get(attribute, {})
    if not isinstance(entries, dict) or not all(isinstance(key, str) for key in entries):
        raise ValueError(f"{path}: {attribute} of a {module.name} is {kind_of(entries)}, not a dict of names")
    return list(entries.items())
