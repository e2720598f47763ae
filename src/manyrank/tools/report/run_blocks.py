"""The blocks of a report: one run, or several side by side."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ...plan.memory import GiB
from .blocks import (
    Block,
    Cell,
    Charts,
    Heading,
    Note,
    Table,
    Texts,
    count,
    decimal,
    one_line,
    plain,
    share,
    visible,
    word,
)
from .curves import Chart, Curve
from .data_tables import reading_tables, split_tables
from .oddities import oddities
from .run_record import RunRecord
from .summary import duration, summary_blocks

NONE = Cell("–")
MEDIANS = "Rates, step and padding are medians over the lines of metrics."
QUARANTINE = "The rows themselves are in logs/quarantine.jsonl, those of eval_data_path in logs/eval_quarantine.jsonl."
COMPLETIONS = 12  # that are shown


@dataclass(frozen=True)
class Figure:
    """A final figure: its name, what a run has of it, and how it is shown."""

    name: str
    value: Callable[[RunRecord], float | None]
    cell: Callable[[float], Cell]

    def of(self, run: RunRecord) -> Cell:
        value = self.value(run)
        return NONE if value is None else self.cell(value)


def _format(pattern: str) -> Callable[[float], Cell]:
    return lambda value: Cell(pattern.format(value), repr(value))


LOSS, WHOLE, GIB = _format("{:.4f}"), _format("{:,.0f}"), _format("{:.2f} GiB")
FIGURES = (
    Figure("steps", lambda run: run.step, count),
    Figure("loss, last", lambda run: run.last("loss"), LOSS),
    Figure("validation loss, last", lambda run: run.last("eval_loss"), LOSS),
    Figure("validation loss, best", lambda run: run.extreme("eval_loss", min), LOSS),
    Figure("validation perplexity, last", lambda run: run.last("eval_perplexity"), LOSS),
    Figure("reward, last", lambda run: run.last("reward"), LOSS),
    Figure("validation reward, last", lambda run: run.last("eval_reward"), LOSS),
    Figure("KL, last", lambda run: run.last("kl"), LOSS),
    Figure("completions cut off, last", lambda run: run.last("completions/clipped_ratio"), share),
    Figure("epochs", lambda run: run.last("epoch"), _format("{:.4g}")),
    Figure("tokens/s", lambda run: run.median("tokens_per_second"), WHOLE),
    Figure("supervised tokens/s", lambda run: run.median("supervised_tokens_per_second"), WHOLE),
    Figure("samples/s", lambda run: run.median("samples_per_second"), decimal),
    Figure("MFU", lambda run: run.median("mfu"), share),
    Figure("padding", lambda run: run.median("padding"), share),
    Figure("step", lambda run: run.median("step_seconds"), _format("{:.3g} s")),
    Figure("time in steps", lambda run: run.seconds or None, lambda seconds: Cell(duration(seconds), repr(seconds))),
    Figure("memory, peak", lambda run: run.extreme("memory_gib", max), GIB),
)
# Key of the metrics, title, whether the y axis begins at 0.
CURVES = (
    ("kl", "KL divergence from the reference", True),
    ("entropy", "Entropy of a token", True),
    ("completions/mean_length", "Tokens of a completion", True),
    ("completions/clipped_ratio", "Completions cut off", True),
    ("frac_reward_zero_std", "Groups without a signal", True),
    ("learning_rate", "Learning rate", True),
    ("grad_norm", "Gradient norm, before clipping", True),
    ("tokens_per_second", "Tokens a second", True),
    ("memory_gib", "Memory", True),
    ("mfu", "MFU", True),
)
COMPARED = (("loss", "Loss", False), ("eval_loss", "Validation loss", False), ("reward", "Reward", False), *CURVES)


def run_blocks(run: RunRecord) -> Iterator[Block]:
    """List the blocks of one run; what it does not have is left out."""
    yield from summary_blocks(run)
    yield _figures(run)
    yield from map(_damaged, run.unread)
    yield _charts(_run_charts(run))
    yield from _guarded("logs/memory.json", _memory(run))
    yield from _guarded("logs/samples.json", _samples(run))
    yield from _guarded("logs/data.json", _data(run))
    yield Heading("The run")
    yield from _guarded("logs/history.jsonl", _history(run))
    if run.versions:
        rows = tuple((word(name), word(str(version))) for name, version in run.versions.items())
        yield Table("versions", "Versions and machine", (), rows)
    if run.command:
        yield Texts("Launched with", (("", plain(run.command)),), key="launch")
    if run.plan:
        yield Texts("Every machine's command, and the files", (("", plain(run.plan)),), key="plan", folded=True)
    yield from _config(run)


def comparison_blocks(runs: Sequence[RunRecord]) -> Iterator[Block]:
    """Final figures of several runs, what differs in their configuration, and their curves one over the other."""
    names = _labels(runs)
    shown = [figure for figure in FIGURES if any(figure.value(run) is not None for run in runs)]
    rows = [(word(figure.name), *(figure.of(run) for run in runs)) for figure in shown]
    rows.insert(0, (word("status"), *(word(run.status) for run in runs)))
    rows.append((word("odd"), *(word("; ".join(oddities(run)) or "nothing") for run in runs)))
    yield Table("figures", "Final figures", ("", *names), tuple(rows), MEDIANS)
    yield _differing(runs, names)
    yield _charts(_compared_charts(runs, names))
    for run in runs:
        yield from (_damaged(str(run.folder / name)) for name in run.unread)


def _guarded(name: str, blocks: Iterable[Block]) -> Iterator[Block]:
    """Blocks of a file; or, where it is JSON but not as a training writes it, that it is damaged."""
    try:
        yield from list(blocks)
    except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError):
        yield _damaged(name)


def _damaged(name: str) -> Note:
    return Note(f"{one_line(name)} is damaged, and not shown.", warning=True)


def _figures(run: RunRecord) -> Table:
    rows = tuple((word(figure.name), figure.of(run)) for figure in FIGURES if figure.value(run) is not None)
    return Table("figures", "Figures", (), rows, MEDIANS)


# Curves


def _charts(charts: Iterable[Chart]) -> Block:
    drawn = tuple(chart for chart in charts if not chart.is_empty)
    return Charts(drawn) if drawn else Note("No step has been logged.")


def _run_charts(run: RunRecord) -> Iterator[Chart]:
    """Curves of one run, training and validation together."""
    yield _chart("loss", "Loss", [("training", run, "loss"), ("validation", run, "eval_loss")])
    rewards = [(name, run, f"rewards/{name}/mean") for name in _reward_names(run)]
    both = [("reward", run, "reward"), ("validation", run, "eval_reward")]
    yield _chart("reward", "Reward, and each of them", [*both, *rewards])
    planned = run.memory.get("planned_bytes")
    level = ("planned", planned / GiB) if isinstance(planned, int | float) else None
    for key, title, from_zero in CURVES:
        chart = _chart(key, _title(key, title, [run]), [("measured", run, key)], from_zero=from_zero)
        yield replace(chart, level=level) if key == "memory_gib" else chart


def _compared_charts(runs: Sequence[RunRecord], names: Sequence[str]) -> Iterator[Chart]:
    """The same curve of all runs in one chart."""
    for key, title, from_zero in COMPARED:
        curves = [(name, run, key) for run, name in zip(runs, names)]
        yield _chart(key, _title(key, title, runs), curves, from_zero=from_zero)


def _chart(key: str, title: str, curves: Sequence[tuple[str, RunRecord, str]], *, from_zero: bool = False) -> Chart:
    """A chart of those curves (name, run, key of its metrics) that have points."""
    drawn = [Curve(name, run.curve(metric), number) for number, (name, run, metric) in enumerate(curves)]
    return Chart(f"chart-{key}", title, [curve for curve in drawn if curve.points], from_zero)


def _reward_names(run: RunRecord) -> list[str]:
    matches = (re.fullmatch(r"rewards/(.+)/mean", key) for key in run.curves)
    return [match[1] for match in matches if match]


def _title(key: str, title: str, runs: Sequence[RunRecord]) -> str:
    if key != "memory_gib":
        return title
    kinds = {"torch's peak on a GPU" if run.on_gpu else "resident, of rank 0" for run in runs}
    return f"Memory in GiB: {' or '.join(sorted(kinds))}"


# Parts of one run


def _memory(run: RunRecord) -> Iterator[Table]:
    """The plan's bytes beside the measured ones, where a GPU was used."""
    names = {"planned": "planned", "allocated": "allocated", "reserved": "held by torch", "in_use": "in use on the GPU"}
    sizes = [(label, run.memory.get(f"{key}_bytes")) for key, label in names.items()]
    sizes += [(f"planned: {part}", size) for part, size in run.memory.get("parts", {}).items() if size]
    sizes += [(f"loading: {names[key]}", run.memory.get("loading", {}).get(f"{key}_bytes")) for key in names]
    rows = tuple((word(name), GIB(size / GiB)) for name, size in sizes if isinstance(size, int | float))
    if rows:
        yield Table("memory", "Memory of a GPU: planned and measured", (), rows)


