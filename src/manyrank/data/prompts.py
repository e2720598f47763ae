"""A data file to prompts: of each row all that is said before its last answer.

question, instruction or prompt, with its answer or without
messages or conversations          up to the last assistant turn; all of them, where the last turn is somebody else's
lines of a .txt file               each of them a question
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..chat_template.types import BadRow, Message, bare
from ..errors import UserError
from .files import Row
from .formats import Columns, Conversation, detect, to_sample
from .messages import ROLES, WEIGHTS
from .sources import Source, read_rows

# The field of a row's question, that of its answer, and the fields of a turn that are its role.
ANSWERED_BY = {"question": "answer", "instruction": "output", "prompt": "completion"}
TURNS = ("messages", "conversations", "conversation")
NOTHING = "."  # stands for the answer of a row that has none, so that its format can be read


@dataclass(frozen=True)
class Prompt:
    """Messages to be answered.

    Attributes:
        number: its line, item or row in the source, from 1. place: the same for people.
        problem: why it cannot be answered; then there are no messages.
    """

    number: int
    place: str
    messages: list[Message]
    tools: list[dict] | None = None
    documents: list[dict] | None = None
    problem: str = ""


def read_prompts(source: Source, *, system: str = "", limit: int | None = None) -> list[Prompt]:
    """The prompts of a source, in order; rows that cannot be read among them, with their problem.

    Args:
        system: the system message of rows that have none.
        limit: read only the first rows.

    Raises:
        UserError: the source cannot be read, or has no rows with prompts.
    """
    prompts: list[Prompt] = []
    lines = Path(source.path).suffix.lower() == ".txt" and not _is_json(Path(source.path))
    form = source.format_type
    for row in _lines(Path(source.path)) if lines else read_rows(source):
        if len(prompts) == limit:
            break
        try:
            if form == "auto":
                form, columns = _detected(row, source)
                source = replace(source, columns=columns)
            value = _with_answer(row.readable(), source.columns or {})
            prompts.append(_prompt(row, value, form, source, system))
        except BadRow as error:
            prompts.append(Prompt(row.number, row.place, [], problem=str(error)))
    if not prompts:
        raise UserError("there are no prompts in it", where=source.path, fix="give a file with rows")
    return prompts


def _detected(row: Row, source: Source) -> tuple[str, Columns | None]:
    """Detect the format of a row as it is, or, where it has no answer, of the row with one."""
    try:
        return detect(row.readable(), where=row.place, columns=source.columns)
    except UserError:
        value = _with_answer(row.readable(), source.columns or {})
        return detect(value, where=row.place, columns=source.columns)


def _prompt(row: Row, value: dict[str, Any], form: str, source: Source, system: str) -> Prompt:
    row_alone = {key: part for key, part in value.items() if key not in WEIGHTS}  # nothing is learned of a prompt
    sample = to_sample(row_alone, form, source.columns)
    if not isinstance(sample, Conversation):
        fix = "give questions, prompts or messages"
        raise UserError(f"rows of {form} have no prompt", where=row.place, fix=fix)
    last = max(index for index, message in enumerate(sample.messages) if message["role"] == "assistant")
    messages = [bare(message) for message in sample.messages[:last]]
    if not any(message["role"] != "system" for message in messages):
        raise BadRow("nothing is said before the answer", "no prompt")
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Prompt(row.number, row.place, messages, sample.tools, sample.documents)


def _with_answer(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The row, with something for an answer where it has none."""
    for question, answer in ANSWERED_BY.items():
        asked, said = columns.get(question, question), columns.get(answer, answer)
        if asked in row and not row.get(said):
            whole = isinstance(row[asked], list)
            return row | {said: [{"role": "assistant", "content": NOTHING}] if whole else NOTHING}
    for field in TURNS:
        turns = row.get(columns.get(field, field))
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict) and not _is_answer(turns[-1]):
            return row | {columns.get(field, field): [*turns, {"role": "assistant", "content": NOTHING}]}
    return row


def _is_answer(turn: dict[str, Any]) -> bool:
    role = turn.get("role", turn.get("from"))
    return ROLES.get(role if isinstance(role, str) else "") == "assistant"


def _is_json(path: Path) -> bool:
    """Tell whether a text file has rows of JSON, as files of any name may."""
    try:
        with path.open("rb") as file:
            return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix="check the file") from None


def _lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                yield Row(number, place, BadRow(f"not UTF-8: {error.reason}", "not UTF-8"))
                continue
            if text:
                yield Row(number, place, {"question": text})
