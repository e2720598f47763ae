"""`manyrank plan`: will it fit, where, and how fast. No torch, no GPU, no weights.

manyrank plan my.yaml --gpu H100-80GB --nproc 8
manyrank plan --model Llama-3.1-70B --method qlora --gpu RTX4090 --nproc 2 --nnodes 1,2,4,...,128
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from ..config.args import CommandLine, Options, arg, parse_with
from ..config.recipe_file import refuse_data
from ..config.resolve import NOT_GIVEN, ResolvedConfig, Setting, TrainConfig, find_recipe, resolve
from ..config.value_types import Float
from ..errors import UserError
from ..models.catalog import read
from ..models.spec import ModelSpec
from ..models.tiny import ensure
from ..project_files import EMBEDDED
from ..rules.check import find_violations
from ..rules.context import RunContext
from ..topology import gpus
from ..topology.gpus import GpuKind
from ..topology.strategies import default_strategy
from .planner import USUAL_MICRO_BATCH, Plan, leaves_micro_batch_open, make_plan, scaling, with_micro_batch
from .view import as_text, as_values

DECIMAL = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
UNITS = DECIMAL | {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
NO_DATA = "(none)"  # stands for the data of a plan without a recipe
BYTES_A_TOKEN = 4  # of text in a data file, about
KINDS = ", ".join(kind.name for kind in gpus.GPU_KINDS)


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)", text.strip())
    if not match or match[2].lower() not in UNITS or float(match[1]) <= 0:
        raise ValueError(
            "no size like 24GiB or 2.5M; units are KiB, MiB, GiB, TiB, and k, M, G, B, T with or without a B"
        )
    return int(float(match[1]) * UNITS[match[2].lower()])


def _bytes(text: str) -> int:
    size = _size(text)
    if size < 2**30:
        raise ValueError("less than 1 GiB: give a unit, as in 24GiB")
    return size


def _nodes(text: str) -> list[int]:
    """Read a rising list of counts; `1,2,4,...,128` doubles in its middle."""
    parts, counts = [part.strip() for part in text.split(",")], []
    for index, part in enumerate(parts):
        doubles = len(counts) == 1 or (len(counts) > 1 and counts[-1] == 2 * counts[-2])
        if part == "..." and doubles and index == len(parts) - 2 and parts[-1].isdecimal():
            while counts[-1] * 2 < int(parts[-1]):
                counts.append(counts[-1] * 2)
        elif part.isdecimal() and int(part) > (counts[-1] if counts else 0):
            counts.append(int(part))
        else:
            raise ValueError("not a rising list of counts like 4, or 1,2,4,...,128")
    return counts


class PlanOptions(Options):
    """Will it fit, where, and how fast: memory and speed of a recipe on every strategy.

    In place of RECIPE, a model alone is enough: a name such as Qwen2.5-7B, a folder or a config.json.
    """

    first = (
        *("model_name_or_path", "method", "lora_r", "data_path", "max_length", "per_device_train_batch_size"),
        *("global_batch_size", "optim", "bf16", "fp16", "gradient_checkpointing", "nproc"),
    )
    examples = (
        "manyrank plan Qwen2.5-7B --gpu H100-80GB --nproc 8",
        "manyrank plan my.yaml --gpu RTX4090 --nproc 2 --method qlora",
    )

    gpu: str | None = arg(None, f"kind of the GPUs, as H100-80GB (default: what is here); one of {KINDS}", min_length=1)
    gpu_memory: Annotated[int | None, BeforeValidator(_bytes)] = arg(
        None, "memory of one GPU, as 24GiB; overrides the kind's"
    )
    host_memory: Annotated[int | None, BeforeValidator(_bytes)] = arg(
        None, "memory of one machine (default: of this one, if its GPUs are planned for)"
    )
    network: Float | None = arg(None, "Gbit/s of a machine's network", gt=0)
    price: Float | None = arg(None, "price of a GPU for an hour (default: about the usual)", gt=0)
    tokens: Annotated[int | None, BeforeValidator(_size)] = arg(
        None, "tokens of the data, once through, as 2.5M (default: by the files' sizes)"
    )
    nnodes: Annotated[list[int], BeforeValidator(_nodes)] = arg(
        [1], "machines (default: 1); several as 1,2,4,...,128 for a table of how it scales"
    )
    strategy: str | None = arg(None, "one strategy, or all (default: all, and the fastest that fits is chosen)")
    as_json: bool = arg(False, "print values instead of tables")


def main(argv: Sequence[str]) -> int:
    """Plan, and print the plan.

    Raises:
        UserError: a wrong option, recipe or model.
    """
    line, options = parse_with(argv, PlanOptions, prog="manyrank plan", launch=True)
    launch = line.options.model_dump(exclude={"nproc"}, exclude_defaults=True)
    if names := [*launch, *line.slurm.model_fields_set]:
        fix = f"leave --{names[0]} out; of the launch only --nproc and --nnodes count"
        raise UserError("a plan starts nothing", where=f"command line, --{names[0]}", fix=fix)
    line = _model_as_option(line)
    if options.strategy not in (None, "all", "auto"):
        chosen = Setting("--strategy", options.strategy, "command line, --strategy")
        line = replace(line, overrides=[*line.overrides, chosen])
    resolved = _resolved(line)
    context = planned_context(options, line.options.nproc, resolved)
    _check_speeds(options, context)
    shape = read_model(resolved.config.model_name_or_path)
    if resolved.config.per_device_train_batch_size == "auto":
        context = with_micro_batch(context, shape)
    elif leaves_micro_batch_open(context) and options.nnodes == [1]:
        context = with_micro_batch(context, shape, least=USUAL_MICRO_BATCH)
    plan = make_plan(context, shape)
    scales = scaling(context, shape, options.nnodes) if len(options.nnodes) > 1 else []
    price = options.price if options.price is not None else context.kind.price if context.kind else None
    facts = {
        "tokens": _tokens(context.config, plan, options.tokens),
        "price": price,
        "scales": scales,
        "against": _against(plan),
        "assumed": _assumed(plan.context, options, line.options.nproc),
    }
    print(json.dumps(as_values(plan, **facts), indent=1) if options.as_json else as_text(plan, **facts))
    return 0


def read_model(name: str) -> ModelSpec:
    """The shape of the model that a recipe names.

    Raises:
        UserError: nothing is known of it here.
    """
    return replace(read(str(ensure())), name=name) if name == EMBEDDED else read(name)


def _model_as_option(line: CommandLine) -> CommandLine:
    """Take a word that names no recipe, but a known model, a folder or a config.json, as --model.

    Raises:
        UserError: it names neither.
    """
    name = line.recipe
    if not name:
        return line
    no_recipe = ""
    refuse_data(name, fix=f"manyrank plan --model NAME --data_path {name}")
    if Path(name).name != "config.json":
        try:
            find_recipe(name)
            return line
        except UserError as error:
            no_recipe = error.fix
    if name != EMBEDDED and not Path(name).expanduser().exists():
        try:
            read(name)
        except UserError as error:
            fix = f"{no_recipe}; for a model, {error.fix}"
            raise UserError(f"there is no recipe or model {name!r}", where="command line", fix=fix) from None
    return replace(line, recipe=None, overrides=[Setting("--model", name, "command line"), *line.overrides])


def _resolved(line: CommandLine) -> ResolvedConfig:
    """The recipe; a model alone is enough."""
    if not line.recipe and not line.overrides:
        fix = "name a model or a recipe; as in: manyrank plan Qwen2.5-7B --gpu H100-80GB"
        raise UserError("there is nothing to plan", where="command line", fix=fix)
    data = Setting("data_path", NO_DATA, "no data")
    try:
        return resolve(line.recipe, line.overrides)
    except UserError as error:
        if not error.what.startswith("data_path must be given"):
            raise
        return resolve(line.recipe, [*line.overrides, data])


def _check_speeds(options: PlanOptions, context: RunContext) -> None:
    """Refuse what needs speeds where there is no kind of GPU to tell them."""
    wants = {
        "--nnodes": len(options.nnodes) > 1,
        "--price": options.price is not None,
        "--tokens": options.tokens is not None,
        "--network": options.network,
    }
    for name, wanted in wants.items():
        if wanted and context.kind is None:
            raise UserError("speeds need a kind of GPU", where=name, fix=f"give --gpu, one of {KINDS}")


def _against(plan: Plan) -> list[str]:
    """List what `manyrank train` would refuse of the recipe, as far as it is known without its data."""
    run = plan.chosen.run
    refusals = [v for v in find_violations(plan.context.on(run.strategy)) if v.rule.severity == "error"]
    if not run.trainable and run.full:
        key = "unfrozen_parameters" if run.config.unfrozen_parameters else "frozen_parameters"
        raise UserError("no parameter is left to be trained", where=key, fix="freeze fewer of them, or others")
    if not run.trainable:
        raise UserError(
            "no matrix of the model has such a name", where="lora_target_modules", fix="name some, or all-linear"
        )
    return [f"{violation.rule.name}: {violation.what}" for violation in refusals]


def _assumed(context: RunContext, options: PlanOptions, nproc: int | None) -> dict[str, str]:
    """Name what nobody gave and memory and speed depend on, with the values that are planned with."""
    config, given = context.config, context.resolved.provenance
    values = {
        "method": config.method,
        "max_length": f"{config.max_length:,}",
        "per_device_train_batch_size": str(config.per_device_train_batch_size),
        "data_path": "the bundled sample",
    }
    assumed = {key: value for key, value in values.items() if given.get(key, NOT_GIVEN) == NOT_GIVEN}
    if context.kind and not options.gpu:
        assumed["gpu"] = f"{context.kind.name} of this machine"
    return assumed | ({} if nproc else {"nproc": str(context.nproc)})


def planned_context(options: PlanOptions, nproc: int | None, resolved: ResolvedConfig) -> RunContext:
    """The recipe on the GPUs to plan for: a kind that was asked for, those that are here, or ones of unknown memory.

    Raises:
        UserError: no such kind is known.
    """
    here = gpus.probe_host() if options.gpu or options.gpu_memory else gpus.probe()
    if not here.gpus:
        nproc = nproc or 1
        here = gpus.planned_hardware(nproc, _kind(options), memory=options.gpu_memory)
    nproc = nproc or len(here.gpus)
    smallest = here.smallest_gpu
    if options.network and smallest and smallest.kind:
        kind = gpus.with_network(smallest.kind, gbit=options.network, gpus=nproc)
        here = replace(here, gpus=(replace(smallest, planned=kind),) * len(here.gpus))
    here = replace(here, memory=options.host_memory or here.memory)
    world_size = nproc * options.nnodes[0]
    return RunContext(resolved, default_strategy(world_size), nproc, world_size, here)


def _kind(options: PlanOptions) -> GpuKind | None:
    kind = gpus.find_kind(options.gpu, options.gpu_memory) if options.gpu else None
    if options.gpu and kind is None:
        fix = f"one of {KINDS}; or --gpu_memory 24GiB"
        raise UserError(f"no GPU {options.gpu!r} is known", where="--gpu", fix=fix)
    return kind


def _tokens(config: TrainConfig, plan: Plan, count: int | None) -> int | None:
    """Tokens of the whole training; None: nothing tells."""
    if config.max_steps > 0:
        return config.max_steps * plan.chosen.speed.tokens if plan.chosen.speed else None
    if count is None:
        files = [Path(source.path) for source in config.data_path]
        if not all(file.is_file() for file in files):
            return None
        count = sum(file.stat().st_size for file in files) // BYTES_A_TOKEN
    return int(count * config.num_train_epochs)
