"""CLIP: the published sizes, where it looks, its losses and its files."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.clip import (
    CLIP,
    MAX_LOGIT_SCALE,
    CLIPConfig,
    QuickGELU,
    infonce_loss,
    resized_positions,
    siglip_loss,
)
from dalle.config import validate
from dalle.evaluation.zero_shot import retrieval_ranks
from tests.tiny import tiny_clip, tiny_tokenizer

TEXT = {"n_text_tokens": 77, "n_text_vocab": 49408, "text_layers": 12, "text_tokens": "openai"}


def vit(d_embed: int, size: int, layers: int, width: int, patch: int, text_width: int) -> dict[str, Any]:
    image = {"image_size": size, "image_layers": layers, "image_width": width, "patch_size": patch}
    return {"image_tower": "vit", "d_embed": d_embed, "text_width": text_width, **image, **TEXT}


def resnet(d_embed: int, size: int, layers: tuple[int, ...], width: int, text_width: int) -> dict[str, Any]:
    image = {"image_size": size, "image_layers": layers, "image_width": width}
    return {"image_tower": "resnet", "d_embed": d_embed, "text_width": text_width, **image, **TEXT}


# name: (config, all parameters, those of the image tower, those of the text blocks, table and projection)
PUBLISHED = {
    "RN50": (resnet(1024, 224, (3, 4, 6, 3), 64, 512), 102_007_137, 38_316_896),
    "RN101": (resnet(512, 224, (3, 4, 23, 3), 64, 512), 119_688_033, 56_259_936),
    "RN50x4": (resnet(640, 288, (4, 6, 10, 6), 80, 640), 178_300_601, 87_137_080),
    "RN50x16": (resnet(768, 384, (6, 8, 18, 8), 96, 768), 290_979_217, 167_328_912),
    "RN50x64": (resnet(1024, 448, (3, 15, 36, 10), 128, 1024), 623_258_305, 420_380_352),
    "ViT-B/32": (vit(512, 224, 12, 768, 32, 512), 151_277_313, 87_849_216),
    "ViT-B/16": (vit(512, 224, 12, 768, 16, 512), 149_620_737, 86_192_640),
    "ViT-L/14": (vit(768, 224, 24, 1024, 14, 768), 427_616_513, 303_966_208),
    "ViT-L/14@336px": (vit(768, 336, 24, 1024, 14, 768), 427_944_193, 304_293_888),
}
SMALL: dict[str, Any] = {
    "d_embed": 12,
    "image_size": 32,
    "image_tower": "vit",
    "image_layers": 2,
    "image_width": 64,
    "patch_size": 8,
    "n_text_tokens": 6,
    "n_text_vocab": 20,
    "text_layers": 2,
    "text_width": 64,
    "text_tokens": "dalle",
    "activation": "gelu",
}


def config(**changes: Any) -> CLIPConfig:
    return validate(CLIPConfig, SMALL | changes, "test")


def lively(settings: CLIPConfig) -> CLIP:
    """A model whose outputs depend on all its weights: a fresh resnet's branches are zero."""
    torch.manual_seed(0)
    model = CLIP(settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 and "logit" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def captions(*lengths: int) -> Tensor:
    """Random captions of our tokenizer, padded."""
    generator = torch.Generator().manual_seed(1)
    n_text, n_vocab = SMALL["n_text_tokens"], SMALL["n_text_vocab"]
    text = torch.randint(0, n_vocab, (len(lengths), n_text), generator=generator)
    for row, length in enumerate(lengths):
        text[row, length:] = n_vocab + torch.arange(length, n_text)
    return text


def pictures(n: int, side: int = 32) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(2))


# Sizes


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes_have_openais_parameter_counts(name: str) -> None:
    settings, n_all, n_visual = PUBLISHED[name]
    with torch.device("meta"):
        model = CLIP(validate(CLIPConfig, settings | {"activation": "quick_gelu"}, name))
    assert sum(p.numel() for p in model.parameters()) == n_all
    assert sum(p.numel() for p in model.visual.parameters()) == n_visual


