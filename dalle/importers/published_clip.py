"""Published CLIPs become a model folder: Hugging Face's and open_clip's folders of safetensors.

Source: the formats of `transformers.CLIPModel` (ViTs only) and of open_clip's `CLIP`, whose names are OpenAI's. Sizes
are read off the tensors' shapes; the activation and the pixel statistics, which no shape tells, off the folder's own
settings, and never guessed.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle.clip import CLIP, HEAD_WIDTH, OPENAI_MEAN, OPENAI_STD, CLIPConfig
from dalle.clip_tokenizer import CLIPTokenizer
from dalle.config import validate
from dalle.files import atomic_folder, read_json
from dalle.model_folder import write_ranker_index
from dalle.weights import load_strict, load_tensors

HUGGINGFACE_NAMES = (  # theirs -> OpenAI's, in this order
    (r"^text_model\.embeddings\.token_embedding\.weight$", "token_embedding.weight"),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.weight$", "visual.conv1.weight"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),  # their spelling
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_projection\.weight$", "text_projection"),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.self_attn\.", ".attn."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
TRANSPOSED = ("visual.proj", "text_projection")  # linear layers there, bare matrices here


def import_huggingface_clip(folder: Path, out: Path) -> None:
    """Write the model folder `out` from one of `transformers.CLIPModel`; ValueError where it is another model."""
    settings = _settings(folder / "config.json")
    if settings.get("model_type") != "clip":
        raise ValueError(f"{folder}: config.json is of a {settings.get('model_type')!r} model, not of a clip")
    parts = [settings.get(part) or {} for part in ("text_config", "vision_config")]
    activations = {
        part.get("hidden_act", "quick_gelu") for part in parts
    }  # quick_gelu: transformers' default
    if len(activations) != 1:
        raise ValueError(f"{folder}: the towers' activations differ: {', '.join(sorted(activations))}")
    pixels = folder / "preprocessor_config.json"
    statistics = _settings(pixels) if pixels.is_file() else {}
    state = from_huggingface(load_tensors(folder / "model.safetensors"))
    heads = [part.get("num_attention_heads") for part in parts]
    config = config_of(
        state,
        activation=activations.pop(),
        image_mean=statistics.get("image_mean"),
        image_std=statistics.get("image_std"),
        source=str(folder),
    )
    for width, n_heads in zip((config.text_width, config.image_width), heads, strict=True):
        if n_heads is not None and width != HEAD_WIDTH * n_heads:
            raise ValueError(
                f"{folder}: {n_heads} heads at width {width}; only heads of {HEAD_WIDTH} are read"
            )
    tokenizer = CLIPTokenizer.from_huggingface(folder / "tokenizer.json", config.n_text_tokens)
    write_clip(config, state, tokenizer, out, str(folder))


def import_open_clip(folder: Path, merges: Path, out: Path) -> None:
    """Write `out` from open_clip's `open_clip_config.json` and `open_clip_model.safetensors`.

    `merges` is OpenAI's bpe_simple_vocab_16e6.txt.gz, which such folders lack. ValueError for other towers than
    OpenAI's.
    """
    settings = _settings(folder / "open_clip_config.json")
    model, pixels = settings.get("model_cfg") or {}, settings.get("preprocess_cfg") or {}
    state = {
        name.removeprefix("module."): x
        for name, x in load_tensors(folder / "open_clip_model.safetensors").items()
    }
    config = config_of(
        state,
        activation="quick_gelu" if model.get("quick_gelu", False) else "gelu",
        image_mean=pixels.get("mean"),
        image_std=pixels.get("std"),
        source=str(folder),
    )
    write_clip(config, state, CLIPTokenizer.from_openai(merges, config.n_text_tokens), out, str(folder))


def write_clip(
    config: CLIPConfig, state: Mapping[str, Tensor], tokenizer: CLIPTokenizer, out: Path, source: str
) -> None:
    """Write a model folder with a CLIP and its tokenizer; ValueError when the tensors do not fit."""
    if tokenizer.n_vocab != config.n_text_vocab:
        raise ValueError(
            f"{source}: the tokenizer has {tokenizer.n_vocab} ids, the text tower {config.n_text_vocab}"
        )
    with torch.device("meta"):
        model = CLIP(config)
    model.to_empty(device="cpu")
    load_strict(model, {name: x.float() if x.is_floating_point() else x for name, x in state.items()}, source)
    with atomic_folder(out) as folder:
        model.save_pretrained(folder / "clip")
        tokenizer.save_pretrained(folder / "clip")
        write_ranker_index(folder)


def from_huggingface(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a `transformers.CLIPModel` under OpenAI's names and in their shapes."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("position_ids"):  # a counter that older versions saved
            continue
        for theirs, ours in HUGGINGFACE_NAMES:
            name = re.sub(theirs, ours, name)
        renamed[name] = tensor.T.contiguous() if name in TRANSPOSED else tensor
    for name in [name for name in renamed if ".attn.q_proj." in name]:
        kind = name.rpartition(".")[2]
        names = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
        if not all(part in renamed for part in names):
            raise ValueError(f"{name} stands without its key and value projections")
        renamed[name.replace(f"q_proj.{kind}", f"in_proj_{kind}")] = torch.cat(
            [renamed.pop(n) for n in names]
        )
    return renamed


def config_of(
    state: Mapping[str, Tensor],
    *,
    activation: str,
    image_mean: object = None,
    image_std: object = None,
    source: str,
) -> CLIPConfig:
    """Read the sizes off a state dict under OpenAI's names; ValueError when it is none of a CLIP."""
    try:
        is_vit = "visual.proj" in state
        tree: dict[str, Any] = {
            "d_embed": state["text_projection"].shape[1],
            "n_text_tokens": state["positional_embedding"].shape[0],
            "n_text_vocab": state["token_embedding.weight"].shape[0],
            "text_width": state["ln_final.weight"].shape[0],
            "text_layers": _count(state, r"transformer\.resblocks\.(\d+)\."),
            "text_tokens": "openai",
            "activation": activation,
            "loss": "siglip" if "logit_bias" in state else "infonce",
            "image_mean": list(OPENAI_MEAN if image_mean is None else image_mean),  # type: ignore[call-overload]
            "image_std": list(OPENAI_STD if image_std is None else image_std),  # type: ignore[call-overload]
            "image_tower": "vit" if is_vit else "resnet",
        }
        if is_vit:
            width, _, patch, _ = state["visual.conv1.weight"].shape
            grid = math.isqrt(state["visual.positional_embedding"].shape[0] - 1)
            tree |= {"image_width": width, "patch_size": patch, "image_size": patch * grid}
            tree["image_layers"] = _count(state, r"visual\.transformer\.resblocks\.(\d+)\.")
        else:
            grid = math.isqrt(state["visual.attnpool.positional_embedding"].shape[0] - 1)
            tree |= {"image_width": state["visual.layer1.0.conv1.weight"].shape[0], "image_size": 32 * grid}
            tree["image_layers"] = [_count(state, rf"visual\.layer{stage}\.(\d+)\.") for stage in range(1, 5)]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source} holds no CLIP with OpenAI's towers: {error} is missing or misshapen"
        ) from error
    return validate(CLIPConfig, tree, source)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = read_json(path)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings")
    return settings
