"""A survey as one page that needs nothing else: no network, no script, the style inline, everything from rows escaped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby

from .inspection_tables import (
    Cell,
    Table,
    bad_rows_note,
    count,
    one_line,
    overlap,
    part_tables,
    reading_tables,
    sample_line,
    settings,
    visible,
)
from .survey import Bar, Part, SampleFacts, Survey

# The browser itself refuses to fetch or run anything, should something ever get past the escaping.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #1d1d1b; --soft: #66655f; --line: #e2e1db;
  --bar: #2f74b5; --track: #eeede8; --learned: #d3f0dc; --learned-ink: #0a5227; --warn: #fdf0d5; --warn-ink: #6b4300; }
@media (prefers-color-scheme: dark) { :root { --page: #151514; --card: #1e1e1c; --ink: #e9e8e2; --soft: #a3a29a;
  --line: #35342f; --bar: #6aa7de; --track: #2a2a27; --learned: #173f29; --learned-ink: #b4f0c8; --warn: #3d2f10;
  --warn-ink: #f5d48c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { margin: 0 0 1.25rem; font-size: 1.7rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.25rem; }
h2::first-letter { text-transform: uppercase; }
h3 { margin: 0 0 .75rem; font-size: .95rem; font-weight: 600; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.1rem; margin: 0 0 1rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .9rem 1.25rem; align-items: end;
  margin: 0; }
.facts dt { color: var(--soft); font-size: .8rem; line-height: 1.3; }
.facts dd { margin: 0; font-size: 1.05rem; overflow-wrap: anywhere; }
.facts data { font-size: 1.3rem; font-weight: 600; }
data { font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th { color: var(--soft); font-size: .8rem; font-weight: 500; text-align: left; }
th, td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td { overflow-wrap: anywhere; min-width: 7.5rem; }
.figure { text-align: right; white-space: nowrap; min-width: 0; }
.figure:first-child { text-align: left; }
.figure:last-child { padding-right: 0; }
.note { margin: .75rem 0 0; color: var(--soft); font-size: .85rem; }
.warning { background: var(--warn); color: var(--warn-ink); border-color: transparent; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 2px .75rem; align-items: center;
  font-size: .82rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
.bars .range { color: var(--soft); text-align: right; }
.bars .track { background: var(--track); border-radius: 2px; height: .95rem; }
.bars .bar { background: var(--bar); border-radius: 2px; height: 100%; }
.bars data { text-align: right; }
.legend { color: var(--soft); font-size: .85rem; margin: 0 0 1rem; }
.sample h3 { margin: 0; overflow-wrap: anywhere; }
.sample p { margin: .1rem 0 .75rem; color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
pre { margin: 0; max-height: 34rem; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.6 ui-monospace, monospace; }
.learned { background: var(--learned); color: var(--learned-ink); border-radius: 2px;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.special { opacity: .55; }
"""
LEGEND = (
    '<p class="legend">Tokens as the model sees them: '
    '<span class="learned">supervised</span>, '
    "not supervised, "
    '<span class="special">special token</span>.</p>'
)


def page(survey: Survey) -> str:
    """The whole document."""
    title = f"Data of {escape(one_line(survey.recipe))}"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n<h1>{title}</h1>\n{chr(10).join(_body(survey))}\n</main>\n</body>\n</html>\n"
    )


def _body(survey: Survey) -> Iterator[str]:
    yield _table(settings(survey))
    yield "<h2>What was read</h2>"
    yield from (_table(table) for reading in survey.readings for table in reading_tables(reading))
    if note := bad_rows_note(survey):
        yield f'<p class="card warning">{escape(note)}</p>'
    for part in survey.parts:
        yield from _part(part)
    if found := overlap(survey):
        yield _table(found)
    for part in survey.parts:
        if part.samples:
            yield f"<h2>{escape(part.name)} samples</h2>{LEGEND}"
            yield from (_sample(sample) for sample in part.samples)


def _part(part: Part) -> Iterator[str]:
    yield f"<h2>{escape(part.name)} data</h2>"
    for table in part_tables(part):
        under = histogram(part.lengths.bars) if table.key.endswith("-lengths") else ""
        yield _table(table, under)


def _table(table: Table, under: str = "") -> str:
    inner = _facts(table) if table.facts else _columns(table)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<section class="card" id="{escape(table.key)}"><h3>{escape(table.title)}</h3>{inner}{note}{under}</section>'
    )


def _facts(table: Table) -> str:
    pairs = (f"<div><dt>{_cell(label)}</dt><dd>{_cell(value)}</dd></div>" for label, value in table.rows)
    return f'<dl class="facts">{"".join(pairs)}</dl>'


def _columns(table: Table) -> str:
    kinds = [' class="figure"' if cell.value else "" for cell in table.rows[0]]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, table.head))
    rows = (
        "<tr>" + "".join(f"<td{kind}>{_cell(cell)}</td>" for kind, cell in zip(kinds, row)) + "</tr>"
        for row in table.rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _cell(cell: Cell) -> str:
    return f'<data value="{escape(cell.value)}">{escape(cell.text)}</data>' if cell.value else escape(cell.text)


def histogram(bars: Sequence[Bar]) -> str:
    """A bar for each range of lengths, as long as its count."""
    most = max(bar.count for bar in bars)
    rows = (
        f'<span class="range">{_range(bar)}</span>'
        f'<div class="track"><div class="bar" style="width:{100 * bar.count / most:.2f}%"></div></div>{_cell(count(bar.count))}'
        for bar in bars
    )
    return f'<h3 style="margin-top:1.25rem">Examples by tokens</h3><div class="bars">{"".join(rows)}</div>'


def _range(bar: Bar) -> str:
    return f"{bar.first:,}" if bar.first == bar.last else f"{bar.first:,}–{bar.last:,}"


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
