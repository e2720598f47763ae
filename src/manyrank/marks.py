"""Conversations with marks in place of their strings, and putting the strings back. Pure.

strings    "Hi"  "Hello"
marked     [{"role": "user", "content": "Zq0000xK"}, {"role": "assistant", "content": "Zq0001xK"}]
skeleton   <|im_start|>user\\n  0  <|im_end|>\\n<|im_start|>assistant\\n  1  <|im_end|>\\n
layout     the real text, with the place of every string and turn in it
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from .formats import BadRow, Message

# Reasons to refuse a conversation.
REFUSED, DROPPED, CHANGED = "refused by template", "dropped by template", "changed by template"
NO_STOP = "no end-of-turn token"

MARK = re.compile(r"Zq(\d{4})xK")
OTHER = 9999  # the mark that stands for a whole turn
THINK_END = "</think>"


@dataclass(frozen=True)
class Slot:
    """One string of a conversation, without the blanks at its edges."""

    message: int
    kind: str  # content, thinking or name (of a called function)
    text: str


@dataclass(frozen=True)
class Form:
    """How the template wants what can be written in several ways."""

    parts: bool = False  # content as [{"type": "text", "text": ...}]
    json_arguments: bool = False  # a call's arguments as a JSON string
    no_content: bool = False  # a message that only calls has no content, not an empty one


@dataclass(frozen=True)
class Skeleton:
    """A rendered conversation without its strings.

    Attributes:
        parts: (slots + 1,), the template's text before, between and after the strings.
        order: (slots,), which string stands between parts[i] and parts[i + 1].
        turns: by assistant message, the learned range from (part, offset) to (part, offset).
        openings: the same for what the template writes before the content of a turn, after the generation prompt.
    """

    parts: list[str]
    order: list[int]
    turns: dict[int, tuple[tuple[int, int], tuple[int, int]]]
    openings: dict[int, tuple[int, int] | None]


@dataclass(frozen=True)
class Layout:
    """A rendered conversation and where everything stands in it; ranges are characters of `text`.

    Attributes:
        turns: by assistant message, its content up to and with the token that ends the turn.
        openings: by assistant message, where the generation prompt ends; None where that cannot be told.
        strings: every string of the conversation.
        dropped_thinking: assistant messages whose thinking the template leaves out, as it does with history.
    """

    text: str
    turns: dict[int, tuple[int, int]]
    openings: dict[int, int | None]
    strings: list[tuple[int, int]]
    dropped_thinking: list[int]


class Mismatch(BadRow):
    """Putting the strings back did not give the real text."""


@dataclass
class Marked:
    """A conversation with marks in place of its strings."""

    messages: list[Message] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)

    def mark(self, message: int, kind: str, text: str) -> str:
        """The text with its core replaced by a new mark; the blanks at the edges stay, for the template to see."""
        core = text.strip()
        if not core:
            return text
        self.slots.append(Slot(message, kind, core))
        before, after = text.split(core, 1)
        return f"{before}{mark_text(len(self.slots) - 1)}{after}"


def mark(messages: Sequence[Message], form: Form, literals: re.Pattern | None = None) -> Marked:
    """The conversation with marks for its strings; what matches `literals` stays as it is."""
    marked = Marked()
    for index, message in enumerate(messages):
        made = dict(message)
        if message.get("reasoning_content"):
            made["reasoning_content"] = marked.mark(index, "thinking", message["reasoning_content"])
        if literals is None or not literals.search(message["content"]):
            made["content"] = marked.mark(index, "content", message["content"])
        else:
            made["content"] = _mark_between(marked, index, message, literals)
        if message.get("tool_calls"):
            made["tool_calls"] = [
                {**call, "function": {**call["function"], "name": marked.mark(index, "name", call["function"]["name"])}}
                for call in message["tool_calls"]
            ]
        marked.messages.append(written(made, form))
    return marked


def _mark_between(marked: Marked, index: int, message: Message, literals: re.Pattern) -> str:
    content, made, at = message["content"], "", 0
    thought = content.rfind(THINK_END) if message["role"] == "assistant" else -1
    for literal in [*literals.finditer(content), None]:
        end = literal.start() if literal else len(content)
        kind = "thinking" if end <= thought else "content"
        made += marked.mark(index, kind, content[at:end]) + (literal[0] if literal else "")
        at = literal.end() if literal else end
    return made


def mark_text(number: int) -> str:
    return f"Zq{number:04d}xK"


def written(message: Message, form: Form) -> Message:
    """The message as the template wants it."""
    made = dict(message)
    if form.no_content and message.get("tool_calls") and not message["content"]:
        del made["content"]
    elif form.parts and isinstance(message["content"], str):
        made["content"] = [{"type": "text", "text": message["content"]}]
    if form.json_arguments and message.get("tool_calls"):
        made["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
            for call in message["tool_calls"]
        ]  # fmt: skip
    return made


def refuse_printed_parts(text: str, form: Form) -> None:
    if form.parts and re.search(r"""['"]text['"]: ?['"]\s*Zq""", text):
        raise BadRow("the chat template prints a list of parts as it is", reason=REFUSED)


def check_marks(marked: Marked, found: list[int]) -> None:
    """Nothing that somebody wrote is missing, and what the assistant wrote is there once."""
    for number, slot in enumerate(marked.slots):
        role, times = marked.messages[slot.message]["role"], found.count(number)
        asked_again = any(message["role"] == "user" for message in marked.messages[slot.message + 1 :])
        if not times and slot.kind == "thinking" and asked_again:
            continue
        if not times:
            what = {"content": "", "thinking": "thinking of ", "name": "tool calls of "}[slot.kind]
            raise BadRow(
                f"the chat template drops the {what}{role} message {slot.message + 1}"
                if not what
                else f"the chat template drops the {what}message {slot.message + 1}",
                reason=DROPPED,
            )
        if role == "assistant" and slot.kind != "name" and times > 1:
            raise BadRow(f"the chat template repeats message {slot.message + 1}", reason=CHANGED)


def check_tools(text: str, tools, documents) -> None:
    for tool in tools or []:
        name = tool.get("function", tool).get("name", "")
        if name not in text:
            raise BadRow(f"the chat template drops the tool {name!r}", reason=DROPPED)
    for number, document in enumerate(documents or [], 1):
        if not all(str(value).strip() in text for key, value in document.items() if key in ("title", "text")):
            raise BadRow(f"the chat template drops document {number}", reason=DROPPED)


# How a template may write a string: as it is, or, what a tool returned, as JSON.
ESCAPES = (str, lambda said: json.dumps(said, ensure_ascii=False)[1:-1], lambda said: json.dumps(said)[1:-1])


def fill(text: str, skeleton: Skeleton, marked: Marked) -> Layout:
    """Put the strings back and compare with the real text.

    Raises:
        Mismatch: they differ, so the template does something else with these strings.
    """
    for escape in ESCAPES:
        strings = [
            escape(slot.text) if marked.messages[slot.message]["role"] == "tool" else slot.text for slot in marked.slots
        ]
        filled = [skeleton.parts[0]]
        for number, part in zip(skeleton.order, skeleton.parts[1:]):
            filled += [strings[number], part]
        if "".join(filled) == text:
            break
    else:
        raise Mismatch(_changed_message(text, marked), reason=CHANGED)
    starts, at = [], 0  # of parts and strings in turn
    for piece in filled:
        starts.append(at)
        at += len(piece)

    def place(position: tuple[int, int]) -> int:
        return starts[2 * position[0]] + position[1]

    dropped = {
        slot.message for k, slot in enumerate(marked.slots) if slot.kind == "thinking" and k not in skeleton.order
    }
    return Layout(
        text=text,
        turns={index: (place(start), place(end)) for index, (start, end) in skeleton.turns.items()},
        openings={index: None if end is None else place(end) for index, end in skeleton.openings.items()},
        strings=[(starts[k], starts[k] + len(filled[k])) for k in range(1, len(filled), 2)],
        dropped_thinking=sorted(dropped),
    )


def check_contents(layout: Layout, messages: Sequence[Message]) -> None:
    """What was said stands in the text as it was said: no template may change or leave out a part of it."""
    for index, message in enumerate(messages):
        said, where, escapes = message["content"].strip(), layout.text, ESCAPES[:1]
        if message["role"] == "assistant":
            said, where = said.rpartition(THINK_END)[2].strip(), where[slice(*layout.turns[index])]
        elif message["role"] == "tool":
            escapes = ESCAPES
        if not any(escape(said) in where for escape in escapes):
            raise Mismatch(
                f"the chat template changes the content of message {index + 1} ({message['role']})", reason=CHANGED
            )


def _changed_message(text: str, marked: Marked) -> str:
    for slot in marked.slots:
        if slot.text not in text:
            role = marked.messages[slot.message]["role"]
            return f"the chat template changes the {slot.kind} of message {slot.message + 1} ({role})"
    return "the chat template writes other text around this content"
