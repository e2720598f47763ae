"""The blocks of a page as text, by rich: in colours and as wide as the terminal, or plain and never cut in a pipe."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table as Columns
from rich.text import Text

from ...data.histogram import Bar
from .blocks import Block, Heading, Note, Run, Table, Texts, one_line

BAR = 40  # columns of the longest bar
UNLIMITED = 10_000  # columns of what is no terminal


def show(title: str, blocks: Iterable[Block]) -> None:
    """Print a page's blocks but its charts."""
    terminal = sys.stdout.isatty()
    colour = not os.environ.get("NO_COLOR") and (bool(os.environ.get("FORCE_COLOR")) or terminal)
    width = shutil.get_terminal_size().columns if terminal else UNLIMITED
    print(text(title, blocks, colour=colour, width=width), end="")


def text(title: str, blocks: Iterable[Block], *, colour: bool = False, width: int = UNLIMITED) -> str:
    """The blocks as text. Without colour, what is supervised stands between ⟦ and ⟧."""
    system = "standard" if colour else None
    console = Console(file=io.StringIO(), color_system=system, force_terminal=colour, width=width, highlight=False)
    ways: dict[type, Callable] = {Heading: _heading, Note: _note, Table: _table, Texts: _texts}
    console.out(title, style="bold")
    for block in blocks:
        if type(block) in ways:
            console.out()
            ways[type(block)](block, console)
    return console.file.getvalue()


def _heading(heading: Heading, console: Console) -> None:
    console.out(f"== {heading.text} ==", style="bold")


def _note(note: Note, console: Console) -> None:
    console.print(Padding(Text(note.text), (0, 0, 0, 2), expand=False))


def _table(table: Table, console: Console) -> None:
    console.out(table.title, style="bold")
    columns = Columns(box=None, show_header=not table.facts, header_style="", padding=(0, 2, 0, 0), pad_edge=False)
    for number, cell in enumerate(table.rows[0]):
        name = "" if table.facts else table.head[number]
        columns.add_column(Text(name), justify="right" if cell.value else "left", overflow="fold")
    for row in table.rows:
        columns.add_row(*(Text(cell.text) for cell in row))
    with console.capture() as lines:
        console.print(Padding(columns, (0, 0, 0, 2), expand=False))
    console.out("\n".join(line.rstrip() for line in lines.get().splitlines()))
    if table.note:
        _note(Note(table.note), console)
    if table.bars:
        console.out()
        _histogram(table.bars, console)


def _histogram(bars: Sequence[Bar], console: Console) -> None:
    """A line for each bar. A bar that is not empty is never drawn empty."""
    most = max(bar.count for bar in bars)
    labels = [f"{bar.first:,}" if bar.first == bar.last else f"{bar.first:,}-{bar.last:,}" for bar in bars]
    width, digits = max(map(len, labels)), len(f"{most:,}")
    for label, bar in zip(labels, bars):
        blocks = "█" * -(-bar.count * BAR // most)
        console.out(f"  {label:>{width}} {blocks:<{BAR}} {bar.count:>{digits},}")


def _texts(texts: Texts, console: Console) -> None:
    console.out(texts.title, style="bold")
    for label, runs in texts.texts:
        console.out(f"  {one_line(label)}\n")
        for run in runs:
            _run(run, console)
        console.out()


def _run(run: Run, console: Console) -> None:
    marks = "⟦⟧" if run.supervised and not console.color_system else ("", "")
    console.out(marks[0], end="")
    for text, special in run.pieces:
        style = f"{'green' if run.supervised else ''}{' dim' if special else ''}".strip()
        console.out(text, style=style or None, end="")
    console.out(marks[1], end="")
