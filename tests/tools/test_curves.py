"""Curves as SVG: values where they belong, thinning that keeps spikes, gaps where nothing is finite, no user's text."""

import math
import os
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from manyrank.tools.report.curves import HEIGHT, MOST, WIDTH, Chart, Curve, smoothed, thinned

LEFT, RIGHT = 54, 462  # of the frame


def drawing(*curves: Curve, **more) -> ElementTree.Element:
    return ElementTree.fromstring(Chart("key", "Title", curves, **more).svg)


def paths(svg: ElementTree.Element, colour: str = "--c") -> list[ElementTree.Element]:
    return [path for path in svg.iter("path") if f"stroke: var({colour}" in path.get("style") and not path.get("id")]


def ends(path: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", path.get("d"))]


def labels(svg: ElementTree.Element) -> list[str]:
    return [text.text for text in svg.iter("text")]


@pytest.mark.parametrize("seed", range(20))
def test_thinning_keeps_the_ends_the_order_and_the_extremes(seed):
    draw = random.Random(seed)
    most = draw.randint(20, MOST)
    values = [draw.choice([draw.gauss(0, 1), draw.gauss(0, 1e9), 0.0]) for _ in range(draw.randint(MOST + 1, 3000))]
    points = list(enumerate(values))
    chosen = thinned(points, most)
    assert len(chosen) <= most + 2 and chosen[0] == points[0] and chosen[-1] == points[-1]
    assert [x for x, _ in chosen] == sorted({x for x, _ in chosen})
    assert max(y for _, y in chosen) == max(values) and min(y for _, y in chosen) == min(values)


def test_a_short_curve_is_drawn_point_by_point():
    svg = drawing(Curve("loss", [(1, 2.0), (2, 1.0), (4, 0.5)]))
    (path,) = paths(svg)
    (x1, y1), (x2, y2), (x4, y4) = ends(path)
    assert LEFT < x1 < x4 < RIGHT and x2 - x1 == pytest.approx((x4 - x1) / 3, abs=0.1)
    assert y2 - y1 == pytest.approx((y4 - y1) * 2 / 3, abs=0.1) and 0 < y1 < y4 < HEIGHT  # lower losses are lower
    assert [title.text for title in svg.iter("title")] == ["1: 2", "2: 1", "4: 0.5"]
    assert svg.get("viewBox") == f"0 0 {WIDTH} {HEIGHT}"


def test_ticks_are_short_and_steps_are_whole():
    assert labels(drawing(Curve("loss", [(1, 1.21), (3, 1.79)]))) == ["1", "2", "3", "step", "1.2", "1.4", "1.6", "1.8"]
    assert labels(drawing(Curve("rate", [(0, 0), (1e5, 2e-4)])))[-5:] == ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]
    assert labels(drawing(Curve("tokens", [(0, 0), (1e5, 9e6)])))[:6] == ["0", "20k", "40k", "60k", "80k", "100k"]
    zero = drawing(Curve("norm", [(1, 7.0), (2, 9.0)]), from_zero=True)
    assert labels(zero)[3:] == ["0", "2", "4", "6", "8"]


def test_what_is_not_finite_is_a_gap():
    svg = drawing(Curve("loss", [(1, 2.0), (2, math.nan), (3, 1.0), (4, math.inf), (5, 1.5), (6, 1.0)]))
    assert len(list(svg.iter("title"))) == 4 and len(labels(svg)) > 6  # the axes are those of the finite ones
    assert re.findall("[ML]", paths(svg)[0].get("d")) == ["M", "M", "M", "L"]
    assert Chart("key", "Title", [Curve("loss", [(1, math.nan)]), Curve("none", [])]).is_empty
    long = thinned([(x, math.nan if 400 < x < 600 else 1.0 + x % 7) for x in range(1000)])
    assert sum(math.isnan(y) for _, y in long) > 10


def test_a_long_curve_has_its_mean_drawn_over_it():
    points = [(x, float(x % 2)) for x in range(100_000)]
    svg = drawing(Curve("loss", points))
    faint, mean = paths(svg)
    assert "opacity: 0.35" in faint.get("style") and 250 < len(ends(faint)) <= MOST + 2
    assert all(y == pytest.approx(0.5, abs=1e-3) for _, y in smoothed(points))
    low, high = (function(y for _, y in ends(mean)) for function in (min, max))
    assert len(ends(mean)) < MOST and high - low < 0.5
    assert not list(svg.iter("use"))


def test_several_curves_have_colours_and_no_name_is_in_the_drawing():
    curves = [Curve(f"$<b>{number}", [(1, number), (2, number)], number) for number in range(9)]
    svg = drawing(*curves, level=("planned", 20.0))
    assert len({path.get("style") for path in paths(svg)}) == 9  # the ninth has the first's colour, in dashes
    assert curves[8].variable == curves[0].variable and "dasharray" in paths(svg)[8].get("style")
    (level,) = paths(svg, "--ink")
    assert 0 < ends(level)[0][1] < min(y for path in paths(svg) for _, y in ends(path))  # above all curves
    assert "$" not in ElementTree.tostring(svg, encoding="unicode")


def test_one_point_and_a_flat_curve_can_be_seen():
    assert len(list(drawing(Curve("loss", [(3, 1.5)])).iter("use"))) == 1
    (path,) = paths(drawing(Curve("rate", [(1, 0.0), (2, 0.0)]), from_zero=True))
    assert all(0 < y < HEIGHT for _, y in ends(path))


def test_a_drawing_is_the_same_in_any_home_and_matplotlib_says_nothing(tmp_path):
    """Nor do the user's own settings of matplotlib change it, or is pyplot with its state imported."""
    program = (
        "import sys\n"
        "from manyrank.tools.report.curves import Chart, Curve\n"
        "assert 'matplotlib' not in sys.modules\n"
        "print(Chart('key', 'Title', [Curve('loss', [(1, 2.0), (2, 1.0)])]).svg)\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    (tmp_path / "matplotlibrc").write_text("text.usetex: true\nlines.linewidth: 7\nsvg.fonttype: path\n")
    (tmp_path / "file").touch()
    unset = {key: value for key, value in os.environ.items() if not key.startswith(("MPL", "XDG"))}
    homes = ({"HOME": str(tmp_path / "file")}, {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc")})
    drawings = [
        subprocess.run([sys.executable, "-c", program], env=unset | home, capture_output=True, text=True)
        for home in homes
    ]
    expected = Chart("key", "Title", [Curve("loss", [(1, 2.0), (2, 1.0)])]).svg + "\n"
    assert [(done.stdout, done.stderr) for done in drawings] == [(expected, "")] * 2
