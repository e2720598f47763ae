"""Run one command under limits of time, memory, processes, files, output and network. Linux, standard library alone.

    caller ── this file as a program ── first process of its own namespace ── the command ── what it starts
              opens the namespaces      keeps the time, reports the end        has the limits

The program in between sets what the command inherits, so that the caller may have threads. Whatever the command
leaves behind dies with it: the kernel kills a process namespace as a whole; where there is none (`network`), the
supervisor adopts and kills the orphans. Run by root, every command gets an unprivileged user of its own, because the
kernel limits the processes of any other user only.

This stops accidents: endless loops, memory hogs, fork bombs, calls home. It is no jail. The command reads what the
caller may read and, unless the caller is root, writes what the caller may write.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import math
import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# From linux/sched.h, linux/prctl.h and linux/capability.h.
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 8, 36, 38, 47
PR_CAP_AMBIENT_RAISE, CAP_DAC_READ_SEARCH, CAPABILITY_VERSION_3 = 2, 2, 0x20080522

GRACE = 10.0  # seconds over the limit after which the supervisor itself is given up
MEBIBYTE = 1024**2
USERS = range(65_000, 65_500)  # user ids that nobody has; one after the other for the commands of root
_user = itertools.cycle(USERS)


class Refused(RuntimeError):
    """The command could not be started under its limits; nothing of it has run."""


@dataclass(frozen=True)
class Limits:
    """What a command may use. Memory and CPU time are counted for each of its processes."""

    seconds: float = 10.0  # of wall time; also of CPU time, rounded up
    memory_mb: int = 512  # MiB of address space
    network: bool = False
    processes: int = 64  # with threads, at a time
    file_mb: int = 64  # MiB of one file
    output_bytes: int = 64 * 1024  # kept of standard output and error; the rest is read and dropped


@dataclass(frozen=True)
class Outcome:
    """How a command ended: with an exit code, by a signal's name, or (neither) by its time limit."""

    code: int | None
    signal: str | None
    output: str

    @property
    def reason(self) -> str:
        if self.signal in (None, "SIGXCPU") and self.code is None:
            return "time limit"
        return f"killed by {self.signal}" if self.signal else f"exit code {self.code}"


def run(command: Sequence[str], *, files: Mapping[str, str], limits: Limits) -> Outcome:
    """Write `files` (name to content) into a new folder, run the command there, and remove the folder.

    The environment has PATH (led by this Python's folder, so that `python` is this one), HOME and TMPDIR (the new
    folder), and nothing of the caller's.

    Raises:
        Refused: no Linux, no such command, or the machine forbids a network namespace.
    """
    if sys.platform != "linux":
        raise Refused(f"commands are run under limits on Linux only, not on {sys.platform}")
    user = next(_user) if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="manyrank-", ignore_cleanup_errors=True) as folder:
        for name, content in files.items():
            Path(folder, name).write_text(content, encoding="utf-8", newline="")
        for path in (folder, *(Path(folder, name) for name in files)) if user else ():
            os.chown(path, user, user)
        return _launch({"command": list(command), "folder": folder, "user": user}, limits)


def _launch(request: dict, limits: Limits) -> Outcome:
    report, told = os.pipe()
    request |= {"told": told, "limits": asdict(limits), "caller": os.getpid()}
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, json.dumps(request)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=_environment(request["folder"]),
            pass_fds=[told],
            start_new_session=True,
        )
    except OSError:
        os.close(report)
        raise
    finally:
        os.close(told)
    with process.stdout, os.fdopen(report, "rb", buffering=0) as reports:
        try:
            said, output = _collect(process.stdout.fileno(), reports.fileno(), limits)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    end = json.loads(said) if said else {"signal": "SIGKILL"}
    if "refused" in end:
        raise Refused(end["refused"])
    return Outcome(end.get("code"), end.get("signal"), output.decode("utf-8", "replace"))