def test_names_are_openais() -> None:
    with torch.device("meta"):
        names = {
            name: set(
                CLIP(
                    validate(CLIPConfig, PUBLISHED[name][0] | {"activation": "quick_gelu"}, name)
                ).state_dict()
            )
            for name in ("RN50", "ViT-B/32", "ViT-L/14")
        }
    assert [len(names[name]) for name in names] == [489, 302, 446]
    assert {
        "visual.layer1.0.downsample.0.weight",
        "visual.layer4.2.bn3.running_var",
        "visual.attnpool.c_proj.bias",
        "transformer.resblocks.11.mlp.c_proj.weight",
    } <= names["RN50"]
    assert {
        "visual.class_embedding",
        "visual.transformer.resblocks.11.attn.in_proj_bias",
        "visual.ln_pre.weight",
        "visual.proj",
        "text_projection",
        "logit_scale",
    } <= names["ViT-B/32"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": None}, "needs one number for image_layers, and a patch_size"),
        ({"image_layers": (1, 1, 1, 1)}, "needs one number for image_layers"),
        ({"patch_size": 7}, "image_size 32 is no multiple of patch_size 7"),
        ({"image_width": 65}, "image_width is 65; it must be a multiple of 64"),
        ({"text_width": 100}, "text_width is 100; it must be a multiple of 64"),
        ({"image_tower": "resnet"}, "resnet needs four numbers"),
        (
            {"image_tower": "resnet", "image_layers": (1, 1, 1, 1), "patch_size": None, "image_size": 40},
            "multiple of 32",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_quick_gelu_is_at_most_0_0203_from_gelu() -> None:
    x = torch.linspace(-6, 6, 20_001)
    assert float((QuickGELU()(x) - F.gelu(x)).abs().max()) == pytest.approx(0.0203, abs=1e-4)


# Towers


def test_a_vit_reads_every_pixel_and_its_class_token_is_what_comes_out() -> None:
    model = lively(config())
    images = pictures(1).requires_grad_()
    model.encode_image(images)[0, 0].backward()
    assert images.grad is not None and (images.grad.abs().sum(dim=1) > 0).all()


def test_a_resnet_reads_every_pixel_and_pools_strides_instead_of_skipping() -> None:
    model = lively(config(image_tower="resnet", image_layers=(1, 1, 1, 1), image_width=16, patch_size=None))
    images = pictures(1).requires_grad_()
    model.encode_image(images)[0, 0].backward()
    assert images.grad is not None
    assert (images.grad.abs().sum(dim=1) > 0).float().mean() > 0.9  # not all: some units are off
    strided = [m for m in model.visual.modules() if isinstance(m, torch.nn.Conv2d) and m.stride != (1, 1)]
    assert [layer is model.visual.conv1 for layer in strided] == [True]


def test_vectors_have_length_one_in_float32_whatever_the_models_dtype() -> None:
    model = lively(config()).to(torch.bfloat16)
    for vectors in (model.encode_image(pictures(3)), model.encode_text(captions(1, 4, 6))):
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3), rtol=1e-3, atol=0)


