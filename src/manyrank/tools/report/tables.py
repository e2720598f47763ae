"""Titled tables of labelled values and their HTML; everything that is shown is escaped. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ...data.histogram import Bar

# What a terminal or a browser would obey, or cannot show: control characters but newline and tab, half surrogate pairs,
# and the marks that turn the direction of text.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Cell:
    """A text, and where it is a figure also the exact number, as `repr` writes it."""

    text: str
    value: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under column heads; a table of `facts` has none, and each row is a label and its value."""

    key: str
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    @property
    def facts(self) -> bool:
        return not self.head


def visible(text: str) -> str:
    """The text with what would not be seen, or would do something, written out: \\x1b."""
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


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


# HTML


def table_html(table: Table, under: str = "") -> str:
    """A card with the table; `under` is HTML that comes below it."""
    inner = _facts(table) if table.facts else _columns(table)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<section class="card" id="{escape(table.key)}"><h3>{escape(table.title)}</h3>{inner}{note}{under}</section>'
    )


def _facts(table: Table) -> str:
    pairs = (f"<div><dt>{cell_html(label)}</dt><dd>{cell_html(value)}</dd></div>" for label, value in table.rows)
    return f'<dl class="facts">{"".join(pairs)}</dl>'


def _columns(table: Table) -> str:
    kinds = [' class="figure"' if cell.value else "" for cell in table.rows[0]]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, table.head))
    rows = (
        "<tr>" + "".join(f"<td{kind}>{cell_html(cell)}</td>" for kind, cell in zip(kinds, row)) + "</tr>"
        for row in table.rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def cell_html(cell: Cell) -> str:
    """The text; of a figure also its value, for whoever reads the page by a program."""
    return f'<data value="{escape(cell.value)}">{escape(cell.text)}</data>' if cell.value else escape(cell.text)


def histogram(bars: Sequence[Bar]) -> str:
    """A bar for each range of lengths, as long as its count."""
    most = max(bar.count for bar in bars)
    rows = (
        f'<span class="range">{_range(bar)}</span>'
        f'<div class="track"><div class="bar" style="width:{100 * bar.count / most:.2f}%"></div></div>{cell_html(count(bar.count))}'
        for bar in bars
    )
    return f'<h3 style="margin-top:1.25rem">Examples by tokens</h3><div class="bars">{"".join(rows)}</div>'


def _range(bar: Bar) -> str:
    return f"{bar.first:,}" if bar.first == bar.last else f"{bar.first:,}–{bar.last:,}"
