"""The `manyrank` command. Imports what a subcommand needs when it is called, so that --help is instant."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

COMMANDS = {
    "train": "fine-tune a model as a recipe says",
    "data": "inspect a recipe's data, or prepare a training set from raw rows",
    "verify": "check that every strategy gives the same losses on this machine",
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
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv[0] == "--version":
        from . import __version__

        print(f"manyrank {__version__}")
        return 0
    try:
        return _command(argv[0])(argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER


def _usage() -> str:
    commands = "\n".join(f"  {name:<16} {text}" for name, text in COMMANDS.items())
    return f"usage: manyrank COMMAND ...\n\n{commands}\n\n`manyrank COMMAND --help` tells more of each."


def _command(name: str) -> Callable[[Sequence[str]], int]:
    from .errors import UserError

    commands = {"train": _train, "data": _data, "verify": _verify, "embedded-model": _embedded_model}
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
    from pathlib import Path

    from . import hardware, launcher, rules
    from .config import resolve
    from .options import parse

    line = parse(argv, prog="manyrank train", launch=True)
    resolved, machine = resolve(line.recipe, line.overrides), hardware.probe()
    config = resolved.config
    strategy, nproc = launcher.choose_strategy(config, line.where, machine)
    output_dir = launcher.output_dir(config, line)
    rules.check(rules.Situation(resolved, strategy, nproc, nproc * line.where.nnodes, machine))
    rules.check_output_dir(config, Path(output_dir))
    launch = launcher.plan(
        line, strategy=strategy, nproc=nproc, output_dir=output_dir, hardware=machine, elastic=config.elastic
    )
    print(launch, flush=True)
    return 0 if line.where.print else launcher.run(launch)


def _data(argv: Sequence[str]) -> int:
    from .errors import UserError

    if argv and argv[0] == "inspect":
        from . import inspection

        return inspection.main(argv[1:])
    if argv and argv[0] == "prepare":
        from . import curate

        return curate.main(argv[1:])
    if argv and argv[0] in ("-h", "--help"):
        print(DATA_USAGE)
        return 0
    raise UserError(
        f"there is no command {argv[0]!r}" if argv else "what to do with data?", where="manyrank data", fix=DATA_USAGE
    )


def _verify(argv: Sequence[str]) -> int:
    from . import verify

    return verify.main(argv)


def _embedded_model(argv: Sequence[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(
        prog="manyrank embedded-model", description="Make it, if it is not there, and print its folder."
    )
    parser.parse_args(argv)
    import os

    from .embedded import ensure
    from .launcher import CPU_VARIABLES

    os.environ.setdefault("OMP_WAIT_POLICY", CPU_VARIABLES["OMP_WAIT_POLICY"])  # torch is not imported yet

    print(ensure())
    return 0


if __name__ == "__main__":
    sys.exit(main())
