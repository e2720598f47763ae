"""The head and the loss in one: logits exist for one chunk of tokens at a time, and their gradient is used at once.

    hidden (n, h) --select supervised--> chunks --> logits (c, vocabulary) --> softmax --> loss
                                                                      '--> gradient of hidden (and of the weight)

The gradient of the hidden states is computed in the forward pass, while a chunk's logits are there: nothing of size
n x vocabulary is kept or recomputed, and a frozen head costs two matrix products instead of three. Backward only
scales. `fuse` does this to a model's own head, so that whatever shards or gathers its weight works as before.

The idea of taking the gradient in the forward pass is Liger's (Hsu et al. 2024, arXiv 2410.10989).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch.autograd.function import once_differentiable
from transformers.utils import logging

from .token_rows import trained_ids

logger = logging.get_logger(__name__)

# Bytes of logits in one chunk; on CPUs they should stay in the last cache, also when other ranks share it.
CHUNK = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
BLOCK = 2**19  # of those that are in float32 at a time on a CPU, for each thread


class HeadLoss(torch.autograd.Function):
    """Sum of the cross-entropies of a linear head, with all gradients computed in the forward pass.

    Args of `apply`:
        hidden: (n, h). weight: (vocabulary, h). bias: (vocabulary,) or None. targets: (n,), token ids.
        smoothing: share of a target that all tokens of the vocabulary have alike.
        dynamic: scale each token's loss by its probability, which counts as a constant (see `training.loss`).
        rows: (k, h), trained rows of a frozen weight, or None. ids: (k,), where they stand in it.

    Returns:
        A scalar, float32 (float64 for such a head).
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, smoothing=0.0, dynamic=False, rows=None, ids=None):
        dtype = torch.get_autocast_dtype(hidden.device.type) if _autocast(hidden) else hidden.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            wanted = (*ctx.needs_input_grad[:3], rows is not None and ctx.needs_input_grad[6])
            whole = weight.to(dtype) if rows is None else weight.to(dtype).index_copy(0, ids, rows.to(dtype))
            tensors = hidden.to(dtype), whole, None if bias is None else bias.to(dtype)
            options = {"differentiate": any(wanted), "smoothing": smoothing, "dynamic": dynamic}
            loss, *gradients = _loss_and_gradients(*tensors, targets, ids, wanted, options)
        ctx.gradients, ctx.dtypes = gradients, [getattr(t, "dtype", None) for t in (hidden, weight, bias, rows)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        # Scaled where they are: the one of a trained head is as large as the head, in float32.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the loss of a fused head goes backward once")
        scaled = [g if g is None else _scaled(g, scale).to(dtype) for g, dtype in zip(gradients, ctx.dtypes)]
        return (*scaled[:3], None, None, None, scaled[3], None)


def _scaled(gradient: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Times the scale, which in 16 bits would be rounded: an error that all elements share."""
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32)).mul_(scale)


def _autocast(tensor: torch.Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


def _loss_and_gradients(hidden, weight, bias, targets, ids, wanted, options):
    """The loss, and the gradients that are wanted of hidden, weight, bias and rows (those of the head's own in float32)."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    of_hidden = torch.empty_like(hidden) if wanted[0] else None
    of_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
    of_bias = torch.zeros_like(bias, dtype=wide) if wanted[2] else None
    of_rows = weight.new_zeros(len(ids), weight.shape[1], dtype=wide) if wanted[3] else None
    size = _rows(CHUNK.get(hidden.device.type, CHUNK["cuda"]), len(weight), hidden.dtype)
    cross_entropy = CROSS_ENTROPY.get(hidden.device.type, by_shares)
    buffer = hidden.new_empty(min(size, len(hidden)), len(weight))
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        part = hidden[rows]
        logits = buffer[: len(part)]
        if bias is None:
            torch.mm(part, weight.T, out=logits)
        else:
            torch.addmm(bias, part, weight.T, out=logits)
        part_loss, gradient = cross_entropy(logits, targets[rows], **options)
        loss += part_loss
        if wanted[0]:
            torch.mm(gradient, weight, out=of_hidden[rows])
        if wanted[1]:
            of_weight += gradient.T @ part
        if wanted[2]:
            of_bias += gradient.sum(0, dtype=wide)
        if wanted[3]:
            of_rows += gradient[:, ids].T @ part
        del gradient  # before that of the next chunk is made
    return loss, of_hidden, of_weight, of_bias, of_rows


def _rows(limit: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Return how many tokens' logits a limit in bytes holds, at least one."""
    return max(1, limit // (vocabulary * dtype.itemsize))


def in_blocks(
    logits: torch.Tensor, targets: torch.Tensor, *, differentiate: bool, smoothing: float = 0.0, dynamic: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the sum of the cross-entropies of logits (n, vocabulary) and their gradient, in place of the logits.

    In float32 at least, a few tokens at a time, which stay in the caches of the cores.

    Args:
        smoothing, dynamic: see HeadLoss; one of them.
    """
    each = smoothing / logits.shape[1]  # of a target, for each token of the vocabulary
    wide = torch.promote_types(logits.dtype, torch.float32)
    block = _rows(BLOCK, logits.shape[1], wide) * torch.get_num_threads()
    places, smooth = targets[:, None], torch.zeros((), dtype=wide, device=logits.device)
    of_targets = torch.empty_like(places, dtype=wide)
    for part, place, of_target in zip(*(tensor.split(block) for tensor in (logits, places, of_targets))):
        log_shares = torch.log_softmax(part, -1, dtype=wide)
        torch.gather(log_shares, 1, place, out=of_target)
        if smoothing:
            smooth -= each * log_shares.sum()
        if differentiate:
            shares = log_shares.exp_()
            part.copy_(shares.sub_(each) if smoothing else shares.mul_(of_target.exp()) if dynamic else shares)
    weights = of_targets.exp() if dynamic else 1
    loss = -(of_targets * weights).sum() * (1 - smoothing) + smooth
    if differentiate:  # the shares, less one at the target
        logits.scatter_(1, places, (of_targets.expm1_().add_(smoothing - each) * weights).to(logits.dtype))
    return loss, logits if differentiate else None


def by_shares(
    logits: torch.Tensor, targets: torch.Tensor, *, differentiate: bool, smoothing: float = 0.0, dynamic: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what `in_blocks` does from a softmax in the type of the logits: a third of the bytes read and written."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    shares = torch.softmax(logits, -1)
    at_target = torch.arange(len(logits), device=logits.device) * logits.shape[1] + targets
    norm = logits.amax(-1) - shares.amax(-1).to(wide).log()  # the logarithm of the sum of exponentials
    plain = (norm - logits.take(at_target)).to(wide)
    sure = shares.take(at_target) > 0.5
    # In 16 bits a share near one is so coarse that a small loss, and its gradient, would drown: the sum of the other
    # shares tells it well.
    others = shares.view(-1).index_fill_(0, at_target, 0).view_as(shares).sum(-1)
    each = torch.where(sure, -torch.log1p(-others.to(wide)), plain)
    weights = each.neg().exp() if dynamic else 1
    loss = (each * weights).sum()
    if smoothing:
        loss = loss * (1 - smoothing) + smoothing * (norm - logits.mean(-1, dtype=wide)).sum()
    if not differentiate:
        return loss, None
    gradient = shares.view(-1).index_copy_(0, at_target, smoothing - others).view_as(shares)
    if dynamic:
        gradient *= weights.to(gradient.dtype)[:, None]
    return loss, gradient.sub_(smoothing / logits.shape[1]) if smoothing else gradient


CROSS_ENTROPY = {"cpu": in_blocks}  # of other devices by_shares


class FusedHead:
    """A model's head that gives the loss in place of logits while `losing` lasts."""

    def __init__(self, head: torch.nn.Linear, tokens: TrainableTokensLayer | None = None) -> None:
        self.head, self.tokens = head, tokens  # peft's layer around a head with trained rows
        self.caller = tokens or head
        self.plain = self.caller.forward
        self.wanted: tuple[torch.Tensor, torch.Tensor, list[int] | None, tuple] | None = None
        self.loss: torch.Tensor | None = None
        # On the instance: the hooks with which a strategy gathers the weight stay around it.
        self.caller.forward = self._forward

    def release(self) -> None:
        """Give the head its own forward again."""
        self.caller.forward = self.plain

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.wanted is None:
            return self.plain(hidden)
        positions, targets, rows, options = self.wanted
        chosen = hidden.flatten(0, -2)[positions]
        tensors, rows_of = (chosen, self.head.weight, self.head.bias), self._rows(chosen.device)
        if not torch.is_grad_enabled():  # else what requires gradients would get them computed all the same
            tensors = [t if t is None else t.detach() for t in tensors]
            rows_of = [t.detach() for t in rows_of]
        if rows is None:
            loss = HeadLoss.apply(*tensors, targets, *options, *rows_of)
        else:
            parts = zip(tensors[0].split(rows), targets.split(rows))
            loss = torch.stack(
                [HeadLoss.apply(part, *tensors[1:], wanted, *options, *rows_of) for part, wanted in parts]
            )
        self.loss = loss.detach()
        return loss

    def _rows(self, device: torch.device) -> list[torch.Tensor]:
        """The trained rows of the head, and their ids; nothing where it has none."""
        if self.tokens is None:
            return []
        return [self.tokens.trainable_tokens_delta["default"], trained_ids(self.tokens, device)]

    @contextlib.contextmanager
    def losing(
        self, positions: torch.Tensor, targets: torch.Tensor, rows: list[int] | None = None, *options: float
    ) -> Iterator[None]:
        """Let the lm_head return the loss; one for each row, where `rows` has their numbers of targets.

        Args:
            options: smoothing and dynamic, as HeadLoss takes them.
        """
        self.wanted = positions, targets, rows, options
        try:
            yield
        finally:
            self.wanted = None


def fuse(model: torch.nn.Module) -> FusedHead | None:
    """Fuse the head of a model with the loss; None, with a line in the log, where its logits are not a plain product."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if isinstance(head, ModulesToSaveWrapper):  # trained whole beside adapters
        head = head.modules_to_save["default"]
    tokens = head.token_adapter if isinstance(head, TrainableTokensWrapper) else None
    head = tokens.base_layer if tokens else head
    changes = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    changed = [f"{key} {getattr(config, key)}" for key in changes if getattr(config, key, None) not in (None, 1.0)]
    if head is None:
        changed.append("no head is known")
    elif type(head).forward is not torch.nn.Linear.forward:  # quantised, or with adapters of its own
        changed.append(f"a head of type {type(head).__name__}")
    if changed:
        logger.warning("the loss is computed from whole logits (slower, more memory): %s", ", ".join(changed))
        return None
    return FusedHead(head, tokens)
