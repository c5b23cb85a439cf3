"""Weights: safetensors files to and from modules; shapes are compared with a file's header before anything is built.

Source: the safetensors format (github.com/huggingface/safetensors).
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dalle.config import C, Config, validate
from dalle.files import existing_file, read_json, write_bytes, write_json
from dalle.manifest import CONFIG, checked_component

WEIGHTS = "model.safetensors"
MAX_LISTED = 4  # names of wrong tensors that an error line repeats
DTYPES = {  # by their names in a header
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

M = TypeVar("M", bound=nn.Module)

# Tensors


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors (any device, strides or sharing) as one safetensors file. Errors of `write_bytes`."""
    own: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        # The format has no sharing: tied tensors are written twice, and the library refuses shared memory.
        if copy.untyped_storage().data_ptr() in storages:
            copy = copy.clone()
        storages.add(copy.untyped_storage().data_ptr())
        own[name] = copy
    # The library's own file writer makes files of mode 0600 and does not sync them.
    write_bytes(path, safetensors.torch.save(own, metadata=dict(metadata) if metadata else None))


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file to CPU tensors, dtypes as stored; ValueError for a missing or damaged file."""
    path = existing_file(path)
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise _damaged(path, error) from None


def load_header(path: str | Path) -> dict[str, Tensor]:
    """Read what a safetensors file holds, as tensors without memory (device "meta"); ValueError for a damaged file."""
    path = existing_file(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            facts = {name: (one.get_shape(), one.get_dtype()) for name, one in slices.items()}
    except SafetensorError as error:
        raise _damaged(path, error) from None
    unknown = [name for name, (_, dtype) in facts.items() if dtype not in DTYPES]
    if unknown:
        raise ValueError(f"{path}: {_listing('dtype not read here', unknown)}")
    return {
        name: torch.empty(shape, dtype=DTYPES[dtype], device="meta") for name, (shape, dtype) in facts.items()
    }


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes, in the order of the names: 64 hex digits, alike on any device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # bytes: numpy has no bfloat16
    return digest.hexdigest()


# Components


def save_component(folder: str | Path, config: Config, tensors: Mapping[str, Tensor]) -> None:
    """Write a component's config.json and model.safetensors; then write a manifest beside its folder anew."""
    folder = Path(folder)
    save_tensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, config.model_dump(mode="json"))


def load_module(folder: str | os.PathLike[str], schema: type[C], build: Callable[[C], M], name: str) -> M:
    """Read a component's config and weights into the module that `build` makes of the config, in eval mode on the CPU.

    Floating tensors are cast to the module's dtype. The files are checked against a manifest.json beside the folder,
    and the header's names and shapes against the config, before memory is taken.

    Raises:
        ValueError: one line, for a missing, changed or damaged file, a config that `schema` refuses, or weights that
            do not fit it.
    """
    component = checked_component(folder, (CONFIG, WEIGHTS))
    config = validate(schema, read_json(component.path / CONFIG), str(component.path / CONFIG))
    path = component.path / WEIGHTS
    with torch.device("meta"):  # no time is spent on first weights that are overwritten
        module = build(config)
    _check_fit(module, load_header(path), name)
    module.to_empty(device="cpu")
    load_strict(module, load_tensors(path), name)
    return module.eval()


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Copy tensors into the module `name`, floating ones cast to its dtype; names and shapes must all agree.

    Raises ValueError that lists what is missing, unexpected, or of another shape or dtype; nothing is copied.
    """
    _check_fit(module, tensors, name)
    module.load_state_dict(dict(tensors), strict=True)


def _check_fit(module: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    own = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    both = [key for key in own if key in tensors]
    shapes = [
        f"{key} {list(tensors[key].shape)}, not {list(own[key].shape)}"
        for key in both
        if own[key].shape != tensors[key].shape
    ]
    # Only floats are cast: a cast to or between integers can change a value without a word.
    kinds = [
        f"{key} {tensors[key].dtype}, not {own[key].dtype}"
        for key in both
        if own[key].dtype != tensors[key].dtype
        and not (own[key].is_floating_point() and tensors[key].is_floating_point())
    ]
    problems = [
        _listing("missing", [key for key in own if key not in tensors]),
        _listing("unexpected", [key for key in tensors if key not in own]),
        _listing("shape", shapes),
        _listing("dtype", kinds),
    ]
    if any(problems):
        raise ValueError(f"{name}: the weights do not fit the model: {'; '.join(filter(None, problems))}")


def _damaged(path: Path, error: SafetensorError) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(f"{path}: not a whole safetensors file ({reason}): copy the file again")


def _listing(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"{what}: {', '.join(names[:MAX_LISTED])}{more}"
