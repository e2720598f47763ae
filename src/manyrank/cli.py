"""The `manyrank` command. Imports what a subcommand needs when it is called, so that --help is instant."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config.args import CommandLine

COMMANDS = {
    "train": "fine-tune a model as a recipe says",
    "grpo": "align a model with rewards, from a base or from what SFT has made",
    "plan": "memory and speed of a recipe on every strategy, before anything is started",
    "data": "inspect a recipe's data, or prepare a training set from raw rows",
    "doctor": "examine this machine, its GPUs and a recipe before a training",
    "rules": "print what is checked before a run starts",
    "schema": "print a JSON schema of recipes, by which editors complete keys",
    "report": "a page about a run, or about several runs side by side",
    "verify": "check that every strategy gives the same losses on this machine",
    "evaluate": "loss, answers and benchmarks of a base, a run, an adapter or a merged model",
    "chat": "talk to a model, or to a base and its tuned model side by side",
    "generate": "answer all prompts of a file; goes on where it was stopped",
    "merge": "put an adapter into its base, and prove the result",
    "embedded-model": "make the small model that examples and tests use",
}

DATA_USAGE = "manyrank data inspect RECIPE [--key value ...], or manyrank data prepare CONFIG [--key value ...]"


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to a subcommand.

    Returns:
        The exit code.
    """
    from .errors import EXIT_USER, UserError

    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show a bar or a name is no reason to fail
        sys.stdout.reconfigure(errors="replace")
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv[0] == "--version":
        from . import __version__

        print(f"manyrank {__version__}")
        return 0
    try:
        code = _command(argv[0])(argv[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `head` has seen enough; what is left in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:
        return 130  # as a shell tells of Ctrl-C


def _usage() -> str:
    commands = "\n".join(f"  {name:<16} {text}" for name, text in COMMANDS.items())
    return f"usage: manyrank COMMAND ...\n\n{commands}\n\n`manyrank COMMAND --help` tells more of each."


def _command(name: str) -> Callable[[Sequence[str]], int]:
    from .errors import UserError

    commands = {
        "train": _train,
        "grpo": _grpo,
        "plan": _plan,
        "data": _data,
        "doctor": _doctor,
        "rules": _rules,
        "schema": _schema,
        "report": _report,
        "verify": _verify,
        "evaluate": _evaluate,
        "chat": _chat,
        "generate": _generate,
        "merge": _merge,
        "embedded-model": _embedded_model,
    }
    if name not in commands:
        import difflib

        close = difflib.get_close_matches(name, commands, 1)
        raise UserError(
            f"there is no command {name!r}",
            where="command line",
            fix=f"did you mean {close[0]}?" if close else f"commands: {', '.join(commands)}",
        )
    return commands[name]


def _train(argv: Sequence[str]) -> int:
    from .config.args import parse

    return _launch(parse(argv, prog="manyrank train", launch=True))


def _grpo(argv: Sequence[str]) -> int:
    from .config.args import as_grpo, parse

    return _launch(as_grpo(parse(argv, prog="manyrank grpo", launch=True)))


def _launch(line: CommandLine) -> int:
    from .config.args import JOBS
    from .signals import ending_at_a_signal

    with ending_at_a_signal():
        if line.where.via in JOBS:
            from .launch import slurm

            return slurm.main(line)
        from .launch import main as launch

        return launch.train(line)


def _plan(argv: Sequence[str]) -> int:
    from .plan import command

    return command.main(argv)


def _data(argv: Sequence[str]) -> int:
    from .errors import UserError

    if argv and argv[0] == "inspect":
        from .tools import inspect_data

        return inspect_data.main(argv[1:])
    if argv and argv[0] == "prepare":
        from .tools.prepare import main as prepare

        return prepare.main(argv[1:])
    if argv and argv[0] in ("-h", "--help"):
        print(DATA_USAGE)
        return 0
    raise UserError(
        f"there is no command {argv[0]!r}" if argv else "what to do with data?", where="manyrank data", fix=DATA_USAGE
    )


def _doctor(argv: Sequence[str]) -> int:
    from .tools.doctor import main as doctor

    return doctor.main(argv)


def _rules(argv: Sequence[str]) -> int:
    import argparse

    from .rules.check import rules_as_markdown

    argparse.ArgumentParser(prog="manyrank rules", description="Print every rule, as docs/rules.md.").parse_args(argv)
    print(rules_as_markdown(), end="")
    return 0


def _schema(argv: Sequence[str]) -> int:
    import argparse
    import json

    from .config.json_schema import recipe_schema

    argparse.ArgumentParser(prog="manyrank schema", description="Print a JSON schema of recipes.").parse_args(argv)
    print(json.dumps(recipe_schema(), indent=1))
    return 0


def _verify(argv: Sequence[str]) -> int:
    from .tools import verify

    return verify.main(argv)


def _report(argv: Sequence[str]) -> int:
    from .tools.report import main as report

    return report.main(argv)


def _evaluate(argv: Sequence[str]) -> int:
    from .tools.evaluate import main as evaluate

    return evaluate.main(argv)


def _quiet() -> None:
    """Before torch and the libraries are imported."""
    from .launch.command import before_imports
    from .topology.gpus import probe

    before_imports(probe())


def _chat(argv: Sequence[str]) -> int:
    from .tools import chat

    _quiet()
    return chat.main(argv)


def _generate(argv: Sequence[str]) -> int:
    from .tools import generate

    _quiet()
    return generate.main(argv)


def _merge(argv: Sequence[str]) -> int:
    from .tools.merge import main as merge

    _quiet()
    return merge.main(argv)


def _embedded_model(argv: Sequence[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(
        prog="manyrank embedded-model", description="Make it, if it is not there, and print its folder."
    )
    parser.parse_args(argv)

    from .launch.command import CPU_VARIABLES
    from .models.tiny import ensure

    os.environ.setdefault("OMP_WAIT_POLICY", CPU_VARIABLES["OMP_WAIT_POLICY"])  # torch is not imported yet

    print(ensure())
    return 0


if __name__ == "__main__":
    sys.exit(main())
