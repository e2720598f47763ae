"""The items of a long JSON array, one after the other, in a memory that does not grow with the array.

[{"a": 1}, {"a": 2}, {"a": 3}, {"a": 4}]
           ^ at                              taken: dropped when more is read
         [ buffer            ]               a value that is cut at its end is tried again with twice as much
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from ..errors import UserError

CHUNK = 1 << 20  # characters read at a time
NEAR_THE_END = 16  # an error in the last characters of a buffer may be a value that is cut there, as in "fals"
BLANKS = re.compile(r"[ \t\r\n]*")


def items(file: TextIO, name: str) -> Iterator[tuple[Any, str]]:
    """The items of an array, each with its text as it stands in the file.

    Args:
        file: a text whose first character besides blanks is a bracket.
        name: what an error calls it.

    Raises:
        UserError: broken JSON, with its line and column; the items before it have been given.
    """
    window = _Window(file, name)
    window.take("[")
    if window.next_character() == "]":
        window.take("]")
    else:
        yield window.value()
        while window.take(",]") == ",":
            yield window.value()
    if window.next_character():
        raise window.error("there is more after the array")


class _Window:
    """A part of a long JSON text, which moves on as values are taken from it."""

    def __init__(self, file: TextIO, name: str) -> None:
        self.file, self.name = file, name
        self.buffer, self.at = "", 0
        self.line, self.column = 1, 1  # of the buffer's first character
        self.decoder = json.JSONDecoder()

    def error(self, problem: str, at: int | None = None) -> UserError:
        line, column = self._place(self.at if at is None else at)
        return UserError(
            f"broken JSON: {problem}", where=f"{self.name}, line {line}, column {column}", fix="fix that line"
        )

    def next_character(self) -> str:
        """The next one that is no blank; empty at the end."""
        while True:
            self.at = BLANKS.match(self.buffer, self.at).end()
            if self.at < len(self.buffer) or not self._read_on():
                return self.buffer[self.at : self.at + 1]

    def take(self, expected: str) -> str:
        character = self.next_character()
        if not character or character not in expected:
            raise self.error(f"expecting {' or '.join(expected)}")
        self.at += 1
        return character

    def value(self) -> tuple[Any, str]:
        """The next value, and its text."""
        self.next_character()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self.buffer) - NEAR_THE_END or error.msg.startswith("Unterminated string")
                if not (cut and self._read_on()):
                    raise self.error(error.msg, error.pos) from None
            except (RecursionError, ValueError) as error:
                raise self.error(str(error)) from None
            else:
                if end < len(self.buffer) or not self._read_on():  # a number may go on
                    raw, self.at = self.buffer[self.at : end], end
                    return value, raw

    def _read_on(self) -> bool:
        """Drop what was taken and read as much as is left, so that a long value takes few attempts."""
        added = self.file.read(max(CHUNK, len(self.buffer) - self.at))
        if added:
            self.line, self.column = self._place(self.at)
            self.buffer, self.at = self.buffer[self.at :] + added, 0
        return bool(added)

    def _place(self, at: int) -> tuple[int, int]:
        lines = self.buffer.count("\n", 0, at)
        column = at - self.buffer.rfind("\n", 0, at) if lines else self.column + at
        return self.line + lines, column
