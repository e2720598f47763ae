"""The work of each process of an evaluation: load each model once, compute this process's rows, and gather on rank 0.

    rank 0   base: its batches   adapter on: its batches   benchmarks: its tasks ──┐
    rank 1   ...                                                                  ─┴─> rank 0: EvaluationData

Each process holds the whole model, and none waits for another before the end.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from dataclasses import dataclass, field, replace
from datetime import timedelta

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
from ...topology import gpus
from ...topology.ranks import Topology
from ...topology.torch_gpus import use_gpu
from ...training.evaluation import GenerationRequest, Layout, RowResult, add_answers, add_losses, check_references
from . import lm_eval
from .options import EvaluateOptions
from .plan import Weights

LOSS = ("loss", "perplexity")
DEFAULT_METRICS = ("loss", "normalised", "f1")
LONGEST_WAIT = timedelta(days=30)  # of a process that is done for one that is not


@dataclass
class EvaluationData:
    """The losses, answers and benchmarks of all models.

    Attributes:
        entries: by the model's label, by row. tasks: by label, the metrics of each benchmark.
        questions: by row. notes: about the data, in order, once each. Both are complete on every rank.
    """

    entries: dict[str, dict[Key, RowResult]] = field(default_factory=dict)
    tasks: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    questions: dict[Key, Question] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)


class Worker:
    """One process of an evaluation.

    Args:
        options: of the command line, see `main`.
        config: how rows are read; None where only tasks are run.

    Raises:
        UserError: torch cannot compute on the GPUs.
    """

    def __init__(self, options: EvaluateOptions, config: TrainConfig | None, place: Topology) -> None:
        self.options, self.config, self.place = options, config, place
        self.device = use_gpu(gpus.probe(), place)
        metrics = options.metrics or DEFAULT_METRICS
        self.wants_loss = any(name in LOSS for name in metrics)
        sampling = Sampling(**options.sampling)
        scores = row_scores([name for name in metrics if name not in LOSS])
        self.request = GenerationRequest(sampling, render_options(config) if config else None, scores)
        self.layout = Layout(options.batch_size, place)
        self.data = EvaluationData()

    def run(self, plan: list[Weights]) -> EvaluationData | None:
        """Evaluate every model.

        Returns:
            The data of all processes on rank 0, None on the others.

        Raises:
            UserError: a model or the data cannot be loaded, or a row cannot be evaluated.
        """
        transformers_logging.disable_progress_bar()  # of reading weights
        if not self.place.is_main:
            transformers_logging.set_verbosity_error()  # what all would say alike
        for weights in plan:
            self._load_and_evaluate(weights)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return gather(self.data, self.place)

    def _load_and_evaluate(self, weights: Weights) -> None:
        options, config, artifact = self.options, self.config, weights.artifact
        own_template = artifact.adapter and artifact.tokenizer != artifact.base
        template = options.chat_template or (config.chat_template if config and not own_template else None)
        trusted = config.trust_remote_code if config else options.trust_remote_code
        model, tokenizer = load_model(
            artifact,
            quantization=options.quantization,
            dtype=options.dtype,
            device=self.device,
            chat_template=template,
            trust_remote_code=trusted,
        )
        examples = prepare(config.data_path, tokenizer, config) if config else None
        questions = self._questions(examples) if examples else []
        for evaluated in weights.models:
            started = time.perf_counter()
            is_base = artifact.adapter and not evaluated.adapter  # the same weights with the adapter off
            with model.disable_adapter() if is_base else contextlib.nullcontext():
                self._evaluate(model, tokenizer, evaluated.label, examples, questions)
            if self.place.is_main:
                print(f"{evaluated.label}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)

    def _questions(self, examples: Examples) -> list[Question]:
        """Read the rows that are answered, in the order of the sources."""
        self.data.notes[f"data: {examples.describe()}"] = None
        if not self.request.scores:
            return []
        keys = list(dict.fromkeys(examples.keys()))
        by_key = read_questions(self.config.data_path, self.config, keys)
        if not by_key and self.options.metrics:
            fix = "these have only a loss: --metrics loss"
            raise UserError("no row has a text answer", where=examples.paths[0], fix=fix)
        if without := len(keys) - len(by_key):
            self.data.notes[f"{without:,} rows have no text answer (plain text, tool calls): left out"] = None
        questions = [by_key[key] for key in keys if key in by_key]
        check_references(questions, self.request)
        self.data.questions |= by_key
        return questions

    def _evaluate(
        self, model, tokenizer: PreTrainedTokenizerBase, label: str, examples: Examples | None, questions
    ) -> None:
        options, entries = self.options, self.data.entries.setdefault(label, {})
        if examples and self.wants_loss:
            add_losses(model, examples, self.layout, entries)
        if questions:
            add_answers(model, tokenizer, questions, self.request, self.layout, entries)
        if tasks := options.tasks[self.place.rank :: self.place.world_size]:
            self.data.tasks[label] = lm_eval.run(model, tokenizer, tasks, options)


def gather(data: EvaluationData, place: Topology) -> EvaluationData | None:
    """Bring the data of all processes together on rank 0; None on the others.

    The processes meet here for the first time: what fails before ends its process, and with it the launch.
    """
    if place.world_size == 1:
        return data
    from torch import distributed

    distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
    parts = [None] * place.world_size if place.is_main else None
    distributed.gather_object((data.entries, data.tasks), parts)
    distributed.barrier()  # no process ends while another one still reads from it
    if not parts:
        return None
    for entries, tasks in parts[1:]:
        for label, own in entries.items():
            _merge(data.entries.setdefault(label, {}), own)
        for label, metrics in tasks.items():
            data.tasks.setdefault(label, {}).update(metrics)
    return data


def _merge(entries: dict[Key, RowResult], others: dict[Key, RowResult]) -> None:
    """Add another process's entries: of one row, one may have the loss (or that of a piece) and the other the answer."""
    for key, other in others.items():
        if key not in entries:
            entries[key] = other
            continue
        entry = entries[key]
        losses = [loss for loss in (entry.loss, other.loss) if loss is not None]
        answered = entry if entry.answer is not None else other
        tokens = entry.tokens + other.tokens
        entries[key] = replace(answered, loss=sum(losses) if losses else None, tokens=tokens)
