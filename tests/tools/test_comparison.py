"""Intervals that cover, and p-values that are right."""

import math

import numpy as np
import pytest

from manyrank.tools.evaluate import comparison
from manyrank.tools.evaluate.comparison import compare, mean_interval


def test_the_mean_is_of_tokens_and_not_of_means():
    found = mean_interval(np.array([10.0, 2.0]), np.array([5.0, 2.0]), seed=0)
    assert found.n == 2 and found.mean == pytest.approx(12 / 7) and (found.low, found.high) == (1.0, 2.0)


def test_intervals_are_those_of_the_normal_distribution_and_repeat():
    values = np.random.default_rng(0).normal(size=4000)
    found = mean_interval(values, np.ones(4000), seed=1)
    assert found.low == pytest.approx(found.mean - 1.96 / math.sqrt(4000), abs=2e-3)
    assert found.high == pytest.approx(found.mean + 1.96 / math.sqrt(4000), abs=2e-3)
    assert mean_interval(values, np.ones(4000), seed=1) == found != mean_interval(values, np.ones(4000), seed=2)


def test_intervals_cover_the_truth_as_often_as_they_say():
    draws = np.random.default_rng(0)
    found = [mean_interval(draws.random(60).round(), np.ones(60), seed=turn) for turn in range(100)]
    assert 88 <= sum(one.low <= 0.5 <= one.high for one in found) <= 100


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1), (1, 0, 1), (5, 5, 1), (10, 0, 2 / 1024), (0, 10, 2 / 1024), (8, 2, 2 * 56 / 1024), (3, 2, 1)],
)
def test_the_exact_test_of_scores_of_0_and_1(wins, losses, p):
    first = np.array([1.0] * wins + [0.0] * losses + [1.0])
    assert compare(first, np.array([0.0] * wins + [1.0] * losses + [1.0]), np.ones(len(first)), seed=0).p == (
        pytest.approx(p)
    )


def test_scores_of_0_and_1():
    one, other = np.array([1.0] * 9 + [0.0] * 3 + [1.0]), np.array([0.0] * 9 + [0.0] * 2 + [1.0, 1.0])
    found = compare(one, other, np.ones(13), seed=0)
    assert (found.wins, found.losses, found.ties, found.test) == (9, 1, 3, "exact McNemar")
    assert found.p == pytest.approx(2 * 11 / 1024) and found.difference.mean == pytest.approx(8 / 13)


def test_sign_flips_of_few_rows_are_the_exact_ones():
    """Six changes in one direction: 2 of 64 turns of signs are as large."""
    other = np.arange(6.0)
    found = compare(other + 0.5, other, np.full(6, 3.0), seed=0)
    assert found.test == "sign flips" and found.p == pytest.approx(2 / 64, abs=0.01)
    assert found.difference.mean == pytest.approx(0.5 / 3)
    assert compare(other, other, np.ones(6), seed=0).p == 1


def test_models_that_are_alike_seldom_seem_to_differ():
    draws = np.random.default_rng(3)
    small = sum(compare(draws.normal(size=30), draws.normal(size=30), np.ones(30), seed=0).p < 0.1 for _ in range(60))
    assert small <= 14
    shifted = draws.normal(size=30)
    assert compare(shifted + 1, shifted + draws.normal(size=30) * 0.1, np.ones(30), seed=0).p < 1e-3


def test_one_row_and_many_rows():
    one = compare(np.array([0.5]), np.array([0.2]), np.ones(1), seed=0)
    assert one.p == 1 and one.difference.low == one.difference.mean == one.difference.high
    draws = np.random.default_rng(0)
    many = draws.random(3000)
    assert mean_interval(many, np.ones(3000), seed=0).high - many.mean() == pytest.approx(0.0103, abs=1e-3)
    assert compare(many + 0.1, many[::-1], np.ones(3000), seed=0).p < 1e-9


def test_the_normal_limit_of_sign_flips_agrees_with_them(monkeypatch):
    draws = np.random.default_rng(1)
    first, second, weights = draws.random(500), draws.random(500), np.ones(500)
    flipped = compare(first, second, weights, seed=0).p
    monkeypatch.setattr(comparison, "MANY", 100)
    assert 0 < flipped < 1 and compare(first, second, weights, seed=0).p == pytest.approx(flipped, abs=0.02)
