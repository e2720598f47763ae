"""The rotary embedding in few passes over queries and keys; for the backward it keeps nothing but cosines and sines.

    y = (x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2, rest)        x1, x2: halves of the first `cos.shape[-1]` numbers

transformers' modules call a function of their modeling file for it, which takes 30 launches a layer, forward and
backward, and rounds three times. Here it is three of torch's operations for queries and three for keys. On CUDA in
bf16 it is one kernel each, which torch's jiterator compiles, as in `fused_mlp`; a thread takes a word of four
numbers, and computes its indices once for all of them.

Whether a modeling file's function computes this is seen by comparing values, as in `fused_norm`. The modules get a class whose
forward is the same code with this function for that one; the modeling file stays as it is. torch.compile fuses by
itself.
"""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Sequence

import torch
from torch.cuda import jiterator
from transformers.utils import logging

from .fused_mlp import fault

logger = logging.get_logger(__name__)

NAME, ANY_NAME = "apply_rotary_pos_emb", re.compile(r"apply_.*rotary")  # of functions in modeling files
ROWS, HEADS, TOKENS, WIDTH = 2, 3, 5, 32  # of queries that are tried; different, so that no axis passes for another

SOURCE = """
template <typename T> float number(T word, int at) { return __uint_as_float((unsigned)(word >> at) << 16); }
template <typename T> T rotate(T first, T second, T cos, T sin_first, T sin_second, T later, T backward) {
  T x = later ? second : first, other = later ? first : second, y = 0;
  bool plus = later != backward;
  T sin = plus ? sin_second : sin_first;
  for (int at = 0; at < 64; at += 16) {
    float turned = number(other, at) * number(sin, at);
    float sum = number(x, at) * number(cos, at) + (plus ? turned : -turned);
    unsigned bits = __float_as_uint(sum);
    bits = sum == sum ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
    y |= (T)bits << at;
  }
  return y;
}"""

Rotation = Callable[..., torch.Tensor]


def by_operations(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backward: bool = False) -> torch.Tensor:
    """Rotate by torch's operations, computed in the larger of both types.

    Args:
        x: (rows, heads, tokens, width), or with tokens before heads.
        cos, sin: (rows, 1, tokens, width or less), or with tokens first.
        backward: x is the gradient of what was rotated; it is rotated back.
    """
    width = cos.shape[-1]
    (x1, x2), (sin1, sin2) = (tensor[..., :width].chunk(2, dim=-1) for tensor in (x, sin))
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, cos.dtype))
    torch.mul(x[..., :width], cos, out=y[..., :width])
    y1, y2 = y[..., :width].chunk(2, dim=-1)
    y1.addcmul_(x2, sin2 if backward else sin1, value=1 if backward else -1)
    y2.addcmul_(x1, sin1 if backward else sin2, value=-1 if backward else 1)
    if width < x.shape[-1]:
        y[..., width:] = x[..., width:]
    return y.to(x.dtype)


def by_words(kernel: Rotation, tensors: Sequence[torch.Tensor], *, backward: bool = False) -> list[torch.Tensor]:
    """Rotate by a compiled kernel, as `by_operations` does.

    Args:
        tensors: cosines, sines and what is rotated, of `in_words`.
    """
    cos, sin, *others = tensors
    sines, later = sin.chunk(2, dim=-2), _later(sin.device)
    rotated = (kernel(*x.chunk(2, dim=-2), cos, *sines, later, backward=int(backward)) for x in others)
    return [y.view(torch.bfloat16).flatten(-2) for y in rotated]


def in_words(*tensors: torch.Tensor, width: int) -> list[torch.Tensor] | None:
    """View the first `width` numbers as (..., 2, words of a half); None where they are no whole words of bf16."""
    if any(tensor.dtype != torch.bfloat16 for tensor in tensors):
        return None
    try:
        words = [(x if x.shape[-1] == width else x[..., :width]).view(torch.int64) for x in tensors]
        return [each.view(*each.shape[:-1], 2, -1) for each in words]
    except RuntimeError:
        return None


@functools.cache
def _later(device: torch.device) -> torch.Tensor:
    """(2, 1): whether a number is of the second half."""
    return torch.tensor([[0], [1]], device=device)


@functools.cache
def compiled(kind: str) -> Rotation | None:
    """The kernel for a kind of device: on CUDA, where it is tried first.

    Where it cannot be compiled, or computes something else, it is None, and a line in the log says so.
    """
    if kind != "cuda":
        return None
    kernel = jiterator._create_jit_fn(SOURCE, backward=0)
    why = fault(lambda: deviation(kernel, torch.device(kind, torch.cuda.current_device())))
    if why:
        logger.warning("the rotary embedding takes torch's operations (slower), not its compiled kernels: %s", why)
    return None if why else kernel


