"""The turns of a conversation that was rendered with marks.

    parts   <|im_start|>user\\n [0] <|im_end|>\\n<|im_start|>assistant\\n [1] <|im_end|>\\n
    turn                                                              |____________|

A turn that is one string begins with its mark. Any other is what changes when one mark takes the place of the turn; its
header must be the same, or end where the generation prompt does. It ends with the template's end-of-turn token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from .end_of_turn import common
from .placeholders import CHANGED, DROPPED, MARK, NO_STOP, OTHER, Form, Marked, Position, Slot, Turn, mark_text, written
from .types import BadRow, Message


class Renders(Protocol):
    """A chat template that can be asked."""

    tokens: re.Pattern  # every added token of the tokenizer
    special: frozenset[str]
    stops: tuple[str, ...]
    prompt: str  # what follows a question when an answer is asked for
    prompts: bool  # whether that is more than what follows it anyway

    def text(self, messages: Sequence[Message], *, tools=None, documents=None, generate: bool = False) -> str: ...

    def closing_of(self, text: str, messages: Sequence[Message]) -> str: ...


@dataclass
class MarkedText:
    """A conversation rendered with marks, and the search for its turns.

    Attributes:
        marks: the marks in `text`.
        parts: (marks + 1,), the text before, between and after them.
    """

    template: Renders
    marked: Marked
    form: Form
    tools: list[dict] | None
    documents: list[dict] | None
    text: str
    marks: list[re.Match]
    parts: list[str]

    def turn(self, index: int) -> Turn:
        """The supervised range of an assistant message, and where its end begins."""
        message = self.marked.messages[index]
        own = [k for k, mark in enumerate(self.marks) if self._slot(mark).message == index]
        kinds = [self._slot(self.marks[k]).kind for k in own]
        if kinds == ["content"] and not message.get("tool_calls") and index not in self.marked.pieced:
            return self._string(index, own[0])
        start, end = self._changed(index, thinks="thinking" in kinds)
        self._check_arguments(index, self.text[start:end])
        if not self._holds(index, start, end):
            raise BadRow(f"message {index + 1} (assistant) cannot be told from the others", reason=CHANGED)
        stop, stopped = self._end(start, end, index)
        if message.get("tool_calls") and "thinking" not in kinds:
            inner = MARK.sub("", self.text[start:stop])
            if any(one in inner for one in self.template.stops):
                raise BadRow(f"message {index + 1} (assistant) ends more than once", reason=CHANGED)
        return self._position(start), self._position(stop), self._position(stopped)

    def other(self, index: int) -> Turn:
        """The range of a message of another role; a BadRow unless it is one string with an end-of-turn token after it."""
        own = [k for k, mark in enumerate(self.marks) if self._slot(mark).message == index]
        if len(own) != 1 or index in self.marked.pieced:
            raise BadRow(f"message {index + 1} is not written as one string", reason=CHANGED)
        return self._string(index, own[0])

    def _string(self, index: int, k: int) -> Turn:
        blanks = self._blanks_kept(index, k)
        begin, end = self._stop(self.parts[k + 1], index)
        return (k, len(self.parts[k]) - blanks), (k + 1, begin), (k + 1, end)

    def opening(self, index: int) -> Position | None:
        """Find where a turn's generation prompt ends, if the turn begins with the template's prompt."""
        end = self._prompt_end(index)
        return None if end is None else self._position(end)

    def _slot(self, mark: re.Match) -> Slot:
        return self.marked.slots[int(mark[1])]

    def _stop(self, text: str, index: int) -> tuple[int, int]:
        """Find the end-of-turn token in what follows the content; blanks may be before it."""
        blanks = len(text) - len(text.lstrip())
        for stop in self.template.stops:
            if text.startswith(stop, blanks):
                return blanks, blanks + len(stop)
        raise BadRow(
            f"the chat template ends message {index + 1} (assistant) without an end-of-turn token", reason=NO_STOP
        )

    def _end(self, start: int, end: int, index: int) -> tuple[int, int]:
        """The same for a turn found by what changes: its last token may be an end of its own."""
        last = list(self.template.tokens.finditer(self.text, start, end))[-1:]
        try:
            begin, stopped = self._stop(self.text[end:], index)
        except BadRow:
            if last and last[0].end() == end and last[0][0] in self.template.special:
                return last[0].start(), end
            raise
        return end + begin, end + stopped

    def _holds(self, index: int, start: int, end: int) -> bool:
        """Return whether a range has all strings of a message and none of another. A result may repeat its call's name."""
        inside = [mark for mark in self.marks if mark.start() < end and mark.end() > start]
        names = {mark[0] for mark in inside}
        outside = [mark for mark in self.marks if mark.end() <= start or mark.start() >= end]
        return all(self._slot(mark).message == index for mark in inside) and all(
            mark[0] in names for mark in outside if self._slot(mark).message == index
        )

    def _render(self, messages: list[Message], *, generate: bool = False) -> str:
        text = self.template.text(messages, tools=self.tools, documents=self.documents, generate=generate)
        return text if generate else text + self.template.closing_of(text, messages)

    def _blanks_kept(self, index: int, k: int) -> int:
        """Count the blanks before the content that come from the content, and not from the template."""
        content = self.marked.messages[index]["content"]
        content = content if isinstance(content, str) else content[0]["text"]
        blanks = content[: len(content) - len(content.lstrip())]
        if not blanks:
            return 0
        messages = list(self.marked.messages)
        messages[index] = written({**messages[index], "content": content.lstrip()}, self.form)
        bare = MARK.split(self._render(messages))[::2]
        rest = self.parts[k].removeprefix(bare[k]) if len(bare) == len(self.parts) else None
        if rest is None or bare[k] + rest != self.parts[k] or not blanks.endswith(rest):
            raise BadRow(f"message {index + 1}: blanks before the content change the text", reason=CHANGED)
        return len(rest)

    # A turn by what changes

    def _changed(self, index: int, *, thinks: bool) -> tuple[int, int]:
        """Find what changes when one mark takes the place of a whole turn, in whole tokens.

        A turn with thinking begins where the generation prompt ends, so that the tag that opens the thinking is learned
        unless the prompt has it. Another begins where the content of a plain turn does, or else there too.
        """
        same_header, start, end = self._gap(index) or self._part(index)
        for token in self.template.tokens.finditer(self.text, max(0, start - 100), end + 100):
            start = token.start() if token.start() < start < token.end() else start
            end = token.end() if token.start() < end < token.end() else end
        if same_header and not thinks:
            return start, end
        prompt = self._prompt_end(index) if self.template.prompts else None
        if prompt is None:
            raise BadRow(
                f"the chat template writes message {index + 1} (assistant) after another header than it prompts with",
                reason=CHANGED,
            )
        return prompt, end

    def _gap(self, index: int) -> tuple[bool, int, int] | None:
        """The difference between the marks around the turn."""
        own = [k for k, mark in enumerate(self.marks) if self._slot(mark).message == index]
        if index not in self._plain or not own:
            return None
        before, left, right, after = self._plain[index]
        first, last = own[0], own[0]
        while last + 1 < len(self.marks) and self._slot(self.marks[last + 1]).message == index:
            last += 1
        a = self.marks[first - 1] if first else None
        b = self.marks[last + 1] if last + 1 < len(self.marks) else None
        if (a[0] if a else None) != before or (b[0] if b else None) != after:
            return None
        begin, stop = a.end() if a else 0, b.start() if b else len(self.text)
        return self._difference(self.text[begin:stop], left, right, begin)

    @cached_property
    def _plain(self) -> dict[int, tuple[str | None, str, str, str | None]]:
        """Map each turn that is more than a string to the marks and texts around it when it is only a mark."""
        many = {i for i, m in enumerate(self.marked.messages) if m["role"] == "assistant" and self._is_many(i)}
        messages = [
            written({"role": "assistant", "content": mark_text(OTHER + i)}, self.form) if i in many else message
            for i, message in enumerate(self.marked.messages)
        ]
        try:
            text = self._render(messages) if len(messages) < OTHER else ""
        except BadRow:  # a result must follow a call
            return {}
        marks, parts = list(MARK.finditer(text)), MARK.split(text)[::2]
        differences = {}
        for k, mark in enumerate(marks):
            if int(mark[1]) >= OTHER:
                around = marks[k - 1][0] if k else None, marks[k + 1][0] if k + 1 < len(marks) else None
                differences[int(mark[1]) - OTHER] = around[0], parts[k], parts[k + 1], around[1]
        return differences

    def _is_many(self, index: int) -> bool:
        kinds = [slot.kind for slot in self.marked.slots if slot.message == index]
        return kinds != ["content"] or index in self.marked.pieced

    def _part(self, index: int) -> tuple[bool, int, int]:
        """The difference in the conversation up to the turn."""
        before = list(self.marked.messages[:index])
        plain = written({"role": "assistant", "content": mark_text(OTHER)}, self.form)
        whole, changed = self._render([*before, self.marked.messages[index]]), self._render([*before, plain])
        left, middle, right = changed.partition(mark_text(OTHER))
        difference = self._difference(whole, left, right, 0)
        if not middle or not self.text.startswith(whole[: difference[2]]):
            raise BadRow(f"message {index + 1} (assistant) changes the turns around it", reason=CHANGED)
        return difference

    @staticmethod
    def _difference(text: str, left: str, right: str, at: int) -> tuple[bool, int, int]:
        """Return whether the header is that of a plain turn, but for a blank, and where the first and last change are."""
        start = common(text, left)
        end = len(text) - common(text[start:][::-1], right[::-1])
        return not left[start:].strip(), at + start, at + end

    def _prompt_end(self, index: int) -> int | None:
        """Find where the generation prompt of a turn ends, if the turn comes after it."""
        if index and self.marked.messages[index - 1]["role"] == "user":
            last = [mark for mark in self.marks if self._slot(mark).message == index - 1][-1:]
            if last and self.text.startswith(self.template.prompt, last[0].end()):
                return last[0].end() + len(self.template.prompt)
        try:
            prompt = self._render(self.marked.messages[:index], generate=True)
        except BadRow:
            return None
        marks = list(MARK.finditer(prompt))
        last = [mark for mark in self.marks if marks and mark[0] == marks[-1][0]][-1:]
        tail = prompt[marks[-1].end() :] if marks else ""
        return last[0].end() + len(tail) if last and self.text.startswith(tail, last[0].end()) else None

    def _position(self, place: int) -> Position:
        for k, mark in enumerate(self.marks):
            if place <= mark.start():
                return k, place - (self.marks[k - 1].end() if k else 0)
            if place < mark.end():
                raise BadRow("a turn begins or ends within a string", reason=CHANGED)
        return len(self.marks), place - (self.marks[-1].end() if self.marks else 0)

    def _check_arguments(self, index: int, turn: str) -> None:
        for call in self.marked.messages[index].get("tool_calls") or []:
            arguments = call["function"]["arguments"]
            for key in json.loads(arguments) if isinstance(arguments, str) else arguments:
                if key not in turn:
                    raise BadRow(f"the chat template drops the argument {key!r} of message {index + 1}", reason=DROPPED)
