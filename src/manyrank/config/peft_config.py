"""A recipe's adapters in peft's words: keys to arguments of LoraConfig, and an adapter_config.json back to keys. No torch."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

from ..errors import UserError
from .recipe_file import Setting
from .schema import TrainConfig

# Keys of a recipe, and peft's names of what shapes an adapter.
PEFT_NAMES = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "lora_target_modules": "target_modules",
    "exclude_modules": "exclude_modules",
    "layers_to_transform": "layers_to_transform",
    "layers_pattern": "layers_pattern",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "target_parameters": "target_parameters",
    "use_dora": "use_dora",
    "lora_bias": "lora_bias",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable_token_indices",
}
# Of adapter_config.json, what no recipe makes, and its usual values.
NOT_MADE_HERE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}
# Of adapter_config.json, what other programs may pass over.
BEYOND_PLAIN = (
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
)
# Keys that name modules or parameters of the model, or its layers by number.
NAMES_MODULES = (
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
    "modules_to_save",
    "trainable_token_indices",
)
# What wrappers of training scripts have left in the names of saved adapters.
WRAPPERS = re.compile(r"^module\.|\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|default)\.")
FIX = "merge it (manyrank merge), and start from the result"


def peft_arguments(config: TrainConfig) -> dict[str, Any]:
    """The arguments of LoraConfig that shape a recipe's adapters; what is empty is None, as peft has it."""
    # peft changes the patterns that it is given.
    values = {theirs: copy.deepcopy(getattr(config, key)) for key, theirs in PEFT_NAMES.items()}
    values = {key: None if value == [] else value for key, value in values.items()}
    values["layers_pattern"] = values["layers_pattern"] if config.layers_to_transform else None
    return values | {"lora_dropout": config.lora_dropout}


def names_modules(config: TrainConfig) -> bool:
    """Return whether a recipe has names of modules of its own, not those of a saved adapter."""
    if not config.uses_lora:
        return bool(config.frozen_parameters or config.unfrozen_parameters)
    own = not config.start_model or config.new_adapter
    return own and any(getattr(config, key) for key in NAMES_MODULES)


def adapter_keys(adapter: Path, entry: Setting) -> dict[str, Any]:
    """The keys of a recipe that make an adapter of the same shape.

    Args:
        adapter: its folder. entry: where it was named.

    Raises:
        UserError: no recipe makes it, or its config cannot be read.
    """
    file = adapter / "adapter_config.json"
    try:
        theirs = json.loads(file.read_text(encoding="utf-8"))
        special = [key for key, usual in NOT_MADE_HERE.items() if theirs.get(key, usual[-1]) not in usual]
        values = {key: theirs.get(name) for key, name in PEFT_NAMES.items()}
        if isinstance(values["lora_target_modules"], str):
            values["lora_target_modules"] = _adapted_names(adapter)
        if special or not (values["lora_target_modules"] or values["target_parameters"]):
            what = f"the adapter is not one that manyrank makes ({', '.join(special) or 'target_modules'})"
            raise UserError(what, where=f"{entry.where}, {file}", fix=FIX)
        if not values["lora_r"] or not values["lora_alpha"]:
            raise ValueError("it has no r or no lora_alpha")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"cannot be read: {error}", where=str(file), fix="give a whole adapter") from None
    return {key: _as_ours(key, value) for key, value in values.items()}


def check_weights(adapter: Path, entry: Setting) -> None:
    """Look at the names and shapes in an adapter's file, without its values.

    Raises:
        UserError: it is no whole safetensors file, or a matrix A has no B, or none of its rank.
    """
    from safetensors import SafetensorError, safe_open

    path = adapter / "adapter_model.safetensors"
    try:
        with safe_open(path, "np") as file:
            shapes = {WRAPPERS.sub("", name): file.get_slice(name).get_shape() for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot be read: {error}", where=f"{entry.where}, {path}", fix="give a whole adapter"
        ) from None
    for name, shape in shapes.items():
        up = shapes.get(name.replace(".lora_A.", ".lora_B."))
        if ".lora_A." in name and (up is None or not shape[0] or shape[0] != up[-1]):
            what = f"{name} is {shape}, and its B is {up or 'not there'}"
            raise UserError(what, where=f"{entry.where}, {path}", fix="give a whole adapter")
    if not any(".lora_" in name for name in shapes):
        raise UserError("it has no matrices of LoRA", where=f"{entry.where}, {path}", fix="give a whole adapter")


def beyond_plain(adapter: Path | None, *, known: str) -> list[str]:
    """Name the options of a saved adapter that a program does not read.

    Args:
        adapter: its folder; None has no options.
        known: the options of BEYOND_PLAIN that the program reads.
    """
    file = adapter and adapter / "adapter_config.json"
    theirs = json.loads(file.read_text(encoding="utf-8")) if file else {}
    return [key for key in BEYOND_PLAIN if theirs.get(key) and key not in known.split()]


def token_ids(indices: dict[str, list[int]] | list[int] | None) -> list[int]:
    """The ids in trainable_token_indices, of each module after the other."""
    return [number for ids in indices.values() for number in ids] if isinstance(indices, dict) else list(indices or [])


def _as_ours(key: str, value: Any) -> Any:
    """A value of adapter_config.json as a recipe has it: a list for one name, and nothing empty but a list or mapping."""
    if key == "lora_target_modules":
        return sorted(value or [])
    usual = TrainConfig.model_fields[key].default
    if not value:
        return usual
    return [value] if isinstance(usual, list) and isinstance(value, str | int) else value


def _adapted_names(adapter: Path) -> list[str]:
    """Read the names of the adapted layers from the weights, where the config has a pattern, as Unsloth's has."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", "np") as file:
        names = [re.match(r"(?:.*\.)?([^.]+)\.lora_[AB]\b", name) for name in file.keys()]
    return sorted({match[1] for match in names if match})
