"""A model without weights, on the meta device: what a recipe's adapters do not fit is refused before anything is loaded."""

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
from .load import load_config, resolve_name, silent
from .reach import reach

logger = logging.get_logger(__name__)


def check_adapters(config: TrainConfig) -> None:
    """Put a recipe's adapters on the skeleton of its model, and those that it continues from, as the run does.

    Raises:
        UserError: they do not fit, or a name or pattern fits nothing.
    """
    saved = artifact.find(config.start_model).adapter if config.start_model else None
    if not (saved or names_modules(config)):
        return
    name = resolve_name(config.model_name_or_path)
    own = load_config(name, trust_remote_code=config.trust_remote_code)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, which the run repeats
            model = AutoModelForCausalLM.from_config(own, trust_remote_code=config.trust_remote_code)
            adapted = with_lora(model, config, reach(model), silent)
        if saved and config.new_adapter:
            frozen_adapter.put_below(adapted, frozen_adapter.saved(adapted, saved))
        elif saved:
            load_adapter(adapted, saved)
    except UserError:
        raise
    except Exception as error:  # of any kind: the model's own code, which may need weights
        logger.info("the adapters are not tried on a skeleton: %s: %s", type(error).__name__, error)
