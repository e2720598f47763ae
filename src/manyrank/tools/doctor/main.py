"""`manyrank doctor`: is this machine, are these machines, fit for a training? Each line says ok, warning or failed, and its fix.

The command looks at its machine while its ranks start; these measure what they do together and take two real steps.
With several machines each runs the command; machine 0 prints the whole report, the others their own lines.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ... import __version__
from ...config.args import JOBS, CommandLine, Parser, parse, parser
from ...config.resolve import Resolved
from ...errors import EXIT_FAILED, UserError
from ...launch import command as launcher
from ...launch.main import resolve_launch
from ...plan.planner import Plan
from ...project_files import asset
from ...rules import check as rules
from ...rules.context import RunContext
from ...rules.rule import Violation
from ...runs.versions import software
from ...topology import gpus as hardware
from ...topology.strategies import Engine, Strategy
from . import checks as doctor_checks
from . import probe as doctor_probe
from . import rank_checks as doctor_rank_checks
from . import recipe as doctor_recipe
from .checks import Check, State, counted
from .launch import Ended, How, Patience, Ranks, last_words, unfinished
from .probe import Graphics, Network
from .recipe import Data, Hub

PROG = "manyrank doctor"
ANY_RECIPE = "quickstart"  # stands for a recipe that is not given
LIMIT = 50  # seconds that the ranks may take
MEETING = 60  # seconds that the machines wait for each other
EXIT_INTERRUPTED, EXIT_TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


@dataclass(frozen=True)
class Scope:
    """What is examined: a recipe, or the stand-in for one, and the ranks that it is examined with."""

    line: CommandLine
    resolved: Resolved
    machine: hardware.Hardware
    strategy: Strategy
    nproc: int
    output_dir: Path
    limit: int
    planned: Plan | None

    @property
    def ranks(self) -> int:
        return self.nproc * self.line.where.nnodes

    @property
    def is_main(self) -> bool:
        return self.line.where.node_rank == 0


def main(argv: Sequence[str]) -> int:
    """Examine, and print the report.

    Returns:
        The exit code: 0, or 1 when a check failed.

    Raises:
        UserError: a wrong option or recipe.
    """
    started = time.monotonic()
    own, rest = _options(Parser(prog=PROG, add_help=False, allow_abbrev=False)).parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        print(_help())
        return 0
    scope = _scope(rest, own.limit)
    report = _Report(scope, as_json=own.json)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))  # what is below is cleared away
    folder = Path(tempfile.mkdtemp(prefix="manyrank-doctor-"))
    run = doctor_probe.existing(scope.output_dir) / f".manyrank-doctor-{secrets.token_hex(4)}"
    try:
        launch = _launch(scope, folder)
        if scope.line.where.print:
            print(launch)
            return 0
        _examine(scope, launch, folder, run, report)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(run, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)
    return report.close(time.monotonic() - started)


def _options(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = made.add_argument_group("the examination")
    group.add_argument("--json", action="store_true", help="print the report as one JSON document")
    group.add_argument(
        "--limit", type=_seconds, default=LIMIT, metavar="S", help=f"seconds that the ranks may take (default: {LIMIT})"
    )
    return made


def _seconds(given: str) -> int:
    if not (given.isascii() and given.isdigit() and int(given)):
        raise argparse.ArgumentTypeError(f"{given!r} is not a number of seconds")
    return int(given)


def _help() -> str:
    made = _options(parser(PROG, launch=True))
    made.usage = f"{PROG} [RECIPE] [--key value ...] [--nproc N] [--json] [--limit S]"
    made.description = (
        "Examine this machine, or with --nnodes several, for a training; with a recipe also what it needs."
    )
    return made.format_help()


def _scope(argv: Sequence[str], limit: int) -> Scope:
    line = parse((f"--rdzv_timeout={MEETING}", *argv), prog=PROG, launch=True, more=("json", "limit"))
    if line.where.via in JOBS:
        what = f"--via {line.where.via}: an examination is no job"
        raise UserError(
            what, where="command line", fix="start `manyrank doctor` on the machines, or in the job's shell"
        )
    if line.where.max_restarts is not None:
        raise UserError("max_restarts", where="command line", fix="leave it out: nothing is started anew here")
    line = replace(line, recipe=line.recipe or ANY_RECIPE)
    made = resolve_launch(line, hardware.probe())
    output_dir = Path(launcher.output_dir(made.config, made.line))
    return Scope(
        made.line,
        made.context.resolved,
        made.context.hardware,
        made.context.strategy,
        made.context.nproc,
        output_dir,
        limit,
        made.plan,
    )


def _launch(scope: Scope, folder: Path) -> launcher.LaunchPlan:
    """The ranks, started as the training would be; torchrun starts quickest, and alone there is no launcher."""
    via = scope.line.where.via or (None if scope.ranks == 1 and scope.strategy.engine is Engine.SINGLE else "torchrun")
    line = replace(scope.line, where=replace(scope.line.where, via=via, max_restarts=0))
    return launcher.plan(
        line,
        strategy=scope.strategy,
        nproc=scope.nproc,
        output_dir=str(scope.output_dir),
        hardware=scope.machine,
        program=("manyrank.tools.doctor.ranks", str(folder)),
    )


def _examine(scope: Scope, launch: launcher.LaunchPlan, folder: Path, run: Path, report: _Report) -> None:
    graphics = doctor_probe.graphics()  # before the ranks use the GPUs
    where = scope.line.where
    job = {"argv": scope.line.argv, "strategy": scope.strategy.name, "run": str(run), "timeout": scope.limit}
    (folder / "job.json").write_text(json.dumps(job))
    with Ranks(launch, folder) as ranks:
        here = _look(scope, graphics)
        partial = folder / "machine.partial"
        partial.write_text(json.dumps(here))
        partial.replace(folder / "machine.json")
        report.add([Check.read(check) for check in here["checks"]])
        ended = ranks.wait(Patience(meeting=where.rdzv_timeout if where.nnodes > 1 else 0, ranks=scope.limit))
    told = {int(file.stem.split("-")[1]): json.loads(file.read_text()) for file in folder.glob("rank-*.json")}
    report.add(_of_ranks(scope, told, ended, folder))


# This machine


def _look(scope: Scope, graphics: Graphics) -> dict[str, Any]:
    """Everything about this machine, as the ranks hand it round: its checks, and what machines and links are compared by."""
    config, where = scope.resolved.config, scope.line.where
    network = doctor_probe.network(where.rdzv_endpoint) if where.nnodes > 1 else None
    sources = doctor_recipe.data(config)
    hub = doctor_recipe.hub(doctor_recipe.hub_names(config, sources))
    own = software()
    checks = [
        doctor_checks.libraries(
            own,
            tested=doctor_probe.tested_versions(asset("constraints.txt")),
            needed=doctor_probe.needed_versions(),
        ),
        doctor_checks.driver(graphics, own.cuda),
        *doctor_checks.gpus(graphics.gpus),
        *_resources(scope, graphics, hub),
        doctor_checks.network(network),
        doctor_checks.recipe(_broken_rules(scope)),
        doctor_checks.planned(scope.planned),
        *doctor_checks.data(sources, hub),
        doctor_checks.hub_login(hub),
        doctor_checks.wandb_login(doctor_recipe.wandb() if "wandb" in config.report_to else None),
    ]
    host = socket.gethostname()
    versions = {"manyrank": __version__, "python": own.python, "cuda": own.cuda, "driver": graphics.driver}
    return {
        "checks": [asdict(replace(check, machine=host)) for check in checks],
        "hub": bool(hub.answers) and all(answer.reached for answer in hub.answers),
        "software": versions | own.libraries,
        "recipe": _recipe_facts(scope, sources),
        "links": _links(graphics, network),
    }


def _resources(scope: Scope, graphics: Graphics, hub: Hub) -> list[Check]:
    config, gpus = scope.resolved.config, len(graphics.gpus)
    shapes = doctor_recipe.weights(config)
    need = doctor_recipe.run_bytes(config, shapes) if shapes else None
    one = doctor_recipe.checkpoint_bytes(config, shapes) if shapes else 0
    output, cache = doctor_probe.existing(scope.output_dir), doctor_probe.existing(doctor_recipe.hub_cache())
    weights = doctor_recipe.loaded_bytes(shapes, bf16=hardware.computes_in_bf16(config.bf16, scope.machine))
    return [
        doctor_checks.host_memory(doctor_probe.host_memory(), processes=scope.nproc, weights=weights, gpus=gpus),
        doctor_checks.cores(scope.machine.cpu_cores, processes=scope.nproc),
        doctor_checks.shared_memory(doctor_probe.space(Path("/dev/shm")), processes=scope.nproc, gpus=gpus),
        doctor_checks.run_disk(output, doctor_probe.space(output), need=need, one=one),
        doctor_checks.cache_disk(cache, doctor_probe.space(cache), hub),
    ]


def _broken_rules(scope: Scope) -> list[Violation]:
    context = RunContext(
        scope.resolved, scope.strategy, scope.nproc, scope.ranks, scope.machine, output_dir=scope.output_dir
    )
    ignored = [*scope.resolved.config.ignore_warnings, "wandb-without-login"]  # that has a line of its own
    return [found for found in rules.violations(context) if found.rule.name not in ignored]


def _recipe_facts(scope: Scope, sources: Sequence[Data]) -> dict[str, str]:
    """What must be the same on every machine; of the data what is in it, since its path may differ."""
    values = {key: str(value) for key, value in scope.resolved.config.plain().items() if not key.endswith("data_path")}
    content = {f"data {number}": f"{data.size} bytes {data.digest[:12]}" for number, data in enumerate(sources, 1)}
    return values | content | {"strategy": scope.strategy.name, "nproc": str(scope.nproc)}


def _links(graphics: Graphics, network: Network | None) -> dict[str, dict[str, Any]]:
    """The slowest way between the ranks of this machine, and the way to others: a name, and bytes a second or None."""
    local = min((gpu.link for gpu in graphics.gpus), key=lambda link: link[1] or 0.0, default=("host memory", None))
    away = (network.name or "the network", network.speed) if network else ("the network", None)
    if graphics.gpus and network and network.infiniband:
        away = (f"{network.infiniband} InfiniBand ports", network.infiniband_speed)
    return {kind: {"name": name, "speed": speed} for kind, (name, speed) in {"local": local, "network": away}.items()}


# All ranks


def _of_ranks(scope: Scope, told: dict[int, dict[str, Any]], ended: Ended, folder: Path) -> list[Check]:
    """The checks that need ranks. `told`: what each rank of this machine knows; of what they did together all know all."""
    found = told[min(told)] if told else {}
    together = doctor_rank_checks.judged(found, ranks=scope.ranks)
    if scope.is_main:
        return [*_of_machines(found, first=1), *_with_end(together, scope, told, ended, folder)]
    own = [_model(found["model"], socket.gethostname())] if "model" in found else []
    if ended.how != How.DONE:
        return [*own, *_with_end(together, scope, told, ended, folder)]
    return [*own, _elsewhere([*_of_machines(found, first=0), *together])]


def _of_machines(found: dict[str, Any], *, first: int) -> list[Check]:
    """The model as each machine reads it, and all else of the machines from the number `first` on."""
    if "same software" not in found:
        return [_model(found["model"], socket.gethostname())] if "model" in found else []
    checks = []
    for number, machine in enumerate(found["same software"]["machines"]):
        checks += [Check.read(check) for check in machine["machine"]["checks"]] if number >= first else []
        checks.append(_model(machine["model"], machine["host"]))
    return checks


def _model(facts: dict[str, Any], host: str) -> Check:
    return replace(doctor_rank_checks.model(facts), machine=host)


def _with_end(
    checks: list[Check], scope: Scope, told: dict[int, dict[str, Any]], ended: Ended, folder: Path
) -> list[Check]:
    """The checks, and what became of the stages that are not among them."""
    found = told[min(told)] if told else {}
    places = [(beat.rank, beat.phase) for beat in unfinished(folder)]
    places.sort(key=lambda place: place[0] != ended.rank)  # the one that failed first is to blame
    blamed = places[0][0] if places and ended.how != How.DONE else None
    problem = told.get(blamed, {}).get("problem")
    rest = doctor_rank_checks.not_reached(found, ended, places, ranks=scope.ranks, problem=problem)
    log = "" if blamed is None else last_words(folder, blamed)
    rest = [replace(check, figures={"log": log}) if check.state == State.FAILED else check for check in rest]
    failed = {check.name for check in rest if check.state == State.FAILED}
    return [*(check for check in checks if check.name not in failed), *rest]


def _elsewhere(checks: Sequence[Check]) -> Check:
    """On the other machines one line stands for what machine 0 prints."""
    failed = [check.name for check in checks if check.state == State.FAILED]
    if failed:
        return doctor_checks.failed("all machines", f"failed: {', '.join(failed)}", "see the report of machine 0")
    return doctor_checks.ok("all machines", "nothing failed; machine 0 has the report")


# The report


class _Report:
    """Lines as they come, or one JSON document at the end."""

    def __init__(self, scope: Scope, *, as_json: bool) -> None:
        self.plan, self.as_json, self.checks = scope, as_json, []
        if not as_json:
            where, ranks = scope.line.where, counted(scope.ranks, "rank")
            machines = f", machine {where.node_rank} of {where.nnodes}" if where.nnodes > 1 else ""
            print(f"{PROG}: {ranks}, {scope.strategy}, on {socket.gethostname()}{machines}", flush=True)

    def add(self, checks: Sequence[Check]) -> None:
        self.checks += checks
        if not self.as_json:
            several = self.plan.line.where.nnodes > 1
            print("\n".join(text for check in checks for text in lines(check, several=several)), flush=True)

    def close(self, seconds: float) -> int:
        """Say how it is, all in all.

        Returns:
            The exit code.
        """
        count = Counter(check.state for check in self.checks)
        if self.as_json:
            print(json.dumps(self._document(seconds), indent=1))
        else:
            warnings = counted(count[State.WARNING], "warning")
            told = f"{count[State.OK]} ok, {warnings}, {count[State.FAILED]} failed"
            print(f"{told}; {seconds:.0f} s")
        return EXIT_FAILED if count[State.FAILED] else 0

    def _document(self, seconds: float) -> dict[str, Any]:
        where = self.plan.line.where
        return {
            "manyrank": __version__,
            "ok": all(check.state != State.FAILED for check in self.checks),
            "seconds": round(seconds, 1),
            "machine": socket.gethostname(),
            "node_rank": where.node_rank,
            "nnodes": where.nnodes,
            "ranks": self.plan.ranks,
            "strategy": self.plan.strategy.name,
            "checks": [asdict(check) for check in self.checks],
        }


def lines(check: Check, *, several: bool) -> list[str]:
    """A check as the terminal shows it; with several machines each line has its machine."""
    machine = f"{check.machine or '(all)':<14} " if several else ""
    shown = [f"{check.state:<8} {machine}{check.name:<16} {check.seen}"]
    return [*shown, f"{'':<8} fix: {check.fix}"] if check.fix else shown
