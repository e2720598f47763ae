"""Flash attention over packed documents: torch's variable-length kernel (or the one that `flash` has put in its place, which takes
no other attention), what it takes, and how it is called.

torch 2.11's `varlen_attn` has as many key heads as query heads; 2.12 and later have `enable_gqa`. Where the argument is
missing, each key head is repeated for the query heads that share it: the same values, and the same gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention.varlen import varlen_attn

WIDEST = 256  # of a head; and flash attention reads heads in blocks of 8
AMPERE = (8, 0)  # the first compute capability that it has kernels for
old_gpu = False  # whether this process computes on one before; not asked for in each call: torch.compile traces those


@dataclass(frozen=True)
class DocumentLengths:
    """Tokens of each document of a row, on the CPU.

    An object of its own: strategies would send a tensor to the device, and torch.compile would compile anew for a tuple
    of other numbers.
    """

    tokens: tuple[int, ...]


def takes_groups(kernel: Callable) -> bool:
    """Return whether a version of `varlen_attn` lets several query heads share a key head."""
    return "enable_gqa" in inspect.signature(kernel).parameters


# Once, not in each call: torch.compile traces those.
GROUPED = takes_groups(varlen_attn)


def look_at_gpu() -> None:
    """Note whether this process's GPU has the kernel."""
    global old_gpu
    old_gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() < AMPERE


def obstacle(
    *,
    device: str,
    dtype: torch.dtype,
    query_width: int,
    value_width: int,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: bool = False,
) -> str | None:
    """The reason why the kernel does not compute such attention; None where it does.

    Args:
        device: its type, as "cuda".
        query_width, value_width: the size of a head of queries and keys, and of one of values.
    """
    reasons = {
        "a {device} device": device != "cuda",
        "a GPU before Ampere": device == "cuda" and old_gpu,
        "{dtype}": dtype not in (torch.float16, torch.bfloat16),
        "heads of {query_width}, no multiple of 8": query_width % 8 != 0,
        "heads of {query_width}, above {widest}": query_width > WIDEST,
        "values of {value_width} beside queries of {query_width}": value_width != query_width,
        "dropout {dropout:g}": bool(dropout),
        "soft-cap {softcap}": bool(softcap),
        "attention sinks": sinks,
    }
    text = ", ".join(reason for reason, holds in reasons.items() if holds)
    if not text:  # nothing is formatted: torch.compile would break the graph there
        return None
    widths = {"query_width": query_width, "value_width": value_width, "widest": WIDEST}
    return text.format(device=device, dtype=dtype, dropout=dropout, softcap=softcap, **widths)


def arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    *,
    scaling: float | None,
    window: int | None,
    grouped: bool,
) -> tuple[tuple, dict]:
    """Arguments of the kernel, by position and by name.

    Args:
        query, key, value: (1, heads, tokens, width); those of keys and values may be fewer heads.
        bounds: (documents + 1,), int32.
        longest: tokens of the longest document.
        grouped: whether the kernel has `enable_gqa`.
    """
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    share = query.shape[1] // key.shape[1]
    named = {"scale": scaling, "window_size": (-1 if window is None else window - 1, 0)}
    if grouped:
        named["enable_gqa"] = share > 1
    elif share > 1:
        key, value = key.repeat_interleave(share, dim=1), value.repeat_interleave(share, dim=1)
    return (query, key, value, bounds, bounds, longest, longest), named


def attend(query, key, value, bounds, longest, *, scaling: float | None, window: int | None) -> torch.Tensor:
    """Causal attention inside each document, (1, tokens, heads, width); see `arguments`."""
    positional, named = arguments(query, key, value, bounds, longest, scaling=scaling, window=window, grouped=GROUPED)
    return varlen_attn(*positional, **named).unsqueeze(0)