def test_images_of_another_size_are_resized_and_those_of_the_right_one_left_alone() -> None:
    model = lively(config())
    right = pictures(2)
    mean = torch.tensor(model.config.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(model.config.image_std).view(1, 3, 1, 1)
    assert torch.equal(model.normalize_images(right), (right - mean) / std)
    large = F.interpolate(right, scale_factor=4, mode="bilinear")
    torch.testing.assert_close(model.encode_image(large), model.encode_image(right), rtol=0, atol=0.1)
    with pytest.raises(ValueError, match="squares"):
        model.encode_image(torch.zeros(1, 3, 32, 16))


def test_what_a_caption_means_depends_on_its_tokens_and_on_no_pad() -> None:
    model = lively(config())
    text = captions(3, 6)
    before = model.encode_text(text)
    with torch.no_grad():  # the pads' rows of the table
        model.token_embedding.weight[SMALL["n_text_vocab"] :].normal_()
    torch.testing.assert_close(model.encode_text(text), before)
    changed = text.clone()
    changed[:, 0] = (changed[:, 0] + 1) % SMALL["n_text_vocab"]
    assert ((model.encode_text(changed) - before).abs().amax(dim=1) > 1e-4).all()


def test_a_longer_caption_keeps_the_states_of_its_beginning() -> None:
    model = lively(config())
    text = captions(6)
    x = model.token_embedding(text) + model.positional_embedding
    whole, cut = model.transformer(x), model.transformer(x[:, :4])
    torch.testing.assert_close(whole[:, :4], cut, rtol=1e-5, atol=1e-5)


def test_the_empty_caption_has_a_vector() -> None:
    assert model_is_finite(lively(config()).encode_text(captions(0)))


def model_is_finite(vectors: Tensor) -> bool:
    return bool(vectors.isfinite().all())


def test_openais_captions_end_at_their_first_end_of_text() -> None:
    model = lively(config(text_tokens="openai"))
    text = torch.tensor([[18, 3, 4, 19, 0, 0], [18, 3, 4, 19, 19, 7], [18, 5, 6, 7, 8, 19]])
    assert model.end_of(text).tolist() == [3, 3, 5]
    first, second, _ = model.encode_text(text)
    torch.testing.assert_close(first, second)  # what comes after the end changes nothing
    assert (
        model.end_of(text[[0, 2]]).tolist() == text[[0, 2]].argmax(dim=1).tolist()
    )  # OpenAI's way to find it
    with pytest.raises(ValueError, match="no end-of-text token 19"):
        model.encode_text(torch.tensor([[18, 3, 4, 5, 6, 7]]))


def test_captions_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"text has shape \(1, 5\); this CLIP reads \(batch, 6\)"):
        lively(config()).encode_text(torch.zeros(1, 5, dtype=torch.int64))


# Losses


