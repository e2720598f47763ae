"""Work around accelerate 1.15's preparation of models for FSDP2: decide here from the loaded model.

`name_layers`: transformers' `_no_split_modules` names the layers to shard apart, also those of parts that a model does not
have (the vision layers of Gemma 3 and Qwen 3.5 beside a text model); accelerate's `set_auto_wrap_policy` fails at the
first name that it does not find. It can go when that skips such names.

tests/parallel/test_fsdp_preparation.py fails on that day.

`plain_embeddings`: peft 0.21's wrapper of trained tokens gives a weight that it computes, so accelerate does not see that the
embeddings and lm_head are tied, and shards them twice. It can go when accelerate asks the config.

`kept_in_bf16`: accelerate casts what is trained to float32 wherever it computes in 16 bits. It can go when that is a choice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from ..models.adapters import trainable

logger = logging.get_logger(__name__)


def name_layers(plugin: FullyShardedDataParallelPlugin, model: torch.nn.Module) -> None:
    """Tell accelerate the classes of layers to shard apart, unless the user has."""
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = layers_apart(model)


@contextlib.contextmanager
def plain_embeddings(model: torch.nn.Module) -> Iterator[None]:
    """Let modules with trained tokens show the weight of the base."""
    wrappers = [module for module in model.modules() if isinstance(module, TrainableTokensWrapper)]
    for wrapper in wrappers:
        AuxiliaryTrainingWrapper.enable_adapters(wrapper, False)  # the flag alone, not what is trained
    try:
        yield
    finally:
        for wrapper in wrappers:
            AuxiliaryTrainingWrapper.enable_adapters(wrapper, True)


@contextlib.contextmanager
def kept_in_bf16(accelerator: Accelerator, model: torch.nn.Module) -> Iterator[None]:
    """Leave the trained parameters in bf16 where they are; FSDP2's own policy says what to compute in."""
    state, before = accelerator.state, accelerator.mixed_precision
    if all(parameter.dtype is torch.bfloat16 for parameter in trainable(model).values()):
        state._mixed_precision = "no"
    try:
        yield
    finally:
        state._mixed_precision = before


def layers_apart(model: torch.nn.Module) -> list[str]:
    """The classes that `_no_split_modules` names and the model has; where there are none, those that are checkpointed."""
    present = {type(module).__name__ for module in model.modules()}
    if named := sorted(present & set(getattr(model, "_no_split_modules", None) or ())):
        return named
    layers = {type(module).__name__ for module in model.modules() if isinstance(module, GradientCheckpointingLayer)}
    if not layers:
        logger.warning("the model's layers are not known: FSDP gathers the whole model at once")
    return sorted(layers)