def _samples(run: RunRecord) -> Iterator[Block]:
    if run.samples:
        yield Heading("Samples before and after")
    for entry in run.samples:
        answers = ((when, entry.get(when)) for when in ("before", "after"))
        texts = tuple((when, plain("(not reached yet)" if text is None else str(text))) for when, text in answers)
        yield Texts(visible(str(entry.get("question", ""))), texts, sample=True)
    if run.completions:
        yield _completions(run.completions[-COMPLETIONS:])


def _completions(records: Sequence[dict]) -> Table:
    """Show completions with their rewards."""
    names = list(dict.fromkeys(name for record in records for name in record.get("rewards", {})))
    score = _format("{:.3g}")
    rows = tuple(
        (
            count(record.get("step", 0)),
            *(word(str(record.get(key, ""))) for key in ("prompt", "answer", "reference")),
            *(score(record["rewards"][name]) if name in record.get("rewards", {}) else NONE for name in names),
        )
        for record in records
    )
    return Table("completions", "Completions", ("step", "prompt", "completion", "reference", *names), rows)


def _data(run: RunRecord) -> Iterator[Block]:
    if run.data:
        yield Heading("Data")
    for split in run.data.get("parts", []):
        yield from split_tables(split)
    for reading in run.data.get("readings", []):
        yield from reading_tables(reading, note=QUARANTINE)


