"""Conversations with marks in place of their strings, and putting the strings back. Pure.

strings    "Hi"  "Hello"
marked     [{"role": "user", "content": "Zq0000xK"}, {"role": "assistant", "content": "Zq0001xK"}]
skeleton   <|im_start|>user\\n  0  <|im_end|>\\n<|im_start|>assistant\\n  1  <|im_end|>\\n
layout     the real text, with the place of every string and turn in it
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .types import BadRow, Message

# Reasons to refuse a conversation.
REFUSED, DROPPED, CHANGED = "refused by template", "dropped by template", "changed by template"
NO_STOP = "no end-of-turn token"

MARK = re.compile(r"Zq(\d{4})xK")
OTHER = 5000  # marks from here on stand for a whole turn
THINK_END = "</think>"
THINK_TAGS = {"<think>", THINK_END}  # as tokens they are what they say

Position = tuple[int, int]  # (part, offset in it)
Turn = tuple[Position, Position, Position]  # start, where the end-of-turn token begins, end


@dataclass(frozen=True)
class Slot:
    """One string of a conversation, without the blanks at its edges."""

    message: int
    kind: str  # content, thinking or name (of a called function)
    text: str


@dataclass(frozen=True)
class Form:
    """The forms that a template wants for what can be written in several ways."""

    parts: bool = False  # content as [{"type": "text", "text": ...}]
    json_arguments: bool = False  # a call's arguments as a JSON string
    no_content: bool = False  # a message that only calls has no content, not an empty one


@dataclass(frozen=True)
class Skeleton:
    """A rendered conversation without its strings.

    Attributes:
        parts: (slots + 1,), the template's text before, between and after the strings.
        order: (slots,), which string stands between parts[i] and parts[i + 1].
        turns: by assistant message, the learned range.
        others: the same by message of another role, where it is one string with an end-of-turn token after it.
        openings: by assistant message, where the generation prompt ends; None where that cannot be told.
        closing: what was added to the last turn, which the template leaves open.
    """

    parts: list[str]
    order: list[int]
    turns: dict[int, Turn]
    others: dict[int, Turn]
    openings: dict[int, Position | None]
    closing: str


@dataclass(frozen=True)
class Layout:
    """A rendered conversation and where everything stands in it; ranges are characters of `text`.

    Attributes:
        turns: by assistant message, where its content begins, where it ends, and where the end-of-turn token does.
        others: the same by message of another role; only those that are one string with an end-of-turn token after it.
        openings: by assistant message, where the generation prompt ends; None where that cannot be told.
        strings: every string of the conversation.
        dropped_thinking: assistant messages whose thinking the template leaves out, as it does with history.
    """

    text: str
    turns: dict[int, tuple[int, int, int]]
    others: dict[int, tuple[int, int, int]]
    openings: dict[int, int | None]
    strings: list[tuple[int, int]]
    dropped_thinking: list[int]


class Mismatch(BadRow):
    """Putting the strings back did not give the real text."""


@dataclass
class Marked:
    """A conversation with marks in place of its strings; in the messages `pieced`, pieces of a string stay."""

    messages: list[Message] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    pieced: set[int] = field(default_factory=set)

    def mark(self, message: int, kind: str, text: str) -> str:
        """The text with its core replaced by a new mark; the blanks at the edges stay, for the template to see."""
        core = text.strip()
        if not core:
            return text
        self.slots.append(Slot(message, kind, core))
        before, after = text.split(core, 1)
        return f"{before}{mark_text(len(self.slots) - 1)}{after}"


@dataclass(frozen=True)
class Literals:
    """Strings that a template may look for in the content, and the control tokens, which are never cut."""

    strings: re.Pattern
    controls: re.Pattern

    def pieces(self, content: str) -> list[tuple[int, int]]:
        """The ranges that stay when the rest is marked."""
        control_spans = [control.span() for control in self.controls.finditer(content)]
        string_spans = [literal.span() for literal in self.strings.finditer(content)]
        return [(a, b) for a, b in string_spans if not any(a < right and b > left for left, right in control_spans)]


def mark(messages: Sequence[Message], form: Form, literals: Literals | None = None) -> Marked:
    """The conversation with marks for its strings; what `literals` finds stays as it is."""
    marked = Marked()
    for index, message in enumerate(messages):
        message_with_marks = dict(message)
        if message.get("reasoning_content"):
            message_with_marks["reasoning_content"] = marked.mark(index, "thinking", message["reasoning_content"])
        message_with_marks["content"] = _marked_content(marked, index, message, literals)
        if message.get("tool_calls"):
            message_with_marks["tool_calls"] = [
                {**call, "function": {**call["function"], "name": marked.mark(index, "name", call["function"]["name"])}}
                for call in message["tool_calls"]
            ]
        marked.messages.append(written(message_with_marks, form))
    return marked


def _marked_content(marked: Marked, index: int, message: Message, literals: Literals | None) -> str:
    content = message["content"]
    pieces = literals.pieces(content) if literals else []
    edges = [0, *(edge for piece in pieces for edge in piece), len(content)]
    between = list(zip(edges[::2], edges[1::2]))
    if not pieces or not "".join(content[slice(*part)] for part in between).strip():  # something must be marked
        return marked.mark(index, "content", content)
    marked.pieced.add(index)
    thought = content.rfind(THINK_END) if message["role"] == "assistant" else -1
    text = ""
    for part, piece in zip(between, [*pieces, (0, 0)]):
        kind = "thinking" if part[1] <= thought else "content"
        text += marked.mark(index, kind, content[slice(*part)]) + content[slice(*piece)]
    return text


def any_of(texts: Iterable[str]) -> re.Pattern:
    """Matches any of these texts, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True))) or r"(?!)")


