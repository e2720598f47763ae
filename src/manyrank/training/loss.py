"""The loss contract: a micro-batch gives the *sum* of its token losses; the step divides by its number of tokens.

    step loss = sum over ranks, micro-batches and supervised tokens of -log p(token)  /  supervised tokens of the step

A mean of means would weigh a token by the company it keeps, and the loss would depend on the number of GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from transformers.utils import logging

from ..models.fused_head import fuse

logger = logging.get_logger(__name__)

Agree = Callable[[bool], bool]
LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class TokenLoss:
    """Forwards micro-batches and sums the cross-entropy of their supervised tokens.

    Only the hidden states in front of supervised tokens go through the head, so no other logits are ever computed.

    Args:
        wrapped: a causal language model as it is called, possibly wrapped by a strategy.
        model: the same without wrappers.
        fused: join head and loss (see `fused_head`), where the model's head allows it.
        function: another loss: logits (n, vocabulary) in float32 and targets (n,) to the sum over the n tokens; the
            head is not fused with it.
        smoothing: share of a target that is spread over the vocabulary while the model trains (Szegedy et al. 2016,
            arXiv 1512.00567); a validation gives the plain loss.
        dynamic: scale the loss of each token by the probability that the model gives it, which counts as a constant, while
            the model trains (Dynamic Fine-Tuning; Wu et al. 2025, arXiv 2508.05629).
    """

    def __init__(
        self,
        wrapped: torch.nn.Module,
        model: torch.nn.Module | None = None,
        *,
        fused: bool = True,
        function: LossFunction | None = None,
        smoothing: float = 0.0,
        dynamic: bool = False,
    ) -> None:
        self.wrapped, self.function, self.options = wrapped, function, (smoothing, dynamic)
        self.model = model or wrapped  # DeepSpeed's wrapper says that it trains also in evaluation mode
        self.head = fuse(self.model) if fused and function is None else None

    def prove(self, inputs: dict, positions: torch.Tensor, targets: torch.Tensor, *, agree: Agree = bool) -> None:
        """See that the model gives the head's result as it is; else compute whole logits from now on.

        Args:
            agree: whether all ranks have seen it. They forward alike, so they must.

        Raises:
            Exception: the model fails, and not only on a loss in place of logits.
        """
        if self.head is None:
            return
        self.head.loss, why = None, "the model changes them"
        try:
            with torch.compiler.set_stance("force_eager"):  # nothing is compiled for a few tokens
                loss = self(inputs, positions, targets)
            seen = self.head.loss is not None and torch.equal(loss.nan_to_num(), self.head.loss.nan_to_num())
        except (IndexError, TypeError, RuntimeError, ValueError) as error:
            if self.head.loss is None:  # it did not come as far as the head, or the head itself fails
                raise
            _whole_logits(self.wrapped, inputs, positions, targets, _cross_entropy, None)  # fails where that is not why
            seen, why = False, f"the model takes no loss in their place ({type(error).__name__}: {error})"
        if not agree(seen):
            logger.warning("the loss is computed from whole logits (slower, more memory): %s", why)
            self.head.release()
            self.head = None

    def __call__(
        self, inputs: dict, positions: torch.Tensor, targets: torch.Tensor, *, rows: list[int] | None = None
    ) -> torch.Tensor:
        """
        Args:
            inputs: keyword arguments of the model; input_ids is (rows, tokens).
            positions: (supervised,), flat index (row * tokens + token) of the hidden state that predicts each target.
            targets: (supervised,), the token ids to predict. Both are empty for a micro-batch with nothing to learn.
            rows: how many of the targets each row has, in order, to get the loss of each apart.

        Returns:
            A float32 scalar, or with `rows` a vector (rows,), that is connected to the graph even with no target, so
            that no rank waits for another's gradients in vain.
        """
        smoothing, dynamic = self.options if self.model.training else (0.0, False)
        if self.head is None:
            function = self.function or partial(_cross_entropy, smoothing=smoothing, dynamic=dynamic)
            return _whole_logits(self.wrapped, inputs, positions, targets, function, rows)
        with self.head.losing(positions, targets, rows, smoothing, dynamic):
            return self.wrapped(**inputs, use_cache=False).logits


def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, *, smoothing: float = 0.0, dynamic: bool = False
) -> torch.Tensor:
    if dynamic:
        each = F.cross_entropy(logits, targets, reduction="none")
        return (each * each.detach().neg().exp()).sum()
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)


def _whole_logits(
    model: torch.nn.Module,
    inputs: dict,
    positions: torch.Tensor,
    targets: torch.Tensor,
    function: LossFunction,
    rows: list[int] | None,
) -> torch.Tensor:
    if inputs["input_ids"].shape[0] == 1:
        keep = positions if len(positions) else positions.new_zeros(1)
        logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits[0]
    else:
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1)
        logits = logits[positions] if len(positions) else logits[:1]
    if rows is not None:
        parts = zip(logits.float().split(rows), targets.split(rows))
        return torch.stack([function(part, wanted) for part, wanted in parts])
    if len(targets):
        return function(logits.float(), targets)
    return logits.float().sum() * 0.0
