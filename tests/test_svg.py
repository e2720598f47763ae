"""Curves as SVG: ticks that are round and enclose, thinning that keeps spikes, gaps where nothing is finite."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyrank.tools.report.svg import (
    HEIGHT,
    LEFT,
    MOST,
    RIGHT,
    WIDTH,
    Chart,
    Curve,
    chart_html,
    label,
    smoothed,
    thinned,
    ticks,
)

FINITE = st.floats(-1e12, 1e12, allow_nan=False).filter(lambda value: value == 0 or abs(value) > 1e-9)


def drawing(*curves: Curve, **more) -> ElementTree.Element:
    return ElementTree.fromstring(chart_html(Chart("key", "Title", curves, **more)))


def paths(section: ElementTree.Element) -> list[str]:
    return [path.get("d") for path in section.iter("path")]


def ends(path: str) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split())) for pair in re.findall(r"[ML]([\d. -]+)", path)]


@given(FINITE, FINITE)
def test_ticks_enclose_what_is_shown(one, other):
    low, high = sorted((one, other))
    found = ticks(low, high, 5)
    slack = (found[1] - found[0]) * 1e-6
    assert found[0] <= low + slack and found[-1] >= high - slack and 2 <= len(found) <= 8
    assert all(label(value, found) for value in found)


def shown(low: float, high: float) -> list[str]:
    found = ticks(low, high, 5)
    return [label(value, found) for value in found]


def test_ticks_are_round():
    assert ticks(0, 9.7, 5) == [0, 2, 4, 6, 8, 10]
    assert shown(1.21, 1.79) == ["1.2", "1.4", "1.6", "1.8"]
    assert shown(0, 100_000) == ["0", "20k", "40k", "60k", "80k", "100k"]
    assert shown(-0.5, 2.5e6) == ["-1M", "0", "1M", "2M", "3M"]
    assert shown(0, 2e-4) == ["0", "5.0e-5", "1.0e-4", "1.5e-4", "2.0e-4"]
    assert ticks(1, 2, 7, whole=True) == [1, 2]


@given(st.lists(FINITE, min_size=MOST + 1, max_size=3000), st.integers(20, MOST))
def test_thinning_keeps_the_ends_the_order_and_the_extremes(values, most):
    points = list(enumerate(values))
    found = thinned(points, most)
    assert len(found) <= most + 2 and found[0] == points[0] and found[-1] == points[-1]
    assert [x for x, _ in found] == sorted({x for x, _ in found})
    assert max(y for _, y in found) == max(values) and min(y for _, y in found) == min(values)


def test_a_short_curve_is_drawn_point_by_point():
    section = drawing(Curve("loss", [(1, 2.0), (2, 1.0), (4, 0.5)]))
    (path,) = paths(section)
    (x1, y1), (x2, y2), (x4, y4) = ends(path)
    assert (x1, x4) == (LEFT, WIDTH - RIGHT) and x2 - x1 == pytest.approx((x4 - x1) / 3, abs=0.1)
    assert y1 < y2 < y4 < HEIGHT  # lower losses are lower
    assert [title.text for title in section.iter("title")] == ["1: 2", "2: 1", "4: 0.5"]
    assert section.find("p") is None  # one curve needs no legend


def test_what_is_not_finite_is_a_gap():
    section = drawing(Curve("loss", [(1, 2.0), (2, math.nan), (3, 1.0), (4, math.inf), (5, 1.5), (6, 1.0)]))
    (path,) = paths(section)
    assert re.findall("[ML]", path) == ["M", "M", "M", "L"]
    assert chart_html(Chart("key", "Title", [Curve("loss", [(1, math.nan)]), Curve("none", [])])) == ""
    long = thinned([(x, math.nan if 400 < x < 600 else 1.0 + x % 7) for x in range(1000)])
    assert sum(math.isnan(y) for _, y in long) > 10


def test_a_long_curve_has_its_mean_drawn_over_it():
    points = [(x, float(x % 2)) for x in range(100_000)]
    section = drawing(Curve("loss", points))
    faint, mean = section.iter("path")
    assert "faint" in faint.get("class") and len(ends(faint.get("d"))) <= MOST + 2
    assert all(y == pytest.approx(0.5, abs=1e-3) for _, y in smoothed(points))
    low, high = (function(y for _, y in ends(mean.get("d"))) for function in (min, max))
    assert high - low < 0.5
    assert not list(section.iter("circle"))


def test_several_curves_have_a_legend_and_colours_and_names_are_escaped():
    curves = [Curve(f"<b>{number}</b>", [(1, number), (2, number)], number) for number in range(9)]
    section = drawing(*curves, level=("planned", 20.0))
    names = ["".join(span.itertext()) for span in section.iter("span")]
    assert names == [*(f"<b>{number}</b>" for number in range(9)), "planned"]
    looks = {(path.get("stroke"), path.get("class")) for path in section.iter("path")}
    assert len(looks) == 9  # the ninth has the first's colour, in dashes
    (level,) = [line for line in section.iter("line") if line.get("class") == "level"]
    assert 0 < float(level.get("y1")) < min(y for path in paths(section) for _, y in ends(path))  # above all curves


def test_one_point_and_a_flat_curve_can_be_seen():
    assert len(list(drawing(Curve("loss", [(3, 1.5)])).iter("circle"))) == 1
    (path,) = paths(drawing(Curve("rate", [(1, 0.0), (2, 0.0)])))
    assert all(0 < y < HEIGHT for _, y in ends(path))
