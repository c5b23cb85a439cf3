"""Sampling: each function against its definition, on logits small enough to check by hand or by counting."""

import pytest
import torch

from dalle.generation.request import GenerationOptions
from dalle.generation.sampling import (
    MAX_SEED,
    combine_guidance,
    inverse_cdf,
    keep_top_p,
    sample,
    top_k_of,
    uniforms,
)

BELOW_ONE = 1 - 2**-53  # the largest float64 below 1


def test_uniforms_depend_on_the_seed_alone_and_lie_in_the_unit_interval() -> None:
    torch.manual_seed(5)
    first = uniforms(3, 1000)
    torch.manual_seed(6)
    assert torch.equal(first, uniforms(3, 1000))
    assert first.dtype == torch.float64
    assert 0 <= float(first.min()) and float(first.max()) < 1
    assert not torch.equal(first, uniforms(4, 1000))
    assert torch.equal(uniforms(MAX_SEED, 4), uniforms(MAX_SEED, 4))


def test_drawing_uniforms_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    uniforms(0, 10)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed is {seed}; allowed are 0\.\."):
        uniforms(seed, 4)


def test_guidance_is_linear_between_the_two_logits() -> None:
    cond, uncond = torch.tensor([[1.0, 4.0]]), torch.tensor([[3.0, 2.0]])
    assert torch.equal(combine_guidance(cond, uncond, 1.0), cond)
    assert torch.equal(combine_guidance(cond, uncond, 0.0), uncond)
    assert torch.equal(combine_guidance(cond, uncond, 3.0), torch.tensor([[-3.0, 8.0]]))


def test_top_k_keeps_exactly_k_even_among_ties_in_the_order_of_the_tokens() -> None:
    logits, tokens = top_k_of(torch.tensor([[3.0, 2.0, 1.0, 4.0], [1.0, 1.0, 1.0, 1.0]]), 2)
    assert (logits[0].tolist(), tokens[0].tolist()) == ([3.0, 4.0], [0, 3])
    assert tokens.shape == (2, 2) and int(tokens[1, 0]) < int(tokens[1, 1])


def test_top_k_of_the_whole_vocabulary_or_more_changes_nothing() -> None:
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    uniform = uniforms(0, 50)
    expected = sample(logits, uniform, GenerationOptions())
    for k in (6, 100):
        assert torch.equal(sample(logits, uniform, GenerationOptions(top_k=k)), expected)


def test_top_k_draws_the_k_likeliest_with_their_own_odds() -> None:
    logits = torch.randn(256, generator=torch.Generator().manual_seed(0))
    uniform = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    drawn = sample(logits.expand(20000, 256), uniform, GenerationOptions(top_k=5))
    best = logits.topk(5).indices
    expected = torch.zeros(256).scatter(0, best, logits[best].softmax(0))
    assert torch.allclose(drawn.bincount(minlength=256) / 20000, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("p", "kept"), [(0.3, [1]), (0.5, [1]), (0.55, [1, 3]), (0.8, [1, 3]), (0.9, [0, 1, 3]), (1e-9, [1])]
)
def test_top_p_keeps_the_fewest_tokens_that_reach_p(p: float, kept: list[int]) -> None:
    # 0.53 etc.: sums that float32 cannot move across the thresholds above
    logits = torch.tensor([[0.13, 0.53, 0.05, 0.29]]).log()
    assert keep_top_p(logits, p)[0].isfinite().nonzero().flatten().tolist() == kept


def test_top_p_keeps_the_logits_it_keeps() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    kept = keep_top_p(logits, 0.7)
    assert torch.equal(kept[kept.isfinite()], logits[kept.isfinite()])


def test_inverse_cdf_takes_the_first_token_whose_cdf_exceeds_the_uniform() -> None:
    probabilities = torch.tensor([[0.25, 0.25, 0.5]]).expand(6, 3)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.4999, 0.5, 0.9999], dtype=torch.float64)
    assert inverse_cdf(probabilities, uniform).tolist() == [0, 0, 1, 1, 2, 2]


