"""Documents in groups attend as they do one by one, forward and backward, and few shapes are met."""

import random

import pytest
import torch
import torch.nn.functional as F

from manyrank.models.document_groups import MULTIPLE, attend, grouped

LENGTHS = (5, 33, 1, 40, 31, 32, 70, 2)


def causal(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("longest", [1024, 32, 0], ids=["all in groups", "some alone", "all alone"])
def test_groups_attend_as_documents_one_by_one(longest):
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    shapes = ((1, tokens, 4, 6), (1, tokens, 2, 6), (1, tokens, 2, 3))  # values are narrower
    inputs = [torch.randn(shape, dtype=torch.float64).transpose(1, 2).requires_grad_() for shape in shapes]
    found = attend(*inputs, LENGTHS, causal, longest=longest)
    documents = zip(*(tensor.split(LENGTHS, dim=2) for tensor in inputs))
    expected = torch.cat([causal(*parts).transpose(1, 2) for parts in documents], dim=1)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), inputs), torch.autograd.grad((expected * weights).sum(), inputs)
    ):
        torch.testing.assert_close(one, other)


def test_each_row_has_one_place():
    groups = grouped(LENGTHS, 3, 32)
    rows = sum(LENGTHS) * 3
    assert (groups.there[groups.back] == range(rows)).all()
    assert sorted([*groups.back, *groups.empty]) == list(range(len(groups.there)))
    assert groups.shapes == ((4, 32), (1, 32), (1, 33), (1, 40), (1, 70))


def test_many_lengths_have_few_shapes():
    draw = random.Random(0)
    steps = [tuple(draw.randint(1, 512) for _ in range(draw.randint(1, 40))) for _ in range(200)]
    shapes = {shape for lengths in steps for shape in grouped(lengths, 1, 1024).shapes}
    assert len({length for lengths in steps for length in lengths}) == 512
    assert len(shapes) <= 64 and {length % MULTIPLE for _, length in shapes} == {0}
