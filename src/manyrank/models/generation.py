"""Answers to many prompts at once: sorted by length, padded on the left, with a key-value cache.

    prompts, longest first     [p p p p p p]  [. p p p p p]  [p p p]  [. p p]
                               └── batch ──────────────┘     └── batch ─────┘
    answers                     a a a stop     a a a a a ... length

`transformers.generate` does the work. What a row is answered depends on its prompt, the seed and its number alone: not on
the batch that it is in, its place there, or the number of processes (but for the rounding of the model's arithmetic).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from ..errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Sampling of completions.

    Attributes:
        max_new_tokens: most tokens of an answer.
        temperature: 0: always the most likely token (greedy), which the other values do not change.
        top_p: the smallest set of tokens that has this much probability.
        top_k: at most so many tokens; 0: all.
        seed: with the number of a row, the seed of its draws.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = {
            "max_new_tokens": self.max_new_tokens < 1,
            "temperature": not 0 <= self.temperature < float("inf"),
            "top_p": not 0 < self.top_p <= 1,
            "top_k": self.top_k < 0,
            "seed": self.seed < 0,
        }
        for name, is_wrong in wrong.items():
            if is_wrong:
                fix = "tokens from 1, temperature from 0, top_p in (0, 1], top_k and seed from 0"
                raise UserError(f"{name} {getattr(self, name)} is out of range", where=f"--{name}", fix=fix)


@dataclass(frozen=True)
class Completion:
    """The completion of a row.

    Attributes:
        number: of the row.
        tokens: the answer, without the token that ended it.
        finish: "stop": ended by a stop token; "length": cut at max_new_tokens or at the model's longest context.
    """

    number: int
    tokens: list[int]
    finish: Literal["stop", "length"]


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    stops: Collection[int],
    pad_token: int,
    batch_size: int,
    numbers: Sequence[int] | None = None,
) -> Iterator[list[Completion]]:
    """Answer every prompt, and yield each batch as it is done, longest prompts first.

    Args:
        model: in evaluation mode, with an attention that knows a cache; may have adapters of peft.
        prompts: token ids of each row, without padding.
        stops: tokens that end an answer, see `render.stop_ids`.
        pad_token: any id; padding is masked.
        batch_size: most rows at once.
        numbers: of the rows, where `prompts` is a part of more; None: 0, 1, 2, ...

    Raises:
        UserError: a prompt is empty, or leaves no room in the model's context.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    stops = {token for token in stops if token is not None}  # some tokenizers have no end of text
    room = _room(model, prompts, numbers, sampling.max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), numbers[row]))
    for rows in _batches(order, prompts, room, batch_size, context_length(model.config)):
        outputs = _batch(
            model,
            [prompts[row] for row in rows],
            [numbers[row] for row in rows],
            sampling=sampling,
            stops=stops,
            pad_token=pad_token,
            most=max(room[row] for row in rows),
        )
        yield [_answer(numbers[row], tokens[: room[row]], stops) for row, tokens in zip(rows, outputs)]


def stream(
    model: PreTrainedModel,
    prompt: Sequence[int],
    *,
    sampling: Sampling,
    stops: Collection[int],
    pad_token: int,
    streamer: BaseStreamer,
    stopped: Callable[[], bool],
    number: int = 0,
) -> Completion:
    """Answer one prompt, as `generate` does, and hand every token over as it comes.

    Args:
        streamer: gets the prompt first, then each token, the one that ends the answer too.
        stopped: asked after each token; True ends the answer there.

    Raises:
        UserError: the prompt is empty, or leaves no room in the model's context.
    """
    stops = {token for token in stops if token is not None}
    room = _room(model, [prompt], [number], sampling.max_new_tokens)[0]
    ending = StoppingCriteriaList([_Asks(stopped)])
    outputs = _batch(
        model,
        [prompt],
        [number],
        sampling=sampling,
        stops=stops,
        pad_token=pad_token,
        most=room,
        streamer=streamer,
        stopping_criteria=ending,
    )
    return _answer(number, outputs[0], stops)


