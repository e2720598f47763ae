"""Rows as questions: what a model is asked, and what the row says is right.

row -> conversation -> prompt: all before the last answer that is to be learned   ->  token ids, up to where it begins
                   '-> reference: that answer
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..chat_template.render import RenderOptions, prompt_ids
from ..chat_template.types import BadRow, Message, is_learned
from ..config.data_source import DataSource
from ..config.resolve import TrainConfig
from ..errors import UserError
from .files import Row
from .formats import Conversation, to_sample
from .sources import Source, known_format, read_rows, source_of

Key = tuple[str, int]  # the path of a source, and the number of a row in it


@dataclass(frozen=True)
class Question:
    """A row to be answered.

    Attributes:
        key: of the row. place: the same for people.
        row: as the file has it.
        prompt: the messages before the answer.
        reference: the answer that the row has.
    """

    key: Key
    place: str
    row: Mapping[str, Any]
    prompt: list[Message]
    reference: str
    tools: list[dict] | None = None
    documents: list[dict] | None = None


def read_questions(sources: Sequence[DataSource], config: TrainConfig, wanted: Iterable[Key]) -> dict[Key, Question]:
    """The questions of these rows; rows without an answer in words (plain text, a call of a tool) have none.

    Raises:
        UserError: a source cannot be read.
    """
    wanted, questions = set(wanted), {}
    for source in (known_format(source_of(source, config)) for source in sources):
        last = max((number for path, number in wanted if path == source.path), default=0)
        for row in islice(read_rows(source), last):  # a row's number is its place, or beyond it
            key = (source.path, row.number)
            if key in wanted and (question := _question(key, row, source)):
                questions[key] = question
    return questions


def prompt_of(question: Question, tokenizer: PreTrainedTokenizerBase, options: RenderOptions) -> list[int]:
    """Token ids up to where the answer begins.

    Raises:
        UserError: the template refuses the row.
    """
    try:
        return prompt_ids(
            tokenizer, question.prompt, tools=question.tools, documents=question.documents, options=options
        )
    except BadRow as problem:
        fix = "fix the row, or choose a chat template that knows such rows: --chat_template"
        raise UserError(str(problem), where=question.place, fix=fix) from None


def _question(key: Key, row: Row, source: Source) -> Question | None:
    try:
        sample = to_sample(row.readable(), source.format_type, source.columns)
    except BadRow:
        return None
    if not isinstance(sample, Conversation):
        return None
    messages = sample.messages
    learned = [at for at, message in enumerate(messages) if message["role"] == "assistant" and is_learned(message)]
    last = messages[learned[-1]] if learned else {}
    if not learned or not learned[-1] or last.get("tool_calls") or not (last.get("content") or "").strip():
        return None
    return Question(key, row.place, row.value, messages[: learned[-1]], last["content"], sample.tools, sample.documents)