def test_inverse_cdf_never_returns_a_token_of_probability_zero() -> None:
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).expand(4, 5)
    uniform = torch.tensor([0.0, 0.5 - 2**-54, 0.5, BELOW_ONE], dtype=torch.float64)
    assert inverse_cdf(probabilities, uniform).tolist() == [1, 1, 3, 3]


def test_inverse_cdf_never_returns_a_zero_at_the_extremes_of_many_random_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(400, 999, generator=generator) * (
        torch.rand(400, 999, generator=generator) < 0.1
    )
    for u in (0.0, BELOW_ONE):
        drawn = inverse_cdf(probabilities, torch.full((400,), u, dtype=torch.float64))
        assert bool((probabilities.gather(1, drawn[:, None]) > 0).all())


def slow_inverse_cdf(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The definition: one running sum in float64 over all tokens."""
    cdf = probabilities.double().cumsum(-1)
    return ((cdf > uniform[:, None] * cdf[:, -1:]) & (probabilities > 0)).to(torch.uint8).argmax(-1)


@pytest.mark.parametrize("n_tokens", [128, 256, 8192, 300, 1])
def test_searching_block_by_block_finds_the_token_of_one_running_sum(n_tokens: int) -> None:
    generator = torch.Generator().manual_seed(n_tokens)
    probabilities = (4 * torch.randn(500, n_tokens, generator=generator)).softmax(-1)
    probabilities *= torch.rand(500, n_tokens, generator=generator) < 0.5
    probabilities[:, -1] += 1e-9  # no row of zeros
    uniform = torch.rand(500, generator=generator, dtype=torch.float64)
    assert torch.equal(inverse_cdf(probabilities, uniform), slow_inverse_cdf(probabilities, uniform))


def test_a_token_far_rarer_than_float32_can_add_is_drawn_where_it_lies() -> None:
    probabilities = torch.zeros(1, 8192)
    probabilities[0, 3], probabilities[0, 5000] = 1.0, 1e-12
    drawn = [
        int(inverse_cdf(probabilities, torch.tensor([u], dtype=torch.float64))) for u in (0.5, BELOW_ONE)
    ]
    assert drawn == [3, 5000]


def test_sampled_frequencies_are_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    uniform = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000  # every quantile once
    drawn = sample(logits.expand(20000, 4), uniform, GenerationOptions(temperature=0.7))
    frequency = drawn.bincount(minlength=4) / 20000
    assert torch.allclose(frequency, (logits[0] / 0.7).softmax(0), atol=1e-4)


def test_temperature_zero_is_argmax_whatever_the_uniform() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]]).expand(3, 3)
    uniform = torch.tensor([0.0, 0.5, 0.99], dtype=torch.float64)
    assert sample(logits, uniform, GenerationOptions(temperature=0)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("temperature", [1e-7, 1e-45, 5e-324])
def test_a_temperature_too_small_to_divide_by_is_argmax(temperature: float) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    uniform = torch.tensor([0.99], dtype=torch.float64)
    assert sample(logits, uniform, GenerationOptions(temperature=temperature)).tolist() == [1]


def test_top_k_one_is_argmax() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    uniform = torch.tensor([0.99], dtype=torch.float64)
    assert sample(logits, uniform, GenerationOptions(top_k=1)).tolist() == [1]


def test_top_k_and_top_p_together_draw_only_what_both_allow() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().expand(100, 4)
    uniform = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    # of the top three, renormalised to 0.44 0.33 0.22, the first two reach 0.7
    assert sample(logits, uniform, GenerationOptions(top_k=3, top_p=0.7)).unique().tolist() == [0, 1]


def test_sampling_does_not_edit_its_arguments() -> None:
    logits = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    uniform = uniforms(0, 2)
    before = logits.clone(), uniform.clone()
    sample(logits, uniform, GenerationOptions(temperature=0.5, top_k=3, top_p=0.5))
    assert torch.equal(logits, before[0]) and torch.equal(uniform, before[1])
