"""Optimizers from torch and bitsandbytes, schedules from transformers."""

from __future__ import annotations

import math
import re

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.optimization import Adafactor

from ..config.resolve import TrainConfig
from ..errors import UserError
from ..models.adapters import trainable
from ..models.reach import shape_of
from .own_optimizers import Groups, Lion, Muon

Named = dict[str, torch.nn.Parameter]


def build_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable parameters; weight decay acts on matrices only.

    Raises:
        UserError: it does not take these optim_args.
    """
    try:
        return _build(model, config)
    except (TypeError, ValueError) as error:
        what = f"optim {config.optim} takes no such arguments: {error}"
        raise UserError(what, where="optim_args", fix="give other values") from None


def _build(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    parameters, rate = trainable(model), {"lr": config.learning_rate}
    betas = rate | {"betas": (config.adam_beta1, config.adam_beta2)}
    adam = betas | {"eps": config.adam_epsilon}
    groups, options = _groups(parameters, config), config.optim_args
    match config.optim:
        case "sgd":
            return torch.optim.SGD(groups, **rate, **options)
        case "adamw_torch":
            return torch.optim.AdamW(groups, fused=True, **adam, **options)
        case "lion_32bit":
            return Lion(groups, **betas, **options)
        case "adafactor":
            usual = {"scale_parameter": False, "relative_step": False, "warmup_init": False}  # the rate is the recipe's
            return Adafactor(groups, **rate, **usual | options)
        case "muon":
            return _muon(model, parameters, config, adam)
    from bitsandbytes import optim as bnb

    kinds = {
        "adamw_8bit": bnb.AdamW8bit,
        "paged_adamw_8bit": bnb.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.PagedAdamW32bit,
        "lion_8bit": bnb.Lion8bit,
        "paged_lion_8bit": bnb.PagedLion8bit,
        "paged_lion_32bit": bnb.PagedLion32bit,
    }
    return kinds[config.optim](groups, **(betas if "lion" in config.optim else adam), **options)


def _groups(parameters: Named, config: TrainConfig) -> Groups:
    """The parameters with their weight decay and `lr_ratio`, of their learning rate to the schedule's.

    LoRA+ (Hayou et al. 2024, arXiv 2402.12354) has matrices B learn faster than matrices A.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = config.weight_decay if len(shape_of(parameter)) > 1 else 0.0
        ratio = config.loraplus_lr_ratio if re.search(r"\.lora_(embedding_)?B\.", name) else None
        groups.setdefault((decay, ratio or 1.0), []).append(parameter)
    return [{"params": own, "weight_decay": decay, "lr_ratio": ratio} for (decay, ratio), own in groups.items()]


def _muon(model: torch.nn.Module, parameters: Named, config: TrainConfig, adam: dict) -> Muon:
    """Muon over the matrices of layers; embeddings, lm_head, stacked experts and vectors are AdamW's."""
    ends = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    ends += [getattr(model, "get_output_embeddings", lambda: None)()]
    outside = {id(getattr(module, "weight", None)) for module in ends}
    matrices = {name: p for name, p in parameters.items() if len(shape_of(p)) == 2 and id(p) not in outside}
    rest = {name: p for name, p in parameters.items() if name not in matrices}
    # A matrix is updated by as much as AdamW would, so that its learning rates hold (Liu et al. 2025, arXiv 2502.16982).
    muon = {"lr": config.learning_rate, "adjust_lr_fn": "match_rms_adamw", **config.optim_args}
    return Muon(_groups(matrices, config), _groups(rest, config), muon=muon, adam={**adam, "fused": True})


def build_schedule(config: TrainConfig, total_steps: int) -> LambdaLR:
    """The learning rate over steps, as a schedule of its own.

    It drives a stand-in parameter and the trainer copies its rate into the real optimizer. So it needs no place in a
    checkpoint (the step says everything), and DeepSpeed, which swaps the optimizer, cannot part it from its optimizer.
    """
    stand_in = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=config.learning_rate)
    warmup, options = count_steps(config.warmup_steps, total_steps), dict(config.lr_scheduler_kwargs)
    if config.lr_scheduler_type == "warmup_stable_decay":
        options["num_decay_steps"] = count_steps(options["num_decay_steps"], total_steps)
    try:
        return get_scheduler(config.lr_scheduler_type, stand_in, warmup, total_steps, options)
    except (TypeError, ValueError) as error:
        what = f"the schedule {config.lr_scheduler_type} takes no such arguments: {error}"
        raise UserError(what, where="lr_scheduler_kwargs", fix="see transformers.get_scheduler") from None


def count_steps(value: float, total_steps: int) -> int:
    """Steps of a number of steps, or of a share of the run's, which is rounded up as transformers does."""
    return math.ceil(value * total_steps) if value < 1 else int(value)


def advance(schedule: LambdaLR, steps: int = 1) -> None:
    """Move the learning rate on by some optimizer steps."""
    for _ in range(steps):
        schedule.optimizer.step()  # the stand-in has no gradient; torch warns if it never steps
        schedule.step()


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    return config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * steps_per_epoch)
