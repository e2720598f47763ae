"""An adapter into the weights of its base, one module at a time.

Each matrix is widened to float32, gets what peft computes for its adapter (so alpha and rank patterns, rslora, DoRA,
experts and trained embeddings are peft's), and is rounded once, to the type that is asked for. Beside the model there
is one module in float32.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...chat_template.render import RenderOptions, stop_ids
from ...chat_template.types import BadRow
from ...errors import UserError


def merged(model: PeftModel, own: torch.dtype, dtype: torch.dtype) -> PreTrainedModel:
    """The base with the adapter in its weights, what was in `own` now in `dtype`. The model is used up.

    Args:
        own: what the base is stored in (see `stored_in`). Tensors that it keeps in another type, such as float32 parts
            of a bfloat16 model, stay as they are.

    Raises:
        UserError: this kind of adapter is none that weights can take, or it has values that are no numbers.
    """
    _untie(model)
    try:
        for module in list(model.modules()):
            if isinstance(module, BaseTunerLayer) and hasattr(module, "merge"):
                _merge_one(module, own, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that all is merged already
            base = model.merge_and_unload()
    except (ValueError, RuntimeError, AttributeError) as error:
        what = f"the adapter cannot be merged: {str(error).splitlines()[0]}"
        raise UserError(what, where="the adapter", fix="use it beside its base, as peft or vLLM do") from None
    return in_dtype(base, own, dtype)


def stored_in(model: torch.nn.Module) -> torch.dtype:
    """The type of most of a model's numbers."""
    counts: dict[torch.dtype, int] = {}
    for tensor in model.parameters():
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=counts.get)


def in_dtype(model: PreTrainedModel, own: torch.dtype, dtype: torch.dtype) -> PreTrainedModel:
    """The model with everything that is in `own` cast, tensor by tensor.

    Raises:
        UserError: a value is too large for the type.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dtype == own and own != dtype:
            tensor.data = tensor.data.to(dtype)
        finite = not isinstance(tensor, torch.nn.Parameter) or torch.isfinite(tensor).all()
        if not finite:
            _not_finite(name, dtype)
    model.config.dtype = dtype
    return model


def _merge_one(module: BaseTunerLayer, own: torch.dtype, dtype: torch.dtype) -> None:
    base = module.get_base_layer()
    tensors = [(tensor, tensor.dtype) for tensor in base.parameters() if tensor.is_floating_point()]
    for tensor, _ in tensors:
        tensor.data = tensor.data.float()
    module.merge(safe_merge=True)
    for tensor, before in tensors:
        tensor.data = tensor.data.to(dtype if before == own else before)


def _untie(model: PeftModel) -> None:
    """Give the head weights of its own where an adapter changes either the embedding or the head of a tied model."""
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    adapted = [isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in (embedding, head)]
    if head is None or not any(adapted):
        return
    layers = [_innermost(module) for module in (embedding, head)]
    if layers[0].weight.data_ptr() == layers[1].weight.data_ptr():
        layers[1].weight = torch.nn.Parameter(layers[1].weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False


def _innermost(module: torch.nn.Module) -> torch.nn.Module:
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _not_finite(name: str, dtype: torch.dtype) -> None:
    what = f"{name} has values that {str(dtype).removeprefix('torch.')} cannot hold, or that are no numbers"
    raise UserError(what, where="--dtype", fix="choose bfloat16 or float32; if that fails too, the adapter is broken")


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    max_shard_size: str,
    rendering: RenderOptions,
) -> None:
    """Write all that transformers needs: weights, config, tokenizer, chat template, generation config.

    The generation config stops at the end of the template's turns, too.

    Raises:
        OSError: it cannot be written.
    """
    generation = model.generation_config
    stops = generation.eos_token_id if generation.eos_token_id is not None else []
    try:
        own = stop_ids(tokenizer, rendering)
    except BadRow:  # a model without a chat template
        own = {tokenizer.eos_token_id}
    own = own.union(stops if isinstance(stops, list) else [stops]) - {None}  # some tokenizers have no end of text
    generation.eos_token_id = sorted(own) or None
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    if not generation.do_sample:  # transformers refuses to write what only sampling needs
        generation.temperature = generation.top_p = generation.top_k = None
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(f"cannot write the weights: {error}") from None
