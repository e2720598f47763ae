"""Tables of positions: how many a model has, as its modules show, and rows that are longer.

    nn.Embedding(1024, 768) beside the tokens'      a learned table (GPT-2, OPT: with an offset of 2)
    buffer (2048, 64) of an attention layer         a computed one that is looked up by position (GPT-J)
    neither                                         computed for any length: rope, ALiBi

A position beyond a table is an index out of range, on a GPU in the middle of a kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from accelerate import init_empty_weights
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM
from transformers.integrations import unset_hf_deepspeed_config

from ..config.resolve import TrainConfig
from ..errors import UserError
from .generation import context_length
from .load import load_config, loading, resolve_name

OFFSETS = 16  # rows of a table that stand for no position; OPT and BART have two


def check_lengths(config: TrainConfig, lengths: Sequence[int], own: torch.nn.Module | None = None) -> None:
    """Refuse rows that are longer than the model's table of positions; loads no weights.

    Args:
        lengths: of the longest rows.
        own: a model in memory, in place of the recipe's.

    Raises:
        UserError: a row is longer.
    """
    name, longest = resolve_name(config.model_name_or_path), max(lengths)
    if own is not None:
        positions = table_of(own)
    else:
        shape = load_config(name, trust_remote_code=config.trust_remote_code)
        known = context_length(shape)
        if known is None or longest <= known:  # no need to look
            return
        with loading(name), _apart():
            model = AutoModelForCausalLM.from_config(shape, trust_remote_code=config.trust_remote_code)
        positions = table_of(model)
    if positions is not None and longest > positions:
        what = f"rows have up to {longest:,} tokens, and the model has a table of {positions:,} positions"
        fix = f"--max_length {positions}, with overlong: truncate, split or drop; or a model with more positions"
        raise UserError(what, where=f"max_length {config.max_length}, {name}", fix=fix)


def table_of(model: torch.nn.Module) -> int | None:
    """The positions of a model's table; None where it has none, or its config does not say how many it has."""
    positions = context_length(model.config)
    if positions is None:
        return None
    sizes = {*_embeddings(model), *_looked_up(model)}
    return positions if any(0 <= size - positions <= OFFSETS for size in sizes) else None


def _embeddings(model: torch.nn.Module) -> Iterator[int]:
    """The sizes of all embeddings but those of tokens."""
    tokens = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings != tokens.num_embeddings:
            yield module.num_embeddings


def _looked_up(model: torch.nn.Module) -> Iterator[int]:
    """The lengths of matrices that are no parameters, of modules with a part of their own that could not extend them."""
    for module in model.modules():
        held = [*module.buffers(recurse=False), *(x for x in vars(module).values() if isinstance(x, torch.Tensor))]
        if any(True for _ in module.children()):
            yield from (tensor.shape[0] for tensor in held if tensor.ndim == 2)


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Make modules without memory, and without the shards that transformers makes of every model under ZeRO-3."""
    plugin = AcceleratorState().deepspeed_plugin if AcceleratorState._shared_state else None
    unset_hf_deepspeed_config()
    try:
        with init_empty_weights(include_buffers=True):
            yield
    finally:
        if plugin:
            plugin.set_deepspeed_weakref()
