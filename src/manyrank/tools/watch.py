"""`manyrank watch`: a training in the terminal, read from its folder alone. No torch.

manyrank watch output/my           draws anew every few seconds until the run ends, or Ctrl-C
manyrank watch output/my --once    one frame, as without a terminal

    logs/metrics.jsonl, history.jsonl ──> RunRecord ┐
    logs/heartbeats/                  ──> beats     ├──> frame, a text
    logs/training_log.txt             ──> warnings  ┘
"""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ..config.args import Options, arg, read_options, word
from ..runs import logs, run_lock
from ..runs.heartbeats import DONE, Heartbeat, beats
from ..runs.run_folder import HEARTBEATS, LOCK
from .report.blocks import one_line
from .report.curves import Point
from .report.oddities import oddities
from .report.run_record import SIGNS, RunRecord, read_run
from .report.summary import duration, method, model

WIDTH, HEIGHT = 100, 8  # columns of a frame at most, and lines of a curve
LABEL = 9  # columns left of a curve
SILENT = 60.0  # seconds without a sign of life, or two steps where they are longer, from which a rank is named
NAMED = 8  # silent ranks that are named
WARNINGS = 3
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a character of Braille, from the top
CURVES = (("loss", "eval_loss"), ("reward", "eval_reward"))
NOW = (
    ("learning_rate", "learning rate {:.2e}"),
    ("grad_norm", "gradient norm {:.3g}"),
    ("kl", "KL {:.3g}"),
    ("tokens_per_second", "{:,.0f} tokens/s"),
    ("step_seconds", "{:.3g} s a step"),
    ("mfu", "MFU {:.1%}"),
    ("memory_gib", "memory {:.2f} GiB"),
    ("epoch", "epoch {:.3g}"),
)


class WatchOptions(Options):
    """Show a training in the terminal: curves, rates, time left, ranks and warnings."""

    run: Path = word(..., "the output_dir of a training")
    once: bool = arg(False, "show one frame and end")
    every: float = arg(3.0, "seconds between two frames", gt=0, allow_inf_nan=False)


@dataclass(frozen=True)
class View:
    """A run's folder at one moment; `held`: whether a run works in it."""

    run: RunRecord
    beats: list[Heartbeat]
    warnings: list[str]
    held: bool
    now: float

    @property
    def step(self) -> int:
        """The last step that is done, by the metrics or by the ranks, which are in the next."""
        return max([self.run.step, *(beat.step - 1 for beat in self.beats)])

    @property
    def status(self) -> str:
        if self.held:
            return "running" if self.run.lines or self.step else "starting"
        ended = self.run.history and self.run.history[-1].get("event") in ("finished", "preempted", "failed")
        return self.run.status if ended else "killed: no process has the folder, and no end is written down"

    @property
    def seconds_left(self) -> float | None:
        """By the last line of metrics, less the time since."""
        line = next((line for line in reversed(self.run.lines) if "eta_seconds" in line), None)
        return max(0.0, line["eta_seconds"] - max(0.0, self.now - line["time"])) if line and self.held else None

    def silence(self, beat: Heartbeat) -> float:
        """Seconds without a sign of life of a rank, as its machine has published, or since that sign."""
        return max(beat.quiet, self.now - beat.time)

    @property
    def silent(self) -> list[Heartbeat]:
        patience = max(SILENT, 2 * (self.run.last("step_seconds") or 0))
        return [b for b in self.beats if self.held and b.phase != DONE and self.silence(b) > patience]


def main(argv: Sequence[str]) -> int:
    """Show frames until the run ends; without a terminal one.

    Raises:
        UserError: the folder is none of a run.
    """
    options = read_options(argv, WatchOptions, prog="manyrank watch")
    if options.once or not sys.stdout.isatty():
        print(frame(look(options.run)))
        return 0
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            view = look(options.run)
            live.update(Text(frame(view, width=min(WIDTH, shutil.get_terminal_size().columns))), refresh=True)
            if not view.held:
                return 0
            time.sleep(options.every)


def look(folder: Path) -> View:
    """Read the folder as it is now.

    Raises:
        UserError: it is none of a run.
    """
    held = run_lock.is_held(folder)  # first, so that the last frame is that of the end
    starting = (folder / LOCK).is_file() and not any((folder / sign).is_file() for sign in SIGNS)
    run = RunRecord(folder, {}, [], []) if starting else read_run(folder)
    return View(run, beats(folder / HEARTBEATS), logs.read_warnings(folder), held, time.time())


