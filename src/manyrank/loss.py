"""The loss contract: a micro-batch gives the *sum* of its token losses; the step divides by its number of tokens.

    step loss = sum over ranks, micro-batches and supervised tokens of -log p(token)  /  supervised tokens of the step

A mean of means would weigh a token by the company it keeps, and the loss would depend on the number of GPUs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def token_loss_sum(
    model: torch.nn.Module, inputs: dict, positions: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Forward one micro-batch and sum the cross-entropy of its supervised tokens.

    Only the hidden states in front of supervised tokens go through the head, so no other logits are ever computed.

    Args:
        model: a causal language model, possibly wrapped.
        inputs: keyword arguments of its forward; input_ids is (rows, tokens).
        positions: (supervised,), flat index (row * tokens + token) of the hidden state that predicts each target.
        targets: (supervised,), the token ids to predict. Both are empty for a micro-batch with nothing to learn.

    Returns:
        A float32 scalar that is connected to the graph even with no target, so that no rank waits for another's
        gradients in vain.
    """
    rows = inputs["input_ids"].shape[0]
    if rows == 1:
        keep = positions if len(positions) else positions.new_zeros(1)
        logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits[0]
    else:
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1)
        logits = logits[positions] if len(positions) else logits[:1]
    if len(targets):
        return F.cross_entropy(logits.float(), targets, reduction="sum")
    return logits.float().sum() * 0.0
