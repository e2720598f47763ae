"""An implementation of flash attention over packs for torch's registry, in plain products of matrices, on any device."""

import torch
from torch.library import Library
from torch.nn.attention import register_flash_attention_impl


class Handle:
    def __init__(self, library: Library) -> None:
        self.library = library

    def remove(self) -> None:
        self.library = None


def register(name: str, device: str, *, widest: int = 256, wrong: float = 1.0) -> list[str]:
    """Register it under a name of torch's.

    Args:
        device: the dispatch key of the operators that it replaces.
        widest: heads beyond are refused. wrong: factor of the gradient of values.

    Returns:
        A list that each call is added to.
    """
    calls: list[str] = []

    def forward(q, k, v, bounds, _k, _mq, _mk, dropout, causal, _debug, *, scale=None, **more):
        calls.append("forward")
        if q.shape[-1] > widest:
            raise AssertionError(f"no heads of {q.shape[-1]}")
        scores, _, values = _scores(q, k, v, bounds, causal, scale, **more)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        empty = torch.empty(0, device=q.device)
        random = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return out.to(q.dtype), scores.logsumexp(-1), random, empty, empty

    def backward(dy, q, k, v, _out, _lse, bounds, _k, _mq, _mk, _p, causal, _rng, _unused, *, scale=None, **more):
        calls.append("backward")
        scores, keys, values = _scores(q, k, v, bounds, causal, scale, **more)
        shares, dy = scores.softmax(-1), dy.float()
        dshares = torch.einsum("qhd,khd->hqk", dy, values)
        dscores = shares * (dshares - (dshares * shares).sum(-1, keepdim=True)) * _scale(q, scale)
        dq = torch.einsum("hqk,khd->qhd", dscores, keys)
        dk = torch.einsum("hqk,qhd->khd", dscores, q.float())
        dv = wrong * torch.einsum("hqk,qhd->khd", shares, dy)
        dk, dv = (grad.unflatten(1, (k.shape[1], -1)).sum(2) for grad in (dk, dv))
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)

    def activate() -> Handle:
        library = Library("aten", "IMPL", device)
        library.impl("_flash_attention_forward", forward, device)
        library.impl("_flash_attention_backward", backward, device)
        return Handle(library)

    register_flash_attention_impl(name, register_fn=activate)
    return calls


def _scores(q, k, v, bounds, causal, scale, *, window_size_left=None, window_size_right=None, **_):
    """(heads, tokens, tokens) in float32, and keys and values for each query head."""
    number = torch.arange(len(q), device=q.device)
    document = torch.searchsorted(bounds, number, right=True)
    distance = number[:, None] - number
    seen = document[:, None] == document
    if causal or window_size_right == 0:
        seen &= distance >= 0
    if window_size_left is not None and window_size_left >= 0:
        seen &= distance <= window_size_left
    keys, values = (tensor.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * _scale(q, scale)
    return scores.masked_fill(~seen, -torch.inf), keys, values


def _scale(q, scale):
    return q.shape[-1] ** -0.5 if scale is None else scale
