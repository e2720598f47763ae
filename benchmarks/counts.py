"""Counts of a training step that are the same on any machine, against those of benchmarks/baselines/.

    python benchmarks/counts.py             stored | now | change; exits with 1 where a count moved by more than 5%
    python benchmarks/counts.py --update    stores the counts of now

steps.json      a step of a tiny model on a CPU, as `manyrank train` builds and takes it, of each method
widths.json     a step of two layers as wide as Llama-3.1-8B's, of tensors without values
packing.json    how full packs and micro-batches of fixed lengths are

The operators are those of the CPU's path: a document at a time in attention, norms as transformers has them, small chunks
of logits. They depend on the version of torch, so that they are only compared under the one they were stored with.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import unittest.mock
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from manyrank.data.packing import dataset_layout, padded_layout, step_layout
from manyrank.errors import EXIT_FAILED
from manyrank.runs.versions import software

FOLDER = Path(__file__).with_name("baselines")
UPDATE = "python benchmarks/counts.py --update"
LIMIT = 0.05
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
COLUMNS = f"{'group':<8} {'case':<22} {'count':<24} {'stored':>17} {'now':>17} {'change':>8}"

Counts = dict[str, float]

RECOMPUTED = {"gradient_checkpointing": "full"}
STEPS: dict[str, dict] = {
    "lora bf16": {},
    "lora bf16 recomputed": RECOMPUTED,
    "lora bf16 dataset": {"packing": "dataset"},
    "lora bf16 padded": {"packing": "none"},
    "lora float32": {"bf16": False},
    "qlora bf16": {"method": "qlora"},
    "qlora bf16 recomputed": {"method": "qlora"} | RECOMPUTED,
    "int8 bf16": {"method": "int8"},
    "int8 bf16 recomputed": {"method": "int8"} | RECOMPUTED,
    "full bf16": {"method": "full"},
    "full bf16 recomputed": {"method": "full"} | RECOMPUTED,
    "full float32": {"method": "full", "bf16": False},
}
WIDTHS = {
    "lora bf16": ("lora", "off"),
    "lora bf16 recomputed": ("lora", "full"),
    "full bf16": ("full", "off"),
}
RECIPE = {
    "max_length": 64,
    "per_device_train_batch_size": 2,
    "global_batch_size": 6,
    "max_steps": 2,
    "gradient_checkpointing": "off",
    "report_to": [],
}
LAYERS, DOCUMENTS = 2, (300, 24, 120, 68)  # of WIDTHS; tokens of each document
EXAMPLES, RANKS, CAPACITY, BATCH = 640, 4, 2048, 64  # of the packers


@dataclass(frozen=True)
class Change:
    """A count of a case; None where it is not stored, or no longer counted."""

    group: str
    case: str
    count: str
    stored: float | None
    now: float | None

    @property
    def share(self) -> float | None:
        """Change as a share of what is stored; None where there is none to compare."""
        if None in (self.stored, self.now) or self.stored == 0 != self.now:
            return None
        return self.now / self.stored - 1 if self.stored else 0.0

    @property
    def moved(self) -> bool:
        return self.share is None or abs(self.share) > LIMIT

    def __str__(self) -> str:
        stored, now = ("none" if value is None else f"{value:,}" for value in (self.stored, self.now))
        change = "-" if self.share is None else f"{self.share:+.1%}"
        return f"{self.group:<8} {self.case:<22} {self.count:<24} {stored:>17} {now:>17} {change:>8}"


# Steps of a tiny model


def steps() -> dict[str, Counts]:
    """Count the second step of a run of each of STEPS."""
    with tempfile.TemporaryDirectory() as folder:
        _write_model(Path(folder, "model"))
        rows = (_row(16 + 17 * number % 41, number) for number in range(24))
        Path(folder, "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return {name: _of_run(Path(folder), **options) for name, options in STEPS.items()}


def _of_run(folder: Path, **options) -> Counts:
    from loops import config

    from manyrank.tasks.sft import SFT
    from manyrank.topology.gpus import probe
    from manyrank.topology.precision import find_precision
    from manyrank.topology.ranks import Topology
    from manyrank.training.build import build_run

    recipe = config(folder, **({"bf16": True} | RECIPE | options))
    with _strategy_of_its_own(), contextlib.redirect_stdout(io.StringIO()):
        run = build_run(
            recipe,
            Topology(),
            SFT,
            output_dir=folder / "run",
            precision=find_precision(recipe.bf16, recipe.fp16, probe()),
        )
        return _of_step(run)


def _of_step(run) -> Counts:
    from operators import counted

    from manyrank.plan.speed import needed

    trainer, task = run.trainer, run.trainer.task
    trainer.train_step(trainer.loader.step(0))  # in which the optimizer makes its states
    step, forward_backward, before = trainer.loader.step(1), task.forward_backward, []

    def noted(*args, **kwargs):
        loss = forward_backward(*args, **kwargs)
        before.extend(counter.reads)
        return loss

    task.forward_backward = noted
    with counted() as counter:
        trainer.train_step(step)
    shares = {"supervised": step.supervised / step.tokens, "length": step.sum_squared_lengths / step.tokens}
    counts = _counts(counter, step.tokens * needed(run.planned, **shares))
    return counts | {"reads in micro-batches": len(before), "reads after them": len(counter.reads) - len(before)}


def _counts(counter, needed: float) -> Counts:
    return {
        "launches": counter.launches,
        "flop": counter.flop,
        "flop to those needed": round(counter.flop / needed, 4),
        "bytes read and written": counter.traffic,
        "bytes at the peak": counter.peak,
    }


def _write_model(folder: Path) -> None:
    """A Llama with random weights, and a tokenizer of as many words."""
    import torch
    from gpu import TOY
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from manyrank.models.catalog import known

    words = {str(number): number for number in range(TOY["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "0")), eos_token="0", pad_token="0")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**known()["llama-3.1-8b"] | TOY))
    model.save_pretrained(folder)


def _row(length: int, number: int) -> dict[str, list[int]]:
    """Tokens of a document, of which the first third is a prompt."""
    ids = [1 + (number + at) % 500 for at in range(length)]
    return {"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]}


@contextlib.contextmanager
def _strategy_of_its_own() -> Iterator[None]:
    """Let accelerate's state, one for a process, and the environment that a strategy sets be those of one run."""
    from accelerate.state import AcceleratorState, GradientState

    before = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ.clear()
        os.environ.update(before)


