"""CLIP: an image tower and a text tower whose unit vectors agree where a caption fits a picture.

Source: Radford et al. 2021 (arXiv 2103.00020), §2.3-2.5 and Fig. 3; parameter names and what the paper leaves open are
those of OpenAI's released `clip/model.py`, so that published weights load strictly. SigLIP: Zhai et al. 2023 (arXiv
2303.15343), Alg. 1.

Shapes: B batch, H = W image side, P patch side, N image positions, T text slots, C width of a tower, H heads, D head
width, E width of the shared embedding. Images are float in [0, 1].
"""

import math
from collections import OrderedDict
from os import PathLike
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dalle.config import Config, validate
from dalle.weights import load_module, load_strict, save_component

HEAD_WIDTH = 64  # of every attention head in all released models
MAX_LOGIT_SCALE = math.log(100)  # §2.5: "clipped to prevent scaling the logits by more than 100"
FIRST_LOGIT_SCALE = math.log(1 / 0.07)  # §2.5
OPENAI_MEAN, OPENAI_STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # of R, G, B
EXPANSION = 4  # a bottleneck's output channels over its planes

PositiveInt = Annotated[int, Field(gt=0)]


class CLIPConfig(Config):
    """Sizes of a `CLIP`, and what no tensor's shape tells; ValueError when they do not fit together."""

    d_embed: PositiveInt  # width E of the shared embedding
    image_size: PositiveInt  # pixels a side
    image_tower: Literal["vit", "resnet"]
    image_layers: (
        PositiveInt | tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]
    )  # blocks (of each stage)
    image_width: PositiveInt  # of the ViT, or of the ResNet's stem
    patch_size: PositiveInt | None = None  # pixels a side, of the ViT only
    n_text_tokens: PositiveInt  # text slots T (OpenAI: 77)
    n_text_vocab: PositiveInt  # BPE entries, specials included (OpenAI: 49408)
    text_layers: PositiveInt
    text_width: PositiveInt
    # Whose tokens: OpenAI's end in the largest id and are filled up with 0; ours have one pad id per position, and
    # the last that is no pad speaks for the caption.
    text_tokens: Literal["openai", "dalle"]
    activation: Literal[
        "quick_gelu", "gelu"
    ]  # of both towers' MLPs; OpenAI's released weights need quick_gelu
    loss: Literal["infonce", "siglip"] = "infonce"  # siglip has a learned bias besides the scale
    image_mean: tuple[float, float, float] = OPENAI_MEAN
    image_std: tuple[float, float, float] = OPENAI_STD

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.text_width % HEAD_WIDTH:
            raise ValueError(f"text_width is {self.text_width}; it must be a multiple of {HEAD_WIDTH}")
        if self.image_tower == "vit":
            if isinstance(self.image_layers, tuple) or self.patch_size is None:
                raise ValueError("image_tower vit needs one number for image_layers, and a patch_size")
            if self.image_size % self.patch_size:
                raise ValueError(
                    f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}"
                )
            if self.image_width % HEAD_WIDTH:
                raise ValueError(f"image_width is {self.image_width}; it must be a multiple of {HEAD_WIDTH}")
        else:
            if not isinstance(self.image_layers, tuple) or self.patch_size is not None:
                raise ValueError("image_tower resnet needs four numbers for image_layers, and no patch_size")
            if self.image_size % 32:
                raise ValueError(f"image_size is {self.image_size}; a resnet needs a multiple of 32")
            if self.image_width % 2:
                raise ValueError(f"image_width is {self.image_width}; a resnet needs an even one")
        return self

    @property
    def n_text_ids(self) -> int:
        """Rows of the token table: BPE entries, and our pads."""
        return self.n_text_vocab + (self.n_text_tokens if self.text_tokens == "dalle" else 0)


# --- transformer blocks, shared by the ViT and the text tower ---


