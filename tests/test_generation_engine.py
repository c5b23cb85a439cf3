"""The engine: cached batched decoding against a slow twin that runs the whole stream for every token."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dalle.generation.engine import Engine, default_rows_per_batch
from dalle.generation.request import GenerationOptions
from dalle.generation.sampling import combine_guidance, sample, uniforms
from dalle.transformer import Transformer, TransformerConfig

N_VOCAB, N_TEXT, GRID, N_CODES = 20, 5, 4, 16
N_TOKENS = GRID * GRID
KINDS = ("row", "column", "conv", "dense")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread, and wait long for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(layers: tuple[str, ...] = ("row", "column", "row", "conv")) -> Transformer:
    config = TransformerConfig.model_validate(
        {
            "n_layers": len(layers),
            "n_heads": 2,
            "d_head": 8,
            "n_text_tokens": N_TEXT,
            "n_text_vocab": N_VOCAB,
            "grid_size": GRID,
            "n_image_vocab": N_CODES,
            "conv_kernel": 3,
            "layers": layers,
        }
    )
    transformer = Transformer(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        # Wide weights: every token depends visibly on the caption, the tokens before it and its place.
        for name, parameter in transformer.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.8)
    return transformer


def captions(n: int, seed: int = 0) -> Tensor:
    """n captions of different lengths, padded: (n, T)."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(N_VOCAB, (n, N_TEXT), generator=generator)
    pads = N_VOCAB + torch.arange(N_TEXT)
    length = 1 + torch.arange(n)[:, None] % N_TEXT
    return torch.where(torch.arange(N_TEXT) < length, text, pads)


