"""How sure a mean is, and whether two models differ on the same rows. Pure: numpy alone.

A metric is a pair of columns: for each row a value and a weight, and its mean is sum(values) / sum(weights). Of a score
the weights are 1; of the loss the value is the sum over a row's supervised tokens, and the weight their number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000  # of a bootstrap
FLIPS = 10_000  # of signs; the smallest p-value that can be found is 1 / (FLIPS + 1)
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
    """The mean and its percentile bootstrap interval (Efron 1979), by drawing rows.

    Args:
        values, weights: (rows,), at least one row.
    """
    means = _resampled(values, weights, seed)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(len(values), float(values.sum() / weights.sum()), float(low), float(high))


def compare(one: np.ndarray, other: np.ndarray, weights: np.ndarray, *, seed: int) -> Comparison:
    """The values of one model against those of another, row by row.

    Scores that are all 0 or 1 are compared by McNemar's test in its exact form, a sign test of the rows on which the two
    differ (McNemar 1947). Others by turning the signs of the rows' differences at random (Fisher 1935).

    Args:
        one, other, weights: (rows,), at least one row.
    """
    change = one - other
    wins, losses = int((change > 0).sum()), int((change < 0).sum())
    binary = bool(np.isin(one, (0, 1)).all() and np.isin(other, (0, 1)).all() and (weights == 1).all())
    p = sign_test(wins, losses) if binary else _flipped(change, seed)
    test = "exact McNemar" if binary else "sign flips"
    return Comparison(mean_interval(change, weights, seed=seed), wins, losses, len(change) - wins - losses, p, test)


def sign_test(wins: int, losses: int) -> float:
    """The two-sided p-value of so many wins and losses where both are as likely."""
    count = wins + losses
    term = tail = 1
    for k in range(min(wins, losses)):
        term = term * (count - k) // (k + 1)  # count over k + 1
        tail += term
    return min(1.0, 2 * tail / 2**count)  # of whole numbers, however large


def _resampled(values: np.ndarray, weights: np.ndarray, seed: int) -> np.ndarray:
    """(RESAMPLES,), the means of rows drawn with replacement."""
    draws, rows = np.random.default_rng([seed, 0]), len(values)
    means = []
    for at in range(0, RESAMPLES, size := max(1, AT_ONCE // rows)):
        chosen = draws.integers(rows, size=(min(size, RESAMPLES - at), rows))
        means.append(values[chosen].sum(1) / weights[chosen].sum(1))
    return np.concatenate(means)


def _flipped(change: np.ndarray, seed: int) -> float:
    """The p-value of the sum of changes, where each could as well have had the other sign."""
    changed = change[change != 0]
    if not len(changed):
        return 1.0
    draws, found, as_large = np.random.default_rng([seed, 1]), abs(changed.sum()), 0
    for at in range(0, FLIPS, size := max(1, AT_ONCE // len(changed))):
        signs = draws.integers(0, 2, size=(min(size, FLIPS - at), len(changed)), dtype=np.int8) * 2 - 1
        as_large += int((np.abs(signs @ changed) >= found * (1 - 1e-9)).sum())
    return (as_large + 1) / (FLIPS + 1)
