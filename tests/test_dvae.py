"""The discrete VAE: the paper's numbers, likelihood and bound, both quantizers, and what users rely on."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from dalle.config import load_preset, validate
from dalle.dvae import (
    FSQ,
    RESOLUTIONS,
    DiscreteVAE,
    DVAEConfig,
    gumbel_softmax,
    kl_to_uniform,
    logit_laplace_nll,
    map_pixels,
    unmap_pixels,
)

LIGHT: dict[str, Any] = {"image_size": 16, "trunk": "light", "d_hidden": 16, "d_code": 8, "n_blocks": 1}
GUMBEL = {"quantizer": "gumbel", "n_codes": 24}
FSQ_60 = {"quantizer": "fsq", "n_codes": 60, "fsq_levels": (5, 4, 3)}
CONFIGS = {
    "paper-gumbel": {**LIGHT, **GUMBEL, "trunk": "paper"},
    "paper-fsq": {**LIGHT, **FSQ_60, "trunk": "paper"},
    "light-gumbel": {**LIGHT, **GUMBEL},
    "light-fsq": {**LIGHT, **FSQ_60},
    "light-fsq-mse": {**LIGHT, **FSQ_60, "likelihood": "mse_l1"},
}
EVERY_CONFIG = pytest.mark.parametrize("name", CONFIGS)


def make(name: str, **changes: object) -> DiscreteVAE:
    torch.manual_seed(0)
    return DiscreteVAE(DVAEConfig(**{**CONFIGS[name], **changes}))


def pictures(n: int, size: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def one_hot(tokens: Tensor, n_codes: int) -> Tensor:
    return F.one_hot(tokens, n_codes).permute(0, 3, 1, 2).float()  # (B, K, G, G)


def half_cosine(t: float, start: float, end: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


# --- the paper's architecture ---


@pytest.fixture(scope="module")
def paper_model() -> DiscreteVAE:
    with torch.device("meta"):
        return DiscreteVAE(validate(DVAEConfig, load_preset("paper")["dvae"], "paper"))


def test_paper_preset_has_exactly_the_published_parameter_counts(paper_model: DiscreteVAE) -> None:
    assert sum(p.numel() for p in paper_model.encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in paper_model.decoder.parameters()) == 43_829_766


def test_paper_trunk_has_exactly_openais_names_and_kernels(paper_model: DiscreteVAE) -> None:
    expected = {}
    for part, kernels in (("encoder", (3, 3, 3, 1)), ("decoder", (1, 3, 3, 3))):
        expected[f"{part}.blocks.input"] = 7 if part == "encoder" else 1
        for group, block in itertools.product(range(1, 5), range(1, 3)):
            path = f"{part}.blocks.group_{group}.block_{block}"
            expected |= {f"{path}.res_path.conv_{n}": kernel for n, kernel in enumerate(kernels, 1)}
            # the first encoder group keeps its width; every other group changes it in its first block
            if block == 1 and (part, group) != ("encoder", 1):
                expected[f"{path}.id_path"] = 1
        expected[f"{part}.blocks.output.conv"] = 1
    state = paper_model.state_dict()
    assert set(state) == {f"{path}.{letter}" for path in expected for letter in "wb"}
    assert {path: state[f"{path}.w"].shape[-1] for path in expected} == expected


def test_paper_trunk_starts_with_openais_scale_and_residual_gain(paper_model: DiscreteVAE) -> None:
    block = paper_model.encoder.get_submodule("blocks.group_2.block_1")
    assert block.post_gain == 1 / 64
    model = make("paper-gumbel", d_hidden=64)
    weight = model.encoder.get_parameter("blocks.group_4.block_1.res_path.conv_2.w")  # 128 in, 3x3
    assert weight.std().item() == pytest.approx(1 / math.sqrt(128 * 9), rel=0.01)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith(".b"))


# --- pixels and the logit-Laplace likelihood ---


def test_map_pixels_is_the_papers_and_unmap_undoes_it() -> None:
    x = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(map_pixels(x), torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(unmap_pixels(map_pixels(x)), x)
    assert unmap_pixels(torch.tensor([0.02, 0.99])).tolist() == [0, 1]


@pytest.mark.parametrize(("mu", "ln_b"), [(0.0, 0.0), (1.3, -1.0), (-0.7, 0.5)])
def test_logit_laplace_integrates_to_one(mu: float, ln_b: float) -> None:
    # on a grid even in the logit, where the density has no poles: dx = x (1 - x) d logit
    logit = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    x = torch.sigmoid(logit)
    nll = logit_laplace_nll(x, torch.tensor(mu, dtype=torch.float64), torch.tensor(ln_b, dtype=torch.float64))
    inside = (logit > -30) & (logit < 30)
    density = torch.where(inside, torch.exp(-nll), 0) * x * (1 - x)
    assert torch.trapezoid(density[inside], logit[inside]).item() == pytest.approx(1, abs=1e-6)


def test_ln_b_stops_at_its_floor() -> None:
    """A decoder that says mu = 0 and ln b = -5 everywhere is charged for the floor where that is higher."""
    images = pictures(2)
    for floor, charged in ((-7.0, -5.0), (-1.0, -1.0)):
        model = make("light-gumbel", min_ln_b=floor)
        with torch.no_grad():
            head = model.decoder.blocks.output
            head.w.zero_()
            head.b.copy_(torch.tensor([0.0] * 48 + [-5.0] * 48))  # shuffled 4x4: mu of 3 channels, then ln b
        _, metrics = model.loss(
            images, temperature=1.0, kl_weight=0.0, generator=torch.Generator().manual_seed(0)
        )
        mapped = map_pixels(images)
        expected = logit_laplace_nll(
            mapped, torch.zeros_like(mapped), torch.full_like(mapped, charged)
        ).mean()
        torch.testing.assert_close(metrics["reconstruction"], expected)
    with pytest.raises(ValueError, match="min_ln_b"):
        make("light-gumbel", min_ln_b=3.0)


def test_logit_laplace_equals_autograds_change_of_variables() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(50, generator=generator, dtype=torch.float64, requires_grad=True)
    mu, ln_b = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    x = torch.sigmoid(y)
    (slope,) = torch.autograd.grad(x.sum(), y)
    expected = -torch.distributions.Laplace(mu, ln_b.exp()).log_prob(y) + slope.log()
    torch.testing.assert_close(logit_laplace_nll(x, mu, ln_b), expected)


# --- the relaxation and the bound ---


def test_kl_is_zero_at_uniform_logits_and_ln_k_a_cell_at_one_hot() -> None:
    assert kl_to_uniform(torch.full((2, 8192, 2, 2), 3.0)).abs().max() < 1e-5
    certain = 1e4 * one_hot(torch.arange(1024).view(1, 32, 32), 8192)
    assert kl_to_uniform(certain).sum().item() == pytest.approx(1024 * math.log(8192))


def test_loss_is_the_papers_normalised_bound_by_hand() -> None:
    model, images, beta, tau = make("paper-gumbel"), pictures(3), 6.6, 0.7
    loss, metrics = model.loss(
        images, temperature=tau, kl_weight=beta, generator=torch.Generator().manual_seed(1)
    )
    logits = model.encoder(map_pixels(images))
    z = gumbel_softmax(logits, tau, torch.Generator().manual_seed(1))
    mu, ln_b = model.decoder(z).split(3, dim=1)
    total = 0.0
    for b in range(3):
        x = 0.8 * images[b] + 0.1
        density = torch.exp(-(torch.logit(x) - mu[b]).abs() / ln_b[b].exp()) / (
            2 * ln_b[b].exp() * x * (1 - x)
        )
        p = torch.softmax(logits[b], dim=0)
        kl = (math.log(24) + (p * p.log()).sum(dim=0)).sum()
        total += ((-density.log().sum() + beta * kl) / (3 * 16 * 16)).item() / 3
        assert 0 < kl < 4 * math.log(24)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert loss.item() == pytest.approx((metrics["reconstruction"] + beta * metrics["kl"] * 4 / 768).item())


def test_relaxation_is_soft_and_its_hard_choice_follows_the_logits() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().view(1, 3, 1, 1).expand(1, 3, 200, 200)
    z = gumbel_softmax(logits, 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.sum(dim=1), torch.ones(1, 200, 200))
    assert ((z > 0) & (z < 1)).all()
    shares = torch.bincount(z.argmax(dim=1).flatten(), minlength=3) / 40_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.01, rtol=0)
    sharp = gumbel_softmax(logits, 1 / 16, torch.Generator().manual_seed(0))
    assert sharp.amax(dim=1).mean() > 0.95 > z.amax(dim=1).mean()


def test_noise_comes_from_the_generator_that_is_passed() -> None:
    model, images = make("light-gumbel"), pictures(2)

    def run(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        return model.loss(images, temperature=1.0, kl_weight=0.0, generator=generator)[0].item()

    assert run(3) == run(3) != run(4)


def test_relaxation_and_boundary_convolutions_stay_float32_under_autocast() -> None:
    model, images = make("paper-gumbel"), pictures(2)
    seen: dict[str, torch.dtype] = {}
    for name in ("encoder.blocks.output.conv", "decoder.blocks.input", "encoder.blocks.input"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.__setitem__(name, out.dtype)
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = model.loss(images, temperature=1.0, kl_weight=1.0, generator=None)
    assert seen.pop("encoder.blocks.input") == torch.bfloat16
    assert set(seen.values()) == {torch.float32}
    assert loss.dtype == torch.float32


# --- finite scalar quantization ---


def test_fsq_codebook_is_every_combination_of_levels_and_numbers_itself() -> None:
    fsq = FSQ((5, 4, 3))
    codebook = fsq.codebook(torch.device("cpu"))
    expected = {(a / 2, b / 2, float(c)) for a in range(-2, 3) for b in range(-2, 2) for c in range(-1, 2)}
    assert {tuple(code) for code in codebook.tolist()} == expected
    grid = codebook.T.view(1, 3, 60, 1)
    assert fsq.tokens(grid).flatten().tolist() == list(range(60))
    assert codebook[1].tolist() == [-0.5, -1.0, -1.0]  # the first channel is the fastest


@pytest.mark.parametrize("levels", [(8, 8, 8, 8), (8, 5, 5, 5), (3, 4)])
def test_fsq_reaches_every_level_and_leaves_zero_where_it_is(levels: tuple[int, ...]) -> None:
    fsq = FSQ(levels)
    sweep = torch.linspace(-9, 9, 5001).view(1, 1, -1, 1).expand(1, len(levels), -1, -1)
    for channel, level in enumerate(levels):
        reached = (fsq.quantize(sweep)[0, channel] * (level // 2)).round().unique()
        assert reached.tolist() == list(range(-(level // 2), (level + 1) // 2))
    torch.testing.assert_close(
        fsq.bound(torch.zeros(1, len(levels), 1, 1)), torch.zeros(1, len(levels), 1, 1)
    )


def test_fsq_rounds_forward_and_is_the_bound_backward() -> None:
    fsq = FSQ((8, 5))
    latents = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    half_widths = torch.tensor([4.0, 2.0]).view(1, 2, 1, 1)
    (through,) = torch.autograd.grad(fsq.quantize(latents).sum(), latents)
    (smooth,) = torch.autograd.grad((fsq.bound(latents) / half_widths).sum(), latents)
    torch.testing.assert_close(through, smooth)
    assert (through > 0).all()


@pytest.mark.parametrize("levels", [(5, 4, 3), (8, 8, 8, 8)])
def test_fsq_logits_have_their_maximum_where_rounding_lands(levels: tuple[int, ...]) -> None:
    fsq = FSQ(levels)
    latents = 1.5 * torch.randn(2, len(levels), 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = fsq.tokens(fsq.quantize(latents))
    assert tokens.unique().numel() > 20
    torch.testing.assert_close(fsq.logits(latents).argmax(dim=1), tokens)


def test_fsq_gives_the_loss_no_kl_and_no_noise() -> None:
    model, images = make("light-fsq"), pictures(2)
    loss, metrics = model.loss(images, temperature=0.1, kl_weight=100.0, generator=None)
    assert metrics["kl"] == 0
    assert (
        loss == metrics["reconstruction"] == model.loss(images, temperature=1, kl_weight=0, generator=None)[0]
    )
    assert 1 <= metrics["perplexity"] <= 8


# --- every combination ---


@EVERY_CONFIG
def test_encode_is_the_argmax_of_the_encoders_logits(name: str) -> None:
    model, images = make(name), pictures(3)
    logits = model.encoder(map_pixels(images))
    assert logits.shape == (3, model.config.n_codes, 2, 2)
    tokens = model.encode(images)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, logits.argmax(dim=1))


@EVERY_CONFIG
def test_decode_equals_decoding_the_one_hot(name: str) -> None:
    model = make(name)
    n_codes = model.config.n_codes
    tokens = torch.randint(n_codes, (3, 2, 2), generator=torch.Generator().manual_seed(0))
    out = model.decoder(one_hot(tokens, n_codes))
    assert out.shape == (3, 6, 16, 16)
    images = model.decode(tokens)
    torch.testing.assert_close(images, unmap_pixels(torch.sigmoid(out[:, :3])))
    assert images.min() >= 0 and images.max() <= 1
    pieces = [model.decode(tokens[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(torch.cat(pieces), images)


@EVERY_CONFIG
def test_reconstruct_is_decode_of_encode_and_can_feed_itself(name: str) -> None:
    model, images = make(name), pictures(2)
    again = model.reconstruct(images)
    assert again.shape == images.shape
    assert torch.equal(again, model.decode(model.encode(images)))
    assert model.encode(again).shape == (2, 2, 2)


@EVERY_CONFIG
def test_gradient_reaches_every_parameter(name: str) -> None:
    model = make(name)
    loss, metrics = model.loss(
        pictures(4), temperature=1.0, kl_weight=1.0, generator=torch.Generator().manual_seed(0)
    )
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert set(metrics) == {"reconstruction", "kl", "mse", "perplexity"}
    assert not any(value.requires_grad or value.ndim for value in metrics.values())


@pytest.mark.parametrize("name", ["light-gumbel", "light-fsq", "light-fsq-mse"])
def test_a_few_updates_put_the_pictures_into_the_hard_tokens(name: str) -> None:
    model = make(name)
    images = torch.tensor([0.1, 0.9]).repeat(2).view(4, 1, 1, 1).expand(4, 3, 16, 16)  # dark and bright
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    n_updates = 40
    for update in range(n_updates):
        temperature = half_cosine(update / n_updates, 1.0, 1 / 16)
        optimizer.zero_grad()
        model.loss(images, temperature=temperature, kl_weight=0.0, generator=generator)[0].backward()
        optimizer.step()
    # the best that a model with one token can do is grey: 0.16
    assert F.mse_loss(model.reconstruct(images), images).item() < 0.02


@EVERY_CONFIG
def test_save_and_load_give_the_same_model(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path / "dvae")
    loaded = DiscreteVAE.from_pretrained(tmp_path / "dvae")
    assert loaded.config == model.config
    assert not loaded.training
    own, read = model.state_dict(), loaded.state_dict()
    assert list(own) == list(read)
    assert all(torch.equal(own[key], read[key]) for key in own)


@EVERY_CONFIG
def test_a_model_cast_to_bfloat16_encodes_and_decodes(name: str) -> None:
    model = make(name).to(torch.bfloat16)
    images = model.reconstruct(pictures(2))
    assert images.dtype == torch.float32
    assert images.isfinite().all()


@pytest.mark.parametrize("preset", ["tiny", "laptop", "gpu", "paper"])
def test_every_preset_describes_a_dvae(preset: str) -> None:
    config = validate(DVAEConfig, load_preset(preset)["dvae"], preset)
    with torch.device("meta"):
        DiscreteVAE(config)
    assert config.grid_size == config.image_size // 8


# --- a decoder that draws more pixels than the encoder reads ---

LARGE: dict[str, Any] = {"output_size": 32, "decoder_widths": (24, 16, 8), "decoder_blocks": 2}


def test_a_larger_decoder_draws_its_own_size_from_the_same_tokens() -> None:
    plain, large = make("light-fsq"), make("light-fsq", **LARGE)
    large.encoder.load_state_dict(plain.encoder.state_dict())
    images = pictures(2)
    assert torch.equal(large.encode(images), plain.encode(images))
    assert large.reconstruct(images).shape == (2, 3, 32, 32)
    tokens = large.encode(images)
    assert_close(large.decoder.from_tokens(tokens), large.decoder(one_hot(tokens, 60)))
    assert [len(layer) for name, layer in large.decoder.blocks.named_children() if name in RESOLUTIONS] == [
        2,
        2,
        2,
    ]


@pytest.mark.parametrize("widths", [(16,), (16, 8), (16, 8, 8), (16, 8, 8, 8)])
def test_a_decoder_has_as_many_resolutions_as_widths(widths: tuple[int, ...]) -> None:
    model = make("light-fsq", output_size=16, decoder_widths=widths)
    assert model.decode(torch.zeros(1, 2, 2, dtype=torch.int64)).shape == (1, 3, 16, 16)


def test_a_decoder_without_sizes_of_its_own_is_the_mirror_in_file_and_weights() -> None:
    plain, stated = make("light-fsq"), make("light-fsq", output_size=16, decoder_widths=(32, 16))
    assert plain.config.output_size == 16
    assert (
        "output_size" not in plain.config.model_dump() and "decoder_widths" not in plain.config.model_dump()
    )
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), stated.parameters(), strict=True))
    assert list(plain.state_dict()) == list(stated.state_dict())
    large = make("light-fsq", **LARGE).config
    assert validate(DVAEConfig, large.model_dump(mode="json"), "here") == large
    assert large.mirrored() == plain.config


# --- mistakes ---


@pytest.mark.parametrize("shape", [(2, 3, 24, 24), (2, 3, 16, 24), (2, 1, 16, 16), (3, 16, 16)])
def test_images_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images have shape .* reads \(batch, 3, 16, 16\)"):
        make("light-fsq").encode(torch.zeros(shape))


@pytest.mark.parametrize("name", ["light-fsq", "light-gumbel"])
def test_tokens_that_no_code_has_are_refused(name: str) -> None:
    model = make(name)
    n_codes = model.config.n_codes
    for tokens in (torch.full((1, 2, 2), n_codes), torch.full((1, 2, 2), -1)):
        with pytest.raises(ValueError, match=f"codes 0 to {n_codes - 1}"):
            model.decode(tokens)
    with pytest.raises(ValueError, match=r"decodes \(batch, 2, 2\)"):
        model.decode(torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 20}, "multiple of 8"),
        ({"d_hidden": 20}, "multiple of 8"),
        ({"n_codes": 61}, "make 60 codes"),
        ({"fsq_levels": ()}, "levels of 3 or more"),
        ({"fsq_levels": (30, 2)}, "levels of 3 or more"),
        ({"quantizer": "gumbel"}, "leave it out"),
        ({"n_blocks": 0}, "n_blocks"),
        ({"output_size": 24}, "draws 16 or 32"),
        ({"output_size": 8}, "draws 16 or 32"),
        ({"output_size": 128, "decoder_widths": (8, 8, 8)}, "draws 16 or 32 or 64"),
        ({"decoder_widths": (8, 12)}, "at most 4 multiples of 8"),
        ({"decoder_widths": (8,) * 5}, "at most 4 multiples of 8"),
        ({"trunk": "paper", "output_size": 32}, "belong to trunk light"),
        ({"trunk": "paper", "decoder_blocks": 2}, "belong to trunk light"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(DVAEConfig, {**CONFIGS["light-fsq"], **changes}, "here")
