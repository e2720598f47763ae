"""Logits in float32 from weights that rest in 16 bits, to compare two models by more than rounding.

A layer's weights are cast when it runs and put back after it: the memory is that of the model and of one layer in
float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_map
from transformers import PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from ...data.files import file_rows
from ...data.formats import detect, to_sample
from ...project_files import asset

SEQUENCES, LENGTH = 3, 32  # tokens that are compared: enough for every layer to matter, little beside the weights


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest absolute difference of two tensors; infinite where one has a value that is no number."""
    largest = (one - other).abs().max().item()
    return largest if largest == largest else float("inf")


def sample_ids(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """SEQUENCES x LENGTH tokens of conversations from the project's sample, by the tokenizer's template if it has one."""
    ids: list[int] = []
    for row in file_rows(asset("data", "sample.jsonl")):
        messages = to_sample(row.readable(), *detect(row.readable(), where=row.place)).messages
        plain = "\n".join(message["content"] for message in messages)
        text = tokenizer.apply_chat_template(messages, tokenize=False) if tokenizer.chat_template else plain
        ids += tokenizer.encode(text, add_special_tokens=False)
        if len(ids) >= SEQUENCES * LENGTH:
            break
    return torch.tensor(ids[: SEQUENCES * LENGTH]).view(SEQUENCES, LENGTH)


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The model's logits in float32, batch x length x vocabulary."""
    model.eval()
    with torch.no_grad(), in_float32(model):
        return model(input_ids=ids, use_cache=False).logits.float()


@contextmanager
def in_float32(model: torch.nn.Module) -> Iterator[None]:
    """Every layer computes in float32, whatever its weights rest in."""
    handles, originals = [], {}

    def widen(module, args, kwargs):
        originals[module] = [(tensor, tensor.data) for tensor in held[module] if _narrow(tensor)]
        for tensor, narrow in originals[module]:
            tensor.data = narrow.float()
        return tree_map(_wide, (args, kwargs))

    def put_back(module, args, result):
        for tensor, narrow in originals.pop(module, ()):
            tensor.data = narrow

    held = dict(_parts(model))
    try:
        for module in held:
            handles.append(module.register_forward_pre_hook(widen, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(put_back, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, list[torch.Tensor]]]:
    """Yield what is cast at once, and its tensors: a whole layer, and outside of layers each module that has some."""
    inside: set[torch.nn.Module] = set()
    for module in model.modules():
        if module in inside:
            continue
        whole = isinstance(module, GradientCheckpointingLayer)
        if whole:
            inside.update(module.modules())
        tensors = [*module.parameters(recurse=whole), *module.buffers(recurse=whole)]
        if tensors:
            yield module, tensors


def _narrow(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.element_size() < 4


def _wide(value: object) -> object:
    return value.float() if _narrow(value) else value
