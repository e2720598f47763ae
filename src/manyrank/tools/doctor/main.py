"""`manyrank doctor`: is this machine ready for a training? Each line says ok, warning or failed, and its fix.

The command looks at its machine, and then starts ranks as the training would: they exchange data and take two real
steps. With several machines each runs the command, and prints its own report.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ... import __version__
from ...config.args import JOBS, CommandLine, Options, arg, parse_with
from ...config.resolve import NOT_GIVEN
from ...config.value_types import Int
from ...errors import EXIT_FAILED, UserError
from ...launch.command import LaunchPlan, choose_output_dir, plan_launch
from ...launch.main import ResolvedLaunch, resolve_launch
from ...project_files import asset
from ...runs.heartbeats import DONE, Heartbeat, beats
from ...runs.run_folder import HEARTBEATS
from ...runs.versions import software
from ...topology.gpus import Hardware, probe, probe_host
from ...topology.strategies import EngineKind
from . import machine, recipe
from .checks import Check, State, counted, failed, ok
from .launch import LAUNCHER_LOG, Ended, run

PROG = "manyrank doctor"
ANY_RECIPE = "quickstart"  # stands for a recipe that is not given
MEETING = 60  # seconds that the machines wait for each other
EXIT_INTERRUPTED, EXIT_TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
NETWORK = "name the network device: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME; open the ports between the machines"
STAGES = {  # of the ranks, and what to do about each when it fails
    "start": "see that Python, torch and the driver fit each other",
    "model": "see that the model can be read here",
    "process group": NETWORK,
    "same on all": NETWORK,
    "all-reduce": f"set NCCL_DEBUG=INFO and start it again; {NETWORK}",
    "step": "try it alone: manyrank train fast_test; DeepSpeed compiles when it is first used: once --limit 300",
    "save and load": "see that the file system of the output folder can lock, sync and rename",
}


class DoctorOptions(Options):
    """Examine this machine for a training; with a recipe also what it needs."""

    first = ("model_name_or_path", "method", "data_path", "strategy", "nproc", "nnodes", "node_rank", "rdzv_endpoint")
    examples = ("manyrank doctor my.yaml --nproc 4",)
    as_json: bool = arg(False, "print the report as one JSON document")
    limit: Int = arg(50, "seconds that the ranks may take", gt=0)


def main(argv: Sequence[str]) -> int:
    """Examine, and print the report.

    Returns:
        The exit code: 0, or 1 when a check failed.

    Raises:
        UserError: a wrong option or recipe.
    """
    started = time.monotonic()
    argv = (f"--rdzv_timeout={MEETING}", *argv)
    line, options = parse_with(argv, DoctorOptions, prog=PROG, launch=True)
    hardware, broken = _hardware()
    resolved = _resolve(line, hardware)
    assumed = _assumed(resolved, named=bool(line.recipe))
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))  # what is below is cleared away
    folder = Path(tempfile.mkdtemp(prefix="manyrank-doctor-"))
    try:
        launch = _launch(resolved, folder)
        if resolved.line.options.print:
            print(launch)
            return 0
        if not options.as_json:
            print(
                f"{PROG}: {counted(resolved.context.world_size, 'rank')}, {resolved.context.strategy}, on {socket.gethostname()}",
                flush=True,
            )
            print(f"assumed, as not given: {', '.join(map(' '.join, assumed.items()))}\n" if assumed else "", end="")
        checks = []
        for check in _examine(resolved, launch, folder, options.limit, broken, assumed):
            checks.append(check)
            if not options.as_json:
                print(check, flush=True)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)
    _finish(resolved, checks, assumed, time.monotonic() - started, as_json=options.as_json)
    return EXIT_FAILED if any(check.state == State.FAILED for check in checks) else 0


def _hardware() -> tuple[Hardware, Check | None]:
    """This machine; without GPUs where CUDA cannot use them, and the failed check."""
    try:
        return probe(), None
    except UserError as error:
        return probe_host(), failed("driver", error.what, error.fix)


def _resolve(line: CommandLine, hardware: Hardware) -> ResolvedLaunch:
    if line.options.via in JOBS:
        what = f"--via {line.options.via}: an examination is no job"
        raise UserError(
            what, where="command line", fix="start `manyrank doctor` on the machines, or in the job's shell"
        )
    if line.options.check:
        raise UserError("--check", where="command line", fix="leave it out: --print shows what the doctor would start")
    if line.options.max_restarts is not None:
        raise UserError("max_restarts", where="command line", fix="leave it out: nothing is started anew here")
    return resolve_launch(replace(line, recipe=line.recipe or ANY_RECIPE), hardware)


def _assumed(resolved: ResolvedLaunch, *, named: bool) -> dict[str, str]:
    """Name what neither the recipe nor the command line says, with what is examined in its place.

    Args:
        named: whether a recipe was given; what the one that stands for it says is assumed.
    """
    config, places = resolved.config, resolved.context.resolved.provenance
    values = {"model_name_or_path": config.model_name_or_path, "method": config.method}
    values |= {"strategy": resolved.context.strategy.name, "data_path": config.data_path[0].path}
    given = {key for key, place in places.items() if place != NOT_GIVEN and (named or place.startswith("command line"))}
    return {key: value for key, value in values.items() if key not in given}


def _launch(resolved: ResolvedLaunch, folder: Path) -> LaunchPlan:
    """Plan the ranks' start as the training's; torchrun starts quickest, and one process needs no launcher."""
    options = resolved.line.options
    via = options.via or (
        None
        if resolved.context.world_size == 1 and resolved.context.strategy.engine is EngineKind.SINGLE
        else "torchrun"
    )
    return plan_launch(
        replace(resolved.line, options=options.model_copy(update={"via": via, "max_restarts": 0})),
        strategy=resolved.context.strategy,
        nproc=resolved.context.nproc,
        output_dir="",
        hardware=resolved.context.hardware,
        program=("manyrank.tools.doctor.ranks", str(folder)),
    )


def _examine(
    resolved: ResolvedLaunch,
    launch: LaunchPlan,
    folder: Path,
    limit: int,
    broken: Check | None,
    assumed: Mapping[str, str],
) -> Iterator[Check]:
    options, hardware, versions = resolved.line.options, resolved.context.hardware, software()
    output = Path(choose_output_dir(resolved.config, resolved.line))
    context = replace(resolved.context, output_dir=output)
    yield machine.libraries(
        versions, tested=machine.tested_versions(asset("constraints.txt")), needed=machine.needed_versions()
    )
    yield machine.extras()
    yield from [broken] if broken else machine.gpus(hardware, versions.cuda)
    yield machine.compiler(context)
    names = recipe.hub_names(context)
    yield from recipe.memory_and_disks(context, names)
    if options.nnodes > 1:
        yield machine.network(options.rdzv_endpoint)
    checks, own = recipe.rules_and_files(context), not {"model_name_or_path", "data_path"} <= assumed.keys()
    yield from (check for check in checks if own or check.state != State.OK)  # of nobody's recipe nothing is ok
    yield recipe.planned(resolved.plan)
    hub = recipe.hub(names) if names else None
    yield from [hub] if hub else []
    # Without the hub, its client would try again and again.
    env = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    env |= {} if hub and hub.figures["reached"] else {"HF_HUB_OFFLINE": "1"}
    env |= {"CUDA_VISIBLE_DEVICES": ""} if broken else {}  # the rest is examined on the CPU
    with _run_folder(output, is_main=options.node_rank == 0) as (run_folder, check):
        yield from [check] if check else []
        (folder / "job.json").write_text(json.dumps(_job(resolved, run_folder, limit)))
        ended = run(launch, folder, seconds=limit + (options.rdzv_timeout if options.nnodes > 1 else 0), env=env)
    yield from _of_ranks(ended, folder, ranks=resolved.context.world_size, machines=options.nnodes)


def _job(resolved: ResolvedLaunch, run_folder: Path | None, limit: int) -> dict[str, Any]:
    """The task of the ranks."""
    kinds = [gpu.kind for gpu in resolved.context.hardware.gpus]
    return {
        "argv": resolved.line.argv,
        "strategy": resolved.context.strategy.name,
        "run": run_folder and str(run_folder),
        "timeout": limit,
        "link": min(kind.link for kind in kinds) if kinds and all(kinds) else None,
    }


@contextlib.contextmanager
def _run_folder(output: Path, *, is_main: bool) -> Iterator[tuple[Path | None, Check | None]]:
    """Make a folder for the step where the run's would be, on machine 0; the run itself looks whether all see it."""
    if not is_main:
        yield None, None
        return
    folder = machine.existing(output) / f".manyrank-doctor-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
    except OSError as error:
        what = f"{folder.parent}: {error.strerror}"
        yield None, failed("output folder", what, "give an --output_dir that can be written to")
        return
    try:
        yield folder, ok("output folder", f"{folder.parent} can be written to")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _of_ranks(ended: Ended, folder: Path, *, ranks: int, machines: int) -> Iterator[Check]:
    """The checks of the first rank of this machine, the GPUs of all its ranks, and how the ranks failed."""
    written = {int(file.stem.split("-")[1]): json.loads(file.read_text()) for file in folder.glob("rank-*.json")}
    for rank, content in sorted(written.items()):
        checks = map(Check.read, content["checks"])
        yield from checks if rank == min(written) else (check for check in checks if check.name.startswith("GPU "))
    if ended.code == 0:
        return
    behind = sorted(  # the one to blame comes first
        (beat for beat in beats(folder / HEARTBEATS) if beat.phase != DONE),
        key=lambda beat: (beat.rank != ended.rank, beat.count, beat.rank),
    )
    stage = behind[0].phase if behind and behind[0].phase in STAGES else "start"
    what, fix = _why(ended, stage, behind, written.get(behind[0].rank, {}).get("problem") if behind else None)
    log = (folder / LAUNCHER_LOG).read_text(errors="replace").splitlines()[-20:]
    yield failed(stage, what, fix, log="\n".join(log))
    skipped = [*(["same on all"] if machines == 1 else []), *(["process group", "all-reduce"] if ranks == 1 else [])]
    later = [name for name in list(STAGES)[list(STAGES).index(stage) + 1 :] if name not in skipped]
    if later:
        yield Check("not reached", State.WARNING, ", ".join(later))


