"""Documents of similar lengths side by side, for attention by matrix products on a CPU.

    (tokens * heads, d)  --gather-->  groups of (documents, heads, length, d)  --attention-->  --gather back-->

oneDNN compiles a kernel for each shape that it meets, which takes 1.3 ms where the product of 16-bit matrices takes 0.1,
and each document is as long as none before it. So lengths are rounded up to multiples of 16 and documents grouped by powers of
two, which leaves some tens of shapes for the whole run. Places without a token come after those of the document, where
no query of it looks, and get no gradient.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.autograd.function import once_differentiable

MULTIPLE = 16  # tokens


@dataclass(frozen=True)
class Groups:
    """Which row stands where; a row is one token's of one head. No tensors, since this is kept from step to step.

    shapes: (documents, length) of each group. rows: (places,), the row in each place; the document's last one in a
    place without a token. places: (rows,), the place of each row. empty: the places without a token.
    """

    shapes: tuple[tuple[int, int], ...]
    rows: np.ndarray
    places: np.ndarray
    empty: np.ndarray


@functools.lru_cache(maxsize=4)  # all layers of a micro-batch ask for the same two
def group_documents(lengths: tuple[int, ...], heads: int, longest: int) -> Groups:
    """Return the groups of documents of such lengths, in tokens; one longer than `longest` has a group of its own."""
    by_length = defaultdict(list)
    for start, length in zip(itertools.accumulate(lengths, initial=0), lengths):
        by_length[length if length > longest else -(-length // MULTIPLE) * MULTIPLE].append((start, length))
    shapes, rows, full = [], [], []
    for length, documents in sorted(by_length.items()):
        for group in [[one] for one in documents] if length > longest else _powers_of_two(documents):
            begin, tokens = np.array(group).T[:, :, None, None]
            within = np.arange(length)
            rows.append(((begin + np.minimum(within, tokens - 1)) * heads + np.arange(heads)[:, None]).ravel())
            full.append(np.broadcast_to(within < tokens, (len(group), heads, length)).ravel())
            shapes.append((len(group), length))
    all_rows, is_full = np.concatenate(rows), np.concatenate(full)
    places = np.empty(sum(lengths) * heads, dtype=np.int64)
    places[all_rows[is_full]] = is_full.nonzero()[0]
    return Groups(tuple(shapes), all_rows, places, (~is_full).nonzero()[0])


def _powers_of_two(documents: list) -> list[list]:
    groups = []
    while documents:
        size = 1 << (len(documents).bit_length() - 1)
        groups.append(documents[:size])
        documents = documents[size:]
    return groups


class _Gather(torch.autograd.Function):
    """Rows of x by their numbers, with a gather for the backward, too, where index_select adds row by row.

    Args of `apply`:
        x: (n, d). index: (m,), rows of x. inverse: (n,), where a row stands in the result. unread: rows of x that
        `index` leaves out; their gradient is zero.
    """

    @staticmethod
    def forward(ctx, x, index, inverse, unread):
        ctx.save_for_backward(inverse, unread)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        inverse, unread = ctx.saved_tensors
        gradient = gradient.index_select(0, inverse)
        return gradient if unread is None else gradient.index_fill_(0, unread, 0), None, None, None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    longest: int,
) -> torch.Tensor:
    """Attend inside each document, group by group.

    Args:
        query, key, value: (1, heads, tokens, d), with as many heads and as large ones as each has.
        attention: causal, of (documents, heads, length, d) three times.
        longest: tokens of a document up to which it shares a group.

    Returns:
        (1, tokens, heads of queries, d of values).
    """
    heads_of_queries, tokens = query.shape[1:3]
    groups = {heads: group_documents(lengths, heads, longest) for heads in {heads_of_queries, key.shape[1]}}
    index = {heads: tuple(map(torch.tensor, (its.rows, its.places, its.empty))) for heads, its in groups.items()}
    operands = []
    for tensor in (query, key, value):
        heads, size = tensor.shape[1], tensor.shape[3]
        rows, places, _ = index[heads]
        gathered = _Gather.apply(tensor.squeeze(0).transpose(0, 1).reshape(tokens * heads, size), rows, places, None)
        shapes = groups[heads].shapes
        parts = gathered.split([documents * heads * length for documents, length in shapes])
        operands.append([part.view(-1, heads, length, size) for part, (_, length) in zip(parts, shapes)])
    rows, places, empty = index[heads_of_queries]
    outputs = torch.cat([attention(*parts).reshape(-1, value.shape[-1]) for parts in zip(*operands)])
    return _Gather.apply(outputs, places, rows, empty).view(1, tokens, heads_of_queries, value.shape[-1])
