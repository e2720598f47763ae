"""`manyrank init`: a commented recipe for a model, data and GPUs, after all three are looked at. No torch.

    model ──> config.json ──> shape ─┐
    data  ──> rows, format, lengths ─┼──> plan of lora, else of qlora ──> recipe.yaml
    GPUs here, or --gpu and --nproc ─┘

manyrank init --model Qwen/Qwen2.5-7B --data my.jsonl --gpu RTX4090
manyrank init --task grpo --model Qwen/Qwen2.5-7B --data my.jsonl
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from ..config.args import Options, arg, read_options, word
from ..config.resolve import ResolvedConfig, Setting, resolve
from ..config.value_types import Int, Method, Task
from ..data.numeric import FINAL, NUMBER
from ..data.survey import SourceRows, Survey, survey, texts
from ..errors import UserError
from ..models.spec import ModelSpec
from ..plan.command import KINDS, PlanOptions, planned_context, read_model
from ..plan.memory import GiB
from ..plan.planner import USUAL_MICRO_BATCH, Plan, make_plan, shortage, with_micro_batch
from ..plan.view import count, summary
from ..project_files import EMBEDDED
from ..rules.check import check_sources
from ..rules.context import RunContext
from ..runs import hub
from ..runs.run_folder import check_writable
from ..topology import gpus

ROOM = 0.5  # of a GPU's memory: with a larger base in 16 bits, too little is left for long rows and errors of the plan
BATCH = 16  # examples to a step, or one for each process where there are more
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
ENOUGH_TO_SPLIT = 200  # rows
LEARNING_RATE = {"full": 2e-5}
OTHER_LEARNING_RATE, GRPO_LEARNING_RATE = 2e-4, 5e-6
GENERATIONS, COMPLETION = 4, 256  # of grpo: completions of a prompt, and most tokens of each
SHORT_NAME = "known to plans; to train it, write its folder, or its hub name with the owner"


class InitOptions(Options):
    """Write a commented recipe for a model and data, with what fits on the GPUs that are here or named."""

    examples = (
        "manyrank init --model Qwen/Qwen2.5-1.5B-Instruct --data my.jsonl",
        "manyrank init my.yaml --model ./model --data my.jsonl --gpu RTX4090 --nproc 2",
        "manyrank init --task grpo --model Qwen/Qwen2.5-1.5B-Instruct --data my.jsonl",
    )
    file: Path = word(Path("recipe.yaml"), "the recipe to write (default: recipe.yaml)")
    model: str | None = arg(
        None, "a folder with config.json, a hub name, or embedded", also=["model_name_or_path"], min_length=1
    )
    data: str | None = arg(None, "a file, a folder or a hub name", also=["data_path"], min_length=1)
    task: Task = arg("sft", "sft: learn the answers of the data; grpo: learn from the rewards of completions")
    gpu: str | None = arg(None, f"kind of the GPUs to plan for (default: what is here); one of {KINDS}", min_length=1)
    nproc: Int | None = arg(None, "GPUs, a process each (default: all that are here, or one of --gpu)", gt=0)
    method: Method | None = arg(None, "how to train (default: lora, or qlora where its base leaves too little room)")


@dataclass(frozen=True)
class Line:
    """A key of the recipe, and why it has its value."""

    key: str
    value: Any
    comment: str

    def __str__(self) -> str:
        text = yaml.safe_dump({self.key: self.value}, allow_unicode=True, default_flow_style=True, width=10_000)
        return f"{text.strip()[1:-1]:<46}  # {' '.join(self.comment.split())}"


@dataclass(frozen=True)
class Choice:
    """A method and why; `plan` is None without GPUs."""

    method: str
    why: str
    plan: Plan | None

    @property
    def batch(self) -> int:
        return (self.plan.context.config.global_batch_size if self.plan else None) or BATCH

    @property
    def micro_batch(self) -> int:
        return self.plan.context.config.micro_batch if self.plan else USUAL_MICRO_BATCH


def main(argv: Sequence[str]) -> int:
    """Look at the model, the data and the GPUs, and write the recipe.

    Raises:
        UserError: the file is there, the model or data cannot be used, or nothing fits.
    """
    options = read_options(argv, InitOptions, prog="manyrank init")
    _check_file(options.file)
    if not options.model or not options.data:
        missing = " and ".join(f"--{name}" for name in ("model", "data") if not getattr(options, name))
        fix = "as in: manyrank init --model Qwen/Qwen2.5-1.5B-Instruct --data data/sample.jsonl"
        raise UserError(f"{missing} must be given", where="command line", fix=fix)
    model = str(Path(options.model).parent) if Path(options.model).name == "config.json" else options.model
    rows = _rows(model, options.data)
    print(f"data   {_described(rows)}", flush=True)
    shape = _shape(model)
    print(
        f"model  {model}: {count(shape.parameters)} parameters{f'; {SHORT_NAME}' if _is_short(model) else ''}",
        flush=True,
    )
    values = {"model_name_or_path": model, "data_path": options.data}
    values |= _task(options, rows) | {"max_length": _max_length(options, rows, shape)}
    choice = _choice(options, values, shape)
    _write(options.file, [*_head(options.file, choice), *recipe(values, choice, rows)])
    print(f"plan   {choice.method}: {choice.why}")
    if choice.plan:
        print(f"       {summary(choice.plan)}")
    print(f"\nwritten to {options.file}; next: manyrank train {shlex.quote(str(options.file))} --check")
    return 0


def _check_file(file: Path) -> None:
    if file.suffix.lower() not in (".yaml", ".yml"):
        raise UserError(f"{file} is not named as a recipe", where="FILE", fix="name it like my.yaml; data is --data")
    if file.exists():
        raise UserError(f"{file} is already there", where="FILE", fix="give another name, or remove it")
    fix = "name a file in a folder that is there"
    if not file.parent.is_dir():
        raise UserError(f"{file} cannot be written: there is no folder {file.parent}", where="FILE", fix=fix)
    check_writable(file, where="FILE", fix=fix)


# What is given


def _rows(model: str, data: str) -> Survey:
    """Read the data as a run will."""
    resolved = _resolved({"model_name_or_path": model, "data_path": data})
    check_sources(resolved)
    return survey(resolved.config)[0]


def _resolved(values: dict[str, Any]) -> ResolvedConfig:
    return resolve(None, [Setting(key, value, "manyrank init") for key, value in values.items()])


def _described(rows: Survey) -> str:
    bad = ", ".join(f"{number:,} {reason}" for reason, number in rows.reasons.items())
    return "; ".join([*map(_counted, rows.sources), *([f"bad: {bad}"] if bad else [])])


def _counted(source: SourceRows) -> str:
    return f"{source.path}: {'' if source.whole else 'the first '}{source.rows:,} rows of {source.format_type}"


def _shape(model: str) -> ModelSpec:
    """Read the model's shape, here or on the hub.

    Raises:
        UserError: nothing is known of it here, and the hub does not give its config.json.
    """
    try:
        return read_model(model)
    except UserError:
        if model == EMBEDDED or "/" not in model or Path(model).exists() or not hub.NAME.fullmatch(model):
            raise
    hub.fetch_config(model)
    return read_model(model)


def _is_short(model: str) -> bool:
    """Whether a name is one of the catalog alone, such as qwen3-8b."""
    return model != EMBEDDED and "/" not in model and not Path(model).is_dir()


def _task(options: InitOptions, rows: Survey) -> dict[str, Any]:
    """The keys of grpo, with a reward that the first answer of the data suits.

    Raises:
        UserError: the rows have no prompts.
    """
    if options.task == "sft":
        return {}
    examples = [source.example for source in rows.sources if source.example]
    answers = [text for example in examples for role, text in texts(example) if role == "assistant"]
    if not answers:
        what = f"rows of {rows.sources[0].format_type} have no prompt to complete"
        raise UserError(what, where=options.data or "", fix="give questions with answers, or leave --task grpo out")
    result = answers[0].rpartition(FINAL)[2].strip().strip("$€£¥%.")
    reward = "numeric" if NUMBER.fullmatch(result) else "f1"
    return {"task": "grpo", "rewards": {reward: 1.0}, "num_generations": GENERATIONS}


def _max_length(options: InitOptions, rows: Survey, shape: ModelSpec) -> int:
    """Choose a length that takes the longest row, and a completion under grpo, as far as the model has positions."""
    longest = max(source.longest for source in rows.sources) + (COMPLETION if options.task == "grpo" else 0)
    length = next((length for length in LENGTHS if length >= longest), LENGTHS[-1])
    return min(length, shape.max_positions or length)


# What fits


def _choice(options: InitOptions, values: dict[str, Any], shape: ModelSpec) -> Choice:
    """Choose a method by its plan.

    Raises:
        UserError: an unknown GPU, or none of the methods fits.
    """
    if not options.gpu and not gpus.probe().gpus:
        return Choice(options.method or "lora", "no GPU is here, so nothing is planned; --gpu KIND names one", None)
    if options.method:
        plan = _plan(options, values | {"method": options.method}, shape)
        if plan.chosen.usable:
            return Choice(options.method, "as the command line says", plan)
        raise _too_big([plan])
    lora, qlora = plans = [_plan(options, values | {"method": method}, shape) for method in ("lora", "qlora")]
    share = lora.chosen.memory.parts.get("weights", 0) / (lora.context.memory or 1)
    takes = f"the base in 16 bits takes {share:.0%} of a GPU's memory"
    if lora.chosen.usable and not lora.chosen.strategy.offload and share <= ROOM:
        return Choice("lora", takes, lora)
    if qlora.chosen.usable:
        return Choice("qlora", takes if share > ROOM else "lora does not fit into the GPUs' memory", qlora)
    if lora.chosen.usable:
        return Choice("lora", f"qlora {_against(qlora)}", lora)
    raise _too_big(plans)


def _plan(options: InitOptions, values: dict[str, Any], shape: ModelSpec) -> Plan:
    """Plan a method with the micro-batch that a launch would choose."""
    context = planned_context(PlanOptions(gpu=options.gpu), options.nproc, _resolved(values))
    whole = context.world_size * (GENERATIONS if options.task == "grpo" else 1)  # groups on each process
    batch = whole * math.ceil(BATCH / whole) if options.task == "grpo" else max(BATCH, whole)
    context = context.with_options(global_batch_size=batch)
    return make_plan(with_micro_batch(context, shape, least=USUAL_MICRO_BATCH), shape, searched=False)


def _too_big(plans: Sequence[Plan]) -> UserError:
    context, model = plans[-1].context, plans[-1].chosen.run.shape.name
    reasons = "; ".join(f"{plan.context.config.method} {_against(plan)}" for plan in plans)
    smaller = "" if context.config.method == "qlora" else ", or for --method qlora"
    fix = f"plan for more GPUs (--nproc), larger ones (--gpu) or a smaller model{smaller}"
    return UserError(f"{model} does not run on {_gpus(context)}: {reasons}", where="the plan", fix=fix)


def _against(plan: Plan) -> str:
    """Say why a plan cannot be used."""
    short = shortage(plan.chosen, plan.context) or f"{plan.chosen.memory.needed / GiB:.0f} GiB a GPU"
    return f"is refused: {plan.chosen.refused}" if plan.chosen.refused else f"needs {short}"


def _gpus(context: RunContext) -> str:
    kind = context.kind.name if context.kind else "GPU"
    return f"{context.nproc} x {kind} of {(context.memory or 0) / GiB:.0f} GiB"


# The recipe


def recipe(values: dict[str, Any], choice: Choice, rows: Survey) -> list[Line]:
    """List the keys that people change."""
    longest, splits = max(source.longest for source in rows.sources), rows.usable >= ENOUGH_TO_SPLIT
    grpo, model = "task" in values, values["model_name_or_path"]
    rate = GRPO_LEARNING_RATE if grpo else LEARNING_RATE.get(choice.method, OTHER_LEARNING_RATE)
    what = "completions" if grpo else "examples"
    on_gpus = f"the plan's choice: {choice.plan.chosen.strategy}" if choice.plan else "single, or ddp, on CPUs"
    adapters = [
        Line("lora_r", 16, "rank of the adapters: more learns more, and takes more memory"),
        Line("lora_alpha", 32, "scale of the adapters: usually twice the rank"),
    ]
    rewarded = [
        Line("rewards", values.get("rewards"), "numeric, exact, f1, format, ... by weight: docs/grpo.md"),
        Line("num_generations", GENERATIONS, "completions of each prompt, compared with each other"),
        Line("max_completion_length", COMPLETION, "most tokens of a completion"),
        Line("beta", 0.04, "weight of the KL divergence from the model at the start"),
    ]
    return [
        *([Line("task", "grpo", "learn from the rewards of sampled completions")] if grpo else []),
        Line("model_name_or_path", model, SHORT_NAME if _is_short(model) else "a folder or a hub name"),
        Line("method", choice.method, f"of {', '.join(get_args(Method))}; {choice.why}"),
        *(adapters if choice.method != "full" else []),
        Line("data_path", values["data_path"], _described(rows)),
        Line(
            "eval_split",
            0.05 if splits else 0.0,
            "share of the rows to validate on" + ("" if splits else "; few are here"),
        ),
        Line("on_bad_row", "error", "skip leaves bad rows out, and lists them"),
        Line("max_length", values["max_length"], f"tokens; the longest row has about {longest:,}"),
        *(rewarded if grpo else []),
        Line("global_batch_size", choice.batch, f"{what} to a step, on any number of GPUs"),
        Line(
            "per_device_train_batch_size",
            choice.micro_batch,
            f"{what} at once in a process; the {'plan' if choice.plan else 'default'}'s",
        ),
        Line("num_train_epochs", 1 if grpo else 3, "times through the data"),
        Line("learning_rate", rate, f"usual for {'grpo' if grpo else choice.method}"),
        Line("strategy", "auto", on_gpus),
        Line("save_steps", "auto", "a checkpoint every epoch, but at least 50 and at most 500 steps apart"),
        Line("report_to", [], "[wandb], [tensorboard], ..."),
    ]


def _head(file: Path, choice: Choice) -> list[str]:
    where = _gpus(choice.plan.context) if choice.plan else "a machine without GPUs"
    return [
        f"# Made by `manyrank init` for {where}. The command line wins over these values:",
        f"# manyrank train {shlex.quote(str(file))} --lr 1e-4. `manyrank train --help all` describes every key.",
    ]


def _write(file: Path, lines: Sequence[Line | str]) -> None:
    with file.open("x", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in lines)
