"""`manyrank data inspect`: what a recipe's data is, before anything is trained. The text view, and the command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from ...config.args import Parser, parse, parser
from ...config.resolve import resolve
from ...data.histogram import Bar
from ...data.stats import Part, Piece, SampleFacts, Survey, gather
from ...models.load import load_tokenizer
from ...rules.check import check_sources
from ..report.pages import check_page, write_page
from ..report.tables import Table, one_line, visible
from .inspection_html import page
from .inspection_tables import bad_rows_note, overlap, part_tables, reading_tables, sample_line, settings

PROG = "manyrank data inspect"
GREEN, DIM, BOLD, OFF = "\x1b[32m", "\x1b[2m", "\x1b[1m", "\x1b[0m"
BAR = 40  # columns of the longest bar


def main(argv: Sequence[str]) -> int:
    """Look at a recipe's data: print it, and write it as a page too where --html says so.

    Raises:
        UserError: a wrong option, recipe or source, or a page that cannot be written there.
    """
    own, rest = _options(Parser(prog=PROG, add_help=False, allow_abbrev=False)).parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        print(_help())
        return 0
    if own.html:
        check_page(own.html)
    line = parse(rest, prog=PROG, launch=False, more=("samples", "html"))
    resolved = resolve(line.recipe, line.overrides)
    check_sources(resolved)
    config = resolved.config
    recipe = Path(line.recipe).stem if line.recipe else "command line"
    survey = gather(config, load_tokenizer(config), recipe=recipe, samples=own.samples)
    lines = [*text(survey, colour=_has_colour())]
    if own.html:
        write_page(page(survey), own.html)
        lines += ["", f"written to {own.html}"]
    print("\n".join(lines))
    return 0


def _options(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    shown = made.add_argument_group("what to show")
    shown.add_argument(
        "--samples", type=_whole, default=3, metavar="N", help="examples to show of each side (default: 3)"
    )
    shown.add_argument("--html", type=Path, metavar="FILE", help="write the same as a page too")
    return made


def _help() -> str:
    made = _options(parser(PROG, launch=False))
    made.usage = f"{PROG} RECIPE [--key value ...] [--samples N] [--html FILE]"
    made.description = "Show what a recipe trains on: sources, lengths, bad rows, packing, and what is learned."
    return made.format_help()


def _whole(given: str) -> int:
    if not (given.isascii() and given.isdigit()):
        raise argparse.ArgumentTypeError(f"{given!r} is not a count")
    return int(given)


def _has_colour() -> bool:
    return not os.environ.get("NO_COLOR") and (bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty())


# The text view


def text(survey: Survey, *, colour: bool) -> Iterator[str]:
    """The survey as lines. Without colour, what is learned stands between ⟦ and ⟧."""
    paint = Paint(colour)
    yield paint.bold(f"Data of {one_line(survey.recipe)}")
    yield from _table(settings(survey), paint)
    for reading in survey.readings:
        for table in reading_tables(reading):
            yield from _table(table, paint)
    if note := bad_rows_note(survey):
        yield from ("", f"  {note}")
    for part in survey.parts:
        yield from _part(part, paint)
    if found := overlap(survey):
        yield from _table(found, paint)
    for part in survey.parts:
        for number, sample in enumerate(part.samples, 1):
            yield from _sample(part.name, number, sample, paint)


class Paint:
    """Colours, or what stands for them."""

    def __init__(self, colour: bool) -> None:
        self.colour = colour

    def bold(self, text: str) -> str:
        return f"{BOLD}{text}{OFF}" if self.colour else text

    def learned(self, text: str) -> str:
        return text if self.colour else f"⟦{text}⟧"

    def piece(self, piece: Piece) -> str:
        codes = (GREEN if piece.supervised else "") + (DIM if piece.special else "")
        return f"{codes}{visible(piece.text)}{OFF}" if self.colour and codes else visible(piece.text)


def _part(part: Part, paint: Paint) -> Iterator[str]:
    yield from ("", paint.bold(f"== {part.name} =="))
    for table in part_tables(part):
        yield from _table(table, paint)
        if table.key.endswith("-lengths"):
            yield ""
            yield from histogram(part.lengths.bars)


def histogram(bars: Sequence[Bar]) -> Iterator[str]:
    """A line for each bar. A bar that is not empty is never drawn empty."""
    most = max(bar.count for bar in bars)
    labels = [f"{bar.first:,}" if bar.first == bar.last else f"{bar.first:,}-{bar.last:,}" for bar in bars]
    width, digits = max(map(len, labels)), len(f"{most:,}")
    for label, bar in zip(labels, bars):
        yield f"  {label:>{width}} {'█' * -(-bar.count * BAR // most):<{BAR}} {bar.count:>{digits},}"


def _table(table: Table, paint: Paint) -> Iterator[str]:
    yield from ("", paint.bold(table.title))
    head = [table.head] if table.head else []
    lines = [*head, *(tuple(cell.text for cell in row) for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    right = [bool(cell.value) for cell in table.rows[0]]
    for line in lines:
        cells = (
            f"{cell:>{width}}" if number else f"{cell:<{width}}" for cell, width, number in zip(line, widths, right)
        )
        yield f"  {'  '.join(cells)}".rstrip()
    if table.note:
        yield f"  {table.note}"


def _sample(name: str, number: int, sample: SampleFacts, paint: Paint) -> Iterator[str]:
    yield ""
    yield paint.bold(f"{name} sample {number}: {one_line(sample.source)}, row {sample.row:,}")
    yield f"  {sample_line(sample)}"
    yield from ("", "".join(_runs(sample, paint)))


def _runs(sample: SampleFacts, paint: Paint) -> Iterator[str]:
    for learned, pieces in groupby(sample.pieces, key=lambda piece: piece.supervised):
        run = "".join(map(paint.piece, pieces))
        yield paint.learned(run) if learned else run
