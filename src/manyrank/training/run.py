"""Train one run to its final_model, and tell the user what happened. `build` makes the run from a recipe."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ..chat_template.render import render_options
from ..checkpoint.resume import Start, broadcast_from_rank0
from ..checkpoint.state import save_weights
from ..config.resolve import TrainConfig
from ..errors import Preempted, SaveError, is_out_of_memory
from ..models.generate import generate_completions
from ..parallel.engine import Engine, StrategyInfo
from ..plan.planned_run import PlannedRun
from ..rules.check import warnings_of_length
from ..runs import logs, run_folder
from ..signals import STOP
from ..topology import ranks
from . import numerics, record, trackers
from .memory import compare_with_measured, out_of_memory
from .model_card import model_card
from .start import describe_start
from .trainer import Trainer


@dataclass
class TrainingRun:
    """One run on one rank: engine, trainer and what they were made from."""

    config: TrainConfig
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    trainer: Trainer
    output_dir: Path
    start: Start
    planned: PlannedRun | None
    loading: dict[str, int]  # peaks of a GPU's memory until the model was loaded
    own_tokenizer: bool  # a script has brought it
    give_back: Callable[[], None]  # what a script has brought, as it was

    @property
    def accelerator(self) -> Accelerator:
        return self.engine.accelerator

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            print(text, flush=True)

    def _starts(self, phase: str) -> None:
        """A sign of life before the first step."""
        if self.trainer.heartbeat:
            self.trainer.heartbeat.beat(0, phase)

    def dry_run(self) -> None:
        """Load everything, one step forward and backward, save nothing."""
        for warning in warnings_of_length(self.config, self.trainer.total_steps):
            self.say(warning)
        facts = self.engine.facts()
        self._say_start(facts)
        started = time.perf_counter()
        with numerics.naming_the_option():
            result = self.trainer.dry_step()
        peak = logs.peak_memory(self.accelerator.device.type)
        self.say(
            f"dry run: started {facts.wrapper} ({facts.distributed_type}) on {facts.world_size} process(es); "
            f"{self.trainer.total_steps} steps of {self.config.batch(facts.world_size)} examples would follow\n"
            f"dry run: one step, {result.tokens:,} tokens, loss {result.loss:.4f}, {time.perf_counter() - started:.1f} s, "
            f"peak memory {peak / 2**30:.2f} GiB a process; nothing was saved"
        )

    def run(self, report: Callable[[Path], Path | None] = lambda folder: None) -> None:
        """Train, save final_model, show the answers to the recipe's questions before and after.

        Args:
            report: makes the page of a run that has ended, in its folder.
        """
        for note in (*self.start.notes, *warnings_of_length(self.config, self.trainer.total_steps)):
            self.say(note)
        if self.start.folder:
            self._starts(f"resuming from {self.start.folder}")
            self.trainer.resume(self.start.folder)
            self.say(f"resumed from {self.start.folder}, step {self.trainer.state.global_step}")
        facts = self._write_facts()
        self._say_start(facts)
        with self._recorded(facts, report):
            try:
                with self._explained():
                    before = self._before()
                    self.trainer.train()
                    final = self.save_final_model()
                    after = self._answers()
            except Preempted as stop:
                self._compare()
                if not STOP.at_start:
                    self._say_stopped(started_anew=not stop.final and ranks.may_restart())
                raise
            self._tell(before, after, final)
            self._compare()
        if self.accelerator.is_main_process and (page := report(self.output_dir)):
            self.say(f"report: {page}")
        self.accelerator.wait_for_everyone()

    def _say_start(self, facts: StrategyInfo) -> None:
        if self.accelerator.is_main_process:
            self.say(f"\n{describe_start(self.trainer, facts, self.planned)}\n")

    def _say_stopped(self, *, started_anew: bool) -> None:
        self.say(f"stopped by a signal; checkpoint-{self.trainer.state.global_step} is complete")
        if not started_anew:
            folder = shlex.quote(str(self.output_dir))
            self.say(f"to continue, type the same command with --output_dir {folder} --resume_from_checkpoint auto")

    def _tell(self, before: list[str], after: list[str], final: Path) -> None:
        for question, old, new in zip(self.config.sample_questions, before, after):
            self.say(f"\nquestion  {question}\n  before  {_one_line(old)}\n  after   {_one_line(new)}")
        self.say(f"\nfinal model: {final}\ntry it: manyrank chat {shlex.quote(str(self.output_dir))}")
        if self.accelerator.is_main_process and before:
            with logs.warn_on_write_error():
                logs.write_samples(self.output_dir, self.config.sample_questions, before, after)

    def _compare(self) -> None:
        with logs.warn_on_write_error():
            if (
                self.planned
                and self.accelerator.is_main_process
                and (line := compare_with_measured(self.planned, self.output_dir, self.loading))
            ):
                self.say(line)

    def _recorded(self, facts: StrategyInfo, report: Callable[[Path], object]) -> contextlib.AbstractContextManager:
        """The run's history, on rank 0."""
        if not self.accelerator.is_main_process:
            return contextlib.nullcontext()
        return record.history(
            self.output_dir,
            step=lambda: self.trainer.state.global_step,
            event="resumed" if self.start.folder else "started",
            failed=report,
            processes=self.accelerator.num_processes,
            total_steps=self.trainer.total_steps,
            wrapper=facts.wrapper,
        )

    @contextlib.contextmanager
    def _explained(self):
        """Being out of memory, with what the plan says of it; and what is not deterministic."""
        try:
            with numerics.naming_the_option():
                yield
        except RuntimeError as error:
            if self.planned is None or not is_out_of_memory(error):
                raise
            peak = logs.peak_memory(self.accelerator.device.type)
            raise out_of_memory(self.planned, step=self.trainer.state.global_step + 1, measured=peak) from None

    def save_final_model(self) -> Path:
        """Write final_model/, complete or not at all."""
        final, partial = self.output_dir / "final_model", self.output_dir / "final_model.partial"
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        precision = self.engine.precision
        dtype = getattr(torch, precision.dtype) if self.config.method == "full" and precision.half else None
        try:
            save_weights(self.engine, partial, dtype=dtype, also=lambda: self._write_beside(partial))
        except SaveError as error:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
            raise SaveError(f"final_model could not be written: {error}") from None
        if main:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            run_folder.link_adapter(self.output_dir)
        self.accelerator.wait_for_everyone()
        return final

    def _write_beside(self, folder: Path) -> None:
        """Write what a final model has beside its weights."""
        self.tokenizer.save_pretrained(folder)
        state, batch = self.trainer.state, self.config.batch(self.accelerator.num_processes)
        named = self.config.model_copy(update={"model_name_or_path": self.trainer.task.model_name})
        card = model_card(named, self.output_dir, steps=state.global_step, batch=batch, log_history=state.log_history)
        (folder / "README.md").write_text(card, encoding="utf-8")
        run_folder.give_usual_modes(folder)

    def close(self) -> None:
        """Leave the process group; after an error, without waiting for the others."""
        self.give_back()
        self.trainer.task.close()
        self.accelerator.end_training()

    def _before(self) -> list[str]:
        """The answers before the training; a resumed run has them from its first start."""
        questions, main = self.config.sample_questions, self.accelerator.is_main_process
        samples = broadcast_from_rank0(self.accelerator, lambda: logs.read_samples(self.output_dir) or [])
        if samples and self.start.folder and [entry["question"] for entry in samples] == questions:
            return [entry["before"] for entry in samples]
        self._starts("answering the sample questions")
        completions = self._answers()
        if main and completions:
            with logs.warn_on_write_error():
                logs.write_samples(self.output_dir, questions, completions)
        return completions

    def _answers(self) -> list[str]:
        if not self.config.sample_questions:
            return []
        with self.engine.evaluating(), self.engine.generating() as held:
            if not held:
                self.say("the whole model has no room on one device: completions gather each layer for each token")
            return generate_completions(
                self.engine.wrapped,
                self.engine.model,
                self.tokenizer,
                self.config.sample_questions,
                options=render_options(self.config),
                max_new_tokens=self.config.sample_max_new_tokens,
                device=self.accelerator.device,
            )

    def _write_facts(self) -> StrategyInfo:
        facts = self.engine.facts()
        if self.accelerator.is_main_process:
            evaluation = self.trainer.eval_loader and self.trainer.eval_loader.examples
            with run_folder.writable(self.output_dir):
                record.write_tokenizer(self.tokenizer if self.own_tokenizer else None, self.output_dir)
                record.write_facts(self.config, self.output_dir, facts, self.trainer.loader.examples, evaluation)
                trackers.continue_run(self.config, self.output_dir)
                logs.rewind(self.output_dir, self.trainer.state.global_step)
        return facts


def _one_line(text: str) -> str:
    return " / ".join(line for line in text.splitlines() if line.strip())
