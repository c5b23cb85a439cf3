"""minDALL-E's unpacked archive becomes this package's `MinDalleE`, with its VQGAN and its BPE.

Source: kakaobrain/minDALL-E: tokenizer/bpe-16k-{vocab.json,merges.txt}, stage1_last.ckpt, stage2_last.ckpt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from dalle.config import validate
from dalle.importers.caption_files import min_dalle_e_tokenizer
from dalle.importers.conversion import WHOLE, Conversion, Piece, Progress, on_meta, stacked, write_converted
from dalle.importers.model_folders import imported_folder, write_pipeline_index
from dalle.importers.tensor_files import TensorFile, open_tensors
from dalle.importers.vqgan import find_prefix, vqgan_conversion
from dalle.published.min_dalle_e import MinDalleE, MinDalleEConfig

KIND = "minDALL-E"
FILES = (
    "tokenizer/bpe-16k-vocab.json",
    "tokenizer/bpe-16k-merges.txt",
    "stage1_last.ckpt",
    "stage2_last.ckpt",
)
HEADS = {1536: 24}  # by width; no tensor tells them
DEFAULTS = {"temperature": 1.0, "top_k": 256, "guidance": 1.0}  # of its example
RENAMES = (  # theirs -> ours
    (r"^tok_emb_txt\.", "text_token."),
    (r"^tok_emb_img\.", "image_token."),
    (r"^pos_emb_txt\.", "text_position."),
    (r"^pos_emb_img\.", "image_position."),
    (r"^head_txt\.", "text_head."),
    (r"^head_img\.", "image_head."),
    (r"^ln_f\.", "final_norm."),
    (r"^blocks\.", "layers."),
    (r"\.ln1\.", ".attention_norm."),
    (r"\.ln2\.", ".mlp_norm."),
    (r"\.attn\.proj\.", ".out."),
    (r"\.mlp\.0\.", ".expand."),
    (r"\.mlp\.2\.", ".contract."),
)


def import_min_dalle_e(
    folder: Path,
    out: Path,
    *,
    allow_pickle: bool = False,
    changes: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the model folder `out` from the folder that minDALL-E's archive unpacks to.

    Raises ValueError, one line, for a file that is missing, damaged or of another model; nothing is written then.
    """
    paths = [Path(folder) / name for name in FILES]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise ValueError(f"{missing} is missing: give the folder that 1.3B.tar.gz unpacks to")
    vocab, merges, stage1, stage2 = paths
    with ExitStack() as stack:
        pictures = stack.enter_context(open_tensors(stage1, "VQGAN", allow_pickle))
        file = stack.enter_context(open_tensors(stage2, KIND, allow_pickle))
        made = stack.enter_context(imported_folder(out, paths))
        n_vocab, n_text = file.shape("tok_emb_txt.weight")[0], file.shape("pos_emb_txt.weight")[0]
        captions = min_dalle_e_tokenizer(vocab, merges, n_text, n_vocab)
        config = min_dalle_e_config(file, {"pad_id": captions.config.pad_id} | dict(changes or {}))
        vae = vqgan_conversion(pictures, find_prefix(pictures), image_size=16 * config.grid_size)
        write_converted(vae, made.path / "dvae", shard_bytes=WHOLE)
        write_converted(transformer_conversion(file, config, dtype), made.path / "transformer", progress)
        captions.save_pretrained(made.path / "tokenizer")
        write_pipeline_index(made, {"dvae": "VQGAN", "transformer": "MinDalleE"}, DEFAULTS)


def min_dalle_e_config(file: TensorFile, facts: Mapping[str, Any]) -> MinDalleEConfig:
    """Read the sizes off shapes; `facts` are those that no tensor tells."""
    n_vocab, width = file.shape("tok_emb_txt.weight")
    if "n_heads" not in facts and width not in HEADS:
        raise ValueError(f"{file.path} is {width} wide, as no published minDALL-E is: pass --set n_heads=N")
    tree = {
        "n_heads": HEADS.get(width),
        "n_layers": len({name.split(".")[1] for name in file.tensors if name.startswith("blocks.")}),
        "d_model": width,
        "n_text_tokens": file.shape("pos_emb_txt.weight")[0],
        "n_text_vocab": n_vocab,
        "n_image_vocab": file.shape("tok_emb_img.weight")[0],
        "grid_size": round(file.shape("pos_emb_img.weight")[0] ** 0.5),
    }
    return validate(MinDalleEConfig, tree | dict(facts), str(file.path))


def transformer_conversion(
    file: TensorFile, config: MinDalleEConfig, dtype: torch.dtype | None
) -> Conversion:
    """Plan the conversion of the transformer's tensors."""
    pieces: dict[str, Piece] = {}
    for name in file.tensors:
        ours = name
        for theirs, replacement in RENAMES:
            ours = re.sub(theirs, replacement, ours)
        pieces[ours] = Piece((name,))
    for i in range(config.n_layers):
        for part in ("weight", "bias"):
            names = [f"blocks.{i}.attn.{side}.{part}" for side in ("query", "key", "value")]
            pieces[f"layers.{i}.qkv.{part}"] = stacked(*names)
    own = on_meta(MinDalleE, config)
    known = own.state_dict()
    return Conversion(
        file, own, {name: piece for name, piece in pieces.items() if name in known}, lambda _: False, dtype
    )
