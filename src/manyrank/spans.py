"""Where the turns are in a conversation that was rendered with marks.

    parts   <|im_start|>user\\n [0] <|im_end|>\\n<|im_start|>assistant\\n [1] <|im_end|>\\n
    turn                                                              |____________|

A turn that is one string begins with its mark. Any other is what changes when one mark takes the place of the turn. It
ends with the template's end-of-turn token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .formats import BadRow, Message
from .marks import CHANGED, DROPPED, MARK, NO_STOP, OTHER, Form, Marked, Slot, mark_text, written

Position = tuple[int, int]  # (part, offset in it)


class Renders(Protocol):
    """A chat template that can be asked."""

    tokens: re.Pattern  # every added token of the tokenizer

    def text(self, messages: Sequence[Message], *, tools=None, documents=None, generate: bool = False) -> str: ...

    def stop_length(self, text: str) -> int: ...


@dataclass
class MarkedText:
    """A conversation rendered with marks, and the search for its turns.

    Attributes:
        found: the marks in `text`.
        parts: (marks + 1,), the text before, between and after them.
    """

    template: Renders
    marked: Marked
    form: Form
    tools: list[dict] | None
    documents: list[dict] | None
    text: str
    found: list[re.Match]
    parts: list[str]

    def turn(self, index: int) -> tuple[Position, Position]:
        """The learned range of an assistant message."""
        own = [k for k, mark in enumerate(self.found) if self._slot(mark).message == index]
        kinds = [self._slot(self.found[k]).kind for k in own]
        if kinds == ["content"] and not self.marked.messages[index].get("tool_calls"):
            (k,) = own
            blanks = self._blanks_kept(index, k)
            stop = self.template.stop_length(self.parts[k + 1])
            if not stop:
                raise self._no_stop(index)
            return (k, len(self.parts[k]) - blanks), (k + 1, stop)
        start, end = self._changed(index)
        if "thinking" in kinds:  # with the tag that opens it, unless the prompt has that already
            start = min(start, self._prompt_end(index) or start)
        self._check_arguments(index, self.text[start:end])
        if not self._holds(index, start, end):
            raise BadRow(f"message {index + 1} (assistant) cannot be told from the others", reason=CHANGED)
        stop = self.template.stop_length(self.text[end:])
        last = list(self.template.tokens.finditer(self.text, start, end))[-1:]
        if not stop and not (last and last[0].end() == end):
            raise self._no_stop(index)
        return self._position(start), self._position(end + stop)

    def _holds(self, index: int, start: int, end: int) -> bool:
        """Whether a range has all strings of a message and none of another. A result may repeat the name of its call."""
        inside = [mark for mark in self.found if mark.start() < end and mark.end() > start]
        outside = [mark for mark in self.found if mark not in inside]
        names = {mark[0] for mark in inside}
        return all(self._slot(mark).message == index for mark in inside) and all(
            mark[0] in names for mark in outside if self._slot(mark).message == index
        )

    def opening(self, index: int) -> Position | None:
        end = self._prompt_end(index)
        return None if end is None else self._position(end)

    def _slot(self, mark: re.Match) -> Slot:
        return self.marked.slots[int(mark[1])]

    def _no_stop(self, index: int) -> BadRow:
        return BadRow(
            f"the chat template ends message {index + 1} (assistant) without an end-of-turn token", reason=NO_STOP
        )

    def _render(self, messages: list[Message], *, generate: bool = False) -> str:
        return self.template.text(messages, tools=self.tools, documents=self.documents, generate=generate)

    def _blanks_kept(self, index: int, k: int) -> int:
        """How many blanks before the content come from the content, and not from the template."""
        content = self.marked.messages[index]["content"]
        content = content if isinstance(content, str) else content[0]["text"]
        blanks = content[: len(content) - len(content.lstrip())]
        if not blanks:
            return 0
        messages = list(self.marked.messages)
        messages[index] = written({**messages[index], "content": content.lstrip()}, self.form)
        bare = MARK.split(self._render(messages))[::2]
        kept = self.parts[k].removeprefix(bare[k])
        if len(bare) != len(self.parts) or bare[k] + kept != self.parts[k] or not blanks.endswith(kept):
            raise BadRow(f"message {index + 1}: blanks before the content change the text", reason=CHANGED)
        return len(kept)

    def _changed(self, index: int) -> tuple[int, int]:
        """What changes when one mark takes the place of a whole turn, in whole tokens."""
        plain = written({"role": "assistant", "content": mark_text(OTHER)}, self.form)
        before, after = list(self.marked.messages[:index]), list(self.marked.messages[index + 1 :])
        try:
            whole, other = self.text, self._render([*before, plain, *after])
        except BadRow:  # a result must follow a call: look at the conversation up to here
            whole, other = self._render([*before, self.marked.messages[index]]), self._render([*before, plain])
        left, middle, right = other.partition(mark_text(OTHER))
        start = common(whole, left)
        end = len(whole) - common(whole[start:][::-1], right[::-1])
        if not middle or not self.text.startswith(whole[:end]):
            raise BadRow(f"message {index + 1} (assistant) changes the turns around it", reason=CHANGED)
        for token in self.template.tokens.finditer(whole):
            start = token.start() if token.start() < start < token.end() else start
            end = token.end() if token.start() < end < token.end() else end
        return start, end

    def _prompt_end(self, index: int) -> int | None:
        """Where the generation prompt of a turn ends, if the template writes it the same way in front of the turn."""
        try:
            prompt = self._render(self.marked.messages[:index], generate=True)
        except BadRow:
            return None
        marks = list(MARK.finditer(prompt))
        here = [mark for mark in self.found if marks and mark[0] == marks[-1][0]]
        tail = prompt[marks[-1].end() :] if marks else ""
        return here[-1].end() + len(tail) if here and self.text.startswith(tail, here[-1].end()) else None

    def _position(self, place: int) -> Position:
        for k, found in enumerate(self.found):
            if place <= found.start():
                return k, place - (self.found[k - 1].end() if k else 0)
            if place < found.end():
                raise BadRow("a turn begins or ends within a string", reason=CHANGED)
        return len(self.found), place - (self.found[-1].end() if self.found else 0)

    def _check_arguments(self, index: int, turn: str) -> None:
        for call in self.marked.messages[index].get("tool_calls") or []:
            arguments = call["function"]["arguments"]
            for key in json.loads(arguments) if isinstance(arguments, str) else arguments:
                if key not in turn:
                    raise BadRow(f"the chat template drops the argument {key!r} of message {index + 1}", reason=DROPPED)


def common(one: str, two: str) -> int:
    """Length of the common prefix."""
    most = min(len(one), len(two))
    return next((i for i in range(most) if one[i] != two[i]), most)
