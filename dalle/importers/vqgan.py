"""taming's VQGANs, and those that other published models carry, become this package's `VQGAN`.

Sources: CompVis/taming-transformers (Lightning checkpoints; VectorQuantizer and GumbelQuantize), ai-forever/ru-dalle,
kuprel/min-dalle's detoker.pt (a decoder alone), and vqgan-jax's Flax checkpoints. All sizes but the image's are read off
the tensors' shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dalle.config import validate
from dalle.importers.conversion import WHOLE, Conversion, Piece, Progress, on_meta, write_converted
from dalle.importers.model_folders import imported_folder, write_image_tokenizer_index
from dalle.importers.settings import yaml_number
from dalle.importers.tensor_files import TensorFile, open_tensors
from dalle.published.vqgan import VQGAN, VQGANConfig

KIND = "VQGAN"
DEFAULT_IMAGE_SIZE = 256  # pixels a side that all published ones were trained at
CODEBOOKS = ("quantize.embed.weight", "quantize.embedding.weight", "embedding.weight")
DECODER_EPS = 1e-5  # of GroupNorm in min-dalle's decoder; everywhere else 1e-6
RENAMES = (  # theirs -> ours, in this order
    (r"^quant_conv\.", "to_code."),
    (r"^post_quant_conv\.", "from_code."),
    (r"^(quantize\.)?embedding\.weight$", "codebook.weight"),
    (r"^quantize\.embed\.weight$", "codebook.weight"),
    (r"^quantize\.proj\.", "to_logits."),
    (r"\.conv_in\.", ".input."),
    (r"\.conv_out\.", ".output."),
    (r"\.norm_out\.", ".norm."),
    (r"\.mid\.attn_1\.", ".middle.attention."),
    (r"\.mid\.", ".middle."),
    (r"\.(down|up)sample\.", ".resize."),
    (r"\.(down|up)\.", ".levels."),
    (r"\.block\.", ".blocks."),
    (r"\.attn\.", ".attention."),
    (r"\.proj_out\.", ".out."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.(norm|conv)([12])\.", r".\1_\2."),
)


def import_vqgan(
    checkpoint: Path,
    config: Path | None,
    out: Path,
    *,
    allow_pickle: bool = False,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the model folder `out` from a VQGAN's checkpoint, and taming's config.yaml, which tells the image size.

    Raises ValueError, one line, for a file that is damaged or holds something else; nothing is written then.
    """
    with (
        open_tensors(checkpoint, KIND, allow_pickle) as file,
        imported_folder(out, [checkpoint, *([config] if config else [])]) as folder,
    ):
        size = DEFAULT_IMAGE_SIZE if config is None else yaml_number(config, "resolution")
        conversion = vqgan_conversion(file, find_prefix(file), image_size=size, dtype=dtype)
        write_converted(conversion, folder.path / "dvae", progress, WHOLE)
        write_image_tokenizer_index(folder, "VQGAN")


def vqgan_conversion(
    file: TensorFile,
    prefix: str = "",
    *,
    image_size: int = DEFAULT_IMAGE_SIZE,
    dtype: torch.dtype | None = None,
    is_signed: bool | None = None,
) -> Conversion:
    """Plan the conversion of the VQGAN whose names begin with `prefix`; ValueError where there is none.

    `is_signed`: pixels lie in [-1, 1]; None: they do, unless the file is dalle-mini's.
    """
    flax = any(name.endswith(".kernel") for name in file.tensors)
    names = {
        taming_name(name.removeprefix(prefix), flax): name for name in file.tensors if name.startswith(prefix)
    }
    shapes = {
        name: _torch_shape(file.shape(theirs)) if flax else file.shape(theirs)
        for name, theirs in names.items()
    }
    config = vqgan_config(shapes, str(file.path), image_size, is_flax=flax, is_signed=is_signed)
    last = len(config.multipliers) - 1
    pieces = {
        our_name(name, last): Piece((theirs,), _to_torch) if flax else Piece((theirs,))
        for name, theirs in names.items()
        if not _is_left_out(name)
    }
    own = on_meta(VQGAN, config)
    return Conversion(
        file,
        own,
        {name: piece for name, piece in pieces.items() if name in own.state_dict()},
        lambda name: not name.startswith(prefix) or _is_left_out(name.removeprefix(prefix)),
        dtype,
    )


