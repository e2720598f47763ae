"""What each process of an evaluation does: load each model once, and write what it makes of this process's rows."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ...chat_template.render import render_options
from ...config.schema import TrainConfig
from ...data.dataset import Examples, prepare
from ...data.questions import Key, Question, read_questions
from ...data.scores import row_scores
from ...errors import UserError
from ...models.generation import Sampling
from ...models.inference import load_model
from ...topology import gpus as hardware
from ...topology.ranks import Topology
from ...training.evaluation import Asked, Entry, Layout, add_answers, add_losses, check_references
from . import harness
from .contestants import Contestant, Load

LOSS = ("loss", "perplexity")


class Process:
    """One process of an evaluation.

    Args:
        options: of the command line, see `evaluate`.
        config: how rows are read; None where only tasks are run.
        folder: where it writes.
    """

    def __init__(self, options: argparse.Namespace, config: TrainConfig | None, place: Topology, folder: Path) -> None:
        self.options, self.config, self.place, self.folder = options, config, place, folder
        names = [name for name in options.metrics or options.default_metrics if name not in LOSS]
        self.wants_loss = not options.metrics or any(name in LOSS for name in options.metrics)
        sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.top_k, options.seed)
        render = render_options(config) if config else None
        self.asked = Asked(sampling, render, row_scores(names))
        self.layout = Layout(options.batch_size, place)
        self.notes: dict[str, None] = {}  # in order, once each
        self.tasks: dict[str, dict] = {}
        self.told: set[Key] = set()  # rows whose question is written

    def run(self, loads: list[Load]) -> None:
        """Evaluate every model.

        Raises:
            UserError: a model or the data cannot be loaded, or a row cannot be evaluated.
        """
        transformers_logging.disable_progress_bar()  # of reading weights
        if not self.place.is_main:
            transformers_logging.set_verbosity_error()  # what all would say alike
        for load in loads:
            self._one(load)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self._write(f"tasks-{self.place.rank:05d}.json", self.tasks)
        if self.place.is_main:
            self._write("notes.json", {"notes": list(self.notes)})

    def _write(self, name: str, content: dict) -> None:
        (self.folder / name).write_text(json.dumps(content), encoding="utf-8")

    def _one(self, load: Load) -> None:
        options, config = self.options, self.config
        own_template = load.artifact.adapter and load.artifact.tokenizer != load.artifact.base
        template = options.chat_template or (config.chat_template if config and not own_template else None)
        device = f"cuda:{self.place.local_rank}" if hardware.probe().gpus else "cpu"
        model, tokenizer = load_model(
            load.artifact,
            quantization=options.quantization,
            dtype=options.dtype,
            device=device,
            chat_template=template,
            trust_remote_code=config.trust_remote_code if config else str(options.trust_remote_code).lower() == "true",
        )
        examples = prepare(config.data_path, tokenizer, config) if config else None
        questions = self._questions(examples) if examples else []
        for contestant in load.models:
            started = time.perf_counter()
            with _weights_of(model, contestant, load):
                self._evaluate(model, tokenizer, contestant, examples, questions)
            if self.place.is_main:
                print(f"{contestant.label}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)

    def _questions(self, examples: Examples) -> list[Question]:
        """The rows that are answered, in the order of the sources."""
        self.notes[f"data: {examples.describe()}"] = None
        if not self.asked.scores:
            return []
        keys = list(dict.fromkeys(examples.keys()))
        found = read_questions(self.config.data_path, self.config, keys)
        if not found and self.options.metrics:
            fix = "these have only a loss: --metrics loss"
            raise UserError("no row has an answer in words", where=examples.paths[0], fix=fix)
        if len(found) < len(keys):
            self.notes[f"{len(keys) - len(found):,} rows have no answer in words (text, tool calls): not answered"] = (
                None
            )
        questions = [found[key] for key in keys if key in found]
        check_references(questions, self.asked)
        return questions

    def _evaluate(
        self, model, tokenizer: PreTrainedTokenizerBase, contestant: Contestant, examples: Examples | None, questions
    ) -> None:
        entries: dict[Key, Entry] = {}
        if examples and self.wants_loss:
            add_losses(model, examples, self.layout, entries)
        if questions:
            add_answers(model, tokenizer, questions, self.asked, self.layout, entries)
        self._write_entries(contestant, entries, {question.key: question for question in questions})
        tasks = self.options.tasks[self.place.rank :: self.place.world_size]
        if tasks:
            self.tasks[contestant.label] = harness.run(
                model,
                tokenizer,
                tasks,
                folders=self.options.tasks_folder,
                shots=self.options.shots,
                limit=self.options.limit,
                chat=bool(tokenizer.chat_template) and not self.options.no_chat,
                batch_size=self.options.batch_size,
                seed=self.options.seed,
            )

    def _write_entries(self, contestant: Contestant, entries: dict[Key, Entry], questions: dict[Key, Question]) -> None:
        rank = f"{self.place.rank:05d}"
        with self._appended(f"part-{rank}.jsonl") as file:
            for entry in entries.values():
                file.write(json.dumps({"model": contestant.label, **asdict(entry)}) + "\n")
        with self._appended(f"questions-{rank}.jsonl") as file:
            for key in entries.keys() & questions.keys() - self.told:
                asked = questions[key]
                line = {"key": key, "place": asked.place, "prompt": asked.prompt, "reference": asked.reference}
                file.write(json.dumps(line, default=str) + "\n")
                self.told.add(key)

    def _appended(self, name: str):
        return (self.folder / name).open("a", encoding="utf-8")


@contextlib.contextmanager
def _weights_of(model, contestant: Contestant, load: Load) -> Iterator[None]:
    """The base of an adapter is the same weights with the adapter off."""
    if load.artifact.adapter and not contestant.adapter:
        with model.disable_adapter():
            yield
    else:
        yield