class _Asks(StoppingCriteria):
    """Ends an answer when somebody wishes it."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stopped(), dtype=torch.bool, device=input_ids.device)


def context_length(config: PreTrainedConfig) -> int | None:
    """The most tokens that a model reads at once, where its config says so."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _batches(order: list[int], prompts, room: list[int], size: int, context: int | None) -> Iterator[list[int]]:
    """Rows to answer together: with the padding of the longest, none is answered beyond the context."""
    rows: list[int] = []
    for row in order:
        if rows and (len(rows) == size or (context and len(prompts[rows[0]]) + room[row] > context)):
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def _room(model, prompts: Sequence[Sequence[int]], numbers: Sequence[int], limit: int) -> list[int]:
    """The most tokens of each answer, at most `limit`."""
    context = context_length(model.config)
    room = [min(limit, context - len(prompt)) if context else limit for prompt in prompts]
    for prompt, number, left in zip(prompts, numbers, room):
        if not len(prompt):
            raise UserError("the prompt is empty", where=f"row {number}", fix="give a prompt")
        if left < 1:
            what = (
                f"a prompt of {len(prompt):,} tokens leaves no room for an answer: the model's context is {context:,}"
            )
            raise UserError(what, where=f"row {number}", fix="leave the row out, or shorten it")
    return room


@torch.no_grad()
def _batch(
    model,
    prompts: list[Sequence[int]],
    numbers: list[int],
    *,
    sampling: Sampling,
    stops,
    pad_token: int,
    most: int,
    **more,
) -> list[list[int]]:
    """Complete each prompt with up to `most` tokens; with padding after the end. `more` is for `generate`."""
    width, device = max(map(len, prompts)), next(model.parameters()).device
    ids = torch.full((len(prompts), width), pad_token)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    config = GenerationConfig(
        max_new_tokens=most, do_sample=False, eos_token_id=sorted(stops) or None, pad_token_id=pad_token
    )
    with _own_settings_aside(model):
        outputs = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            logits_processor=_processors(sampling, numbers, width, device),
            **more,
        )
    return outputs[:, width:].tolist()


def _answer(number: int, tokens: list[int], stops: Collection[int]) -> Completion:
    end = next((place for place, token in enumerate(tokens) if token in stops), None)
    return Completion(number, tokens[:end], "length" if end is None else "stop")


@contextlib.contextmanager
def _own_settings_aside(model) -> Iterator[None]:
    """`generate` adds what the model's generation_config.json has (a repetition penalty, top_k) to what it is asked for."""
    holders = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    before = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for holder, config in zip(holders, before):
            holder.generation_config = config


def _processors(sampling: Sampling, numbers: list[int], width: int, device: torch.device) -> LogitsProcessorList:
    """List what turns scores into a draw; nothing for greedy completions."""
    if not sampling.temperature:
        return LogitsProcessorList()
    processors = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(float(sampling.top_p)))
    draws = [np.random.default_rng([sampling.seed, number]).random(sampling.max_new_tokens) for number in numbers]
    return LogitsProcessorList([*processors, _Draw(torch.as_tensor(np.stack(draws)).to(device), width)])


class _Draw(LogitsProcessor):
    """Draws a token of each row by inverting the distribution function at the row's own number, and leaves only that.

    Args:
        uniform: (rows, max_new_tokens), in [0, 1).
        width: tokens of the padded prompts.
    """

    def __init__(self, uniform: torch.Tensor, width: int) -> None:
        self.uniform, self.width = uniform, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        upto = scores.softmax(-1, dtype=torch.float32).cumsum(-1, dtype=torch.float64)
        at = self.uniform[:, input_ids.shape[1] - self.width, None] * upto[:, -1:]
        # The first token beyond the number: one without probability is never that.
        token = torch.searchsorted(upto, at, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
