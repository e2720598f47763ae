"""Tokens that a base does not have: in the tokenizer, and as rows of its embeddings and lm_head.

    add_tokens, add_special_tokens --> ids behind the tokenizer's own --> rows, each the mean of all others

A base often has more rows than its tokenizer has tokens; where it has not, rows are added while it is read, so that it may
be loaded in shards. Under adapters the rows alone are trained and saved (`trainable_token_indices`).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from ..config.resolve import TrainConfig
from .shards import is_read


@dataclass(frozen=True)
class NewTokens:
    """Ids of tokens that a base has never seen.

    Attributes:
        ids: of the new tokens, in order. known: how many tokens the tokenizer had before.
    """

    ids: tuple[int, ...] = ()
    known: int = 0

    def grown(self, tensor: torch.Tensor, name: str = "weight") -> torch.Tensor:
        """A matrix (tokens, width), or a bias, with rows for the new tokens: the mean of those of the others; 0 in a bias."""
        if not self.ids:
            return tensor
        more = max(0, max(self.ids) + 1 - len(tensor))
        data = torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])])
        data[list(self.ids)] = tensor[: self.known].float().mean(0).to(data.dtype) if name == "weight" else 0
        return data


NONE = NewTokens()


def add_new_tokens(tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> None:
    """Add the recipe's tokens to a tokenizer; they get the last ids."""
    tokenizer.add_tokens(list(config.add_tokens))
    special = [AddedToken(token, special=True, normalized=False) for token in config.add_special_tokens]
    tokenizer.add_tokens(special, special_tokens=True)


def new_tokens(tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> NewTokens:
    """Find the recipe's tokens in a tokenizer that `add_new_tokens` has given them."""
    ids = tokenizer.convert_tokens_to_ids([*config.add_tokens, *config.add_special_tokens])
    return NewTokens(tuple(sorted(set(ids))), known=len(tokenizer) - len(set(ids)))


@contextlib.contextmanager
def growing(size: int, new: NewTokens) -> Iterator[None]:
    """Add the rows of new tokens to the embeddings and lm_head that transformers reads.

    Args:
        size: rows that they have in the files.
    """
    grown = max(size, *(number + 1 for number in new.ids))
    whole: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def note(parent: torch.nn.Module, name: str, child: torch.nn.Module | None) -> None:
        rows = getattr(child, "num_embeddings", getattr(child, "out_features", None))
        if child is not None and isinstance(parent, PreTrainedModel) and rows == size:
            whole.add(child)

    def grow(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> torch.nn.Parameter | None:
        if module not in whole or not is_read(parameter) or len(parameter) != size:
            return None
        data = new.grown(parameter.data, name)
        if isinstance(module, torch.nn.Embedding):
            module.num_embeddings = grown
        elif name == "weight":
            module.out_features = grown
        result = torch.nn.Parameter(data, requires_grad=parameter.requires_grad)
        result._is_hf_initialized = True
        return result

    hooks = [register_module_module_registration_hook(note), register_module_parameter_registration_hook(grow)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def grow_for(model: PreTrainedModel, ids: list[int]) -> None:
    """Give a whole model the rows that an adapter's tokens need; the adapter has their values."""
    needed = max(ids, default=-1) + 1
    if needed > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(needed, mean_resizing=False)
