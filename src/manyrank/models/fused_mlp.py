"""SwiGLU that keeps its two factors alone: one tensor of tokens x intermediate fewer for each layer that is not recomputed.

    y = down(silu(gate(x)) * up(x))        kept: gate, up; transformers' modules also keep silu(gate)

On CUDA it is one kernel forward and one backward (of five launches), which torch's jiterator compiles with NVRTC: Triton's,
as Liger has them, need a C compiler where they run. Elsewhere it is torch's operations in the order of the modules, with
their very values, and silu(gate) is recomputed.

Whether a module computes this its values say, as in `fused_norm`. torch.compile fuses, and recomputes, by itself.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.cuda import jiterator
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Names of the matrices; joined ones give gate and up side by side.
SEPARATE, JOINED = {"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}
ROWS, WIDTH = 32, 16  # of a module that is tried
ROUNDING = 1.01 * 2**-8  # of bf16, relative, with a little for that of float32

FORWARD = "template <typename T> T silu_mul(T gate, T up) { return gate / (T(1) + ::exp(-gate)) * up; }"
BACKWARD = """template <typename T> void silu_mul_backward(T dy, T gate, T up, T& dgate, T& dup) {
  T share = T(1) / (T(1) + ::exp(-gate));
  dup = dy * (gate * share);
  dgate = dy * up * (share * (T(1) + gate * (T(1) - share)));
}"""


class Kernels(NamedTuple):
    """silu(gate) * up, and what (dy, gate, up) give: the gradients of gate and up."""

    forward: Callable[..., torch.Tensor]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate).mul_(up)


def _gradients(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    inner = dy * up  # of silu(gate)
    torch.ops.aten.silu_backward.grad_input(inner, gate, grad_input=inner)
    return inner, F.silu(gate).mul_(dy)


OPERATIONS = Kernels(_product, _gradients)


class _SiluMul(torch.autograd.Function):
    """silu(gate) * up, of tensors of one shape and type."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return kernels(gate.device.type).forward(gate, up)

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        return kernels(gate.device.type).backward(dy, gate, up)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, of two tensors of one shape; of two types (of a layer that is not quantised), by torch alone."""
    return _SiluMul.apply(gate, up) if gate.dtype == up.dtype else F.silu(gate) * up


@functools.cache
def kernels(kind: str) -> Kernels:
    """What computes it on a kind of device: on CUDA the compiled kernels, which are tried first.

    Where they cannot be compiled, or compute something else, a line in the log says so.
    """
    if kind != "cuda":
        return OPERATIONS
    compiled = Kernels(
        jiterator._create_jit_fn(FORWARD), jiterator._create_multi_output_jit_fn(BACKWARD, num_outputs=2)
    )
    why = fault(lambda: deviation(compiled, torch.device(kind, torch.cuda.current_device())))
    if why:
        logger.warning("SwiGLU takes torch's operations (slower), not its compiled kernels: %s", why)
    return OPERATIONS if why else compiled


def fault(deviation: Callable[[], float]) -> str | None:
    """Say why kernels whose deviation in bf16 this is cannot be taken; None where they can."""
    try:
        wrong = deviation()
    except RuntimeError as error:  # no NVRTC, or one that does not know this GPU
        return str(error).strip().splitlines()[0]
    return f"they are off by {wrong:.1e}" if not wrong <= ROUNDING else None  # NaN is neither


@torch.no_grad()
def deviation(compiled: Kernels, device: torch.device) -> float:
    """The largest difference of kernels in bf16 from float32, relative to the values, of the product and both gradients."""
    values = torch.linspace(-30, 30, ROWS * WIDTH, device=device).view(ROWS, WIDTH)
    dy, gate, up = (tensor.bfloat16() for tensor in (values.sin(), values, values.cos() * 3))
    outputs = (compiled.forward(gate, up), *compiled.backward(dy, gate, up))
    references = (
        OPERATIONS.forward(gate.float(), up.float()),
        *OPERATIONS.backward(dy.float(), gate.float(), up.float()),
    )
    tiny = torch.finfo(torch.bfloat16).tiny  # below it bf16 rounds more coarsely
    each = [((a.float() - b).abs() / b.abs().clamp_min(tiny)).max() for a, b in zip(outputs, references)]
    return torch.stack(each).max().item()


def fuse_mlps(model: torch.nn.Module) -> int:
    """Let the SwiGLU modules of a model keep less; other gated ones stay, with a line in the log where there is a GPU.

    Returns:
        How many do.
    """
    mlps = [module for module in model.modules() if is_swiglu(module)]
    others = {type(module) for module in model.modules() if _matrices(module)} - set(map(type, mlps))
    if others and torch.cuda.is_available():
        names = ", ".join(sorted(kind.__name__ for kind in others))
        logger.warning("gated MLPs run as transformers has them (more memory), no SwiGLU: %s", names)
    for mlp in mlps:
        mlp.__class__ = _fused(type(mlp))
    return len(mlps)


def _matrices(module: torch.nn.Module) -> set[str]:
    """The names of a gated MLP's matrices; empty for another module, and for one that is fused already."""
    names = {name for name, child in module.named_children() if next(child.parameters(), None) is not None}
    return names if names in (SEPARATE, JOINED) and not hasattr(module, "plain_forward") else set()


@torch.no_grad()
def is_swiglu(mlp: torch.nn.Module) -> bool:
    """Return whether a module computes down(silu(gate(x)) * up(x)): a copy of it with diagonal matrices does."""
    if not (names := _matrices(mlp)):
        return False
    random = torch.Generator().manual_seed(0)  # the run's own numbers stay as they are
    matrices = {name: _Diagonal(2 if name == "gate_up_proj" else 1, random) for name in sorted(names)}
    rest = {name: copy.deepcopy(child).train() for name, child in mlp._modules.items() if name not in names}
    small = copy.copy(mlp)
    small.__dict__ |= {"_modules": {**rest, **matrices}, "training": True}
    x = torch.randn(ROWS, WIDTH, generator=random) * torch.logspace(-1, 2, ROWS)[:, None]
    try:
        return torch.allclose(type(mlp).forward(small, x), _forward(small, x), rtol=1e-4, atol=1e-4)
    except (TypeError, AttributeError, RuntimeError):  # it is called in another way, or asks for its own widths
        return False


class _Diagonal(torch.nn.Module):
    """One matrix or two, side by side, of which only the diagonals are not zero: products of a busy CPU take long."""

    def __init__(self, number: int, random: torch.Generator) -> None:
        super().__init__()
        self.factors = torch.randn(number, WIDTH, generator=random)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x[:, None] * self.factors).flatten(1)


def _forward(mlp: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    if hasattr(mlp, "gate_up_proj"):
        gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
    else:
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    return mlp.down_proj(silu_mul(gate, up))


@functools.cache
def _fused(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return kind.forward(self, x, *args, **kwargs) if args or kwargs else _forward(self, x)

    own = {"forward": forward, "plain_forward": kind.forward, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), own)
