"""Documents in groups attend as they do one by one, forward and backward, and few shapes are met."""

import functools
import random

import pytest
import torch
import torch.nn.functional as F

from manyrank.models.attention import _products
from manyrank.models.document_groups import MULTIPLE, attend, group_documents

LENGTHS = (5, 33, 1, 40, 31, 32, 70, 2)


def causal(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def assert_as_one_by_one(attention, *parameters, longest):
    """Values, and gradients of queries, keys, values and `parameters`, are those of one document at a time."""
    shapes = ((4, 6), (2, 6), (2, 3))  # values are narrower
    inputs = [torch.randn(1, sum(LENGTHS), *shape, dtype=torch.float64).transpose(1, 2) for shape in shapes]
    leaves = [*(tensor.requires_grad_() for tensor in inputs), *parameters]
    together = attend(*inputs, LENGTHS, attention, longest=longest)
    documents = zip(*(tensor.split(LENGTHS, dim=2) for tensor in inputs))
    alone = torch.cat([attention(*parts).transpose(1, 2) for parts in documents], dim=1)
    torch.testing.assert_close(together, alone)
    weights = torch.randn_like(alone)
    gradients = [torch.autograd.grad((result * weights).sum(), leaves) for result in (together, alone)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("longest", [1024, 32, 0], ids=["all in groups", "some alone", "all alone"])
def test_groups_attend_as_documents_one_by_one(longest):
    torch.manual_seed(0)
    assert_as_one_by_one(causal, longest=longest)


@pytest.mark.parametrize(
    "options", [{"softcap": 5.0}, {"window": 7}, {"sinks": True}, {"sinks": True, "window": 20}], ids=str
)
@pytest.mark.parametrize("longest", [1024, 32])
def test_plain_products_of_groups(options, longest):
    """Soft-cap, sinks and windows of documents side by side are those of one document at a time."""
    torch.manual_seed(0)
    sinks = [torch.randn(4, dtype=torch.float64, requires_grad=True)] if options.get("sinks") else []
    plain = {"scaling": None, "window": None, "softcap": None, "dropout": 0.0} | options
    attention = functools.partial(_products, **plain | {"sinks": sinks[0] if sinks else None})
    assert_as_one_by_one(attention, *sinks, longest=longest)


def test_each_row_has_one_place():
    groups = group_documents(LENGTHS, 3, 32)
    rows = sum(LENGTHS) * 3
    assert (groups.rows[groups.places] == range(rows)).all()
    assert sorted([*groups.places, *groups.empty]) == list(range(len(groups.rows)))
    assert groups.shapes == ((2, 16), (1, 16), (2, 32), (1, 33), (1, 40), (1, 70))


def test_many_lengths_have_few_shapes():
    draw = random.Random(0)
    steps = [tuple(draw.randint(1, 512) for _ in range(draw.randint(1, 40))) for _ in range(200)]
    shapes = {shape for lengths in steps for shape in group_documents(lengths, 1, 1024).shapes}
    assert {length for lengths in steps for length in lengths} == {*range(1, 513)}
    assert len(shapes) <= 96 and {length % MULTIPLE for _, length in shapes} == {0}
