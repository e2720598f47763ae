"""Intervals of means, and tests of whether two models differ on the same rows. Pure: numpy and scipy.

A metric is a pair of columns: for each row a value and a weight, and its mean is sum(values) / sum(weights). Of a score
the weights are 1; of the loss the value is the sum over a row's supervised tokens, and the weight their number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000  # of a bootstrap
FLIPS = 10_000  # of signs; the smallest p-value that they find is 1 / (FLIPS + 1)
MANY = 2000  # rows from which the sum of flipped differences is taken as normal
AT_ONCE = 4_000_000  # numbers held at a time


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval.

    Attributes:
        n: rows.
    """

    n: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """One model against another on the same rows.

    Attributes:
        difference: of the means, with its 95% interval.
        wins, losses, ties: rows on which the value of the first is greater, smaller, the same.
        p: the probability of a difference as large as this if the two were alike; by `test`.
    """

    difference: Interval
    wins: int
    losses: int
    ties: int
    p: float
    test: str


def mean_interval(values: np.ndarray, weights: np.ndarray, *, seed: int) -> Interval:
    """Compute the mean and its percentile bootstrap interval (Efron 1979), by drawing rows.

    Args:
        values, weights: (rows,), at least one row.
    """
    from scipy.stats import bootstrap

    mean = float(values.sum() / weights.sum())
    if len(values) == 1:  # which scipy refuses
        return Interval(1, mean, mean, mean)
    interval = bootstrap(
        (values, weights),
        lambda values, weights, axis: values.sum(axis) / weights.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=RESAMPLES,
        batch=max(1, AT_ONCE // len(values)),
        rng=np.random.default_rng([seed, 0]),
    ).confidence_interval
    return Interval(len(values), mean, float(interval.low), float(interval.high))


def compare(first: np.ndarray, second: np.ndarray, weights: np.ndarray, *, seed: int) -> Comparison:
    """Compare the values of one model with those of another, row by row.

    Scores that are all 0 or 1 are compared by McNemar's test in its exact form, a binomial test of the rows on which the
    two differ (McNemar 1947). Others by turning the signs of the rows' differences at random (Fisher 1935).

    Args:
        first, second, weights: (rows,), at least one row.
    """
    from scipy.stats import binomtest

    change = first - second
    wins, losses = int((change > 0).sum()), int((change < 0).sum())
    if np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all() and (weights == 1).all():
        p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
        test = "exact McNemar"
    else:
        p, test = _sign_flips(change[change != 0], seed), "sign flips"
    interval = mean_interval(change, weights, seed=seed)
    return Comparison(interval, wins, losses, len(change) - wins - losses, p, test)


def _sign_flips(changes: np.ndarray, seed: int) -> float:
    """Compute the p-value of the sum of changes, where each could as well have had the other sign."""
    from scipy.stats import norm, permutation_test

    if len(changes) < 2:
        return 1.0
    if len(changes) > MANY:  # half a minute of flips would find the same
        return float(2 * norm.sf(abs(changes.sum()) / np.sqrt((changes**2).sum())))
    flips = permutation_test(
        (changes,),
        lambda values, axis: values.sum(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=FLIPS,
        batch=max(1, AT_ONCE // len(changes)),
        rng=np.random.default_rng([seed, 1]),
    )
    return float(flips.pvalue)