class LayerNorm(nn.LayerNorm):
    """Layer normalisation in float32 whatever comes in, as in OpenAI's code."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): at most 0.0203 from GELU, but enough to spoil weights trained with the other."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head attention with the parameter names of `nn.MultiheadAttention`."""

    def __init__(self, width: int, is_causal: bool) -> None:
        super().__init__()
        self.n_heads, self.is_causal = width // HEAD_WIDTH, is_causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        heads = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, N, 3 C)
        heads = heads.view(*x.shape[:2], 3, self.n_heads, -1)  # (B, N, 3, H, D)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D) each
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)  # (B, H, N, D)
        out: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))  # (B, N, C)
        return out


class ResidualAttentionBlock(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)), the MLP four times as wide inside."""

    def __init__(self, width: int, activation: str, is_causal: bool) -> None:
        super().__init__()
        self.attn = Attention(width, is_causal)
        self.ln_1 = LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict[str, nn.Module](
                c_fc=nn.Linear(width, 4 * width),
                gelu=QuickGELU() if activation == "quick_gelu" else nn.GELU(),
                c_proj=nn.Linear(4 * width, width),
            )
        )
        self.ln_2 = LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class Blocks(nn.Module):
    """A stack of residual blocks, under OpenAI's name `resblocks`."""

    def __init__(self, width: int, n_layers: int, activation: str, is_causal: bool) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, activation, is_causal) for _ in range(n_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


# --- image towers ---


class VisionTransformer(nn.Module):
    """Normalised images (B, 3, H, H) -> embeddings (B, E): patches, a class token, pre-LN blocks (§2.4)."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        width, patch = config.image_width, config.patch_size
        assert patch is not None and isinstance(config.image_layers, int)  # the config's validator said so
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        n_positions = (config.image_size // patch) ** 2 + 1
        self.positional_embedding = nn.Parameter(scale * torch.randn(n_positions, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Blocks(width, config.image_layers, config.activation, is_causal=False)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, config.d_embed))

    def features(self, x: Tensor) -> Tensor:
        """What a linear probe reads (App. A.3): the class token before the projection, (B, C)."""
        patches = self.conv1(x).flatten(2).transpose(1, 2)  # (B, N - 1, C)
        x = torch.cat([self.class_embedding.to(patches).expand(len(x), 1, -1), patches], dim=1)  # (B, N, C)
        x = self.transformer(self.ln_pre(x + self.positional_embedding.to(x.dtype)))
        out: Tensor = self.ln_post(x[:, 0])  # (B, C)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x) @ self.proj


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around an identity; all striding is an average pool before a convolution."""

    def __init__(self, n_in: int, planes: int, stride: int) -> None:
        super().__init__()
        n_out = planes * EXPANSION
        self.conv1, self.bn1 = nn.Conv2d(n_in, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(planes, n_out, 1, bias=False), nn.BatchNorm2d(n_out)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or n_in != n_out:
            layers = OrderedDict[str, nn.Module]()
            layers["-1"] = nn.AvgPool2d(stride)
            layers["0"] = nn.Conv2d(n_in, n_out, 1, bias=False)
            layers["1"] = nn.BatchNorm2d(n_out)
            self.downsample = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        return F.relu(out + self.downsample(x))


class AttentionPool2d(nn.Module):
    """One attention layer whose only query is the mean over the picture (§2.4): (B, C, h, w) -> (B, E)."""

    def __init__(self, side: int, width: int, n_heads: int, d_embed: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, width) / width**0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, d_embed)
        for projection in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(projection.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)  # (B, h w, C)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # (B, N, C)
        x = x + self.positional_embedding.to(x.dtype)
        q, k, v = (
            projection(part).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, 1 or N, D)
            for projection, part in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        out: Tensor = self.c_proj(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1)
        )  # (B, E)
        return out


