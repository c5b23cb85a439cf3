"""Write small ru-dalle models of both versions with random weights, and what they compute.

Run: python ru_dalle_models.py FOLDER
"""

import sys
import types
from pathlib import Path

import torch
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.vqvae.quantize import GumbelQuantize
from torch import nn

# Importing `rudalle` itself needs names that Hugging Face's libraries no longer have.
root = next(Path(path) / "rudalle" for path in sys.path if (Path(path) / "rudalle").is_dir())
for name, path in (("rudalle", root), ("rudalle.dalle", root / "dalle")):
    module = types.ModuleType(name)
    module.__path__ = [str(path)]
    sys.modules[name] = module
from rudalle.dalle.model import DalleModel  # noqa: E402

folder = Path(sys.argv[1])
torch.set_num_threads(1)
N_TEXT, GRID, N_CODES, N_VOCAB = 6, 12, 24, 40
SIZES = {
    "num_layers": 4,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "embedding_dropout_prob": 0.0,
    "output_dropout_prob": 0.0,
    "attention_dropout_prob": 0.0,
    "text_seq_length": N_TEXT,
    "image_tokens_per_dim": GRID,
    "image_vocab_size": N_CODES,
    "vocab_size": N_VOCAB + N_TEXT,
    "cogview_sandwich_layernorm": True,
    "cogview_pb_relax": True,
}
text = torch.randint(1, N_VOCAB, (2, N_TEXT), generator=torch.Generator().manual_seed(0))
text[1, 3:] = 0
image = torch.randint(N_CODES, (2, GRID * GRID), generator=torch.Generator().manual_seed(1))
total = N_TEXT + GRID * GRID
for version in ("v2", "v3"):
    torch.manual_seed(2)
    model = DalleModel("cpu", **SIZES, hf_version=version, is_bool_mask=version == "v3").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        mask = torch.tril(torch.ones(2, 1, total, total))
        logits, _ = model(torch.cat([text, image], dim=1), mask)
        loss, _ = model(torch.cat([text, image], dim=1), mask, return_loss=True)
        # As its generate_images does it: one token after another, by its own cache.
        drawn, cache = text.clone(), None
        for _ in range(GRID * GRID):
            step, cache = model(drawn, mask, use_cache=True, cache=cache)
            drawn = torch.cat([drawn, step[:, -1:, N_VOCAB + N_TEXT :].argmax(dim=-1)], dim=1)
    torch.save(model.state_dict(), folder / f"{version}.bin")
    expected = {"text": text, "image": image, "logits": logits, "loss": loss, "drawn": drawn[:, N_TEXT:]}
    torch.save(expected, folder / f"{version}_expected.pt")

vae = {
    "double_z": False,
    "z_channels": 8,
    "resolution": 8 * GRID,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": (1, 1, 1, 1),
    "num_res_blocks": 1,
    "attn_resolutions": (GRID,),
    "dropout": 0.0,
}
vqgan = nn.Module()
vqgan.encoder, vqgan.decoder, vqgan.quantize = Encoder(**vae), Decoder(**vae), GumbelQuantize(8, 8, N_CODES)
vqgan.quant_conv, vqgan.post_quant_conv = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
torch.save({"state_dict": vqgan.state_dict()}, folder / "vqgan.ckpt")

# A model file of YouTokenToMe: characters, merges, specials (unknown, pad, start, end).
letters = "▁абвгде"
characters = [f"{ord(letter)} {4 + i}" for i, letter in enumerate(letters)]
merges = ["4 5 11", "6 7 12", "11 12 13", "5 6 14"]  # ▁а, бв, ▁абв, аб
lines = [f"{len(characters)} {len(merges)}", *characters, *merges, "1 0 2 3", ""]
(folder / "bpe.model").write_text("\n".join(lines))
