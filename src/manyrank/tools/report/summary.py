"""The first lines of a report: model, data, method, result, and what is odd. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .blocks import Block, Note, Table, one_line, word
from .oddities import oddities
from .run_record import RunRecord, damage_ignored


def summary_blocks(run: RunRecord) -> Iterator[Block]:
    """List the table of a run in short, and a sentence on what is odd once a step has been logged."""
    lines = {
        "status": _status(run),
        "model": model(run),
        "data": _data(run),
        "method": method(run),
        "loss": _change(run, "loss"),
        "reward": _change(run, "reward"),
        "validation": _validation(run),
        "time": _time(run),
    }
    rows = tuple((word(label), word(text)) for label, text in lines.items() if text)
    yield Table("summary", "Summary", (), rows)
    if run.lines:
        odd = oddities(run)
        yield Note(f"Odd: {one_line('; '.join(odd))}." if odd else "Nothing odd.", key="odd", warning=bool(odd))


def duration(seconds: float) -> str:
    """Days, hours, minutes and seconds, as far as they say something."""
    if not math.isfinite(seconds):
        return repr(seconds)
    if round(seconds) < 60:
        return f"{seconds:.1f} s"
    days, rest = divmod(round(seconds), 86400)
    text = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days} d {text}" if days else text


def _status(run: RunRecord) -> str:
    steps = f"{run.step:,} of {run.total_steps:,} steps" if run.total_steps is not None else f"{run.step:,} steps"
    return f"{run.status}; {steps}"


def model(run: RunRecord) -> str:
    """Write the model's name, its parameters and those that are trained."""
    name = run.value("model_name_or_path")
    parameters, trained = (run.strategy.get(key) for key in ("parameters", "trained_parameters"))
    parts = [str(name)] if name else []
    if isinstance(parameters, int) and isinstance(trained, int) and parameters:
        parts.append(f"{parameters:,} parameters, {trained:,} trained ({trained / parameters:.2%})")
    return ", ".join(parts)


def _data(run: RunRecord) -> str:
    parts = []
    with damage_ignored():
        part = run.data["parts"][0]
        rows = f"{run.rows:,} of {part['out_of']:,} rows" if part["out_of"] > run.rows else f"{run.rows:,} rows"
        parts = [rows, f"{part['examples']:,} examples", f"{part['tokens']:,} tokens"]
        parts.append(f"{run.rows_left_out or 'no'} row{'s' * (run.rows_left_out != 1)} left out")
        parts += [f"{run.rows_cut:,} cut"] * bool(run.rows_cut)
    return ", ".join(parts)


def method(run: RunRecord) -> str:
    """Write the method, the strategy and the processes."""
    name, rank = run.value("method"), run.value("lora_r")
    if not name:
        return ""
    strategy = run.value("strategy") or run.strategy.get("distributed_type")
    trained = f"{name}, rank {rank}" if name != "full" and rank else f"{name}"
    where = f" on {strategy}" if strategy else ""
    count = run.processes
    return f"{trained}{where}" + (f", {count} process{'es' * (count != 1)}" if count else "")


def _change(run: RunRecord, key: str) -> str:
    points = run.curve(key)
    if not points:
        return ""
    (first, before), (last, after) = points[0], points[-1]
    began = f"{before:.4f} at step {first:,}"
    return began if last == first else f"{began}, {after:.4f} at step {last:,}"


def _validation(run: RunRecord) -> str:
    """Write the best validation: the lowest loss, or the highest reward."""
    for key, name, best in (("eval_loss", "loss", min), ("eval_reward", "reward", max)):
        if points := run.curve(key):
            step, value = best(points, key=lambda point: point[1])
            return f"best {name} {value:.4f} at step {step:,}, last {points[-1][1]:.4f}"
    return ""


def _time(run: RunRecord) -> str:
    rate = run.median("tokens_per_second")
    spent = f"{duration(run.seconds)} in steps" if run.seconds else ""
    return ", ".join(filter(None, [spent, f"{rate:,.0f} tokens/s" if rate is not None else ""]))
