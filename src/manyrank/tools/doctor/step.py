"""One real training, as small as it can be: two steps with a checkpoint after each, and the second step once more from
the first's checkpoint. All of it is the training's own code. With torch."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ...config.resolve import Entry, TrainConfig, resolve
from ...models.tiny import build
from ...runs import folder as run_folder
from ...runs.logs import read_metrics
from ...topology.ranks import Topology
from ...training.run import open_session
from ...training.session import Session
from .exchange import from_main

STEPS = 2
FIXED = {"max_length": 256, "save_steps": 1, "logging_steps": 1, "max_steps": STEPS, "per_device_train_batch_size": 2}


def make_model(folder: Path) -> None:
    """The embedded model before its training: made in a second, and the same on every machine."""
    build(folder, steps=0)


def step_config(given: TrainConfig, *, strategy: str, model: Path, world_size: int) -> TrainConfig:
    """The recipe's way of training, on the small model and the project's sample."""
    values = FIXED | {
        "model_name_or_path": str(model),
        "strategy": strategy,
        "method": given.method,
        "bf16": given.bf16,
        "optim": given.optim,
        "global_batch_size": FIXED["per_device_train_batch_size"] * world_size,
    }
    return resolve("verify", [Entry(key, value, "the doctor's step") for key, value in values.items()]).config


def take_steps(config: TrainConfig, place: Topology, run: Path, *, bf16: bool) -> tuple[Session, dict[str, Any]]:
    """Train and save in the folder `run`.

    Returns:
        The session, and what came up with the loss of each step.
    """
    session = open_session(config, place, output_dir=run, bf16=bf16)
    session.run()
    facts = asdict(session.runtime.facts()) | {"method": config.method, "strategy": config.strategy}
    facts["losses"] = [entry["loss"] for entry in read_metrics(run)] if place.is_main else []
    return session, from_main(facts)


def load_and_repeat(session: Session) -> dict[str, Any]:
    """Load the first checkpoint and take the last step again.

    Returns:
        loss of that step; tensors and bytes of the checkpoint; drift: how far the weights end from those of the
        first time, as a part of what the step changes; None if it changes nothing.

    Raises:
        UserError: the checkpoint is damaged.
    """
    run, trainer, main = session.output_dir, session.trainer, session.accelerator.is_main_process
    first = run_folder.find(run, str(run / "checkpoint-1")).folder
    before, after = (_weights(run / f"checkpoint-{step}") if main else {} for step in (1, STEPS))
    session.accelerator.wait_for_everyone()  # the next save replaces what was just read
    trainer.control.should_training_stop = False
    trainer.resume(first)
    trainer.train()
    session.accelerator.wait_for_everyone()
    return from_main(_compared(run, first, before, after) if main else None)


def _compared(
    run: Path, first: Path, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> dict[str, Any]:
    change = _distance(before, after)
    return {
        "loss": read_metrics(run)[-1]["loss"],
        "tensors": len(before),
        "bytes": sum(file.stat().st_size for file in first.iterdir()),
        "drift": _distance(_weights(run / f"checkpoint-{STEPS}"), after) / change if change else None,
    }


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*model*.safetensors"):
        tensors |= load_file(file)
    return tensors


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum((one[name].double() - other[name].double()).square().sum().item() for name in one))