def slow_twin(
    transformer: Transformer, text: Tensor, seed: int, options: GenerationOptions, known: Tensor | None = None
) -> Tensor:
    """One picture of one caption (T,), a full forward for every token: (G, G)."""
    null = N_VOCAB + torch.arange(N_TEXT)
    tokens = torch.zeros(1, N_TOKENS, dtype=torch.int64)
    noise = uniforms(seed, N_TOKENS)
    for position in range(N_TOKENS):
        if known is not None and known[position] >= 0:
            tokens[0, position] = known[position]
            continue
        with torch.no_grad():
            logits = transformer(text[None], tokens)[1][:, position]
            empty = transformer(null[None], tokens)[1][:, position]
        tokens[0, position] = sample(
            combine_guidance(logits, empty, options.guidance), noise[position : position + 1], options
        )
    return tokens.view(GRID, GRID)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_decoding_equals_a_full_forward_every_step(kind: str) -> None:
    transformer, text = build((kind, kind)), captions(2)
    options = GenerationOptions()
    drawn = Engine(transformer).generate(text, [5, 6, 7, 8], options)
    expected = [slow_twin(transformer, text[row // 2], 5 + row, options) for row in range(4)]
    assert torch.equal(drawn, torch.stack(expected))
    assert len(drawn.unique()) > 4  # the model is no constant


KNOWN_ROWS = torch.cat([torch.arange(2 * GRID) % N_CODES, torch.full((2 * GRID,), -1)])
KNOWN_SCATTERED = torch.where(torch.arange(N_TOKENS) % 3 == 0, 9, -1)


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        ({"temperature": 0}, None),
        ({"temperature": 0.6, "top_k": 5}, None),
        ({"top_p": 0.6}, None),
        ({"guidance": 2.5}, None),
        ({"guidance": 0}, None),
        ({}, KNOWN_ROWS),
        ({"guidance": 3, "top_k": 6, "top_p": 0.9, "temperature": 0.8}, KNOWN_SCATTERED),
    ],
)
def test_every_option_equals_its_slow_twin(settings: dict[str, float], known: Tensor | None) -> None:
    transformer, text = build(), captions(2, seed=1)
    options = GenerationOptions.model_validate(settings)
    drawn = Engine(transformer).generate(text, [1, 2, 3, 4], options, known=known)
    expected = [slow_twin(transformer, text[row // 2], 1 + row, options, known) for row in range(4)]
    assert torch.equal(drawn, torch.stack(expected))


def test_guidance_of_one_is_no_guidance_and_zero_ignores_the_caption() -> None:
    engine, text = Engine(build()), captions(2)
    plain = engine.generate(text, [0, 0])
    assert torch.equal(plain, engine.generate(text, [0, 0], GenerationOptions(guidance=1)))
    assert not torch.equal(plain[0], plain[1])
    unguided = engine.generate(text, [0, 0], GenerationOptions(guidance=0))
    assert torch.equal(unguided[0], unguided[1])


def test_captions_with_different_numbers_of_pictures_equal_their_slow_twins() -> None:
    transformer, text = build(), captions(3)
    counts, options = [1, 4, 2], [GenerationOptions(guidance=2.5 if row % 2 else 1) for row in range(7)]
    known = torch.stack([KNOWN_ROWS if row == 5 else torch.full((N_TOKENS,), -1) for row in range(7)])
    drawn = Engine(transformer).generate(text, [*range(7)], options, known=known, n_pictures=counts)
    caption_of = [0, 1, 1, 1, 1, 2, 2]
    expected = [
        slow_twin(transformer, text[caption_of[row]], row, options[row], KNOWN_ROWS if row == 5 else None)
        for row in range(7)
    ]
    assert torch.equal(drawn, torch.stack(expected))


@pytest.mark.parametrize("counts", [[1, 2], [1, 1, 2], [3, 0], [2, 2, -1]])
def test_numbers_of_pictures_that_do_not_add_up_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="3 seeds for 3 captions"):
        Engine(build()).generate(captions(3), [0, 1, 2], n_pictures=counts)


def test_a_pictures_tokens_do_not_depend_on_its_neighbours_or_place() -> None:
    engine, text = Engine(build()), captions(3)
    together = engine.generate(text, [10, 11, 12, 13, 14, 15])
    for row in range(6):
        alone = engine.generate(text[row // 2 : row // 2 + 1], [10 + row])
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_the_number_of_pictures_side_by_side_does_not_change_the_tokens(n: int) -> None:
    engine, text = Engine(build()), captions(1)
    options = GenerationOptions(guidance=2)
    expected = engine.generate(text, range(9), options)
    for start in range(0, 9, n):
        part = engine.generate(text, range(start, min(9, start + n)), options)
        assert torch.equal(part, expected[start : start + n])


MIXED = (
    {"temperature": 0},
    {"guidance": 3},
    {"top_k": 3},
    {"guidance": 2, "top_p": 0.7},
    {"guidance": 3},
    {},
)


def test_pictures_with_settings_of_their_own_are_drawn_as_alone() -> None:
    engine, text = Engine(build()), captions(3)
    options = [GenerationOptions.model_validate(one) for one in MIXED]
    known = torch.full((6, N_TOKENS), -1)
    known[1, :5], known[4, 7:9] = 2, 11
    together = engine.generate(text, list(range(6)), options, known=known)
    for row in range(6):
        alone = engine.generate(text[row // 2 : row // 2 + 1], [row], options[row], known=known[row])
        assert torch.equal(alone[0], together[row])
        assert torch.equal(alone[0], slow_twin(engine.model, text[row // 2], row, options[row], known[row]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_step_draws_the_same_tokens_at_every_position(kind: str) -> None:
    transformer, text = build((kind, "row", kind)), captions(2)
    options = [GenerationOptions.model_validate(one) for one in MIXED]
    for known in (None, KNOWN_ROWS, KNOWN_SCATTERED):
        expected = Engine(transformer).generate(text, list(range(6)), options, known=known)
        recorded = Engine(transformer, is_recorded=True).generate(text, list(range(6)), options, known=known)
        assert torch.equal(recorded, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_draws_the_tokens_of_plain_steps_and_of_a_cpu() -> None:
    transformer, text = build(), captions(2)
    options = [GenerationOptions.model_validate(one) for one in MIXED]
    expected = Engine(transformer).generate(text, list(range(6)), options)
    transformer.cuda()
    plain = Engine(transformer, is_recorded=False).generate(text, list(range(6)), options)
    assert torch.equal(plain.cpu(), expected)
    engine = Engine(transformer)
    for _ in range(2):
        assert torch.equal(engine.generate(text, list(range(6)), options).cpu(), expected)


def test_settings_for_another_number_of_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="2 options for 3 seeds"):
        Engine(build()).generate(captions(1), [0, 1, 2], [GenerationOptions()] * 2)


def test_known_tokens_come_back_unchanged_and_the_rest_follows_them() -> None:
    engine, text = Engine(build()), captions(1)
    drawn = engine.generate(text, [0, 1], known=KNOWN_ROWS)
    assert torch.equal(drawn.view(2, -1)[:, : 2 * GRID], KNOWN_ROWS[: 2 * GRID].expand(2, -1))
    assert not torch.equal(drawn, engine.generate(text, [0, 1]))


def test_a_wholly_known_picture_is_returned_as_it_is() -> None:
    known = torch.arange(N_TOKENS) % N_CODES
    drawn = Engine(build()).generate(captions(1), [0], known=known)
    assert torch.equal(drawn.flatten(), known)


def test_the_callback_sees_every_finished_row() -> None:
    seen: list[tuple[int, Tensor]] = []
    drawn = Engine(build()).generate(
        captions(2), [0, 1], on_row_end=lambda row, tokens: seen.append((row, tokens))
    )
    assert [row for row, _ in seen] == [0, 1, 2, 3]
    for row, tokens in seen:
        assert torch.equal(tokens[:, : row + 1], drawn[:, : row + 1])
        assert bool((tokens[:, row + 1 :] == -1).all())


def test_the_callback_cannot_change_the_drawing() -> None:
    engine, text = Engine(build()), captions(1)
    scribbled = engine.generate(text, [0], on_row_end=lambda row, tokens: tokens.fill_(3).sum() < 0)
    assert torch.equal(scribbled, engine.generate(text, [0]))


def test_returning_true_ends_the_run_with_the_rest_undrawn() -> None:
    engine, text = Engine(build()), captions(2)
    whole = engine.generate(text, [0, 1])
    stopped = engine.generate(text, [0, 1], on_row_end=lambda row, tokens: row == 1)
    assert torch.equal(stopped[:, :2], whole[:, :2])
    assert bool((stopped[:, 2:] == -1).all())


def test_an_interrupt_leaves_the_engine_usable() -> None:
    engine, text = Engine(build()), captions(1)
    expected = engine.generate(text, [3])

    def interrupt(row: int, tokens: Tensor) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(text, [3], on_row_end=interrupt)
    assert torch.is_grad_enabled()
    assert torch.equal(engine.generate(text, [3]), expected)


def test_generating_edits_neither_text_nor_known_nor_the_global_generator() -> None:
    engine, text, known = Engine(build()), captions(2), KNOWN_ROWS.clone()
    before, state = text.clone(), torch.get_rng_state()
    engine.generate(text, [0, 1], GenerationOptions(guidance=2), known=known)
    assert torch.equal(text, before) and torch.equal(known, KNOWN_ROWS)
    assert torch.equal(state, torch.get_rng_state())


def test_training_still_works_after_sampling_with_the_same_model() -> None:
    transformer, text = build(), captions(2)
    image = Engine(transformer).generate(text, [0, 1]).flatten(1)
    transformer.loss(text, image).total.backward()
    assert all(parameter.grad is not None for parameter in transformer.parameters())


def test_logits_that_are_not_numbers_are_an_error() -> None:
    transformer = build()
    with torch.no_grad():
        transformer.norm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="NaN in row 0"):
        Engine(transformer).generate(captions(1), [0])


PADS = N_VOCAB + torch.arange(N_TEXT)


@pytest.mark.parametrize(
    ("text", "seeds", "known", "message"),
    [
        (PADS, [0], None, r"text has shape \(5,\)"),
        (PADS[None, :3], [0], None, r"text has shape \(1, 3\)"),
        (PADS[None] + N_TEXT, [0], None, "text holds ids 25..29; the transformer knows 0..24"),
        (PADS.repeat(2, 1), [0, 1, 2], None, "3 seeds for 2 captions"),
        (PADS[None], [], None, "0 seeds for 1 captions"),
        (PADS[None], [-1], None, "seeds are -1"),
        (PADS[None], [2**63], None, "seeds are 9223372036854775808"),
        (PADS[None], [0], torch.zeros(3, dtype=torch.int64), r"known has shape \(3,\)"),
        (PADS[None], [0], torch.full((N_TOKENS,), N_CODES), "known holds 16..16; allowed are 0..15"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    text: Tensor, seeds: list[int], known: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(build()).generate(text, seeds, known=known)


def test_small_models_draw_more_pictures_side_by_side_and_caches_stay_bounded() -> None:
    def of(n_layers: int, n_heads: int, grid: int) -> Transformer:
        config = TransformerConfig(
            n_layers=n_layers,
            n_heads=n_heads,
            d_head=64,
            n_text_tokens=32,
            n_text_vocab=64,
            grid_size=grid,
            n_image_vocab=64,
        )
        with torch.device("meta"):
            return Transformer(config).to(torch.bfloat16)

    small, larger, large = of(6, 4, 8), of(6, 8, 16), of(8, 8, 32)
    assert [default_rows_per_batch(one) for one in (small, larger, large)] == [256, 256, 64]
    assert default_rows_per_batch(larger.float()) == 128