def vqgan_config(
    shapes: Mapping[str, tuple[int, ...]],
    source: str,
    image_size: int,
    *,
    is_flax: bool = False,
    is_signed: bool | None = None,
) -> VQGANConfig:
    """Read the sizes off shapes under taming's names; ValueError where they are those of no VQGAN."""
    has_encoder = "encoder.conv_in.weight" in shapes
    is_gumbel = "quantize.embed.weight" in shapes
    is_detoker = "embedding.weight" in shapes and not is_flax  # min-dalle's
    codebook = next((name for name in CODEBOOKS if name in shapes), None)
    try:
        if codebook is None:
            raise KeyError("quantize.embedding.weight")
        n_codes, d_code = shapes[codebook]
        n_levels = 1 + max(
            int(match[1]) for name in shapes if (match := re.match(r"decoder\.up\.(\d+)\.", name))
        )
        widths = [shapes[f"decoder.up.{i}.block.0.conv1.weight"][0] for i in range(n_levels)]
        d_hidden = shapes["encoder.conv_in.weight"][0] if has_encoder else widths[0]
        n_blocks = len({name.split(".")[4] for name in shapes if name.startswith("decoder.up.0.block.")}) - 1
        attending = [i for i in range(n_levels) if f"decoder.up.{i}.attn.0.q.weight" in shapes]
        tree: dict[str, Any] = {
            "image_size": image_size,
            "n_codes": n_codes,
            "d_code": d_code,
            "d_latent": shapes["decoder.conv_in.weight"][1],
            "d_hidden": d_hidden,
            "multipliers": [width // d_hidden for width in widths],
            "n_blocks": n_blocks,
            "attention_sizes": [image_size >> i for i in attending],
            "quantizer": "gumbel" if is_gumbel else "nearest",
            "is_signed": not (is_flax or is_detoker) if is_signed is None else is_signed,
            "norm_eps": DECODER_EPS if is_detoker else 1e-6,
            "has_encoder": has_encoder,
        }
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{source} holds no VQGAN: {error} is missing or misshapen") from None
    return validate(VQGANConfig, tree, source)


def find_prefix(file: TensorFile) -> str:
    """Return what stands before the names of a VQGAN inside a larger model: "", or one that ends with a dot."""
    for name in file.tensors:
        if name.endswith("decoder.conv_in.weight"):
            return name.removesuffix("decoder.conv_in.weight")
    return ""


def taming_name(name: str, is_flax: bool = False) -> str:
    """Bring a Flax name to taming's form: `decoder.up_0.block_1.norm1.scale` -> `decoder.up.0.block.1.norm1.weight`."""
    if not is_flax:
        return name
    name = re.sub(r"\b(up|down|block|attn)_(\d+)(?=\.)", r"\1.\2", name) if ".mid." not in name else name
    name = name.replace("quantize.embedding.embedding", "quantize.embedding.weight")
    return re.sub(r"\.(kernel|scale)$", ".weight", name)


def our_name(name: str, last: int) -> str:
    """Bring taming's name to ours; `last` is the number of the coarsest level, which comes first in our decoder."""
    for theirs, ours in RENAMES:
        name = re.sub(theirs, ours, name)
    return re.sub(r"^(decoder\.levels\.)(\d+)", lambda match: f"{match[1]}{last - int(match[2])}", name)


def _is_left_out(name: str) -> bool:
    """Tell what of a checkpoint is not the autoencoder: the losses' networks, a palette for drawing segmentations."""
    return name.startswith(("loss.", "colorize", "quantize.used"))


def _to_torch(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Turn a Flax convolution (h, w, in, out) into torch's (out, in, h, w); other arrays are alike."""
    x = tensors[0]
    return x.permute(3, 2, 0, 1) if x.ndim == 4 else x


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape
