"""The transformer's sizes, layout, causality, loss, cached decoding and files."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dalle.attention import LAYER_KINDS, allowed_image_keys
from dalle.config import validate
from dalle.transformer import StreamDropout, Transformer, TransformerConfig, _logits

N_TEXT, N_VOCAB, GRID, N_CODES = 5, 20, 4, 30
TREE = {
    "n_layers": 4,
    "n_heads": 2,
    "d_head": 8,
    "n_text_tokens": N_TEXT,
    "n_text_vocab": N_VOCAB,
    "grid_size": GRID,
    "n_image_vocab": N_CODES,
    "conv_kernel": 3,
    "layers": "paper",
}


def small_config(*layers: str) -> TransformerConfig:
    return validate(TransformerConfig, {**TREE, "n_layers": len(layers), "layers": layers}, "test")


def lively(config: TransformerConfig) -> Transformer:
    """A model whose logits depend strongly on all its weights: a fresh one has heads near zero."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def batch(n: int = 3) -> tuple[Tensor, Tensor]:
    """Captions of 2 to 5 tokens with pads, and pictures."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, N_VOCAB, (n, N_TEXT), generator=generator)
    for row in range(n):
        length = 2 + row % 4
        text[row, length:] = torch.arange(N_VOCAB + length, N_VOCAB + N_TEXT)
    return text, torch.randint(0, N_CODES, (n, GRID * GRID), generator=generator)


# Sizes


def paper_model() -> Transformer:
    with torch.device("meta"):
        return Transformer(
            TransformerConfig(
                n_layers=64,
                n_heads=62,
                d_head=64,
                n_text_tokens=256,
                n_text_vocab=16384,
                grid_size=32,
                n_image_vocab=8192,
            )
        )


def test_paper_sizes_give_12_billion_parameters_of_the_papers_kinds() -> None:
    width = 62 * 64
    sizes = {name: parameter.numel() for name, parameter in paper_model().named_parameters()}

    def take(*endings: str) -> int:
        return sum(sizes.pop(name) for name in list(sizes) if name.endswith(endings))

    matrices = ("qkv.weight", "attention.out.weight", "expand.weight", "contract.weight")
    assert take(*matrices) == 12 * 64 * width**2 == 12_092_178_432
    assert take("qkv.bias", "out.bias", "expand.bias", "contract.bias") == 64 * (3 + 1 + 4 + 1) * width
    assert take("norm.weight") == take("norm.bias") == (2 * 64 + 1) * width
    assert sizes == {
        "start.weight": width,
        "text_token.weight": 65_011_712,
        "text_position.weight": 1_015_808,
        "text_pad.weight": 1_015_808,
        "image_token.weight": 32_505_856,
        "image_row.weight": 126_976,
        "image_column.weight": 126_976,
        "text_head.weight": 65_011_712 + 1_015_808,  # BPE entries and pads
        "image_head.weight": 32_505_856,
    }


def test_the_papers_matrices_have_the_shapes_of_table_2() -> None:
    layer = paper_model().layers[0]
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes["attention.qkv.weight"] == (3 * 3968, 3968)
    assert shapes["attention.out.weight"] == (3968, 3968)
    assert shapes["mlp.expand.weight"] == (4 * 3968, 3968)
    assert shapes["mlp.contract.weight"] == (3968, 4 * 3968)


def test_config_refuses_layers_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="names 2 layer kinds; n_layers is 4"):
        validate(TransformerConfig, {**TREE, "layers": ["row", "column"]}, "test")
    with pytest.raises(ValueError, match="conv_kernel"):
        validate(TransformerConfig, {**TREE, "conv_kernel": 4}, "test")
    with pytest.raises(ValueError, match="n_heads"):
        validate(TransformerConfig, {**TREE, "n_heads": 0}, "test")


# Loss


def test_first_losses_are_near_those_of_uniform_guesses() -> None:
    model = Transformer(small_config("row", "column", "row", "conv"))
    losses = model.loss(*batch())
    assert losses.text.item() == pytest.approx(math.log(N_VOCAB + N_TEXT), rel=0.1)
    assert losses.image.item() == pytest.approx(math.log(N_CODES), rel=0.1)


def test_loss_is_one_eighth_text_and_seven_eighths_image() -> None:
    model = lively(small_config("row", "conv"))
    text, image = batch()
    text_logits, image_logits = model(text, image)
    losses = model.loss(text, image)
    text_nats = -text_logits.log_softmax(-1).gather(-1, text[..., None]).mean()  # pads are targets too
    image_nats = -image_logits.log_softmax(-1).gather(-1, image[..., None]).mean()
    torch.testing.assert_close(losses.text, text_nats)
    torch.testing.assert_close(losses.image, image_nats)
    torch.testing.assert_close(losses.total, text_nats / 8 + image_nats * 7 / 8)


def test_a_fresh_model_learns_a_batch_by_heart() -> None:
    torch.manual_seed(0)
    model = Transformer(small_config("row", "conv"))
    text, image = batch(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model.loss(text, image).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.loss(text, image).total.item() < 0.5


def test_every_parameter_gets_a_gradient() -> None:
    model = lively(small_config("row", "column", "conv", "dense"))
    model.loss(*batch()).total.backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []


def test_same_generator_gives_same_weights() -> None:
    model = Transformer(small_config("row", "conv"))
    states = []
    for _ in range(2):
        model.init_weights(torch.Generator().manual_seed(3))
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# Causality


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_no_logit_sees_its_own_token_or_a_later_one(kind: str) -> None:
    model = lively(small_config(kind, kind)).eval()
    text, image = batch()
    with torch.no_grad():
        before = torch.cat([x.sum(-1) for x in model(text, image)], dim=1)  # (B, T + N)
        for slot in range(N_TEXT + GRID * GRID):
            other_text, other_image = text.clone(), image.clone()
            if slot < N_TEXT:  # from a token to a pad and the other way round
                is_pad = text[:, slot] >= N_VOCAB
                other_text[:, slot] = torch.where(is_pad, 7, N_VOCAB + slot)
            else:
                other_image[:, slot - N_TEXT] = (image[:, slot - N_TEXT] + 1) % N_CODES
            after = torch.cat([x.sum(-1) for x in model(other_text, other_image)], dim=1)
            assert torch.equal(after[:, : slot + 1], before[:, : slot + 1])
            if slot < N_TEXT:  # every later text and every image position sees every caption slot
                assert (after[:, slot + 1 :] != before[:, slot + 1 :]).all()


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_one_layer_sees_exactly_the_image_tokens_of_its_mask(kind: str) -> None:
    model = lively(small_config(kind)).eval()
    text, image = batch()
    with torch.no_grad():
        before = model(text, image)[1]
        for key in range(GRID * GRID):
            other = image.clone()
            other[:, key] = (image[:, key] + 1) % N_CODES
            changed = (model(text, other)[1] - before).abs().amax((0, 2)) > 1e-6
            # The slot that holds token i predicts token i + 1.
            expected = {i + 1 for i in range(GRID * GRID - 1) if key in allowed_image_keys(kind, i, GRID, 3)}
            assert set(changed.nonzero().flatten().tolist()) == expected


# Embeddings


def test_pads_have_an_embedding_per_position_and_no_position_term() -> None:
    model = lively(small_config("row"))
    text, image = batch(1)  # two tokens, three pads
    model.loss(text, image).image.backward()
    assert model.text_pad.weight.grad.any(1).tolist() == [False, False, True, True, True]
    assert model.text_position.weight.grad.any(1).tolist() == [True, True, False, False, False]


def test_image_positions_are_a_row_and_a_column_term() -> None:
    model = lively(small_config("row"))
    embedded = model._embed_image(torch.full((1, GRID * GRID), 3))[0]
    expected = model.image_token.weight[3] + model.image_row.weight[2] + model.image_column.weight[1]
    torch.testing.assert_close(embedded[2 * GRID + 1], expected)


# Precision


def test_logits_are_fp32_under_autocast_and_in_a_bf16_model() -> None:
    model = lively(small_config("row", "conv")).eval()
    text, image = batch()
    exact = model(text, image)[1]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(text, image)[1]
    half = model.to(torch.bfloat16)
    rounded = half(text, image)[1]
    assert {mixed.dtype, rounded.dtype} == {torch.float32}
    torch.testing.assert_close(mixed, exact, rtol=0.1, atol=0.1)
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.1)


def test_under_autocast_logits_equal_the_fp32_product_and_gradients_are_near_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(16, 30, bias=False)
    x = torch.randn(3, 5, 16, generator=generator).requires_grad_()
    cotangent = torch.randn(3, 5, 30, generator=generator)
    exact = torch.nn.functional.linear(x, head.weight)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = _logits(head, x)
    assert torch.equal(mixed, exact)
    gradients = [torch.autograd.grad(out, (x, head.weight), cotangent) for out in (mixed, exact)]
    for mine, theirs in zip(*gradients, strict=True):
        assert mine.dtype == torch.float32
        assert float((mine - theirs).norm() / theirs.norm()) < 0.01  # bf16 keeps 8 bits


# Mistakes


def test_ids_out_of_range_are_refused() -> None:
    model = Transformer(small_config("row"))
    text, image = batch(2)
    with pytest.raises(ValueError, match=r"text has id 25; the model knows 0 \.\. 24"):
        model(text.masked_fill(text == text[0, 0], N_VOCAB + N_TEXT), image)
    with pytest.raises(ValueError, match=r"image has id -1; the model knows 0 \.\. 29"):
        model(text, image.masked_fill(image == image[0, 0], -1))
    with pytest.raises(ValueError, match="another position's pad at position 4; its pad id is 24"):
        model.prefill(torch.tensor([[1, 2, 3, 4, 23]]))


def test_wrong_shapes_are_refused() -> None:
    model = Transformer(small_config("row"))
    text, image = batch(2)
    with pytest.raises(ValueError, match=r"text has shape \(2, 4\); the model reads \(batch, 5\)"):
        model.prefill(text[:, :4])
    with pytest.raises(ValueError, match=r"shape \(2, 15\); the model reads \(2, 16\)"):
        model(text, image[:, :-1])


@pytest.mark.long
def test_forward_compiles_without_graph_breaks() -> None:
    model = lively(small_config("row", "column", "conv"))
    text, image = batch()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(text, image)[1], model(text, image)[1])


# Files


def test_saved_models_load_bit_equal(tmp_path: Path) -> None:
    model = lively(small_config("row", "column", "conv")).eval()
    model.save_pretrained(tmp_path / "transformer")
    loaded = Transformer.from_pretrained(tmp_path / "transformer")
    assert loaded.config == model.config
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    text, image = batch()
    assert torch.equal(loaded(text, image)[1], model(text, image)[1])


def test_dropout_takes_whole_channels_of_a_row_in_training_alone() -> None:
    dropout = StreamDropout()
    x = torch.ones(40, 7, 50)
    assert torch.equal(dropout(x), x)  # off until set
    dropout.share = 0.25
    dropped = dropout(x)
    assert torch.equal(dropped, dropped[:, :1].expand_as(x))  # one mask for all slots
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(dropout.eval()(x), x)


def test_dropout_is_off_until_set_and_then_in_every_resblock() -> None:
    model = Transformer(small_config("row", "conv"))
    found = [module for module in model.modules() if isinstance(module, StreamDropout)]
    assert len(found) == 2 * model.config.n_layers and all(module.share == 0 for module in found)
    model.set_dropout(0.3)
    assert all(module.share == 0.3 for module in found)
