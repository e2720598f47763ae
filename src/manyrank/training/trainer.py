"""The training loop. It reads as the algorithm, and names neither backend nor task.

    for each step:  deal the step's examples -> forward and backward each micro-batch -> one sum over ranks
                    -> clip -> are loss and norm finite? (the one read of the device) -> optimizer -> callbacks -> save?

transformers' callbacks are driven from here: progress bar, trackers, early stopping and users' own ones.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from ..checkpoint.saver import Saver
from ..checkpoint.state import load_checkpoint, load_weights
from ..config.resolve import TrainConfig
from ..data.dataset import Examples
from ..data.loader import Prefetcher, Step
from ..errors import GradientOverflow, NonFiniteError, NonFiniteGradientError, Preempted, UserError
from ..parallel import timeouts
from ..parallel.engine import Engine
from ..parallel.loss_scale import LossScale
from ..runs.heartbeats import HeartbeatWriter
from ..signals import STOP
from .callbacks import build_callbacks, callback_states, check_states, exportable, training_arguments
from .metrics import Meter
from .non_finite import name_rows
from .optim import advance, build_schedule, total_steps
from .task import StepLoss, Task


@dataclass(frozen=True)
class StepResult:
    """loss: mean of the step over all ranks. grad_norm: before clipping.

    Whether a signal on any rank asked to stop, for good (see `signals`), and whether a file asked to save, is the same on
    all ranks.
    """

    loss: float
    grad_norm: float
    tokens: int
    stop_requested: bool = False
    stop_is_final: bool = False
    save_requested: bool = False


class Trainer:
    """Trains one prepared model.

    Args:
        task: what the run learns from; it gets the wrapped model here.
        output_dir: the run's folder; made when the training begins.
        run: the values that a resumed run must share with this one.
        meter: measures the steps.
        callbacks: of a script, beside those of the recipe. heartbeat: gives this rank's signs of life.
    """

    def __init__(
        self,
        config: TrainConfig,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        train: Examples,
        evaluation: Examples | None,
        *,
        output_dir: Path,
        run: dict,
        meter: Meter,
        callbacks: Sequence[TrainerCallback] = (),
        heartbeat: HeartbeatWriter | None = None,
    ) -> None:
        self.config, self.engine, self.task = config, engine, task
        self.output_dir, self.meter, self.heartbeat = output_dir, meter, heartbeat
        self.has_own_callbacks = bool(config.callbacks or callbacks)
        accelerator = engine.accelerator
        self.main, self.world, self.device = accelerator.is_main_process, accelerator.num_processes, accelerator.device
        task.attach(engine, tokenizer, output_dir=output_dir, in_phase=self._in_phase)
        self.loader = task.loader(train, training=True)
        self.eval_loader = task.loader(evaluation, training=False) if evaluation and config.has_validation else None
        self.total_steps = total_steps(config, self.loader.steps_per_epoch)
        self.run = run | {"total_steps": self.total_steps}
        self.schedule = build_schedule(config, self.total_steps)
        self.args = training_arguments(
            config,
            output_dir=output_dir,
            total_steps=self.total_steps,
            steps_per_epoch=self.loader.steps_per_epoch,
            on_cpu=self.device.type == "cpu",
        )
        self.state, self.control = self._state(), TrainerControl()
        self.handler = CallbackHandler(
            [*build_callbacks(config, output_dir), *callbacks],
            engine.model,
            tokenizer,
            engine.optimizer,
            self.schedule,
        )
        self.saver = Saver(engine, output_dir, run=self.run, limit=config.save_total_limit)
        self.stopped = False  # whether the resumed run had come to its end
        self.agreed = False  # whether all ranks have the same requests of callbacks
        check_states(self.handler)

    # The loop

    def train(self) -> None:
        """Train to the last step, or to the first stop that a callback asks for.

        Raises:
            NonFiniteError: a loss or gradient is not finite; the optimizer has not used it.
            SaveError: two checkpoints in a row could not be written.
            Preempted: a signal came; the checkpoint is complete.
        """
        STOP.remember()  # a step saves what it has
        with timeouts.training(self.config.ddp_timeout):
            self._loop()

    def _in_phase(self, phase: str) -> None:
        """A sign of life. Each rank gives the same ones, one at the latest before it waits for the others."""
        if self.heartbeat:
            self.heartbeat.beat(self.state.global_step + 1, phase)

    def _loop(self) -> None:
        steps = Prefetcher(self.loader)
        self._event("on_train_begin")
        self.control.should_training_stop |= self.stopped
        if self.config.eval_on_start and self.eval_loader and not self.state.global_step:
            self._evaluate()  # it is no candidate for the best one: there is no checkpoint of step 0
        while not self._is_over():
            number = self.state.global_step
            if number % self.loader.steps_per_epoch == 0:
                self._event("on_epoch_begin")
            self._in_phase("callbacks")
            self._event("on_step_begin")
            started = time.perf_counter()
            self._in_phase("reading")
            step = steps.step(number, last=self.total_steps - 1)
            result = self.train_step(step)
            advance(self.schedule)
            self.meter.add(step, result.loss, time.perf_counter() - started)
            self._after_step(result)
            if result.stop_requested and not self._is_over():
                self._save(must=True)
                raise Preempted(final=result.stop_is_final)
        with timeouts.within(timeouts.UNHURRIED):
            if best := self._best():
                load_weights(self.engine, best)
            self._event("on_train_end")

    def _is_over(self) -> bool:
        return self.state.global_step >= self.total_steps or self.control.should_training_stop

    def train_step(self, step: Step) -> StepResult:
        """Take one optimizer step over this rank's micro-batches; under fp16 again while its gradients overflow."""
        while True:
            with contextlib.suppress(GradientOverflow):
                return self._attempt(step)

    def _attempt(self, step: Step) -> StepResult:
        loss = self.task.forward_backward(step, number=self.state.global_step)
        local = torch.stack(loss.losses).sum()
        wishes = (STOP.requested, STOP.final, self.main and self.saver.wished)
        wishes = [local.new_full((), wish) for wish in wishes]  # no copy from the host, which would wait
        self._in_phase("waiting for the others")

        def check(values: list[float]) -> None:
            if not math.isfinite(values[0]):
                raise self._non_finite(f"the loss is {values[0]}", _bad_rows(step, loss))
            self._in_phase("optimizer")

        try:
            total, stops, final, saves, norm = self.engine.step(
                learning_rate=self.schedule.get_last_lr()[0],
                max_grad_norm=self.config.max_grad_norm,
                sums=self.engine.sum(torch.stack([local, *wishes])),
                check=check,
            )
        except NonFiniteGradientError as error:
            raise self._non_finite(str(error), sum((micro.rows for micro in step.micro_batches), [])) from None
        return StepResult(total / loss.divisor, norm, step.tokens, stops > 0, final > 0, saves > 0)

    def dry_step(self) -> StepResult:
        """Forward and backward of the first step, without using the gradients."""
        step = self.loader.step(0)
        loss = self.task.forward_backward(step, number=0)
        self.engine.discard_gradients()
        total = self.engine.sum(torch.stack(loss.losses).sum()).item()
        return StepResult(total / loss.divisor, math.nan, step.tokens)

    # What happens around a step

    def _after_step(self, result: StepResult) -> None:
        self.state.global_step += 1
        self.state.num_input_tokens_seen += result.tokens
        self.state.epoch = self.state.global_step / self.loader.steps_per_epoch * self.loader.examples.report.needed
        self._in_phase("callbacks")
        self._event("on_step_end")
        self.control.should_log |= self.state.global_step == self.total_steps
        self._do_what_is_asked(result)
        if result.save_requested:
            self._save()
        if self.state.global_step % self.loader.steps_per_epoch == 0:
            self._event("on_epoch_end")
            self._do_what_is_asked(result)
        self._agree()  # on whether to stop
        if self.control.should_training_stop and self.meter.window.losses:  # by early stopping: its last steps
            self._log(self._measured(result))

    def _do_what_is_asked(self, result: StepResult) -> None:
        """Log, validate and save as the callbacks want it."""
        self._agree()
        if self.control.should_log and self.meter.window.losses:
            self._log(self._measured(result))
        if self.control.should_evaluate and self.eval_loader:
            self._evaluate_and_compare()
        self._agree()  # a callback may ask for a save when it sees the metrics
        if self.control.should_save:
            self._save()

    def _measured(self, result: StepResult) -> dict[str, float]:
        return {
            "loss": self.meter.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": self.engine.optimizer.param_groups[0]["lr"],
            **self.meter.rates(steps_left=self.total_steps - self.state.global_step),
            **self.task.metrics(number=self.state.global_step),
        }

    def _log(self, logs: dict[str, float]) -> None:
        logs = {**logs, "epoch": round(self.state.epoch or 0, 4)}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._event("on_log", logs=logs)

    def _evaluate(self) -> dict[str, float]:
        metrics = self.task.evaluate(self.eval_loader, number=self.state.global_step)
        self._log(metrics)
        self._event("on_evaluate", metrics=metrics)
        return metrics

    def _evaluate_and_compare(self) -> None:
        metrics = self._evaluate()
        if self.config.metric_for_best_model not in metrics:
            raise UserError(
                f"validation gives no {self.config.metric_for_best_model}",
                where="metric_for_best_model",
                fix=f"choose one of {', '.join(metrics)}",
            )
        value, best = metrics[self.config.metric_for_best_model], self.state.best_metric
        if best is None or (value > best if self.config.greater_is_better else value < best):
            before = self.state.best_metric, self.state.best_global_step
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step
            if self.config.load_best_model_at_end and not self._save():
                self.state.best_metric, self.state.best_global_step = before  # what is not on the disk cannot be loaded

    def _event(self, name: str, **kwargs) -> None:
        self.agreed = False
        self.control = getattr(self.handler, name)(self.args, self.state, self.control, **kwargs)

    def _agree(self) -> None:
        """Let all ranks do what one rank's callback asks for: a user's callback may look at the clock.

        All ranks have the same events. Without one since the last time, there is nothing new to agree on.
        """
        self._in_phase("after the callbacks")
        if self.has_own_callbacks and self.world > 1 and not self.agreed:
            flags = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")
            requests = torch.tensor([float(getattr(self.control, flag)) for flag in flags], device=self.device)
            vars(self.control).update(zip(flags, [count > 0 for count in self.engine.sum(requests).tolist()]))
        self.agreed = True
        if self.control.should_epoch_stop:
            raise UserError("a callback ends the epoch early", where="callbacks", fix="use should_training_stop")

    # Saving and resuming

    def _save(self, *, must: bool = False) -> bool:
        """Write a checkpoint, and say whether this step has one; `must` makes it an error that it cannot be written."""
        if self.saver.saved == self.state.global_step:
            return True
        self._in_phase("saving")
        state = {
            "global_step": self.state.global_step,
            "epoch": self.state.epoch,
            "num_input_tokens_seen": self.state.num_input_tokens_seen,
            "best_metric": self.state.best_metric,
            "best_global_step": self.state.best_global_step,
            "log_history": self.state.log_history,
            "window": self.meter.state(),
            "callbacks": callback_states(self.handler),
            "task": self.task.state(),
            "loss_scale": self.engine.loss_scale and self.engine.loss_scale.state(),
            "stopped": self.control.should_training_stop and self.state.global_step < self.total_steps,
        }
        with timeouts.within(timeouts.UNHURRIED):
            saved = self.saver.save(self.state.global_step, state, best=self._best(), must=must)
        self._in_phase("after the save")
        if saved:
            self._event("on_save")
        return saved

    def _best(self) -> Path | None:
        """The checkpoint that load_best_model_at_end takes."""
        step = self.state.best_global_step
        return self.output_dir / f"checkpoint-{step}" if step and self.config.load_best_model_at_end else None

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint: weights, optimizer, generators, step, best metric and callbacks."""
        state = load_checkpoint(self.engine, folder, lambda: self.task.zero_step(self.loader.step(0)))
        saved = state.pop("callbacks")
        for callback in exportable(self.handler):  # those of one class in their order
            entry_of_callback = next((entry for entry in saved if entry["name"] == type(callback).__name__), None)
            if entry_of_callback:
                saved.remove(entry_of_callback)
                vars(callback).update(entry_of_callback["attributes"])
        self.meter.restore(state.pop("window"))
        self.stopped = state.pop("stopped")
        self.task.restore(state.pop("task", {}))
        if (scale := state.pop("loss_scale", None)) and self.engine.loss_scale:
            self.engine.loss_scale = LossScale(**scale)
        vars(self.state).update(state)
        if folder.parent.resolve() == self.output_dir.resolve():
            self.saver.saved = self.state.global_step
        else:  # another run's best checkpoint is not in this one's folder
            self.state.best_metric = self.state.best_global_step = None
        if (best := self._best()) and not best.is_dir():  # the run did not keep its best one until now
            self.state.best_metric = self.state.best_global_step = None
        self.schedule = build_schedule(self.config, self.total_steps)
        advance(self.schedule, self.state.global_step)

    # Pieces

    def _state(self) -> TrainerState:
        return TrainerState(
            max_steps=self.total_steps,
            num_train_epochs=math.ceil(self.total_steps / self.loader.steps_per_epoch),
            logging_steps=self.args.logging_steps,
            eval_steps=self.args.eval_steps,
            save_steps=self.args.save_steps,
            train_batch_size=self.config.per_device_train_batch_size,
            is_local_process_zero=self.engine.accelerator.is_local_main_process,
            is_world_process_zero=self.main,
        )

    def _non_finite(self, what: str, rows: list[tuple[str, int]]) -> NonFiniteError:
        number = self.state.global_step + 1
        return name_rows(what, rows, step=number, rank=self.engine.accelerator.process_index, folder=self.output_dir)


def _bad_rows(step: Step, loss: StepLoss) -> list[tuple[str, int]]:
    bad = [micro.rows for micro, value in zip(step.micro_batches, loss.losses) if not torch.isfinite(value)]
    return sum(bad, [])
