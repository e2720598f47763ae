"""Layouts of a step, as properties of any lengths: nothing lost, nothing twice, equal rounds, within the budget."""

import random
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyrank.data.loader import side_by_side
from manyrank.data.packing import Layout, padded_layout, step_layout

LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=80)
RANKS = st.integers(1, 9)


def examples_of(layout: Layout) -> list[int]:
    return sorted(example for rank in layout for micro_batch in rank for example in micro_batch)


def rounds_of(layout: Layout) -> set[int]:
    return {len(rank) for rank in layout}


def tokens_of(layout: Layout, lengths: list[int]) -> list[list[int]]:
    return [[sum(lengths[i] for i in micro_batch) for micro_batch in rank] for rank in layout]


def imbalance(tokens: Iterable[int]) -> float:
    """How much longer the longest is than the mean: the share of time that the others wait."""
    tokens = list(tokens)
    return max(tokens) / (sum(tokens) / len(tokens)) - 1


@given(lengths=LENGTHS, ranks=RANKS, spare=st.integers(0, 2000))
def test_step_layout(lengths, ranks, spare):
    budget = max(lengths) + spare
    layout = step_layout(lengths, ranks=ranks, token_budget=budget)
    assert len(layout) == ranks
    assert examples_of(layout) == list(range(len(lengths)))
    assert len(rounds_of(layout)) == 1
    assert all(tokens <= budget for rank in tokens_of(layout, lengths) for tokens in rank)
    assert all(micro_batch == sorted(micro_batch) for rank in layout for micro_batch in rank)
    assert step_layout(lengths, ranks=ranks, token_budget=budget) == layout


@given(lengths=LENGTHS, ranks=RANKS, spare=st.integers(0, 2000))
def test_rounds_are_few(lengths, ranks, spare):
    """No rounds fewer than the tokens need; at most two times as many, since two micro-batches exceed one budget."""
    budget = max(lengths) + spare
    (rounds,) = rounds_of(step_layout(lengths, ranks=ranks, token_budget=budget))
    needed = -(-sum(lengths) // (ranks * budget))
    assert needed <= rounds <= 2 * needed


@given(lengths=LENGTHS, ranks=RANKS)
def test_one_round_where_the_budget_allows(lengths, ranks):
    layout = step_layout(lengths, ranks=ranks, token_budget=sum(lengths))
    assert rounds_of(layout) == {1}
    assert sum(not rank[0] for rank in layout) == max(0, ranks - len(lengths))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("budget", [100_000, 2048, 1024])
def test_realistic_lengths_are_balanced(seed, budget):
    chance = random.Random(seed)
    lengths = [chance.randint(60, 400) for _ in range(64)]
    tokens = tokens_of(step_layout(lengths, ranks=8, token_budget=budget), lengths)
    assert imbalance(map(sum, tokens)) < 0.05


def test_a_layout_drawn_by_hand():
    assert step_layout([5, 1, 4, 2], ranks=2, token_budget=6) == [[[0, 1]], [[2, 3]]]
    assert step_layout([5, 1, 4, 2], ranks=1, token_budget=6) == [[[0, 1], [2, 3]]]


def test_fewer_examples_than_ranks():
    assert step_layout([3, 4], ranks=3, token_budget=9) == [[[1]], [[0]], [[]]]


def test_an_example_over_the_budget():
    with pytest.raises(ValueError, match="7 tokens exceeds the token budget of 6"):
        step_layout([7, 1], ranks=1, token_budget=6)


@given(examples=st.integers(1, 80), ranks=RANKS, batch_size=st.integers(1, 9))
def test_padded_layout(examples, ranks, batch_size):
    layout = padded_layout(examples, ranks=ranks, batch_size=batch_size)
    assert len(layout) == ranks
    assert examples_of(layout) == list(range(examples))
    assert rounds_of(layout) == {-(-examples // (ranks * batch_size))}
    by_turn = [layout[rank][turn] for turn in range(len(layout[0])) for rank in range(ranks)]
    assert [i for micro_batch in by_turn for i in micro_batch] == list(range(examples)), "rows keep their order"
    sizes = [len(micro_batch) for micro_batch in by_turn]
    assert sizes == sorted(sizes, reverse=True)
    assert set(sizes) <= {batch_size, 0, examples % batch_size}


def test_a_padded_layout_drawn_by_hand():
    assert padded_layout(8, ranks=2, batch_size=2) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert padded_layout(5, ranks=2, batch_size=2) == [[[0, 1], [4]], [[2, 3], []]]


def test_positions_begin_anew_in_each_document():
    rows = [{"input_ids": np.arange(n), "labels": np.arange(n), "source": "a", "row": n} for n in (3, 2)]
    inputs = side_by_side(rows).inputs
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert inputs["cu_seq_lens_q"].tolist() == [0, 3, 5] and inputs["max_length_q"] == 3
