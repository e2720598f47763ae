"""GRPO: a step's prompts are completed, the completions rewarded, and what was better than its group is learned.

    rows -> prompt (all before the last answer), reference (that answer)
    step k -> batch / num_generations prompts -> num_generations completions each, dealt to ranks -> `trl_step` -> loss

Group relative policy optimisation is by Shao et al. 2024 (arXiv 2402.03300); what is computed is trl's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ...chat_template.render import render_options
from ...chat_template.types import bare
from ...config.resolve import TrainConfig
from ...data.dataset import Examples
from ...data.questions import Question, prompt_of, read_questions
from ...data.rewards import read_rewards, rewarded, scorers
from ...data.scores import SCORES
from ...errors import UserError
from ...models.adapters import load_adapter
from ...models.load import read_config
from ...runs import artifact, logs
from ...topology.precision import Precision
from ...training.task import StepLoss, Task, UserObjects
from .prompts import PromptLoader, PromptStep
from .trl_step import TrlStep

SHOWN = 4  # completions that a line of metrics keeps


class GRPO(Task):
    """Learns from the rewards of its own completions."""

    def __init__(self, config: TrainConfig, objects: UserObjects) -> None:
        if objects.loss:
            raise UserError("a loss of one's own with grpo", where="loss", fix="leave it out: give rewards")
        if objects.model and config.beta and not config.uses_lora:
            fix = "use adapters, or beta=0: the reference would be loaded from model_name_or_path"
            raise UserError("grpo of a whole model passed from Python", where="model", fix=fix)
        super().__init__(config, objects)
        self.rewards = read_rewards(config.rewards)
        self.questions: list[Question] = []  # of the training examples, then of the validation's
        self.step: PromptStep | None = None  # the last one, and its micro-batches
        self.parts: list[dict] = []
        self.unmeasured: dict[str, list[float]] = {}  # of trl, when these were completed

    @staticmethod
    def rows_needed(config: TrainConfig, batch: int) -> int:
        return -(-batch // config.num_generations)

    # Before the strategy wraps the model

    def select_examples(
        self, train: Examples, evaluation: Examples | None, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Examples, Examples | None]:
        """Keep the examples that have a question: something before an answer in words."""
        train = self._with_questions(train, self.config.data_path)
        if evaluation is not None:
            evaluation = self._with_questions(evaluation, self.config.eval_data_path or self.config.data_path)
        self._check_questions(tokenizer)
        return train, evaluation

    def _with_questions(self, examples: Examples, sources) -> Examples:
        keys = examples.keys()
        questions = read_questions(sources, self.config, keys)
        first = {key: at for at, key in reversed(list(enumerate(keys)))}  # a row that was split is asked once
        numbers = [at for at, key in enumerate(keys) if key in questions and first[key] == at]
        if not numbers:
            what = "no row has a text answer after a prompt"
            raise UserError(what, where="data_path", fix="give conversations, or questions with answers")
        for question in (questions[keys[at]] for at in numbers):
            if question.tools or question.documents:
                what = "grpo cannot use rows with tools or documents"
                raise UserError(what, where=question.place, fix="leave such rows out")
            prompt = [bare(turn) for turn in question.prompt]
            self.questions.append(replace(question, prompt=prompt))
        return examples.take(np.array(numbers))

    def _check_questions(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that each prompt has room for a completion, and each reference can be compared.

        Raises:
            UserError: one is not so.
        """
        rewards = [reward for reward in self.rewards if reward.kind in SCORES]
        scores, options, context = scorers(rewards), render_options(self.config), self._context()
        for question in self.questions:
            for reward in rewards:
                rewarded(
                    reward,
                    scores[reward.name],
                    question.reference,
                    question.reference,
                    question.row,
                    place=question.place,
                    on_error=self.config.on_reward_error,
                )
            length, most = len(prompt_of(question, tokenizer, options)), self.config.max_completion_length
            if context and length + most > context:
                what = f"a prompt of {length:,} tokens and a completion of {most:,} do not fit"
                fix = "lower max_completion_length, or leave the row out"
                raise UserError(f"{what} into the model's {context:,}", where=question.place, fix=fix)

    def _context(self) -> int | None:
        """The most tokens that the model reads at once, where that is known."""
        own = self.objects.model
        shape = own.config.to_dict() if own else read_config(self.config)
        return (shape.get("text_config") or shape).get("max_position_embeddings")

    def prepare_model(
        self,
        model: torch.nn.Module,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        *,
        precision: Precision,
    ) -> None:
        """Load the adapter of `sft_model`, and set up trl's part.

        Raises:
            UserError: the vLLM server cannot be reached.
        """
        if self._sft_adapter:
            load_adapter(model, self._sft_adapter)
        per_rank = self.config.batch(accelerator.num_processes) // accelerator.num_processes
        try:
            self.trl = TrlStep(
                model,
                self.config,
                accelerator=accelerator,
                tokenizer=tokenizer,
                questions=self.questions,
                rewards=self.rewards,
                accumulation=per_rank // self.config.micro_batch,
                precision=precision,
            )
        except ConnectionError as error:
            fix = "start it (trl vllm-serve), or fix vllm_server_base_url"
            raise UserError(f"the vLLM server: {error}", where="vllm_server_base_url", fix=fix) from None

    @property
    def _sft_adapter(self) -> Path | None:
        return artifact.find(self.config.sft_model).adapter if self.config.sft_model else None

    def identity(self) -> dict[str, str | None]:
        """Fingerprints of all that rewards may look at, and of the adapter that the run begins with."""
        rows = hashlib.sha256()
        for question in self.questions:
            rows.update(json.dumps(question.row, sort_keys=True, default=str).encode())
        return {
            "sft_model": artifact.adapter_fingerprint(self._sft_adapter) if self._sft_adapter else None,
            "rows": rows.hexdigest()[:32],
        }

    # With the wrapped model

    def use_engine(self) -> None:
        self.trl.join(self.engine.wrapped)
        # trl's generate calls the model past its wrapper, where FSDP2 wants the root to have run before.
        with torch.no_grad():
            self._forward_little()
        self.engine.reshard()

    def loader(self, examples: Examples, *, training: bool) -> PromptLoader:
        accelerator = self.engine.accelerator
        return PromptLoader(
            examples=examples,
            batch_size=self.config.batch(accelerator.num_processes),
            micro_batch_size=self.config.micro_batch,
            completions=self.config.num_generations,
            rank=accelerator.process_index,
            ranks=accelerator.num_processes,
            seed=self.config.order_seed if training else None,
        )

    def forward_backward(self, step: PromptStep, *, number: int) -> StepLoss:
        if step is not self.step:  # else it is taken again (see GradientOverflow), with the completions that it has
            self.in_phase("generating completions")
            with self.engine.whole():
                self.parts = self.trl.complete(step.numbers, step=number)
            self.step, self.unmeasured = step, self.trl.unmeasured
            self._count(step, self.parts)
        self.trl.unmeasured = self.unmeasured  # without the losses of an attempt that overflowed
        losses, parts = [], self.parts
        for index, inputs in enumerate(parts):
            last = index + 1 == len(parts)
            self.in_phase(f"forward and backward of micro-batch {index + 1}")
            with self.engine.forward_backward(last=last):
                loss = self.trl.loss(inputs, micro_batches=len(parts))
                self.engine.backward(loss, last=last)  # every strategy averages over ranks, as trl's loss wants it
            losses.append(loss.detach().float())
        return StepLoss(losses, self.engine.accelerator.num_processes)

    def _count(self, step: PromptStep, parts: list[dict]) -> None:
        lengths = torch.cat([part["prompt_mask"].sum(1) + part["completion_mask"].sum(1) for part in parts])
        learned = sum(part["completion_mask"].sum() for part in parts)
        computed = sum(part["prompt_ids"].numel() + part["completion_ids"].numel() for part in parts)
        counts = [learned, lengths.sum(), lengths.new_tensor(computed), (lengths**2).sum()]
        counted = self.engine.sum(torch.stack(counts)).tolist()
        step.supervised, step.tokens, step.computed_tokens, step.sum_squared_lengths = counted

    def zero_step(self, step: PromptStep) -> None:
        with self.engine.forward_backward(last=True):
            self.engine.backward(self._forward_little().float().sum() * 0.0, last=True)

    def _forward_little(self) -> torch.Tensor:
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.engine.accelerator.device)
        return self.engine.wrapped(input_ids=ids, use_cache=False).logits

    def evaluate(self, loader: PromptLoader, *, number: int) -> dict[str, float]:
        """The mean rewards of one group of completions of each validation prompt; the same draws every time."""
        rows, first = len(loader.examples), len(self.questions) - len(loader.examples)
        total = dict.fromkeys((reward.name for reward in self.rewards), 0.0)
        with self.engine.evaluating(), self._draws_of_its_own():
            for turn in range(loader.steps_per_epoch):
                self.in_phase(f"step {turn + 1} of the validation")
                numbers = [first + at for at in loader.step(turn).numbers]
                with self.engine.whole():
                    self.trl.complete(numbers, step=number)
                real = min(loader.prompts, rows - turn * loader.prompts)  # the last step is filled up
                for name, values in self.trl.validated(real * loader.completions).items():
                    total[name] += sum(values)
        means = {name: value / (rows * loader.completions) for name, value in total.items()}
        summed = sum(reward.weight * means[reward.name] for reward in self.rewards)
        return {"eval_reward": summed, **{f"eval_rewards/{name}/mean": value for name, value in means.items()}}

    @contextlib.contextmanager
    def _draws_of_its_own(self) -> Iterator[None]:
        """Validation takes nothing from the generators of the training."""
        accelerator = self.engine.accelerator
        with torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []):
            torch.manual_seed(self.config.seed + accelerator.process_index)
            yield

    # Between steps

    def metrics(self, *, number: int) -> dict[str, float]:
        """trl's metrics; the last step's first completions are kept for the report."""
        if self.engine.accelerator.is_main_process:
            lines = [{"step": number, **asdict(record)} for record in self.trl.completion_records(SHOWN)]
            with logs.warn_on_write_error():
                logs.append_lines(self.output_dir / "logs" / logs.COMPLETIONS, map(json.dumps, lines))
        return self.trl.measured()

    def state(self) -> dict:
        return self.trl.unmeasured

    def restore(self, state: dict) -> None:
        self.trl.unmeasured = state