def mark_text(number: int) -> str:
    return f"Zq{number:04d}xK"


def written(message: Message, form: Form) -> Message:
    """The message as the template wants it."""
    message_with_marks = dict(message)
    if form.no_content and message.get("tool_calls") and not message["content"]:
        del message_with_marks["content"]
    elif form.parts and isinstance(message["content"], str):
        message_with_marks["content"] = [{"type": "text", "text": message["content"]}]
    if form.json_arguments and message.get("tool_calls"):
        message_with_marks["tool_calls"] = [
            {
                **call,
                "function": {
                    **call["function"],
                    "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                },
            }
            for call in message["tool_calls"]
        ]
    return message_with_marks


def refuse_printed_parts(text: str, form: Form) -> None:
    if form.parts and re.search(r"""['"]text['"]: ?['"]\s*Zq""", text):
        raise BadRow("the chat template prints a list of parts as it is", reason=REFUSED)


def check_marks(marked: Marked, marks: list[int]) -> None:
    """Nothing that somebody wrote is missing, and what the assistant wrote is there once."""
    if any(number >= len(marked.slots) for number in marks) or len(marked.slots) > OTHER:
        raise BadRow("the conversation is too long, or contains the marks that turns are found with", reason=CHANGED)
    for number, slot in enumerate(marked.slots):
        role, times = marked.messages[slot.message]["role"], marks.count(number)
        asked_again = any(message["role"] == "user" for message in marked.messages[slot.message + 1 :])
        if not times and slot.kind == "thinking" and asked_again:
            continue
        if not times:
            place = f"message {slot.message + 1}"
            what = {
                "content": f"{role} {place}",
                "thinking": f"thinking of {place} (thinking: strip leaves it out)",
                "name": f"tool calls of {place}",
            }
            raise BadRow(f"the chat template drops the {what[slot.kind]}", reason=DROPPED)
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
ESCAPES = (str, lambda text: json.dumps(text, ensure_ascii=False)[1:-1], lambda text: json.dumps(text)[1:-1])


def fill(text: str, skeleton: Skeleton, marked: Marked) -> Layout:
    """Put the strings back and compare with the real text.

    Raises:
        Mismatch: they differ, so the template does something else with these strings.
    """
    text += skeleton.closing
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
        turns={index: tuple(map(place, turn)) for index, turn in skeleton.turns.items()},
        others={index: tuple(map(place, turn)) for index, turn in skeleton.others.items()},
        openings={index: None if end is None else place(end) for index, end in skeleton.openings.items()},
        strings=[(starts[k], starts[k] + len(filled[k])) for k in range(1, len(filled), 2)],
        dropped_thinking=sorted(dropped),
    )


def check_contents(layout: Layout, messages: Sequence[Message]) -> None:
    """Check that contents stand in the text unchanged, and a turn has nothing else in it.

    Only calls and thinking that is not in the content, whose form is the template's, may stand beside it in a turn.
    """
    for index, message in enumerate(messages):
        text, role = message["content"].strip(), message["role"]
        if role != "assistant":
            right = any(escape(text) in layout.text for escape in (ESCAPES if role == "tool" else ESCAPES[:1]))
        else:
            start, stop, _ = layout.turns[index]
            right = _says(layout.text[start:stop].strip(), text, beside=_has_more(message))
        if not right:
            raise Mismatch(f"the chat template changes the content of message {index + 1} ({role})", reason=CHANGED)


def _has_more(message: Message) -> bool:
    return bool(message.get("tool_calls") or message.get("reasoning_content"))


def _says(turn: str, text: str, *, beside: bool) -> bool:
    if THINK_END not in text:
        return text in turn if beside else text == turn
    # Templates write the blanks around thinking in their own way, or leave the thinking out.
    answer = text.rpartition(THINK_END)[2]
    return answer.strip() in turn if beside else _letters(turn) in (_letters(text), _letters(answer))


def _letters(text: str) -> str:
    return "".join(re.sub("|".join(THINK_TAGS), "", text).split())


def _changed_message(text: str, marked: Marked) -> str:
    for slot in marked.slots:
        if slot.text not in text:
            role = marked.messages[slot.message]["role"]
            return f"the chat template changes the {slot.kind} of message {slot.message + 1} ({role})"
    return "the chat template writes other text around this content"
