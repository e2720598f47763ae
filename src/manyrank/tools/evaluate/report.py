"""Results of an evaluation: means with intervals, comparisons, a table. No torch.

OUTPUT/
├── eval_results.json    how it was evaluated; by model its metrics and tasks; each model against its base
└── predictions.jsonl    a line for each row: prompt, reference, and of each model the answer, its scores and loss
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .comparison import compare, mean_interval
from .plan import EvaluatedModel

if TYPE_CHECKING:
    from ...data.questions import Key
    from ...training.evaluation import RowResult
    from .worker import EvaluationData

RESULTS, PREDICTIONS = "eval_results.json", "predictions.jsonl"
LARGEST = 700.0  # of which the exponential is still a number
HEAD = ("model", "metric", "rows", "mean", "95% interval", "change", "better", "worse", "same", "p")
Column = dict["Key", tuple[float, float]]  # a metric of one model: by row its value and weight, see `comparison`


def columns(entries: Mapping[Key, RowResult]) -> dict[str, Column]:
    """Collect the metrics of a model, without those that no row has."""
    losses = {key: (entry.loss, float(entry.tokens)) for key, entry in entries.items() if entry.loss is not None}
    by_name = {"loss": losses} if losses else {}
    for key, entry in entries.items():
        for name, score in entry.scores.items():
            by_name.setdefault(name, {})[key] = (score, 1.0)
    return by_name


def _arrays(column: Column, keys: Sequence[Key]) -> tuple[np.ndarray, np.ndarray]:
    """(rows,), (rows,): values and weights."""
    return tuple(np.array([column[key] for key in keys]).T)


def results(
    models: Sequence[EvaluatedModel], data: EvaluationData, settings: dict[str, Any], *, seed: int
) -> dict[str, Any]:
    """Compute what eval_results.json holds."""
    by_model = {model.label: columns(data.entries.get(model.label, {})) for model in models}
    content: dict[str, Any] = {"settings": settings, "models": {}, "comparisons": []}
    for model in models:
        metrics = {name: _summary(name, column, seed) for name, column in by_model[model.label].items()}
        ends = [entry.finish for entry in data.entries.get(model.label, {}).values() if entry.finish]
        cut = {"answers": len(ends), "not_finished": sum(end != "stop" for end in ends)} if ends else {}
        tasks = {"tasks": data.tasks[model.label]} if data.tasks.get(model.label) else {}
        content["models"][model.label] = {"against": model.against, "metrics": metrics, **cut, **tasks}
        if model.against:
            content["comparisons"] += _comparisons(model, by_model, seed)
    return content


def _summary(name: str, column: Column, seed: int) -> dict[str, Any]:
    values, weights = _arrays(column, sorted(column))
    interval = mean_interval(values, weights, seed=seed)
    if name != "loss":
        return asdict(interval)
    return {
        **asdict(interval),
        "tokens": int(weights.sum()),
        "perplexity": math.exp(min(interval.mean, LARGEST)),
    }


def _comparisons(model: EvaluatedModel, by_model: dict[str, dict[str, Column]], seed: int) -> Iterator[dict[str, Any]]:
    for name, column in by_model[model.label].items():
        base = by_model[model.against].get(name, {})
        keys = sorted(column.keys() & base.keys())
        if not keys:
            continue
        (values, weights), (base_values, base_weights) = _arrays(column, keys), _arrays(base, keys)
        head = {"model": model.label, "against": model.against, "metric": name}
        if not np.array_equal(weights, base_weights):
            yield {**head, "left_out": "their tokenizers or templates make other tokens of the rows"}
            continue
        compared = asdict(compare(values, base_values, weights, seed=seed))
        if name == "loss":  # a lower one is better
            compared |= {"wins": compared["losses"], "losses": compared["wins"]}
        yield {**head, **compared}


# The table


def table(content: dict[str, Any]) -> str:
    """Lay the models out side by side: each metric with its interval, and against the base."""
    lines, before = [HEAD], None
    for label, *cells in _lines(content):
        lines.append(("" if label == before else label, *cells, *[""] * (len(HEAD) - 1 - len(cells))))
        before = label
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(_aligned(cells, widths) for cells in lines)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    names = [cell.ljust(width) for cell, width in zip(cells[:2], widths)]
    numbers = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:])]
    return "  ".join([*names, *numbers]).rstrip()


def _lines(content: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    against = {(one["model"], one["metric"]): one for one in content["comparisons"]}
    for label, model in content["models"].items():
        for name, metric in model["metrics"].items():
            interval = f"{metric['low']:.4f} to {metric['high']:.4f}"
            cells = (label, name, f"{metric['n']:,}", f"{metric['mean']:.4f}", interval)
            yield *cells, *_change(against.get((label, name)))
            if name == "loss":
                yield label, "perplexity", "", f"{metric['perplexity']:.4g}"
        for task, values in model.get("tasks", {}).items():
            for name, value in values.items():
                if not name.startswith(("sample_len", "sample_count")) and "_stderr" not in name:
                    yield label, f"{task} {name}", "", f"{value:.4f}", _error(name, values)


def _change(comparison: dict[str, Any] | None) -> tuple[str, ...]:
    if comparison is None or "left_out" in comparison:
        return ()
    counts = (f"{comparison[name]:,}" for name in ("wins", "losses", "ties"))
    return f"{comparison['difference']['mean']:+.4f}", *counts, f"{comparison['p']:.2g}"


def _error(name: str, values: dict[str, float]) -> str:
    metric, comma, rest = name.partition(",")
    error = values.get(f"{metric}_stderr{comma}{rest}", math.nan)
    return f"± {1.96 * error:.4f}" if math.isfinite(error) else ""


# Files


def write(folder: Path, content: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write both files into a folder that is there."""
    (folder / RESULTS).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    with (folder / PREDICTIONS).open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def predictions(models: Sequence[EvaluatedModel], data: EvaluationData) -> list[dict[str, Any]]:
    """Make a line for each row, in the order of the sources."""
    lines = []
    for key in sorted({key for entries in data.entries.values() for key in entries}):
        line: dict[str, Any] = {"source": key[0], "row": key[1]}
        if question := data.questions.get(key):
            line |= {"place": question.place, "prompt": question.prompt, "reference": question.reference}
        by_model = ((model.label, data.entries.get(model.label, {}).get(key)) for model in models)
        lines.append({**line, "models": {label: _prediction(entry) for label, entry in by_model if entry}})
    return lines


def _prediction(entry: RowResult) -> dict[str, Any]:
    loss = {"loss": entry.loss / entry.tokens, "tokens": entry.tokens} if entry.loss is not None else {}
    answer = {key: getattr(entry, key) for key in ("answer", "finish", "scores")} if entry.answer is not None else {}
    return {**answer, **loss}
