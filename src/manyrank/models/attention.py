"""Attention over packed documents: several examples in one row, none of which sees another.

    tokens      [ a a a a | b b | c c c ]          one row, no padding
    cu_seq_lens [ 0         4     6       9 ]      where documents begin and end

On CUDA this is one variable-length flash attention call, where its kernel takes such heads (see `varlen`, and `flash`
for whose kernel it is); elsewhere one call per document, or in bf16 on CPUs per group of similar lengths. The function is registered with transformers under PACKED; a model uses it after
`model.set_attn_implementation(PACKED)`. transformers builds no mask for a name it has no mask function for, so nothing
of size tokens x tokens ever exists.

Every argument that a model hands over is honoured, is one that says nothing here (SILENT), or is refused: a model whose
attention is more than these arguments say would train on other losses. `training.packing_trial` tries the loaded model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils import logging

from ..config.resolve import TrainConfig
from ..errors import UserError
from . import document_groups, flash, varlen
from .model_facts import ATTENTION_LAYERS

logger = logging.get_logger(__name__)

PACKED, PACKED_PLAIN = "manyrank_packed", "manyrank_packed_plain"
# The names under which the values of attn_implementation are registered for packs; what has "flash" in its name is looked
# up on the hub by transformers 5.23.
CHOICES = {
    "eager": "manyrank_packed_eager",
    "sdpa": "manyrank_packed_sdpa",
    "flash_attention_2": "manyrank_packed_varlen",
    "flash_attention_3": "manyrank_packed_varlen",
}
NAMES = frozenset({PACKED, PACKED_PLAIN, *CHOICES.values()})
# Tokens of a document up to which plain products are taken on a CPU in bf16. sdpa of torch 2.13 needs twice as long
# there; in float32 it is the faster one.
SHORT = 1024


# Arguments that change nothing inside attention. The positions are in the queries and keys already, keys have the bounds
# of queries, and the rest is about what the model returns.
SILENT = frozenset(
    {"position_ids", "cu_seq_lens_k", "max_length_k", "use_cache", "output_router_logits", "output_hidden_states"}
)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    document_lengths: varlen.DocumentLengths | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    short: int = SHORT,
    kernel: Literal["eager", "sdpa", "flash"] | None = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document of a packed row.

    Args:
        query: (1, heads, tokens, head_dim).
        key, value: (1, key_value_heads, tokens, head_dim); heads is a multiple of key_value_heads.
        attention_mask: None; the document bounds say everything.
        cu_seq_lens_q: (documents + 1,), int32, from 0 to tokens.
        max_length_q: tokens of the longest document.
        document_lengths: without them the bounds are read, which on a GPU waits for it.
        s_aux: (heads,), attention sinks: logits beside those of the keys, of no value.
        is_causal: of this call; None, as the module says.
        short: tokens of a document that plain products may compute, see SHORT. kernel: None is the fastest that does.
        others: see SILENT.

    Returns:
        (1, tokens, heads, head_dim), contiguous, and None for the weights.

    Raises:
        UserError: the model hands over something else, or no bounds.
    """
    causal = getattr(module, "is_causal", True) is not False if is_causal is None else is_causal
    _refuse_unknown(module, attention_mask, cu_seq_lens_q, causal, others)
    query, key, value = _of_autocast(query, key, value)
    why = varlen.obstacle(
        device=query.device.type,
        dtype=query.dtype,
        query_width=query.shape[-1],
        value_width=value.shape[-1],
        dropout=dropout,
        softcap=softcap,
        sinks=s_aux is not None,
    )
    if why is None and kernel in (None, "flash"):
        bounds, window = (cu_seq_lens_q, max_length_q), sliding_window
        return varlen.attend(query, key, value, *bounds, scaling=scaling, window=window), None
    _say_why_not(kernel, why, on_gpu=query.is_cuda)
    options = {"scaling": scaling, "window": sliding_window, "dropout": dropout, "softcap": softcap, "sinks": s_aux}
    options |= {"bounds": cu_seq_lens_q, "lengths": document_lengths, "short": short, "kernel": kernel}
    return _by_document(query, key, value, **options), None


