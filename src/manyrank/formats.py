"""Rows of the usual data formats, turned into conversations. Pure: files in, messages out, no torch.

A conversation is a list of {"role": "system" | "user" | "assistant", "content": str}, with an assistant in it.

    question_answer    {"question", "answer", "source"?}                       the source becomes the answer's last line
    alpaca             {"instruction", "input"?, "output", "system"?}
    sharegpt           {"conversations": [{"from": "human" | "gpt" | "system", "value"}], "system"?}
    messages           {"messages": [{"role", "content"}]}
    prompt_completion  {"prompt", "completion"}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

Row = dict[str, Any]
Messages = list[dict[str, str]]

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BadRow(ValueError):
    """A row that cannot become a conversation; the message says why."""


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(
            f"{key!r} is " + ("missing" if value is None else "empty" if isinstance(value, str) else "no text")
        )
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise BadRow(f"{key!r} has half a surrogate pair, which is no text")
    return value


def _optional(row: Row, key: str) -> str:
    value = row.get(key)
    return _text(row, key) if value is not None and value != [] and str(value).strip() else ""


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _question_answer(row: Row) -> Messages:
    answer, source = _text(row, "answer"), _optional(row, "source")
    return [
        _turn("user", _text(row, "question")),
        _turn("assistant", f"{answer}\n\nSource: {source}" if source else answer),
    ]


def _alpaca(row: Row) -> Messages:
    instruction, more, system = _text(row, "instruction"), _optional(row, "input"), _optional(row, "system")
    turns = [
        _turn("user", f"{instruction}\n\n{more}" if more else instruction),
        _turn("assistant", _text(row, "output")),
    ]
    return [_turn("system", system), *turns] if system else turns


def _turns(row: Row, key: str, role_key: str, content_key: str) -> Messages:
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"{key!r} is not a list of turns")
    messages = []
    for number, turn in enumerate(turns, 1):
        role = ROLES.get(str(turn.get(role_key))) if isinstance(turn, dict) else None
        if role is None:
            raise BadRow(f"turn {number} of {key!r} has no {role_key!r} out of {', '.join(ROLES)}")
        extra = set(turn) - {role_key, content_key}
        if extra:
            raise BadRow(f"turn {number} of {key!r} has {', '.join(sorted(extra))}, which would be lost")
        messages.append(_turn(role, _text(turn, content_key)))
    return messages


def _sharegpt(row: Row) -> Messages:
    if row.get("tools"):
        raise BadRow("'tools' would be lost: tool calls cannot be trained on yet")
    system = _optional(row, "system")
    turns = _turns(row, "conversations", "from", "value")
    return [_turn("system", system), *turns] if system else turns


def _messages(row: Row) -> Messages:
    if row.get("tools"):
        raise BadRow("'tools' would be lost: tool calls cannot be trained on yet")
    return _turns(row, "messages", "role", "content")


def _prompt_completion(row: Row) -> Messages:
    return [_turn("user", _text(row, "prompt")), _turn("assistant", _text(row, "completion"))]


# The keys that tell a format, and how its rows become messages.
FORMATS: dict[str, tuple[frozenset[str], Callable[[Row], Messages]]] = {
    "question_answer": (frozenset({"question", "answer"}), _question_answer),
    "alpaca": (frozenset({"instruction", "output"}), _alpaca),
    "sharegpt": (frozenset({"conversations"}), _sharegpt),
    "messages": (frozenset({"messages"}), _messages),
    "prompt_completion": (frozenset({"prompt", "completion"}), _prompt_completion),
}


def to_messages(row: Row, format_type: str) -> Messages:
    """One row as a conversation.

    Raises:
        BadRow: a field is missing, empty or of another type, or no assistant speaks.
    """
    messages = FORMATS[format_type][1](row)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("no assistant turn, so there is nothing to learn")
    return messages


def detect(row: Row, *, where: str) -> str:
    """The format whose keys a row has.

    Raises:
        UserError: no format fits.
    """
    for name, (keys, _) in FORMATS.items():
        if keys <= row.keys():
            return name
    known = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, (keys, _) in FORMATS.items())
    raise UserError(f"no format has the keys {sorted(row)}", where=where, fix=f"known formats and their keys: {known}")


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield (place, row) of a JSON array or a JSONL file; the place is the line, or the item of the array, from 1.

    Raises:
        UserError: no such file, not UTF-8, broken JSON (with its line), or a row that is not an object.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}", where="data_path or eval_data_path", fix="check the path")
    try:
        yield from _array(path) if _is_array(path) else _lines(path)
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8: {error.reason}", where=str(path), fix="save the file as UTF-8") from None


def _is_array(path: Path) -> bool:
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                return line.lstrip().startswith("[")
    raise UserError("the file is empty", where=str(path), fix="give a file with rows")


def _array(path: Path) -> Iterator[tuple[int, Row]]:
    for number, row in enumerate(_parse(path.read_text(encoding="utf-8-sig"), path, 1), 1):
        yield number, _object(row, f"{path}, item {number}")


def _lines(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _object(_parse(line.strip(), path, number), f"{path}, line {number}")


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        if not isinstance(error, json.JSONDecodeError):
            raise UserError(f"JSON that cannot be read: {error}", where=str(path), fix="simplify that row") from None
        raise UserError(
            f"broken JSON: {error.msg}",
            where=f"{path}, line {first_line + error.lineno - 1}, column {error.colno}",
            fix="mend that line; a JSONL file has one whole object a line, a JSON file one array",
        ) from None


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(
            f"a row is {type(row).__name__}, not an object", where=where, fix="give objects with named fields"
        )
    return row
