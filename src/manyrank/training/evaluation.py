"""Evaluate one model on the rows of a data set: the loss of each row, and its completion with scores.

The loss is the training's own (`data`, `loss`): the same tokens, the same mask. The rows are laid out in batches, longest
first, and whole batches are dealt to the processes, so that a row is computed in the same company on any number of them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedTokenizerBase

from ..chat_template.render import RenderOptions, stop_ids
from ..data.dataset import Examples
from ..data.loader import side_by_side, trial
from ..data.questions import Key, Question, prompt_of
from ..data.scores import SCORES, RowScore, scored, spoken
from ..errors import UserError
from ..models import flash
from ..models.attention import use_packed_attention
from ..models.generation import Sampling, context_length, generate
from ..topology.ranks import Topology
from .loss import TokenLoss
from .packing_trial import prove_packing


@dataclass
class RowResult:
    """The loss and the answer of one model for one row.

    Attributes:
        key: the row. loss: the sum over its supervised tokens, in nats. tokens: their number.
        answer: in words. finish: "stop" or "length", or "no room": the prompt fills the model's context.
        scores: of the answer, by metric.
    """

    key: Key
    loss: float | None = None
    tokens: int = 0
    answer: str | None = None
    finish: str | None = None
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """Layout of rows in batches, and of batches on processes."""

    batch_size: int
    place: Topology

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Lay out the batches of this process, of positions in `lengths`; longest first, spread evenly where they are few."""
        ranks = self.place.world_size
        size = max(1, min(self.batch_size, -(-len(lengths) // ranks)))
        order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
        batches = [order[at : at + size] for at in range(0, len(order), size)]
        return batches[self.place.rank :: ranks]


def add_losses(model, examples: Examples, layout: Layout, entries: dict[Key, RowResult]) -> None:
    """Add the loss of each of this process's rows to its entry.

    Raises:
        UserError: a loss is no number.
    """
    device = next(model.parameters()).device
    with _packed(model) as packed, torch.no_grad():
        token_loss = TokenLoss(model)
        micro = trial(packed=packed).to(device)
        token_loss.prove(micro.inputs, micro.positions, micro.targets)
        for batch in layout.batches(examples.lengths.tolist()):
            for members in [batch] if packed else [[one] for one in batch]:
                _add_batch(token_loss, examples, members, entries, device, packed=packed)
        if token_loss.head:
            token_loss.head.release()


def _add_batch(token_loss: TokenLoss, examples: Examples, members: list[int], entries, device, *, packed: bool) -> None:
    micro = side_by_side([examples[member] for member in members])
    if not packed:
        micro = replace(micro, inputs={"input_ids": micro.inputs["input_ids"]})
    micro, counts = micro.to(device), examples.supervised[members].tolist()
    losses = token_loss(micro.inputs, micro.positions, micro.targets, rows=counts).tolist()
    for key, loss, count in zip(micro.rows, losses, counts):
        if not math.isfinite(loss):
            fix = "look at the row, or load the model in float32 (--dtype float32)"
            raise UserError(f"the loss is {loss}", where=f"{key[0]}, row {key[1]}", fix=fix)
        entry = entries.setdefault(key, RowResult(key))  # a row that was split has several examples
        entry.loss, entry.tokens = (entry.loss or 0.0) + loss, entry.tokens + count


@contextlib.contextmanager
def _packed(model) -> Iterator[bool]:
    """Rows side by side while this lasts; False where the model's layers cannot hold them apart."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    try:
        use_packed_attention(base)
        prove_packing(model, model, exact=model.dtype == torch.float32)
    except UserError:
        base.set_attn_implementation(before)
        flash.restore()
        yield False
        return
    try:
        yield True
    finally:
        base.set_attn_implementation(before)
        flash.restore()


@dataclass(frozen=True)
class GenerationRequest:
    """Sampling, rendering and scores of an evaluation's completions."""

    sampling: Sampling
    options: RenderOptions
    scores: dict[str, RowScore]


def add_answers(
    model,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    request: GenerationRequest,
    layout: Layout,
    entries: dict[Key, RowResult],
) -> None:
    """Answer this process's questions, and add each answer with its scores to the row's entry.

    Args:
        questions: of all processes, in the order of the rows, whose places are the numbers of their draws.

    Raises:
        UserError: a row cannot be made a prompt, or a metric cannot score it.
    """
    prompts = [prompt_of(question, tokenizer, request.options) for question in questions]
    rows = [row for batch in layout.batches(list(map(len, prompts))) for row in batch]
    context = context_length(model.config) or math.inf
    fitting = [row for row in rows if len(prompts[row]) < context]
    for row in set(rows) - set(fitting):
        _add_answer(entries, questions[row], "", "no room", request)
    size = max(1, min(layout.batch_size, -(-len(questions) // layout.place.world_size)))
    batches = generate(
        model,
        [prompts[row] for row in fitting],
        sampling=request.sampling,
        stops=stop_ids(tokenizer, request.options),
        pad_token=tokenizer.pad_token_id,
        batch_size=size,
        numbers=fitting,
    )
    for answer in (answer for batch in batches for answer in batch):
        text = tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
        _add_answer(entries, questions[answer.number], text, answer.finish, request)


def check_references(questions: Sequence[Question], request: GenerationRequest) -> None:
    """Check before anything is answered that each reference is one that the project's own metrics can score.

    Raises:
        UserError: one is not, such as one without a number for `numeric`.
    """
    for question in questions:
        reference = spoken(question.reference)
        for name, score in request.scores.items():
            if name in SCORES:
                scored(name, score, reference, reference, question.row, place=question.place)


def _add_answer(
    entries: dict[Key, RowResult], question: Question, text: str, finish: str, request: GenerationRequest
) -> None:
    entry = entries.setdefault(question.key, RowResult(question.key))
    entry.answer, entry.finish = text, finish
    answer, reference = spoken(text), spoken(question.reference)
    entry.scores = {
        name: scored(name, score, answer, reference, question.row, place=question.place)
        for name, score in request.scores.items()
    }
