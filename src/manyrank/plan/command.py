"""`manyrank plan`: will it fit, where, and how fast. No torch, no GPU, no weights.

manyrank plan my.yaml --gpu H100-80GB --nproc 8
manyrank plan --model Llama-3.1-70B --method qlora --gpu RTX4090 --nproc 2 --nnodes 1,2,4,...,128
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..config.args import CommandLine, Job, Parser, Where, parse, parser
from ..config.resolve import Entry, Resolved, TrainConfig, normal, resolve
from ..errors import UserError
from ..models.catalog import read
from ..models.spec import ModelSpec
from ..models.tiny import EMBEDDED, ensure
from ..rules.check import find_violations
from ..rules.context import RunContext
from ..topology import gpus
from ..topology.gpus import GpuKind
from ..topology.strategies import default_strategy
from .planner import Plan, make_plan, scaling, with_micro_batch
from .view import as_text, as_values

PROG = "manyrank plan"
OWN = ("gpu", "gpu_memory", "host_memory", "network", "price", "tokens", "json")
UNITS = {
    "": 1,
    "k": 1e3,
    "m": 1e6,
    "g": 1e9,
    "b": 1e9,
    "t": 1e12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
}
NO_DATA = "(none)"  # stands for the data of a plan without a recipe
BYTES_A_TOKEN = 4  # of text in a data file, about


@dataclass(frozen=True)
class PlanOptions:
    """The command line of a plan: the recipe's part, and what is the plan's alone."""

    line: CommandLine
    own: argparse.Namespace
    nodes: list[int]


def main(argv: Sequence[str]) -> int:
    """Plan, and print the plan.

    Raises:
        UserError: a wrong option, recipe or model.
    """
    if {"-h", "--help"} & set(argv):
        print(_help())
        return 0
    asked = _parse(argv)
    resolved = _resolved(asked.line)
    config = resolved.config
    context = _context(asked, resolved)
    _check_speeds(asked.own, asked.nodes, context)
    shape = read_model(config.model_name_or_path)
    if config.per_device_train_batch_size == "auto":
        context = with_micro_batch(context, shape)
    plan = make_plan(context, shape)
    scales = scaling(context, shape, asked.nodes) if len(asked.nodes) > 1 else []
    price = asked.own.price if asked.own.price is not None else context.kind.price if context.kind else None
    facts = {
        "tokens": _tokens(context.config, plan, asked.own.tokens),
        "price": price,
        "scales": scales,
        "against": _against(plan),
    }
    print(json.dumps(as_values(plan, **facts), indent=1) if asked.own.json else as_text(plan, **facts))
    return 0


def read_model(name: str) -> ModelSpec:
    """The shape of the model that a recipe names.

    Raises:
        UserError: nothing is known of it here.
    """
    return replace(read(str(ensure())), name=name) if name == EMBEDDED else read(name)


def _parse(argv: Sequence[str]) -> PlanOptions:
    own, rest = _options(Parser(prog=PROG, add_help=False, allow_abbrev=False)).parse_known_args(_spelt(argv))
    nodes = _nodes(own.nnodes)
    if own.gpu == "":
        raise UserError("--gpu without a kind", where="command line", fix=f"one of {_kinds()}")
    if own.strategy not in (None, "all", "auto"):
        rest += ["--strategy", own.strategy]
    line = parse([*rest, "--nnodes", str(nodes[0])], prog=PROG, launch=True, more=OWN)
    if line.where != Where(nproc=line.where.nproc, nnodes=nodes[0]) or line.job != Job():
        raise UserError(
            "a plan starts nothing", where="command line", fix="of the launch leave all but --nproc and --nnodes out"
        )
    return PlanOptions(line, own, nodes)


def _spelt(argv: Sequence[str]) -> list[str]:
    """Underscores in the names of options."""
    return ["--" + normal(a.split("=")[0]) + a[len(a.split("=")[0]) :] if a.startswith("--") else a for a in argv]


def _options(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    shown = made.add_argument_group("where it would run, and what to show")
    shown.add_argument("--gpu", metavar="KIND", help=f"one of {_kinds()} (default: what is here)")
    shown.add_argument("--gpu_memory", metavar="SIZE", type=_bytes, help="of one GPU, as 24GiB; overrides the kind's")
    shown.add_argument(
        "--host_memory",
        metavar="SIZE",
        type=_bytes,
        help="of one machine (default: of this one, if its GPUs are planned for)",
    )
    shown.add_argument("--network", metavar="GBIT", type=_positive, help="Gbit/s of a machine's network")
    shown.add_argument(
        "--price", metavar="DOLLARS", type=_positive, help="of a GPU for an hour (default: about the usual)"
    )
    shown.add_argument(
        "--tokens", metavar="N", type=_size, help="of the data, once through; as 2.5M (default: by the files' sizes)"
    )
    shown.add_argument(
        "--nnodes",
        metavar="N[,N...]",
        default="1",
        help="machines; several as 1,2,4,...,128 for a table of how it scales",
    )
    shown.add_argument(
        "--strategy", metavar="NAME", help="one strategy, or all (default: all, and the fastest that fits is chosen)"
    )
    shown.add_argument("--json", action="store_true", help="print values instead of tables")
    return made


def _help() -> str:
    made = parser(PROG, launch=True)
    made.conflict_handler = "resolve"  # --nnodes and --strategy say more here
    _options(made)
    made.usage = f"{PROG} [RECIPE] [--model NAME|FOLDER|config.json] [--key value ...] [--gpu KIND] [--json]"
    made.description = (
        "Will it fit, where, and how fast: memory and speed of a recipe on every strategy, before anything is started."
    )
    return made.format_help()


def _kinds() -> str:
    return ", ".join(kind.name for kind in gpus.GPU_KINDS)


def _size(text: str) -> int:
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)", text.strip())
    if not found or found[2].lower() not in UNITS or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size like 24GiB or 2.5M")
    return int(float(found[1]) * UNITS[found[2].lower()])


def _bytes(text: str) -> int:
    size = _size(text)
    if size < 2**30:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 1 GiB: give a unit, as in 24GiB")
    return size


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def _nodes(text: str) -> list[int]:
    """`1,2,4,...,128` doubles in its middle."""
    parts, found = [part.strip() for part in text.split(",")], []
    for index, part in enumerate(parts):
        doubles = len(found) == 1 or (len(found) > 1 and found[-1] == 2 * found[-2])
        if part == "..." and doubles and index == len(parts) - 2 and parts[-1].isdecimal():
            while found[-1] * 2 < int(parts[-1]):
                found.append(found[-1] * 2)
        elif part.isdecimal() and int(part) > (found[-1] if found else 0):
            found.append(int(part))
        else:
            raise UserError(
                f"--nnodes {text!r} is not a rising list of counts",
                where="command line",
                fix="give 4, or 1,2,4,...,128",
            )
    return found


def _resolved(line: CommandLine) -> Resolved:
    """The recipe; a model alone is enough."""
    data = Entry("data_path", NO_DATA, "no data")
    try:
        return resolve(line.recipe, line.overrides)
    except UserError as error:
        if not error.what.startswith("data_path must be given"):
            raise
        return resolve(line.recipe, [*line.overrides, data])


def _check_speeds(own: argparse.Namespace, nodes: list[int], context: RunContext) -> None:
    """Refuse what needs speeds where there is no kind of GPU to tell them."""
    wants = {
        "--nnodes": len(nodes) > 1,
        "--price": own.price is not None,
        "--tokens": own.tokens is not None,
        "--network": own.network,
    }
    for name, wanted in wants.items():
        if wanted and context.kind is None:
            raise UserError("speeds need a kind of GPU", where=name, fix=f"give --gpu, one of {_kinds()}")


def _against(plan: Plan) -> list[str]:
    """What `manyrank train` would refuse of the recipe, as far as it can be told without its data."""
    run = plan.chosen.run
    found = [v for v in find_violations(plan.context.on(run.strategy)) if v.rule.severity == "error"]
    if not run.trainable:
        raise UserError(
            "no matrix of the model has such a name", where="lora_target_modules", fix="name some, or all-linear"
        )
    return [f"{violation.rule.name}: {violation.what}" for violation in found]


def _context(asked: PlanOptions, resolved: Resolved) -> RunContext:
    """The recipe on the GPUs to plan for: a kind that was asked for, those that are here, or ones of unknown memory."""
    own, here, nproc = asked.own, gpus.probe(), asked.line.where.nproc
    if own.gpu or not here.gpus or own.gpu_memory:
        nproc = nproc or 1
        here = gpus.planned_hardware(nproc, _kind(own), memory=own.gpu_memory)
    nproc = nproc or len(here.gpus)
    smallest = here.smallest_gpu
    if own.network and smallest and smallest.kind:
        kind = gpus.with_network(smallest.kind, gbit=own.network, gpus=nproc)
        here = replace(here, gpus=(replace(smallest, planned=kind),) * len(here.gpus))
    here = replace(here, memory=own.host_memory or here.memory)
    return RunContext(resolved, default_strategy(nproc * asked.nodes[0]), nproc, nproc * asked.nodes[0], here)


def _kind(own: argparse.Namespace) -> GpuKind | None:
    kind = gpus.find_kind(own.gpu, own.gpu_memory) if own.gpu else None
    if own.gpu and kind is None:
        fix = f"one of {_kinds()}; or --gpu_memory 24GiB"
        raise UserError(f"no GPU {own.gpu!r} is known", where="--gpu", fix=fix)
    return kind


def _tokens(config: TrainConfig, plan: Plan, given: int | None) -> int | None:
    """Tokens of the whole training; None: nothing tells."""
    if config.max_steps > 0:
        return config.max_steps * plan.chosen.speed.tokens if plan.chosen.speed else None
    if given is None:
        files = [Path(source.path) for source in config.data_path]
        if not all(file.is_file() for file in files):
            return None
        given = sum(file.stat().st_size for file in files) // BYTES_A_TOKEN
    return int(given * config.num_train_epochs)
