"""Lengths to packs: which examples go together into one row. Pure, no torch.

    step:   one optimizer step's examples, dealt to ranks and micro-batches, no padding
            rank 0:  [ex 5 | ex 2]   [ex 0 | ex 7]        every rank has as many micro-batches as the others,
            rank 1:  [ex 1 | ex 6]   [ex 3 | ex 4]        each about as long as the others

    dataset: the whole data set, put together into rows of at most max_length before steps are made of them
            pack 0:  [ex 12 | ex 5 | ex 90]     pack 1:  [ex 3 | ex 41]     ...

The loss is normalised over the whole step, so the layout of a step changes the speed and never the result.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Layout = list[list[list[int]]]  # [rank][micro-batch] -> positions in the step


def step_layout(lengths: Sequence[int], *, ranks: int, token_budget: int) -> Layout:
    """Deal one step's examples to ranks and micro-batches, balanced by tokens.

    Uses as few micro-batches as the budget allows, and the longest-first greedy rule (Graham, 1969): the next
    longest example goes to the micro-batch with the fewest tokens. Then the fullest micro-batch changes examples with
    another one as long as that makes it less full.

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
        bins = _levelled(_greedy(lengths, ranks * rounds), lengths)
        if max(sum(lengths[i] for i in members) for members in bins) <= token_budget:
            return _dealt(bins, lengths, ranks)
        rounds += 1


def _dealt(bins: list[list[int]], lengths: Sequence[int], ranks: int) -> Layout:
    """The fullest micro-batches first, and each next round in the order of what the ranks have so far.

    The micro-batches that ranks run at the same time are then about equal, and so are the sums of the ranks.
    """
    loads = [sum(lengths[i] for i in members) for members in bins]
    fullest = sorted(range(len(bins)), key=lambda b: -loads[b])
    dealt: Layout = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for start in range(0, len(bins), ranks):
        for rank, b in zip(sorted(range(ranks), key=lambda r: totals[r]), fullest[start : start + ranks]):
            dealt[rank].append(bins[b])
            totals[rank] += loads[b]
    return dealt


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
    return bins


def imbalance(layout: Layout, lengths: Sequence[int]) -> float:
    """Measure how much longer than the mean the longest rank works, in tokens; 0 is a perfect balance."""
    loads = [sum(lengths[i] for members in rank for i in members) for rank in layout]
    return max(loads) * len(loads) / sum(loads) - 1


def _levelled(bins: list[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    loads = [sum(lengths[i] for i in members) for members in bins]
    while True:
        full = max(range(len(bins)), key=loads.__getitem__)
        for other in sorted(range(len(bins)), key=loads.__getitem__):
            gap = loads[full] - loads[other]
            # Giving away `moved` tokens leaves the two best where it is half the gap.
            changes = [
                (abs(gap - 2 * (lengths[mine] - (lengths[yours] if yours >= 0 else 0))), mine, yours)
                for mine in bins[full]
                for yours in (*bins[other], -1)
            ]
            left, mine, yours = min(changes, default=(gap, 0, 0))
            if left < gap:
                break
        else:
            return [sorted(members) for members in bins]
        moved = lengths[mine] - (lengths[yours] if yours >= 0 else 0)
        bins[full] = [i for i in bins[full] if i != mine] + ([yours] if yours >= 0 else [])
        bins[other] = [i for i in bins[other] if i != yours] + [mine]
        loads[full], loads[other] = loads[full] - moved, loads[other] + moved


@dataclass(frozen=True)
class Packs:
    """A data set in packs.

    Attributes:
        members: (examples,), every example once, pack by pack.
        bounds: (packs + 1,), where each pack begins in `members`.
    """

    members: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, pack: int) -> np.ndarray:
        return self.members[self.bounds[pack] : self.bounds[pack + 1]]


def dataset_layout(lengths: np.ndarray, *, capacity: int) -> Packs:
    """Fill one pack after the other: the longest example that fits, until one or two examples fill the rest exactly.

    This is first fit decreasing, a pack at a time, with the slack of a pack minimised over its last two examples (Gupta
    and Ho, 1999, search over all). Best fit decreasing leaves 1.4% of GSM8K empty at 2048 tokens, since in the end no
    short example is left for the last gap of a pack; this leaves 0.5%. Which lengths are left is one integer of
    `capacity` bits, so that a search is a shift and an `and`.

    Args:
        lengths: (examples,), tokens of each, at least 1. Of equal ones the first is taken first.
        capacity: most tokens of a pack; at least the longest example.
    """
    if lengths.max() > capacity:
        raise ValueError(f"an example of {lengths.max()} tokens exceeds a pack of {capacity}")
    order = np.argsort(lengths, kind="stable")
    ends = np.cumsum(np.bincount(lengths, minlength=capacity + 1)).tolist()  # where a length ends in `order`
    turn = [0, *ends[:-1]]  # the next example of each length
    left = sum(1 << length for length in np.unique(lengths).tolist())  # bit i: there are examples of length i
    mirrored = sum(1 << (capacity - length) for length in np.unique(lengths).tolist())
    members, bounds = [], [0]
    while left:
        room = capacity
        while fitting := left & ((2 << room) - 1):
            length = _next_length(fitting, (mirrored >> (capacity - room)) & left, room, turn, ends)
            members.append(turn[length])
            turn[length] += 1
            room -= length
            if turn[length] == ends[length]:
                left ^= 1 << length
                mirrored ^= 1 << (capacity - length)
        bounds.append(len(members))
    return Packs(order[members], np.array(bounds))


def _next_length(fitting: int, pairs: int, room: int, turn: list[int], ends: list[int]) -> int:
    """The length to take; bit i of `pairs` says that i and room - i are both there."""
    if fitting >> room & 1:
        return room
    shortest, longest = (fitting & -fitting).bit_length() - 1, fitting.bit_length() - 1
    if pairs and room < 4 * shortest:  # so near the end that two may be the last ones
        length = pairs.bit_length() - 1
        if 2 * length != room or ends[length] - turn[length] > 1:
            return length
    return longest
