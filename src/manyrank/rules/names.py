"""Compare the names in a recipe, and the layers of a saved adapter, with the names in the base's files. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..config.patterns import matching
from ..config.peft_config import names_modules
from ..config.schema import TrainConfig
from ..models.model_facts import read_header
from .adapters import EMBEDDINGS, adapted_in
from .context import RunContext
from .model import HEADS

Shapes = dict[str, list[int]]  # of weights, by name


def are_doubtful(s: RunContext) -> bool:
    """Return whether adapters, or what is frozen, do not fit the names in the base's files, where modules may have other names."""
    shapes = s.model.headers() if s.model else {}
    return bool(shapes) and (_has_doubtful_names(s.config, shapes) or _is_doubtful(s, shapes))


def _is_doubtful(s: RunContext, shapes: Shapes) -> bool:
    """Return whether a saved adapter has other layers or ranks than its config says."""
    if not s.adapter:
        return False
    config, header = s.config, read_header(s.adapter / "adapter_model.safetensors")
    here = {name for name, _ in adapted_in(header)}
    matrices = {name.rpartition(".")[0] for name, shape in shapes.items() if len(shape) == 2}
    if config.new_adapter:
        return not here <= matrices
    meant = {m for m in matrices if _ends(m, config.lora_target_modules) and not _fits(m, config.exclude_modules)}
    ranks = {entry["shape"][0] for name, entry in header.items() if ".lora_A." in name}
    return here != meant or not ranks <= {config.lora_r, *config.rank_pattern.values()}


def _has_doubtful_names(config: TrainConfig, shapes: Shapes) -> bool:
    if not names_modules(config):
        return False
    if not config.uses_lora:
        frozen, unfrozen = config.frozen_parameters, config.unfrozen_parameters or [".*"]
        left = [name for name in shapes if not matching(name, frozen, below=True)]
        fits = [any(matching(name, [each], below=True) for name in shapes) for each in (*frozen, *unfrozen)]
        return not all(fits) or not any(matching(name, unfrozen, below=True) for name in left)
    modules = {name.rpartition(".")[0] for name in shapes} | set(HEADS)  # a tied one has no weight of its own
    matrices = {name.rpartition(".")[0] for name, shape in shapes.items() if len(shape) == 2}
    adapted = {m for m in matrices if _has_adapters(config, m)}
    around = {".".join(parts[:end]) for parts in (m.split(".") for m in modules) for end in range(1, len(parts) + 1)}
    tokens = config.trainable_token_indices
    literal = [re.escape(name) for name in (*config.modules_to_save, *(tokens if isinstance(tokens, dict) else ()))]
    wanted = [
        ([*config.exclude_modules, *literal], around),
        ([*config.rank_pattern, *config.alpha_pattern], adapted),
        (config.target_parameters, shapes),
        (map(str, config.layers_to_transform), {number for m in adapted for number in re.findall(r"\d+", m)}),
        (config.layers_pattern, {name for m in adapted for name in re.findall(r"(\w+)\.\d+\.", m)}),
    ]
    fits = (any(_fits(name, [pattern]) for name in names) for patterns, names in wanted for pattern in patterns)
    holds_layers = [
        name for name in config.modules_to_save if not any(_fits(module, [re.escape(name)]) for module in modules)
    ]
    return not all(fits) or bool(holds_layers) or not (adapted or config.target_parameters)


def _ends(name: str, ends: Iterable[str]) -> bool:
    return any(f".{name}".endswith(f".{end}") for end in ends)


def _fits(name: str, patterns: Iterable[str]) -> bool:
    try:
        return matching(name, patterns) is not None
    except re.error:  # for `models.adapters` to say
        return False


def _has_adapters(config: TrainConfig, name: str) -> bool:
    """Return whether a matrix has adapters."""
    targets, numbers = config.lora_target_modules, re.findall(r"\.(\d+)\.", name)
    excluded = [*config.exclude_modules, *(re.escape(module) for module in config.modules_to_save)]
    if matching(name, excluded, below=True):
        return False
    if config.layers_to_transform and not (numbers and int(numbers[0]) in config.layers_to_transform):
        return False
    if targets == "all-linear":
        return name.rpartition(".")[2] not in EMBEDDINGS
    return _ends(name, targets)
