"""The command line of the train commands: every key of the recipe, its other spellings, and where to launch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from ..errors import UserError
from .resolve import ALIASES, FIELDS, SWITCHES, Entry, find_recipe, normal, presets, unknown_key

Via = Literal["python", "accelerate", "torchrun", "slurm"]
JOBS = ("slurm",)  # these write a job's file, and start nothing on this machine
YES_NO = frozenset({"true", "false", "yes", "no", "on", "off", "1", "0", "auto", "none"})


@dataclass(frozen=True)
class Where:
    """Node facts: flags of the launch, never part of a recipe."""

    nproc: int | None = field(default=None, metadata={"help": "processes on this machine (default: one per GPU)"})
    nnodes: int = field(default=1, metadata={"help": "machines"})
    node_rank: int = field(default=0, metadata={"help": "number of this machine, from 0"})
    rdzv_endpoint: str | None = field(default=None, metadata={"help": "HOST:PORT of machine 0, for several machines"})
    max_restarts: int | None = field(
        default=None,
        metadata={"help": "times that the workers are started anew after a failure (default: 3 with several machines)"},
    )
    rdzv_timeout: int = field(default=600, metadata={"help": "seconds that the machines wait for each other"})
    via: Via | None = field(
        default=None,
        metadata={"help": "python (one process), accelerate, torchrun; or write a job for slurm"},
    )
    check: bool = field(default=False, metadata={"help": "check the recipe, show the plan and start nothing"})
    print: bool = field(
        default=False, metadata={"help": "show every machine's command, its environment and the files; start nothing"}
    )


@dataclass(frozen=True)
class Job:
    """What a job asks its cluster for: flags of `--via slurm` alone."""

    submit: bool = field(default=False, metadata={"help": "hand the job in"})
    gpus: int | None = field(default=None, metadata={"help": "GPUs of each machine (default: one for each process)"})
    cpus: int | None = field(default=None, metadata={"help": "CPU cores of each machine (default: one a process)"})
    time: str | None = field(default=None, metadata={"help": "time limit, as 1-12:00:00 (default: the partition's)"})
    partition: str | None = field(default=None, metadata={"help": "partition"})
    account: str | None = field(default=None, metadata={"help": "account"})


COUNTS = ("nproc", "nnodes", "node_rank", "max_restarts", "rdzv_timeout", "gpus", "cpus")
MAY_BE_ZERO = ("node_rank", "max_restarts", "gpus")
CHOICES = {"via": get_args(Via)}
SWITCHED = ("check", "print", "submit")


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line: the recipe (a file or preset), the overrides in order, and where to run."""

    recipe: str | None
    overrides: list[Entry]
    where: Where
    job: Job = Job()

    @property
    def argv(self) -> list[str]:
        """The arguments that give the train module the same recipe and overrides."""
        given = [f"--{normal(entry.key)}={entry.value}" for entry in self.overrides]
        return [*([self.recipe] if self.recipe else []), *given]


class Parser(argparse.ArgumentParser):
    """argparse whose errors are the user's three lines."""

    def error(self, message: str):
        raise UserError(message, where="command line", fix=f"see `{self.prog} --help`")


def parser(prog: str, *, launch: bool) -> argparse.ArgumentParser:
    """All options of a train command; with `launch` also those of `Where` and `Job`."""
    made = Parser(
        prog=prog,
        allow_abbrev=False,
        description="Fine-tune a model as a recipe says.",
        usage=f"{prog} [RECIPE] [--key value ...]",
    )
    made.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML file, or a preset: " + ", ".join(presets()))
    made.add_argument("--config", metavar="PRESET", help="the same as RECIPE")
    if launch:
        _add_flags(made.add_argument_group("where to run"), Where)
        _add_flags(made.add_argument_group("the job (--via slurm)"), Job)
    recipe = made.add_argument_group("what to train (also the keys of a recipe)")
    for key, info in FIELDS.items():
        other = [f"--{alias}" for alias, target in ALIASES.items() if target == key]
        default = "" if info.is_required() else f" (default: {info.default})"
        also = f" (also {', '.join(other)})" if other else ""
        text = f"{info.description}{also}{default}".replace("%", "%%")
        recipe.add_argument(f"--{key}", action=_Collect, metavar="X", help=text)
    short = made.add_argument_group("short forms")
    for key in sorted(SWITCHES):
        short.add_argument(
            f"--{key}", action=_Collect, metavar="yes|no", help=argparse.SUPPRESS if key == "wandb" else ""
        )
    for key in ALIASES:
        made.add_argument(f"--{key}", action=_Collect, help=argparse.SUPPRESS)
    return made


