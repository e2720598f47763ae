"""The command line of the train commands: every key of the recipe, its other spellings, and where to launch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .config import ALIASES, FIELDS, SWITCHES, Entry, find_recipe, normal, presets, unknown_key
from .errors import UserError

Via = Literal["python", "accelerate", "torchrun"]
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
    via: Via | None = field(default=None, metadata={"help": "python (one process), accelerate or torchrun"})
    print: bool = field(default=False, metadata={"help": "show the command and its environment, start nothing"})


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line: the recipe (a file or preset), the overrides in order, and where to run."""

    recipe: str | None
    overrides: list[Entry]
    where: Where

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
    """All options of a train command; with `launch` also those of `Where`."""
    made = Parser(
        prog=prog,
        allow_abbrev=False,
        description="Fine-tune a model as a recipe says.",
        usage=f"{prog} [RECIPE] [--key value ...]",
    )
    made.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML file, or a preset: " + ", ".join(presets()))
    made.add_argument("--config", metavar="PRESET", help="the same as RECIPE")
    if launch:
        where = made.add_argument_group("where to run")
        for item in fields(Where):
            kind = {"action": "store_true"} if item.name == "print" else {"metavar": "X"}
            where.add_argument(f"--{item.name}", help=item.metadata["help"], default=None, **kind)
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


class _Collect(argparse.Action):
    """Keep every value with the spelling it was given under; config.resolve makes sense of them."""

    def __call__(self, parser, namespace, values, option_string=None):
        entries = getattr(namespace, "entries", None) or []
        namespace.entries = [*entries, Entry(option_string, values, f"command line, {option_string}")]


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
        launch_flags = [item.name for item in fields(Where)] if launch else []
        raise unknown_key(Entry(stray, None, "command line"), more=[*launch_flags, *more])
    if found.recipe and found.config and find_recipe(found.recipe) != find_recipe(found.config):
        raise UserError(
            f"two recipes: {found.recipe} and --config {found.config}", where="command line", fix="keep one of them"
        )
    given = {item.name: getattr(found, item.name) for item in fields(Where)} if launch else {}
    where = Where(**{name: _typed(name, value) for name, value in given.items() if value is not None})
    return CommandLine(found.recipe or found.config, getattr(found, "entries", None) or [], where)


def _typed(name: str, value: Any) -> Any:
    choices = {"via": ("python", "accelerate", "torchrun")}
    if name in choices and value not in choices[name]:
        raise UserError(
            f"--{name} {value!r} is none of {', '.join(choices[name])}", where="command line", fix="choose one"
        )
    if name in ("nproc", "nnodes", "node_rank", "max_restarts", "rdzv_timeout"):
        may_be_zero = name in ("node_rank", "max_restarts")
        if not str(value).isascii() or not str(value).isdigit() or (int(value) == 0 and not may_be_zero):
            raise UserError(f"--{name} {value!r} is not a count", where="command line", fix="give a whole number")
        return int(value)
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
            if index < len(argv) and argv[index].lower() in YES_NO:
                value, index = argv[index], index + 1
            equals = "="
        tidy.append(name + equals + value)
    return tidy


def _is_yes_no(name: str) -> bool:
    return name in SWITCHES or (name in FIELDS and "bool" in str(FIELDS[name].annotation))
