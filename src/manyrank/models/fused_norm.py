"""RMSNorm by torch's kernel on CUDA: one launch for eight forward and one for thirteen backward, and less is kept.

    y = weight * x / sqrt(mean(x^2) + eps)        in float32, rounded once; the modules of transformers round x first

Whether a class of modules computes this its values say, not its name: some add one to the weight, or have a gate.
torch.compile fuses norms by itself, and on CPUs torch has no kernel for it.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from transformers.utils import logging

logger = logging.get_logger(__name__)

WIDTH, EPS = 16, 0.1  # of a module that is tried; such an eps shows in the values


def fuse_norms(model: torch.nn.Module) -> int:
    """Let the RMSNorms of a model use torch's kernel on CUDA; others stay, with a line in the log where there is a GPU.

    Returns:
        How many do.
    """
    others = {type(module).__name__ for module in model.modules() if "RMSNorm" in type(module).__name__}
    norms = [module for module in model.modules() if is_plain_rms(type(module)) and hasattr(module, "weight")]
    others -= {type(norm).__name__ for norm in norms}
    if others and torch.cuda.is_available():
        logger.warning("norms run as transformers has them (slower), no plain RMSNorm: %s", ", ".join(sorted(others)))
    for norm in norms:
        norm.__class__ = _fused(type(norm))
    return len(norms)


@functools.cache
@torch.no_grad()
def is_plain_rms(kind: type[torch.nn.Module]) -> bool:
    """Return whether modules of a class named RMSNorm compute what `rms_norm` does."""
    if "RMSNorm" not in kind.__name__ or kind is torch.nn.RMSNorm or hasattr(kind, "plain_forward"):
        return False
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=random) for shape in ((3, WIDTH), (WIDTH,)))
    try:
        with torch.device("cpu"):
            norm = kind(WIDTH, eps=EPS)
        norm.weight.copy_(weight)
        return _eps(norm) == EPS and torch.allclose(norm(x), F.rms_norm(x, (WIDTH,), weight, EPS), atol=1e-5)
    except (TypeError, AttributeError, RuntimeError):  # it is made, or called, in another way
        return False


def _eps(norm: torch.nn.Module) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


@functools.cache
def _fused(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if args or kwargs or not takes(x, self.weight):
            return kind.forward(self, x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):  # which would compute in float32, and return it
            return F.rms_norm(x, (x.shape[-1],), self.weight, _eps(self))

    own = {"forward": forward, "plain_forward": kind.forward, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), own)


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether the kernel computes such a norm: on CUDA, and of one type."""
    return x.is_cuda and x.dtype == weight.dtype
