"""The end of a run's process: exceptions as messages and exit codes, also for a worker that is restarted."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ..errors import (
    EXIT_FAILED,
    EXIT_MEMORY,
    EXIT_USER,
    NonFiniteError,
    OutOfMemory,
    Preempted,
    SaveError,
    UserError,
    is_out_of_memory,
    name_too_long,
)
from ..signals import CODE_FILE, STOP, ended_by, launcher_folder, recorded_code
from ..topology import ranks
from ..topology.ranks import Topology

PATIENCE = 5.0  # seconds that a rank leaves to local rank 0 to say what is wrong


def run_with_exit_codes(work: Callable[[], None], place: Topology) -> int:
    """Run `work` and turn its exceptions into messages and exit codes."""
    try:
        try:
            work()
        except OSError as error:
            raise name_too_long(error) from None
        finally:
            STOP.ignore()
    except BaseException as error:
        if STOP.at_start:  # it is the exception of that signal, or what a library that swallowed it made of it
            return end_start(STOP.number, place.rank)
        return _exit_code(error, place)
    return 0


def _exit_code(error: BaseException, place: Topology) -> int:
    """Say what has ended this rank."""
    if isinstance(error, UserError):
        _say(error, place)
        return for_good(EXIT_MEMORY if isinstance(error, OutOfMemory) else EXIT_USER)
    if isinstance(error, NonFiniteError):
        _say(f"stopped before the optimizer used it: {error}", place)
        return for_good(EXIT_FAILED)
    if isinstance(error, SaveError):
        _say(f"stopped: {error}", place)
        return for_good(EXIT_FAILED)
    if isinstance(error, Preempted):
        return for_good(error.code) if error.final else error.code
    if isinstance(error, KeyboardInterrupt):
        return for_good(ended_by(signal.SIGINT))
    if is_out_of_memory(error):
        _say(_outside_a_step(error), place)
        return for_good(EXIT_MEMORY)
    if not isinstance(error, Exception):
        raise error
    print(f"rank {place.rank} failed:", file=sys.stderr)
    traceback.print_exception(error)
    return EXIT_FAILED


def _outside_a_step(error: BaseException) -> OutOfMemory:
    """Describe being out of memory where nothing compares it with the plan, such as while the model is loaded."""
    fix = "see `manyrank plan` for what needs less, and `nvidia-smi` for who else uses the GPU"
    return OutOfMemory(f"out of memory: {str(error).splitlines()[0]}", where="outside of a step", fix=fix)


def for_good(code: int) -> int:
    """Record an exit code that a restart would not change, for `final_exit_code` of restarted workers."""
    if ranks.may_restart():
        with contextlib.suppress(OSError):  # of a full disk; the code itself stays
            _code_file().write_text(str(code))
    return code


def _code_file() -> Path:
    if folder := launcher_folder():
        return folder / CODE_FILE
    return Path(tempfile.gettempdir()) / f"manyrank-{os.getppid()}-{os.environ['TORCHELASTIC_RUN_ID']}"


def final_exit_code() -> int | None:
    """Return the final exit code that a worker of this launcher recorded, or that of a requested stop; None: neither.

    torch's agent restarts workers after any code but 0; where another machine has left, the restart count stays 0.
    """
    if folder := launcher_folder():
        return recorded_code(folder)
    if not ranks.restarts() or not _code_file().exists():
        return None
    import psutil

    since = psutil.Process(os.getppid()).create_time()  # it may be the file of an agent with the same pid
    return int(_code_file().read_text()) if _code_file().stat().st_mtime > since else None


def end_start(number: int, rank: int) -> int:
    """Say that a signal has stopped this rank before its first step.

    Returns:
        The exit code, which a SIGTERM does not make final: torch's agent may have sent it, see `signals`.
    """
    if rank == 0:
        print("stopped before the first step: nothing was begun that could be lost", file=sys.stderr, flush=True)
    code = ended_by(number)
    return code if number == signal.SIGTERM else for_good(code)


def _say(message: object, place: Topology) -> None:
    """Print a message once on each machine: local rank 0 speaks for all that fail alike.

    The others give it time: the first process that ends makes the launcher end all. One that is still there after that
    failed alone.
    """
    end = time.monotonic() + PATIENCE
    while place.local_rank and time.monotonic() < end:
        if STOP.requested:  # by the launcher, since another one has ended
            return
        time.sleep(0.1)
    print(message, file=sys.stderr, flush=True)


def exit_now(code: int) -> NoReturn:
    """End this process now. Everything is on disk by then.

    With gloo, tearing the interpreter down sometimes aborts or hangs on a busy machine (torch 2.13: a C++ thread of the
    process group is still running), and a finished run would count as failed.
    """
    atexit._run_exitfuncs()  # trackers send what they still hold
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