class ModifiedResNet(nn.Module):
    """Normalised images (B, 3, H, H) -> embeddings (B, E): three-convolution stem, blur pools, attention pool (§2.4)."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        width, layers = config.image_width, config.image_layers
        assert isinstance(layers, tuple)  # the config's validator said so
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        n_in = width
        for stage, n_blocks in enumerate(layers):
            planes, blocks = width * 2**stage, []
            for block in range(n_blocks):
                blocks.append(Bottleneck(n_in, planes, stride=2 if stage and not block else 1))
                n_in = planes * EXPANSION
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool2d(config.image_size // 32, n_in, n_in // HEAD_WIDTH, config.d_embed)
        for name, parameter in self.named_parameters():
            if name.startswith("layer") and name.endswith("bn3.weight"):
                nn.init.zeros_(parameter)  # residual branches start at nothing

    def features(self, x: Tensor) -> Tensor:
        """What a linear probe reads: the attention pool's output, (B, E)."""
        return self.forward(x)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        x = F.avg_pool2d(x, 2)  # (B, C, H / 4, H / 4)
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        out: Tensor = self.attnpool(x)  # from (B, 32 C, H / 32, H / 32)
        return out


# --- the model and its losses ---


class CLIP(nn.Module):
    """Both towers, and the scale of their cosines (§2.3)."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        width = config.text_width
        self.visual = VisionTransformer(config) if config.image_tower == "vit" else ModifiedResNet(config)
        self.transformer = Blocks(width, config.text_layers, config.activation, is_causal=True)
        self.token_embedding = nn.Embedding(config.n_text_ids, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.n_text_tokens, width))
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, config.d_embed))
        self.logit_scale = nn.Parameter(torch.tensor(FIRST_LOGIT_SCALE))
        if config.loss == "siglip":
            self.logit_bias = nn.Parameter(
                torch.tensor(-10.0)
            )  # right for a batch of 22,000; see `set_bias_`
        self.init_text_tower()

    @torch.no_grad()
    def init_text_tower(self) -> None:
        """Draw the text tower's weights as OpenAI's code does; that code leaves the ViT at PyTorch's defaults."""
        width, depth = self.config.text_width, self.config.text_layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        for block in self.transformer.resblocks:
            residual_std = width**-0.5 * (2 * depth) ** -0.5
            nn.init.normal_(block.get_parameter("attn.in_proj_weight"), std=width**-0.5)
            nn.init.normal_(block.get_parameter("attn.out_proj.weight"), std=residual_std)
            nn.init.normal_(block.get_parameter("mlp.c_fc.weight"), std=(2 * width) ** -0.5)
            nn.init.normal_(block.get_parameter("mlp.c_proj.weight"), std=residual_std)

    def fit(self, images: Tensor) -> Tensor:
        """Square images (B, 3, side, side) in [0, 1] at the model's size: bicubic, antialiased, as OpenAI's are."""
        side = self.config.image_size
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; CLIP reads squares (batch, 3, side, side)"
            )
        return resized(images, side)

    def normalize_images(self, images: Tensor) -> Tensor:
        """Square images (B, 3, side, side) in [0, 1] as the image tower reads them."""
        images = self.fit(images)
        mean, std = (
            images.new_tensor(x).view(1, 3, 1, 1) for x in (self.config.image_mean, self.config.image_std)
        )
        return (images - mean) / std

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit vectors (B, E), float32, of square images (B, 3, side, side) in [0, 1]."""
        embedded: Tensor = self.visual(self.normalize_images(images).to(self.text_projection.dtype))
        return F.normalize(embedded.float(), dim=-1)

    def encode_text(self, text: Tensor) -> Tensor:
        """Unit vectors (B, E), float32, of padded captions (B, T) int64; ValueError for another shape or no end."""
        end = self.end_of(text)
        x = self.token_embedding(text) + self.positional_embedding
        x = self.ln_final(self.transformer(x))  # (B, T, C)
        x = x[torch.arange(len(x), device=x.device), end]  # (B, C)
        return F.normalize((x @ self.text_projection).float(), dim=-1)

    def end_of(self, text: Tensor) -> Tensor:
        """The slot (B,) whose state speaks for the caption: it has seen all of it, and no pad."""
        if text.ndim != 2 or text.shape[1] != self.config.n_text_tokens:
            raise ValueError(
                f"text has shape {tuple(text.shape)}; this CLIP reads (batch, {self.config.n_text_tokens}): pad it"
            )
        if self.config.text_tokens == "openai":
            is_end = text == self.config.n_text_vocab - 1
            if not bool(is_end.any(dim=1).all()):
                raise ValueError(f"text has no end-of-text token {self.config.n_text_vocab - 1} in some row")
            return is_end.int().argmax(dim=1)  # the first; the largest id would do only without added tokens
        n_real = (text < self.config.n_text_vocab).sum(dim=1)
        return (n_real - 1).clamp(min=0)  # the empty caption is its first pad

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """Logits (B images, B texts), float32: scaled cosines, plus SigLIP's bias where there is one."""
        logits = self.logit_scale.float().exp() * self.encode_image(images) @ self.encode_text(text).T
        return logits + self.logit_bias if self.config.loss == "siglip" else logits

    def pair_loss(self, image_vectors: Tensor, text_vectors: Tensor) -> Tensor:
        """The loss of unit vectors (B, E) whose rows belong together, by the config's rule: a scalar."""
        scale = self.logit_scale.float().exp()
        if self.config.loss == "siglip":
            return siglip_loss(image_vectors, text_vectors, scale, self.logit_bias.float())
        return infonce_loss(image_vectors, text_vectors, scale)

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Keep the scale at 100 or less and at 1 or more: to be called after every update (§2.5)."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    @torch.no_grad()
    def set_bias_(self, batch_size: int) -> None:
        """Start SigLIP's bias where sigmoid(bias) is the share of true pairs, 1 / batch_size."""
        self.logit_bias.fill_(-math.log(max(batch_size - 1, 1)))

    def at_image_size(self, image_size: int) -> "CLIP":
        """This model for pictures of another size, to be trained on: as the paper's ViT-L/14 at 336 px (§3.2).

        Its table of positions is resized as open_clip does, bicubic and antialiased. ValueError for a size that does
        not fit.
        """
        config = validate(CLIPConfig, self.config.model_dump() | {"image_size": image_size}, "clip")
        state = self.state_dict()
        name = "visual." + ("" if config.image_tower == "vit" else "attnpool.") + "positional_embedding"
        stride = 32 if config.patch_size is None else config.patch_size
        state[name] = resized_positions(state[name], image_size // stride)
        model = CLIP(config).to(self.text_projection)
        load_strict(model, state, "clip")
        return model

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str]) -> Self:
        """Read config.json and model.safetensors of a component folder; ValueError when they are damaged."""
        return load_module(folder, CLIPConfig, cls, "clip")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors to a component folder."""
        save_component(Path(folder), self.config, self.state_dict())


def resized(images: Tensor, side: int) -> Tensor:
    """Square images (B, 3, H, H) in [0, 1] at (side, side): bicubic, antialiased; themselves at the right size."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)


def resized_positions(table: Tensor, side: int) -> Tensor:
    """Position vectors (1 + h * h, C), the first of which has no place, for a grid of `side`: (1 + side * side, C)."""
    first, places = table[:1], table[1:]
    old = math.isqrt(len(places))
    if old == side:
        return table
    grid = places.float().T.reshape(1, -1, old, old)  # (1, C, h, h)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
    return torch.cat([first, grid.flatten(2)[0].T.to(table.dtype)])


def infonce_loss(image_vectors: Tensor, text_vectors: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy over all B * B pairs (Fig. 3), nats; ln B where nothing is known."""
    logits = scale * image_vectors @ text_vectors.T  # (B, B)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def siglip_loss(image_vectors: Tensor, text_vectors: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """-sum over all pairs of ln sigmoid(± logit), over B (Zhai et al. 2023, Alg. 1), nats."""
    logits = scale * image_vectors @ text_vectors.T + bias  # (B, B)
    sign = 2 * torch.eye(len(logits), device=logits.device) - 1  # +1 on the diagonal
    return -F.logsigmoid(sign * logits).sum() / len(logits)
