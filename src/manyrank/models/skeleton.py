"""A model without weights, on the meta device: what a recipe names and the model has not is refused before anything is loaded."""

from __future__ import annotations

import warnings

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from ..config.peft_config import names_modules
from ..config.resolve import TrainConfig
from ..errors import UserError
from ..runs import artifact
from . import frozen_adapter
from .adapters import load_adapter, with_lora
from .freezing import freeze
from .load import load_config, resolve_name, silent
from .new_tokens import new_tokens
from .reach import reach
from .tokenizer import load_tokenizer

logger = logging.get_logger(__name__)


def check_trained(config: TrainConfig) -> None:
    """Put a recipe's adapters on the skeleton of its model, and those that it continues from, or freeze parts, as the run does.

    Raises:
        UserError: adapters do not fit, a name or pattern fits nothing, or nothing is left to be trained.
    """
    saved = artifact.find(config.start_model).adapter if config.start_model else None
    if not (saved or names_modules(config)):
        return
    name = resolve_name(config.model_name_or_path)
    own = load_config(name, trust_remote_code=config.trust_remote_code)
    if (config.add_tokens or config.add_special_tokens) and (new := new_tokens(load_tokenizer(config), config)).ids:
        text = own.get_text_config()
        text.vocab_size = max(text.vocab_size, max(new.ids) + 1)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, which the run repeats
            model = AutoModelForCausalLM.from_config(own, trust_remote_code=config.trust_remote_code)
            if config.uses_lora:
                model = with_lora(model, config, reach(model), silent)
            else:
                freeze(model, config, None, silent)
        if saved and config.new_adapter:
            frozen_adapter.put_below(model, frozen_adapter.saved(model, saved))
        elif saved:
            load_adapter(model, saved)
    except UserError:
        raise
    except Exception as error:  # of any kind: the model's own code, which may need weights
        logger.info("the adapters are not tried on a skeleton: %s: %s", type(error).__name__, error)
