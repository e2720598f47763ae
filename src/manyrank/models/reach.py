"""Find what a text reaches: which parameters and layers of a base a text-only forward uses, before anything is trained.

    model --copied with fake tensors--> forward of a few tokens --> modules that are called, parameters in the graph

Nothing is computed and no weight is read, so every rank of every strategy finds the same. What is not reached (a vision
tower under a text, a layer whose weight is used without calling it) would get adapters or an optimizer's state and no
gradient, and DDP would wait for that gradient in vain.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Tokens of the forward. A parameter that the short text does not reach may be for long ones: DeepSeek-V4 compresses
# blocks of 128 tokens.
SHORT, LONG = 8, 512


@dataclass(frozen=True)
class Reach:
    """Names in the model: parameters that the logits of a text depend on, and modules that are called for them."""

    parameters: frozenset[str]
    modules: frozenset[str]


def reach(model: torch.nn.Module) -> Reach | None:
    """Find what a text reaches in a base; None where the forward looks at values, which fake tensors do not have.

    Args:
        model: without adapters; its weights may be quantised, sharded by DeepSpeed, or on the meta device.
    """
    short = _first(model, SHORT)
    if short and not all(name in short.parameters for name, _ in model.named_parameters(remove_duplicate=False)):
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return _first(model, min(LONG, positions) if isinstance(positions, int) else LONG)
    return short


def _first(model: torch.nn.Module, tokens: int) -> Reach | None:
    """The result with the model's own attention, else with the eager one, which every model has."""
    for attention in (None, "eager"):
        try:
            with warnings.catch_warnings(), torch.enable_grad(), FakeTensorMode(allow_non_fake_inputs=True):
                warnings.simplefilter("ignore")
                return _forward(_sketch(model), tokens, attention)
        except Exception as error:  # of any kind: the forward is the model's own
            logger.info("what a text reaches is not known: %s: %s", type(error).__name__, error)
    return None


def _sketch(model: torch.nn.Module) -> torch.nn.Module:
    """A copy without values: a float parameter for each parameter, and a plain layer for each packed one."""
    memo: dict[int, object] = {}
    for module in model.modules():
        if is_packed(module):
            plain = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None)
            memo[id(module)] = plain
    for parameter in model.parameters():
        dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.float32
        memo[id(parameter)] = torch.nn.Parameter(torch.empty(shape_of(parameter), dtype=dtype))
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return copy.deepcopy(model, memo).eval()


def shape_of(parameter: torch.Tensor) -> tuple[int, ...]:
    """The whole shape, also of a parameter that DeepSpeed has sharded."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def count_parameters(model: torch.nn.Module) -> int:
    """Count the parameters over all ranks; of a packed layer those of the matrix that it stands for."""
    packed = {id(m.weight): m.in_features * m.out_features for m in model.modules() if is_packed(m)}
    return sum(packed.get(id(p), math.prod(shape_of(p))) for p in model.parameters())


def is_packed(module: torch.nn.Module) -> bool:
    """Return whether a linear layer holds its weight in another form than a float matrix."""
    sizes = [getattr(module, name, None) for name in ("out_features", "in_features")]
    weight = module._parameters.get("weight")  # of its own: wrappers of peft compute theirs
    if not all(isinstance(size, int) for size in sizes) or not isinstance(weight, torch.Tensor):
        return False
    return list(shape_of(weight)) not in (sizes, sizes[::-1]) or not weight.dtype.is_floating_point


def _forward(sketch: torch.nn.Module, tokens: int, attention: str | None) -> Reach:
    if attention:
        sketch.set_attn_implementation(attention)
    with contextlib.suppress(ValueError, AttributeError):
        sketch.set_experts_implementation("batched_mm")  # which does not look at what tokens an expert has
    called: set[str] = set()
    for name, module in sketch.named_modules(remove_duplicate=False):
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    logits = sketch(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False).logits
    leaves = _leaves(logits)
    used = {name for name, p in sketch.named_parameters(remove_duplicate=False) if id(p) in leaves}
    return Reach(frozenset(used), frozenset(called))


def _leaves(tensor: torch.Tensor) -> set[int]:
    """Ids of the parameters that a tensor depends on, read from its graph."""
    seen, leaves, waiting = set(), set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return leaves


def unreached_modules(model: torch.nn.Module, reached: Reach) -> list[str]:
    """Regular expressions for the modules on which adapters would get no gradient, each as far up as it goes."""
    own = {name: [at for at, _ in module.named_parameters(recurse=False)] for name, module in model.named_modules()}
    used = {
        name
        for name in reached.modules & own.keys()
        if not own[name] or any(f"{name}.{at}" in reached.parameters for at in own[name])
    }
    alive = {part for name in used for part in _ancestry(name)}
    holders = {part for name, parameters in own.items() if parameters for part in _ancestry(name)}
    top = [name for name in own if name in holders - alive and name.rpartition(".")[0] not in holders - alive]
    patterns = {name: _pattern(name) for name in top}
    clash = {p for p in set(patterns.values()) if any(re.fullmatch(p, alive_name) for alive_name in alive)}
    # Where layers of one name differ, each is named.
    return list(dict.fromkeys(re.escape(name) if p in clash else p for name, p in patterns.items()))


def _ancestry(name: str) -> list[str]:
    """A module's name and those of the modules around it."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)] if name else []


def _pattern(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdecimal() else re.escape(part) for part in name.split("."))


def within(names: Iterable[str], model: torch.nn.Module) -> str:
    """Parameters for people: the modules that hold nothing else, else the parameters."""
    names = set(names)
    others = {part for name, _ in model.named_parameters() if name not in names for part in _ancestry(name)}
    return kinds(next(part for part in _ancestry(name) if part not in others) for name in sorted(names))


def kinds(names: Iterable[str]) -> str:
    """Names for people: those that differ by numbers only as one."""
    distinct = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))
    return ", ".join(distinct[:4]) + (f" and {len(distinct) - 4} more" if len(distinct) > 4 else "")