def unit(n: int, seed: int) -> Tensor:
    vectors = torch.randn(n, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(vectors, dim=-1)


def test_infonce_is_figure_3_by_hand() -> None:
    images, texts, scale = unit(5, 0), unit(5, 1), torch.tensor(7.0, dtype=torch.float64)
    logits = (scale * images @ texts.T).tolist()
    by_hand = 0.0
    for i in range(5):
        of_row = math.log(sum(math.exp(x) for x in logits[i]))
        of_column = math.log(sum(math.exp(row[i]) for row in logits))
        by_hand += (of_row - logits[i][i] + of_column - logits[i][i]) / 10
    assert float(infonce_loss(images, texts, scale)) == pytest.approx(by_hand)


def test_infonce_of_vectors_that_say_nothing_is_ln_b() -> None:
    same = torch.ones(16, 4) / 2
    assert float(infonce_loss(same, same, torch.tensor(14.3))) == pytest.approx(math.log(16))


def test_siglip_is_the_sum_over_pairs_by_hand() -> None:
    images, texts = unit(4, 0), unit(4, 1)
    scale, bias = torch.tensor(3.0, dtype=torch.float64), torch.tensor(-1.5, dtype=torch.float64)
    by_hand = 0.0
    for i in range(4):
        for j in range(4):
            logit = float(scale * images[i] @ texts[j] + bias)
            by_hand += math.log1p(math.exp(-logit if i == j else logit)) / 4
    assert float(siglip_loss(images, texts, scale, bias)) == pytest.approx(by_hand)


def test_the_scale_starts_at_one_over_0_07_and_is_kept_between_1_and_100() -> None:
    model = CLIP(config())
    assert float(model.logit_scale.detach().exp()) == pytest.approx(1 / 0.07)
    for value, kept in ((9.0, MAX_LOGIT_SCALE), (-1.0, 0.0), (3.0, 3.0)):
        with torch.no_grad():
            model.logit_scale.fill_(value)
        model.clamp_logit_scale_()
        assert float(model.logit_scale.detach()) == pytest.approx(kept)


def test_siglips_bias_starts_at_the_share_of_true_pairs() -> None:
    model = CLIP(config(loss="siglip"))
    model.set_bias_(64)
    assert float(torch.sigmoid(model.logit_bias.detach())) == pytest.approx(1 / 64)


# Files


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "siglip", "activation": "quick_gelu", "image_mean": (0.5, 0.5, 0.5)},
        {"image_tower": "resnet", "image_layers": (1, 1, 1, 1), "image_width": 16, "patch_size": None},
    ],
)
def test_saving_and_loading_keeps_every_logit_and_what_no_shape_tells(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = lively(config(**changes))
    model.save_pretrained(tmp_path / "clip")
    loaded = CLIP.from_pretrained(tmp_path / "clip")
    assert loaded.config == model.config
    assert torch.equal(loaded(pictures(2), captions(3, 5)), model(pictures(2), captions(3, 5)))


# Another picture size


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_at_its_own_size_a_model_stays_as_it_is_and_at_another_it_reads_the_same_picture_alike(
    tower: str,
) -> None:
    resnet_shape = {
        "image_tower": "resnet",
        "image_layers": (1, 1, 1, 1),
        "image_width": 8,
        "patch_size": None,
    }
    model = lively(config(**({} if tower == "vit" else resnet_shape)))
    same = model.at_image_size(model.config.image_size).eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(same.state_dict()[name], tensor), name
    larger = model.at_image_size(2 * model.config.image_size).eval()
    assert larger.config.image_size == 2 * model.config.image_size
    assert torch.equal(larger.encode_text(captions(3)), model.encode_text(captions(3)))
    assert larger.encode_image(pictures(2, 64)).shape == (2, model.config.d_embed)
    with pytest.raises(ValueError, match="multiple"):
        model.at_image_size(model.config.image_size + 1)


def test_positions_are_resized_in_their_plane_and_the_first_has_no_place() -> None:
    rows = torch.arange(4.0)
    plane = torch.stack(torch.meshgrid(rows, rows, indexing="ij"), dim=-1).reshape(
        16, 2
    )  # its row and column
    table = torch.cat([torch.tensor([[-7.0, 7.0]]), plane])
    assert resized_positions(table, 4) is table
    half = resized_positions(table, 2)
    assert half.shape == (5, 2) and torch.equal(half[0], table[0])
    torch.testing.assert_close(half[1:].mean(dim=0), plane.mean(dim=0))
    assert torch.equal(half[1:, 0].view(2, 2), half[1:, 1].view(2, 2).T)
    assert half[1, 0] == half[2, 0] < half[3, 0] == half[4, 0]


# Learning


def halves(colours: list[tuple[str, tuple[float, float, float]]]) -> tuple[list[str], Tensor]:
    """A caption and a picture (3, 16, 16) for every pair of colours, one left and one right."""
    names, drawn = [], []
    for left, left_rgb in colours:
        for right, right_rgb in colours:
            picture = torch.empty(3, 16, 16)
            picture[:, :, :8] = torch.tensor(left_rgb).view(3, 1, 1)
            picture[:, :, 8:] = torch.tensor(right_rgb).view(3, 1, 1)
            names.append(f"{left} beside {right}")
            drawn.append(picture)
    return names, torch.stack(drawn)


COLOURS = list(
    zip(
        ("black", "red", "green", "blue", "yellow", "cyan", "pink", "white", "gray"),
        [
            *((float(r), float(g), float(b)) for r, g, b in itertools.product((0, 1), repeat=3)),
            (0.5, 0.5, 0.5),
        ],
        strict=True,
    )
)


def test_64_pairs_are_learned_by_heart_and_colours_never_seen_together_are_told_apart() -> None:
    names, drawn = halves(COLOURS)
    tokenizer = tiny_tokenizer(names)
    text = torch.stack([torch.from_numpy(tokenizer.pad(tokenizer.encode(name))) for name in names])
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(3)).tolist()
    seen, held_out = order[:64], order[64:]
    model = tiny_clip(tokenizer, seed=0, d_embed=32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(4)
    for _ in range(250):
        noise = 0.05 * torch.randn(len(seen), 3, 16, 16, generator=generator)
        noisy = (drawn[seen] + noise).clamp(0, 1)
        loss = model.pair_loss(model.encode_image(noisy), model.encode_text(text[seen]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        model.clamp_logit_scale_()
    with torch.no_grad():
        of_pictures, of_texts = model.encode_image(drawn), model.encode_text(text)
    for queries, targets in ((of_pictures, of_texts), (of_texts, of_pictures)):
        assert (retrieval_ranks(queries[seen], targets[seen], range(64)) == 1).all()
    ranks = retrieval_ranks(of_pictures[held_out], of_texts, held_out)
    assert int((ranks <= 5).sum()) >= 9, "of 17 among 81; chance is one"