@torch.no_grad()
def deviation(kernel: Rotation, device: torch.device) -> float:
    """The largest difference of a kernel from float32, relative to the lengths of the pairs, forward and backward."""
    query, key, *angles = (tensor.to(device, torch.bfloat16) for tensor in _random(WIDTH))
    cos, sin = (tensor.unsqueeze(1) for tensor in angles)
    words, each = in_words(cos, sin, query, key, width=WIDTH), []
    for backward in (False, True):
        for x, y in zip((query, key), by_words(kernel, words, backward=backward)):
            want = by_operations(x.float(), cos.float(), sin.float(), backward=backward)
            length = torch.hypot(*want.chunk(2, dim=-1)).repeat(1, 1, 1, 2)
            each.append(((y - want).abs() / length).max())
    return torch.stack(each).max().item()


def _random(width: int) -> list[torch.Tensor]:
    """Queries, keys, cosines and sines, which are no angle's."""
    random = torch.Generator().manual_seed(0)  # the run's own numbers stay as they are
    shapes = (ROWS, HEADS, TOKENS, WIDTH), (ROWS, 1, TOKENS, WIDTH), *[(ROWS, TOKENS, width)] * 2
    return [torch.randn(shape, generator=random) for shape in shapes]


class _Rotate(torch.autograd.Function):
    """Queries and keys, rotated; see `by_operations`."""

    @staticmethod
    def forward(ctx, query, key, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(query, key, cos=cos, sin=sin)

    @staticmethod
    def backward(ctx, dquery, dkey):
        cos, sin = ctx.saved_tensors
        return *_rotated(dquery, dkey, cos=cos, sin=sin, backward=True), None, None


def _rotated(*tensors: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool = False):
    width, kernel = cos.shape[-1], compiled(cos.device.type)
    if kernel is None or (words := in_words(cos, sin, *tensors, width=width)) is None:
        return tuple(by_operations(x, cos, sin, backward=backward) for x in tensors)
    parts = zip(tensors, by_words(kernel, words, backward=backward))
    return tuple(y if width == x.shape[-1] else torch.cat([y, x[..., width:]], dim=-1) for x, y in parts)


def fuse_ropes(model: torch.nn.Module) -> int:
    """Let attention modules rotate in few passes; others stay, with a line in the log where there is a GPU.

    Returns:
        How many do.
    """
    rotary = {kind for kind in map(type, model.modules()) if rotary_functions(kind)}
    fused = {kind for kind in rotary if _is_fusible(kind)}
    if (others := rotary - fused) and torch.cuda.is_available():
        names = ", ".join(sorted(kind.__name__ for kind in others))
        logger.warning(
            "transformers' own rotary embedding stays in these modules (slower), it does not rotate halves: %s", names
        )
    modules = [module for module in model.modules() if type(module) in fused]
    for module in modules:
        module.__class__ = _fused(type(module))
    return len(modules)


def rotary_functions(kind: type[torch.nn.Module]) -> set[str]:
    """The names of the rotary embeddings that a class's forward calls; empty for a class that is fused already."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    names = filter(ANY_NAME.match, getattr(code, "co_names", ()))
    return set() if hasattr(kind, "plain_forward") else set(names)


def _is_fusible(kind: type[torch.nn.Module]) -> bool:
    plain = not hasattr(kind.forward, "__wrapped__")  # what a decorator does with a forward is not known
    return plain and rotary_functions(kind) == {NAME} and is_rotation(kind.forward.__globals__.get(NAME))


@functools.cache
@torch.no_grad()
def is_rotation(function: Callable) -> bool:
    """Return whether a modeling file's function computes this, of whole heads and, if it takes such, of parts."""

    def same(width: int) -> bool:
        query, key, cos, sin = _random(width)
        wanted = [by_operations(x, cos[:, None], sin[:, None]) for x in (query, key)]
        return all(torch.allclose(y, want, atol=1e-5) for y, want in zip(function(query, key, cos, sin), wanted))

    try:
        if not same(WIDTH):
            return False
    except Exception:  # it is called in another way, or is a remote model's, which may do anything
        return False
    try:
        return same(WIDTH // 2)
    except RuntimeError:  # whole heads alone
        return True
    except Exception:
        return False


@functools.cache
def _fused(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    plain = kind.forward
    rotary = plain.__globals__[NAME]

    @functools.wraps(rotary)
    def rotated(query, key, cos, sin, *args, unsqueeze_dim=1, **kwargs):
        tokens = {query.shape[3 - unsqueeze_dim], key.shape[3 - unsqueeze_dim], cos.shape[1]}
        if args or kwargs or cos.requires_grad or len(tokens) > 1:
            return rotary(query, key, cos, sin, *args, unsqueeze_dim=unsqueeze_dim, **kwargs)
        return _Rotate.apply(query, key, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim))

    names = plain.__globals__ | {NAME: rotated}
    forward = types.FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    functools.update_wrapper(forward, plain)
    forward.__kwdefaults__ = plain.__kwdefaults__
    own = {"forward": forward, "plain_forward": plain, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), own)
