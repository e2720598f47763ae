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
    """Where the rows of heads stand, one row for each token and head.

    shapes: (documents, length) of each group. there: (places,), the row that stands in each place; the last of the
    document in a place without a token. back: (rows,), the place of each row. empty: the places without a token.
    """

    shapes: tuple[tuple[int, int], ...]
    there: np.ndarray
    back: np.ndarray
    empty: np.ndarray


@functools.lru_cache(maxsize=4)  # all layers of a micro-batch ask for the same two
def grouped(lengths: tuple[int, ...], heads: int, longest: int) -> Groups:
    """Return the groups of documents of such lengths, in tokens; one longer than `longest` has a group of its own."""
    by_length = defaultdict(list)
    for start, length in zip(itertools.accumulate(lengths, initial=0), lengths):
        by_length[length if length > longest else -(-length // MULTIPLE) * MULTIPLE].append((start, length))
    shapes, there, filled = [], [], []
    for length, documents in sorted(by_length.items()):
        for group in [[one] for one in documents] if length > longest else _powers_of_two(documents):
            shape = (len(group), heads, length)
            begin, tokens = np.array(group).T[:, :, None, None]
            within = np.arange(length)
            there.append(((begin + np.minimum(within, tokens - 1)) * heads + np.arange(heads)[:, None]).ravel())
            filled.append(np.broadcast_to(within < tokens, shape).ravel())
            shapes.append((len(group), length))
    index, full = np.concatenate(there), np.concatenate(filled)
    back = np.empty(sum(lengths) * heads, dtype=np.int64)
    back[index[full]] = full.nonzero()[0]
    return Groups(tuple(shapes), index, back, (~full).nonzero()[0])


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
    split = []
    for tensor in (query, key, value):
        heads, tokens, size = tensor.shape[1:]
        groups = grouped(lengths, heads, longest)
        rows = tensor.squeeze(0).transpose(0, 1).reshape(tokens * heads, size)
        places = _Gather.apply(rows, torch.tensor(groups.there), torch.tensor(groups.back), None)
        parts = places.split([documents * heads * length for documents, length in groups.shapes])
        split.append([part.view(-1, heads, shape[1], size) for part, shape in zip(parts, groups.shapes)])
    groups = grouped(lengths, query.shape[1], longest)
    back, there, empty = map(torch.tensor, (groups.back, groups.there, groups.empty))
    done = torch.cat([attention(*parts).reshape(-1, value.shape[-1]) for parts in zip(*split)])
    return _Gather.apply(done, back, there, empty).view(1, query.shape[2], query.shape[1], value.shape[-1])
