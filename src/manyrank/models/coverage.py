"""Count what a method reaches of the weights it is for: what is quantised, and what has adapters.

Counted are matrices of the layers: every parameter of two or more dimensions outside of the embeddings and lm_head,
as they are after loading, whatever the reason for what is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer

from ..errors import UserError
from .reach import Reach, is_packed, kinds, shape_of

PACKED_BYTES = 1.5  # of a weight at most, where it is quantised; 16 bits are 2
SMALL = 0.05  # share that may stay unquantised without a word: routers, convolutions, state matrices
NEARLY_ALL = 0.99


@dataclass(frozen=True)
class Matrix:
    """One matrix of the layers, or several in one parameter (experts).

    Attributes:
        module: its module's name in the base. name: of the parameter in it. kind: of its class.
        weights: its elements, also where they are packed. stacked: whether it has more than two dimensions.
    """

    module: str
    name: str
    kind: str
    weights: int
    quantised: bool
    adapted: bool
    stacked: bool

    @property
    def label(self) -> str:
        return self.module if self.name == "weight" else f"{self.module} ({self.name})"


def matrices(model: torch.nn.Module) -> Iterator[Matrix]:
    """The matrices of a model, with or without adapters, those that are shared once."""
    adapted = {
        (id(layer.get_base_layer()), getattr(layer, "parameter_name", None) or "weight")
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
    }
    head, seen = model.get_output_embeddings(), set()
    for path, module in model.named_modules():
        if ".lora_" in path or isinstance(module, torch.nn.Embedding) or module is head:
            continue
        packed = is_packed(module)
        for name, parameter in module.named_parameters(recurse=False):
            shape = (module.out_features, module.in_features) if packed and name == "weight" else shape_of(parameter)
            if len(shape) < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            weights, held = math.prod(shape), getattr(parameter, "ds_numel", parameter.numel())
            yield Matrix(
                _plain(path),
                name,
                type(module).__name__,
                weights,
                quantised=held * parameter.element_size() < PACKED_BYTES * weights,
                adapted=(id(module), name) in adapted,
                stacked=len(shape) > 2,
            )


def _plain(path: str) -> str:
    return ".".join(part for part in path.removeprefix("base_model.model.").split(".") if part != "base_layer")


def check_quantised(model: torch.nn.Module, *, method: str, where: str, fix: str, say: Callable[[str], None]) -> None:
    """See after loading that a quantised base is one.

    Args:
        method: what should have quantised it.
        say: takes a line on what stays in full precision, where that is more than a small share.

    Raises:
        UserError: nothing is quantised, or less than half of the matrices that are not stacked.
    """
    every = list(matrices(model))
    left = [matrix for matrix in every if not matrix.quantised]
    share = sum(matrix.weights for matrix in left) / max(1, sum(matrix.weights for matrix in every))
    flat = [matrix for matrix in every if not matrix.stacked]
    of_flat = sum(m.weights for m in flat if not m.quantised) / max(1, sum(m.weights for m in flat))
    if left and (len(left) == len(every) or of_flat > 0.5):
        classes = dict.fromkeys(matrix.kind for matrix in sorted(left, key=lambda m: -m.weights))
        much = "nothing is quantised" if len(left) == len(every) else f"{of_flat:.0%} of the weights are not quantised"
        what = f"{method}, and {much}: it cannot hold layers of class {', '.join(list(classes)[:3])}"
        raise UserError(what, where=where, fix=fix)
    if share > SMALL:
        say(f"{method}: {share:.0%} of the weights of the layers are not quantised: {_largest(left)}")


def of_adapters(model: torch.nn.Module, reached: Reach | None) -> str | None:
    """A note on the share of a text's weights that adapters reach, where that is not nearly all.

    Args:
        reached: what a text uses; what it does not is not counted.
    """
    reachable = [m for m in matrices(model) if reached is None or f"{m.module}.{m.name}" in reached.parameters]
    left = [matrix for matrix in reachable if not matrix.adapted]
    share = 1 - sum(matrix.weights for matrix in left) / max(1, sum(matrix.weights for matrix in reachable))
    if share >= NEARLY_ALL:
        return None
    return f"adapters reach {share:.0%} of the weights of the layers; without adapters: {_largest(left)}"


def _largest(matrices_left: list[Matrix]) -> str:
    """The kinds of some matrices, the largest first."""
    sizes: dict[str, int] = {}
    for matrix in matrices_left:
        label = kinds([matrix.label])
        sizes[label] = sizes.get(label, 0) + matrix.weights
    return kinds(sorted(sizes, key=sizes.__getitem__, reverse=True))
