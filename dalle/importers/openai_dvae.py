"""OpenAI's published dVAE, `encoder.pkl` and `decoder.pkl`, becomes a model folder; nothing in them is run.

Source: github.com/openai/DALL-E, whose files are whole modules written by `torch.save`. A pickle names
functions to call; here each name is looked up in one list, `ALLOWED`, and stands for an inert record or a
plain container.

The formats read: torch's zip archive (data.pkl + data/KEY) and the older stream of pickles before torch 1.6.
"""

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

import torch
from torch import Tensor

from dalle import __version__
from dalle.config import validate
from dalle.dvae import DiscreteVAE, DVAEConfig
from dalle.weights import atomic_folder, load_strict, write_json, write_manifest

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of torch's older format
N_GROUPS = 4  # of OpenAI's encoder and decoder


def import_openai_dvae(encoder: Path, decoder: Path, out: Path, *, image_size: int = 256) -> None:
    """Write the model folder `out` (dvae/, model_index.json, manifest.json) from OpenAI's two files.

    `image_size` in pixels is not stored in them; the published ones were trained at 256. Raises ValueError
    for a file that is not such a pickle, names anything outside `ALLOWED`, or does not fit the architecture.
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
    root, storages = _read_archive(path)
    if not isinstance(root, Module):
        raise ValueError(f"{path} holds {_kind(root)}; expected a pickled dall_e {expected}")
    if root.name != expected:
        raise ValueError(f"{path} holds a dall_e {root.name}; expected {expected}: the encoder comes first")
    tensors: dict[str, Tensor] = {}
    n_blocks: Any = root.state.get("n_blk_per_group")
    for name, module in _walk(root, path):
        gain = module.state.get("post_gain")
        is_count = isinstance(n_blocks, int) and n_blocks > 0
        if gain is not None and not (is_count and gain == 1 / (N_GROUPS * n_blocks) ** 2):
            raise ValueError(
                f"{path}: {name} scales its branch by {gain}; OpenAI's is 1 / (number of blocks)²"
            )
        for key, value in _entries(module, "_parameters", path):
            value = value.tensor if isinstance(value, Parameter) else value
            if value is None:
                continue
            if not isinstance(value, TensorRecord):
                raise ValueError(f"{path}: parameter {name}{key} is {_kind(value)}, not a tensor")
            tensors[name + key] = value.read(storages, path)
    return tensors


# --- what a name inside a pickle may stand for ---


class Inert:
    """Stands for a named class or function: calling it keeps nothing and does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        # defined so that unpickling never writes attributes of its choice
        raise ValueError(f"unexpected state for {type(self).__name__}")


class Module(Inert):
    """A module of which only the attributes are kept, as data."""

    name = "Module"

    def __init__(self, *_: object) -> None:
        self.state: dict[str, Any] = {}

    def __new__(cls, *_: object) -> "Module":
        module = super().__new__(cls)
        module.state = {}  # unpickling skips __init__
        return module

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise ValueError(f"the state of a module is {_kind(state)}, not a dict")
        self.state = state


class TensorRecord(Inert):
    """The arguments of `torch._utils._rebuild_tensor_v2`: where in which storage a tensor lies."""

    def __init__(self, storage: object, offset: object, size: object, stride: object, *_: object) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    def read(self, storages: Mapping[str, bytes], path: Path) -> Tensor:
        """A tensor of its own with these values; ValueError when it reaches outside its storage."""
        storage, size, stride = self.storage, self.size, self.stride
        if not isinstance(storage, Storage) or not (_are_counts(size) and _are_counts(stride)):
            raise ValueError(f"{path} holds a damaged tensor")
        data, offset = storages.get(storage.key), self.offset
        if data is None or not isinstance(offset, int) or offset < 0 or len(size) != len(stride) or 0 in size:
            raise ValueError(f"{path} holds a damaged tensor: storage {storage.key}, shape {size}")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        n_stored = len(data) // storage.dtype.itemsize
        # a stride of zero would make a large tensor out of a small file
        if last >= n_stored or math.prod(size) > n_stored:
            raise ValueError(f"{path} is damaged or cut short: storage {storage.key} has {n_stored} numbers")
        flat = torch.frombuffer(bytearray(data), dtype=storage.dtype)
        return flat.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)


class Parameter(Inert):
    """The arguments of `torch._utils._rebuild_parameter`."""

    def __init__(self, tensor: object, *_: object) -> None:
        self.tensor = tensor


