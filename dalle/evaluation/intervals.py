"""How sure a figure is: exact and bootstrap intervals, paired differences, and the refusal of too small samples.

Source: Clopper and Pearson 1934 (shares); Efron 1979 (bootstrap). Every interval is one of 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

MIN_N = 20  # fewer say nothing about a share or a mean that is worth printing
N_RESAMPLES = 1000
LEVEL = 0.95
TWO_ERRORS = 2.0  # standard errors by which a figure has to beat its baseline
RESAMPLED_AT_ONCE = 2**22  # values

Values = npt.NDArray[np.float64]
Estimate = dict[str, Any]  # value, low, high, standard_error, n; of too few: value None, n, refused


def estimate(values: npt.ArrayLike, least: int = MIN_N) -> Estimate:
    """Estimate the mean of independent values (n,), with the exact interval where all are 0 or 1 (a share).

    Otherwise the interval is a bootstrap's. With fewer than `least` values there is a sentence in place of a figure.
    """
    x = np.asarray(values, dtype=np.float64)
    if (refusal := refused(len(x), least)) is not None:
        return refusal
    mean = float(x.mean())
    if np.isin(x, (0.0, 1.0)).all():
        low, high = binomial_interval(int(x.sum()), len(x))
        return _estimate(mean, low, high, math.sqrt(mean * (1 - mean) / len(x)), len(x))
    low, high, _ = bootstrap(x, lambda resampled: resampled.mean(axis=-1))
    return _estimate(mean, low, high, float(x.std(ddof=1)) / math.sqrt(len(x)), len(x))


def median_estimate(values: npt.ArrayLike, least: int = MIN_N) -> Estimate:
    """As `estimate`, of the median."""
    x = np.asarray(values, dtype=np.float64)
    if (refusal := refused(len(x), least)) is not None:
        return refusal
    low, high, error = bootstrap(x, lambda resampled: np.median(resampled, axis=-1))
    return _estimate(float(np.median(x)), low, high, error, len(x))


def difference(ours: npt.ArrayLike, baseline: npt.ArrayLike, least: int = MIN_N) -> Estimate:
    """Estimate the mean of ours - baseline over pairs (n,), and whether it is above 0 by two standard errors (`beats`)."""
    x = np.asarray(ours, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    if (refusal := refused(len(x), least)) is not None:
        return refusal | {"beats": False}
    low, high, error = bootstrap(x, lambda resampled: resampled.mean(axis=-1))
    mean = float(x.mean())
    return _estimate(mean, low, high, error, len(x)) | {"beats": mean > TWO_ERRORS * error and mean > 0}


def refused(n: int, least: int, what: str = "values") -> Estimate | None:
    """Say why there is no figure of n values; None where there are enough."""
    if n >= least:
        return None
    return {"value": None, "n": n, "refused": f"{n} {what}: at least {least} are needed for a figure"}


def bootstrap(x: Values, statistic: Callable[[Values], Values], seed: int = 0) -> tuple[float, float, float]:
    """Resample values (n,) with replacement: percentiles of `statistic`, low and high, and its standard error.

    `statistic` reduces the last axis. The same values and seed give the same answer.
    """
    rng, found, left = np.random.default_rng(seed), list[Values](), N_RESAMPLES
    while left:
        count = min(left, max(1, RESAMPLED_AT_ONCE // len(x)))
        found.append(statistic(x[rng.integers(len(x), size=(count, len(x)))]))
        left -= count
    statistics = np.concatenate(found)
    low, high = np.quantile(statistics, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high), float(statistics.std(ddof=1))


def binomial_interval(n_hits: int, n: int) -> tuple[float, float]:
    """Return the Clopper-Pearson interval of a share: the rates at which as few, or as many, hits have 2.5 %."""
    tail = (1 - LEVEL) / 2
    low = 0.0 if n_hits == 0 else _rate(lambda p: _at_least(n_hits, n, p) < tail)
    high = 1.0 if n_hits == n else _rate(lambda p: 1 - _at_least(n_hits + 1, n, p) > tail)
    return low, high


def _rate(is_below: Callable[[float], bool]) -> float:
    """Bisect for the rate up to which `is_below` holds."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return (low + high) / 2


def _at_least(k: int, n: int, p: float) -> float:
    """Return the chance of k or more hits of n at rate p in (0, 1)."""
    counts = range(k, n + 1)
    choose = math.lgamma(n + 1)
    logs = (
        choose - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in counts
    )
    return math.fsum(map(math.exp, logs))


def _estimate(value: float, low: float, high: float, error: float, n: int) -> Estimate:
    return {"value": value, "low": low, "high": high, "standard_error": error, "n": n}
