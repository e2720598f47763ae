"""Locks of extensions that are compiled at their first use, such as DeepSpeed's: who holds one, and whether anybody does.

torch's `FileBaton` (torch 2.13, utils/file_baton.py) is a file that exists while a process compiles. A process that is
killed leaves it, and all others wait for it without end and without a word. Its holder has it open, so /proc tells
whether there is one; on a shared folder it may be on another machine, where only the age of the build's files tells.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import EXIT_FAILED

SHARED = (
    "nfs",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "cifs",
    "smb",
    "fuse",
    "9p",
    "glusterfs",
    "virtiofs",
)  # file systems
OLD = 600.0  # seconds without a new file, after which nobody compiles on a shared folder either


def remove_stale() -> list[str]:
    """Remove the locks that nobody holds, before anything waits for them: a process that waited would miss the result.

    Returns:
        A line for each.
    """
    return [
        f"removed {lock}: the process that compiled there was killed" for lock in _locks() if _remove_if_stale(lock)
    ]


def explain() -> str | None:
    """Say what the main thread waits for in `FileBaton.wait`. Ends this process where it would wait without end."""
    lock = _awaited()
    if lock is None:
        own = [lock.parent.name for lock in _locks() if os.getpid() in _holders(lock)]
        return f"{own[0]} is compiled" if own else None
    if holders := _holders(lock):
        return f"{lock.parent.name} is compiled by pid {holders[0]} (lock {lock})"
    if not _remove_if_stale(lock):
        return f"{lock}: compiled on another machine, as far as can be seen here" if lock.exists() else None
    print(
        f"error: the process that compiled {lock.parent.name} was killed meanwhile\n"
        f"where: {lock}, which is removed now\n"
        "fix:   start the same command again",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_FAILED)


def _awaited() -> Path | None:
    """The lock that the main thread waits for now."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame:
        baton = frame.f_locals.get("self")
        if frame.f_code.co_name == "wait" and type(baton).__name__ == "FileBaton":
            return Path(baton.lock_file_path)
        frame = frame.f_back
    return None


def _locks() -> list[Path]:
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    return sorted(Path(root).glob("*/lock")) if root else sorted(cache.glob("*/*/lock"))


def _remove_if_stale(lock: Path) -> bool:
    """Remove a lock without a holder; one that was taken meanwhile is another file, and stays."""
    with contextlib.suppress(OSError):
        seen = lock.stat()
        if not _holders(lock) and not _may_be_elsewhere(lock) and _same(lock.stat(), seen):
            lock.unlink()
            return True
    return False


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_ino, one.st_ctime_ns) == (other.st_ino, other.st_ctime_ns)


def _holders(lock: Path) -> list[int]:
    """Processes that have the lock open, and compilers that a killed one has left at work in its folder."""
    places = {str(lock), os.path.realpath(lock), os.path.realpath(lock.parent)}
    return sorted({pid for pid, place in _open_places() if place in places})


def _open_places() -> Iterator[tuple[int, str]]:
    for process in Path("/proc").glob("[0-9]*"):
        for pattern in ("fd/*", "cwd"):
            with contextlib.suppress(OSError):  # another user's, or one that has just ended
                for link in process.glob(pattern):
                    with contextlib.suppress(OSError):
                        yield int(process.name), str(link.readlink())


def _may_be_elsewhere(lock: Path) -> bool:
    if not _file_system(lock).startswith(SHARED):
        return False
    newest = max(file.stat().st_mtime for file in lock.parent.iterdir())
    return time.time() - newest < OLD


def _file_system(path: Path) -> str:
    """The type of the file system that a path is on."""
    import psutil

    real = os.path.realpath(path)
    mounts = [mount for mount in psutil.disk_partitions(all=True) if Path(real).is_relative_to(mount.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else ""