# Steps at the widths of a real model


def widths() -> dict[str, Counts]:
    """Count a step of each of WIDTHS, on fake tensors, with lm_head as on a GPU."""
    from manyrank.models.fused_head import CROSS_ENTROPY

    with _strategy_of_its_own(), unittest.mock.patch.dict(CROSS_ENTROPY, clear=True):
        return {name: _of_width(*options) for name, options in WIDTHS.items()}


def _of_width(method: str, checkpointing: str) -> Counts:
    import gpu
    from operators import counted
    from torch._subclasses.fake_tensor import FakeTensorMode

    from manyrank.data.loader import side_by_side

    bench = gpu.Bench(gpu.Case("Llama-3.1-8B", method, 1, sum(DOCUMENTS), checkpointing), toy=False)
    rows = [_row(length, number) | {"source": "counts", "row": number} for number, length in enumerate(DOCUMENTS)]
    shape = bench._shape() | {"num_hidden_layers": LAYERS}
    first, micro = side_by_side(rows[1:2]), side_by_side(rows)
    model = _empty(shape, bench.config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        engine, token_loss = _prepared(model, bench.config)
        with counted():  # the optimizer makes its states
            bench.step(engine, token_loss, first)
        with counted() as counter:
            bench.step(engine, token_loss, micro)
    supervised = len(micro.targets) / sum(DOCUMENTS)
    length = sum(length**2 for length in DOCUMENTS) / sum(DOCUMENTS)
    each = _needed(bench.config, shape, supervised=supervised, length=length)
    return _counts(counter, sum(DOCUMENTS) * each)


def _empty(shape: dict, config):
    """The model with what the recipe puts on it, without memory."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from manyrank.models.load import with_adapters

    dtype = torch.float32 if config.method == "full" else torch.bfloat16
    with init_empty_weights(include_buffers=False):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=dtype)
    return with_adapters(base, config)


def _prepared(model, config):
    """The engine of a model without memory, whose tensors are fake ones of a CPU from now on, and its loss."""
    import torch
    from accelerate import Accelerator

    from manyrank.parallel.sharded_engines import prepare_engine
    from manyrank.training.loss import TokenLoss
    from manyrank.training.optim import build_optimizer

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty_like(parameter, device="cpu")
            setattr(module, name, torch.nn.Parameter(value, requires_grad=parameter.requires_grad))
    accelerator = Accelerator(mixed_precision="bf16", cpu=True, device_placement=False)
    engine = prepare_engine(accelerator, model, build_optimizer(model, config))
    return engine, TokenLoss(engine.wrapped, engine.model)


def _needed(config, shape: dict, **shares: float) -> float:
    """FLOP of a token that the method needs."""
    from manyrank.config.resolve import ResolvedConfig
    from manyrank.models.spec import from_config
    from manyrank.plan.planned_run import PlannedRun
    from manyrank.plan.speed import needed
    from manyrank.rules.context import RunContext
    from manyrank.topology.gpus import planned_hardware
    from manyrank.topology.strategies import default_strategy

    context = RunContext(ResolvedConfig(config), default_strategy(1), 1, 1, planned_hardware(0))
    return needed(PlannedRun(context, from_config(shape, name="counts")), **shares)


# Packers


def packing() -> dict[str, Counts]:
    """Count packs and micro-batches of EXAMPLES lengths from 16 to 1,023, most of them short.

    A slot is a place for a token. In micro-batches of a step a rank has as many as the longest one that runs beside it.
    """
    import numpy as np

    lengths = [16 + (number * 7919 % 1000) ** 3 * 1008 // 1000**3 for number in range(EXAMPLES)]
    batches = [lengths[start : start + BATCH] for start in range(0, EXAMPLES, BATCH)]
    dealt = [(batch, step_layout(batch, ranks=RANKS, token_budget=CAPACITY)) for batch in batches]
    padded = [(batch, padded_layout(len(batch), ranks=RANKS, batch_size=8)) for batch in batches]
    packs = dataset_layout(np.array(lengths), capacity=CAPACITY)
    return {
        "step": _filled(lengths, [sizes for batch, layout in dealt for sizes in _rounds(layout, batch, sum)]),
        "dataset": {"packs": len(packs), "tokens to a slot": round(sum(lengths) / (len(packs) * CAPACITY), 4)},
        "none": _filled(lengths, [sizes for batch, layout in padded for sizes in _rounds(layout, batch, _padded)]),
    }


def _rounds(layout, lengths: Sequence[int], size: Callable[[list[int]], int]) -> Iterator[tuple[int, ...]]:
    """Slots of the micro-batches that the ranks forward at the same time."""
    for members in zip(*layout, strict=True):
        yield tuple(size([lengths[at] for at in each]) for each in members)


def _padded(lengths: list[int]) -> int:
    return len(lengths) * max(lengths, default=0)


def _filled(lengths: list[int], rounds: list[tuple[int, ...]]) -> Counts:
    slots = sum(RANKS * max(sizes) for sizes in rounds)
    return {"micro-batches": RANKS * len(rounds), "tokens to a slot": round(sum(lengths) / slots, 4)}


# Stored counts


GROUPS: dict[str, Callable[[], dict[str, Counts]]] = {"steps": steps, "widths": widths, "packing": packing}


def read(group: str) -> dict:
    """The stored counts of a group by case, and the versions that they were counted with; none where none are stored."""
    file = FOLDER / f"{group}.json"
    return json.loads(file.read_text()) if file.exists() else {"versions": versions(), "counts": {}}


def write(group: str, counts: dict[str, Counts]) -> None:
    content = {"versions": versions(), "counts": counts}
    (FOLDER / f"{group}.json").write_text(json.dumps(content, indent=1) + "\n")


def versions() -> dict[str, str | None]:
    found = software().libraries
    return {name: found[name] for name in LIBRARIES}


def obstacle(group: str) -> str | None:
    """Say why the stored counts of a group cannot be compared with those of this machine; None where they can."""
    import torch

    stored, here = read(group)["versions"]["torch"], versions()["torch"]
    if stored.split(".")[:2] != here.split(".")[:2]:
        return f"{group}.json was stored with torch {stored}, here is {here}: {UPDATE}"
    return "they are counts of a CPU, and torch sees a GPU here" if torch.cuda.is_available() else None


def compare(group: str, stored: dict[str, Counts], now: dict[str, Counts]) -> list[Change]:
    """Every count of every case, of what is stored and of what is there now."""
    pairs = dict.fromkeys((case, count) for cases in (stored, now) for case in cases for count in cases[case])
    return [
        Change(group, case, count, stored.get(case, {}).get(count), now.get(case, {}).get(count))
        for case, count in pairs
    ]


def count(group: str) -> dict[str, Counts]:
    """Count a group now, without what libraries print meanwhile."""
    from transformers.utils import logging

    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable_progress_bar()
        return GROUPS[group]()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("groups", nargs="*", metavar="group", help=f"{', '.join(GROUPS)} (default: all)")
    parser.add_argument(
        "--update",
        action="store_true",
        help="store the counts of now; else compare, and exit with 1 where one moved by more than 5%%",
    )
    options = parser.parse_args(argv)
    if unknown := sorted(set(options.groups) - set(GROUPS)):
        parser.error(f"there is no group {', '.join(unknown)}: {', '.join(GROUPS)}")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
    groups = options.groups or list(GROUPS)
    why = [reason for group in groups if not options.update and (reason := obstacle(group))]
    found = {} if why else {group: count(group) for group in groups}
    changes = [change for group in found for change in compare(group, read(group)["counts"], found[group])]
    print(*(why or [COLUMNS, *changes]), sep="\n")
    if options.update:
        for group, counts in found.items():
            write(group, counts)
        return 0
    return EXIT_FAILED if why or any(change.moved for change in changes) else 0


if __name__ == "__main__":
    sys.exit(main())
