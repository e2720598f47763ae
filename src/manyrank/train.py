"""The shared train module: every launcher runs `python -m manyrank.train RECIPE [--key value ...]` on each rank."""

from __future__ import annotations

from .signals import STOP, begin_worker

if __name__ == "__main__":  # the other imports take half a second
    begin_worker()

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from .config.args import parse
from .config.resolve import ResolvedConfig, TrainConfig, resolve
from .errors import EXIT_USER, UserError
from .launch.command import LAUNCH_VARIABLE, LaunchPlan, before_imports, default_output_dir
from .rules.check import check_new_folder, check_output_dir, check_rules
from .rules.context import RunContext
from .runs.heartbeats import HeartbeatWriter
from .runs.run_folder import LAUNCH, LAUNCH_FOLDER, is_marked, is_removable, mark_for_removal, remove_run, writable
from .runs.run_lock import claimed
from .runs.watchdog import Watchdog
from .topology import gpus, ranks, strategy_files
from .topology.precision import find_precision
from .topology.ranks import Topology
from .topology.strategies import default_strategy, named_strategy
from .topology.torch_gpus import use_gpu
from .training.exits import end_start, exit_now, final_exit_code, run_with_exit_codes

if TYPE_CHECKING:
    from .training.run import TrainingRun
    from .training.task import UserObjects

# The last run of several processes lives on: after the process group has ended, torch 2.13 sometimes hangs where it
# takes DistributedDataParallel apart.
_KEPT: list[object] = []


def main(argv: Sequence[str] | None = None) -> int:
    """Train on this rank.

    Returns:
        The exit code: 0 done, 1 failed, 2 the user's input is wrong, 76 out of memory, 75 preempted after a complete checkpoint.
    """
    if (code := final_exit_code()) is not None:
        return code
    try:
        place = ranks.from_environment()
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER
    return run_with_exit_codes(lambda: _train(argv or sys.argv[1:], place), place)


def _end_start(number: int) -> None:
    """End this process from another thread: its main thread waits where it hears no signal."""
    os._exit(end_start(number, int(os.environ.get("RANK", "0"))))


def _train(argv: Sequence[str], place: Topology) -> None:
    STOP.listen(_end_start)
    line = parse(argv, prog="python -m manyrank.train", launch=False)
    resolved = resolve(line.recipe, line.overrides)
    config = resolved.config
    if config.per_device_train_batch_size == "auto":
        what = "a micro-batch of auto is decided by `manyrank train`"
        raise UserError(what, where=resolved.where("per_device_train_batch_size"), fix="start it so, or give a number")
    train(resolved, place, Path(config.output_dir or default_output_dir(line)))


def train(
    resolved: ResolvedConfig, place: Topology, output_dir: Path, objects: UserObjects | None = None
) -> TrainingRun:
    """Check everything, set the run up, and train.

    Returns:
        The run, closed.

    Raises:
        UserError, NonFiniteError, SaveError, Preempted: see `main` for the exit codes they stand for.
    """
    config, heartbeat = resolved.config, HeartbeatWriter(place.rank)
    # A rank that hangs is named before the others end.
    patience = min(config.hang_timeout, 0.8 * config.ddp_timeout) if place.world_size > 1 else config.hang_timeout
    with Watchdog(heartbeat, patience=patience, notices=place.local_rank == 0):
        try:
            heartbeat.beat(0, "checking the recipe, the model's files and the data")
            machine = gpus.probe()
            _check_before_torch(resolved, place, machine, output_dir)
            heartbeat.beat(0, "waiting for the lock of the run's folder")
            with claimed(output_dir) if place.is_main and not config.dry_run else contextlib.nullcontext():
                if place.is_main and not ranks.restarts():
                    check_new_folder(config, output_dir)  # another run may have ended there meanwhile
                    if config.overwrite_output_dir and not config.dry_run and is_removable(output_dir):
                        with writable(output_dir):
                            mark_for_removal(output_dir)
                run = _train_checked(resolved, place, machine, output_dir, heartbeat, objects)
        finally:
            heartbeat.stop()
    if config.push_to_hub and place.is_main and not config.dry_run:  # an upload takes long: no watch, no lock
        from .tools.push import push_at_end

        push_at_end(output_dir, config.hub_model_id, private=config.hub_private_repo)
    return run


def _make_room(config: TrainConfig, output_dir: Path) -> None:
    """Remove an earlier run, where the recipe asks for it, once nothing can be refused any more."""
    if config.overwrite_output_dir and is_marked(output_dir):
        removed = ", ".join(remove_run(output_dir))
        print(f"overwrite_output_dir: removed the run in {output_dir} ({removed})", flush=True)


def _train_checked(
    resolved: ResolvedConfig,
    place: Topology,
    machine: gpus.Hardware,
    output_dir: Path,
    heartbeat: HeartbeatWriter,
    objects: UserObjects | None,
) -> TrainingRun:
    config = resolved.config
    heartbeat.beat(0, "importing torch and transformers")
    before_imports(machine, expandable=config.expandable_segments, deterministic=config.full_determinism)
    use_gpu(machine, place)

    from .tasks import find_task
    from .tools.report.main import make_report
    from .training.build import build_run

    precision = find_precision(config.bf16, config.fp16, machine)
    options = {"output_dir": output_dir, "objects": objects, "heartbeat": heartbeat}
    try:
        run = build_run(config, place, find_task(config), precision=precision, **options)
    except BaseException:
        heartbeat.withdraw()
        raise
    _KEPT[:] = [run] if place.world_size > 1 else []
    try:
        if config.dry_run:
            run.dry_run()
        else:
            if place.is_main:
                with writable(output_dir):
                    _make_room(config, output_dir)
                    _write_launch(output_dir, resolved)
            run.run(make_report)
    finally:
        run.close()
    return run


def _check_before_torch(resolved: ResolvedConfig, place: Topology, machine: gpus.Hardware, output_dir: Path) -> None:
    launched = strategy_files.from_environment()
    named = named_strategy(resolved.config.strategy) or (launched and launched.strategy)
    strategy = named or default_strategy(place.world_size)
    context = RunContext(
        resolved,
        strategy,
        nproc=place.local_world_size,
        world_size=place.world_size,
        hardware=machine,
        output_dir=output_dir,
        launched=launched,
    )
    check_rules(context, warn=place.is_main and LAUNCH_VARIABLE not in os.environ)
    if place.is_main and not ranks.restarts():
        check_output_dir(resolved.config, output_dir)
    if place.is_main and LAUNCH_VARIABLE not in os.environ:
        print("".join(f"{line}\n" for line in resolved.assumed()), end="", flush=True)


def _write_launch(output_dir: Path, resolved: ResolvedConfig) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "config.yaml").write_text(resolved.as_yaml(), encoding="utf-8")
    packed = os.environ.get(LAUNCH_VARIABLE)  # not there under a launcher that the user has called
    launch = asdict(LaunchPlan.unpacked(packed)) if packed else {"argv": sys.orig_argv}
    (output_dir / LAUNCH).write_text(json.dumps(launch, indent=1), encoding="utf-8")
    if packed:
        (output_dir / LAUNCH_FOLDER).mkdir(exist_ok=True)
        (output_dir / LAUNCH_FOLDER / "plan.txt").write_text(LaunchPlan.unpacked(packed).text(), encoding="utf-8")


if __name__ == "__main__":
    exit_now(main())
