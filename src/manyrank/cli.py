"""The `manyrank` command. Imports what a subcommand needs when it is called, so that --help is instant."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config.args import CommandLine

COMMANDS = {
    "train": "fine-tune a model as a recipe says",
    "grpo": "train with rewards (GRPO), from a base or from an SFT run",
    "init": "write a commented recipe for a model, data and the GPUs that are here or named",
    "import": "translate a recipe of Axolotl, LLaMA-Factory, TRL or transformers",
    "plan": "memory and speed of a recipe on every strategy, before anything is started",
    "data": "inspect a recipe's data, or prepare a training set from raw rows",
    "doctor": "examine this machine, its GPUs and a recipe before a training",
    "rules": "print what is checked before a run starts",
    "schema": "print a JSON schema of recipes, by which editors complete keys",
    "report": "a page about a run, or about several runs side by side",
    "watch": "a training in the terminal: curves, rates, time left, ranks, warnings",
    "verify": "check that every strategy gives the same losses on this machine",
    "evaluate": "loss, answers and benchmarks of a base, a run, an adapter or a merged model",
    "chat": "talk to a model, or to a base and its tuned model side by side",
    "generate": "answer all prompts of a file; resumes where it was stopped",
    "serve": "an OpenAI-compatible endpoint for a base, a run, an adapter or a merged model",
    "merge": "put an adapter into its base, and prove the result",
    "push": "upload a final or merged model to the hub, with its card",
    "export": "write a run as a GGUF file, for llama.cpp and Ollama",
    "files": "the recipes, scripts and strategy files of the project, shown and copied",
    "embedded-model": "make the small model that examples and tests use",
}
# The modules whose `main` is a command; the other commands are functions here.
MODULES = {
    "init": "tools.init",
    "import": "tools.importer.main",
    "plan": "plan.command",
    "data inspect": "tools.inspect_data",
    "data prepare": "tools.prepare.main",
    "doctor": "tools.doctor.main",
    "report": "tools.report.main",
    "watch": "tools.watch",
    "verify": "tools.verify",
    "evaluate": "tools.evaluate.main",
    "chat": "tools.chat",
    "generate": "tools.generate",
    "serve": "tools.serve.main",
    "merge": "tools.merge.main",
    "push": "tools.push",
    "export gguf": "tools.gguf",
    "files": "tools.files",
}
LOADS_A_MODEL = ("data inspect", "chat", "generate", "serve", "merge", "export gguf")
# The commands of two words.
GROUPS = {
    "data": "manyrank data inspect RECIPE|DATA [--key value ...], or manyrank data prepare CONFIG [--key value ...]",
    "export": "manyrank export gguf RUN [--outtype bf16|f16|q8_0] [--output FILE]",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to a subcommand.

    Returns:
        The exit code.
    """
    from .errors import EXIT_USER, UserError, name_too_long

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
        code = _run(*argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `head` has seen enough; what is left in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER
    except OSError as error:
        print(name_too_long(error), file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:
        return 130  # as a shell tells of Ctrl-C


def _usage() -> str:
    commands = "\n".join(f"  {name:<16} {text}" for name, text in COMMANDS.items())
    return (
        f"usage: manyrank COMMAND ..., or manyrank RECIPE.yaml ... to train\n\n{commands}\n\n"
        "First: `manyrank train quickstart` trains a small model on a bundled sample, in minutes, and\n"
        "`manyrank init --model NAME --data FILE` writes a recipe for your model and data.\n"
        "`manyrank COMMAND --help` tells more of each."
    )


def _run(name: str, *argv: str) -> int:
    """Run a command; a recipe's file in place of a command is trained."""
    functions = {
        "train": _train,
        "grpo": _grpo,
        "rules": _rules,
        "schema": _schema,
        "embedded-model": _embedded_model,
    }
    if name not in COMMANDS and (Path(name).suffix or Path(name).is_file()):
        return _train([name, *argv])
    if name in functions:
        return functions[name](argv)
    if name in GROUPS:
        return _group(name, argv)
    if name in COMMANDS:
        return _call(name, argv)
    import difflib

    from .errors import UserError

    close = difflib.get_close_matches(name, COMMANDS, 1)
    fix = f"did you mean {close[0]}?" if close else f"commands: {', '.join(COMMANDS)}"
    raise UserError(f"there is no command {name!r}", where="command line", fix=fix)


def _call(name: str, argv: Sequence[str]) -> int:
    module = importlib.import_module(f".{MODULES[name]}", __package__)
    if name in LOADS_A_MODEL:  # torch and the libraries are not imported yet
        from .launch.command import before_imports
        from .topology.gpus import probe

        before_imports(probe())
    return module.main(argv)


def _train(argv: Sequence[str]) -> int:
    from .config.args import parse

    return _launch(parse(argv, prog="manyrank train", launch=True))


def _grpo(argv: Sequence[str]) -> int:
    from .config.args import GrpoOptions, as_grpo, parse

    return _launch(as_grpo(parse(argv, prog="manyrank grpo", launch=True, model=GrpoOptions)))


def _launch(line: CommandLine) -> int:
    from .config.args import JOBS
    from .signals import ending_at_a_signal

    with ending_at_a_signal():
        if line.options.via in JOBS:
            from .launch import slurm

            return slurm.main(line)
        from .launch import main as launch

        return launch.train(line)


def _group(group: str, argv: Sequence[str]) -> int:
    from .errors import UserError

    name = " ".join((group, *argv[:1]))
    if name in MODULES:
        return _call(name, argv[1:])
    if {"-h", "--help"} & set(argv):
        print(GROUPS[group])
        return 0
    what = f"there is no command {name!r}" if argv else f"which command of {group}?"
    raise UserError(what, where=f"manyrank {group}", fix=GROUPS[group])


def _rules(argv: Sequence[str]) -> int:
    from .config.args import no_options
    from .rules.check import rules_as_markdown

    no_options(argv, prog="manyrank rules", about="Print every rule, as docs/rules.md.")
    print(rules_as_markdown(), end="")
    return 0


def _schema(argv: Sequence[str]) -> int:
    import json

    from .config.args import no_options
    from .config.json_schema import recipe_schema

    no_options(argv, prog="manyrank schema", about="Print a JSON schema of recipes.")
    print(json.dumps(recipe_schema(), indent=1))
    return 0


def _embedded_model(argv: Sequence[str]) -> int:
    from .config.args import no_options
    from .launch.command import CPU_VARIABLES
    from .models.tiny import ensure

    about = "Make the small model that examples and tests use, if it is not there, and print its folder."
    no_options(argv, prog="manyrank embedded-model", about=about)
    os.environ.setdefault("OMP_WAIT_POLICY", CPU_VARIABLES["OMP_WAIT_POLICY"])  # torch is not imported yet
    print(ensure())
    return 0


if __name__ == "__main__":
    sys.exit(main())
