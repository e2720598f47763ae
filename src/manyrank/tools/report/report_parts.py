"""The curves and tables of a report, as plain values: what is shown of one run, and of several side by side."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ...data.histogram import Bar
from ...plan.memory import GiB
from .run_record import RunRecord
from .svg import Chart, Curve
from .tables import Cell, Table, count, decimal, one_line, share, word

NONE = Cell("–")
MEDIANS = "Rates, step and padding are medians over the lines of metrics."


@dataclass(frozen=True)
class Figure:
    """A final figure: its name, what a run has of it, and how it is shown."""

    name: str
    of: Callable[[RunRecord], float | None]
    cell: Callable[[float], Cell]

    def shown(self, run: RunRecord) -> Cell:
        value = self.of(run)
        return NONE if value is None else self.cell(value)


def _loss(value: float) -> Cell:
    return Cell(f"{value:.4f}", repr(value))


def _score(value: float) -> Cell:
    return Cell(f"{value:.3g}", repr(value))


def _gib(value: float) -> Cell:
    return Cell(f"{value:.2f} GiB", repr(value))


def _whole(value: float) -> Cell:
    return Cell(f"{value:,.0f}", repr(value))


def duration(seconds: float) -> Cell:
    """Days, hours, minutes and seconds, as far as they say something."""
    if not math.isfinite(seconds):
        return Cell(repr(seconds), repr(seconds))
    whole = round(seconds)
    if whole < 60:
        return Cell(f"{seconds:.1f} s", repr(seconds))
    days, rest = divmod(whole, 86400)
    text = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return Cell(f"{days} d {text}" if days else text, repr(seconds))


FIGURES = (
    Figure("steps", lambda run: run.step, count),
    Figure("loss, last", lambda run: run.last("loss"), _loss),
    Figure("validation loss, last", lambda run: run.last("eval_loss"), _loss),
    Figure("validation loss, best", lambda run: run.extreme("eval_loss", min), _loss),
    Figure("validation perplexity, last", lambda run: run.last("eval_perplexity"), _loss),
    Figure("reward, last", lambda run: run.last("reward"), _loss),
    Figure("validation reward, last", lambda run: run.last("eval_reward"), _loss),
    Figure("KL, last", lambda run: run.last("kl"), _loss),
    Figure("answers cut off, last", lambda run: run.last("completions/clipped_ratio"), share),
    Figure("epochs", lambda run: run.last("epoch"), lambda value: Cell(f"{value:.4g}", repr(value))),
    Figure("tokens/s", lambda run: run.usual("tokens_per_second"), _whole),
    Figure("supervised tokens/s", lambda run: run.usual("supervised_tokens_per_second"), _whole),
    Figure("samples/s", lambda run: run.usual("samples_per_second"), decimal),
    Figure("MFU", lambda run: run.usual("mfu"), share),
    Figure("padding", lambda run: run.usual("padding"), share),
    Figure("step", lambda run: run.usual("step_seconds"), lambda value: Cell(f"{value:.3g} s", repr(value))),
    Figure("time in steps", lambda run: run.seconds or None, duration),
    Figure("memory, peak", lambda run: run.extreme("memory_gib", max), _gib),
)


def figures(run: RunRecord) -> Table:
    """The run in numbers; what it has none of is left out."""
    rows = [(word("status"), word(run.status))]
    if run.total_steps is not None:
        rows.append((word("steps asked for"), count(run.total_steps)))
    rows += [(word(figure.name), figure.shown(run)) for figure in FIGURES if figure.of(run) is not None]
    if processes := next((entry["processes"] for entry in reversed(run.history) if "processes" in entry), None):
        rows.append((word("processes"), word(f"{processes}")))
    return Table("figures", "Figures", (), tuple(rows), MEDIANS)


# Curves


def charts(run: RunRecord) -> Iterator[Chart]:
    """What a run has curves of, training and validation loss together."""
    losses = (Curve("training", run.curve("loss"), 0), Curve("validation", run.curve("eval_loss"), 1))
    yield Chart("chart-loss", "Loss", [curve for curve in losses if curve.points])
    planned = run.memory.get("planned_bytes")
    level = ("planned", planned / GiB) if isinstance(planned, int | float) else None
    rewards = [
        Curve(name, run.curve(f"rewards/{name}/mean"), 2 + number) for number, name in enumerate(reward_names(run))
    ]
    both = [Curve("reward", run.curve("reward"), 0), Curve("validation", run.curve("eval_reward"), 1)]
    yield Chart("chart-reward", "Reward, and each of them", [curve for curve in (*both, *rewards) if curve.points])
    for key, title, from_zero in (*_OF_GRPO, *_CURVES):
        mark = level if key == "memory_gib" else None
        yield Chart(f"chart-{key}", _title(key, title, [run]), [Curve("measured", run.curve(key))], from_zero, mark)


def compared_charts(runs: Sequence[RunRecord], names: Sequence[str]) -> Iterator[Chart]:
    """The same curve of all runs in one chart."""
    losses = (("loss", "Loss", False), ("eval_loss", "Validation loss", False))
    for key, title, from_zero in (*losses, ("reward", "Reward", False), *_OF_GRPO, *_CURVES):
        curves = [Curve(name, run.curve(key), number) for number, (run, name) in enumerate(zip(runs, names))]
        yield Chart(f"chart-{key}", _title(key, title, runs), [curve for curve in curves if curve.points], from_zero)


_CURVES = (
    ("learning_rate", "Learning rate", True),
    ("grad_norm", "Gradient norm, before clipping", True),
    ("tokens_per_second", "Tokens a second", True),
    ("memory_gib", "Memory", True),
    ("mfu", "MFU", True),
)


_OF_GRPO = (
    ("kl", "KL divergence from the reference", True),
    ("entropy", "Entropy of a token", True),
    ("completions/mean_length", "Tokens of an answer", True),
    ("completions/clipped_ratio", "Answers cut off", True),
    ("frac_reward_zero_std", "Groups without a signal", True),
)


def reward_names(run: RunRecord) -> list[str]:
    """The rewards of grpo that a run has logged."""
    found = (re.fullmatch(r"rewards/(.+)/mean", key) for line in run.lines for key in line)
    return list(dict.fromkeys(match[1] for match in found if match))


def completions(run: RunRecord, most: int = 12) -> Table | None:
    """The last answers of grpo, with their rewards."""
    last = run.completions[-most:]
    names = list(dict.fromkeys(name for said in last for name in said.get("rewards", {})))
    rows = tuple(
        (
            count(said.get("step", 0)),
            *(word(str(said.get(key, ""))) for key in ("prompt", "answer", "reference")),
            *(_score(said["rewards"][name]) if name in said.get("rewards", {}) else NONE for name in names),
        )
        for said in last
    )
    return Table("completions", "Answers", ("step", "prompt", "answer", "reference", *names), rows) if rows else None


def _title(key: str, title: str, runs: Sequence[RunRecord]) -> str:
    if key != "memory_gib":
        return title
    kinds = {"torch's peak on a GPU" if run.on_gpu else "resident, of rank 0" for run in runs}
    return f"Memory in GiB: {' or '.join(sorted(kinds))}"


# Tables of one run


def memory(run: RunRecord) -> Table | None:
    """The plan's bytes beside the measured ones; None where no GPU was used."""
    held = run.memory
    sizes = [
        ("planned", held.get("planned_bytes")),
        ("allocated", held.get("allocated_bytes")),
        ("held by torch", held.get("reserved_bytes")),
        ("in use on the GPU", held.get("in_use_bytes")),
    ]
    sizes += [(f"planned: {part}", size) for part, size in held.get("parts", {}).items() if size]
    rows = tuple((word(name), _gib(size / GiB)) for name, size in sizes if isinstance(size, int | float))
    return Table("memory", "Memory of a GPU: planned and measured", (), rows) if rows else None


