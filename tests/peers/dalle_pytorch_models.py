"""Write DALLE-pytorch models of every kind with random weights, and what they compute.

Run: python dalle_pytorch_models.py FOLDER
"""

import sys
import types
from pathlib import Path

import torch

# The package asks for its own version by what setuptools no longer has, and for taming's VQGAN at import.
pkg_resources = types.ModuleType("pkg_resources")
pkg_resources.get_distribution = lambda name: types.SimpleNamespace(version="1.6.6")
vqgan = types.ModuleType("taming.models.vqgan")
vqgan.VQModel = vqgan.GumbelVQ = type("Absent", (), {})
sys.modules |= {
    "pkg_resources": pkg_resources,
    "taming": types.ModuleType("taming"),
    "taming.models": types.ModuleType("taming.models"),
    "taming.models.vqgan": vqgan,
}
from dalle_pytorch import DALLE, DiscreteVAE  # noqa: E402

folder = Path(sys.argv[1])
torch.set_num_threads(1)
VAE = {
    "image_size": 16,
    "num_layers": 2,
    "num_tokens": 24,
    "codebook_dim": 8,
    "hidden_dim": 12,
    "num_resnet_blocks": 1,
}
BASE = {"num_text_tokens": 40, "text_seq_len": 6, "dim": 32, "depth": 4, "heads": 2, "dim_head": 24}
LEARNED = {"rotary_emb": False, "shift_tokens": False}
MODELS = {
    "default": {"shift_tokens": True, "rotary_emb": True},
    "full": {"attn_types": ("full",), **LEARNED},
    "axial_row": {"attn_types": ("axial_row",), **LEARNED},
    "axial_col": {"attn_types": ("axial_col",), **LEARNED},
    "conv_like": {"attn_types": ("conv_like",), **LEARNED},
    "mixed": {
        "attn_types": ("axial_row", "axial_col", "conv_like", "full"),
        "shift_tokens": True,
        "rotary_emb": True,
        "sandwich_norm": True,
        "stable": True,
    },
    "reversible": {"reversible": True, "shift_tokens": True, "rotary_emb": True},
    "tied": {"share_input_output_emb": True, "shift_tokens": False, "rotary_emb": True},
}


def shake(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if name.endswith("scale") else 0.1))
    return model.eval()


text = torch.randint(1, 40, (2, 6), generator=torch.Generator().manual_seed(0))
text[1, 3:] = 0
image = torch.randint(24, (2, 16), generator=torch.Generator().manual_seed(1))
for blocks in (0, 1):
    torch.manual_seed(3)
    params = VAE | {"num_resnet_blocks": blocks}
    vae = shake(DiscreteVAE(**params))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = {
            "images": images,
            "tokens": image,
            "logits": vae(images, return_logits=True),
            "encoded": vae.get_codebook_indices(images),
            "decoded": vae.decode(image),
        }
    torch.save({"hparams": params, "weights": vae.state_dict()}, folder / f"vae{blocks}.pt")
    torch.save(expected, folder / f"vae{blocks}_expected.pt")

for name, options in MODELS.items():
    torch.manual_seed(4)
    hparams = BASE | options
    model = shake(DALLE(vae=vae, **hparams))
    with torch.no_grad():
        logits = model(text.clone(), image)
        loss = model(text.clone(), image, return_loss=True)
    checkpoint = {
        "hparams": hparams,
        "vae_params": params,
        "epoch": 1,
        "version": "1.6.6",
        "vae_class_name": "DiscreteVAE",
        "weights": model.state_dict(),
        "opt_state": {"state": {0: {"step": 1, "exp_avg": torch.zeros(3)}}},
        "scheduler_state": None,
    }
    torch.save(checkpoint, folder / f"{name}.pt")
    torch.save({"text": text, "image": image, "logits": logits, "loss": loss}, folder / f"{name}_expected.pt")
