"""Curves as inline SVG, drawn by matplotlib: light and dark, no script. Long curves are thinned.

The SVG holds numbers alone, and the page's own style gives it colours and fonts: names of users stand in the page's
legend, where matplotlib cannot take a `$` of them for a formula.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]

WIDTH, HEIGHT = 480, 240
FRAME = (54 / WIDTH, 36 / HEIGHT, (WIDTH - 72) / WIDTH, (HEIGHT - 52) / HEIGHT)  # left, bottom, width, height
MOST = 300  # points that are drawn of a curve
SMOOTH = 60  # points of the mean that is drawn over a thinned curve
DOTS = 40  # curves of up to so many points have them marked
# What is drawn in these colours gets the style's variables --c0, --c1 ... in their place, and so those of dark pages.
COLOURS = ("#2f74b5", "#c8553d", "#3f8a55", "#8a5bb5", "#a87614", "#1f8f8f", "#a34f7a", "#6b6b64")
NAMED = {colour: f"var(--c{number})" for number, colour in enumerate(COLOURS)}
NAMED |= {"#e2e1db": "var(--line)", "#66655f": "var(--soft)", "#1d1d1b": "var(--ink)"}
GRID, SOFT, INK = [*NAMED][-3:]
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "manyrank", "path.simplify": False}
UNUSED = r'<defs>\s*<style.*?</defs>|<defs>\s*<clipPath.*?</defs>| clip-path="[^"]*"| id="(?!m[0-9a-f]{10})[^"]*"'
UNUSED += r'|font-family: [^;"]*;? ?| transform="rotate\(-0[^"]*"|(?<=>)\s+(?=<)'


@dataclass(frozen=True)
class Curve:
    """Points (x, y) with x rising; a y that is not finite is a gap. `number` chooses colour and dashes."""

    name: str
    points: Sequence[Point]
    number: int = 0

    @property
    def colour(self) -> str:
        return COLOURS[self.number % len(COLOURS)]

    @property
    def variable(self) -> str:
        """The colour in a page's style."""
        return NAMED[self.colour]

    @property
    def dashed(self) -> bool:
        return self.number // len(COLOURS) % 2 == 1


@dataclass(frozen=True)
class Chart:
    """Curves over the same steps.

    Attributes:
        from_zero: whether the y axis begins at 0.
        level: a name and a y to mark across the chart.
    """

    key: str
    title: str
    curves: Sequence[Curve]
    from_zero: bool = False
    level: tuple[str, float] | None = None

    @property
    def is_empty(self) -> bool:
        return not any(math.isfinite(y) for curve in self.curves for _, y in curve.points)

    @property
    def svg(self) -> str:
        """The chart's <svg> element."""
        with _matplotlib():
            from matplotlib.figure import Figure

            figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
            _draw(self, figure.add_axes(FRAME))
            file = io.StringIO()
            figure.savefig(
                file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
            )
        dots = (point for curve in self.curves if len(curve.points) <= DOTS for point in curve.points)
        return _inline(file.getvalue(), dots)


@contextlib.contextmanager
def _matplotlib() -> Iterator[None]:
    """Use matplotlib's own defaults, not the user's, and keep its notes on fonts and caches out of a run's output."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        from matplotlib import style

        with style.context(["default", SETTINGS]):
            yield
    finally:
        logger.setLevel(level)


def _draw(chart: Chart, axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    for curve in chart.curves:
        if len(curve.points) > MOST:  # their means are drawn over all of them
            axes.plot(*zip(*thinned(curve.points)), color=curve.colour, linewidth=1, alpha=0.35)
    for curve in filter(lambda curve: curve.points, chart.curves):
        points = smoothed(curve.points) if len(curve.points) > MOST else curve.points
        look = {"linestyle": "--" if curve.dashed else "-", "marker": "o" if len(curve.points) <= DOTS else ""}
        axes.plot(*zip(*points), color=curve.colour, linewidth=1.75, markersize=5, solid_joinstyle="round", **look)
    if chart.level:
        axes.axhline(chart.level[1], color=INK, linewidth=1, linestyle=":")
    if chart.from_zero and axes.dataLim.y0 >= 0:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(_tick)
    axes.yaxis.set_major_formatter(_tick)
    axes.set_xlabel("step", loc="right", color=SOFT, size=12)
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(left=False, bottom=False, labelcolor=SOFT, labelsize=12)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)


def _tick(value: float, _: int) -> str:
    """A tick in few characters: 0.25, 1.5e-4, 20k."""
    from matplotlib.ticker import EngFormatter

    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return EngFormatter(sep="")(value) if abs(value) >= 1e3 else f"{value:.6g}"


def _inline(svg: str, dots: Iterable[Point]) -> str:
    """The SVG for a page: without what a file of its own needs, in the page's colours, each dot with its value."""
    body = svg[svg.index(">", svg.index("<svg")) + 1 :].replace("xlink:href", "href")
    body = re.sub(UNUSED, "", body, flags=re.DOTALL)
    for colour, name in NAMED.items():
        body = body.replace(colour, name)
    values = (f"<title>{x:,g}: {y:.6g}</title>" for x, y in dots if math.isfinite(y))
    body = re.sub("(<use [^>]*)/>", lambda match: f"{match[1]}>{next(values)}</use>", body)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{body}'


def thinned(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """At most about `most` points: of each stretch the lowest and the highest, so that no spike gets lost."""
    if len(points) <= most:
        return list(points)
    heights = np.array([y for _, y in points])
    finite = np.isfinite(heights)
    chosen = {0, len(points) - 1}
    for stretch in np.array_split(np.arange(1, len(points) - 1), (most - 2) // 2):
        drawn, gaps = stretch[finite[stretch]], stretch[~finite[stretch]]
        chosen |= {drawn[heights[drawn].argmin()], drawn[heights[drawn].argmax()]} if len(drawn) else set()
        chosen |= set(gaps[:1])
    return [points[number] for number in sorted(chosen)]


def smoothed(points: Sequence[Point], count: int = SMOOTH) -> list[Point]:
    """The means of `count` stretches, each in the middle of its own; what is not finite does not count."""
    finite = np.array([point for point in points if math.isfinite(point[1])]).reshape(-1, 2)
    return [tuple(stretch.mean(axis=0)) for stretch in np.array_split(finite, count) if len(stretch)]
