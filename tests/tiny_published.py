"""Small models of the published families with random weights, and checkpoints in their formats, without their code."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from torch import Tensor, nn

from dalle.data.shapes import COLOURS, SHAPES
from dalle.pipeline import DallePipeline
from dalle.published.captions import CaptionTokenizer, CaptionTokenizerConfig
from dalle.published.dalle_pytorch import DallePytorch, DallePytorchConfig
from dalle.published.min_dalle import MinDalle, MinDalleConfig
from dalle.published.min_dalle_e import MinDalleE, MinDalleEConfig
from dalle.published.ru_dalle import RuDalle, RuDalleConfig
from dalle.published.vqgan import VQGAN, VQGANConfig

N_TEXT, N_VOCAB, GRID, N_CODES = 8, 60, 4, 64
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread, and wait long for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shaken(model: Any, seed: int = 0) -> Any:
    """Draw every parameter anew from a fixed seed, so that each output depends on each input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.ndim == 1 and not name.endswith("bias")
            parameter.copy_(1 + 0.1 * drawn if is_gain else drawn * (0.1 if parameter.ndim != 2 else 0.4))
        for name, buffer in model.named_buffers():
            if name == "angles":
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return model.eval()


def tiny_vqgan(**changes: Any) -> VQGAN:
    """32 px pictures as 4x4 tokens of 64."""
    settings = {
        "image_size": 32,
        "n_codes": N_CODES,
        "d_code": 8,
        "d_latent": 8,
        "d_hidden": 32,
        "multipliers": (1, 1, 1, 1),
        "n_blocks": 1,
        "attention_sizes": (4,),
        "quantizer": "nearest",
    }
    return shaken(VQGAN(VQGANConfig.model_validate(settings | changes)))  # type: ignore[no-any-return]


def tiny_min_dalle(**changes: Any) -> MinDalle:
    settings = {
        "n_layers": 2,
        "n_heads": 2,
        "d_model": 16,
        "d_gated": 24,
        "n_text_tokens": N_TEXT,
        "n_text_vocab": N_VOCAB,
        "n_image_vocab": N_CODES,
        "n_image_ids": N_CODES + 1,
        "grid_size": GRID,
        "start_token": N_CODES,
    }
    return shaken(MinDalle(MinDalleConfig.model_validate(settings | changes)))  # type: ignore[no-any-return]


def tiny_dalle_pytorch(**changes: Any) -> DallePytorch:
    settings = {
        "n_layers": 4,
        "n_heads": 2,
        "d_head": 8,
        "d_model": 16,
        "n_text_tokens": N_TEXT,
        "n_text_vocab": N_VOCAB,
        "n_image_vocab": N_CODES,
        "grid_size": GRID,
        "attention": ("axial_row", "axial_col", "conv_like", "full"),
        "conv_kernel": 3,
        "is_rotary": True,
        "n_angles": 6,
        "shifts_tokens": True,
    }
    return shaken(DallePytorch(DallePytorchConfig.model_validate(settings | changes)))  # type: ignore[no-any-return]


def _gpt(**changes: Any) -> dict[str, Any]:
    settings = {
        "n_layers": 3,
        "n_heads": 2,
        "d_model": 16,
        "n_text_tokens": N_TEXT,
        "n_text_vocab": N_VOCAB,
        "n_image_vocab": N_CODES,
        "grid_size": GRID,
    }
    return settings | changes


def tiny_ru_dalle(**changes: Any) -> RuDalle:
    settings = _gpt(has_start=True, conv_wraps=True) | changes
    return shaken(RuDalle(RuDalleConfig.model_validate(settings)))  # type: ignore[no-any-return]


def tiny_min_dalle_e(**changes: Any) -> MinDalleE:
    settings = _gpt(pad_id=3) | changes
    return shaken(MinDalleE(MinDalleEConfig.model_validate(settings)))  # type: ignore[no-any-return]


# One of each kind of token model, and the switches that change how one draws.
TOKEN_MODELS = {
    "min-dalle": tiny_min_dalle,
    "dalle-pytorch": tiny_dalle_pytorch,
    "dalle-pytorch, learned positions": lambda: tiny_dalle_pytorch(
        is_rotary=False, n_angles=0, shifts_tokens=False, has_sandwich_norms=True
    ),
    "dalle-pytorch, reversible": lambda: tiny_dalle_pytorch(is_reversible=True, is_tied=True, is_stable=True),
    "ru-dalle v2": tiny_ru_dalle,
    "ru-dalle v3": lambda: tiny_ru_dalle(has_start=False, conv_wraps=False),
    "minDALL-E": tiny_min_dalle_e,
}


def taming_state(model: VQGAN) -> dict[str, Tensor]:
    """The tensors of a VQGAN under taming's names."""
    last = len(model.config.multipliers) - 1
    is_gumbel = model.config.quantizer == "gumbel"
    renames = (
        (r"^to_code\.", "quant_conv."),
        (r"^from_code\.", "post_quant_conv."),
        (r"^codebook\.", "quantize.embed." if is_gumbel else "quantize.embedding."),
        (r"^to_logits\.", "quantize.proj."),
        (r"\.(norm|conv)_([12])\.", r".\1\2."),
        (r"^(encoder|decoder)\.input\.", r"\1.conv_in."),
        (r"^(encoder|decoder)\.output\.", r"\1.conv_out."),
        (r"^(encoder|decoder)\.norm\.", r"\1.norm_out."),
        (r"\.middle\.attention\.", ".mid.attn_1."),
        (r"\.middle\.", ".mid."),
        (r"\.attention\.", ".attn."),
        (r"\.out\.", ".proj_out."),
        (r"\.shortcut\.", ".nin_shortcut."),
        (r"\.blocks\.", ".block."),
    )
    state = {}
    for name, tensor in model.state_dict().items():
        side = "down" if name.startswith("encoder") else "up"
        if side == "up":
            name = re.sub(r"(?<=levels\.)\d+", lambda match: str(last - int(match[0])), name)
        name = name.replace(".resize.", f".{side}sample.").replace(".levels.", f".{side}.")
        for ours, theirs in renames:
            name = re.sub(ours, theirs, name)
        state[name] = tensor
    return state


def bart_vocabulary(folder: Path) -> tuple[Path, Path]:
    """vocab.json and merges.txt in min-dalle's form, with fewer than N_VOCAB entries."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "Ġ", *LETTERS, "Ġa", "re", "red"]
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps({word: i for i, word in enumerate(words)}))
    merges.write_text("#version: 0.2\nĠ a\nr e\nre d\n")
    return vocab, merges


def count(model: nn.Module) -> int:
    """Parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def caption_tokenizer(pad_id: int) -> CaptionTokenizer:
    """Words and letters to ids below N_VOCAB; 0 to 3 are specials."""
    words = ["<pad>", "<unk>", "<s>", "</s>", *LETTERS, "apple", "boat", "cats", "two", *COLOURS, *SHAPES]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    bpe = tokenizers.Tokenizer(model)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    config = CaptionTokenizerConfig(
        max_tokens=N_TEXT, n_vocab=N_VOCAB, before=(2,), after=(3,), pad_id=pad_id
    )
    return CaptionTokenizer(bpe.to_str(), config)


def published_pipe(name: str, **parts: Any) -> DallePipeline:
    """A pipeline around one of TOKEN_MODELS."""
    model = TOKEN_MODELS[name]()
    pad_id = getattr(model.config, "pad_id", 0)
    return DallePipeline(caption_tokenizer(pad_id), parts.pop("dvae", None) or tiny_vqgan(), model, **parts)