def data_tables(run: RunRecord) -> Iterator[tuple[Table, tuple[Bar, ...]]]:
    """What was learned from, each with the bars that belong below it."""
    for part in run.data.get("parts", []):
        lengths = part["lengths"]
        rows = (
            (word("examples"), count(part["examples"])),
            (word("tokens"), count(part["tokens"])),
            (word("supervised"), share(part["supervised"] / part["tokens"])),
            (word("shortest"), count(lengths["shortest"])),
            (word("median"), decimal(lengths["median"])),
            (word("mean"), decimal(lengths["mean"])),
            (word("p95"), decimal(lengths["p95"])),
            (word("longest"), count(lengths["longest"])),
            (word("rows read"), count(part["read"])),
            (word("of rows"), count(part["out_of"])),
        )
        title = f"{part['name'].capitalize()} examples, and tokens of one"
        yield Table(f"data-{part['name']}", title, (), rows), tuple(Bar(**bar) for bar in lengths["bars"])
    for reading in run.data.get("readings", []):
        yield from ((table, ()) for table in _reading_tables(reading))


def _reading_tables(reading: dict) -> Iterator[Table]:
    sources = tuple(
        (word(source["path"]), word(source["format_type"]), count(source["rows"]), count(source["examples"]))
        for source in reading["sources"]
    )
    if sources:
        head = ("source", "format", "rows", "examples")
        yield Table(f"sources-{reading['name']}", f"Read: {reading['name']}", head, sources)
    if reading["counts"]:
        fates = tuple((word(what), count(rows)) for what, rows in reading["counts"].items())
        yield Table(f"fates-{reading['name']}", f"What became of the rows of {reading['name']}", (), fates)
    if reading["reasons"]:
        reasons = tuple((word(why), count(rows)) for why, rows in reading["reasons"].items())
        note = (
            "The rows themselves are in logs/quarantine.jsonl, those of eval_data_path in logs/eval_quarantine.jsonl."
        )
        yield Table(f"reasons-{reading['name']}", f"Bad rows of {reading['name']}, put aside", (), reasons, note)