def _history(run: RunRecord) -> Iterator[Table]:
    """Show when the run started, stopped and was resumed."""
    rows = tuple(
        (
            word(_clock(entry.get("time"))),
            word(str(entry.get("event", ""))),
            count(entry["step"]),
            word(", ".join(_details(entry))),
        )
        for entry in run.history
    )
    if rows:
        yield Table("history", "History", ("time (UTC)", "", "step", ""), rows)


def _clock(seconds: object) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)) if isinstance(seconds, int | float) else ""


def _details(entry: dict) -> Iterator[str]:
    if "processes" in entry:
        yield f"{entry['processes']} process{'es' * (entry['processes'] != 1)}"
    yield from (str(entry[key]) for key in ("wrapper", "why") if entry.get(key))


def _config(run: RunRecord) -> Iterator[Table]:
    """The recipe's values with their origin: those that somebody has chosen, then the defaults."""
    rows = {True: [], False: []}
    for key, (value, origin) in run.config.items():
        rows[origin == "default"].append((word(key), word(value), word(origin.removesuffix(f", {key}"))))
    head = ("key", "value", "from")
    if rows[False]:
        yield Table("config", "Configuration", head, tuple(rows[False]))
    if rows[True]:
        yield Table("defaults", "Defaults", head, tuple(rows[True]), folded=True)


# Several runs


def _differing(runs: Sequence[RunRecord], names: Sequence[str]) -> Block:
    """A row for each key that is not the same in all runs, but where they write to."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "output_dir")
    values = {key: [run.config.get(key, ("",))[0] for run in runs] for key in keys}
    rows = tuple((word(key), *map(word, row)) for key, row in values.items() if len(set(row)) > 1)
    if not rows:
        return Note("The configurations do not differ.", key="differing")
    return Table("differing", "What differs in the configuration", ("key", *names), rows)


def _labels(runs: Sequence[RunRecord]) -> list[str]:
    """A name for each run: its own, or its folder where several have the same."""
    names = [one_line(run.name) for run in runs]
    return [one_line(str(run.folder)) if names.count(name) > 1 else name for run, name in zip(runs, names)]
