"""The kernel for packed rows: which attention it computes, and how each version of torch wants it called."""

import inspect
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from manyrank.models.catalog import known
from manyrank.models.spec import from_config
from manyrank.models.varlen import arguments, obstacle, takes_groups


def of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    """Its signature, computed by plain products."""
    assert query.shape[1] == key.shape[1] == value.shape[1], "as many heads of keys as of queries"
    return plain(query, key, value, cu_seq_q, scale, window_size)


def of_torch_2_12(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    share = query.shape[1] // key.shape[1]
    assert enable_gqa or share == 1
    key, value = (tensor[:, :, None].expand(-1, -1, share, -1).flatten(1, 2) for tensor in (key, value))
    return plain(query, key, value, cu_seq_q, scale, window_size)


def plain(query, key, value, bounds, scale, window):
    left, right = window
    assert right == 0  # causal
    parts = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
        at = torch.arange(end - start)
        distance = at[:, None] - at[None]
        mask = (distance >= 0) & (distance <= (left if left >= 0 else end))
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("kernel", [of_torch_2_11, of_torch_2_12])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("window", [None, 3])
def test_each_version_of_the_kernel_gets_what_it_takes(kernel, heads, groups, window):
    """The values, and the gradients of shared keys, are those of attention with grouped heads."""
    torch.manual_seed(0)
    tensors = [
        torch.randn(1, number, 9, 8, dtype=torch.float64, requires_grad=True) for number in (heads, groups, groups)
    ]
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    grouped = takes_groups(kernel)
    given, named = arguments(*tensors, bounds, 5, scaling=0.3, window=window, grouped=grouped)
    assert ("enable_gqa" in named) == grouped == (kernel is of_torch_2_12)
    assert given[1].shape == (9, groups if grouped else heads, 8) and given[3:] == (bounds, bounds, 5, 5)
    found = kernel(*given, **named)
    wide = [tensors[0], *(tensor.repeat_interleave(heads // groups, dim=1) for tensor in tensors[1:])]
    left = -1 if window is None else window - 1
    wanted = plain(*(tensor.squeeze(0).transpose(0, 1) for tensor in wide), bounds, 0.3, (left, 0))
    assert torch.allclose(found, wanted)
    weights = torch.randn_like(found)
    of_found = torch.autograd.grad((found * weights).sum(), tensors)
    of_wanted = torch.autograd.grad((wanted * weights).sum(), tensors)
    assert all(map(torch.allclose, of_found, of_wanted))


def test_the_installed_kernel_is_one_that_is_known():
    """By name and by place; where this fails, look at what the new version has and call it so."""
    places = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    parameters = inspect.signature(varlen_attn).parameters
    assert list(parameters)[:7] == places
    assert {"scale", "window_size"} <= set(parameters)
    for kernel in (of_torch_2_11, of_torch_2_12):
        assert list(inspect.signature(kernel).parameters)[:7] == places
    known = set(inspect.signature(of_torch_2_12).parameters)
    assert {name for name, value in parameters.items() if value.default is inspect.Parameter.empty} <= set(places)
    assert set(parameters) - known == set()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_kernel_is_taken_where_it_computes_the_attention(device, dtype):
    choices = product(
        (64, 72, 80, 96, 128, 192, 256, 60, 12, 257, 264, 512), (0.0, 0.1), (None, 0, 50.0), (False, True)
    )
    for query_width, dropout, softcap, sinks in choices:
        for value_width in (query_width, 64, 128):
            given = {"dropout": dropout, "softcap": softcap, "sinks": sinks}
            why = obstacle(device=device, dtype=dtype, query_width=query_width, value_width=value_width, **given)
            fits = query_width == value_width and query_width in (64, 72, 80, 96, 128, 192, 256)
            plain_softmax = dropout == 0 and softcap in (None, 0) and not sinks
            taken = device == "cuda" and dtype != torch.float32 and fits and plain_softmax
            assert (why is None) == taken, (query_width, value_width, given)
            if query_width == 60:
                assert "heads of 60, no multiple of 8" in why


# The models of the catalog whose documents attend one at a time on GPUs, and why.
BY_DOCUMENT = {
    "gemma-2-2b": "soft-cap 50.0",
    "gemma-2-9b": "soft-cap 50.0",
    "gemma-2-27b": "soft-cap 50.0",
    "deepseek-v2-lite": "values of 128 beside queries of 192",
    "deepseek-v3": "values of 128 beside queries of 192",
    "deepseek-r1": "values of 128 beside queries of 192",
    "deepseek-v3.1": "values of 128 beside queries of 192",
    "deepseek-coder-v2-lite": "values of 128 beside queries of 192",
    "kimi-k2": "values of 128 beside queries of 192",
    "gpt-oss-20b": "attention sinks",
    "gpt-oss-120b": "attention sinks",
}


def test_which_models_of_the_catalog_the_kernel_takes():
    reasons = {}
    for name, config in known().items():
        softcap, sinks = config.get("attn_logit_softcapping"), config["model_type"] == "gpt_oss"
        for layer in from_config(config, name=name).layers:
            widths = [width // layer.attention.heads for width in (layer.attention.query, layer.attention.output)]
            why = obstacle(
                device="cuda",
                dtype=torch.bfloat16,
                query_width=widths[0],
                value_width=widths[1],
                softcap=softcap,
                sinks=sinks,
            )
            reasons |= {name: why} if why else {}
    assert reasons == BY_DOCUMENT
