"""min-dalle's four files, and dalle-mini's Flax checkpoint, become this package's `MinDalle` with its VQGAN and tokenizer.

Sources: kuprel/min-dalle (encoder.pt, decoder.pt, detoker.pt; vocab.json, merges.txt), borisdayma/dalle-mini
(flax_model.msgpack with config.json), kuprel/min-dalle-flax for how the two correspond.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dalle.config import validate
from dalle.importers.caption_files import min_dalle_tokenizer
from dalle.importers.conversion import WHOLE, Conversion, Piece, Progress, on_meta, write_converted
from dalle.importers.model_folders import imported_folder, write_pipeline_index
from dalle.importers.settings import json_settings
from dalle.importers.tensor_files import TensorEntry, TensorFile, open_tensors
from dalle.importers.vqgan import vqgan_conversion
from dalle.published.min_dalle import MinDalle, MinDalleConfig

KIND = "min-dalle"
D_HEAD = 64  # of mini and mega; no tensor tells it
# What the models were shown with: dalle-mini's page used a condition scale of 10, min-dalle 16 with the 256 likeliest.
DEFAULTS = {"temperature": 1.0, "top_k": 256, "guidance": 16.0}
SIDES = ("encoder", "decoder")
RENAMES = (  # theirs -> ours, in this order; the side stands before
    (r"^embed_tokens\.", "token."),
    (r"^embed_positions\.", "position."),
    (r"^layernorm_embedding\.", "embedding_norm."),
    (r"^final_ln\.", "norm."),
    (r"\.pre_self_attn_layer_norm\.", ".attention.norm."),
    (r"\.self_attn_layer_norm\.", ".attention.out_norm."),
    (r"\.pre_encoder_attn_layer_norm\.", ".cross_attention.norm."),
    (r"\.encoder_attn_layer_norm\.", ".cross_attention.out_norm."),
    (r"\.self_attn\.(q|k|v|out)_proj\.", r".attention.\1."),
    (r"\.encoder_attn\.(q|k|v|out)_proj\.", r".cross_attention.\1."),
    (r"\.glu\.ln0\.", ".mlp.norm."),
    (r"\.glu\.ln1\.", ".mlp.inner_norm."),
    (r"\.glu\.fc0\.", ".mlp.gate."),
    (r"\.glu\.fc1\.", ".mlp.value."),
    (r"\.glu\.fc2\.", ".mlp.out."),
)
FLAX_PARTS = {  # of a layer: Flax's -> min-dalle's
    "LayerNorm_0": "pre_self_attn_layer_norm",
    "LayerNorm_1": "self_attn_layer_norm",
    "LayerNorm_2": "pre_encoder_attn_layer_norm",
    "LayerNorm_3": "encoder_attn_layer_norm",
    "FlaxBartAttention_0": "self_attn",
    "FlaxBartAttention_1": "encoder_attn",
    "GLU_0": "glu",
}
FLAX_GLU = {"LayerNorm_0": "ln0", "LayerNorm_1": "ln1", "Dense_0": "fc0", "Dense_1": "fc1", "Dense_2": "fc2"}


def import_min_dalle(
    encoder: Path,
    decoder: Path,
    detoker: Path,
    vocab: Path,
    merges: Path,
    out: Path,
    *,
    changes: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the model folder `out` from min-dalle's files; `changes` override what shapes do not tell.

    Raises ValueError, one line, for a file that is damaged or of another model; nothing is written then.
    """
    files = [encoder, decoder, detoker, vocab, merges]
    with ExitStack() as stack:
        opened = [stack.enter_context(open_tensors(path, KIND)) for path in (encoder, decoder)]
        sides = dict(zip(SIDES, opened, strict=True))
        if any(name.startswith("layers.0.encoder_attn.") for name in opened[0].tensors):
            raise ValueError(f"{encoder} is a decoder: the encoder comes first")
        named = {
            f"{side}.{name}": entry for side, file in sides.items() for name, entry in file.tensors.items()
        }
        file = TensorFile(decoder, named, {})
        pieces = {our_name(name): Piece((name,)) for name in named}
        picture_file = stack.enter_context(open_tensors(detoker, "VQGAN"))
        folder = stack.enter_context(imported_folder(out, files))
        _write(file, pieces, picture_file, vocab, merges, folder, dict(changes or {}), dtype, progress)


