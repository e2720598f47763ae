"""Put adapters on a base where a text reaches it and peft can adapt it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import set_seed
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ..config.patterns import matching
from ..config.peft_config import WRAPPERS, peft_arguments
from ..config.resolve import TrainConfig
from ..errors import UserError
from . import coverage
from .lora import speed_up
from .new_tokens import NONE, NewTokens
from .reach import Reach, shape_of, unreached_modules, within
from .token_rows import speed_up_tokens

Say = Callable[[str], None]


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are learned, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def with_lora(
    model: torch.nn.Module, config: TrainConfig, reached: Reach | None, say: Say, new: NewTokens = NONE
) -> torch.nn.Module:
    """A base with the recipe's adapters, and nothing else trained; the same start on every rank for a seed.

    Args:
        reached: what a text uses; None: all of it.
        say: takes a line on what has no adapters.
        new: tokens whose rows are trained beside the adapters.

    Raises:
        UserError: these adapters cannot be put on it.
    """
    own = not config.start_model or config.new_adapter
    if own:  # else names are those of a saved adapter, with peft's for experts
        _check_modules(model, config)
    model.requires_grad_(False)
    set_seed(config.seed)
    unreached = unreached_modules(model, reached) if reached else []
    left_out = [*unreached, *(_refused(model) if config.lora_target_modules == "all-linear" else [])]
    left_out += [rf"(?:.*\.)?(?:{pattern})" for pattern in config.exclude_modules]
    excluded = "|".join(rf"(?:{pattern})(?:\..*)?" for pattern in left_out) or None
    fix = _fix_of_targets(model, config, excluded)
    beyond = _beyond_text(model, reached)
    arguments = peft_arguments(config) | {"exclude_modules": excluded}
    arguments["trainable_token_indices"] = _trained_tokens(model, config, new)
    if config.lora_target_modules == "all-linear" and config.layers_to_transform:
        arguments["target_modules"] = _linear_names(model, excluded)  # peft counts layers of named modules alone
    try:
        adapted = get_peft_model(model, LoraConfig(**arguments, task_type="CAUSAL_LM"))
    except ValueError as error:  # no module has such a name, none that a text reaches, or peft cannot adapt it
        raise UserError(str(error), where="lora_target_modules", fix=fix) from None
    _name_patterns(adapted)
    if own:
        _check_adapted(adapted, config)
    if "lora" not in config.disable_fused:
        speed_up(adapted)
    speed_up_tokens(adapted)
    for note in (coverage.of_adapters(adapted, reached), beyond):
        if note:
            say(note)
    return adapted


def _trained_tokens(model: torch.nn.Module, config: TrainConfig, new: NewTokens) -> dict[str, list[int]] | list | None:
    """Ids of the tokens whose rows are trained, by module: the recipe's, and new ones where no whole module is trained."""
    given = config.trainable_token_indices
    if not new.ids:
        return given or None
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    tied = ends[1] is None or ends[0].weight is ends[1].weight
    names = {id(module): name for name, module in model.named_modules()}
    paths = [names[id(module)] for module in ends[: 1 if tied else 2]]
    short = [path.rpartition(".")[2] for path in paths]
    rows = {name: set(new.ids) for name in short if name not in config.modules_to_save}
    for name, ids in (given if isinstance(given, dict) else {short[0]: given}).items():
        rows.setdefault(name, set()).update(ids)
    return {name: sorted(ids) for name, ids in rows.items() if ids} or None


