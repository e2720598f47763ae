"""One run from recipe to final_model: bring everything up, train, and tell the user what happened."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging as transformers_logging

from . import checkpoint, metrics, record, run_folder, strategy, trackers
from .batches import trial
from .config import TrainConfig
from .data import Examples, prepare, render_options
from .errors import Preempted, SaveError
from .foresight import compared, foresee, is_out_of_memory, out_of_memory, told
from .generate import answers
from .loss import LossFunction
from .meter import Meter, kind_of
from .model import (
    evaluation_mode,
    fitted,
    load_model,
    load_tokenizer,
    plan_load,
    read_config,
    resolve_name,
    with_adapters,
)
from .optim import build_optimizer
from .resume import Start, base_fingerprint, find_start, from_main
from .rules import warnings_of_length
from .run_identity import batch_per_process, identity, refuse_changes
from .runtime import Facts, Runtime
from .runtime import prepare as prepare_runtime
from .setup import Setup
from .topology import Topology
from .trainer import Trainer


@dataclass(frozen=True)
class Brought:
    """What a script brings along, in place of or beside what the recipe names.

    Attributes:
        model: the base, without adapters; the recipe's method puts them on it.
        tokenizer: with a chat template, where the data needs one.
        callbacks: transformers callbacks, beside those of the recipe.
        loss: logits (n, vocabulary) in float32 and targets (n,) of supervised tokens to their summed loss, a scalar.
    """

    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    callbacks: Sequence[TrainerCallback] = ()
    loss: LossFunction | None = None


@dataclass
class Session:
    """Everything that one rank has in memory."""

    config: TrainConfig
    runtime: Runtime
    tokenizer: PreTrainedTokenizerBase
    trainer: Trainer
    output_dir: Path
    start: Start
    setup: Setup | None
    own_tokenizer: bool  # a script has brought it
    give_back: Callable[[], None]  # what a script has brought, as it was

    @property
    def accelerator(self) -> Accelerator:
        return self.runtime.accelerator

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            print(text, flush=True)

    def dry_run(self) -> None:
        """Load everything, one step forward and backward, save nothing."""
        for warning in warnings_of_length(self.config, self.trainer.total_steps):
            self.say(warning)
        started = time.perf_counter()
        result = self.trainer.dry_step()
        facts = self.runtime.facts()
        peak = metrics.peak_memory(self.accelerator.device.type)
        self.say(
            f"dry run: strategy came up as {facts.wrapper} ({facts.distributed_type}) on {facts.world_size} process(es); "
            f"{self.trainer.total_steps} steps of {self.trainer.batch_size} examples would follow\n"
            f"dry run: one step, {result.tokens:,} tokens, loss {result.loss:.4f}, {time.perf_counter() - started:.1f} s, "
            f"peak memory {peak / 2**30:.2f} GiB a process; nothing was saved"
        )

    def run(self) -> None:
        """Train, save final_model, show the answers to the recipe's questions before and after."""
        for note in (*self.start.notes, *warnings_of_length(self.config, self.trainer.total_steps)):
            self.say(note)
        if self.start.folder:
            self.trainer.resume(self.start.folder)
            self.say(f"resumed from {self.start.folder}, step {self.trainer.state.global_step}")
        facts = self._write_facts()
        with self._recorded(facts):
            try:
                with self.trainer.watched(), self._explained():
                    before = self._before()
                    self.trainer.train()
                    final = self.save_final_model()
                    after = self._answers()
            except Preempted:
                self._compare()
                raise
            self._tell(before, after, final)
            self._compare()
        if self.accelerator.is_main_process and (page := record.make_report(self.output_dir)):
            self.say(f"report: {page}")
        self.accelerator.wait_for_everyone()

    def _tell(self, before: list[str], after: list[str], final: Path) -> None:
        for question, old, new in zip(self.config.sample_questions, before, after):
            self.say(f"\nquestion  {question}\n  before  {_one_line(old)}\n  after   {_one_line(new)}")
        self.say(f"\nfinal model: {final}")
        if self.accelerator.is_main_process and before:
            with record.beside_the_point():
                metrics.write_samples(self.output_dir, self.config.sample_questions, before, after)

    def _compare(self) -> None:
        with record.beside_the_point():
            if self.setup and self.accelerator.is_main_process and (line := compared(self.setup, self.output_dir)):
                self.say(line)

    def _recorded(self, facts: Facts) -> contextlib.AbstractContextManager:
        """The run's history, on rank 0."""
        if not self.accelerator.is_main_process:
            return contextlib.nullcontext()
        return record.history(
            self.output_dir,
            step=lambda: self.trainer.state.global_step,
            event="resumed" if self.start.folder else "started",
            processes=self.accelerator.num_processes,
            total_steps=self.trainer.total_steps,
            wrapper=facts.wrapper,
        )

    @contextlib.contextmanager
    def _explained(self):
        """Being out of memory, with what the plan says of it."""
        try:
            yield
        except RuntimeError as error:
            if self.setup is None or not is_out_of_memory(error):
                raise
            held = metrics.peak_memory(self.accelerator.device.type)
            raise out_of_memory(self.setup, step=self.trainer.state.global_step + 1, measured=held) from None

    def save_final_model(self) -> Path:
        """Write final_model/, complete or not at all."""
        final, partial = self.output_dir / "final_model", self.output_dir / "final_model.partial"
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        bf16 = self.runtime.facts().precision == "bf16"
        dtype = torch.bfloat16 if self.config.method == "full" and bf16 else None
        try:
            checkpoint.save_weights(
                self.runtime, partial, dtype=dtype, also=lambda: self.tokenizer.save_pretrained(partial)
            )
        except SaveError as error:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
            raise SaveError(f"final_model could not be written: {error}") from None
        if main:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        self.accelerator.wait_for_everyone()
        return final

    def close(self) -> None:
        """Leave the process group; after an error, without waiting for the others."""
        self.give_back()
        if self.trainer.token_loss.head:
            self.trainer.token_loss.head.release()
        self.accelerator.end_training()

    def _before(self) -> list[str]:
        """The answers before the training; a resumed run has them from its first start."""
        questions, main = self.config.sample_questions, self.accelerator.is_main_process
        kept = from_main(self.accelerator, lambda: metrics.read_samples(self.output_dir) or [])
        if kept and self.start.folder and [entry["question"] for entry in kept] == questions:
            return [entry["before"] for entry in kept]
        found = self._answers()
        if main and found:
            with record.beside_the_point():
                metrics.write_samples(self.output_dir, questions, found)
        return found

    def _answers(self) -> list[str]:
        if not self.config.sample_questions:
            return []
        with evaluation_mode(self.runtime.wrapped):
            return answers(
                self.runtime.wrapped,
                self.runtime.model,
                self.tokenizer,
                self.config.sample_questions,
                options=render_options(self.config),
                max_new_tokens=self.config.sample_max_new_tokens,
            )

    def _write_facts(self) -> Facts:
        facts = self.runtime.facts()
        if self.accelerator.is_main_process:
            evaluation = self.trainer.eval_loader and self.trainer.eval_loader.examples
            with run_folder.writable(self.output_dir):
                record.write_tokenizer(self.tokenizer if self.own_tokenizer else None, self.output_dir)
                record.write_facts(self.config, self.output_dir, facts, self.trainer.loader.examples, evaluation)
                trackers.continue_run(self.config, self.output_dir)
                metrics.rewind(self.output_dir, self.trainer.state.global_step)
        return facts


