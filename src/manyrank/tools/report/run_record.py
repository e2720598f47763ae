"""A run's folder read back for its report. Every part may be missing: a run may have been killed at any moment. No torch."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shlex
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ...errors import UserError
from ...runs import logs
from .curves import Point

SIGNS = ("config.yaml", "launch.json", "logs/metrics.jsonl")  # one of these is in every run's folder
LINE = re.compile(r"(\w+): (.*)  # (.*)")
# What became of rows, as logs/data.json names it.
LEFT_OUT = ("bad, quarantined", "too long, left out", "duplicates, left out")
CUT = ("cut at max_length",)


@contextlib.contextmanager
def damage_ignored() -> Iterator[None]:
    """Leave what is done with a file of JSON that is not as a training writes it."""
    with contextlib.suppress(AttributeError, ArithmeticError, LookupError, TypeError, ValueError):
        yield


@dataclass(frozen=True)
class RunRecord:
    """A run's folder, read.

    Attributes:
        config: by key, the value as YAML and where it came from.
        lines: of metrics.jsonl. history: what became of the run.
        data, memory, versions, strategy: what logs/ has of these; empty where it has none.
        samples: question, before, after. completions: some of each logged step, with their rewards.
        command, plan: how it was launched; the plan with every file.
        unread: files that are there and cannot be read.
    """

    folder: Path
    config: dict[str, tuple[str, str]]
    lines: list[dict]
    history: list[dict]
    data: dict = field(default_factory=dict)
    memory: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    strategy: dict = field(default_factory=dict)
    samples: list[dict] = field(default_factory=list)
    completions: list[dict] = field(default_factory=list)
    command: str = ""
    plan: str = ""
    unread: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its run_name, or that of its folder."""
        return str(self.value("run_name") or self.folder.resolve().name)

    def value(self, key: str) -> Any:
        """A value of the configuration; None where it has none."""
        with contextlib.suppress(yaml.YAMLError):  # of a file that somebody has changed
            return yaml.safe_load(self.config.get(key, ("null",))[0])

    @cached_property
    def curves(self) -> dict[str, list[Point]]:
        """(step, value) of every line that has a key, by key."""
        curves: dict[str, list[Point]] = {}
        for line in self.lines:
            for key, value in line.items():
                if _is_number(value):
                    curves.setdefault(key, []).append((line["step"], float(value)))
        return curves

    def curve(self, key: str) -> list[Point]:
        return self.curves.get(key, [])

    def last(self, key: str) -> float | None:
        return self.curve(key)[-1][1] if self.curve(key) else None

    def median(self, key: str) -> float | None:
        """The median, in which the first steps, which warm up, do not count much."""
        values = [y for _, y in self.curve(key) if math.isfinite(y)]
        return statistics.median(values) if values else None

    def extreme(self, key: str, which: Any) -> float | None:
        """`which` is min or max."""
        return which((y for _, y in self.curve(key) if math.isfinite(y)), default=None)

    @property
    def step(self) -> int:
        """The last step that is written down."""
        return max([0, *(entry.get("step", 0) for entry in (*self.lines, *self.history))])

    @property
    def total_steps(self) -> int | None:
        return next((entry["total_steps"] for entry in reversed(self.history) if "total_steps" in entry), None)

    @property
    def processes(self) -> int | None:
        """Of the last start."""
        return next((entry["processes"] for entry in reversed(self.history) if "processes" in entry), None)

    @property
    def rows(self) -> int:
        """Rows that were read for the training."""
        with damage_ignored():
            return int(self.data["readings"][0]["rows"])
        return 0

    @property
    def rows_left_out(self) -> int:
        return self._rows(LEFT_OUT)

    @property
    def rows_cut(self) -> int:
        return self._rows(CUT)

    def _rows(self, fates: Sequence[str]) -> int:
        with damage_ignored():
            counts = self.data["readings"][0]["counts"]
            return sum(int(counts.get(fate, 0)) for fate in fates)
        return 0

    @property
    def seconds(self) -> float:
        """Spent in the steps that count, without validation and saves."""
        total, before = 0.0, 0
        for step, each in self.curve("step_seconds"):
            total, before = total + each * (step - before), step
        return total

    @property
    def status(self) -> str:
        last = self.history[-1] if self.history else {}
        return {
            "finished": "finished",
            "preempted": f"preempted at step {last.get('step')}, with a complete checkpoint",
            "failed": f"failed at step {last.get('step')}: {last.get('why', '')}",
        }.get(last.get("event", ""), "no end is written down: it runs still, or was killed")

    @property
    def on_gpu(self) -> bool:
        return bool(self.memory) or "GPUs" in self.versions


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        UserError: it is not the folder of a run.
    """
    if not any((folder / sign).is_file() for sign in SIGNS):
        what = "not the folder of a run" if folder.is_dir() else "there is no such folder"
        fix = "give the output_dir of a training: it has config.yaml and logs/metrics.jsonl"
        raise UserError(what, where=str(folder), fix=fix)
    metrics_file, unread = folder / "logs" / "metrics.jsonl", []
    lines = logs.read_metrics(folder) if metrics_file.is_file() else []
    launch = _json(folder, "launch.json", {}, unread)
    return RunRecord(
        folder,
        config=_config(_text(folder / "config.yaml")),
        lines=[line for line in lines if _is_number(line.get("step"))],
        history=[entry for entry in logs.read_history(folder) if _is_entry(entry)],
        **{name: _json(folder, f"logs/{name}.json", {}, unread) for name in ("data", "memory", "versions", "strategy")},
        samples=_json(folder, "logs/samples.json", [], unread),
        completions=logs.read_completions(folder),
        command=_command(launch),
        plan=_text(folder / "launch" / "plan.txt"),
        unread=tuple(unread),
    )


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _json(folder: Path, name: str, empty: Any, unread: list[str]) -> Any:
    """The content of a file, or `empty` where it is not there; a damaged one is added to `unread`."""
    if not (folder / name).is_file():
        return empty
    try:
        content = json.loads(_text(folder / name))
    except ValueError:
        content = None
    if isinstance(content, type(empty)):
        return content
    unread.append(name)
    return empty


def _config(text: str) -> dict[str, tuple[str, str]]:
    matches = map(LINE.fullmatch, text.splitlines())
    return {match[1]: (match[2], match[3]) for match in matches if match}


def _command(launch: dict) -> str:
    """The command of machine 0, as a shell takes it."""
    nodes, env = launch.get("nodes"), launch.get("env")
    argv = nodes[0] if isinstance(nodes, list) and nodes else launch.get("argv")
    if not isinstance(argv, list):
        return ""
    env = env.items() if isinstance(env, dict) else ()
    variables = "".join(f"{key}={shlex.quote(str(value))} \\\n" for key, value in env)
    return variables + shlex.join(map(str, argv)) if argv else ""


def _is_entry(entry: dict) -> bool:
    """Return whether a line of the history is as a training writes it."""
    return _is_number(entry.get("step")) and all(_is_number(entry.get(key, 0)) for key in ("total_steps", "processes"))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
