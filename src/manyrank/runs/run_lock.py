"""One run at a time in a folder: `run.lock` names the owner, also on shared folders without flock. No torch.

The owner creates the file and writes a beat into it every BEAT seconds. Whether an owner is alive is told by the process
table where it ran under the same kernel and in the same process namespace, else by whether its beat changes within DEAD
seconds. An owner that is gone loses the lock to the next run. One that finds another's name in its lock, since it slept
too long, ends itself at once: two runs in one folder would remove each other's checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..errors import EXIT_FAILED, UserError
from .run_folder import LOCK, writable

BEAT, DEAD = 5.0, 30.0  # seconds
SETTLE = 0.5  # seconds after which the last of several runs that take over the same lock has it
CLOCK = 5.0  # seconds by which the kernel's clock may have been set since
WIDTH = 512  # bytes of the file, so that one write replaces all of the one before


KINDS = {"token": str, "host": str, "pid": int, "started": float, "machine": str, "beat": int}


@dataclass(frozen=True)
class Owner:
    """A process that has, or had, a folder; `started` in seconds since 1970, `machine` its kernel and process namespace."""

    token: str
    host: str
    pid: int
    started: float
    machine: str
    beat: int = 0

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"host {self.host}, pid {self.pid}, started {since}"

    def is_alive(self) -> bool | None:
        """Return whether it runs, by the process table; None where this process cannot see it."""
        if self.machine != _machine():
            return None
        import psutil

        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < CLOCK  # else the number has gone to another process
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def refuse_if_held(output_dir: Path) -> None:
    """Refuse a folder in which a run of this machine works.

    Raises:
        UserError: it names the run.
    """
    owner = _read(output_dir / LOCK)
    if owner and owner.is_alive():
        raise _held(owner, output_dir)


def is_held(output_dir: Path) -> bool:
    """Return whether a run works in the folder; one whose process cannot be seen from here is judged by its last beat."""
    lock = output_dir / LOCK
    owner = _read(lock)
    alive = owner.is_alive() if owner else False
    if alive is None:
        with contextlib.suppress(OSError):  # released meanwhile
            return time.time() - lock.stat().st_mtime < DEAD
    return bool(alive)


@contextlib.contextmanager
def claimed(output_dir: Path) -> Iterator[None]:
    """Have the folder for this process while this lasts; what is made of its path goes again if it stays empty.

    Raises:
        UserError: another run has it, or the lock cannot be written.
    """
    new_folders = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    try:
        with writable(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
            own = _claim(output_dir)
    except BaseException:
        _remove_if_empty(output_dir, *new_folders)
        raise
    over = threading.Event()
    beats = threading.Thread(target=_keep, args=(output_dir, own, over), daemon=True, name="run lock")
    beats.start()
    try:
        yield
    finally:
        over.set()
        beats.join(BEAT)  # else it might write into the lock of the next owner
        _release(output_dir, own)
        _remove_if_empty(output_dir, *new_folders)


def _release(output_dir: Path, own: Owner) -> None:
    """Give the folder up if it is still this owner's."""
    owner = _read(output_dir / LOCK)
    if owner and owner.token == own.token:
        (output_dir / LOCK).unlink(missing_ok=True)


def _remove_if_empty(*folders: Path) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _claim(output_dir: Path) -> Owner:
    own, lock = _this_process(), output_dir / LOCK
    try:
        descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return _take_over(output_dir, own)
    os.close(descriptor)
    _write_or_remove(lock, own)
    return own


def _take_over(output_dir: Path, own: Owner) -> Owner:
    """The lock of a run that is gone.

    Raises:
        UserError: it is not gone, or another run was faster.
    """
    lock = output_dir / LOCK
    before = _read(lock, patient=True)
    if before and _lives(before, lock):
        raise _held(before, output_dir)
    if (now := _read(lock)) and (before is None or now.token != before.token):
        raise _held(now, output_dir)
    partial = lock.with_name(f"{LOCK}.{own.token}")
    partial.touch()
    _write_or_remove(partial, own)
    try:
        partial.replace(lock)
    except IsADirectoryError:
        partial.unlink()
        raise UserError(f"{lock} is a folder", where=f"output_dir {output_dir}", fix="remove it") from None
    time.sleep(SETTLE)
    if (now := _read(lock)) and now.token != own.token:
        raise _held(now, output_dir)
    gone = f"a run that is gone ({before})" if before else "a run that was killed while it made it"
    print(f"took over {lock} from {gone}", file=sys.stderr, flush=True)
    return own


def _lives(owner: Owner, lock: Path) -> bool:
    """Return whether an owner lives; waits for a heartbeat where its process cannot be seen."""
    alive = owner.is_alive()
    if alive is not None:
        return alive
    print(
        f"{lock} names {owner}: waiting up to {DEAD:.0f} s for a sign of life of that run", file=sys.stderr, flush=True
    )
    end = time.monotonic() + DEAD
    while time.monotonic() < end:
        time.sleep(0.2)
        if (now := _read(lock)) != owner:
            return now is not None
    return False


def _keep(output_dir: Path, own: Owner, over: threading.Event) -> None:
    """Write beats until it is over."""
    lock, number = output_dir / LOCK, 0
    while not over.wait(BEAT):
        owner = _read(lock)
        if owner and owner.token != own.token:
            print(f"stopped: {output_dir} was taken over by another run ({owner})", file=sys.stderr, flush=True)
            os._exit(EXIT_FAILED)
        number += 1
        if owner and not over.is_set():
            with contextlib.suppress(OSError):  # a full disk takes nothing from what is written already
                _write(lock, replace(own, beat=number))


def _held(owner: Owner, output_dir: Path) -> UserError:
    return UserError(
        f"another run works in this folder ({owner})",
        where=f"output_dir {output_dir}",
        fix=f"choose another --output_dir, or stop that run first: kill {owner.pid} on {owner.host}",
    )


def _read(lock: Path, *, patient: bool = False) -> Owner | None:
    """The owner; None where there is no lock, or one that nobody has finished writing (`patient`: within a second)."""
    end = time.monotonic() + (1.0 if patient else 0.0)
    while True:
        try:
            return _owner(json.loads(lock.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            if time.monotonic() >= end:
                return None
            time.sleep(0.05)


def _owner(values: dict) -> Owner:
    """The owner that a lock names; a TypeError or ValueError where it names none."""
    owner = Owner(**values)
    if any(type(getattr(owner, name)) is not kind for name, kind in KINDS.items()) or owner.pid <= 0:
        raise ValueError(f"no owner: {values}")
    return owner


def _write(lock: Path, owner: Owner) -> None:
    descriptor = os.open(lock, os.O_WRONLY)
    try:
        os.pwrite(descriptor, json.dumps(asdict(owner)).ljust(WIDTH).encode(), 0)
        os.fsync(descriptor)  # another machine reads it from the file server
    finally:
        os.close(descriptor)


def _write_or_remove(file: Path, owner: Owner) -> None:
    """Write a new file, or leave none: a disk that is full."""
    try:
        _write(file, owner)
    except OSError:
        file.unlink(missing_ok=True)
        raise


def _this_process() -> Owner:
    import psutil

    started = psutil.Process().create_time()
    return Owner(secrets.token_hex(8), os.uname().nodename, os.getpid(), started, _machine())


def _machine() -> str:
    """Identify a kernel and a process namespace; two containers may have one host name."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
