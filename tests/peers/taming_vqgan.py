"""Write checkpoints of taming's VQGANs with random weights, and what they compute. Run: python taming_vqgan.py FOLDER"""

import sys
from pathlib import Path

import torch
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.vqvae.quantize import GumbelQuantize, VectorQuantizer2
from torch import nn

SIZES = {
    "double_z": False,
    "z_channels": 32,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": (1, 2, 2),
    "num_res_blocks": 2,
    "attn_resolutions": (8,),
    "dropout": 0.0,
}


class VQ(nn.Module):
    """taming's VQModel and GumbelVQ without Lightning and losses."""

    def __init__(self, is_gumbel: bool, d_code: int = 16, n_codes: int = 48) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(**SIZES), Decoder(**SIZES)
        quantizer = (
            GumbelQuantize(d_code, d_code, n_codes) if is_gumbel else VectorQuantizer2(n_codes, d_code, 0.25)
        )
        self.quantize = quantizer
        self.quant_conv = nn.Conv2d(32, d_code, 1)
        self.post_quant_conv = nn.Conv2d(d_code, 32, 1)


folder = Path(sys.argv[1])
images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
tokens = torch.randint(48, (2, 8, 8), generator=torch.Generator().manual_seed(1))
for name in ("nearest", "gumbel"):
    torch.manual_seed(2)
    model = VQ(name == "gumbel").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        codebook = model.quantize.embed if name == "gumbel" else model.quantize.embedding
        codebook.weight.normal_()
        latents = model.quant_conv(model.encoder(2 * images - 1))
        if name == "gumbel":
            # What ru-dalle does in place of sampling.
            found = model.quantize.proj(latents).argmax(dim=1)
        else:
            found = model.quantize(latents)[2][2].view(2, 8, 8)
        pixels = model.decoder(model.post_quant_conv(codebook(tokens).permute(0, 3, 1, 2)))
    state = {**model.state_dict(), "loss.discriminator.weight": torch.zeros(3)}
    # A Lightning checkpoint holds more than weights: here, a class of its own.
    torch.save(
        {"state_dict": state, "epoch": 3, "callbacks": {VQ: {"best": Path("x")}}}, folder / f"{name}.ckpt"
    )
    expected = {"images": images, "tokens": tokens, "latents": latents, "encoded": found, "pixels": pixels}
    torch.save(expected, folder / f"{name}_expected.pt")
lines = "model:\n  params:\n    embed_dim: 16\n    ddconfig:\n      resolution: 32\n      ch: 32\n"
(folder / "config.yaml").write_text(lines)
