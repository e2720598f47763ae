"""Work around accelerate 1.15's preparation of models for FSDP2: decide here from the loaded model.

`name_layers`: transformers' `_no_split_modules` names the layers to shard apart, also those of parts that a model does not
have (the vision layers of Gemma 3 and Qwen 3.5 beside a text model); accelerate's `set_auto_wrap_policy` fails at the
first name that it does not find. It can go when that skips such names.

`buffers_kept_apart`: `fsdp2_load_full_state_dict` takes each entry of the state dict for a DTensor, and buffers are none
(https://github.com/huggingface/accelerate/issues/3898). Buffers that are in no state dict accelerate leaves as each rank
has them. It can go when that issue is closed.

tests/parallel/test_fsdp_preparation.py fails on those days.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast_object_list
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

logger = logging.get_logger(__name__)


def name_layers(plugin: FullyShardedDataParallelPlugin, model: torch.nn.Module) -> None:
    """Tell accelerate the classes of layers to shard apart, unless the user has."""
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = layers_apart(model)


def layers_apart(model: torch.nn.Module) -> list[str]:
    """The classes that `_no_split_modules` names and the model has; where there are none, those that are checkpointed."""
    present = {type(module).__name__ for module in model.modules()}
    if named := sorted(present & set(getattr(model, "_no_split_modules", None) or ())):
        return named
    layers = {type(module).__name__ for module in model.modules() if isinstance(module, GradientCheckpointingLayer)}
    if not layers:
        logger.warning("the model's layers are not known: FSDP gathers the whole model at once")
    return sorted(layers)


@contextlib.contextmanager
def buffers_kept_apart(model: torch.nn.Module) -> Iterator[None]:
    """Keep buffers out of state dicts. Afterwards the same are in, and each rank has those of rank 0.

    A rank that made a skeleton has buffers as the model's class makes them, and not those of the weights' files.
    """
    kept = [
        (module, name)
        for module in model.modules()
        for name, _ in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    ]
    for module, name in kept:
        module._non_persistent_buffers_set.add(name)
    try:
        yield
    finally:
        for module, name in kept:
            module._non_persistent_buffers_set.discard(name)
    values = [getattr(module, name).cpu() for module, name in kept]
    if values:  # a list of none is an error
        broadcast_object_list(values)
    for (module, name), value in zip(kept, values):
        module._buffers[name] = value.to(module._buffers[name].device)
