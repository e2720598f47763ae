"""A faster forward and backward for peft's LoRA layers; values, parameters and saved adapters stay peft's.

    y = x W' + scaling (x A') B'        one autograd node a layer, which keeps x and the thin x A'

peft's own way is four nodes and two casts to float32 with copies of x, and adds the parts in passes of their own. Here
the adapter is computed in the type of the activations from float32 master weights, which is what autocast comes to, and
sums and scaling are made inside the matrix products. Where a process holds whole adapters, they are cast all at once
(`AdapterCasts`). A base that is quantised or in float8 keeps its own forward; the adapter is added to its result. Under ZeRO-3 DeepSpeed gathers what is read outside of its own module, too ("external parameters").
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear
from transformers.utils import logging

from .float8 import Float8Linear

logger = logging.get_logger(__name__)

FROZEN = "frozen"  # the name of an adapter that is added below the one that is trained, see `frozen_adapter`
QUANTISED = ("Linear4bit", "Linear8bitLt")  # of bitsandbytes, and peft's layers around them


class _Adapted(torch.autograd.Function):
    """y = base + scaling (x A') B', where base is x W' + bias of a frozen weight, or given.

    Args of `apply`:
        x: (tokens, in). dropped: the same after dropout, None without. weight: (out, in), frozen; None with `base`.
        base: (tokens, out), or None; the bias of a weight is (out,). down: A, (rank, in). up: B, (out, rank).
        casts: down and up in the type of x, or None: they are cast here.
    """

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, base, down, up, casts, scaling):
        entry, ctx.dtypes = x if dropped is None else dropped, (down.dtype, up.dtype)
        down, up = casts or (down, up)
        thin, wide = entry @ down.to(x.dtype).T, up.to(x.dtype).T
        if weight is not None:
            base = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
            y = base.addmm_(thin, wide, alpha=scaling)
        else:
            y = torch.addmm(base, thin, wide, alpha=scaling)
        ctx.save_for_backward(entry, thin, weight, down, up)
        ctx.split, ctx.scaling = dropped is not None, scaling
        return y

    @staticmethod
    def backward(ctx, dy):
        entry, thin, weight, *adapter = ctx.saved_tensors
        down, up = (matrix.to(dy.dtype) for matrix in adapter)
        of_x, of_dropped, _, _, of_base, *_ = ctx.needs_input_grad
        scaled = {"beta": 0, "alpha": ctx.scaling}  # of the product; what stands before it says its shape only
        dthin = dy @ up
        ddown, dup = torch.addmm(down, dthin.T, entry, **scaled), torch.addmm(up, dy.T, thin, **scaled)
        ddown, dup = ddown.to(ctx.dtypes[0]), dup.to(ctx.dtypes[1])
        dentry = torch.addmm(entry, dthin, down, **scaled) if of_dropped or (of_x and not ctx.split) else None
        dx = None
        if of_x:
            if weight is None:  # the base gives its own part
                dx = None if ctx.split else dentry
            else:
                dx = dy @ weight if ctx.split else dentry.addmm_(dy, weight)
        return dx, dentry if of_dropped else None, None, None, dy if of_base else None, ddown, dup, None, None


class AdapterCasts:
    """All adapters of a model in 16 bits, cast once a step in a few launches instead of in every layer, forward and backward.

    For a model whose process holds its adapters whole, on their device, in float32.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        layers = [module for module in model.modules() if type(module) in _FASTER.values()]
        self.masters = [matrix for layer in layers for matrix in _adapter(layer)]
        self.copies = [torch.empty_like(master, dtype=dtype, requires_grad=False) for master in self.masters]
        self.dtype, self.current, self.stale = dtype, False, True
        for layer, down, up in zip(layers, self.copies[::2], self.copies[1::2]):
            layer.casts = (self, down, up)

    @contextlib.contextmanager
    def used(self, *, last: bool) -> Iterator[None]:
        """Let the layers use the copies in a micro-batch; the first of a step makes them.

        Args:
            last: whether this micro-batch ends the step. Between those of one step nothing may change an adapter.
        """
        # None of a model that is trained whole, or whose adapters all run as peft has them.
        if self.stale and self.copies:
            with torch.no_grad():
                torch._foreach_copy_(self.copies, [master.detach() for master in self.masters])
        self.current = self.stale = True  # also after a micro-batch that fails
        try:
            yield
            self.stale = last
        finally:
            self.current = False


def speed_up(model: torch.nn.Module) -> int:
    """Give a model's plain LoRA layers the fast way; the others keep peft's, with a line in the log.

    Returns:
        How many layers have it.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    reasons = [_reason(layer) for layer in layers]
    for layer, reason in zip(layers, reasons):
        if not reason:
            layer.__class__ = _faster(type(layer))
    for reason in sorted(set(filter(None, reasons))):
        logger.warning("%d LoRA layers run as peft has them (slower): %s", reasons.count(reason), reason)
    return reasons.count(None)


_FASTER: dict[type[LoraLayer], type[LoraLayer]] = {}


def _faster(kind: type[LoraLayer]) -> type[LoraLayer]:
    """The class of such layers with the fast forward.

    One for all of them: torch.compile traces a layer anew for each forward that is an attribute of one instance.
    """

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.disable_adapters or self.merged or args or kwargs:
            return kind.forward(self, x, *args, **kwargs)
        return _forward(self, x)

    own = {"forward": forward, "casts": None, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return _FASTER.setdefault(kind, type(kind.__name__, (kind,), own))


def _reason(layer: LoraLayer) -> str | None:
    """Say why a layer cannot be computed here; None where it can."""
    base, name = layer.get_base_layer(), type(layer).__name__
    if type(layer) is not Linear and name not in QUANTISED:
        return f"they are of type {name}"
    plain = _is_plain(base) or isinstance(base, Float8Linear)
    if type(layer) is Linear and (not plain or layer.fan_in_fan_out):
        return f"their base is of type {type(base).__name__}"
    if layer.lora_variant or len(layer.active_adapters) != 1:
        return "variants, or several adapters"
    return None


def _is_plain(base: torch.nn.Module) -> bool:
    """Return whether a base computes x W' + bias from a weight as it is."""
    return type(base).forward is torch.nn.Linear.forward


def _forward(layer: LoraLayer, x: torch.Tensor) -> torch.Tensor:
    name, base = _trained(layer), layer.get_base_layer()
    below = FROZEN in layer.active_adapters and FROZEN in layer.lora_A
    kind, shape, whole = x.device.type, x.shape, _is_plain(base) and not below
    y_base = None if whole else base(x).flatten(0, -2)
    dtype = y_base.dtype if y_base is not None else x.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    x, y_base = x.flatten(0, -2).to(dtype), _cast(y_base, dtype)
    dropout = layer.lora_dropout[name]
    dropped = dropout(x) if layer.training and getattr(dropout, "p", 0) else None
    weight, bias = (_cast(base.weight, dtype), _cast(base.bias, dtype)) if whole else (None, None)
    with torch.autocast(kind, enabled=False):
        if below:
            thin = x @ layer.lora_A[FROZEN].weight.to(dtype).T
            wide = layer.lora_B[FROZEN].weight.to(dtype).T
            y_base = torch.addmm(y_base, thin, wide, alpha=layer.scaling[FROZEN])
        adapter, own = (*_adapter(layer), _casts(layer, dtype)), layer.lora_B[name].bias
        # Before the call: torch 2.13 does not compile what uses the scaling again after it.
        own = None if own is None else (layer.scaling[name] * own).to(dtype)
        y = _Adapted.apply(x, dropped, weight, bias, y_base, *adapter, layer.scaling[name])
        y = y if own is None else y + own
    return y.unflatten(0, shape[:-1])


def _trained(layer: LoraLayer) -> str:
    """The name of a layer's active adapter that is not the frozen one below it."""
    (name,) = (name for name in layer.active_adapters if name != FROZEN)
    return name


def _adapter(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    name = _trained(layer)
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _casts(layer: LoraLayer, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
    casts, *copies = layer.casts or (None,)
    return tuple(copies) if casts and casts.current and casts.dtype == dtype else None


def _cast(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return tensor if tensor is None else tensor.to(dtype)