def open_session(
    config: TrainConfig, place: Topology, *, output_dir: Path, bf16: bool, brought: Brought | None = None
) -> Session:
    """Start the strategy, read the data, load and wrap the model.

    Raises:
        UserError: something that only shows now is wrong: a row, the model, a checkpoint.
    """
    _prepare_environment(config, place, output_dir)
    brought = brought or Brought()
    tokenizer = load_tokenizer(config, brought.tokenizer)
    accelerator = strategy.start(config, place, bf16=bf16)
    start = find_start(config, output_dir, accelerator)
    per_process = batch_per_process(config)
    if start.folder and config.global_batch_size is None:  # fixed in the run, whatever the number of processes is now
        config = config.model_copy(update={"global_batch_size": start.run["global_batch_size"]})
    needed = start.run["needed"] if start.folder else _needed(config, accelerator.num_processes)
    train, evaluation = _data(config, tokenizer, needed)
    if accelerator.is_main_process:
        print(f"training data: {train.describe()}", flush=True)
        if evaluation:
            print(f"validation data: {evaluation.describe()}", flush=True)
        if config.trust_remote_code:
            print(f"trust_remote_code is on: code from {config.model_name_or_path} runs here", flush=True)
    setup = _foreseen(config, accelerator, place, brought.model, bf16=bf16)
    config = setup.config if setup else config
    base, give_back = _fingerprint(brought.model), _lent(brought.model)
    model = _model(config, accelerator, brought.model, bf16=bf16)
    runtime = prepare_runtime(accelerator, model, build_optimizer(model, config))
    torch.manual_seed(config.seed + accelerator.process_index)  # each rank has dropout of its own
    run = identity(
        config,
        model=base
        or base_fingerprint(resolve_name(config.model_name_or_path), getattr(model.config, "_commit_hash", None)),
        loss=brought.loss and f"{brought.loss.__module__}.{brought.loss.__qualname__}",
        data=train.fingerprint,
        global_batch_size=config.batch(accelerator.num_processes),
        # What stands beside a global batch is only how it is laid out.
        batch_per_process=per_process or start.run.get("batch_per_process"),
        needed=needed,
        examples=len(train),
        tokens=int(train.lengths.sum()),
        bf16=bf16,
    )
    trainer = Trainer(
        config, runtime, tokenizer, train, evaluation, output_dir=output_dir, run=run,
        meter=Meter(accelerator.device.type, setup, kind_of(accelerator.device)), callbacks=brought.callbacks, loss=brought.loss,
    )  # fmt: skip
    _prove_head(trainer)
    if start.folder:
        changed = refuse_changes(start.folder, trainer.run, allowed=config.resume_changes)
        start = replace(start, notes=(*start.notes, *(f"changed, as allowed: {change}" for change in changed)))
    if accelerator.is_main_process and accelerator.num_processes > 1 and config.packing != "none":
        print(
            f"packing: {config.packing}; {trainer.loader.imbalance():.1%} between the longest rank and the mean",
            flush=True,
        )
    own_tokenizer = brought.tokenizer is not None
    return Session(config, runtime, tokenizer, trainer, output_dir, start, setup, own_tokenizer, give_back)


