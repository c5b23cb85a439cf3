"""DALLE-pytorch's checkpoints, of versions 0.2 to 1.6, become this package's `DallePytorch` with its image tokenizer.

Source: lucidrains/DALLE-pytorch, `train_dalle.py` for what a dalle.pt holds. Between versions its names differ by how many
wrappers (`.fn`) stand around a layer: without them all versions are alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from dalle.config import validate
from dalle.dvae import DiscreteVAE
from dalle.importers.caption_files import dalle_pytorch_tokenizer
from dalle.importers.conversion import (
    WHOLE,
    Conversion,
    Piece,
    Progress,
    on_meta,
    reshaped,
    rows,
    write_converted,
)
from dalle.importers.model_folders import ImportedFolder, imported_folder, write_pipeline_index
from dalle.importers.openai_dvae import config_of
from dalle.importers.tensor_files import TensorFile, open_tensors
from dalle.importers.vqgan import vqgan_conversion
from dalle.published.dalle_pytorch import DallePytorch, DallePytorchConfig
from dalle.published.dalle_pytorch_vae import DallePytorchVAE, DallePytorchVAEConfig
from dalle.weights import load_strict

KIND = "DALLE-pytorch model"
DEFAULTS = {"temperature": 1.0, "top_k": None, "guidance": 1.0}
CODEBOOKS = (  # whose first axis counts the codes
    "vae.codebook.weight",
    "vae.model.quantize.embedding.weight",
    "vae.model.quantize.embed.weight",
    "vae.enc.blocks.output.conv.w",
)
LAYER_NAMES = (  # theirs, without wrappers -> ours, in this order
    (r"^transformer\.layers\.blocks\.(\d+)\.f\.net\.", r"layers.\1.attention."),
    (r"^transformer\.layers\.blocks\.(\d+)\.g\.net\.", r"layers.\1.mlp."),
    (r"^transformer\.layers\.layers\.(\d+)\.0\.", r"layers.\1.attention."),
    (r"^transformer\.layers\.layers\.(\d+)\.1\.", r"layers.\1.mlp."),
    (r"\.norm_out\.", ".out_norm."),
    (r"\.to_qkv\.", ".inner.qkv."),
    (r"\.to_out\.0\.", ".inner.out."),
    (r"\.net\.0\.", ".inner.expand."),
    (r"\.net\.3\.", ".inner.contract."),
)


def import_dalle_pytorch(
    checkpoint: Path,
    tokenizer: Path,
    out: Path,
    *,
    allow_pickle: bool = False,
    changes: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the model folder `out` from a dalle.pt and the tokenizer that it was trained with.

    Raises ValueError, one line, for a file that is damaged or of another model, and for a DeepSpeed folder; nothing is
    written then.
    """
    checkpoint = Path(checkpoint)
    if checkpoint.is_dir():
        raise ValueError(
            f"{checkpoint} is a folder of DeepSpeed: turn it into one file by the zero_to_fp32.py inside it, and import that"
        )
    with (
        open_tensors(checkpoint, KIND, allow_pickle) as file,
        imported_folder(out, [checkpoint, tokenizer]) as folder,
    ):
        vae = _vae_kind(file)
        grid = _write_vae(file, vae, folder)
        config = dalle_pytorch_config(file, grid, dict(changes or {}))
        captions = dalle_pytorch_tokenizer(tokenizer, config.n_text_tokens, config.n_text_vocab)
        write_converted(transformer_conversion(file, config, dtype), folder.path / "transformer", progress)
        captions.save_pretrained(folder.path / "tokenizer")
        write_pipeline_index(folder, {"dvae": vae, "transformer": "DallePytorch"}, DEFAULTS)


