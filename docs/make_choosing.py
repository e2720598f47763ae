"""Writes docs/choosing.md from the planner's own tables: `python docs/make_choosing.py`. A test compares the two."""

from __future__ import annotations

from pathlib import Path

from manyrank.config.resolve import Setting, resolve
from manyrank.models.catalog import read
from manyrank.plan.memory import GiB
from manyrank.plan.planner import Verdict, make_plan
from manyrank.plan.view import count
from manyrank.rules.context import RunContext
from manyrank.topology.gpus import find_kind, planned_hardware
from manyrank.topology.strategies import default_strategy

FILE = Path(__file__).with_name("choosing.md")
MODELS = ("qwen3-1.7b", "llama-3.1-8b", "qwen2.5-14b", "qwen2.5-32b", "llama-3.1-70b", "qwen3-30b-a3b")
METHODS = ("qlora", "lora", "full")
MACHINES = (
    ("RTX4090", 1, 1),
    ("RTX4090", 2, 1),
    ("A100-80GB", 1, 1),
    ("A100-80GB", 8, 1),
    ("H100-80GB", 8, 1),
    ("H100-80GB", 8, 4),
)
LENGTH, BATCH = 2048, 256
INTRO = f"""# Which strategy when

Leave `strategy` out: `manyrank train` plans all strategies and takes the fastest that fits, and `manyrank plan RECIPE` shows
them. The tables here are the planner's answers for `max_length` {LENGTH}, micro-batch 1, {BATCH} examples a step and
`gradient_checkpointing: auto`; `python docs/make_choosing.py` writes them anew. They are arithmetic: no GPU was measured.

What it comes to:

- **ddp** while the model, its optimizer and one micro-batch fit on every GPU: nothing is gathered.
- **zero2** where only gradients and optimizer states are too large: full fine-tuning of small models.
- **fsdp** where the weights are too large. With NVLink the gathering hides behind the products.
- **hsdp** on several machines whose network is much slower than their links, while the model fits on one machine's GPUs together.
- **zero3** needs about as much as fsdp; take it for what only DeepSpeed has.
- **fsdp_offload, zero3_offload** when nothing else fits: host memory and PCIe then set the pace.
- **qlora** before offloading: it makes the frozen weights a quarter of their size, for about a tenth more time.
"""
CELLS = """
A cell: strategy, GiB of one GPU, recomputed layers (of all, or none), tokens a second of all GPUs. "-": nothing fits.
"""


def main() -> None:
    FILE.write_text(text(), encoding="utf-8")


def text() -> str:
    """The whole document."""
    return INTRO + CELLS + "".join(_table(method) for method in METHODS)


def _table(method: str) -> str:
    heads = [f"{nodes} x {nproc} {gpu}" if nodes > 1 else f"{nproc} {gpu}" for gpu, nproc, nodes in MACHINES]
    lines = [f"\n## {method}\n", f"| model | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for model in MODELS:
        cells = (_cell(model, method, *machine) for machine in MACHINES)
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(model: str, method: str, gpu: str, nproc: int, nnodes: int) -> str:
    given = {
        "model_name_or_path": model,
        "data_path": "x",
        "method": method,
        "max_length": LENGTH,
        "per_device_train_batch_size": 1,
        "global_batch_size": BATCH,
        "gradient_checkpointing": "auto",
    }
    resolved, kind = resolve(None, [Setting(key, value, "docs") for key, value in given.items()]), find_kind(gpu)
    machine = planned_hardware(nproc, kind)
    context = RunContext(resolved, default_strategy(nproc * nnodes), nproc, nproc * nnodes, machine)
    found = make_plan(context, read(model)).chosen
    if found.verdict == Verdict.TOO_BIG:
        return "-"
    again = {"off": "", "full": ", all recomputed"}.get(
        found.run.config.gradient_checkpointing, f", {found.run.checkpointed} recomputed"
    )
    return f"{found.strategy} {found.memory.peak / GiB:.0f} GiB{again}, {count(found.speed.tokens_per_second)}/s"


if __name__ == "__main__":
    main()
