"""One run from recipe to final_model: bring everything up, train, and tell the user what happened."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from . import checkpoint, metrics, strategy
from .config import TrainConfig
from .data import Examples, prepare, render_options, write_quarantine
from .errors import SaveError
from .generate import answers
from .model import evaluation_mode, load_model, load_tokenizer, plan_load, resolve_name
from .optim import build_optimizer
from .resume import Start, base_fingerprint, find_start, identity, refuse_changes
from .runtime import Runtime
from .runtime import prepare as prepare_runtime
from .topology import Topology
from .trainer import Trainer


@dataclass
class Session:
    """Everything that one rank has in memory."""

    config: TrainConfig
    runtime: Runtime
    tokenizer: PreTrainedTokenizerBase
    trainer: Trainer
    output_dir: Path
    start: Start

    @property
    def accelerator(self) -> Accelerator:
        return self.runtime.accelerator

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            print(text, flush=True)

    def dry_run(self) -> None:
        """Load everything, one step forward and backward, save nothing."""
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
        for note in self.start.notes:
            self.say(note)
        if self.start.folder:
            self.trainer.resume(self.start.folder)
            self.say(f"resumed from {self.start.folder}, step {self.trainer.state.global_step}")
        self._write_facts()
        with self.trainer.watched():
            before = self._answers()
            self.trainer.train()
            final = self.save_final_model()
            after = self._answers()
        for question, old, new in zip(self.config.sample_questions, before, after):
            self.say(f"\nquestion  {question}\n  before  {_one_line(old)}\n  after   {_one_line(new)}")
        self.say(f"\nfinal model: {final}")
        self.accelerator.wait_for_everyone()

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
        self.accelerator.end_training()

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

    def _write_facts(self) -> None:
        facts = self.runtime.facts()
        if self.accelerator.is_main_process:
            (self.output_dir / "logs").mkdir(parents=True, exist_ok=True)
            (self.output_dir / "logs" / "strategy.json").write_text(json.dumps(facts.as_dict(), indent=1))
            write_quarantine(self.trainer.loader.examples, self.output_dir / "logs" / "quarantine.jsonl")
            if self.trainer.eval_loader and not self.config.eval_split:
                write_quarantine(self.trainer.eval_loader.examples, self.output_dir / "logs" / "eval_quarantine.jsonl")
            metrics.rewind(self.output_dir, self.trainer.state.global_step)


def open_session(config: TrainConfig, place: Topology, *, output_dir: Path, bf16: bool) -> Session:
    """Start the strategy, read the data, load and wrap the model.

    Raises:
        UserError: something that only shows now is wrong: a row, the model, a checkpoint.
    """
    _prepare_environment(config, output_dir)
    tokenizer = load_tokenizer(config)
    accelerator = strategy.start(config, place, bf16=bf16)
    start = find_start(config, output_dir, accelerator)
    per_process = _batch_per_process(config)
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
    model = load_model(plan_load(config, accelerator, bf16=bf16), config)
    runtime = prepare_runtime(accelerator, model, build_optimizer(model, config))
    torch.manual_seed(config.seed + accelerator.process_index)  # each rank has dropout of its own
    run = identity(
        config,
        model=base_fingerprint(resolve_name(config.model_name_or_path), getattr(model.config, "_commit_hash", None)),
        data=train.fingerprint,
        global_batch_size=config.batch(accelerator.num_processes),
        # What stands beside a global batch is only how it is laid out.
        batch_per_process=per_process or start.run.get("batch_per_process"),
        needed=needed,
        examples=len(train),
        tokens=int(train.lengths.sum()),
        bf16=bf16,
    )
    trainer = Trainer(config, runtime, tokenizer, train, evaluation, output_dir=output_dir, run=run)
    if start.folder:
        changed = refuse_changes(start.folder, trainer.run, allowed=config.resume_changes)
        start = replace(start, notes=(*start.notes, *(f"changed, as allowed: {change}" for change in changed)))
    if accelerator.is_main_process and accelerator.num_processes > 1 and config.packing != "none":
        print(
            f"packing: {config.packing}; {trainer.loader.imbalance():.1%} between the longest rank and the mean",
            flush=True,
        )
    return Session(config, runtime, tokenizer, trainer, output_dir, start)


def _batch_per_process(config: TrainConfig) -> int | None:
    """Examples of one process in a step, where that is what the recipe says."""
    if config.global_batch_size:
        return None
    return config.per_device_train_batch_size * (config.gradient_accumulation_steps or 1)


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


def _prepare_environment(config: TrainConfig, output_dir: Path) -> None:
    transformers_logging.disable_progress_bar()  # of reading weights, once for each rank
    if "wandb" in config.report_to:
        os.environ.setdefault("WANDB_DIR", str(output_dir))
        if config.wandb_project:
            os.environ["WANDB_PROJECT"] = config.wandb_project


def _one_line(text: str) -> str:
    return " / ".join(line for line in text.splitlines() if line.strip())