def dalle_pytorch_config(file: TensorFile, grid: int, changes: Mapping[str, Any]) -> DallePytorchConfig:
    """Read sizes off shapes, and what no shape tells off the hyperparameters that the file holds."""
    source = str(file.path)
    hparams = file.beside.get("hparams")
    hparams = dict(hparams) if isinstance(hparams, dict) else {}
    names = {canonical(name) for name in file.tensors}
    n_layers = len(
        {name.split(".")[1] for name in names if re.match(r"layers\.\d+\.attention\.inner\.qkv", name)}
    )
    try:
        width = file.shape("to_logits.0.weight")[0]
        n_total = file.shape("to_logits.1.weight")[0]
        n_text = int(hparams["text_seq_len"]) if "text_seq_len" in hparams else _text_length(file)
        is_tied = "text_emb.linear.weight" in file.tensors
        qkv = next(name for name in file.tensors if name.endswith("to_qkv.weight"))
        kinds = hparams.get("attn_types") or ("full",)
        kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        if "sparse" in kinds or hparams.get("sparse_attn") is True:
            raise ValueError(
                f"{source} attends by DeepSpeed's block-sparse kernels, which draw a random pattern: not read"
            )
        n_heads = int(hparams.get("heads", 8))
        n_image_vocab = n_total - file.shape("text_emb.weight")[0] if not is_tied else _image_vocab(file)
        tree: dict[str, Any] = {
            "n_layers": n_layers,
            "n_heads": n_heads,
            "d_head": file.shape(qkv)[0] // (3 * n_heads),
            "d_model": width,
            "n_text_tokens": n_text,
            "n_text_vocab": n_total - n_image_vocab - n_text,
            "n_image_vocab": n_image_vocab,
            "grid_size": grid,
            "attention": tuple(islice(cycle(kinds), n_layers)),
            "is_rotary": "transformer.pos_emb" in file.tensors,
            "n_angles": file.shape("transformer.pos_emb")[-1] if "transformer.pos_emb" in file.tensors else 0,
            "shifts_tokens": _shifts_tokens(file, hparams, changes),
            "has_sandwich_norms": any(name.endswith(".out_norm.weight") for name in names),
            "is_stable": bool(hparams.get("stable", False)),
            "is_reversible": any(name.startswith("transformer.layers.blocks.") for name in file.tensors),
            "is_tied": is_tied,
            "image_weight": float(hparams.get("loss_img_weight", 7)),
        }
    except (KeyError, IndexError, TypeError, StopIteration, ZeroDivisionError) as error:
        raise ValueError(f"{source} holds no {KIND}: {error} is missing or misshapen") from None
    return validate(DallePytorchConfig, tree | dict(changes), source)


def transformer_conversion(
    file: TensorFile, config: DallePytorchConfig, dtype: torch.dtype | None
) -> Conversion:
    """Plan the conversion of the transformer's tensors."""
    n_text_ids, width, grid = config.n_text_vocab + config.n_text_tokens, config.d_model, config.grid_size
    pieces: dict[str, Piece] = {}
    for name in file.tensors:
        ours = canonical(name)
        if ours.startswith("layers."):
            is_scale = ours.endswith(".scale")
            pieces[ours] = reshaped(name, width) if is_scale else Piece((name,))
    own = on_meta(DallePytorch, config)
    for name in own.state_dict():  # before 0.9 there were no scales
        if name.endswith(".scale") and name not in pieces:
            pieces[name] = Piece((), lambda _: torch.ones(width))
    for part in ("weight", "bias"):
        pieces[f"final_norm.{part}"] = Piece((f"to_logits.0.{part}",))
        pieces[f"text_head.{part}"] = rows(f"to_logits.1.{part}", None, n_text_ids)
        pieces[f"image_head.{part}"] = rows(f"to_logits.1.{part}", n_text_ids, None)
    if not config.is_tied:
        pieces["text_token.weight"] = Piece(("text_emb.weight",))
        pieces["image_token.weight"] = Piece(("image_emb.weight",))
    if config.is_rotary:
        pieces["angles"] = reshaped("transformer.pos_emb", -1, config.n_angles)
    else:
        pieces["text_position.weight"] = Piece(("text_pos_emb.weight",))
        pieces["image_row.weight"] = reshaped("image_pos_emb.weights.0", grid, width)
        pieces["image_column.weight"] = reshaped("image_pos_emb.weights.1", grid, width)
    left_out = ("vae.", "logits_mask", "text_emb.linear.", "image_emb.linear.")
    return Conversion(file, own, pieces, lambda name: name.startswith(left_out), dtype)


def canonical(name: str) -> str:
    """Bring a layer's name, of any version, to ours; other names stay."""
    if not name.startswith("transformer.layers."):
        return name
    name = re.sub(r"(\.fn)+(?=\.)", "", name)
    for theirs, ours in LAYER_NAMES:
        name = re.sub(theirs, ours, name)
    return name


def _shifts_tokens(file: TensorFile, hparams: Mapping[str, Any], changes: Mapping[str, Any]) -> bool:
    """Tell whether tokens are shifted: no shape shows it, and the number of wrappers does only in some versions."""
    if "shifts_tokens" in changes or "shift_tokens" in hparams:
        return bool(changes.get("shifts_tokens", hparams.get("shift_tokens")))
    depth = max(name.count(".fn") for name in file.tensors if name.endswith("to_qkv.weight"))
    if depth <= 2:  # up to 1.0 without the option, and 1.0 to 1.2 with it off
        return False
    if depth >= 5:
        return True
    raise ValueError(
        f"{file.path} does not say whether it shifts tokens: pass --set shifts_tokens=true if it is of version 1.0 to 1.2,"
        " else --set shifts_tokens=false"
    )


