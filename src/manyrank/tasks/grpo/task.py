"""GRPO in the loop of SFT: a step's prompts are answered, the answers rewarded, and what was better than its group learned.

    rows -> prompt (all before the last answer), reference (that answer)
    step k -> batch / num_generations prompts -> num_generations answers each, dealt to ranks -> `rollout` -> loss

Checkpoints, signals, watchdog, metrics and callbacks are `trainer`'s. Group relative policy optimisation is by Shao et
al. 2024 (arXiv 2402.03300); what is computed is trl's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ...chat_template.render import render_options
from ...config.resolve import TrainConfig
from ...data.dataset import Examples
from ...data.loader import MicroBatch, epoch_order
from ...data.questions import Question, prompt_of, read_questions
from ...data.rewards import read_rewards, rewarded, scorers
from ...data.scores import SCORES
from ...errors import UserError
from ...models.load import evaluation_mode
from ...parallel.engine import Engine
from ...runs import logs
from ...training.trainer import Trainer
from .rollout import Policy

SHOWN = 4  # answers that a line of metrics keeps


@dataclass
class PromptStep:
    """One optimizer step: the questions that this rank answers, and counts over all ranks, known once it has.

    Attributes:
        numbers: of the questions, once for each answer.
        micro_batches: the rows, for each part of the step the same: trl shuffles the answers.
    """

    numbers: list[int]
    micro_batches: list[MicroBatch]
    examples: int
    supervised: int = 0
    tokens: int = 0
    computed_tokens: int = 0
    sum_squared_lengths: int = 0


@dataclass(frozen=True)
class PromptLoader:
    """Deals the prompts of each step to ranks, each as often as it is answered.

    Attributes:
        batch_size: answers to one step, over all ranks. micro_batch_size: those that a process forwards at once.
        seed: of the order; None for the order of the file.
    """

    examples: Examples
    batch_size: int
    micro_batch_size: int
    answers: int
    rank: int
    ranks: int
    seed: int | None

    @cached_property
    def keys(self) -> list[tuple[str, int]]:
        """Of each example, the source and the number of its row."""
        return self.examples.keys()

    @property
    def accumulation(self) -> int:
        return self.batch_size // (self.micro_batch_size * self.ranks)

    @property
    def prompts(self) -> int:
        """To a step."""
        return self.batch_size // self.answers

    @property
    def steps_per_epoch(self) -> int:
        """Every row is answered in an epoch; its last step is filled up with its first rows."""
        return -(-len(self._order(0)) // self.prompts)

    def step(self, number: int) -> PromptStep:
        """The step of this number, counted from 0 over all epochs."""
        epoch, turn = divmod(number, self.steps_per_epoch)
        order = np.resize(self._order(epoch), self.steps_per_epoch * self.prompts)
        chosen = np.repeat(order[turn * self.prompts : (turn + 1) * self.prompts], self.answers)
        mine = chosen.reshape(self.ranks, -1)[self.rank].tolist()
        rows = [self.keys[at] for at in dict.fromkeys(mine)]
        nothing = torch.empty(0, dtype=torch.long)
        return PromptStep(mine, [MicroBatch({}, nothing, nothing, rows)] * self.accumulation, len(chosen))

    def _order(self, epoch: int) -> np.ndarray:
        return np.arange(len(self.examples)) if self.seed is None else epoch_order(self.examples, self.seed, epoch)


def questions_of(
    examples: Examples,
    evaluation: Examples | None,
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
) -> tuple[Examples, Examples | None, list[Question]]:
    """The examples that have a question, training first, and the question of each by its number in both.

    Args:
        context: the most tokens that the model reads at once, where that is known.

    Raises:
        UserError: no row has one, or one has what cannot be answered or rewarded.
    """
    parts, found = [], []
    for part, sources in ((examples, config.data_path), (evaluation, config.eval_data_path or config.data_path)):
        if part is None:
            parts.append(None)
            continue
        keys = part.keys()
        known = read_questions(sources, config, keys)
        first = {key: at for at, key in reversed(list(enumerate(keys)))}  # a row that was split is asked once
        kept = [at for at, key in enumerate(keys) if key in known and first[key] == at]
        if not kept:
            what = "no row has an answer in words, and something said before it"
            raise UserError(what, where="data_path", fix="give conversations, or questions with answers")
        parts.append(part.take(np.array(kept)))
        found += [known[keys[at]] for at in kept]
    for question in found:
        if question.tools or question.documents:
            what = "grpo answers no rows with tools or documents"
            raise UserError(what, where=question.place, fix="leave such rows out")
    found = [replace(question, prompt=_plain(question.prompt)) for question in found]
    _check_questions(found, config, tokenizer, context)
    return parts[0], parts[1], found


def fingerprint(questions: Sequence[Question]) -> str:
    """Of all that rewards may look at."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps(question.row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