def as_grpo(line: CommandLine) -> CommandLine:
    """The same with the task GRPO; of a preset NAME its preset grpo_NAME, where there is one."""
    task = Entry("--task", "grpo", "manyrank grpo")
    named = f"grpo_{line.recipe}"
    return replace(line, recipe=named if named in presets() else line.recipe, overrides=[task, *line.overrides])


def _add_flags(group, kind: type) -> None:
    for item in fields(kind):
        how = {"action": "store_true"} if item.name in SWITCHED else {"metavar": "X"}
        group.add_argument(f"--{item.name}", help=item.metadata["help"], default=None, **how)


class _Collect(argparse.Action):
    """Keep every value with the spelling it was given under; config.resolve makes sense of them."""

    def __call__(self, parser, namespace, values, option_string=None):
        entries = getattr(namespace, "entries", None) or []
        namespace.entries = [*entries, Entry(option_string or "", values, f"command line, {option_string}")]


def parse(argv: Sequence[str], *, prog: str, launch: bool, more: Sequence[str] = ()) -> CommandLine:
    """Read a command line.

    Args:
        more: further options of the command, to name as the nearest of an unknown one.

    Raises:
        UserError: an unknown option, or two recipes.
    """
    found, unknown = parser(prog, launch=launch).parse_known_args(_tidy(argv))
    if unknown:
        stray = unknown[0].split("=")[0]
        if not stray.startswith("-"):
            raise UserError(f"two recipes: {found.recipe} and {stray}", where="command line", fix="keep one of them")
        launch_flags = [item.name for item in (*fields(Where), *fields(Job))] if launch else []
        raise unknown_key(Entry(stray, None, "command line"), more=[*launch_flags, *more])
    if found.recipe and found.config and find_recipe(found.recipe) != find_recipe(found.config):
        raise UserError(
            f"two recipes: {found.recipe} and --config {found.config}", where="command line", fix="keep one of them"
        )
    where, job = (Where(**_given(found, Where)), Job(**_given(found, Job))) if launch else (Where(), Job())
    _check_vias(found, where.via)
    return CommandLine(found.recipe or found.config, getattr(found, "entries", None) or [], where, job)


def _given(found: argparse.Namespace, kind: type) -> dict[str, Any]:
    values = {item.name: getattr(found, item.name, None) for item in fields(kind)}
    return {name: _typed(name, value) for name, value in values.items() if value is not None}


def _check_vias(found: argparse.Namespace, via: str | None) -> None:
    given = [item.name for item in fields(Job) if getattr(found, item.name, None) is not None]
    if given and via not in JOBS:
        what = f"--{given[0]} is for --via slurm"
        raise UserError(what, where="command line", fix="leave it out, or give that")


def _typed(name: str, value: Any) -> Any:
    if name in CHOICES and value not in CHOICES[name]:
        fix = "edit launch/kubernetes.yaml" if value == "kubernetes" else "choose one"
        raise UserError(f"--{name} {value!r} is none of {', '.join(CHOICES[name])}", where="command line", fix=fix)
    if name in COUNTS:
        if not str(value).isascii() or not str(value).isdigit() or (int(value) == 0 and name not in MAY_BE_ZERO):
            raise UserError(f"--{name} {value!r} is not a count", where="command line", fix="give a whole number")
        return int(value)
    if value == "" or str(value) != str(value).strip() or not str(value).isprintable():
        raise UserError(f"--{name} {value!r} is not a name", where="command line", fix="give it, or leave it out")
    return value


def _tidy(argv: Sequence[str]) -> list[str]:
    """Dashes to underscores in names; a yes/no option without a value becomes `=true`."""
    tidy, index = [], 0
    while index < len(argv):
        token = argv[index]
        index += 1
        if not token.startswith("--"):
            tidy.append(token)
            continue
        name, equals, value = token.partition("=")
        name = "--" + normal(name)
        if not equals and _is_yes_no(normal(name)):
            value = "true"
            if index < len(argv) and (argv[index].lower() in YES_NO or _is_more(name, argv[index])):
                value, index = argv[index], index + 1
            equals = "="
        tidy.append(name + equals + value)
    return tidy


def _is_more(name: str, value: str) -> bool:
    """Whether it is a value that a yes/no option takes beside these."""
    if name == "--use_vllm":
        return value in ("colocate", "server")
    return name == "--gradient_checkpointing" and (value == "full" or value.isdecimal())


def _is_yes_no(name: str) -> bool:
    return name in SWITCHES or (
        name in FIELDS and any(word in str(FIELDS[name].annotation) for word in ("bool", "'off'"))
    )
