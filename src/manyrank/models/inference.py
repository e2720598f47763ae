"""Load a model to use it: base, adapter or merged, in 16, 8 or 4 bits; with its tokenizer, ready to generate."""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from typing import Literal

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..chat_template.render import RenderOptions, render_options
from ..config.peft_config import token_ids
from ..config.resolve import TrainConfig, recipe_of
from ..errors import UserError
from ..runs.artifact import ModelSource, find
from ..topology import gpus
from ..topology.torch_gpus import check_torch
from . import coverage
from .generation import context_length
from .load import LoadPlan, base_model, load_config, resolve_name
from .new_tokens import grow_for
from .tokenizer import load_tokenizer

QUANTIZATION = {"4bit": "nf4", "8bit": "int8"}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def quiet() -> None:
    """No progress bars, and no notes of transformers and peft on what is not the user's to fix."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"(transformers|peft)\.")
    if not gpus.probe().gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed, once imported, writes to stdout


def load_model(
    name: str | ModelSource,
    *,
    quantization: Literal["4bit", "8bit"] | None = None,
    merge: bool = False,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """A model in evaluation mode, and its tokenizer with padding on the left.

    Args:
        name: what `artifact.find` knows: a run's folder, a checkpoint, an adapter, a model's folder or a hub name.
        quantization: of the base.
        merge: put the adapter into the weights; not with a quantised base, whose weights would lose it by rounding.
        dtype: bfloat16, float16 or float32; auto: bfloat16 where the machine computes in it, else float32.
        device: where to; None: the first GPU, or the CPU.

    Raises:
        UserError: it cannot be found or loaded, or an option does not go with it.
    """
    source = find(name) if isinstance(name, str) else name
    if merge and (quantization or not source.adapter):
        what = "merging into a quantised base" if quantization else "there is no adapter to merge"
        raise UserError(what, where=source.name, fix="leave merge out")
    for value, known in ((quantization or "4bit", QUANTIZATION), (dtype, ("auto", *DTYPES))):
        if value not in known:
            raise UserError(f"{value!r} is not known", where=source.name, fix=f"one of {', '.join(known)}")
    machine = gpus.probe()
    device = torch.device(device or ("cuda:0" if machine.gpus else "cpu"))
    check_torch(machine, machine.gpus[device.index or 0 :][:1] if device.type == "cuda" else ())
    if dtype == "auto":
        dtype = "bfloat16" if machine.has_bf16 else "float32"
    plan = LoadPlan(
        name=resolve_name(source.base),
        dtype=DTYPES[dtype],
        compute_dtype=DTYPES[dtype],
        quantization=QUANTIZATION.get(quantization),
        device_map={"": device},
        trust_remote_code=trust_remote_code,
    )
    model = base_model(plan)
    if plan.quantization:
        coverage.check_quantised(
            model,
            method=f"quantization {quantization}",
            where=f"quantization, of {source.base}",
            fix="leave quantization out",
            say=partial(print, file=sys.stderr, flush=True),
        )
    if source.adapter:
        model = with_adapter(model, source)
        model = model.merge_and_unload() if merge else model
    return model.eval(), tokenizer_of(source, chat_template=chat_template, trust_remote_code=trust_remote_code)


def load_stored(
    name: str | ModelSource, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """A model in host memory, its weights in the type that they are stored in, and its tokenizer.

    Raises:
        UserError: it cannot be found or loaded, or is stored in 8 or 4 bits.
    """
    source = find(name) if isinstance(name, str) else name
    base = resolve_name(source.base)
    if load_config(base, trust_remote_code=trust_remote_code).to_dict().get("quantization_config"):
        what = f"the weights of {source.base} are quantised"
        raise UserError(what, where=source.name, fix="name the same model in full precision with --base")
    device_map = {"": torch.device("cpu")}
    model = base_model(
        LoadPlan(base, "auto", torch.float32, device_map=device_map, trust_remote_code=trust_remote_code)
    )
    model = with_adapter(model, source) if source.adapter else model
    return model.eval(), tokenizer_of(source, trust_remote_code=trust_remote_code)


def with_adapter(model: PreTrainedModel, source: ModelSource) -> PeftModel:
    """The adapter on its base.

    Raises:
        UserError: the two do not fit, or the adapter is damaged.
    """
    if not any(source.adapter.glob("adapter_model.*")):
        fix = "give a whole adapter, as it was saved"
        raise UserError("the adapter has no weights: no adapter_model.safetensors", where=str(source.adapter), fix=fix)
    try:
        config = PeftConfig.from_pretrained(str(source.adapter))
        grow_for(model, token_ids(getattr(config, "trainable_token_indices", None)))
        return PeftModel.from_pretrained(model, str(source.adapter))
    except (SafetensorError, OSError, TypeError) as error:
        what = f"the adapter cannot be read: {str(error).splitlines()[0]}"
        raise UserError(what, where=str(source.adapter), fix="give a whole adapter, as it was saved") from None
    except (ValueError, RuntimeError, KeyError) as error:
        what = f"the adapter does not fit its base {source.base}: {str(error).splitlines()[0]}"
        raise UserError(what, where=str(source.adapter), fix="name the base that it was trained on") from None


def rendering_of(source: ModelSource) -> RenderOptions:
    """Return how conversations were rendered in the training: the template's variables, and what ends a turn."""
    recipe = recipe_of(source)
    return render_options(recipe) if recipe else RenderOptions()


def context_of(source: ModelSource, *, trust_remote_code: bool = False) -> int | None:
    """The most tokens that an artifact's base reads at once, where its config says so; loads no weights."""
    return context_length(load_config(resolve_name(source.base), trust_remote_code=trust_remote_code))


def tokenizer_of(
    source: ModelSource, *, chat_template: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of an artifact, which pads on the left.

    Checkpoints have none: theirs is that of their run, else the base's with the chat template of the run's recipe.
    """
    name = source.tokenizer
    recipe, tokens = None if source.own_tokenizer else recipe_of(source), {}
    if recipe:
        name = source.base if source.adapter else recipe.model_name_or_path
        chat_template = chat_template or recipe.chat_template
        tokens = {"add_tokens": recipe.add_tokens, "add_special_tokens": recipe.add_special_tokens}
    given = {"model_name_or_path": name, "data_path": "none", "chat_template": chat_template, **tokens}
    tokenizer = load_tokenizer(TrainConfig(**given, trust_remote_code=trust_remote_code))
    tokenizer.padding_side = "left"
    return tokenizer