def _plain(prompt: list[dict]) -> list[dict]:
    return [{key: value for key, value in message.items() if key != "weight"} for message in prompt]


def _check_questions(
    questions: Sequence[Question], config: TrainConfig, tokenizer: PreTrainedTokenizerBase, context: int | None
) -> None:
    """See before anything is answered that each prompt has room for an answer, and each reference can be compared.

    Raises:
        UserError: one is not so.
    """
    rewards = [reward for reward in read_rewards(config.rewards) if reward.kind in SCORES]
    scores, options = scorers(rewards), render_options(config)
    for question in questions:
        for reward in rewards:
            rewarded(
                reward,
                scores[reward.name],
                question.reference,
                question.reference,
                question.row,
                place=question.place,
                on_error=config.on_reward_error,
            )
        length = len(prompt_of(question, tokenizer, options))
        if context and length + config.max_completion_length > context:
            what = f"a prompt of {length:,} tokens and an answer of {config.max_completion_length:,} do not fit"
            fix = "lower max_completion_length, or leave the row out"
            raise UserError(f"{what} into the model's {context:,}", where=question.place, fix=fix)


def trainer_of(
    model: torch.nn.Module,
    config: TrainConfig,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    bf16: bool,
) -> tuple[Callable[..., PolicyTrainer], str]:
    """What makes the trainer, with trl's part, before the strategy wraps the model; and the fingerprint of the questions.

    Raises:
        UserError: the vLLM server cannot be reached.
    """
    per_rank = config.batch(accelerator.num_processes) // accelerator.num_processes
    try:
        policy = Policy(
            model,
            config,
            accelerator=accelerator,
            tokenizer=tokenizer,
            questions=questions,
            rewards=read_rewards(config.rewards),
            accumulation=per_rank // config.per_device_train_batch_size,
            bf16=bf16,
        )
    except ConnectionError as error:
        fix = "start it (trl vllm-serve), or fix vllm_server_base_url"
        raise UserError(f"the vLLM server: {error}", where="vllm_server_base_url", fix=fix) from None
    return partial(PolicyTrainer, policy=policy), fingerprint(questions)


