"""From what the processes have found to the results: means with intervals, comparisons, a table, and the predictions. No torch.

OUTPUT/
├── eval_results.json    how it was evaluated; by model its metrics and tasks; each model against its base
└── predictions.jsonl    a line for each row: prompt, reference, and of each model the answer, its scores and loss
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .comparison import Comparison, compare, mean_interval
from .contestants import Contestant

RESULTS, PREDICTIONS = "eval_results.json", "predictions.jsonl"
LARGEST = 700.0  # of which the exponential is still a number
Found = dict[tuple[str, int], dict[str, Any]]  # by row, an `evaluation.Entry` as a dictionary


@dataclass(frozen=True)
class Column:
    """A metric of one model: by row its value and weight, see `comparison`."""

    values: dict[tuple[str, int], float]
    weights: dict[tuple[str, int], float]

    def arrays(self, keys: Sequence[tuple[str, int]]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([self.values[key] for key in keys]), np.array([self.weights[key] for key in keys])


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What two processes have found of one row: one its loss (or that of a piece of it), the other its answer."""
    losses = [entry["loss"] for entry in (one, other) if entry["loss"] is not None]
    answered = one if one["answer"] is not None else other
    return {**answered, "loss": sum(losses) if losses else None, "tokens": one["tokens"] + other["tokens"]}


def columns(found: Found) -> dict[str, Column]:
    """The metrics of a model."""
    losses = {key: entry for key, entry in found.items() if entry["loss"] is not None}
    made = {"loss": Column({k: e["loss"] for k, e in losses.items()}, {k: e["tokens"] for k, e in losses.items()})}
    for name in dict.fromkeys(name for entry in found.values() for name in entry["scores"]):
        values = {key: entry["scores"][name] for key, entry in found.items() if name in entry["scores"]}
        made[name] = Column(values, dict.fromkeys(values, 1.0))
    return {name: column for name, column in made.items() if column.values}


def results(
    models: Sequence[Contestant],
    found: dict[str, Found],
    tasks: dict[str, dict],
    settings: dict[str, Any],
    *,
    seed: int,
) -> dict[str, Any]:
    """What eval_results.json holds."""
    by_model = {model.label: columns(found.get(model.label, {})) for model in models}
    content: dict[str, Any] = {"settings": settings, "models": {}, "comparisons": []}
    for model in models:
        metrics = {name: _summary(name, column, seed) for name, column in by_model[model.label].items()}
        lengths = [entry["finish"] for entry in found.get(model.label, {}).values() if entry["finish"]]
        cut = {"answers": len(lengths), "not_finished": sum(finish != "stop" for finish in lengths)} if lengths else {}
        own = {"tasks": tasks[model.label]} if tasks.get(model.label) else {}
        content["models"][model.label] = {"against": model.against, "metrics": metrics, **cut, **own}
        if model.against:
            content["comparisons"] += _comparisons(model, by_model, seed)
    return content


def _summary(name: str, column: Column, seed: int) -> dict[str, Any]:
    keys = sorted(column.values)
    interval = mean_interval(*column.arrays(keys), seed=seed)
    if name != "loss":
        return asdict(interval)
    tokens = int(sum(column.weights.values()))
    return {**asdict(interval), "tokens": tokens, "perplexity": math.exp(min(interval.mean, LARGEST))}


def _comparisons(model: Contestant, by_model: dict[str, dict[str, Column]], seed: int) -> list[dict[str, Any]]:
    made = []
    for name, column in by_model[model.label].items():
        other = by_model[model.against].get(name)
        keys = sorted(column.values.keys() & other.values.keys()) if other else []
        if not keys:
            continue
        (mine, weights), (its, other_weights) = column.arrays(keys), other.arrays(keys)
        head = {"model": model.label, "against": model.against, "metric": name}
        if not np.array_equal(weights, other_weights):
            made.append({**head, "left_out": "their tokenizers or templates make other tokens of the rows"})
            continue
        found = compare(mine, its, weights, seed=seed)
        made.append({**head, **_better_is_win(found, lower_is_better=name == "loss")})
    return made


def _better_is_win(found: Comparison, *, lower_is_better: bool) -> dict[str, Any]:
    values = asdict(found)
    if lower_is_better:
        values["wins"], values["losses"] = values["losses"], values["wins"]
    return values


# The table


def table(content: dict[str, Any]) -> str:
    """The models side by side: each metric with its interval, and against the base."""
    lines = [("model", "metric", "rows", "mean", "95% interval", "change", "better", "worse", "same", "p")]
    against = {(one["model"], one["metric"]): one for one in content["comparisons"]}
    for label, model in content["models"].items():
        for name, metric in model["metrics"].items():
            lines.append((label, *_cells(name, metric), *_change(against.get((label, name)))))
            if name == "loss":
                lines.append((label, "perplexity", "", f"{metric['perplexity']:.4g}", *[""] * 6))
        for task, values in model.get("tasks", {}).items():
            for name, value in values.items():
                if not name.startswith(("sample_len", "sample_count")) and "_stderr" not in name:
                    error = values.get(_stderr_of(name))
                    shown = f"± {1.96 * error:.4f}" if error is not None and math.isfinite(error) else ""
                    lines.append((label, f"{task} {name}", "", f"{value:.4f}", shown, *[""] * 5))
    lines = [tuple(cells) for cells in _without_repeats(lines)]
    widths = [max(len(cells[at]) for cells in lines) for at in range(len(lines[0]))]
    return "\n".join(_line(cells, widths) for cells in lines)


def _stderr_of(name: str) -> str:
    metric, comma, rest = name.partition(",")
    return f"{metric}_stderr{comma}{rest}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    aligned = (
        f"{cell:<{width}}" if at < 2 else f"{cell:>{width}}" for at, (cell, width) in enumerate(zip(cells, widths))
    )
    return "  ".join(aligned).rstrip()


def _without_repeats(lines: list[tuple[str, ...]]):
    before = None
    for label, *cells in lines:
        yield "" if label == before else label, *cells
        before = label


def _cells(name: str, metric: dict[str, Any]) -> tuple[str, ...]:
    return name, f"{metric['n']:,}", f"{metric['mean']:.4f}", f"{metric['low']:.4f} to {metric['high']:.4f}"


def _change(found: dict[str, Any] | None) -> tuple[str, ...]:
    if found is None or "left_out" in found:
        return ("",) * 5
    counts = (f"{found[name]:,}" for name in ("wins", "losses", "ties"))
    return f"{found['difference']['mean']:+.4f}", *counts, f"{found['p']:.2g}"


# Files


def write(folder: Path, content: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Both files into a folder that is there."""
    (folder / RESULTS).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    with (folder / PREDICTIONS).open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def predictions(models: Sequence[Contestant], found: dict[str, Found], questions: Found) -> list[dict[str, Any]]:
    """A line for each row, in the order of the sources."""
    keys = sorted({key for own in found.values() for key in own})
    return [
        {
            "source": key[0],
            "row": key[1],
            **questions.get(key, {}),
            "models": {
                model.label: _said(found[model.label][key]) for model in models if key in found.get(model.label, {})
            },
        }
        for key in keys
    ]


def _said(entry: dict[str, Any]) -> dict[str, Any]:
    loss = {"loss": entry["loss"] / entry["tokens"], "tokens": entry["tokens"]} if entry["loss"] is not None else {}
    answer = {key: entry[key] for key in ("answer", "finish", "scores")} if entry["answer"] is not None else {}
    return {**answer, **loss}
