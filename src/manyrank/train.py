"""The shared train module: every launcher runs `python -m manyrank.train RECIPE [--key value ...]` on each rank."""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from . import hardware, rules, topology
from .config import Resolved, resolve
from .errors import EXIT_FAILED, EXIT_USER, NonFiniteError, Preempted, SaveError, UserError
from .interrupts import STOP
from .launcher import CPU_VARIABLES, LAUNCH_VARIABLE, default_output_dir
from .options import CommandLine, parse
from .topology import Topology

# Sessions live until the process ends: after the process group has ended, torch 2.13 sometimes hangs where it takes
# DistributedDataParallel apart.
_KEPT: list[object] = []
PATIENCE = 5.0  # seconds that a rank leaves to local rank 0 to say what is wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Train on this rank.

    Returns:
        The exit code: 0 done, 1 failed, 2 the user's input is wrong, 75 preempted after a complete checkpoint.
    """
    if (code := _last_word()) is not None:
        return code
    try:
        place = topology.from_environment()
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER
    line = argv or sys.argv[1:]
    return guarded(lambda: _train(parse(line, prog="python -m manyrank.train", launch=False), place), place)


def _for_good(code: int) -> int:
    """An end that would be the same the next time: workers that are started anew hear of it, see `_last_word`."""
    if topology.may_restart():
        _word_file().write_text(str(code))
    return code


def _word_file() -> Path:
    return Path(tempfile.gettempdir()) / f"manyrank-{os.getppid()}-{os.environ['TORCHELASTIC_RUN_ID']}"


def _last_word() -> int | None:
    """With what a worker of this agent has ended for good; a run that was told to stop is not to be started anew.

    torch's agent starts its workers anew after every exit code but 0, and cannot be told otherwise.
    """
    if not topology.restarts() or not _word_file().exists():
        return None
    import psutil

    since = psutil.Process(os.getppid()).create_time()
    return int(_word_file().read_text()) if _word_file().stat().st_mtime > since else None


def guarded(work: Callable[[], None], place: Topology) -> int:
    """Run `work` and turn its exceptions into messages and exit codes."""
    try:
        work()
    except UserError as error:
        _say(error, place)
        return _for_good(EXIT_USER)
    except NonFiniteError as error:
        _say(f"stopped before the optimizer used it: {error}", place)
        return _for_good(EXIT_FAILED)
    except SaveError as error:
        _say(f"stopped: {error}", place)
        return _for_good(EXIT_FAILED)
    except Preempted as stop:
        return _for_good(stop.code)
    except Exception:
        print(f"rank {place.rank} failed:", file=sys.stderr)
        traceback.print_exc()
        return EXIT_FAILED
    return 0


def _say(message: object, place: Topology) -> None:
    """On a machine, local rank 0 speaks for all that fail alike.

    The others give it time: the first process that ends makes the launcher end all. One that is still there after that
    failed alone.
    """
    end = time.monotonic() + PATIENCE
    while place.local_rank and time.monotonic() < end:
        if STOP.requested:  # by the launcher, since another one has ended
            return
        time.sleep(0.1)
    print(message, file=sys.stderr, flush=True)


def _train(line: CommandLine, place: Topology) -> None:
    STOP.listen()
    resolved = resolve(line.recipe, line.overrides)
    config = resolved.config
    output_dir = Path(config.output_dir or default_output_dir(line))
    machine = hardware.probe()
    _check_before_torch(resolved, place, machine, output_dir)
    _before_imports(machine)
    import torch

    from .session import open_session

    if machine.gpus and not torch.cuda.is_available():
        fix = "install a CUDA build of torch that fits the driver, or hide the GPUs: CUDA_VISIBLE_DEVICES=''"
        raise UserError("there are GPUs that torch cannot use", where=f"torch {torch.__version__}", fix=fix)

    bf16 = config.bf16 is True or (config.bf16 == "auto" and bool(machine.gpus) and machine.has_bf16)
    session = open_session(config, place, output_dir=output_dir, bf16=bf16)
    _KEPT.append(session)
    try:
        if config.dry_run:
            session.dry_run()
            return
        if place.is_main:
            _write_launch(output_dir, resolved)
        session.run()
    finally:
        session.close()


def _check_before_torch(resolved: Resolved, place: Topology, machine: hardware.Hardware, output_dir: Path) -> None:
    strategy = resolved.config.strategy or topology.default_strategy(place.world_size)
    rules.check(
        rules.Situation(resolved, strategy, nproc=place.local_world_size, world_size=place.world_size, hardware=machine)
    )
    if place.is_main and not topology.restarts():
        rules.check_output_dir(resolved.config, output_dir)


def _before_imports(machine: hardware.Hardware) -> None:
    """No telemetry, no remarks that every rank would repeat and nobody can act on, and no spinning threads."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft's use of old names
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # an optional kernel package is not there
    if not machine.gpus:
        os.environ.setdefault("OMP_WAIT_POLICY", CPU_VARIABLES["OMP_WAIT_POLICY"])


def _write_launch(output_dir: Path, resolved: Resolved) -> None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make {output_dir}: {error}", where="output_dir", fix="choose another --output_dir"
        ) from None
    (output_dir / "config.yaml").write_text(resolved.as_yaml(), encoding="utf-8")
    launch = json.loads(os.environ.get(LAUNCH_VARIABLE) or json.dumps({"argv": sys.orig_argv}))
    (output_dir / "launch.json").write_text(json.dumps(launch, indent=1), encoding="utf-8")


def leave(code: int) -> NoReturn:
    """End this process now. Everything is on disk by then.

    With gloo, tearing the interpreter down sometimes aborts or hangs on a busy machine (torch 2.13: a C++ thread of the
    process group is still running), and a finished run would count as failed.
    """
    atexit._run_exitfuncs()  # trackers send what they still hold
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
