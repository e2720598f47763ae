"""A plan as a page: each strategy's memory as a bar, its figures, the scaling table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape

from .memory import GiB
from .pages import document
from .plan_view import headline, notes, scaling_cells, scaling_ends, training_hours
from .planner import Option, Plan, Scale

COLOURS = {
    "weights": "weights", "adapters": "trained", "gradients": "trained", "optimizer": "trained", "activations": "kept",
    "head and loss": "kept", "working": "kept", "gathered": "gathered", "context": "around", "slack": "around",
}  # fmt: skip
KINDS = {
    "weights": "weights", "trained": "adapters, gradients, optimizer", "kept": "activations, head, working",
    "gathered": "gathered", "around": "CUDA, slack",
}  # fmt: skip


def page(plan: Plan, *, tokens: int | None, price: float | None, scales: list[Scale], against: list[str]) -> str:
    """The whole document."""
    return document(f"Plan of {plan.chosen.setup.shape.name}", "\n".join(_body(plan, tokens, price, scales, against)))


def _body(
    plan: Plan, tokens: int | None, price: float | None, scales: list[Scale], against: list[str]
) -> Iterator[str]:
    yield f'<section class="card"><p>{"<br>".join(map(escape, headline(plan).strip().splitlines()))}</p>'
    yield f"<p><b>{escape(plan.chosen.strategy)}</b>: {escape(plan.why)}</p></section>"
    yield f'<section class="card" id="strategies"><h3>GiB of one GPU</h3>{_table(_HEAD, _rows(plan, tokens, price))}{_legend()}</section>'
    yield f'<section class="card" id="parts"><h3>Parts</h3>{_table(["strategy", *COLOURS, "loading", "host"], _parts(plan))}</section>'
    if scales:
        ends = "".join(f'<p class="note">{escape(line)}</p>' for line in scaling_ends(scales))
        head, *rows = scaling_cells(scales)
        yield f'<section class="card" id="scaling"><h3>Tokens a second on more machines, and what is left of the rate per GPU</h3>{_table(head, rows)}{ends}</section>'
    yield from (f'<p class="card warning">manyrank train refuses: {escape(what)}</p>' for what in against)
    yield from (f'<p class="note">{escape(note)}</p>' for note in notes(plan))


_HEAD = ["strategy", "verdict", "GiB", "", "tokens/s", "MFU", "micro-batch", "length", "hours", "$"]


def _rows(plan: Plan, tokens: int | None, price: float | None) -> Iterator[list[str]]:
    most = max([option.memory.peak for option in plan.options] + [plan.machine.memory or 0])
    for option in plan.options:
        hours = training_hours(option, tokens) if option.speed and tokens else None
        yield [
            f"<b>{option.strategy}</b>" if option is plan.chosen else option.strategy,
            escape(option.refused or str(option.verdict)),
            f"{option.memory.peak / GiB:.1f}",
            _stack(option, plan.machine.memory, most),
            f"{option.speed.tokens_per_second:,.0f}" if option.speed else "",
            f"{option.speed.mfu:.0%}" if option.speed else "",
            "" if option.largest_micro_batch is None else f"{option.largest_micro_batch:,}",
            "" if option.largest_max_length is None else f"{option.largest_max_length:,}",
            f"{hours:.1f}" if hours else "",
            f"{hours * price * option.speed.world:,.0f}" if hours and price else "",
        ]


def _stack(option: Option, available: int | None, most: int) -> str:
    parts = "".join(
        f'<span class="{kind}" style="width:{100 * option.memory.parts.get(name, 0) / most:.2f}%" title="{name}"></span>'
        for name, kind in COLOURS.items()
    )
    end = f'<i style="left:{100 * available / most:.2f}%" title="the GPU\'s memory"></i>' if available else ""
    return f'<div class="stack">{parts}{end}</div>'


def _legend() -> str:
    shown = (f'<span class="{kind}">&emsp;</span> {escape(name)}' for kind, name in KINDS.items())
    return f'<p class="legend">{" &ensp; ".join(shown)}</p>'


def _parts(plan: Plan) -> Iterator[list[str]]:
    for option in plan.options:
        found = option.memory
        sizes = [found.parts.get(name, 0) for name in COLOURS] + [found.loading, found.host]
        yield [option.strategy, *(f"{size / GiB:.2f}" if size else "" for size in sizes)]


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    top = "".join(f'<th class="figure">{escape(name)}</th>' for name in head)
    lines = ("<tr>" + "".join(f'<td class="figure">{cell}</td>' for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{"".join(lines)}</table></div>'
