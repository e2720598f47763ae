"""Writes the table of docs/models.md from its recipes and the planner: `python docs/make_models.py`. A test compares the two."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from manyrank.config.resolve import Setting, resolve
from manyrank.models.catalog import read
from manyrank.plan.memory import GiB
from manyrank.plan.planner import Verdict, make_plan
from manyrank.plan.view import count
from manyrank.rules.context import RunContext
from manyrank.topology.gpus import find_kind, planned_hardware
from manyrank.topology.strategies import default_strategy

FILE = Path(__file__).with_name("models.md")
METHODS = ("qlora", "lora", "full")
# From the smallest; one kind for each size of memory.
MACHINES = [
    *((name, 1) for name in ("RTX3060", "RTX4080", "RTX4090", "RTX5090", "A6000", "A100-80GB", "H200")),
    *(("A100-80GB", count) for count in (2, 4, 8)),
    *(("H200", count) for count in (4, 8)),
]
HEAD = f"| model | parameters | {' | '.join(METHODS)} |\n{'|---' * (len(METHODS) + 2)}|\n"


def recipes(page: str) -> dict[str, dict[str, Any]]:
    """The recipes of the page, by the name of their model."""
    found = [yaml.safe_load(block) for block in re.findall("```yaml\n(.*?)```", page, re.DOTALL)]
    return {recipe["model_name_or_path"]: recipe for recipe in found}


def text(page: str) -> str:
    """The page with its table made anew."""
    rows = "".join(map(_row, recipes(page)))
    return re.sub(r"\| model \|.*?(?=\n\n)", lambda _: (HEAD + rows).rstrip(), page, count=1, flags=re.DOTALL)


def _row(model: str) -> str:
    cells = [_smallest(model, method) for method in METHODS]
    return f"| {model.rpartition('/')[2]} | {count(read(model).parameters)} | {' | '.join(cells)} |\n"


def _smallest(model: str, method: str) -> str:
    """The first of MACHINES on which the plan fits, without an offload, and its memory."""
    for gpu, nproc in MACHINES:
        given = {"model_name_or_path": model, "data_path": "x", "method": method, "max_length": 2048}
        given |= {"per_device_train_batch_size": 1, "global_batch_size": 16, "gradient_checkpointing": "auto"}
        resolved = resolve(None, [Setting(key, value, "docs") for key, value in given.items()])
        machine = planned_hardware(nproc, find_kind(gpu))
        context = RunContext(resolved, default_strategy(nproc), nproc, nproc, machine)
        options = make_plan(context, read(model), searched=False).options
        fitting = [o for o in options if o.verdict == Verdict.FITS and not o.refused and not o.strategy.offload]
        if fitting:
            best = max(fitting, key=lambda option: option.speed.tokens_per_second if option.speed else 0)
            name = f"{nproc} {gpu}, {best.strategy}" if nproc > 1 else gpu
            return f"{name}: {best.memory.peak / GiB:.0f} of {context.memory / GiB:.0f} GiB"
    return "-"


if __name__ == "__main__":
    FILE.write_text(text(FILE.read_text(encoding="utf-8")), encoding="utf-8")
