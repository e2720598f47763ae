"""A frozen adapter below the one that is trained: y = x W' + s x (B A + B_f A_f)'.

    init_lora_weights: pissa   A_f, B_f are the first A and -B, so that the start changes nothing
    new_adapter                A_f, B_f are those of an earlier adapter

Both are saved as one adapter of the base, [A; A_f] and [B, B_f], which peft loads as any other; a resumed run cuts it
apart. Where a layer has both, the frozen one has the scaling of the trained one: B_f takes the difference.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from ..config.peft_config import WRAPPERS
from ..errors import UserError
from .adapters import adapted_layers
from .lora import FROZEN

Below = dict[str, tuple[torch.Tensor, torch.Tensor, float]]  # by name of a layer in the base: A, B, scaling


def has_frozen(model: torch.nn.Module) -> bool:
    """Return whether a model has a frozen adapter."""
    return FROZEN in getattr(model, "peft_config", {})


def opposite(model: torch.nn.Module) -> Below:
    """Take the adapters as they start, subtracted."""
    layers = {name: layer for name, layer in adapted_layers(model).items() if "default" in layer.lora_A}
    return {
        name: (layer.lora_A["default"].weight.clone(), -layer.lora_B["default"].weight, layer.scaling["default"])
        for name, layer in layers.items()
    }


def saved(model: torch.nn.Module, folder: Path) -> Below:
    """Read a plain LoRA adapter, of this project or another tool."""
    config, tensors = LoraConfig.from_pretrained(folder), _tensors(folder)
    layers, below = adapted_layers(model), {}
    for name in sorted({name.rpartition(".lora_")[0] for name in tensors}):
        down, up = (tensors[f"{name}.lora_{part}.weight"] for part in "AB")
        scaling = _alpha(config, name) / (len(down) ** 0.5 if config.use_rslora else len(down))
        own = layers[name].scaling["default"] if name in layers else scaling
        below[name] = down, up * (scaling / own), own
    return below


def saved_below(model: torch.nn.Module, checkpoint: Path) -> Below:
    """Cut the frozen adapter out of what a checkpoint has."""
    config, tensors, layers = LoraConfig.from_pretrained(checkpoint), _tensors(checkpoint), adapted_layers(model)
    below = {}
    for name in sorted({name.rpartition(".lora_")[0] for name in tensors if ".lora_A." in name}):
        down, up = (tensors[f"{name}.lora_{part}.weight"] for part in "AB")
        rank = layers[name].r["default"] if name in layers else 0
        scaling = layers[name].scaling["default"] if name in layers else _alpha(config, name) / len(down)
        if len(down) > rank:
            below[name] = down[rank:], up[:, rank:], scaling
    return below


def _alpha(config: LoraConfig, name: str) -> float:
    """The alpha of the adapters of a layer."""
    return config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved adapter, by name in the base."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {WRAPPERS.sub("", name).removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def put_below(model: PeftModel, below: Below) -> None:
    """Add the frozen adapter to a model that has one to train.

    Raises:
        UserError: the model has no such layers, or of another size.
    """
    shape = LoraConfig(r=1, target_modules=sorted(below), task_type="CAUSAL_LM")
    try:
        model.add_adapter(FROZEN, shape)
    except ValueError as error:
        raise UserError(str(error), where="adapter", fix="give the base that it was trained on") from None
    layers = adapted_layers(model)
    for name, (down, up, scaling) in below.items():
        if (layer := layers.get(name)) is None:
            what = f"the adapter has {name}, and the model has no such linear layer"
            raise UserError(what, where="adapter", fix="give the base that it was trained on")
        if (down.shape[1], up.shape[0]) != (layer.in_features, layer.out_features):
            what = f"the adapter does not fit the model's {name} ({type(layer.get_base_layer()).__name__})"
            raise UserError(what, where="adapter", fix="give the base that it was trained on")
        for part, value in ((layer.lora_A, down), (layer.lora_B, up)):
            device = part[FROZEN].weight.device
            part[FROZEN].weight = torch.nn.Parameter(value.to(device, torch.float32).contiguous(), requires_grad=False)
        layer.r[FROZEN], layer.scaling[FROZEN] = len(down), scaling
    model.base_model.set_adapter(["default", FROZEN])
    for name, parameter in model.named_parameters():
        if f".{FROZEN}." in name:
            parameter.requires_grad_(False)


def frozen_names(model: torch.nn.Module) -> list[str]:
    """The names of the frozen adapter's parameters."""
    return [name for name, _ in model.named_parameters() if f".{FROZEN}." in name]


def joined(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Join both adapters.

    Args:
        state: their parameters in full, by name in the model.

    Returns:
        The parameters of the one adapter, by name in the model, and its config.
    """
    config = copy.deepcopy(model.peft_config["default"])
    layers, result = adapted_layers(model), {name: t for name, t in state.items() if f".{FROZEN}." not in name}
    for name in frozen_names(model):
        own, axis = name.replace(f".{FROZEN}.", ".default."), 0 if ".lora_A." in name else 1
        result[own] = torch.cat([result[own], state[name]], axis) if own in result else state[name]
    ranks = {name: layer.r.get("default", 0) + layer.r.get(FROZEN, 0) for name, layer in layers.items()}
    scalings = {name: layer.scaling["default" if "default" in layer.r else FROZEN] for name, layer in layers.items()}
    alphas = {name: scalings[name] * rank for name, rank in ranks.items()}
    config.r, config.lora_alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {name: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}
    config.use_rslora = False
    if any(_only(layer) for layer in layers.values()):
        config.target_modules, config.exclude_modules = set(layers), None
        config.layers_to_transform = config.layers_pattern = None
    return result, config


def _only(layer: LoraLayer) -> bool:
    """Return whether a layer has the frozen adapter alone."""
    return "default" not in layer.r


def cut(layer_value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Take the trained part of a joined matrix: its first rows, or columns."""
    return layer_value[tuple(slice(0, size) for size in shape)]