def frame(view: View, *, width: int = WIDTH) -> str:
    """The view as lines of text of at most `width` columns, but for warnings."""
    run = view.run
    parts = [_head(view), *(_curve(run, *keys, width=width) for keys in CURVES), _rates(run, width=width)]
    parts += [list(_ranks(view)), _warnings(view)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _head(view: View) -> list[str]:
    run, total = view.run, view.run.total_steps
    steps = f"step {view.step:,} of {total:,} ({view.step / total:.0%})" if total else f"step {view.step:,}"
    left = [] if view.seconds_left is None else [f"{duration(view.seconds_left)} left"]
    return [f"{one_line(run.name)}: {', '.join([one_line(view.status), steps, *left])}", *_facts(run)]


def _facts(run: RunRecord) -> list[str]:
    return [one_line("; ".join(filter(None, [method(run), model(run)])))] if run.config else []


def _curve(run: RunRecord, key: str, validation: str, *, width: int) -> list[str]:
    """The curve of the training, and its validations as marks."""
    points, marks = run.curve(key), run.curve(validation)
    if not any(math.isfinite(y) for _, y in (*points, *marks)):
        return []
    title = f"{key} {points[-1][1]:.4f}" if points else key
    if marks:
        best = (min if validation == "eval_loss" else max)(marks, key=lambda mark: mark[1])
        title += f"   ● validation {marks[-1][1]:.4f}, best {best[1]:.4f} at step {best[0]:,}"
    return [title, *plot(points, marks, width=max(10, width - LABEL - 2), height=HEIGHT)]


def _rates(run: RunRecord, *, width: int) -> list[str]:
    """The last figures; a line breaks between two of them only."""
    parts = [text.format(run.last(key)).replace(" ", "\xa0") for key, text in NOW if run.last(key) is not None]
    return [line.replace("\xa0", " ") for line in textwrap.wrap("   ".join(parts), width)]


def _ranks(view: View) -> Iterator[str]:
    """Where the ranks are, and those that are silent."""
    if not view.held or not view.beats:
        return
    silent = view.silent
    places = Counter(_place(beat) for beat in view.beats if beat not in silent)
    count = f"{len(view.beats) - len(silent)} of {len(view.beats)} ranks give signs of life"
    yield ": ".join([count, ", ".join(f"{number} {place}" for place, number in places.most_common(3))]).removesuffix(
        ": "
    )
    for beat in silent[:NAMED]:
        who = f"rank {beat.rank} (host {beat.host}, pid {beat.pid})"
        yield one_line(f"  SILENT {who} for {duration(view.silence(beat))}: {_place(beat)}")
    if len(silent) > NAMED:
        yield f"  and {len(silent) - NAMED} more"


def _place(beat: Heartbeat) -> str:
    return one_line(f"in step {beat.step:,}, {beat.phase}" if beat.step else beat.phase)


def _warnings(view: View) -> list[str]:
    lines = [f"odd so far: {text}" for text in oddities(view.run)] + view.warnings[-WARNINGS:]
    return [one_line(line) for line in lines]


def plot(points: Sequence[Point], marks: Sequence[Point] = (), *, width: int, height: int) -> list[str]:
    """A curve in characters of Braille, 2 x 4 dots each, with `marks` over it; what is not finite is left out.

    Args:
        width, height: of the curve, in characters; labels and the axis come beside them.
    """
    points, marks = ([p for p in some if math.isfinite(p[1])] for some in (points, marks))
    xs, ys = zip(*points, *marks)
    (first, last), (low, high) = (min(xs), max(xs)), (min(ys), max(ys))

    def place(point: Point) -> tuple[int, int]:
        x, y = (point[0] - first) / (last - first or 1), (high - point[1]) / (high - low or 1)
        return round(x * (2 * width - 1)), round(y * (4 * height - 1))

    cells = [[0] * width for _ in range(height)]
    for x, y in _joined(_one_a_column([place(point) for point in points])):
        cells[y // 4][x // 2] |= DOTS[y % 4][x % 2]
    rows = [[chr(0x2800 + dots) if dots else " " for dots in row] for row in cells]
    for x, y in map(place, marks):
        rows[y // 4][x // 2] = "●"
    labels = {height - 1: f"{low:.4g}", 0: f"{high:.4g}"} if high > low else {0: f"{high:.4g}"}
    drawn = [f"{labels.get(number, ''):>{LABEL}} │{''.join(row).rstrip()}" for number, row in enumerate(rows)]
    steps = f"step {first:,}", f"{last:,}"
    return [*drawn, " " * (LABEL + 2) + steps[0] + steps[1].rjust(width - len(steps[0]))]


def _one_a_column(places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The mean height of each column that has points, from the left."""
    columns: dict[int, list[int]] = {}
    for x, y in places:
        columns.setdefault(x, []).append(y)
    return [(x, round(sum(ys) / len(ys))) for x, ys in sorted(columns.items())]


def _joined(places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The dots of a line through the places."""
    yield from places[:1]
    for (x, y), (to_x, to_y) in pairwise(places):
        count = max(to_x - x, abs(to_y - y))
        for number in range(1, count + 1):
            yield x + round((to_x - x) * number / count), y + round((to_y - y) * number / count)
