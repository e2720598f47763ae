"""The pages of `manyrank report`: one run, or several side by side. Nothing is fetched, everything shown is escaped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape

from . import report_parts as parts
from .pages import document
from .run_record import RunRecord
from .svg import STYLE, Chart, chart_html
from .tables import Table, histogram, one_line, table_html, visible

MORE = """
details { margin: 0 0 1rem; } summary { cursor: pointer; color: var(--soft); margin: 0 0 .75rem; }
#figures .facts div:first-child { grid-column: 1 / -1; }
.sample .answer { margin: .6rem 0 0; font-size: .8rem; }
#config td:first-child, #defaults td:first-child { white-space: nowrap; }
#config td:last-child, #defaults td:last-child { color: var(--soft); font-size: .85rem; }
"""


def run_page(run: RunRecord) -> str:
    """One run."""
    return document(f"Run {one_line(run.name)}", "\n".join(_run(run)), STYLE + MORE)


def comparison_page(runs: Sequence[RunRecord]) -> str:
    """Several runs: their final figures, what differs in their configuration, and their curves one over the other."""
    names = parts.labels(runs)
    body = [table_html(parts.compared_figures(runs, names))]
    if differing := parts.compared_config(runs, names):
        body.append(table_html(differing))
    else:
        body.append('<p class="card" id="differing">The configurations do not differ.</p>')
    body += _charts(parts.compared_charts(runs, names))
    body += (note for run in runs for note in _unread(run))
    return document(f"{len(runs)} runs", "\n".join(body), STYLE + MORE)


def _run(run: RunRecord) -> Iterator[str]:
    yield table_html(parts.figures(run))
    yield from _unread(run)
    yield from _charts(parts.charts(run))
    yield from _of(run, "logs/memory.json", lambda: _tables(parts.memory(run)))
    yield from _of(run, "logs/samples.json", lambda: _samples(run))
    yield from _of(run, "logs/data.json", lambda: _data(run))
    yield "<h2>The run</h2>"
    yield from _of(run, "logs/history.jsonl", lambda: _tables(parts.history(run)))
    yield from _tables(parts.versions(run))
    yield from _launch(run)
    yield from _config(run)


def _of(run: RunRecord, name: str, shown: Callable[[], Iterable[str]]) -> Iterator[str]:
    """What is shown of a file; or, where it is JSON but has other things in it than a training writes, that it is damaged."""
    try:
        yield from list(shown())
    except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError):
        yield _damaged(run, name)


def _tables(table: Table | None) -> Iterator[str]:
    if table:
        yield table_html(table)


def _samples(run: RunRecord) -> Iterator[str]:
    if run.samples:
        yield "<h2>Samples before and after</h2>"
        yield from map(_sample, run.samples)
    if answers := parts.completions(run):
        yield table_html(answers)


def _data(run: RunRecord) -> Iterator[str]:
    if run.data:
        yield "<h2>Data</h2>"
        yield from (table_html(table, histogram(bars) if bars else "") for table, bars in parts.data_tables(run))


def _charts(charts: Iterator[Chart]) -> Iterator[str]:
    drawn = [drawing for chart in charts if (drawing := chart_html(chart))]
    if drawn:
        yield f'<div class="charts">{"".join(drawn)}</div>'
    else:
        yield '<p class="card">No step has been logged.</p>'


def _unread(run: RunRecord) -> Iterator[str]:
    yield from (_damaged(run, name) for name in run.unread)


def _damaged(run: RunRecord, name: str) -> str:
    return f'<p class="card warning">{escape(one_line(str(run.folder / name)))} is damaged, and not shown.</p>'


def _sample(entry: dict) -> str:
    answers = "".join(_answer(when, entry.get(when)) for when in ("before", "after"))
    return f'<article class="card sample"><h3>{escape(visible(str(entry.get("question", ""))))}</h3>{answers}</article>'


def _answer(when: str, text: str | None) -> str:
    shown = "(the run has not come to it)" if text is None else text
    # A browser drops one newline after <pre>: this one, not one of the answer's.
    return f'<p class="answer">{when}</p><pre>\n{escape(visible(str(shown)))}</pre>'


def _launch(run: RunRecord) -> Iterator[str]:
    if run.command:
        yield f'<section class="card" id="launch"><h3>Launched with</h3><pre>\n{escape(visible(run.command))}</pre></section>'
    if run.plan:
        yield _details(
            "Every machine's command, and the files", f'<pre class="card">\n{escape(visible(run.plan))}</pre>'
        )


def _config(run: RunRecord) -> Iterator[str]:
    if given := parts.config(run, given=True):
        yield table_html(given)
    if defaults := parts.config(run, given=False):
        yield _details("Defaults", table_html(defaults))


def _details(title: str, inner: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{inner}</details>"
