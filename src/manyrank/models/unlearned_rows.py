"""Tokens that a base has never learned: their rows of the embedding or lm_head are as they were before its training.

    row near 0, near the mean of all rows, or near that of another token that nothing uses --> never learned

What counts as near is measured by how far ordinary rows lie from their mean (compare Land and Bartolo 2024, arXiv
2405.05417). A few hundred rows are read. Adapters on layers cannot make up for such a row: a model that should end its
turns with the token does not end them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from safetensors import safe_open

from ..errors import UserError
from .adapter_start import files_of, weight_in_memory

ORDINARY, UNUSED = 512, 64  # rows that are read
NEAR = 0.1  # of the usual distance of a row from the mean
Rows = Callable[[str, Sequence[int]], torch.Tensor | None]  # of a matrix of the base, by its name


def rows_of(name: str, model: torch.nn.Module | None) -> Rows:
    """Return what reads single rows of a base in float32, from its files or from a model in memory; None where it cannot."""
    files: dict[str, Path] = {}

    def read(key: str, ids: Sequence[int]) -> torch.Tensor | None:
        if model is not None:
            with contextlib.suppress(UserError):  # quantised
                return weight_in_memory(model, key)[list(ids)].float()
            return None
        files.update(files or dict(files_of(name)))
        if key not in files:
            return None
        with safe_open(files[key], "pt") as file:
            matrix = file.get_slice(key)
            inside = [matrix[number : number + 1] for number in ids if number < matrix.get_shape()[0]]
        return torch.cat(inside).float() if inside else None

    return read


def vocabulary_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The embedding and, where it has weights of its own, lm_head, by their names in the base."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    names = {id(module): name.removeprefix("base_model.model.") for name, module in model.named_modules()}
    return {names[id(module)]: module for module in ends[: 1 if tied else 2] if id(module) in names}


def find_unlearned(
    model: torch.nn.Module, tokens: Collection[int], added: Collection[int], size: int, rows: Rows
) -> list[int]:
    """Find the tokens of which the base has never learned a row, where this run does not train it.

    Args:
        model: with its adapters.
        tokens: ids that the data has, of added tokens. added: all such ids of the tokenizer, which has `size` tokens.
    """
    unused = sorted({*added} - {*tokens})[:UNUSED]
    ordinary = sorted({number * size // ORDINARY for number in range(ORDINARY)} - {*added})
    result: set[int] = set()
    for name, module in vocabulary_modules(model).items():
        key, frozen = f"{name}.weight", sorted({*tokens} - _trained(module, tokens))
        own, usual, others = (rows(key, ids) if ids else None for ids in (frozen, ordinary, unused))
        if own is not None and usual is not None and len(own) == len(frozen):
            result.update(number for number, bare in zip(frozen, _are_bare(own, usual, others)) if bare)
    return sorted(result)


def _trained(module: torch.nn.Module, tokens: Collection[int]) -> set[int]:
    """The tokens whose rows of an embedding or lm_head are trained."""
    if isinstance(module, ModulesToSaveWrapper | LoraLayer):
        return {*tokens}
    return {*module.token_adapter.token_indices["default"]} if isinstance(module, TrainableTokensWrapper) else set()


def _are_bare(own: torch.Tensor, usual: torch.Tensor, others: torch.Tensor | None) -> list[bool]:
    """Return of each row of `own` whether it is near 0, the mean of usual rows, or another row of a token that is added."""
    mean = usual.mean(0)
    near = NEAR * (usual - mean).norm(dim=1).median()
    references = torch.cat([mean[None], torch.zeros_like(mean)[None], *([] if others is None else [others])])
    twins = torch.cdist(own, own).fill_diagonal_(torch.inf)
    return (torch.cat([torch.cdist(own, references), twins], 1).amin(1) <= near).tolist()
