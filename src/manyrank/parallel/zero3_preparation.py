"""Let ZeRO-3 gather a decoder layer at once: layers as leaf modules, and sizes that follow from the loaded model.

DeepSpeed gathers module by module, and whole between steps are parameters below a threshold, of which accelerate makes
10 x hidden: just under an adapter's matrix. Of a decoder layer with LoRA on 7 projections these were 14 gathers in each
micro-batch; with leaf modules there are 2, one for the forward and one for the backward. A layer whose ranks take
different experts also needs it, else they wait for each other's gathers.

    stage3_param_persistence_threshold    the largest adapter matrix, so that adapters are gathered once a step, together
    stage3_prefetch_bucket_size           a layer: while one computes, the next one comes, and no third
    stage3_max_live_parameters            room for two layers, at least DeepSpeed's own 1e9

accelerate 1.15 fills in its own from `config.hidden_size`, which multimodal models have in their text_config. What a
user's own file says in numbers stands.

Weights are partitioned here too, from the parts that each rank has read (models/shards.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from transformers.integrations import unset_hf_deepspeed_config

from ..errors import UserError
from .fsdp_preparation import layers_apart

LIVE = 10**9  # elements
HOLDER = -1  # in place of a module's id, for parameters that no module may give back


def gather_by_layer(plugin: DeepSpeedPlugin, model: torch.nn.Module) -> None:
    """Mark the layers, and settle the sizes that the DeepSpeed config leaves open. Before the engine is made."""
    names = layers_apart(model)
    if names:
        _make_leaves(model, names)
    settings = plugin.deepspeed_config["zero_optimization"]
    for key, size in sizes(model, names).items():
        if settings.get(key) == "auto":
            settings[key] = size


@contextlib.contextmanager
def without_zero_init(accelerator: Accelerator) -> Iterator[None]:
    """Keep transformers from partitioning what it loads; rank 0 would send each weight to the others."""
    if accelerator.deepspeed_plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        accelerator.deepspeed_plugin.set_deepspeed_weakref()


def partition(plugin: DeepSpeedPlugin, model: torch.nn.Module) -> None:
    """Make a model's parameters those of ZeRO-3, one after the other; parts that ranks have read are not sent again."""
    if not any(hasattr(parameter, "part") for parameter in model.parameters()):
        return
    from deepspeed.runtime.zero.partition_parameters import Init, is_zero_param

    class FromParts(Init):
        # DeepSpeed 0.19.8 has no other way to partition without a broadcast from rank 0.
        def _convert_to_zero_parameters(self, param_list: Iterable[torch.nn.Parameter]) -> None:
            for parameter in param_list:
                part = vars(parameter).pop("part", None)
                if part is None:
                    super()._convert_to_zero_parameters([parameter])
                elif not is_zero_param(parameter):
                    dtype = self.dtype if parameter.requires_grad else part.dtype
                    parameter.data = torch.empty(parameter.shape, dtype=dtype, device=self.local_device)
                    self._convert_to_deepspeed_param(parameter)
                    parameter.partition()
                    parameter.ds_tensor.data[: part.numel()].copy_(part)

    zero = plugin.deepspeed_config["zero_optimization"]
    config = plugin.dschf.config | {"zero_optimization": {key: size for key, size in zero.items() if size != "auto"}}
    device = FromParts(module=model, config_dict_or_path=config).local_device
    for buffer in model.buffers():  # DeepSpeed moves those of models that it partitions itself
        buffer.data = buffer.data.to(device)


def _make_leaves(model: torch.nn.Module, names: list[str]) -> None:
    """Mark layers as leaf modules, and let their inputs have gradients.

    DeepSpeed 0.19.8 reduces the gradients of a leaf when that of its input is there (stage3.py, reduce_leaf_module_grads).
    Where no input has one, as behind frozen embeddings, torch calls that hook before the leaf's own backward.
    """
    from deepspeed.utils import set_z3_leaf_modules

    for layer in set_z3_leaf_modules(model, names):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            layer.register_forward_pre_hook(_check_input)
    model.enable_input_require_grads()


def _check_input(layer: torch.nn.Module, inputs: tuple) -> None:
    """Refuse a layer whose gradients DeepSpeed would reduce too early.

    Raises:
        UserError: no positional input has a gradient.
    """
    if torch.is_grad_enabled() and not any(torch.is_tensor(given) and given.requires_grad for given in inputs):
        what = f"{type(layer).__name__} has no input with a gradient, without which ZeRO-3 loses its own"
        raise UserError(what, where="strategy", fix="use --strategy fsdp")


def sizes(model: torch.nn.Module, layers: list[str]) -> dict[str, int]:
    """The sizes of ZeRO-3 for a model, in elements.

    Args:
        layers: names of the classes that are gathered as a whole.
    """
    hidden = model.config.get_text_config().hidden_size
    adapters = [_elements(p) for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name]
    whole = max([10 * hidden, *adapters])
    modules = [module for module in model.modules() if type(module).__name__ in layers]
    layer = max((_gathered(module, whole) for module in modules), default=int(0.9 * hidden**2))
    return {
        "reduce_bucket_size": hidden**2,
        "stage3_prefetch_bucket_size": layer,
        "stage3_param_persistence_threshold": whole,
        "stage3_max_live_parameters": max(LIVE, 2 * layer),
    }


def _gathered(module: torch.nn.Module, whole: int) -> int:
    """Elements of a module's parameters that are not kept whole."""
    return sum(size for size in map(_elements, module.parameters()) if size > whole)


def _elements(parameter: torch.Tensor) -> int:
    """The elements of a parameter, also of one that is in shards already."""
    return getattr(parameter, "ds_numel", parameter.numel())


@contextlib.contextmanager
def gathered_together(optimizer: object) -> Iterator[None]:
    """Around a step: gather what is kept whole in one collective of each type.

    DeepSpeed 0.19.8 gathers each parameter by itself then (stage3.py, _post_step; partition_parameters.py,
    _allgather_params_coalesced). It can go when that is one collective.
    """
    kept = getattr(optimizer, "persistent_parameters", [])
    if not kept:
        yield
        return
    optimizer.persistent_parameters = []
    try:
        yield
    finally:
        optimizer.persistent_parameters = kept
    _gather(kept)


@contextlib.contextmanager
def held_whole(model: torch.nn.Module) -> Iterator[None]:
    """Gather a model's parameters, layer by layer, and keep the modules from giving them back. All ranks together."""
    shards = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_status")]
    for module in [*(layer for layer in model.modules() if getattr(layer, "_z3_leaf", False)), model]:
        _gather([parameter for parameter in module.parameters() if hasattr(parameter, "ds_status")])
    for parameter in shards:
        parameter.ds_active_sub_modules.add(HOLDER)
    try:
        yield
    finally:
        for parameter in shards:
            parameter.ds_active_sub_modules.discard(HOLDER)
        if shards:
            shards[0].partition(shards)


def _gather(parameters: list) -> None:
    missing = [parameter for parameter in parameters if parameter.ds_status.name == "NOT_AVAILABLE"]
    if missing:
        missing[0].all_gather_coalesced(missing).wait()