class Storage(NamedTuple):
    """A named run of numbers outside the pickle; a tuple, because a pickle cannot alter one."""

    key: str
    dtype: torch.dtype


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
# Everything a pickle may name. It cannot alter types written in C; all others are the records above.
ALLOWED: dict[tuple[str, str], object] = {
    **{(module, name): type(name, (Module,), {"name": name}) for module, name in MODULES},
    ("torch._utils", "_rebuild_tensor_v2"): TensorRecord,
    ("torch._utils", "_rebuild_parameter"): Parameter,
    ("torch", "device"): type("device", (Inert,), {}),
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("collections", "OrderedDict"): OrderedDict,
    ("functools", "partial"): type("partial", (Inert,), {}),
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickles into records and plain containers only; ValueError names whatever else a pickle asks for."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file, encoding="utf-8")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise ValueError(
                f"{self.path} names {module}.{name}, which no OpenAI dVAE does: refused"
            ) from None

    def persistent_load(self, reference: Any) -> Any:
        if isinstance(reference, tuple) and reference[:1] == ("module",) and len(reference) == 4:
            return reference[
                1
            ]  # older format: a class, already looked up above, and its source code, ignored
        if isinstance(reference, tuple) and reference[:1] == ("storage",) and len(reference) in (5, 6):
            _, dtype, key, _, _ = reference[:5]
            is_whole = len(reference) == 5 or reference[5] is None
            if isinstance(dtype, torch.dtype) and isinstance(key, str) and is_whole:
                return Storage(key, dtype)
        raise ValueError(f"{self.path} refers to outside data in a way that torch.save does not")


# --- the two file formats ---


def _read_archive(path: Path) -> tuple[object, dict[str, bytes]]:
    """The root record and the bytes of every storage; ValueError for anything that is not torch's."""
    try:
        with path.open("rb") as file:
            return _read_zip(file, path) if zipfile.is_zipfile(file) else _read_legacy(file, path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is not a file of torch.save, or is damaged: {error}") from error
    except Exception as error:  # a hostile pickle can make the unpickler raise anything
        raise ValueError(f"{path} is not a file of torch.save, or is damaged: {_kind(error)}") from error


def _read_zip(file: BinaryIO, path: Path) -> tuple[object, dict[str, bytes]]:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        # torch stores without compression: so nothing read here is larger than the file itself
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError(f"{path} is a compressed archive; torch.save does not compress")
        pickles = [e.filename for e in entries if e.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{path} is a zip archive, but not one of torch.save: it has no data.pkl")
        prefix = pickles[0].removesuffix("data.pkl")
        names = {entry.filename for entry in entries}
        if prefix + "byteorder" in names and archive.read(prefix + "byteorder") != b"little":
            raise ValueError(f"{path} was written on a big-endian machine; only little-endian files are read")
        root = RestrictedUnpickler(BytesIO(archive.read(prefix + "data.pkl")), path).load()
        folder = prefix + "data/"
        return root, {name[len(folder) :]: archive.read(name) for name in names if name.startswith(folder)}


def _read_legacy(file: BinaryIO, path: Path) -> tuple[object, dict[str, bytes]]:
    file.seek(0)
    # five pickles on end: magic number, version, the writer's machine, the object, the storages' keys
    magic, _, machine, root, keys = (RestrictedUnpickler(file, path).load() for _ in range(5))
    if magic != LEGACY_MAGIC:
        raise ValueError(f"{path} is not a file of torch.save")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError(f"{path} was written on a big-endian machine; only little-endian files are read")
    storages: dict[str, bytes] = {}
    n_bytes = {s.key: s.dtype.itemsize for s in _storages(root, path)}
    for key in keys:
        (n_numbers,) = struct.unpack("<q", file.read(8))
        if n_numbers < 0 or key not in n_bytes:
            raise ValueError(f"{path} is damaged at storage {key}")
        storages[key] = file.read(n_numbers * n_bytes[key])
    return root, storages


def _storages(root: object, path: Path) -> Iterator[Storage]:
    if isinstance(root, Module):
        for _, module in _walk(root, path):
            for _, value in _entries(module, "_parameters", path):
                value = value.tensor if isinstance(value, Parameter) else value
                if isinstance(value, TensorRecord) and isinstance(value.storage, Storage):
                    yield value.storage


def _walk(root: Module, path: Path) -> Iterator[tuple[str, Module]]:
    """Every module once, with its dotted name and a final dot ("" for the root)."""
    waiting, seen = [("", root)], {id(root)}
    while waiting:
        name, module = waiting.pop()
        yield name, module
        for key, child in _entries(module, "_modules", path):
            if child is None:
                continue
            if not isinstance(child, Module) or id(child) in seen:
                raise ValueError(
                    f"{path}: {name}{key} is {_kind(child)}, or a module that stands there twice"
                )
            seen.add(id(child))
            waiting.append((f"{name}{key}.", child))


def _entries(module: Module, attribute: str, path: Path) -> list[tuple[str, Any]]:
    entries = module.state.get(attribute, {})
    if not isinstance(entries, dict) or not all(isinstance(key, str) for key in entries):
        raise ValueError(f"{path}: {attribute} of a {module.name} is {_kind(entries)}, not a dict of names")
    return list(entries.items())


def _are_counts(values: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(values, tuple) and all(type(value) is int and value >= 0 for value in values)


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
