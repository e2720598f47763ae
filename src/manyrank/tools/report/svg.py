"""Curves as inline SVG: axes with round ticks, a legend, light and dark, no script. Long curves are thinned out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

Point = tuple[float, float]

WIDTH, HEIGHT = 480, 240
LEFT, RIGHT, TOP, BOTTOM = 54, 18, 10, 36
MOST = 300  # points that are drawn of a curve
SMOOTH = 60  # points of the mean that is drawn over a curve that was thinned out
DOTS = 40  # up to so many points are marked
COLOURS = 8
STYLE = """
:root { --c0: #2f74b5; --c1: #c8553d; --c2: #3f8a55; --c3: #8a5bb5; --c4: #a87614; --c5: #1f8f8f; --c6: #a34f7a; --c7: #6b6b64; }
@media (prefers-color-scheme: dark) { :root { --c0: #6aa7de; --c1: #f08a70; --c2: #79c78e; --c3: #b792e0; --c4: #e0b45c;
  --c5: #62cfcf; --c6: #dd8ab3; --c7: #b5b4aa; } }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1rem; margin: 0 0 1rem; }
.charts .card { margin: 0; min-width: 0; }
.charts svg { display: block; width: 100%; height: auto; }
.charts text { fill: var(--soft); font: 12px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); }
.curve { fill: none; stroke-width: 1.75; stroke-linejoin: round; stroke-linecap: round; }
.faint { opacity: .35; stroke-width: 1; }
.dashed { stroke-dasharray: 6 4; }
.level { stroke: var(--ink); stroke-dasharray: 2 3; }
.keys { margin: -.4rem 0 .5rem; color: var(--soft); font-size: .8rem; line-height: 1.4; overflow-wrap: anywhere; }
.keys i { display: inline-block; width: 1.1rem; height: 0; border-top: 3px solid; vertical-align: middle; margin-right: .35rem; }
.keys i.dashed { border-top-style: dashed; } .keys i.level { border-top: 2px dotted var(--ink); }
.keys span { margin-right: 1rem; }
"""


@dataclass(frozen=True)
class Curve:
    """Points (x, y) with x rising; a y that is not finite is a gap. `number` chooses colour and dashes."""

    name: str
    points: Sequence[Point]
    number: int = 0

    @property
    def colour(self) -> str:
        return f"var(--c{self.number % COLOURS})"

    @property
    def dashes(self) -> str:
        return " dashed" if self.number // COLOURS % 2 else ""


@dataclass(frozen=True)
class Chart:
    """Curves over the same x.

    Attributes:
        from_zero: whether the y axis begins at 0.
        level: a name and a y to mark across the chart.
        x_name: what x counts.
    """

    key: str
    title: str
    curves: Sequence[Curve]
    from_zero: bool = False
    level: tuple[str, float] | None = None
    x_name: str = "step"


def chart_html(chart: Chart) -> str:
    """A card with the chart; empty where no curve has a finite point."""
    finite = [point for curve in chart.curves for point in curve.points if math.isfinite(point[1])]
    if not finite:
        return ""
    frame = _Frame.around(finite, chart)
    body = "".join([*frame.axes(chart.x_name), *_level(chart, frame)])
    long = [curve for curve in chart.curves if len(curve.points) > MOST]  # their means are drawn over all of them
    body += "".join(_path(thinned(curve.points), frame, curve, " faint") for curve in long)
    body += "".join("".join(_curve(curve, frame)) for curve in chart.curves)
    title = escape(chart.title)
    return (
        f'<section class="card" id="{escape(chart.key)}"><h3>{title}</h3>{_keys(chart)}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{body}</svg></section>'
    )


def _keys(chart: Chart) -> str:
    """The legend, where there is more than one thing to tell apart."""
    if len(chart.curves) == 1 and not chart.level:
        return ""
    shown = [
        f'<span><i class="{curve.dashes.strip()}" style="border-color:{curve.colour}"></i>{escape(curve.name)}</span>'
        for curve in chart.curves
    ]
    if chart.level:
        shown.append(f'<span><i class="level"></i>{escape(chart.level[0])}</span>')
    return f'<p class="keys">{" ".join(shown)}</p>'


# The frame


@dataclass(frozen=True)
class _Frame:
    """The ranges that are shown, as places of ticks: the first and the last are the ends of y."""

    x_low: float
    x_high: float
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]

    @classmethod
    def around(cls, points: Sequence[Point], chart: Chart) -> _Frame:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        ys += [chart.level[1]] if chart.level else []
        x_low, x_high = min(xs), max(xs)
        if x_low == x_high:
            x_low, x_high = x_low - 1, x_high + 1
        inner = [tick for tick in ticks(x_low, x_high, 7, whole=True) if x_low <= tick <= x_high]
        low, high = min(0.0, *ys) if chart.from_zero else min(ys), max(ys)
        return cls(x_low, x_high, inner, ticks(low, high, 5))

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        part = (value - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_name: str) -> Iterator[str]:
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        for value in self.y_ticks:
            y = f"{self.y(value):.1f}"
            yield f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>'
            yield f'<text x="{LEFT - 6}" y="{y}" dy=".35em" text-anchor="end">{label(value, self.y_ticks)}</text>'
        yield f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
        for value in self.x_ticks:
            x = f"{self.x(value):.1f}"
            yield f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>'
            yield f'<text x="{x}" y="{bottom + 17}" text-anchor="middle">{label(value, self.x_ticks)}</text>'
        yield f'<text x="{right}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_name)}</text>'


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """About `most` round values, 1, 2 or 5 times a power of ten apart, the first at most `low`, the last at least `high`.

    Args:
        whole: whether x counts something, so that there is nothing between whole numbers.
    """
    if low == high:
        pad = abs(low) / 2 or 0.5
        low, high = low - pad, high + pad
    least = (high - low) / most
    power = 10 ** math.floor(math.log10(least))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= least * (1 - 1e-9))
    step = max(step, 1) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def label(value: float, among: Sequence[float]) -> str:
    """A tick in few characters, with as many digits as tell it from the others."""
    if not value:
        return "0"
    largest = max(map(abs, among))
    step = among[1] - among[0] if len(among) > 1 else largest or 1
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if largest >= size:
            scale = 1e3 if unit == "k" else size
            return f"{value / scale:.{_decimals(step / scale)}f}{unit}"
    if largest < 1e-3:
        digits = max(0, math.floor(math.log10(largest)) - math.floor(math.log10(step) + 1e-9))
        return f"{value:.{digits}e}".replace("e-0", "e-")
    return f"{value:.{_decimals(step)}f}"


def _decimals(step: float) -> int:
    return max(0, -math.floor(math.log10(step) + 1e-9))


# The curves


def thinned(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """At most about `most` points: of each stretch the lowest and the highest, so that no spike gets lost."""
    if len(points) <= most:
        return list(points)
    kept = [points[0]]
    for stretch in _stretches(points[1:-1], (most - 2) // 2):
        finite = [point for point in stretch if math.isfinite(point[1])]
        gap = [point for point in stretch if not math.isfinite(point[1])][:1]
        ends = [min(finite, key=_height), max(finite, key=_height)] if finite else []
        kept += sorted({*ends, *gap}, key=lambda point: point[0])
    return [*kept, points[-1]]


def smoothed(points: Sequence[Point], count: int = SMOOTH) -> list[Point]:
    """The means of `count` stretches, each in the middle of its own; what is not finite does not count."""
    finite = [point for point in points if math.isfinite(point[1])]
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part))
        for part in _stretches(finite, count)
        if part
    ]


def _height(point: Point) -> float:
    return point[1]


def _stretches(points: Sequence[Point], count: int) -> Iterator[Sequence[Point]]:
    edges = [len(points) * turn // count for turn in range(count + 1)]
    return (points[start:end] for start, end in pairwise(edges))


def _curve(curve: Curve, frame: _Frame) -> Iterator[str]:
    yield _path(smoothed(curve.points) if len(curve.points) > MOST else curve.points, frame, curve)
    if len(curve.points) <= DOTS:
        for x, y in curve.points:
            if math.isfinite(y):
                yield (
                    f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.5" fill="{curve.colour}">'
                    f"<title>{x:,g}: {y:.6g}</title></circle>"
                )


def _path(points: Iterable[Point], frame: _Frame, curve: Curve, more: str = "") -> str:
    steps, draw = [], "M"
    for x, y in points:
        if not math.isfinite(y):
            draw = "M"
            continue
        steps.append(f"{draw}{frame.x(x):.1f} {frame.y(y):.1f}")
        draw = "L"
    return f'<path class="curve{curve.dashes}{more}" stroke="{curve.colour}" d="{"".join(steps)}"/>'


def _level(chart: Chart, frame: _Frame) -> Iterator[str]:
    if chart.level:
        y = f"{frame.y(chart.level[1]):.1f}"
        yield f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