def import_dalle_mini(
    checkpoint: Path,
    config: Path,
    vqgan: Path,
    vocab: Path,
    merges: Path,
    out: Path,
    *,
    changes: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the model folder `out` from dalle-mini's Flax files, and a VQGAN's: its own in Flax, or detoker.pt."""
    settings = json_settings(config)
    told = {
        "n_heads": settings.get("decoder_attention_heads"),
        "start_token": settings.get("decoder_start_token_id"),
    }
    changes = {key: value for key, value in told.items() if value is not None} | dict(changes or {})
    with ExitStack() as stack:
        flax = stack.enter_context(open_tensors(checkpoint, "dalle-mini"))
        file, pieces = unstacked(flax)
        picture_file = stack.enter_context(open_tensors(vqgan, "VQGAN"))
        folder = stack.enter_context(imported_folder(out, [checkpoint, config, vqgan, vocab, merges]))
        _write(file, pieces, picture_file, vocab, merges, folder, changes, dtype, progress)


def _write(
    file: TensorFile,
    pieces: dict[str, Piece],
    picture_file: TensorFile,
    vocab: Path,
    merges: Path,
    folder: Any,
    changes: dict[str, Any],
    dtype: torch.dtype | None,
    progress: Progress | None,
) -> None:
    shapes = {name: _shape(file, piece) for name, piece in pieces.items()}
    grid = round(shapes.get("decoder.position.weight", (256,))[0] ** 0.5)
    pictures = vqgan_conversion(picture_file, image_size=16 * grid, is_signed=False)
    codes = {"n_image_vocab": pictures.model.state_dict()["codebook.weight"].shape[0], "grid_size": grid}
    config = min_dalle_config(shapes, codes | changes, str(file.path))
    tokenizer = min_dalle_tokenizer(vocab, merges, config.n_text_tokens, config.n_text_vocab)
    write_converted(pictures, folder.path / "dvae", shard_bytes=WHOLE)
    write_converted(
        Conversion(file, on_meta(MinDalle, config), pieces, dtype=dtype),
        folder.path / "transformer",
        progress,
    )
    tokenizer.save_pretrained(folder.path / "tokenizer")
    write_pipeline_index(folder, {"dvae": "VQGAN", "transformer": "MinDalle"}, DEFAULTS)


def min_dalle_config(
    shapes: Mapping[str, tuple[int, ...]], changes: Mapping[str, Any], source: str
) -> MinDalleConfig:
    """Read the sizes off shapes under our names; the start token is BOS, behind all other ids, unless `changes` say."""
    try:
        n_image_ids, width = shapes["decoder.token.weight"]
        n_text_vocab = shapes["encoder.token.weight"][0]
        tree: dict[str, Any] = {
            "n_layers": len({name.split(".")[2] for name in shapes if name.startswith("encoder.layers.")}),
            "n_heads": max(1, width // D_HEAD),
            "d_model": width,
            "d_gated": shapes["encoder.layers.0.mlp.gate.weight"][0],
            "n_text_tokens": shapes["encoder.position.weight"][0],
            "n_text_vocab": n_text_vocab,
            "n_image_ids": n_image_ids,
            "start_token": n_image_ids - 1,
        }
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{source} holds no min-dalle: {error} is missing or misshapen") from None
    return validate(MinDalleConfig, tree | dict(changes), source)


def our_name(name: str) -> str:
    """Bring min-dalle's name, with its side before it, to ours."""
    side, _, rest = name.partition(".")
    if rest == "lm_head.weight":
        return "image_head.weight"
    for theirs, ours in RENAMES:
        rest = re.sub(theirs, ours, rest)
    return f"{side}.{rest}"


def unstacked(flax: TensorFile) -> tuple[TensorFile, dict[str, Piece]]:
    """Find the layers in Flax's arrays, which stack all layers or name them, and say how each tensor comes out."""
    entries: dict[str, TensorEntry] = dict(flax.tensors)
    pieces: dict[str, Piece] = {}
    for name, entry in entries.items():
        path = name.removeprefix("model.").split(".")
        if path[0] == "lm_head":
            pieces["image_head.weight"] = Piece((name,), lambda tensors: tensors[0].T)
            continue
        if path[0] not in SIDES:
            raise ValueError(f"{flax.path} holds {name[:80]}, which no dalle-mini has")
        if path[1] != "layers":
            ours = our_name(".".join([*path[:-1], _flax_leaf(path[-1])]))
            pieces[ours] = Piece((name,))
            continue
        part = _flax_part(path[3:])
        if path[2].endswith("Layers"):  # one array for all layers
            for i in range(entry.shape[0]):
                pieces[our_name(f"{path[0]}.layers.{i}.{part}")] = Piece((name,), partial(_layer, i))
        else:
            i = int(path[2].rpartition("_")[2])
            pieces[our_name(f"{path[0]}.layers.{i}.{part}")] = Piece((name,), partial(_layer, None))
    return TensorFile(flax.path, entries, {}), pieces


def _layer(index: int | None, tensors: Any) -> torch.Tensor:
    """Take one layer of a stacked array; matrices are the other way round in Flax."""
    x: torch.Tensor = tensors[0] if index is None else tensors[0][index]
    return x.T if x.ndim == 2 else x


def _flax_part(path: list[str]) -> str:
    names = [FLAX_PARTS.get(path[0], path[0])]
    if names[0] == "glu":
        names.append(FLAX_GLU.get(path[1], path[1]))
    else:
        names += path[1:-1]
    return ".".join([*names, _flax_leaf(path[-1])])


def _flax_leaf(name: str) -> str:
    return "weight" if name in ("kernel", "scale", "embedding") else name


def _shape(file: TensorFile, piece: Piece) -> tuple[int, ...]:
    entry = file[piece.sources[0]]
    return tuple(piece.make([torch.empty(entry.shape, device="meta")]).shape)
