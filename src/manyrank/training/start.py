"""The start of a training in words, printed once before the first step.

model          Qwen/Qwen2.5-7B: 7.66 B parameters, 40.4 M (0.53%) trained
method         qlora, rank 16, alpha 32, on all-linear; bf16
training data  1,204 examples (messages), 612,200 tokens, 41% supervised
strategy       fsdp, 8 processes; packing: step; 1.2% between the longest rank and the mean
batch          64 examples to a step: at most micro-batch 4 x accumulation 2 x world 8
steps          57, 3 epochs; learning rate 0.0002, cosine, warmup 10
memory         planned 21.4 of 80 GiB a GPU, 4 of 28 layers recomputed
folder         output/my: a checkpoint every 57 steps and at the end, the newest 3 kept
"""

from __future__ import annotations

import math

from ..config.schema import TrainConfig
from ..parallel.engine import StrategyInfo
from ..plan import memory
from ..plan.memory import GiB
from ..plan.planned_run import PlannedRun
from ..plan.view import count
from ..topology.precision import Precision
from .trainer import Trainer

WIDTH = 15  # of a line's name


def describe_start(trainer: Trainer, facts: StrategyInfo, planned: PlannedRun | None) -> str:
    """Describe a run that is ready: one line for each of model, method, data, strategy, batch, steps, memory and folder."""
    config, evaluation = trainer.config, trainer.eval_loader
    share = facts.trained_parameters / facts.parameters
    lines = {
        "model": f"{trainer.task.model_name}: {count(facts.parameters)} parameters, "
        f"{count(facts.trained_parameters)} ({share:.2%}) trained",
        "method": _method(config, facts),
        "training data": trainer.loader.examples.describe(),
        "validation": f"{evaluation.examples.describe()}; every {trainer.args.eval_steps:.0f} steps"
        if evaluation
        else "",
        "strategy": "; ".join(filter(None, [_strategy(facts, planned), trainer.task.describe(trainer.loader)])),
        "batch": _batch(config, facts.world_size),
        "steps": _steps(trainer),
        "memory": _memory(planned) if planned and planned.gpu else "",
        "folder": _folder(trainer),
    }
    return "\n".join(f"{name:<{WIDTH}}{text}" for name, text in lines.items() if text)


def _method(config: TrainConfig, facts: StrategyInfo) -> str:
    targets = config.lora_target_modules
    targets = targets if isinstance(targets, str) else ", ".join(targets)
    adapters = f", rank {config.lora_r}, alpha {config.lora_alpha:g}, on {targets}" if config.uses_lora else ""
    options = {key: value for key, value in config.method_options.items() if key != "adapter"}
    more = "".join(
        f", {key} {value}" if isinstance(value, str | float) else f", {key}" for key, value in options.items()
    )
    return f"{config.method}{adapters}{more}; {Precision(facts.precision).label}"


def _strategy(facts: StrategyInfo, planned: PlannedRun | None) -> str:
    name = planned.strategy.name if planned else facts.distributed_type
    return f"{name}, {facts.world_size} process{'es' * (facts.world_size != 1)}"


def _batch(config: TrainConfig, world: int) -> str:
    batch, micro = config.batch(world), config.micro_batch
    unit = "completions" if config.is_grpo else "packs" if config.packing == "dataset" else "examples"
    accumulation = math.ceil(batch / (micro * world))
    most = "" if micro * accumulation * world == batch else "at most "
    return f"{batch} {unit} to a step: {most}micro-batch {micro} x accumulation {accumulation} x world {world}"


def _steps(trainer: Trainer) -> str:
    config, loader = trainer.config, trainer.loader
    epochs = trainer.total_steps / loader.steps_per_epoch * loader.examples.report.needed
    warmup = f", warmup {config.warmup_steps}" if config.warmup_steps else ""
    return f"{trainer.total_steps:,}, {epochs:.3g} epochs; learning rate {config.learning_rate:g}, {config.lr_scheduler_type}{warmup}"


def _memory(planned: PlannedRun) -> str:
    here = planned.context.memory
    of = f" of {here / GiB:.0f}" if here else ""
    return (
        f"planned {memory.estimate(planned).needed / GiB:.1f}{of} GiB a GPU, "
        f"{planned.checkpointed} of {planned.shape.depth} layers recomputed"
    )


def _folder(trainer: Trainer) -> str:
    if trainer.config.dry_run:
        return ""
    saves = "no checkpoints"
    if trainer.config.save_steps != "off":
        limit = trainer.config.save_total_limit
        kept = f"the newest {limit} kept" if limit else "all kept"
        saves = f"a checkpoint every {trainer.args.save_steps:.0f} steps and at the end, {kept}"
    return f"{trainer.output_dir}: {saves}"
