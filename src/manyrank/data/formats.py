"""One row of a data file, turned into one sample. Pure: no files, no torch.

    question_answer    {"question", "answer", "source"?, "history"?}    the source becomes the answer's last line
    alpaca             {"instruction", "input"?, "output", "history"?}
    sharegpt           {"conversations"} or {"conversation"}
    messages           {"messages"}
    prompt_completion  {"prompt", "completion"}, two texts or lists of messages
    tokens             {"input_ids", "labels"?, "attention_mask"?}
    text               {"text"}

Other names of a question and its answer (QUESTIONS, ANSWERS) are read where each can be one column only. All but the last two
also read system, tools and documents. Further columns of a row are ignored. Where several formats fit, the first of this list is taken. `columns` renames:
{"instruction": "q"} reads the field "instruction" from the column "q"; a row need not have the column "q?". A format can also be a user's function,
"module:function", which turns a row into a row of one of these. How turns are read is in `messages`.
"""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..chat_template.types import IGNORE, BadRow, Message
from ..errors import UserError
from .messages import json_object, listed, name_answers, optional, read_tools, read_turns, refuse_weight, text

Values = dict[str, Any]  # a row
Columns = Mapping[str, str]  # a format's field -> the row's column


@dataclass(frozen=True)
class Conversation:
    """Messages to be rendered by a chat template; at least one is the assistant's.

    Attributes:
        messages: {"role": "system" | "user" | "assistant" | "tool", "content": str}, and where there is one
            "tool_calls": [{"type": "function", "id"?: str, "function": {"name": str, "arguments": dict}}],
            "reasoning_content": str, "weight": 0 | 1 (0: not learned), "prompt": True (of an assistant message in a prompt,
            which is not learned either), "name": str, "tool_call_id": str.
        tools: [{"type": "function", "function": {"name": str, ...}}], the functions that may be called.
        documents: objects for a template that shows documents.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class PlainText:
    """Text without roles; every token is learned."""

    text: str


@dataclass(frozen=True)
class TokenIds:
    """Tokens as they are. `labels` is as long as `input_ids`: the token to learn there, or IGNORE."""

    input_ids: list[int]
    labels: list[int]


Sample = Conversation | PlainText | TokenIds


# Rows with messages


def _conversation(row: Values, messages: list[Message]) -> Conversation:
    """The messages with the row's own system message, tools and documents."""
    system = optional(row.get("system"), "'system'")
    messages = [{"role": "system", "content": system}, *messages] if system else messages
    name_answers(messages)
    if all(message["role"] != "assistant" for message in messages):
        raise BadRow("no assistant turn, so there is nothing to learn", "no assistant turn")
    raw = row.get("documents") or []
    documents = [json_object(document, "a document") for document in (listed(raw, "'documents'") if raw else [])]
    return Conversation(messages, read_tools(row.get("tools")), documents or None)


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _question_answer(row: Values) -> Conversation:
    question, answer = text(row.get("question"), "'question'"), text(row.get("answer"), "'answer'")
    source = optional(row.get("source"), "'source'")
    answer = f"{answer}\n\nSource: {source}" if source else answer
    return _conversation(row, _history(row) + _exchange(question, answer))


def _alpaca(row: Values) -> Conversation:
    instruction, more = text(row.get("instruction"), "'instruction'"), optional(row.get("input"), "'input'")
    question = f"{instruction}\n\n{more}" if more else instruction
    return _conversation(row, _history(row) + _exchange(question, text(row.get("output"), "'output'")))


def _history(row: Values) -> list[Message]:
    messages: list[Message] = []
    for number, pair in enumerate(listed(row["history"], "'history'") if row.get("history") else [], 1):
        name = f"pair {number} of 'history'"
        if len(listed(pair, name)) != 2:
            raise BadRow(f"{name} has {len(pair)} entries, not a question and an answer", "wrong type")
        messages += _exchange(*(text(part, name) for part in pair))
    return messages


def _sharegpt(row: Values) -> Conversation:
    field = "conversation" if row.get("conversations") is None and "conversation" in row else "conversations"
    return _conversation(row, read_turns(row.get(field), field))


def _messages(row: Values) -> Conversation:
    return _conversation(row, read_turns(row.get("messages"), "messages"))


def _prompt_completion(row: Values) -> Conversation:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, str):  # as of trl's data for GRPO, with a solution
        completion = [{"role": "assistant", "content": text(completion, "'completion'")}]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        return _conversation(row, _exchange(text(prompt, "'prompt'"), text(completion, "'completion'")))
    messages = read_turns(prompt, "prompt")
    for number, message in enumerate(messages, 1):
        if message.get("weight"):
            raise BadRow(
                f"turn {number} of 'prompt' is to be learned, and what stands in a prompt never is", "lost field"
            )
        message |= {"prompt": True} if message["role"] == "assistant" else {}
    return _conversation(row, messages + read_turns(completion, "completion"))


# Rows without


def _plain_text(row: Values) -> PlainText:
    return PlainText(text(row.get("text"), "'text'"))