def _check_modules(model: torch.nn.Module, config: TrainConfig) -> None:
    """Refuse names and patterns of the recipe that fit no module of the base: peft passes over most of them.

    Raises:
        UserError: there is one.
    """
    names = {name for name, module in model.named_modules() if any(True for _ in module.parameters())}
    tokens = config.trainable_token_indices
    _check_fit("exclude_modules", config.exclude_modules, names, "module with weights")
    # peft takes these by the ends of names, and no patterns.
    whole, rows = config.modules_to_save, tokens if isinstance(tokens, dict) else ()
    _check_fit("modules_to_save", whole, names, "module with weights", literal=True)
    _check_fit("trainable_token_indices", rows, names, "module with weights", literal=True)
    _check_layers(config, names)
    layers = [name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    for name in whole:
        if any(matching(layer, [re.escape(name)], below=True) for layer in layers):
            fix = "name modules within layers, as mlp.down_proj, or use method: full with unfrozen_parameters"
            raise UserError(f"modules_to_save: {name!r} has whole layers in it", where="modules_to_save", fix=fix)


def _check_adapted(model: torch.nn.Module, config: TrainConfig) -> None:
    """Refuse names and patterns of the recipe that fit nothing with adapters.

    Raises:
        UserError: there is one.
    """
    adapted = adapted_layers(model)
    kept = [name for name in adapted if matching(name, config.exclude_modules, below=True)]
    if kept:
        what = f"exclude_modules: {kept[0]} has adapters all the same: peft puts them on experts by their parameters"
        raise UserError(what, where="exclude_modules", fix="list lora_target_modules without the experts")
    parameters = {
        f"{name.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', None)}" for name, layer in adapted.items()
    }
    _check_fit("rank_pattern", config.rank_pattern, adapted, "module with adapters")
    _check_fit("alpha_pattern", config.alpha_pattern, adapted, "module with adapters")
    _check_fit("target_parameters", config.target_parameters, parameters, "parameter")
    _check_layers(config, adapted)


def _check_layers(config: TrainConfig, modules: Iterable[str]) -> None:
    lists = {pair for name in modules for pair in re.findall(r"([^.]+)\.(\d+)\.", name)}
    _check_fit("layers_pattern", config.layers_pattern, {name for name, _ in lists}, "list of layers")
    _check_fit("layers_to_transform", map(str, config.layers_to_transform), {number for _, number in lists}, "layer")


def _check_fit(key: str, patterns: Iterable[str], names: Iterable[str], kind: str, *, literal: bool = False) -> None:
    for pattern in patterns:
        try:
            fits = any(matching(name, [re.escape(pattern) if literal else pattern]) for name in names)
        except re.error as error:
            fix = "give the end of a name, or a regular expression"
            raise UserError(f"{key}: {pattern!r} is no regular expression: {error}", where=key, fix=fix) from None
        if not fits:
            what = f"{key}: no {kind} is called {pattern!r}"
            fix = "give the end of a name, as mlp.down_proj" + ("" if literal else ", or a pattern of the whole name")
            raise UserError(what, where=key, fix=fix)


def _name_patterns(model: torch.nn.Module) -> None:
    """Write whole names in place of patterns where two fit a layer: the first counts, and peft saves them sorted."""
    own = model.peft_config["default"]
    for key, usual, part in (("rank_pattern", own.r, "r"), ("alpha_pattern", own.lora_alpha, "lora_alpha")):
        patterns, layers = getattr(own, key), adapted_layers(model)
        if any(get_pattern_key(patterns, name) != get_pattern_key(sorted(patterns), name) for name in layers):
            values = {name: getattr(layer, part)["default"] for name, layer in layers.items()}
            setattr(own, key, {name: value for name, value in values.items() if value != usual})


def saved_names(model: torch.nn.Module) -> dict[str, str]:
    """The names that peft saves an adapter's parameters under, by their names in the model."""
    markers = {name: torch.empty(0) for name, _ in model.named_parameters()}
    names = {id(marker): name for name, marker in markers.items()}
    saved = get_peft_model_state_dict(model, markers, save_embedding_layers=False)
    return {names[id(marker)]: key for key, marker in saved.items()}


@torch.no_grad()
def load_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Give a model's new adapters the values of a saved one of the same shape, of this project or of another tool.

    Raises:
        UserError: they do not fit, or cannot be read.
    """
    names = saved_names(model)
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot be read: {error}", where=str(folder), fix="give a whole adapter") from None
    saved = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    parameters = {WRAPPERS.sub("", names[name]): parameter for name, parameter in trainable(model).items()}
    for name in parameters | saved:
        here, there = (list(values[name].shape) if name in values else "not there" for values in (parameters, saved))
        if here != there:
            what = f"the adapter does not fit the model: {name} is {there}, and {here} in the model"
            raise UserError(what, where=str(folder), fix="give a whole adapter, and the base that it was trained on")
        parameters[name].copy_(saved[name])


def adapted_layers(model: torch.nn.Module) -> dict[str, LoraLayer]:
    """The layers with adapters, by their names in the base."""
    prefix = "base_model.model."
    return {n.removeprefix(prefix): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def remove_adapters(model: torch.nn.Module) -> None:
    """Put the base's own layers back where adapters were put on them."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLayer):
                setattr(parent, name, child.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def _beyond_text(model: torch.nn.Module, reached: Reach | None) -> str | None:
    """A note on the layers that a text does not use, where they have matrices."""
    left = {name: p for name, p in model.named_parameters() if reached and name not in reached.parameters}
    if not any(len(shape_of(parameter)) > 1 for parameter in left.values()):
        return None
    return f"no adapters where no text comes: {within(left, model)}"


def _refused(model: torch.nn.Module) -> list[str]:
    """Patterns of the layers that peft refuses to adapt in this model: Mamba's fused kernels read their weights."""
    try:
        from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as check  # peft 0.21; no public name
    except ImportError:
        return []
    patterns = []
    for name in _linear_names(model):
        try:
            check(LoraConfig(), model, name)
        except ValueError:
            patterns.append(rf"(?:.*\.)?{re.escape(name)}")
    return patterns


def _linear_names(model: torch.nn.Module, excluded: str | None = None) -> list[str]:
    """The last parts of the names of a model's linear layers, lm_head aside."""
    head = model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and module is not head
        and not (excluded and re.fullmatch(excluded, name))
    }
    return sorted(names)


def _fix_of_targets(model: torch.nn.Module, config: TrainConfig, excluded: str | None) -> str:
    """Targets that work: those of the recipe that can be adapted, else all that can."""
    refused = "|".join(filter(None, [excluded, *_refused(model)])) or None
    known = _linear_names(model, refused)
    if not known:
        return "use method: full; the model has no linear layers of its own"
    targets = [] if isinstance(config.lora_target_modules, str) else config.lora_target_modules
    names = [name for name in targets if name.rpartition(".")[2] in known] or known
    return f"give --lora_target_modules '[{','.join(names)}]', or all-linear"
