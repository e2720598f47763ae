"""Run one command under limits of time, memory, processes, files, output and network. Linux, by util-linux and coreutils.

    caller ── unshare ── timeout ── prlimit ── the command ── what it starts
              opens the  first of   sets the limits
              namespaces its own

The kernel kills a process namespace as a whole, so whatever the command leaves behind dies with it, and all of it dies
with the caller. Where the machine allows no namespaces, a command with `network` still runs: what is left of it is then
found by its environment. Run by root, every command gets an unprivileged user of its own, because the kernel limits the
processes of any other user only.

This stops accidents: endless loops, memory hogs, fork bombs, calls home. It is no jail. The command reads what the
caller may read and, unless the caller is root, writes what the caller may write.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

GRACE = 10.0  # seconds over the limit after which `timeout` itself is given up
MEBIBYTE = 1024**2
USERS = range(65_000, 65_500)  # user ids that nobody has; one after the other for the commands of root
_user = itertools.cycle(USERS)
DIE_WITH_CALLER = ("setpriv", "--pdeathsig=KILL")
NAMESPACES = ("unshare", "--pid", "--ipc", "--fork", "--kill-child")
READ_EVERYTHING = 2  # CAP_DAC_READ_SEARCH of linux/capability.h


class Refused(RuntimeError):
    """The command could not be started under its limits; nothing of it has run."""


@dataclass(frozen=True)
class Limits:
    """Limits of a command. Memory and CPU time are counted for each of its processes."""

    seconds: float = 10.0  # of wall time; also of CPU time, rounded up
    memory_mb: int = 512  # MiB of address space
    network: bool = False
    processes: int = 64  # with threads, at a time
    file_mb: int = 64  # MiB of one file
    output_bytes: int = 64 * 1024  # kept of standard output and error; the rest is read and dropped


@dataclass(frozen=True)
class Outcome:
    """The end of a command: an exit code, a signal's name, or (neither) the time limit.

    An exit code over 128 is read as a signal, as shells write it.
    """

    code: int | None
    signal: str | None
    output: str

    @property
    def reason(self) -> str:
        if self.signal in (None, "SIGXCPU") and self.code is None:
            return "time limit"
        return f"killed by {self.signal}" if self.signal else f"exit code {self.code}"


def run_limited(command: Sequence[str], *, files: Mapping[str, str], limits: Limits) -> Outcome:
    """Write `files` (name to content) into a new folder, run the command there, and remove the folder.

    The environment has PATH (led by this Python's folder, so that `python` is this one), HOME and TMPDIR (the new
    folder), and nothing of the caller's.

    Raises:
        Refused: no Linux, no such command, or the machine forbids a network namespace.
    """
    if sys.platform != "linux":
        raise Refused(f"commands are run under limits on Linux only, not on {sys.platform}")
    outer = _namespaces(limits.network)
    isolated = "unshare" in outer
    user = next(_user) if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="manyrank-", ignore_cleanup_errors=True) as folder:
        for name, content in files.items():
            Path(folder, name).write_text(content, encoding="utf-8", newline="")
        if user is not None:
            for path in (folder, *(Path(folder, name) for name in files)):
                os.chown(path, user, user)
        env = _environment(folder)
        program = str(Path(folder, command[0])) if os.sep in command[0] else command[0]
        if not shutil.which(program, path=env["PATH"]):
            raise Refused(f"{command[0]!r} cannot be run: there is no such program")
        timeout = ("timeout", "--signal=KILL", str(limits.seconds))
        prlimit = _limits(limits, alone=isolated or bool(user))
        argv = (*outer, *timeout, *_privileges(user), *prlimit, *command)
        return _run(argv, folder, env, limits, isolated=isolated)


def _environment(folder: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    fixed = {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return {"PATH": path, "HOME": folder, "TMPDIR": folder, **fixed}


@lru_cache
def _namespaces(network: bool) -> tuple[str, ...]:
    """Find the start of a command line that opens the namespaces, by trying it.

    Raises:
        Refused: the machine forbids a network namespace, or to become another user.
    """
    root = os.geteuid() == 0
    # A user who is not root opens them inside a namespace for users; what is allowed there the command does not get.
    within = () if root else ("unshare", "--user", "--map-current-user", "--keep-caps")
    reason = ""
    isolated = (*within, *DIE_WITH_CALLER, *NAMESPACES, *(() if network else ("--net",)))
    for outer in (isolated, DIE_WITH_CALLER) if network else (isolated,):
        argv = [*outer, *_privileges(USERS[0] if root else None), "true"]
        try:
            trial = subprocess.run(argv, capture_output=True, text=True, timeout=GRACE)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Refused(f"commands need the programs of util-linux: {error}") from None
        if trial.returncode == 0:
            return outer
        reason = trial.stderr.partition("\n")[0].rpartition(": ")[2]
    forbidden = "another user for a command" if network else "a network namespace"
    raise Refused(f"this machine forbids {forbidden} ({reason})")


def _privileges(user: int | None) -> tuple[str, ...]:
    """Drop what root or a namespace allows; root turns into `user`."""
    if user is None:
        return ("setpriv", "--no-new-privs", "--inh-caps=-all", "--ambient-caps=-all")
    # It may still read everything: root's Python is often in root's home. In some containers root has no such right.
    status = Path("/proc/self/status").read_text()
    permitted = int(status.partition("CapPrm:")[2].split()[0], 16)
    kept = "-all,+dac_read_search" if permitted >> READ_EVERYTHING & 1 else "-all"
    ids = (f"--reuid={user}", f"--regid={user}", "--clear-groups")
    return ("setpriv", *ids, "--no-new-privs", f"--inh-caps={kept}", f"--ambient-caps={kept}")


def _limits(limits: Limits, *, alone: bool) -> list[str]:
    """Set the limits, none of them over what the caller has.

    Args:
        alone: whether the command shares its user's number of processes with nobody.
    """
    seconds = math.ceil(limits.seconds)
    values = {
        "cpu": (seconds, seconds + 1),
        "as": [limits.memory_mb * MEBIBYTE] * 2,
        "fsize": [limits.file_mb * MEBIBYTE] * 2,
        "nproc": [limits.processes + (0 if alone else _tasks_of_this_user())] * 2,
        "nofile": (256, 256),
        "core": (0, 0),
    }
    words = ["prlimit"]
    for name, pair in values.items():
        highest = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1]
        soft, hard = (value if highest == resource.RLIM_INFINITY else min(value, highest) for value in pair)
        words.append(f"--{name}={soft}:{hard}")
    return words


def _tasks_of_this_user() -> int:
    count = 0
    for entry in _processes():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            count += len(list((entry / "task").iterdir())) if entry.stat().st_uid == os.getuid() else 0
    return count


def _run(argv: Sequence[str], folder: str, env: dict[str, str], limits: Limits, *, isolated: bool) -> Outcome:
    kept, started = bytearray(), time.monotonic()
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=folder,
        env=env,
        start_new_session=True,
    )
    reader = threading.Thread(target=_keep, args=(process.stdout, kept, limits.output_bytes), daemon=True)
    reader.start()
    code = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(limits.seconds + GRACE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isolated:
            _kill_leftovers(folder)
        reader.join(GRACE)
    output = kept.decode("utf-8", "replace")
    number = None if code is None else -code if code < 0 else code - 128
    # 124: `timeout` was about to kill what the limit of CPU time ended at that very moment.
    late = time.monotonic() - started >= limits.seconds
    if code is None or (late and (number == signal.SIGKILL or code == 124)):
        return Outcome(None, None, output)
    try:
        return Outcome(None, signal.Signals(number).name, output)
    except ValueError:
        return Outcome(code, None, output)


def _keep(pipe, kept: bytearray, most: int) -> None:
    """Read all of a pipe, and keep the beginning."""
    with pipe:
        while part := pipe.read1(65_536):
            kept += part[: most - len(kept)]


def _kill_leftovers(folder: str) -> None:
    """Kill what was started in the folder's environment, and again what that starts meanwhile, until there is none."""
    mark = f"HOME={folder}".encode()
    while leftovers := [int(entry.name) for entry in _processes() if mark in _environment_of(entry)]:
        for process in leftovers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)


def _environment_of(entry: Path) -> list[bytes]:
    try:
        return (entry / "environ").read_bytes().split(b"\0")
    except OSError:  # it has ended meanwhile, or is another user's
        return []


def _processes() -> list[Path]:
    return [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
