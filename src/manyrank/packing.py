"""Lengths to packs: which examples of a step go together into which micro-batch. Pure, no torch.

    step:   one optimizer step's examples, dealt to ranks and micro-batches, no padding
            rank 0:  [ex 5 | ex 2]   [ex 0 | ex 7]        every rank has as many micro-batches as the others,
            rank 1:  [ex 1 | ex 6]   [ex 3 | ex 4]        each about as long as the others

The loss is normalised over the whole step, so the layout changes the speed and never the result.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

Layout = list[list[list[int]]]  # [rank][micro-batch] -> positions in the step


def step_layout(lengths: Sequence[int], *, ranks: int, token_budget: int) -> Layout:
    """Deal one step's examples to ranks and micro-batches, balanced by tokens.

    Uses as few micro-batches as the budget allows, and the longest-first greedy rule (Graham, 1969): the next
    longest example goes to the micro-batch with the fewest tokens.

    Args:
        lengths: tokens of each example of the step.
        ranks: processes to deal to.
        token_budget: most tokens of a micro-batch; at least the longest example.

    Returns:
        For each rank its micro-batches, each a sorted list of positions in `lengths`. All ranks have the same number.
        A micro-batch may be empty, where there are fewer examples than ranks or the longest fill the budget alone.
    """
    if max(lengths) > token_budget:
        raise ValueError(f"an example of {max(lengths)} tokens exceeds the token budget of {token_budget}")
    rounds = max(1, -(-sum(lengths) // (ranks * token_budget)))
    while True:
        bins = _greedy(lengths, ranks * rounds)
        if max(sum(lengths[i] for i in members) for members in bins) <= token_budget:
            return [bins[rank::ranks] for rank in range(ranks)]
        rounds += 1


def padded_layout(examples: int, *, ranks: int, batch_size: int) -> Layout:
    """Rows in order, `batch_size` to a micro-batch; the last round may be short or, on some ranks, empty."""
    rounds = -(-examples // (ranks * batch_size))
    return [
        [
            list(range(examples))[(turn * ranks + rank) * batch_size : (turn * ranks + rank + 1) * batch_size]
            for turn in range(rounds)
        ]
        for rank in range(ranks)
    ]


def _greedy(lengths: Sequence[int], count: int) -> list[list[int]]:
    heap = [(0, index) for index in range(count)]
    bins: list[list[int]] = [[] for _ in range(count)]
    for example in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, index = heapq.heappop(heap)
        bins[index].append(example)
        heapq.heappush(heap, (tokens + lengths[example], index))
    return [sorted(members) for members in bins]