def _of_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In the type of autocast: a norm may have given float32 queries, beside 16-bit values."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


@torch.compiler.disable  # numbers and lengths of documents differ in each pack, and would be compiled anew
def _by_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    lengths: varlen.DocumentLengths | None,
    **options,
) -> torch.Tensor:
    lengths = bounds.diff().tolist() if lengths is None else list(lengths.tokens)
    if options["kernel"] is None and _by_products(query, min(lengths), **options):
        attention = partial(_document, **options)
        return document_groups.attend(query, key, value, tuple(lengths), attention, longest=options["short"])
    documents = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)))
    parts = [_document(q, k, v, **options).transpose(1, 2) for q, k, v in documents]
    return torch.cat(parts, dim=1).contiguous()


def _refuse_unknown(module, attention_mask, bounds, causal: bool, others: dict) -> None:
    reasons = [
        name for name, value in others.items() if name not in SILENT and value is not None and value is not False
    ]
    reasons = [f"the argument {name}" for name in sorted(reasons)]
    reasons += ["a mask of its own"] if attention_mask is not None else []
    reasons += ["attention to later tokens"] if not causal else []
    reasons += ["attention that is not given the bounds of documents"] if bounds is None else []
    if reasons:
        raise unpackable(", ".join(reasons), getattr(module, "config", None))


def unpackable(what: str, config) -> UserError:
    """The error that a model cannot be packed."""
    kind = getattr(config, "model_type", "given")
    return UserError(
        f"packing does not know {what} of a {kind} model", where="packing", fix="set packing: none, which pads instead"
    )


def _say_why_not(kernel: str | None, why: str | None, *, on_gpu: bool) -> None:
    """Refuse what flash attention does not compute where it is asked for, and say so where it would be faster."""
    if kernel == "flash":
        raise _not_computed("flash attention", str(why))
    if on_gpu and kernel is None:
        logger.warning_once(f"attention takes one document at a time (slower, more memory): {why}")


def _not_computed(kernel: str, why: str) -> UserError:
    return UserError(
        f"{kernel} does not compute {why}", where="attn_implementation", fix="leave it out, or write eager"
    )


def _by_products(query: torch.Tensor, tokens: int, *, dropout: float, short: int, **_) -> bool:
    """Return whether plain products are faster than sdpa for a document of so many tokens."""
    return query.dtype == torch.bfloat16 and query.device.type == "cpu" and tokens <= short and not dropout


def _document(query, key, value, **options) -> torch.Tensor:
    """Attend inside documents of equal length, (documents, heads, length, head_dim)."""
    tokens, window = query.shape[2], options["window"]
    softcap, sinks, short, kernel = (options.pop(name) for name in ("softcap", "sinks", "short", "kernel"))
    special = bool(softcap) or sinks is not None
    if special and kernel == "sdpa":
        raise _not_computed("sdpa", "soft-caps and sinks")
    if special or kernel == "eager" or _by_products(query, tokens, dropout=options["dropout"], short=short):
        return _products(query, key, value, softcap=softcap, sinks=sinks, **options)
    mask = _allowed(tokens, window, query.device) if window is not None and tokens > window else None
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=options["dropout"],
        scale=options["scaling"],
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _products(query, key, value, *, scaling, window, softcap, sinks, dropout) -> torch.Tensor:
    """Plain products of matrices, the heads that share a key one below the other."""
    documents, heads, tokens, size = query.shape
    groups, times = key.shape[1], heads // key.shape[1]
    queries = query.reshape(documents * groups, times * tokens, size)
    keys, values = (tensor.reshape(documents * groups, tokens, tensor.shape[-1]) for tensor in (key, value))
    scaling = size**-0.5 if scaling is None else scaling
    mask = _mask(tokens, window, query).repeat(times, 1)
    if softcap:
        scores = torch.tanh(queries @ keys.mT * (scaling / softcap)) * softcap + mask
    else:
        scores = torch.baddbmm(mask, queries, keys.mT, alpha=scaling)
    if sinks is not None:  # one more column, whose share goes nowhere
        column = sinks.to(scores.dtype).view(1, groups, times, 1, 1).expand(documents, -1, -1, tokens, -1)
        scores = torch.cat([scores, column.reshape(documents * groups, times * tokens, 1)], dim=-1)
    shares = scores.softmax(-1)[..., :tokens]
    shares = F.dropout(shares, dropout) if dropout else shares
    return torch.bmm(shares, values).view(documents, heads, tokens, value.shape[-1])


