"""Numbers and formulas of the paper that no single file owns: presets, schedules, optimiser, resblocks."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dalle.config import load_preset, override, validate
from dalle.data.pair import Pair
from dalle.dvae import DiscreteVAE
from dalle.generation.request import GenerationOptions
from dalle.tokenizer import Tokenizer
from dalle.training.optim import PLATEAU_WINDOW, MovingAverage, Plateau, adamw, half_cosine, learning_rate
from dalle.training.recipe import Recipe, transformer_config
from dalle.training.transformer import Sequences, TransformerStage
from dalle.transformer import Transformer


def recipe(preset: str, *settings: str) -> Recipe:
    return validate(Recipe, override(load_preset(preset), settings), preset)


def test_preset_paper_sets_the_papers_numbers() -> None:
    paper = recipe("paper")
    assert (paper.dvae.image_size, paper.dvae.grid_size, paper.dvae.n_codes) == (256, 32, 8192)
    assert (paper.dvae.quantizer, paper.dvae.trunk, paper.dvae.likelihood) == (
        "gumbel",
        "paper",
        "logit_laplace",
    )
    assert (paper.tokenizer.vocab_size, paper.tokenizer.max_tokens, paper.tokenizer.space_tokens) == (
        16384,
        256,
        True,
    )
    shape = paper.transformer
    assert (shape.n_layers, shape.n_heads, shape.d_head, shape.conv_kernel, shape.layers) == (
        64,
        62,
        64,
        11,
        "paper",
    )
    first, second = paper.dvae_training, paper.transformer_training
    assert (first.batch_size * first.accumulation, first.steps) == (512, 3_000_000)  # A.2
    assert (second.batch_size * second.accumulation, second.steps) == (1024, 430_000)  # B.2
    assert (first.crop, second.crop) == ("paper", "paper")
    assert (first.average_decay, first.average_every) == (0.999, 1)
    assert (second.average_decay, second.average_every, second.average_on_cpu) == (0.99, 25, True)
    assert (first.beta2, first.weight_decay, first.clip_norm) == (0.999, 1e-4, None)
    assert (second.beta2, second.weight_decay, second.clip_norm) == (0.96, 4.5e-2, 4.0)
    assert (second.bpe_dropout, second.caption_dropout) == (0.1, 0.0)
    assert paper.sampling.model_dump(exclude_none=True) == {"temperature": 1.0, "guidance": 1.0}
    assert paper.balance is None


def test_schedules_take_the_papers_values() -> None:
    training = recipe("paper").dvae_training  # A.2

    def tau(step: int) -> float:
        return half_cosine(step, 1.0, training.final_temperature, training.temperature_steps)

    def beta(step: int) -> float:
        return half_cosine(step, 0.0, training.kl_weight, training.kl_steps)

    assert [tau(step) for step in (0, 75_000, 150_000, 2_999_999)] == pytest.approx(
        [1, 0.53125, 1 / 16, 1 / 16]
    )
    assert [beta(step) for step in (0, 2_500, 5_000, 2_999_999)] == pytest.approx([0, 3.3, 6.6, 6.6])
    rates = [learning_rate(training, step) for step in (0, 600_000, 1_200_000, 2_999_999)]
    assert rates == pytest.approx([1e-4, 5.0625e-5, 1.25e-6, 1.25e-6])


def test_learning_rate_warms_up_and_is_halved_at_five_plateaus() -> None:
    training = recipe("paper").transformer_training  # B.2
    assert learning_rate(training, 2_499) == pytest.approx(4.5e-4 / 2)
    assert learning_rate(training, 4_999) == learning_rate(training, 5_000) == pytest.approx(4.5e-4)

    plateau = Plateau()
    for window in range(4):  # a falling loss halves nothing
        for _ in range(PLATEAU_WINDOW):
            plateau.update(9.0 - window)
    assert plateau.n_halvings == 0
    for _ in range(8 * PLATEAU_WINDOW):
        plateau.update(6.0)
    assert plateau.n_halvings == 5
    assert learning_rate(training, 429_999, plateau.n_halvings) == pytest.approx(1.40625e-5)


def test_adamw_has_the_papers_constants_and_decays_matrices_only() -> None:
    tiny = recipe("tiny", "transformer_training.beta2=0.96", "transformer_training.weight_decay=0.045")
    model = Transformer(transformer_config(tiny.transformer, tiny.dvae, 300, tiny.tokenizer.max_tokens))
    optimizer = adamw(model, tiny.transformer_training)
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.9, 0.96), 1e-8)}
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    decayed = {name for name, p in model.named_parameters() if decay_of[id(p)] == 0.045}
    matrices = ("qkv.weight", "out.weight", "expand.weight", "contract.weight", "head.weight")
    assert decayed == {name for name, _ in model.named_parameters() if name.endswith(matrices)}
    assert set(decay_of.values()) == {0.045, 0.0}


def test_moving_average_equals_the_loop() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    average = MovingAverage(model, decay=0.5)
    expected = model.weight.detach().clone()
    for n_updates in range(1, 8):
        with torch.no_grad():
            model.weight.normal_()
        average.update(model, n_updates)
        decay = min(0.5, (1 + n_updates) / (10 + n_updates))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    assert torch.allclose(average.tensors["weight"], expected, atol=1e-6)
    own = model.weight.detach().clone()
    with average.applied(model):
        assert torch.equal(model.weight, average.tensors["weight"])
    assert torch.equal(model.weight, own)


def test_a_layer_is_the_pre_norm_formula_written_out() -> None:
    tiny = recipe("tiny")
    config = transformer_config(tiny.transformer, tiny.dvae, 300, tiny.tokenizer.max_tokens)
    dense = config.model_copy(update={"n_layers": 1, "layers": "dense"})
    torch.manual_seed(0)
    layer = Transformer(dense).layers[0].train()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.2)
    weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    width, n_heads, n = dense.d_model, dense.n_heads, 7

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
        return scaled * weights[f"{name}.norm.weight"] + weights[f"{name}.norm.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    # One stream of the usual size, one so small that LayerNorm's epsilon counts.
    x = torch.randn(2, n, width) * torch.tensor([1.0, 3e-3])[:, None, None]
    q, k, v = linear(norm(x, "attention"), "attention.qkv").split(width, dim=-1)
    heads = []
    for head in torch.arange(width).chunk(n_heads):
        scores = q[..., head] @ k[..., head].mT / math.sqrt(width / n_heads)  # (B, S, S)
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v[..., head])
    expected = x + linear(torch.cat(heads, dim=-1), "attention.out")
    hidden = linear(norm(expected, "mlp"), "mlp.expand")
    expected = expected + linear(hidden * torch.sigmoid(1.702 * hidden), "mlp.contract")
    # In training mode, twice: there is no dropout.
    with torch.no_grad():
        assert torch.allclose(layer(x), expected, atol=1e-4)
        assert torch.equal(layer(x), layer(x))


def test_initial_weights_have_the_settled_scales() -> None:
    tiny = recipe("tiny", "transformer.n_heads=8", "transformer.d_head=32")
    config = transformer_config(tiny.transformer, tiny.dvae, 2000, tiny.tokenizer.max_tokens)
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    width, n_layers = config.d_model, config.n_layers
    layer = model.layers[1]
    stds = {
        model.text_token: 0.5 / math.sqrt(width),
        layer.attention.qkv: 0.5 / math.sqrt(width),
        layer.attention.out: 0.5 / math.sqrt(width) / math.sqrt(2 * n_layers),
        layer.mlp.expand: 0.5 / math.sqrt(width),
        layer.mlp.contract: 0.5 / math.sqrt(4 * width) / math.sqrt(2 * n_layers),
        model.text_head: 0.25 / math.sqrt(width),
    }
    for module, std in stds.items():
        assert float(module.weight.detach().std()) == pytest.approx(std, rel=0.02)
    assert not layer.attention.qkv.bias.any()


@pytest.mark.parametrize(("share", "n_empty"), [(0.0, 0), (0.999, 6)])
def test_dropped_captions_are_the_null_caption(share: float, n_empty: int) -> None:
    tiny = recipe(
        "tiny", f"transformer_training.caption_dropout={share}", "transformer_training.batch_size=6"
    )
    captions = ["a red apple", "a blue boat", "a green frog"]
    tokenizer = Tokenizer.train(captions, tiny.tokenizer)
    pairs = [Pair(key=str(i), captions=(caption,), split="train") for i, caption in enumerate(captions)]
    grid = tiny.dvae.grid_size
    sequences = Sequences(pairs, [np.zeros((len(pairs), grid, grid), dtype=np.uint16)])
    model = Transformer(
        transformer_config(tiny.transformer, tiny.dvae, tokenizer.n_vocab, tokenizer.max_tokens)
    )
    stage = TransformerStage(
        model,
        tiny.transformer_training,
        tokenizer,
        DiscreteVAE(tiny.dvae),
        sequences,
        sequences,
        seed=0,
        balance=None,
        sampling=GenerationOptions(),
    )
    text, _ = stage.batch(0)
    null = torch.from_numpy(tokenizer.pad([]))
    assert int((text == null).all(dim=1).sum()) == n_empty
