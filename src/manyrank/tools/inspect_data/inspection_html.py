"""A survey as one page that needs nothing else: no network, no script, the style inline, everything from rows escaped."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import groupby

from ...data.stats import Part, SampleFacts, Survey
from ..report.pages import document
from ..report.tables import histogram, one_line, table_html, visible
from .inspection_tables import bad_rows_note, overlap, part_tables, reading_tables, sample_line, settings

LEGEND = (
    '<p class="legend">Tokens as the model sees them: '
    '<span class="learned">supervised</span>, '
    "not supervised, "
    '<span class="special">special token</span>.</p>'
)


def page(survey: Survey) -> str:
    """The whole document."""
    return document(f"Data of {one_line(survey.recipe)}", "\n".join(_body(survey)))


def _body(survey: Survey) -> Iterator[str]:
    yield table_html(settings(survey))
    yield "<h2>What was read</h2>"
    yield from (table_html(table) for reading in survey.readings for table in reading_tables(reading))
    if note := bad_rows_note(survey):
        yield f'<p class="card warning">{escape(note)}</p>'
    for part in survey.parts:
        yield from _part(part)
    if found := overlap(survey):
        yield table_html(found)
    for part in survey.parts:
        if part.samples:
            yield f"<h2>{escape(part.name)} samples</h2>{LEGEND}"
            yield from (_sample(sample) for sample in part.samples)


def _part(part: Part) -> Iterator[str]:
    yield f"<h2>{escape(part.name)} data</h2>"
    for table in part_tables(part):
        under = histogram(part.lengths.bars) if table.key.endswith("-lengths") else ""
        yield table_html(table, under)


def _sample(sample: SampleFacts) -> str:
    runs = []
    for learned, pieces in groupby(sample.pieces, key=lambda piece: piece.supervised):
        run = "".join(
            f'<span class="special">{escape(visible(piece.text))}</span>'
            if piece.special
            else escape(visible(piece.text))
            for piece in pieces
        )
        runs.append(f'<span class="learned">{run}</span>' if learned else run)
    title = f"{escape(one_line(sample.source))}, row {sample.row:,}"
    # A browser drops one newline after <pre>: this one, not one of the sample's.
    return (
        f'<article class="card sample"><h3>{title}</h3><p>{escape(sample_line(sample))}</p>'
        f"<pre>\n{''.join(runs)}</pre></article>"
    )