def history(run: RunRecord) -> Table | None:
    """When the run began, stopped and went on."""
    rows = tuple(
        (
            word(_clock(entry.get("time"))),
            word(str(entry.get("event", ""))),
            count(entry["step"]),
            word(", ".join(_details(entry))),
        )
        for entry in run.history
    )
    return Table("history", "History", ("time (UTC)", "", "step", ""), rows) if rows else None


def _clock(seconds: object) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)) if isinstance(seconds, int | float) else ""


def _details(entry: dict) -> Iterator[str]:
    if "processes" in entry:
        yield f"{entry['processes']} process{'es' * (entry['processes'] != 1)}"
    yield from (str(entry[key]) for key in ("wrapper", "why") if entry.get(key))


def versions(run: RunRecord) -> Table | None:
    rows = tuple((word(name), word(str(version))) for name, version in run.versions.items())
    return Table("versions", "Versions and machine", (), rows) if rows else None


def config(run: RunRecord, *, given: bool) -> Table | None:
    """The recipe's values with where they came from: those that somebody has given, or the defaults."""
    chosen = [
        (word(key), word(value), word(origin.removesuffix(f", {key}")))
        for key, (value, origin) in run.config.items()
        if (origin != "default") == given
    ]
    head = ("key", "value", "from")
    return Table("config" if given else "defaults", "Configuration", head, tuple(chosen)) if chosen else None


# Tables of several runs


def compared_figures(runs: Sequence[RunRecord], names: Sequence[str]) -> Table:
    """A column for each run."""
    shown = [figure for figure in FIGURES if any(figure.of(run) is not None for run in runs)]
    rows = [(word(figure.name), *(figure.shown(run) for run in runs)) for figure in shown]
    rows.insert(0, (word("status"), *(word(run.status) for run in runs)))
    return Table("figures", "Final figures", ("", *names), tuple(rows), MEDIANS)


def compared_config(runs: Sequence[RunRecord], names: Sequence[str]) -> Table | None:
    """A row for each key that is not the same in all runs, but where they write to."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "output_dir")
    values = {key: [run.config.get(key, ("",))[0] for run in runs] for key in keys}
    rows = tuple((word(key), *map(word, found)) for key, found in values.items() if len(set(found)) > 1)
    return Table("differing", "What differs in the configuration", ("key", *names), rows) if rows else None


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """A name for each run: its own, or its folder where several have the same."""
    names = [one_line(run.name) for run in runs]
    return [one_line(str(run.folder)) if names.count(name) > 1 else name for run, name in zip(runs, names)]
