"""transformers' callbacks for our loop: progress, trackers, early stopping, the run's log files, and users' own."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

from accelerate.utils import patch_environment
from tqdm.auto import tqdm
from transformers import (
    DefaultFlowCallback,
    EarlyStoppingCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, ExportableState

from ..config.resolve import TrainConfig
from ..errors import UserError
from .optim import count_steps

# Steps between two checkpoints, where the recipe says nothing: an epoch, several short ones, or a part of a long one.
FEWEST_UNSAVED, MOST_UNSAVED = 50, 500


class RunLog(TrainerCallback):
    """Appends every logged dictionary to metrics.jsonl (for machines) and training_log.txt (for people).

    Lines that cannot be written, on a full disk for instance, are kept and written with a later one.
    """

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / "logs"
        self.unwritten: dict[str, list[str]] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.folder.mkdir(parents=True, exist_ok=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        self._append("metrics.jsonl", json.dumps({"step": state.global_step, "time": round(time.time(), 3), **logs}))
        shown = "  ".join(
            f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in logs.items()
        )
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self._append("training_log.txt", f"{now}  step {state.global_step}/{state.max_steps}  {shown}")

    def _append(self, name: str, line: str) -> None:
        lines, file = self.unwritten.setdefault(name, []), self.folder / name
        lines.append(line + "\n")
        size = file.stat().st_size if file.exists() else 0
        try:
            with file.open("a", encoding="utf-8") as stream:
                stream.writelines(lines)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(file, size)  # no half lines
            if len(lines) == 1:
                print(f"WARNING: cannot write {file}: {error}. Training continues", file=sys.stderr, flush=True)
            return
        lines.clear()


class Progress(TrainerCallback):
    """A bar with loss and speed on a terminal; elsewhere, as in a job's log, a line for each line of metrics."""

    LEFT_OUT = frozenset(
        {"supervised_tokens_per_second", "samples_per_second", "step_seconds", "eta_seconds", "padding"}
    )
    NAMES: ClassVar = {"learning_rate": "lr", "tokens_per_second": "tokens/s", "memory_gib": "GiB"}
    FORMATS: ClassVar = {"tokens_per_second": ",.0f", "learning_rate": ".2e", "mfu": ".1%"}

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        shown = "  ".join(f"{self.NAMES.get(key, key)} {self._value(key, value)}" for key, value in self._shown(logs))
        if self.bar and "loss" in logs:
            self.bar.set_postfix_str(shown)
            return
        left = f"  {timedelta(seconds=round(logs['eta_seconds']))} left" if "eta_seconds" in logs else ""
        tqdm.write(f"step {state.global_step}/{state.max_steps}  {shown}{left}")
        sys.stdout.flush()

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.close()
            self.bar = None

    def _shown(self, logs: dict) -> list[tuple[str, object]]:
        return [(key, value) for key, value in logs.items() if key not in self.LEFT_OUT and "/" not in key]

    def _value(self, key: str, value: object) -> str:
        return format(value, self.FORMATS.get(key, ".4g")) if isinstance(value, int | float) else str(value)


def build_callbacks(config: TrainConfig, output_dir: Path) -> list[TrainerCallback]:
    """Build the callbacks of a run; trackers only where the recipe asks for them.

    Raises:
        UserError: one of the recipe's own callbacks cannot be imported.
    """
    callbacks = [DefaultFlowCallback(), Progress(), RunLog(output_dir)]
    callbacks += [cls() for cls in get_reporting_integration_callbacks(config.report_to)]
    if config.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(config.early_stopping_patience, config.early_stopping_threshold))
    return callbacks + [load_callback(path)() for path in config.callbacks]


def load_callback(path: str) -> type[TrainerCallback]:
    """Import a user's callback class from "module:Class".

    Raises:
        UserError: there is no such module or class, or it is no TrainerCallback.
    """
    module, _, name = path.partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot import {path}: {error}", where="callbacks", fix="write module:Class") from None
    if not (isinstance(kind, type) and issubclass(kind, TrainerCallback)):
        raise UserError(
            f"{path} is not a TrainerCallback class", where="callbacks", fix="derive it from TrainerCallback"
        )
    return kind


def exportable(handler: CallbackHandler) -> list[ExportableState]:
    """The callbacks whose state a checkpoint keeps."""
    return [callback for callback in handler.callbacks if isinstance(callback, ExportableState)]


def callback_states(handler: CallbackHandler) -> list[dict]:
    """The states of these, as JSON values."""
    return [{"name": type(c).__name__, "attributes": c.state()["attributes"]} for c in exportable(handler)]


def check_states(handler: CallbackHandler) -> None:
    """See at the start that they can be saved.

    Raises:
        UserError: one has what JSON cannot hold.
    """
    for state in callback_states(handler):
        try:
            json.dumps(state)
        except TypeError as error:
            what = f"the state of {state['name']} cannot be saved: {error}"
            raise UserError(what, where="callbacks", fix="let its state() give what JSON can hold") from None


def steps_between_saves(config: TrainConfig, steps_per_epoch: int, total_steps: int) -> int:
    """Steps between two checkpoints; 0 for none."""
    if config.save_steps == "auto":
        return min(MOST_UNSAVED, math.ceil(FEWEST_UNSAVED / steps_per_epoch) * steps_per_epoch)
    return 0 if config.save_steps == "off" else steps_between(config.save_steps, steps_per_epoch, total_steps)


def steps_between(value: float | str | None, steps_per_epoch: int, total_steps: int) -> int:
    """Steps between two events that a recipe wants every so many steps, every share of the run, or every epoch (None, too)."""
    return count_steps(value, total_steps) if isinstance(value, int | float) else steps_per_epoch


def training_arguments(
    config: TrainConfig,
    *,
    output_dir: Path,
    total_steps: int,
    steps_per_epoch: int = 1,
    on_cpu: bool,
    kind: type[TrainingArguments] = TrainingArguments,
    **more,
) -> TrainingArguments:
    """The run in transformers' own words, for callbacks that look things up there; `more` are arguments of `kind`."""
    options = {
        "output_dir": str(output_dir),
        "run_name": config.run_name or output_dir.name,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "lr_scheduler_kwargs": dict(config.lr_scheduler_kwargs),
        "warmup_steps": count_steps(config.warmup_steps, total_steps),
        "num_train_epochs": config.num_train_epochs,
        "max_steps": total_steps,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "data_seed": config.data_seed,
        "logging_steps": steps_between(config.logging_steps, steps_per_epoch, total_steps),
        "logging_first_step": config.logging_first_step,
        "eval_strategy": "steps" if config.has_validation else "no",
        "eval_steps": steps_between(config.eval_steps, steps_per_epoch, total_steps),
        "eval_on_start": config.eval_on_start,
        "save_strategy": "no" if config.save_steps == "off" else "steps",
        "save_steps": steps_between_saves(config, steps_per_epoch, total_steps),
        "save_total_limit": config.save_total_limit,
        "report_to": config.report_to or "none",
        "use_cpu": on_cpu,
        "accelerator_config": {"use_configured_state": True},
        "disable_tqdm": False,
    }
    # With that variable it would set up DeepSpeed a second time, from a file whose "auto" values are still open.
    with patch_environment(ACCELERATE_USE_DEEPSPEED="false"):
        args = kind(**options | more)
    # Set afterwards: transformers would demand a checkpoint at every validation; we save the best one by itself.
    args.load_best_model_at_end = config.load_best_model_at_end
    args.metric_for_best_model, args.greater_is_better = config.metric_for_best_model, config.greater_is_better
    return args
