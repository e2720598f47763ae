"""Turns and tools, as data files spell them, turned into messages as chat templates expect them. Pure.

    role       in "role" or "from": system, developer | user, human | assistant, gpt | tool, function, observation
    content    in "content" or "value": a text, or OpenAI's list of {"type": "text", "text"} parts, which are joined
    calls      "tool_calls", or "function_call" as OpenAI once had it, or a turn from "function_call" (ShareGPT), whose
               value is the JSON of one {"name", "arguments"} or of a list of them
    reasoning  "reasoning_content", "reasoning" or "thinking"
    learned    "weight", 0 or 1, or "train" or "training", false or true

Templates refuse two assistant messages in a row, so a turn from "function_call" joins an assistant message right before
it, whether that is text or another call. Other turns stay as they are. A key that no message has a place for makes the
row a bad one, as what it says would be lost; keys without a value are passed over.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Any

from ..chat_template.types import END_AT_THE_START, ROLE_NOT_NAMED, ROLE_WITHOUT_END, BadRow, Message
from ..errors import UserError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
WEIGHTS = ("weight", "train", "training")  # of a message: 0 or false, and it is not learned
REASONING = ("reasoning_content", "reasoning", "thinking")
KEYS = {  # of a message, besides its role and content; another one would be lost
    "system": {"name", *WEIGHTS},
    "user": {"name", *WEIGHTS},
    "assistant": {"name", *WEIGHTS, "tool_calls", "function_call", *REASONING},
    "tool": {"name", *WEIGHTS, "tool_call_id"},
}


SHOWN = 10  # bad rows in an error


def bad_rows_error(
    first: Iterable[tuple[str, str]], reasons: Counter[str], *, out_of: str, fix: str, skippable: bool = True
) -> UserError:
    """The error that tells of all bad rows: the first SHOWN with their places, and how many by reason.

    Args:
        first: the place and detail of each, or only of the first SHOWN.
        out_of: how many rows there are, "20 rows".
        skippable: whether it helps to leave them out.
    """
    shown = [f"{place}: {detail}" for place, detail in islice(first, SHOWN)]
    more = [f"and {reasons.total() - len(shown):,} more"] if reasons.total() > len(shown) else []
    counted = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    return UserError(
        f"{reasons.total():,} of {out_of} cannot be used ({counted})",
        where="\n       ".join([*shown, *more]),
        fix=f"{fix}; or set on_bad_row: skip, which puts such rows aside and counts them" if skippable else fix,
    )


WEIGHT_OF_A_ROW = "weight of a row"
FIXES = {
    ROLE_NOT_NAMED: "name the role in roles_to_train, or leave weight and train out of its messages",
    ROLE_WITHOUT_END: "leave the role out of roles_to_train and its messages without weights, or choose a template that "
    "ends every message (--chat_template chatml)",
    END_AT_THE_START: "leave train_on_eos out, or choose another template (--chat_template chatml)",
    WEIGHT_OF_A_ROW: "leave such rows out, or rename the column; weight and train are read of messages, and weight of a source",
    "too long": "raise max_length, or set overlong: truncate, drop or split",
    "nothing to learn": "raise max_length if the answers lie behind it, or fix these rows",
    "two columns for one field": "leave one of them out, or name in `columns` which is read",
    "missing column": "name in `columns` the columns that the rows have",
    "missing field": "fix these rows, or say how they are to be read with format_type and columns",
    "not JSON": "give one whole JSON object a line, or an array of them; or fix these rows",
}


def usual_fix(reasons: Counter[str]) -> str:
    """Say what helps against the most frequent reason."""
    return FIXES.get(reasons.most_common(1)[0][0], "fix these rows")


# Values


def string(value: Any, name: str) -> str:
    """The value, if it is text, be it empty. `name` is what a BadRow calls it, here and below."""
    if value is None:
        raise BadRow(f"{name} is missing", "missing field")
    if isinstance(value, float) and math.isnan(value):
        raise BadRow(f"{name} is NaN", "NaN")
    if not isinstance(value, str):
        raise BadRow(f"{name} is {type(value).__name__}, not text", "wrong type")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{name} has half a surrogate pair, which is no text", "half a surrogate pair") from None
    return value


def text(value: Any, name: str) -> str:
    """The value, if it is text with something in it."""
    if not string(value, name).strip():
        raise BadRow(f"{name} is empty", "empty field")
    return value


def optional(value: Any, name: str) -> str:
    """The value, if it is text; empty where it is missing or blank."""
    missing = value is None or value == []
    return "" if missing or not string(value, name).strip() else value


def listed(value: Any, name: str) -> list:
    """The value, if it is a list with something in it."""
    if value is None:
        raise BadRow(f"{name} is missing", "missing field")
    if not isinstance(value, list):
        raise BadRow(f"{name} is {type(value).__name__}, not a list", "wrong type")
    if not value:
        raise BadRow(f"{name} is empty", "empty field")
    return value


def json_object(value: Any, name: str) -> dict:
    """An object, or the JSON text of one, checked all the way down."""
    value = _parsed(value, name)
    if not isinstance(value, dict):
        raise BadRow(f"{name} is {type(value).__name__}, not an object", "wrong type")
    return _json_value(value, name)


def _parsed(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadRow(f"{name} is not JSON: {error}", "not JSON") from None


def _json_value(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {string(key, f"a key in {name}"): _json_value(inner, name) for key, inner in value.items()}
    if isinstance(value, list):
        return [_json_value(inner, name) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"{name} has {value}, which is not JSON", "NaN")
    if value is None or isinstance(value, int | float):
        return value
    return string(value, f"a value in {name}")


def _only(keys: Iterable[Any], allowed: Iterable[str], name: str) -> None:
    if lost := set(keys) - set(allowed):
        raise BadRow(f"{name} has {', '.join(sorted(map(repr, lost)))}, which would be lost", "lost field")


# Tools


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """The functions of a row's "tools", each as {"type": "function", "function": {"name", ...}}; None without any.

    Args:
        value: one function or a list of them, each with or without {"type", "function"} around it, or JSON of that.

    Raises:
        BadRow: not JSON, of another type, or without a name.
    """
    if isinstance(value, str) and not value.strip():
        return None
    tools = _parsed(value, "'tools'")
    if tools is None or tools == []:
        return None
    tools = [tools] if isinstance(tools, dict) else listed(tools, "'tools'")
    return [_tool(tool, f"tool {number} of 'tools'") for number, tool in enumerate(tools, 1)]


def _tool(value: Any, name: str) -> dict[str, Any]:
    tool = json_object(value, name)
    if not tool:
        raise BadRow(f"{name} is empty", "empty field")
    return {"type": "function", "function": _function(tool, name)}


def _function(entry: dict[str, Any], name: str) -> dict[str, Any]:
    """Take the inside of {"type": "function", "function": {...}}, or {...} itself, with its name checked."""
    if entry.get("type") not in (None, "function"):
        raise BadRow(f"{name} has the type {entry['type']!r}, not 'function'", "wrong type")
    if "function" in entry:
        _only(entry, {"type", "id", "function"}, name)
    bare = {key: value for key, value in entry.items() if key not in ("type", "id")}
    function = json_object(bare.get("function", bare), name)
    text(function.get("name"), f"the name of {name}")
    return function


def _calls(value: Any, name: str) -> list[dict[str, Any]]:
    calls = _parsed(value, name)
    calls = [calls] if isinstance(calls, dict) else listed(calls, name)
    return [_call(call, f"call {number} in {name}") for number, call in enumerate(calls, 1)]


def _call(value: Any, name: str) -> dict[str, Any]:
    call = json_object(value, name)
    function = _function(call, name)
    _only(function, {"name", "arguments"}, name)
    arguments = function.get("arguments")
    arguments = {} if arguments in (None, "") else json_object(arguments, f"the arguments of {name}")
    result = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return result if call.get("id") is None else result | {"id": text(call["id"], f"the id of {name}")}


def name_answers(messages: list[Message]) -> None:
    """Give each tool message the name of the call that it answers: the one with its id, or the next in order.

    Raises:
        BadRow: a tool message that answers no call of the assistant message before it.
    """
    waiting: list[dict[str, Any]] = []
    for number, message in enumerate(messages, 1):
        if message["role"] != "tool":
            waiting = list(message.get("tool_calls", ()))
            continue
        call_id = message.get("tool_call_id")
        fitting = [call for call in waiting if call_id is None or call.get("id", call_id) == call_id]
        if not fitting:
            raise BadRow(f"message {number} is a tool's answer to no call before it", "answer without a call")
        waiting.remove(fitting[0])
        message.setdefault("name", fitting[0]["function"]["name"])


# Turns


def read_turns(value: Any, field: str) -> list[Message]:
    """The messages of a list of turns.

    Args:
        value: what the row has.
        field: the name of that field, for the error.

    Raises:
        BadRow: a turn without a known role or without content, of a wrong type, or with a key that would be lost.
    """
    messages: list[Message] = []
    for number, turn in enumerate(listed(value, repr(field)), 1):
        message, is_call = _message(turn, f"turn {number} of {field!r}")
        before = messages[-1] if messages else {}
        if is_call and before.get("role") == "assistant" and before.get("weight") == message.get("weight"):
            before["tool_calls"] = before.get("tool_calls", []) + message["tool_calls"]
        else:
            messages.append(message)
    return messages


def _message(turn: Any, name: str) -> tuple[Message, bool]:
    """The message of one turn, and whether it is a function_call turn."""
    if not isinstance(turn, dict):
        raise BadRow(f"{name} is {type(turn).__name__}, not an object", "wrong type")
    turn = {key: value for key, value in turn.items() if value is not None}
    role_key = "role" if "role" in turn else "from"
    content_key = "content" if "content" in turn else "value"
    role_name = turn.get(role_key)
    role = ROLES.get(role_name) if isinstance(role_name, str) else None
    if role is None:
        raise BadRow(f"{name} has the role {role_name!r}, which is none of {', '.join(ROLES)}", "unknown role")
    is_call = role_name == "function_call"
    filled = [key for key, value in turn.items() if key in WEIGHTS or value not in ("", [], {})]
    _only(filled, {role_key, content_key, *(WEIGHTS if is_call else KEYS[role])}, name)
    message: Message = {"role": role, "content": "" if is_call else _content(turn.get(content_key), name)}
    calls = turn.get(content_key) if is_call else _given_calls(turn, name)
    if calls or is_call:
        message["tool_calls"] = _calls(calls, f"{'the content' if is_call else 'tool_calls'} of {name}")
    elif role != "tool" and not message["content"].strip():
        state = "empty" if content_key in turn else "missing"
        raise BadRow(f"the content of {name} is {state}", f"{state} field")
    return message | _extras(turn, role, name), is_call


def _given_calls(turn: dict[str, Any], name: str) -> Any:
    if turn.get("tool_calls") and turn.get("function_call"):
        raise BadRow(f"{name} has tool_calls and function_call, of which one would be lost", "lost field")
    return turn.get("tool_calls") or turn.get("function_call")


def _content(value: Any, name: str) -> str:
    """A text, or the joined texts of [{"type": "text", "text": ...}, ...]."""
    if value is None:
        return ""
    if not isinstance(value, list):
        return string(value, f"the content of {name}")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise BadRow(f"the content of {name} has a part that is not text", "wrong type")
    return "".join(string(part.get("text"), f"a part of {name}") for part in value)


def _extras(turn: dict[str, Any], role: str, name: str) -> Message:
    extras: Message = {key: text(turn[key], f"{key!r} of {name}") for key in ("name", "tool_call_id") if turn.get(key)}
    thoughts = {optional(turn.get(key), f"{key!r} of {name}") for key in REASONING} - {""}
    if len(thoughts) > 1:
        raise BadRow(f"{name} has two different reasonings, of which one would be lost", "lost field")
    if thoughts:
        extras["reasoning_content"] = thoughts.pop()
    weight = _weight(turn, name)
    return extras if weight is None else extras | {"weight": weight}


def _weight(turn: dict[str, Any], name: str) -> int | None:
    """The weight of a turn, 0 or 1; None where it has none. A part of 1 would need losses by token."""
    values = {key: turn[key] for key in WEIGHTS if key in turn}
    for key, value in values.items():
        if value not in (0, 1) or (key == "weight" and isinstance(value, bool)):
            raise BadRow(
                f"the {key} of {name} is {value!r}, not {'0 or 1' if key == 'weight' else 'true or false'}",
                "wrong type",
            )
    if len(set(values.values())) > 1:
        raise BadRow(f"{name} has {' and '.join(f'{key} {value}' for key, value in values.items())}", "contradiction")
    return int(next(iter(values.values()))) if values else None


def refuse_weight(row: dict[str, Any], used: Iterable[str]) -> None:
    """Refuse a row with a weight of its own, which no format reads; `used` are columns that are read as something else."""
    for key in WEIGHTS:
        value = row.get(key)
        if isinstance(value, bool | int | float) and value != 1 and key not in used:
            raise BadRow(f"the row has {key} {value}, and only messages have one", WEIGHT_OF_A_ROW)