def _why(ended: Ended, stage: str, behind: Sequence[Heartbeat], problem: dict[str, str] | None) -> tuple[str, str]:
    """Describe how a stage failed, and the fix.

    Args:
        behind: the last sign of each rank that has not come through; the one to blame first.
        problem: what that rank says itself.
    """
    what, fix = str(ended), STAGES[stage]
    if problem:
        return f"rank {behind[0].rank}: {problem['what']}", problem["fix"] or fix
    if ended.apart:
        fix = "start the same command on every machine, with the same --nnodes and --rdzv_endpoint; open its port"
        return what, fix
    if ended.code is None:
        places = "; ".join(f"rank {beat.rank} (host {beat.host}) in {beat.phase}" for beat in behind)
        return f"{what}: {places or 'no rank has begun'}", f"{fix}; or give the ranks longer: --limit"
    if ended.code == -signal.SIGKILL:
        return what, "see in dmesg whether memory was short: then start fewer processes"
    return what, fix


def _finish(
    resolved: ResolvedLaunch, checks: Sequence[Check], assumed: dict[str, str], seconds: float, *, as_json: bool
) -> None:
    """Print the last line of the report, or all of it as JSON."""
    count, options = Counter(check.state for check in checks), resolved.line.options
    if not as_json:
        warnings = counted(count[State.WARNING], "warning")
        print(f"{count[State.OK]} ok, {warnings}, {count[State.FAILED]} failed; {seconds:.0f} s")
        return
    document = {
        "manyrank": __version__,
        "ok": not count[State.FAILED],
        "seconds": round(seconds, 1),
        "machine": socket.gethostname(),
        "node_rank": options.node_rank,
        "nnodes": options.nnodes,
        "ranks": resolved.context.world_size,
        "strategy": resolved.context.strategy.name,
        "assumed": assumed,
        "checks": [asdict(check) for check in checks],
    }
    print(json.dumps(document, indent=1))
