"""Intervals: exact ones against published and closed forms, bootstrap ones against theory, refusals of small samples."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from dalle.evaluation.intervals import binomial_interval, bootstrap, difference, estimate, median_estimate


@pytest.mark.parametrize(("hits", "n"), [(0, 20), (1, 20), (10, 20), (20, 20), (96, 213), (7, 3000)])
def test_the_interval_of_a_share_is_that_of_clopper_and_pearson(hits: int, n: int) -> None:
    exact = binomtest(hits, n).proportion_ci(0.95, method="exact")
    assert binomial_interval(hits, n) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_a_share_gets_the_exact_interval_and_a_mean_the_bootstraps() -> None:
    share = estimate([1, 0] * 50)
    assert (share["value"], share["standard_error"], share["n"]) == (0.5, 0.05, 100)
    assert (share["low"], share["high"]) == pytest.approx(binomial_interval(50, 100))
    values = np.random.default_rng(1).normal(3, 2, 400)
    mean = estimate(values)
    error = values.std(ddof=1) / math.sqrt(400)
    assert mean["value"] == values.mean() and mean["standard_error"] == pytest.approx(error)
    assert mean["high"] - mean["low"] == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert estimate(values) == mean


def test_the_median_has_the_asymptotic_error_of_a_normal_sample() -> None:
    values = np.random.default_rng(2).normal(0, 1, 1000)
    median = median_estimate(values)
    assert median["standard_error"] == pytest.approx(math.sqrt(math.pi / 2 / 1000), rel=0.25)
    assert median["low"] < median["value"] < median["high"]


def test_pairing_finds_a_difference_that_lies_within_both_intervals() -> None:
    rng = np.random.default_rng(3)
    baseline = rng.normal(0, 1, 200)
    ours = baseline + 0.1 + rng.normal(0, 0.1, 200)
    found = difference(ours, baseline)
    assert found["beats"] and found["value"] == pytest.approx(0.1, abs=0.03)
    assert found["standard_error"] == pytest.approx(0.1 / math.sqrt(200), rel=0.25)
    assert estimate(ours)["low"] < estimate(baseline)["high"]
    assert not difference(baseline, ours)["beats"]
    assert not difference(baseline, baseline)["beats"]


def test_too_few_values_give_a_sentence_and_no_figure() -> None:
    for found in (estimate([1, 1, 1]), median_estimate([1.0] * 3), difference([1, 1, 1], [0, 0, 0])):
        assert found["value"] is None and found["n"] == 3
        assert found["refused"] == "3 values: at least 20 are needed for a figure"
    assert difference([1, 1, 1], [0, 0, 0])["beats"] is False
    assert estimate([])["refused"].startswith("0 values")


def test_resampling_in_pieces_is_resampling_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(50.0)
    whole = bootstrap(values, lambda x: x.mean(axis=-1))
    monkeypatch.setattr("dalle.evaluation.intervals.RESAMPLED_AT_ONCE", 50 * 7)
    assert bootstrap(values, lambda x: x.mean(axis=-1)) == whole
