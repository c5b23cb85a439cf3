"""OpenAI's published CLIP, one TorchScript archive such as `ViT-B-32.pt`, becomes a model folder; its code is never run.

Source: github.com/openai/CLIP. An archive is torch's zip format with the modules as records, their tensors as
attributes, and source code that only TorchScript opens. A plain state dict, as fine-tunings of it are saved, is read
too.
"""

from pathlib import Path

from torch import Tensor

from dalle.clip_tokenizer import CLIPTokenizer
from dalle.importers.published_clip import config_of, write_clip
from dalle.importers.restricted_pickle import MAX_KEY, Inert, Module, Parameter, TensorRecord, kind_of
from dalle.importers.torch_archive import open_archive

SIZES_STORED_AS_TENSORS = ("input_resolution", "context_length", "vocab_size")  # beside the weights
ALLOWED: dict[
    tuple[str, str], object
] = {  # how TorchScript marks lists and dicts; none of them holds a weight
    ("torch.jit._pickle", name): type(name, (Inert,), {})
    for name in (
        "build_intlist",
        "build_doublelist",
        "build_boollist",
        "build_tensorlist",
        "restore_type_tag",
    )
}


def import_openai_clip(archive: Path, merges: Path, out: Path) -> None:
    """Write the model folder `out` from one of OpenAI's archives and their bpe_simple_vocab_16e6.txt.gz.

    Raises ValueError for a file that is no such archive, names anything that it should not, or does not fit the
    architecture. The activation is QuickGELU and the pixel statistics are OpenAI's, as in all of their models.
    """
    state = read_state(archive)
    config = config_of(state, activation="quick_gelu", source=str(archive))
    write_clip(config, state, CLIPTokenizer.from_openai(merges, config.n_text_tokens), out, str(archive))


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of an archive or state dict by dotted name; ValueError when `path` holds something else."""
    with open_archive(path, _lookup, "OpenAI CLIP") as archive:
        records: dict[str, TensorRecord] = {}
        waiting: list[tuple[str, object]] = [("", archive.root)]
        seen: set[int] = set()
        while waiting:
            prefix, owner = waiting.pop()
            if id(owner) in seen or len(prefix) > MAX_KEY:
                raise ValueError(f"{path}: module {prefix[:80].rstrip('.')} stands there twice")
            seen.add(id(owner))
            for name, value in _entries(owner, path):
                value = value.tensor if isinstance(value, Parameter) else value
                if isinstance(value, Module):
                    waiting.append((f"{prefix}{name}.", value))
                elif isinstance(value, TensorRecord):
                    records[prefix + name] = value
        archive.check_total(list(records.values()))
        return {
            name: archive.read(record)
            for name, record in records.items()
            if name not in SIZES_STORED_AS_TENSORS
        }


def _entries(owner: object, path: Path) -> list[tuple[str, object]]:
    entries = owner.state if isinstance(owner, Module) else owner
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise ValueError(f"{path} holds {kind_of(owner)}; expected OpenAI's CLIP or a state dict of it")
    return list(entries.items())


def _lookup(module: str, name: str) -> object | None:
    if module.split(".")[0] == "__torch__":  # a class that the archive's own code defines
        return Module
    return ALLOWED.get((module, name))
