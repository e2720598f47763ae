"""Optimizers from torch and bitsandbytes, schedules from transformers."""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from ..config.resolve import TrainConfig
from ..errors import UserError
from ..models.adapters import trainable
from ..models.reach import shape_of


def build_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable parameters; weight decay acts on matrices only."""
    groups = parameter_groups(model, config)
    if config.optim == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    adam = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if config.optim == "adamw_torch":
        return torch.optim.AdamW(groups, fused=True, **adam)
    from bitsandbytes import optim as bnb

    cls = {
        "adamw_8bit": bnb.AdamW8bit,
        "paged_adamw_8bit": bnb.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.PagedAdamW32bit,
    }
    return cls[config.optim](groups, **adam)


def parameter_groups(model: torch.nn.Module, config: TrainConfig) -> list[dict]:
    """The trainable parameters with their weight decay and `lr_ratio`, of their learning rate to the schedule's.

    LoRA+ (Hayou et al. 2024, arXiv 2402.12354) has matrices B learn faster than matrices A.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in trainable(model).items():
        decay = config.weight_decay if len(shape_of(parameter)) > 1 else 0.0
        ratio = config.loraplus_lr_ratio if ".lora_B." in name or ".lora_embedding_B." in name else None
        groups.setdefault((decay, ratio or 1.0), []).append(parameter)
    return [{"params": own, "weight_decay": decay, "lr_ratio": ratio} for (decay, ratio), own in groups.items()]


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