def _tokens(row: Values) -> TokenIds:
    """Token ids; without labels all are learned. Masks and positions other than the trivial ones would be lost."""
    ids = _whole_numbers(row.get("input_ids"), "'input_ids'")
    labels = _whole_numbers(row["labels"], "'labels'", besides=IGNORE) if row.get("labels") is not None else list(ids)
    mask = row.get("attention_mask")
    if len(labels) != len(ids):
        raise BadRow(f"{len(ids)} 'input_ids' but {len(labels)} 'labels'", "lengths differ")
    if mask is not None and _whole_numbers(mask, "'attention_mask'") != [1] * len(ids):
        raise BadRow("'attention_mask' is not a 1 for each token: padding must be left out", "lost field")
    lost = [
        key for key in row if key == "position_ids" or (key.endswith(("_mask", "_masks")) and key != "attention_mask")
    ]
    if lost:
        raise BadRow(f"{', '.join(map(repr, lost))} would be lost: say with 'labels' what is learned", "lost field")
    if all(label == IGNORE for label in labels):
        raise BadRow(f"every label is {IGNORE}, so there is nothing to learn", "nothing to learn")
    return TokenIds(ids, labels)


def _whole_numbers(value: Any, name: str, *, besides: int = 0) -> list[int]:
    """The value, if it is a list of whole numbers from 0, or `besides`."""
    for entry in listed(value, name):
        if type(entry) is not int or (entry < 0 and entry != besides):
            raise BadRow(f"{name} has {entry!r}, which is no token id", "wrong type")
    return list(value)


# Formats


@dataclass(frozen=True)
class Format:
    """A known format.

    Attributes:
        told_by: sets of fields, each of which tells the format.
        also: fields that may be there.
        read: a row to its sample.
    """

    told_by: tuple[frozenset[str], ...]
    also: frozenset[str]
    read: Callable[[Values], Sample]

    @property
    def fields(self) -> frozenset[str]:
        return self.also.union(*self.told_by)

    def fits(self, names: frozenset[str]) -> bool:
        return any(fields <= names for fields in self.told_by)


def _format(read: Callable[[Values], Sample], told_by: str, also: str = "") -> Format:
    return Format(tuple(frozenset(names.split()) for names in told_by.split("|")), frozenset(also.split()), read)


FORMATS = {
    "question_answer": _format(_question_answer, "question answer", "source history system tools documents"),
    "alpaca": _format(_alpaca, "instruction output", "input history system tools documents"),
    "sharegpt": _format(_sharegpt, "conversations | conversation", "system tools documents"),
    "messages": _format(_messages, "messages", "system tools documents"),
    "prompt_completion": _format(_prompt_completion, "prompt completion", "system tools documents"),
    "tokens": _format(_tokens, "input_ids", "labels attention_mask"),
    "text": _format(_plain_text, "text"),
}


# Names that published data sets have for the two, and for what may stand beside them in some rows, whatever their case.
QUESTIONS = ("question", "prompt", "query", "instruction", "problem", "input", "inputs")
ANSWERS = ("answer", "response", "output", "completion", "solution", "target", "targets")
BESIDE = {"system": "system_prompt?", "input": "context?"}
# Columns of data for classifiers.
TEXTS = re.compile(
    "text|sentence[12]?|premise|hypothesis|question[12]?|review|content|title|body|comment|headline|document|tweet",
    re.I,
)
LABELS = re.compile("labels?|label_text|class|category|sentiment|intent|emotion|(coarse|fine)_label", re.I)


def detect(row: Values, *, where: str, columns: Columns | None = None) -> tuple[str, Columns | None]:
    """The first format whose fields a row has, and which has all the fields that `columns` names.

    Args:
        row: usually the first one of a file.
        where: its place, for the error.
        columns: a field's column, where it is not called as the field; the row need not have that column.

    Returns:
        The format, and its columns: those that were given, or what they are called in the row.

    Raises:
        UserError: no format fits, or the row is a text with its class.
    """
    if not columns:
        _refuse_classes(row, where)
    renamed = frozenset(columns or {})
    for name, form in FORMATS.items():
        if renamed <= form.fields and form.fits(renamed | row.keys()):
            return name, columns
    if not columns and (other := _by_other_names(row)):
        return other
    mapped = f" with the columns {dict(columns)}" if columns else ""
    raise UserError(f"no format has the keys {sorted(map(str, row))}{mapped}", where=where, fix=_known())


def _refuse_classes(row: Values, where: str) -> None:
    """Refuse a row with nothing but texts and their class: as text it would teach the texts, and no class."""
    keys = sorted(str(key) for key in row if str(key).lower() not in ("id", "idx"))
    texts, labels = (list(filter(names.fullmatch, keys)) for names in (TEXTS, LABELS))
    if not texts or not labels or len(texts) + len(labels) < len(keys):
        return
    fix = 'write rows of {"prompt": the text, "completion": its class in words}'
    if len(texts) == 1 and isinstance(row[labels[0]], str):
        fix = f"to learn to write the class, --columns '{{prompt: {texts[0]}, completion: {labels[0]}}}'"
    if texts == ["text"]:
        fix += "; to learn the text alone, --format_type text"
    fix += "; a classifier is trained by run_classification.py of transformers, and not here"
    raise UserError(f"rows of {', '.join([*texts, *labels])} look like data for a classifier", where=where, fix=fix)