def _text_length(file: TensorFile) -> int:
    if "text_pos_emb.weight" not in file.tensors:
        raise ValueError(f"{file.path} holds no hparams: it is not a dalle.pt, but weights alone")
    return file.shape("text_pos_emb.weight")[0] - 1


def _image_vocab(file: TensorFile) -> int:
    for name in CODEBOOKS:
        if name in file.tensors:
            return file.shape(name)[0]
    raise ValueError(f"{file.path} holds no image tokenizer")


def _vae_kind(file: TensorFile) -> str:
    marks = {
        "vae.codebook.weight": "DallePytorchVAE",
        "vae.model.decoder.conv_in.weight": "VQGAN",
        "vae.enc.blocks.input.w": "DiscreteVAE",
    }
    for mark, kind in marks.items():
        if mark in file.tensors:
            return kind
    raise ValueError(f"{file.path} holds no {KIND} with its image tokenizer: no tensor {', '.join(marks)}")


def _write_vae(file: TensorFile, kind: str, folder: ImportedFolder) -> int:
    """Write the image tokenizer's component; return its grid side."""
    path = folder.path / "dvae"
    if kind == "VQGAN":
        conversion = vqgan_conversion(file, "vae.model.")
        write_converted(conversion, path, shard_bytes=WHOLE)
        return int(conversion.model.config.grid_size)  # type: ignore[attr-defined]
    if kind == "DallePytorchVAE":
        conversion = vae_conversion(file, "vae.", file.beside.get("vae_params"))
        write_converted(conversion, path, shard_bytes=WHOLE)
        return int(conversion.model.config.grid_size)  # type: ignore[attr-defined]
    # OpenAI's, whose names are ours.
    halves = {
        half: {
            name.removeprefix(prefix): file[name].read() for name in file.tensors if name.startswith(prefix)
        }
        for half, prefix in (("encoder", "vae.enc."), ("decoder", "vae.dec."))
    }
    dvae = DiscreteVAE(config_of(halves["encoder"], halves["decoder"], 256))
    load_strict(dvae.encoder, halves["encoder"], str(file.path))
    load_strict(dvae.decoder, halves["decoder"], str(file.path))
    dvae.save_pretrained(path)
    return dvae.config.grid_size


def vae_conversion(file: TensorFile, prefix: str, parameters: object) -> Conversion:
    """Plan the conversion of DALLE-pytorch's dVAE, whose `parameters` lie beside it; ValueError where they are missing."""
    params = dict(parameters) if isinstance(parameters, dict) else {}
    try:
        n_codes, d_code = file.shape(f"{prefix}codebook.weight")
        normalization = params.get("normalization", ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
        mean, std = normalization if normalization is not None else ((0.0,) * 3, (1.0,) * 3)
        n_blocks = int(params.get("num_resnet_blocks", 0))
        d_hidden = file.shape(f"{prefix}encoder.0.0.weight")[0]
        tree = {
            "image_size": params["image_size"],
            "n_codes": n_codes,
            "d_code": d_code,
            "n_layers": params["num_layers"],
            "n_blocks": n_blocks,
            "d_hidden": d_hidden,
            "pixel_mean": tuple(mean)[:3],
            "pixel_std": tuple(std)[:3],
        }
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ValueError(
            f"{file.path} holds no dVAE of DALLE-pytorch: {error} is missing or misshapen"
        ) from None
    config = validate(DallePytorchVAEConfig, tree, str(file.path))
    own = on_meta(DallePytorchVAE, config)
    pieces = {
        _vae_name(name.removeprefix(prefix), config): Piece((name,))
        for name in file.tensors
        if name.startswith(prefix)
    }
    known = own.state_dict()
    return Conversion(
        file,
        own,
        {name: piece for name, piece in pieces.items() if name in known},
        lambda name: not name.startswith(prefix),
    )


def _vae_name(name: str, config: DallePytorchVAEConfig) -> str:
    """Number the layers of the two stacks one by one: theirs nest a convolution and its ReLU."""
    match = re.match(r"(encoder|decoder)\.(\d+)\.(?:(net)\.|(\d+)\.)?(.*)", name)
    if match is None:
        return name
    side, index, net, inner, rest = match[1], int(match[2]), match[3], match[4], match[5]
    first = 0 if side == "encoder" else (1 + config.n_blocks if config.n_blocks else 0)  # of the strided ones
    n_strided = config.n_layers
    if net:  # a residual block
        place = index + n_strided if side == "encoder" else index
        return f"{side}.{place}.layers.{rest}"
    if inner is not None:
        return f"{side}.{first + 2 * (index - first)}.{rest}"
    place = index + n_strided if index >= first + n_strided else index
    return f"{side}.{place}.{rest}"
