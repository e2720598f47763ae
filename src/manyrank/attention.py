"""Attention over packed documents: several examples in one row, none of which sees another.

    tokens      [ a a a a | b b | c c c ]          one row, no padding
    cu_seq_lens [ 0         4     6       9 ]      where documents begin and end

On CUDA in 16 bits this is one variable-length flash attention call; elsewhere one call per document. The function
is registered with transformers under PACKED; a model uses it after `model.set_attn_implementation(PACKED)`.
transformers builds no mask for a name it has no mask function for, so nothing of size tokens x tokens ever exists.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils import logging

from .errors import UserError

logger = logging.get_logger(__name__)

PACKED, PACKED_PLAIN = "manyrank_packed", "manyrank_packed_plain"
# Tokens of a document up to which plain products are taken on a CPU in bf16. sdpa of torch 2.13 needs twice as long
# there; in float32 it is the faster one.
SHORT = 1024


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    short: int = SHORT,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document of a packed row.

    Args:
        query: (1, heads, tokens, head_dim).
        key, value: (1, key_value_heads, tokens, head_dim); heads is a multiple of key_value_heads.
        attention_mask: None; the document bounds say everything.
        cu_seq_lens_q: (documents + 1,), int32, from 0 to tokens.
        max_length_q: tokens of the longest document.
        short: tokens up to which a document may be computed by plain products, see SHORT.

    Returns:
        (1, tokens, heads, head_dim), and None for the weights.
    """
    if torch.is_autocast_enabled(query.device.type):  # a norm may have given float32 queries, beside 16-bit values
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout and not softcap:
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    if query.is_cuda:
        why = f"{query.dtype}, dropout {dropout}, soft-cap {softcap}"
        logger.warning_once(f"attention takes one document at a time (slower, more memory): {why}")
    lengths = cu_seq_lens_q.diff().tolist()
    documents = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)))
    options = {"scaling": scaling, "window": sliding_window, "dropout": dropout, "softcap": softcap, "short": short}
    return torch.cat([_document(q, k, v, **options) for q, k, v in documents], dim=2).transpose(1, 2), None


def _document(query, key, value, *, scaling, window, dropout, softcap, short) -> torch.Tensor:
    tokens = query.shape[2]
    plain = query.dtype == torch.bfloat16 and query.device.type == "cpu" and tokens <= short
    if softcap or (plain and not dropout):
        return _products(query, key, value, scaling=scaling, window=window, softcap=softcap, dropout=dropout)
    mask = _allowed(tokens, window, query.device) if window is not None and tokens > window else None
    return F.scaled_dot_product_attention(
        query, key, value,
        attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def _products(query, key, value, *, scaling, window, softcap, dropout) -> torch.Tensor:
    """Plain products of matrices, the heads that share a key one below the other."""
    _, heads, tokens, size = query.shape
    groups, times = key.shape[1], heads // key.shape[1]
    hidden = ~_allowed(tokens, window, query.device)
    mask = torch.zeros_like(hidden, dtype=query.dtype).masked_fill_(hidden, -torch.inf).repeat(times, 1)
    queries, keys = query.reshape(groups, times * tokens, size), key.squeeze(0).transpose(1, 2)
    scaling = size**-0.5 if scaling is None else scaling
    if softcap:
        scores = torch.tanh(queries @ keys * (scaling / softcap)) * softcap + mask
    else:
        scores = torch.baddbmm(mask, queries, keys, alpha=scaling)
    shares = F.dropout(scores.softmax(-1), dropout) if dropout else scores.softmax(-1)
    return torch.bmm(shares, value.squeeze(0)).view(1, heads, tokens, -1)


def _allowed(tokens: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(tokens, tokens), which keys a query sees."""
    position = torch.arange(tokens, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < (window or tokens))


def _varlen(query, key, value, bounds, longest, scaling, sliding_window) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    flat = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    left = -1 if sliding_window is None else sliding_window - 1
    out = varlen_attn(
        *flat, bounds, bounds, longest, longest,
        scale=scaling, window_size=(left, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.unsqueeze(0)


def use_packed_attention(model: PreTrainedModel, *, plain: bool = False) -> None:
    """Make `model` attend inside documents only.

    Args:
        plain: by sdpa alone, where there is no kernel for packed documents.

    Raises:
        UserError: the architecture mixes tokens in a way that document bounds do not stop.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention", "sliding_attention"}
    reasons = [f"{kind} layers" for kind in sorted(kinds)]
    reasons += ["attention sinks"] if config.model_type == "gpt_oss" else []
    reasons += ["no pluggable attention"] if not model._supports_attention_backend else []
    if reasons:
        raise UserError(
            f"packing: step does not know {', '.join(reasons)} of a {config.model_type} model",
            where="packing",
            fix="set packing: none, which pads instead",
        )
    model.set_attn_implementation(PACKED_PLAIN if plain else PACKED)


AttentionInterface.register(PACKED, packed_attention)
AttentionInterface.register(PACKED_PLAIN, partial(packed_attention, short=0))