def _by_other_names(row: Values) -> tuple[str, Columns] | None:
    """Read a row that has one question and one answer, under other names; as alpaca where it is an instruction."""
    keys = {str(key).lower(): key for key in row}
    instruction = "instruction" in keys
    questions = [key for key in QUESTIONS if key in keys and not (instruction and key == "input")]
    answers = [key for key in ANSWERS if key in keys]
    several = {"input", "context"} <= keys.keys() or {"system", "system_prompt"} <= keys.keys()
    if len(questions) != 1 or len(answers) != 1 or several or ("context" in keys and not instruction):
        return None
    name, question, answer = (
        ("alpaca", "instruction", "output") if instruction else ("prompt_completion", "prompt", "completion")
    )
    columns = {question: keys[questions[0]], answer: keys[answers[0]]}
    return name, columns | {field: column for field, column in BESIDE.items() if field in FORMATS[name].fields}


def _known() -> str:
    fields = {name: " or ".join(", ".join(sorted(keys)) for keys in form.told_by) for name, form in FORMATS.items()}
    return "known formats and their keys: " + "; ".join(f"{name}: {keys}" for name, keys in fields.items())


def needs_template(format_type: str) -> bool:
    """Tell whether rows of a format are conversations; "auto" is that of a source without a row that can be read."""
    return format_type not in ("text", "tokens", "auto")


def to_sample(row: Values, format_type: str, columns: Columns | None = None) -> Sample:
    """One row as a sample.

    Args:
        row: what the file has; it is not changed.
        format_type: one of FORMATS, or "module:function".
        columns: the column of each field that is not called as the field.

    Raises:
        BadRow: this row cannot become a sample.
        UserError: no row can: an unknown format, a field that the format lacks, a function that fails.
    """
    try:
        if ":" in format_type:
            return _by_function(row, format_type, columns)
        refuse_weight(row, (columns or {}).values())
        return _form(format_type, columns).read(_renamed(row, columns))
    except RecursionError:
        raise BadRow("nested too deeply", "nested too deeply") from None


def _form(format_type: str, columns: Columns | None) -> Format:
    if format_type not in FORMATS:
        raise UserError(
            f"there is no format {format_type!r}", where="format_type", fix=_known() + "; or module:function"
        )
    form = FORMATS[format_type]
    if unknown := sorted(set(columns or {}) - form.fields):
        fix = f"its fields: {', '.join(sorted(form.fields))}"
        raise UserError(f"the format {format_type} has no field {unknown[0]!r}", where="columns", fix=fix)
    return form


def _renamed(row: Values, columns: Columns | None) -> Values:
    renamed = {}
    for field, column in (columns or {}).items():
        if column.endswith("?") and column not in row:
            key = next((key for key in row if str(key).lower() == column[:-1].lower()), None)
            if key is not None and row.get(field):
                raise BadRow(f"{field!r} and {key!r} could both be the {field}", "two columns for one field")
            renamed |= {} if key is None else {field: row[key]}
        elif column not in row:
            raise BadRow(f"there is no column {column!r}, from which {field!r} is read", "missing column")
        else:
            renamed[field] = row[column]
    return row | renamed


# A user's function


@lru_cache
def load_function(format_type: str) -> Callable[[Values], Any]:
    """Import "module:function" from the current folder, or from what is installed.

    Raises:
        UserError: there is no such function.
    """
    module, _, name = format_type.partition(":")
    here = str(Path.cwd())
    try:
        sys.path.insert(0, here)
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # the module's own code runs here
        problem = f"{type(error).__name__}: {error}"
        raise UserError(
            f"cannot import {format_type}: {problem}", where="format_type", fix="write module:function"
        ) from error
    finally:
        sys.path.remove(here)
    if not callable(function):
        raise UserError(f"{format_type} is not a function", where="format_type", fix="write module:function")
    return function


def _by_function(row: Values, format_type: str, columns: Columns | None) -> Sample:
    if columns:
        raise UserError(
            f"columns are given with {format_type}", where="columns", fix="let the function pick the columns"
        )
    function = load_function(format_type)
    try:
        result = function(deepcopy(row))  # what it does to the row stays there
    except BadRow:
        raise
    except ValueError as error:
        raise BadRow(f"{format_type}: {error}", f"refused by {format_type}") from error
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{format_type} fails with {type(error).__name__}: {error}"
        fix = "fix the function; for a row to be left out it raises ValueError"
        raise UserError(what, where=f"{last.filename}, line {last.lineno}", fix=fix) from error
    if not isinstance(result, dict):
        what = f"{format_type} returned {type(result).__name__}, not a dict"
        raise UserError(what, where="format_type", fix='return {"messages": [...]} or a row of another known format')
    return to_sample(result, *detect(result, where=f"what {format_type} returned"))