def _mask(tokens: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """Return what is added to scores, (tokens, tokens): -inf where a query does not see a key, else 0."""
    return like.new_full((tokens, tokens), -torch.inf).masked_fill_(_allowed(tokens, window, like.device), 0)


def _allowed(tokens: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return which keys a query sees, (tokens, tokens): itself and the `window - 1` tokens before."""
    allowed = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril_()
    return allowed if window is None else allowed.triu_(1 - window)


def use_packed_attention(model: PreTrainedModel, *, plain: bool = False, choice: str | None = None) -> None:
    """Make `model` attend inside documents only.

    Args:
        plain: by torch's own flash attention, and by sdpa alone where there is no kernel for packed documents.
        choice: a value of attn_implementation.

    Raises:
        UserError: the architecture mixes tokens in a way that document bounds do not stop. (What only a forward shows
            is found by `training.packing_trial.prove_packing`.)
    """
    config = model.config.get_text_config()
    kinds = set(map(str, getattr(config, "layer_types", None) or [])) - ATTENTION_LAYERS
    reasons = [f"{kind} layers" for kind in sorted(kinds)]
    reasons += ["no pluggable attention"] if not model._supports_attention_backend else []
    if reasons:
        raise unpackable(", ".join(reasons), config)
    if model.config._attn_implementation not in NAMES:
        model.attention_before_packing = model.config._attn_implementation
    model.set_attn_implementation(CHOICES[choice] if choice else PACKED_PLAIN if plain else PACKED)
    varlen.look_at_gpu()
    if plain or choice in ("eager", "sdpa", "flash_attention_2"):
        flash.restore()
    else:
        flash.use_for(config, only="FA3" if choice else None)


def set_attention(model: PreTrainedModel, config: TrainConfig, say: Callable[[str], None]) -> None:
    """Give a model the attention of a recipe; `say` takes a line on what is not torch's or the model's own.

    Raises:
        UserError: the model's attention is more than that.
    """
    choice = config.attn_implementation
    if config.packing != "none":
        use_packed_attention(model, plain="attention" in config.disable_fused, choice=choice)
        if name := flash.active():
            say(f"packed attention in 16 bits runs by {name}")
    else:
        flash.restore()
        if choice:
            model.set_attn_implementation(choice)
    if choice:
        say(f"attention: {choice}")


@contextlib.contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Give a packed model the attention that it was loaded with, which also knows a cache."""
    before = model.config._attn_implementation
    if before not in NAMES:
        yield
        return
    model.set_attn_implementation(model.attention_before_packing)
    try:
        with flash.suspended():
            yield
    finally:
        model.set_attn_implementation(before)


AttentionInterface.register(PACKED, packed_attention)
AttentionInterface.register(PACKED_PLAIN, partial(packed_attention, short=0))
AttentionInterface.register(CHOICES["eager"], partial(packed_attention, kernel="eager"))
AttentionInterface.register(CHOICES["sdpa"], partial(packed_attention, kernel="sdpa", short=0))
AttentionInterface.register(CHOICES["flash_attention_2"], partial(packed_attention, kernel="flash"))