def _environment(folder: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    fixed = {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return {"PATH": path, "HOME": folder, "TMPDIR": folder, **fixed}


def _collect(output: int, report: int, limits: Limits) -> tuple[bytes, bytes]:
    """Read both pipes until the report ends; a process that holds the output open is not waited for.

    Returns:
        The report and the kept output.
    """
    said, kept = bytearray(), bytearray()
    deadline = time.monotonic() + limits.seconds + GRACE
    os.set_blocking(output, False)
    with selectors.DefaultSelector() as pipes:
        pipes.register(output, selectors.EVENT_READ)
        pipes.register(report, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            for key, _ in pipes.select(left):
                part = os.read(key.fd, 65_536)
                if key.fd == output:
                    kept += part[: limits.output_bytes - len(kept)]
                said += part if key.fd == report else b""
                if not part:
                    pipes.unregister(key.fd)
            if report not in pipes.get_map():
                break
        else:
            return b"{}", bytes(kept)
    with contextlib.suppress(BlockingIOError):
        while len(kept) < limits.output_bytes and (part := os.read(output, 65_536)):
            kept += part[: limits.output_bytes - len(kept)]
    return bytes(said), bytes(kept)


# From here on: the program in between, in its own processes.


def _supervise(request: dict) -> None:
    """Open the namespaces, run the command, and write how it ended to the `told` pipe, as JSON."""
    os.set_inheritable(request["told"], False)
    isolated = not request["limits"]["network"]
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL if isolated else signal.SIGTERM)
    if os.getppid() != request["caller"]:  # it died before that
        return
    if isolated:
        try:
            _unshare()
        except OSError as error:
            _tell(request, {"refused": f"this machine forbids a network namespace ({error.strerror})"})
            return
        first = os.fork()
        if first:
            os.waitpid(first, 0)
            return
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
    end = _run(request)
    if not isolated:
        _kill_children()
    if end:
        _tell(request, end)


def _unshare() -> None:
    """Namespaces for network, processes and IPC; with one for users where it takes that to be allowed."""
    user, group = os.geteuid(), os.getegid()
    flags = CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | (CLONE_NEWUSER if user else 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def _run(request: dict) -> dict:
    """Start the command and wait for it, no longer than its time; empty where it did not start and said so."""
    ready, started = os.pipe()
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        child = os.fork()
        if child == 0:
            _become(request, started)
        os.close(started)
        signal.setitimer(signal.ITIMER_REAL, request["limits"]["seconds"])
        refused = os.read(ready, 1)  # ends when the command takes over
        _, status = os.waitpid(child, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except TimeoutError:
        return {"code": None}
    if refused:
        return {}
    code = os.waitstatus_to_exitcode(status)
    return {"code": code} if code >= 0 else {"signal": signal.Signals(-code).name}


def _stop(*_) -> None:
    """The time is up, or the caller is gone."""
    raise TimeoutError


def _become(request: dict, started: int) -> None:
    """Take on the limits and turn into the command; does not return."""
    try:
        _limit(request)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and a command would inherit that
            signal.signal(number, signal.SIG_DFL)
        os.chdir(request["folder"])
        os.execvp(request["command"][0], request["command"])
    except (OSError, ValueError) as error:
        _tell(request, {"refused": f"{request['command'][0]!r} cannot be run: {error}"})
        os.write(started, b"!")
    finally:
        os._exit(127)


def _limit(request: dict) -> None:
    limits, user = request["limits"], request["user"]
    if user:
        _become_user(user)
    # Only a user without a namespace or an id of his own shares the count with his other processes.
    shared = 0 if user or not limits["network"] else _tasks_of_this_user()
    seconds = math.ceil(limits["seconds"])
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, *[limits["memory_mb"] * MEBIBYTE] * 2),
        (resource.RLIMIT_FSIZE, *[limits["file_mb"] * MEBIBYTE] * 2),
        (resource.RLIMIT_NPROC, *[limits["processes"] + shared] * 2),
        (resource.RLIMIT_NOFILE, 256, 256),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        highest = resource.getrlimit(kind)[1]
        within = [value if highest == resource.RLIM_INFINITY else min(value, highest) for value in (soft, hard)]
        resource.setrlimit(kind, tuple(within))
    _prctl(PR_SET_NO_NEW_PRIVS, 1)


def _become_user(user: int) -> None:
    """Turn from root into another user, who may still read everything: root's Python is often in root's home."""
    _prctl(PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    keep = 1 << CAP_DAC_READ_SEARCH
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)(keep, keep, keep, 0, 0, 0)  # effective, permitted, inheritable; then the high halves
    if ctypes.CDLL(None).capset(header, sets) == 0:
        _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_READ_SEARCH)
    else:  # root of a container that has no such right to keep: drop all
        ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)())


def _tasks_of_this_user() -> int:
    count = 0
    for entry in _processes():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            count += len(list((entry / "task").iterdir())) if entry.stat().st_uid == os.getuid() else 0
    return count


def _kill_children() -> None:
    """Kill every child, and again those that it leaves to us, until there is none."""
    while children := [int(entry.name) for entry in _processes() if _parent(entry) == os.getpid()]:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except OSError:  # it has ended meanwhile
        return 0


def _processes() -> list[Path]:
    return [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _tell(request: dict, end: dict) -> None:
    os.write(request["told"], json.dumps(end).encode())


def _prctl(option: int, *values: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, *(ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4])):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    _supervise(json.loads(sys.argv[1]))
