"""The blocks of a page as plain values: headings, notes, tables, texts, charts. A terminal can show the same. No torch.

Whoever makes a block of a user's text has it written out by `one_line` or `visible`; `pages` escapes it for HTML.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from ...data.histogram import Bar
from .curves import Chart

# What a terminal or a browser would obey, or cannot show: control characters but newline and tab, half surrogate pairs,
# and the marks that turn the direction of text.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Heading:
    """The title of a part; `legend`: whether texts below have supervised tokens."""

    kind: ClassVar[str] = "heading"
    text: str
    legend: bool = False


@dataclass(frozen=True)
class Note:
    """A sentence on its own."""

    kind: ClassVar[str] = "note"
    text: str
    key: str = ""
    warning: bool = False


@dataclass(frozen=True)
class Cell:
    """A text, and where it is a figure also the exact number, as `repr` writes it."""

    text: str
    value: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under column heads; a table of `facts` has none, and each row is a label and its value.

    Attributes:
        bars: a histogram below it.
        folded: whether a page shows it only on request.
    """

    kind: ClassVar[str] = "table"
    key: str
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    bars: tuple[Bar, ...] = ()
    folded: bool = False

    @property
    def facts(self) -> bool:
        return not self.head


@dataclass(frozen=True)
class Run:
    """Neighbouring pieces of a text that are all supervised, or none of them: (text, whether it is a special token)."""

    pieces: tuple[tuple[str, bool], ...]
    supervised: bool = False


@dataclass(frozen=True)
class Texts:
    """Texts shown as they are, each under its label. `sample`: they belong to one example or question."""

    kind: ClassVar[str] = "texts"
    title: str
    texts: tuple[tuple[str, tuple[Run, ...]], ...]
    key: str = ""
    sample: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Charts:
    """Charts side by side, as far as there is room."""

    kind: ClassVar[str] = "charts"
    charts: tuple[Chart, ...]


Block = Heading | Note | Table | Texts | Charts


def plain(text: str) -> tuple[Run, ...]:
    """The runs of a text that is no sequence of tokens."""
    return (Run(((visible(text), False),)),)


def visible(text: str) -> str:
    """The text with what would not be seen, or would do something, written out: \\x1b."""
    return HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def word(text: str) -> Cell:
    return Cell(one_line(text))


def count(number: int) -> Cell:
    return Cell(f"{number:,}", repr(number))


def decimal(number: float) -> Cell:
    return Cell(f"{number:,.1f}".removesuffix(".0"), repr(number))


def share(part: float) -> Cell:
    return Cell(f"{part:.1%}", repr(part))
