"""Try a loaded model with packed documents before it trains: packing must leave what it computes as it is.

    one row          [ a a a a a | b b b b b b b | a a a a a ]
    must be equal      first a  =  last a           packs hold documents apart, and positions begin anew in each
    and                first a  =  a by itself      with the attention that the model was loaded with
    and                a layer whose mask hides what is far away tells packed attention its window

The model's type says little: what counts is which arguments its attention receives, and what comes out. Documents are a
few tokens, so windows are told by the masks that transformers builds when the window is smaller still.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from ..data.loader import side_by_side
from ..models.attention import own_attention, unpackable

MASKS = "manyrank_masks"
WINDOW = 2  # tokens, while masks are looked at
# Largest difference of logits between two places in a row, as a share of their size. They see the same kernels, so that
# only a mixture of experts, which sorts tokens, differs at all.
APART = {True: 1e-3, False: 2e-2}
# Largest difference between two kinds of attention: in float32; and in 16 bits as a multiple of what rounding the
# embeddings once more changes, at least LEAST. Random models of up to 80 layers, with experts and sinks: 0.3 to 1.6.
CHANGED, ROUNDINGS, LEAST = 5e-3, 4, 0.05
ROUNDING = 2**-8


@torch.no_grad()
def prove_packing(
    wrapped: torch.nn.Module, model: torch.nn.Module, *, exact: bool, device: torch.device | None = None
) -> None:
    """See that documents of a pack come out as documents by themselves. All ranks together, in evaluation mode.

    Args:
        wrapped: the model as it is called, with packed attention.
        model: the same without wrappers.
        exact: whether it computes in float32.
        device: on which it computes; None: where its parameters are, which may also rest in host memory.

    Raises:
        UserError: they do not, or the model's attention receives what packed attention does not know.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, device = base.config.get_text_config(), device or next(model.parameters()).device
    first, second = (np.arange(start, start + length) % config.vocab_size for start, length in ((10, 5), (20, 7)))
    single = torch.as_tensor(first)[None].to(device)
    with torch.compiler.set_stance("force_eager"):  # nothing is compiled for a few tokens
        packed = _logits(wrapped, **_pack([first, second, first], device))
        with own_attention(base):
            alone = _logits(wrapped, single)
            tolerance = CHANGED if exact else max(LEAST, ROUNDINGS * _sensitivity(wrapped, base, single, alone))
            untold = _untold_windows(wrapped, base, single)
    before, after = packed[: len(first)], packed[-len(first) :]
    if not _apart(after, before) <= APART[exact]:
        raise unpackable("what mixes the tokens of documents, or counts positions across them,", config)
    if not _apart(before, alone) <= tolerance:
        raise unpackable("some part of the attention", config)
    if untold:
        raise unpackable(f"the window of {untold} attention layers", config)


def _pack(documents: list[np.ndarray], device: torch.device) -> dict:
    rows = [{"input_ids": ids, "labels": ids, "source": "trial", "row": 0} for ids in documents]
    return side_by_side(rows).to(device).inputs


def _logits(wrapped: torch.nn.Module, input_ids: torch.Tensor, **inputs) -> torch.Tensor:
    logits = wrapped(input_ids=input_ids, **inputs, use_cache=False).logits[0].float()
    return logits.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # a model of NaN is told by its loss


def _apart(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """The difference of two logits, (tokens, vocabulary), as a share of how far they spread."""
    spread = (reference - reference.mean(-1, keepdim=True)).norm()
    return ((logits - reference).norm() / (spread + 1e-6)).item()


def _sensitivity(wrapped: torch.nn.Module, base: PreTrainedModel, ids: torch.Tensor, reference: torch.Tensor) -> float:
    """Measure how far the logits move when embeddings are rounded once more; a change of experts makes it large."""

    def rounded(module, inputs, out: torch.Tensor) -> torch.Tensor:
        sign = 1 - 2 * (torch.arange(out.numel(), device=out.device).view(out.shape) % 2)
        return (out.float() * (1 + sign * ROUNDING)).to(out.dtype)

    hook = base.get_input_embeddings().register_forward_hook(rounded)
    try:
        return _apart(_logits(wrapped, ids), reference)
    finally:
        hook.remove()


def _untold_windows(wrapped: torch.nn.Module, base: PreTrainedModel, ids: torch.Tensor) -> int:
    """The attention layers whose window is in their mask only."""
    untold = []

    def look(module, query, key, value, attention_mask, *, sliding_window: int | None = None, **others):
        hides = attention_mask is not None and bool((attention_mask[..., -1, 0] < 0).any())
        untold.append(hides and sliding_window is None)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None

    with _small_windows(base) as any_window:
        if any_window:
            AttentionInterface.register(MASKS, look)
            AttentionMaskInterface.register(MASKS, eager_mask)
            before = base.config._attn_implementation
            base.set_attn_implementation(MASKS)
            try:
                _logits(wrapped, ids)
            finally:
                base.set_attn_implementation(before)
    return sum(untold)


@contextlib.contextmanager
def _small_windows(base: PreTrainedModel) -> Iterator[bool]:
    """While this lasts, the configs from which masks are built have windows of WINDOW tokens; whether there are any."""
    configs = {id(module.config): module.config for module in base.modules() if hasattr(module, "config")}
    windowed = [config for config in configs.values() if getattr(config, "sliding_window", None) is not None]
    before = [config.sliding_window for config in windowed]
    for config in windowed:
        config.sliding_window = WINDOW
    try:
        yield bool(windowed)
    finally:
        for config, window in zip(windowed, before):
            config.sliding_window = window
