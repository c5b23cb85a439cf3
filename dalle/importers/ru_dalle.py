"""ru-dalle's checkpoints become this package's `RuDalle`, with its Gumbel VQGAN and its BPE.

Source: ai-forever/ru-dalle (pytorch_model_v2.bin, pytorch_model_v3.bin; vqgan.gumbelf8-sber.model.ckpt; bpe.model). Which
version a file is of, its masks tell: they lie beside the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle.config import validate
from dalle.importers.caption_files import youtokentome
from dalle.importers.conversion import WHOLE, Conversion, Piece, Progress, on_meta, rows, write_converted
from dalle.importers.model_folders import imported_folder, write_pipeline_index
from dalle.importers.tensor_files import TensorFile, open_tensors
from dalle.importers.vqgan import find_prefix, vqgan_conversion
from dalle.published.ru_dalle import RuDalle, RuDalleConfig, slot_mask

KIND = "ru-dalle"
HEADS = {2048: 16, 3840: 60}  # by width, of the published ones; no tensor tells them
DEFAULTS = {"temperature": 1.0, "top_k": 1024, "top_p": 0.99, "guidance": 1.0}  # of its notebooks
RENAMES = (  # theirs -> ours, in this order
    (r"^text_embeddings\.", "text_token."),
    (r"^image_embeddings\.", "image_token."),
    (r"^text_pos_embeddings\.", "text_position."),
    (r"^image_row_embeddings\.", "image_row."),
    (r"^image_col_embeddings\.", "image_column."),
    (r"^to_logits\.0\.", "final_norm."),
    (r"^transformer\.final_layernorm\.", "stream_norm."),
    (r"^transformer\.layers\.", "layers."),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".mlp_norm."),
    (r"\.before_first_addition_layernorm\.", ".out_norms.0."),
    (r"\.before_second_addition_layernorm\.", ".out_norms.1."),
    (r"\.attention\.query_key_value\.", ".qkv."),
    (r"\.attention\.dense\.", ".out."),
    (r"\.mlp\.dense_h_to_4h\.", ".expand."),
    (r"\.mlp\.dense_4h_to_h\.", ".contract."),
)
MASKS = {
    f"transformer.{theirs}_mask": ours
    for theirs, ours in (("row", "row"), ("col", "column"), ("conv", "conv"))
}


def import_ru_dalle(
    checkpoint: Path,
    vqgan: Path,
    bpe: Path,
    out: Path,
    *,
    allow_pickle: bool = False,
    changes: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the model folder `out` from ru-dalle's transformer, VQGAN and BPE; `changes` override what no tensor tells.

    Raises ValueError, one line, for a file that is damaged or of another model; nothing is written then.
    """
    with ExitStack() as stack:
        file = without_wrapper(stack.enter_context(open_tensors(checkpoint, KIND)))
        pictures = stack.enter_context(open_tensors(vqgan, "VQGAN", allow_pickle))
        folder = stack.enter_context(imported_folder(out, [checkpoint, vqgan, bpe]))
        config = ru_dalle_config(file, dict(changes or {}))
        vae = vqgan_conversion(pictures, find_prefix(pictures), image_size=8 * config.grid_size)
        captions = youtokentome(bpe, config.n_text_tokens, config.n_text_vocab, is_framed=True)
        write_converted(vae, folder.path / "dvae", shard_bytes=WHOLE)
        write_converted(transformer_conversion(file, config, dtype), folder.path / "transformer", progress)
        captions.save_pretrained(folder.path / "tokenizer")
        write_pipeline_index(folder, {"dvae": "VQGAN", "transformer": "RuDalle"}, DEFAULTS)


def without_wrapper(file: TensorFile) -> TensorFile:
    """Drop what its half-precision wrapper put before each name."""
    if not all(name.startswith("module.") for name in file.tensors):
        return file
    return TensorFile(
        file.path, {name.removeprefix("module."): x for name, x in file.tensors.items()}, file.beside
    )


def ru_dalle_config(file: TensorFile, changes: Mapping[str, Any]) -> RuDalleConfig:
    """Read the sizes off shapes, and the version off the masks."""
    source = str(file.path)
    n_ids, width = file.shape("text_embeddings.weight")
    n_text = file.shape("text_pos_embeddings.weight")[0] - 1
    grid = file.shape("image_row_embeddings.weight")[0]
    n_layers = len({name.split(".")[2] for name in file.tensors if name.startswith("transformer.layers.")})
    tree: dict[str, Any] = {
        "n_layers": n_layers,
        "n_heads": HEADS.get(width),
        "d_model": width,
        "n_text_tokens": n_text,
        "n_text_vocab": n_ids - n_text,
        "n_image_vocab": file.shape("image_embeddings.weight")[0],
        "grid_size": grid,
        "has_sandwich_norms": "transformer.layers.0.before_first_addition_layernorm.weight" in file.tensors,
    }
    if "n_heads" not in changes and tree["n_heads"] is None:
        raise ValueError(f"{source} is {width} wide, as no published ru-dalle is: pass --set n_heads=N")
    version = changes.get("version") or _version(file, n_text, grid)
    if version not in ("v2", "v3"):
        raise ValueError(f"version is {version!r}; allowed are v2 and v3")
    tree |= {"has_start": version == "v2", "conv_wraps": version == "v2"}
    return validate(RuDalleConfig, tree | {k: v for k, v in changes.items() if k != "version"}, source)


def transformer_conversion(file: TensorFile, config: RuDalleConfig, dtype: torch.dtype | None) -> Conversion:
    """Plan the conversion of the transformer's tensors."""
    n_text_ids = config.n_text_vocab + config.n_text_tokens
    pieces: dict[str, Piece] = {}
    for part in ("weight", "bias"):
        pieces[f"text_head.{part}"] = rows(f"to_logits.1.{part}", None, n_text_ids)
        pieces[f"image_head.{part}"] = rows(f"to_logits.1.{part}", n_text_ids, None)
    for name in file.tensors:
        if not name.startswith("to_logits.1.") and name not in MASKS:
            ours = name
            for theirs, replacement in RENAMES:
                ours = re.sub(theirs, replacement, ours)
            pieces[ours] = Piece((name,))
    own = on_meta(RuDalle, config)
    known = own.state_dict()
    return Conversion(
        file, own, {name: piece for name, piece in pieces.items() if name in known}, MASKS.__contains__, dtype
    )


def _version(file: TensorFile, n_text: int, grid: int) -> str:
    """Tell v2 from v3 by the convolutional mask; ValueError where a mask is neither's."""
    for name, kind in MASKS.items():
        if (
            kind != "conv"
            and name in file.tensors
            and not _equal(file, name, slot_mask(kind, n_text, grid, False))
        ):
            raise ValueError(f"{file.path}: {name} is another mask than ru-dalle's")
    name = "transformer.conv_mask"
    if name not in file.tensors:
        raise ValueError(
            f"{file.path} has no masks, which tell its version: pass --set version=v2 or version=v3"
        )
    fits = [
        version
        for version, wraps in (("v2", True), ("v3", False))
        if _equal(file, name, slot_mask("conv", n_text, grid, wraps))
    ]
    if len(fits) != 1:
        raise ValueError(
            f"{file.path}: {name} fits {'both versions' if fits else 'no version'}: pass --set version=v2 or version=v3"
        )
    return fits[0]


def _equal(file: TensorFile, name: str, mask: Tensor) -> bool:
    return file.shape(name) == tuple(mask.shape) and torch.equal(file[name].read().bool(), mask)
