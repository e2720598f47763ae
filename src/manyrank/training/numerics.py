"""Numbers that a whole process computes by: float32 products in TF32, and algorithms that give the same bits each time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch

from ..config.resolve import TrainConfig
from ..errors import UserError, in_one_line
from ..topology.precision import DETERMINISTIC

# In torch 2.13 torch.compile reads this, and fails where torch.backends.cuda.matmul.fp32_precision was set instead.
EXACT, TF32 = "highest", "high"


def set_up(config: TrainConfig) -> Callable[[], None]:
    """Set torch's switches for tf32 and full_determinism, and return what sets them back."""
    undo = contextlib.ExitStack()
    if config.tf32:
        undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision(TF32)
    if config.full_determinism:
        undo.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        torch.use_deterministic_algorithms(True)
        for name, value in {"deterministic": True, "benchmark": False}.items():
            undo.callback(setattr, torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
            setattr(torch.backends.cudnn, name, value)
        for name, value in DETERMINISTIC.items():  # of a script; a worker has them before CUDA starts
            if name not in os.environ:
                os.environ[name] = value
                undo.callback(os.environ.pop, name, None)
    return undo.close


def keep_positions_exact(model: torch.nn.Module) -> None:
    """Multiply positions and frequencies of rotary embeddings in float32: TF32 does not tell positions above 2,048 apart."""

    before: list[str] = []

    def exact(*_) -> None:
        before.append(torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision(EXACT)

    def restore(*_) -> None:
        torch.set_float32_matmul_precision(before.pop())

    for module in model.modules():
        if hasattr(module, "inv_freq") and not hasattr(module, "_exact_in_float32"):  # of an earlier session
            module._exact_in_float32 = True
            module.register_forward_pre_hook(exact)
            module.register_forward_hook(restore, always_call=True)


@contextlib.contextmanager
def naming_the_option() -> Iterator[None]:
    """Say which option an operation without a deterministic version contradicts.

    Raises:
        UserError: there was one.
    """
    try:
        yield
    except RuntimeError as error:
        if "use_deterministic_algorithms" not in str(error):
            raise
        what = f"no deterministic version: {in_one_line(error).partition(', but ')[0]}"
        fix = "leave full_determinism out, or what uses that operation"
        raise UserError(what, where="full_determinism", fix=fix) from None