def _foreseen(
    config: TrainConfig, accelerator: Accelerator, place: Topology, own: PreTrainedModel | None, *, bf16: bool
) -> Setup | None:
    shape = own.config.to_dict() if own else read_config(config)
    setup = foresee(config, accelerator, place, shape, bf16=bf16)
    if setup and accelerator.is_main_process and (note := told(setup, config)):
        print(note, flush=True)
    return setup


def _model(
    config: TrainConfig, accelerator: Accelerator, own: PreTrainedModel | None, *, bf16: bool
) -> torch.nn.Module:
    if own:
        return with_adapters(fitted(own, config, bf16=bf16), config)
    return load_model(plan_load(config, accelerator, bf16=bf16), config)


def _fingerprint(own: PreTrainedModel | None) -> str | None:
    """Of a model that a script brings: its shape, and the first values of each tensor. It has no files to tell it by."""
    if own is None:
        return None
    digest = hashlib.sha256(own.config.to_json_string().encode())
    for parameter in own.parameters():
        digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _lent(own: PreTrainedModel | None) -> Callable[[], None]:
    """What gives a model that a script brings its attention back; the training's knows no key-value cache."""
    if own is None:
        return lambda: None
    before = own.config._attn_implementation
    return lambda: own.set_attn_implementation(before)


def _prove_head(trainer: Trainer) -> None:
    """All ranks see alike whether the model leaves the fused head's result alone."""
    runtime, micro = trainer.runtime, trial(packed=trainer.config.packing != "none").to(trainer.device)

    def agree(seen: bool) -> bool:
        return runtime.sum(torch.tensor(float(not seen), device=trainer.device)).item() == 0

    with evaluation_mode(runtime.wrapped):
        trainer.token_loss.prove(micro.inputs, micro.positions, micro.targets, agree=agree)
    runtime.reshard()


def _needed(config: TrainConfig, world: int) -> int | None:
    """The examples that a short run will see: it does not tokenise more. None: all."""
    whole = config.eval_split or config.packing == "dataset" or config.max_steps <= 0
    return None if whole else config.max_steps * config.batch(world)


def _data(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, needed: int | None
) -> tuple[Examples, Examples | None]:
    """The examples to train on and to validate with."""
    train = prepare(config.data_path, tokenizer, config, needed=needed)
    if config.eval_split:
        return train.split(config.eval_split)
    return train, prepare(config.eval_data_path, tokenizer, config) if config.eval_data_path else None


def _prepare_environment(config: TrainConfig, place: Topology, output_dir: Path) -> None:
    transformers_logging.disable_progress_bar()  # of reading weights, once for each rank
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # of an earlier training in this process
    if not place.is_main:
        transformers_logging.set_verbosity_error()  # what all ranks would say alike
    trackers.prepare(config, output_dir)


def _one_line(text: str) -> str:
    return " / ".join(line for line in text.splitlines() if line.strip())
