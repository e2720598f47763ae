"""Writes docs/memory.md, the plan beside published figures: `python docs/make_memory.py`. A test compares the two."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from manyrank.config.resolve import ResolvedConfig, Setting, resolve
from manyrank.models.catalog import read
from manyrank.plan.memory import estimate
from manyrank.plan.planned_run import PlannedRun
from manyrank.rules.context import RunContext
from manyrank.topology.gpus import planned_hardware
from manyrank.topology.strategies import STRATEGIES

FILE = Path(__file__).with_name("memory.md")
FIGURES = Path(__file__).with_name("published_memory.csv")
INTRO = """# The plan beside published figures

GB (10^9 bytes) of one GPU at its peak, as others have published them for their own software (`docs/published_memory.csv`),
and what `manyrank plan` says of the same model, method, strategy, lengths and adapters; `python docs/make_memory.py` writes
this page. Nothing was fitted to these figures, and none was measured with this project: no GPU was at hand.

Most of that software computes whole logits and uses peft's own adapters. Against it stands the plan with
`--disable_fused lm_head,lora,norm,mlp`, which `manyrank plan` also prints beside its own figure; against losses in chunks stands the plan with
`--disable_fused norm,mlp`. Where a source says that it does something else that takes or saves memory, the row says so and is not counted.

"""
ENDING = """
What is left: ms-swift's figures of 2024 grow by three logits more than anyone else's of the same model; DeepSpeed's for
full fine-tuning are below the plan; `nvidia-smi` under FSDP 1 sees up to a quarter more than its own allocator has in use,
where the plan adds a tenth.

"""


@dataclass(frozen=True)
class Figure:
    """One published peak, and the plan's, in bytes."""

    row: dict[str, str]
    published: float
    planned: int

    @property
    def error(self) -> float:
        return self.planned / self.published - 1

    @property
    def counts(self) -> bool:
        return not self.row["differs"]


def figures() -> list[Figure]:
    with FIGURES.open(encoding="utf-8") as file:
        return [Figure(row, float(row["gb"]) * 1e9, _planned(row)) for row in csv.DictReader(file)]


def _planned(row: dict[str, str]) -> int:
    values = {
        "model_name_or_path": row["model"],
        "data_path": "none",
        "method": row["method"],
        "max_length": int(row["max_length"]),
        "per_device_train_batch_size": int(row["micro_batch"]),
        "gradient_checkpointing": row["checkpointing"],
        "optim": row["optim"],
        "disable_fused": ["norm", "mlp"] if row["head"] == "chunks" else ["lm_head", "lora", "norm", "mlp"],
    }
    if row["method"] != "full":
        targets = row["lora_targets"].split(",")
        values["lora_r"], values["lora_dropout"] = int(row["lora_r"]), float(row["lora_dropout"])
        values["lora_target_modules"] = "all-linear" if targets == ["all-linear"] else targets
    config = resolve(None, [Setting(key, value, "published_memory.csv") for key, value in values.items()]).config
    nproc = int(row["nproc"])
    context = RunContext(ResolvedConfig(config), STRATEGIES[row["strategy"]], nproc, nproc, planned_hardware(nproc))
    return estimate(PlannedRun(context, read(row["model"]))).peak


def text() -> str:
    """The whole page."""
    found = figures()
    counted = [figure for figure in found if figure.counts]
    sources = list(dict.fromkeys(figure.row["source"] for figure in counted))
    rows = [_summary("**all**", counted)]
    rows += [_summary(source, [figure for figure in counted if figure.row["source"] == source]) for source in sources]
    head = "| source | figures | median error | within 20% | median difference |\n|---|---|---|---|---|\n"
    return INTRO + head + "\n".join(rows) + "\n" + ENDING + _all(found)


def _summary(name: str, found: list[Figure]) -> str:
    error, near, bias = summary(found)
    return f"| {name} | {len(found)} | {error:.1%} | {near:.0%} | {bias:+.1%} |"


def summary(found: list[Figure]) -> tuple[float, float, float]:
    """Median error, share within 20%, and median difference (below 0: too little is planned)."""
    errors = [figure.error for figure in found]
    return (
        median(map(abs, errors)),
        sum(abs(error) <= 0.2 for error in errors) / len(errors),
        median(errors),
    )


def _all(found: list[Figure]) -> str:
    head = "| source | model | run | micro-batch x length | LoRA | head | published | plan | |\n" + "|---" * 9 + "|\n"
    return head + "\n".join(map(_line, found)) + "\n"


def _line(figure: Figure) -> str:
    row = figure.row
    again = "" if row["checkpointing"] == "full" else ", nothing recomputed"
    targets = row["lora_targets"].replace("_proj", "").replace(",", " ")
    lora = f"r {row['lora_r']}, {targets}" if row["lora_r"] else ""
    lora += f", dropout {row['lora_dropout']}" if row["lora_r"] and float(row["lora_dropout"]) else ""
    measured = f" ({row['measured']})" if row["measured"] else ""
    return (
        f"| {row['source']} | {row['model']} | {row['method']}, {row['strategy']} x {row['nproc']}{again} | {row['micro_batch']} x {row['max_length']} "
        f"| {lora} | {row['head']} | {figure.published / 1e9:.1f}{measured} | {figure.planned / 1e9:.1f} "
        f"| {row['differs'] or f'{figure.error:+.0%}'} |"
    )


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