class PolicyTrainer(Trainer):
    """The loop of `trainer`, whose steps are answers."""

    def __init__(self, config: TrainConfig, engine: Engine, *args, policy: Policy, **kwargs) -> None:
        self.policy, self.rewards = policy, read_rewards(config.rewards)
        super().__init__(config, engine, *args, **kwargs)
        policy.join(engine.wrapped)
        # trl's generate calls the model past its wrapper, where FSDP2 wants the root to have run before.
        with torch.no_grad():
            self._forward_little()
        engine.reshard()

    def _open_loss(self, loss) -> None:
        if loss:
            raise UserError("a loss of one's own with grpo", where="loss", fix="leave it out: give rewards")

    def _loader(self, examples: Examples, micro_batch: int, batch: int, seed: int | None) -> PromptLoader:
        answers = self.config.num_generations
        return PromptLoader(
            examples=examples,
            batch_size=self.batch_size,
            micro_batch_size=self.config.per_device_train_batch_size,
            answers=answers,
            rank=self.engine.accelerator.process_index,
            ranks=self.world,
            seed=seed,
        )

    def _forward_backward(self, step: PromptStep) -> list[torch.Tensor]:
        self._in_phase("answering")
        with self.engine.whole():
            parts = self.policy.answer(step.numbers, step=self.state.global_step)
        self._count(step, parts)
        losses = []
        for index, inputs in enumerate(parts):
            last = index + 1 == len(parts)
            self._in_phase(f"forward and backward of micro-batch {index + 1}")
            with self.engine.forward_backward(last=last):
                loss = self.policy.loss(inputs, micro_batches=len(parts))
                self.engine.backward(loss, last=last)  # every strategy averages over ranks, as trl's loss wants it
            losses.append(loss.detach().float())
        return losses

    def _divisor(self, step: PromptStep) -> int:
        return self.world

    def _count(self, step: PromptStep, parts: list[dict]) -> None:
        lengths = torch.cat([part["prompt_mask"].sum(1) + part["completion_mask"].sum(1) for part in parts]).double()
        answers = sum(part["completion_mask"].sum() for part in parts)
        computed_tokens = sum(part["prompt_ids"].numel() + part["completion_ids"].numel() for part in parts)
        counts = torch.stack(
            [answers.double(), lengths.sum(), lengths.new_tensor(float(computed_tokens)), (lengths**2).sum()]
        )
        counted = self.engine.sum(counts).tolist()
        step.supervised, step.tokens, step.computed_tokens, step.sum_squared_lengths = map(round, counted)

    def _measured(self, result) -> dict[str, float]:
        self._keep_answers()
        return {**super()._measured(result), **self.policy.measured()}

    def _keep_answers(self) -> None:
        """The last step's first answers, for the report."""
        if not self.main:
            return
        lines = [{"step": self.state.global_step, **asdict(said)} for said in self.policy.said(SHOWN)]
        with logs.warn_on_write_error():
            logs.append_lines(self.output_dir / "logs" / logs.COMPLETIONS, map(json.dumps, lines))

    def evaluate(self) -> dict[str, float]:
        """The mean rewards of one group of answers to each validation prompt; the same draws every time."""
        loader, first = self.eval_loader, len(self.loader.examples)
        total = dict.fromkeys((reward.name for reward in self.rewards), 0.0)
        with evaluation_mode(self.engine.wrapped), self._draws_of_its_own():
            for turn in range(loader.steps_per_epoch):
                self._in_phase(f"step {turn + 1} of the validation")
                numbers = [first + number for number in loader.step(turn).numbers]
                with self.engine.whole():
                    self.policy.answer(numbers, step=self.state.global_step)
                real = min(loader.prompts, len(loader.examples) - turn * loader.prompts)  # the last step is filled up
                for name, values in self.policy.validated(real * loader.answers).items():
                    total[name] += sum(values)
        means = {name: value / (len(loader.examples) * loader.answers) for name, value in total.items()}
        summed = sum(reward.weight * means[reward.name] for reward in self.rewards)
        return {"eval_reward": summed, **{f"eval_rewards/{name}/mean": value for name, value in means.items()}}

    @contextlib.contextmanager
    def _draws_of_its_own(self) -> Iterator[None]:
        """Validation takes nothing from the generators of the training."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.config.seed + self.engine.accelerator.process_index)
            yield

    def _task_state(self) -> dict:
        return self.policy.unmeasured

    def _restore_task(self, state: dict) -> None:
        self.policy.unmeasured = state

    def _zero_step(self) -> None:
        """Forward and backward of a loss that is exactly zero."""
        with self.engine.forward_backward(last=True):
            self.engine.backward(self._forward_little().float().sum() * 0.0, last=True)

    def _forward_little(self) -> torch.Tensor:
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        return self.engine.wrapped(input_ids=ids, use_cache=False).logits
