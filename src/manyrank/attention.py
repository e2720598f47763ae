"""Attention over packed documents: several examples in one row, none of which sees another.

    tokens      [ a a a a | b b | c c c ]          one row, no padding
    cu_seq_lens [ 0         4     6       9 ]      where documents begin and end

On CUDA in 16 bits this is one variable-length flash attention call; elsewhere one sdpa call per document. The function
is registered with transformers under PACKED; a model uses it after `model.set_attn_implementation(PACKED)`.
transformers builds no mask for a name it has no mask function for, so nothing of size tokens x tokens ever exists.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils import logging

from .errors import UserError

logger = logging.get_logger(__name__)

PACKED = "manyrank_packed"


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
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document of a packed row.

    Args:
        query: (1, heads, tokens, head_dim).
        key, value: (1, key_value_heads, tokens, head_dim); heads is a multiple of key_value_heads.
        attention_mask: None; the document bounds say everything.
        cu_seq_lens_q: (documents + 1,), int32, from 0 to tokens.
        max_length_q: tokens of the longest document.

    Returns:
        (1, tokens, heads, head_dim), and None for the weights.
    """
    if torch.is_autocast_enabled(query.device.type):  # a norm may have given float32 queries, beside 16-bit values
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout:
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    if query.is_cuda:
        logger.warning_once(f"attention takes one document at a time: {query.dtype}, dropout {dropout} (slower)")
    bounds = cu_seq_lens_q.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    documents = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)))
    outputs = [_document(q, k, v, scaling, dropout, sliding_window) for q, k, v in documents]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _document(query, key, value, scaling, dropout, sliding_window) -> torch.Tensor:
    tokens = query.shape[2]
    windowed = sliding_window is not None and tokens > sliding_window
    mask = _window_mask(tokens, sliding_window, query.device) if windowed else None
    return F.scaled_dot_product_attention(
        query, key, value,
        attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def _window_mask(tokens: int, window: int, device: torch.device) -> torch.Tensor:
    position = torch.arange(tokens, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def _varlen(query, key, value, bounds, longest, scaling, sliding_window) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    flat = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    left = -1 if sliding_window is None else sliding_window - 1
    out = varlen_attn(
        *flat, bounds, bounds, longest, longest,
        scale=scaling, window_size=(left, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.unsqueeze(0)


def use_packed_attention(model: PreTrainedModel) -> None:
    """Make `model` attend inside documents only.

    Raises:
        UserError: the architecture mixes tokens in a way that document bounds do not stop.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention", "sliding_attention"}
    reasons = [f"{kind} layers" for kind in sorted(kinds)]
    reasons += ["attention soft-capping"] if getattr(config, "attn_logit_softcapping", None) else []
    reasons += ["attention sinks"] if config.model_type == "gpt_oss" else []
    reasons += ["no pluggable attention"] if not model._supports_attention_backend else []
    if reasons:
        raise UserError(
            f"packing: step does not know {', '.join(reasons)} of a {config.model_type} model",
            where="packing",
            fix="set packing: none, which pads instead",
        )
    model.set_attn_implementation(PACKED)


AttentionInterface.register(PACKED, packed_attention)
