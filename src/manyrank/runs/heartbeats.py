"""Signs of life of every rank from its first line on. Those of a machine's ranks meet in memory; one file a machine is shared.

    /dev/shm, or the temporary folder    the machine's board: a slot of WIDTH bytes for each rank, written at every phase.
                                         Its name goes once all ranks have it open, so that nothing is left of a killed run.
    OUTPUT_DIR/logs/heartbeats/
        machine-00008.jsonl              the board of the machine whose first rank is 8, copied by one of its ranks every
                                         PUBLISHED seconds, and by every rank when it ends
        stacks-00009.txt                 a rank's main thread's Python stack, when it or another rank hangs

File operations on the shared folder, for 512 ranks on 64 machines: 64 writes in 5 s, and no read while ranks advance. (A
file for each rank, read by each rank, was 512 x 512 reads in 5 s, and 512 writes at every phase.) A rank that finds its
machine waiting reads the other 63 files every 5 s until one of its machine has named the culprit. On its own machine each
rank reads one board in memory every 5 s.

A rank without others that it has met (those of `manyrank doctor`) writes a file of its own, rank-00009.jsonl, at each phase.
Until the run's folder is certainly this run's, signs are kept in the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .run_folder import HEARTBEATS, writable

WIDTH = 1024  # bytes of a slot, so that one write replaces all of the heartbeat before
LONGEST = 60  # characters of a phase in a file; escaped, they fit into a slot
PUBLISHED = 5.0  # seconds between two copies of a machine's board in the shared folder
DONE = "done"


@dataclass(frozen=True)
class Heartbeat:
    """A rank's phase at `time`, in seconds since 1970; `count` numbers its heartbeats.

    `quiet`: seconds for which its machine had seen no other when it published this one, by that machine's own clock.
    """

    count: int
    rank: int
    host: str
    pid: int
    step: int
    phase: str
    time: float
    quiet: float = 0.0


class Board:
    """A file of heartbeats, one in each slot."""

    def __init__(self, path: Path, slot: int) -> None:
        self.path, self.slot = path, slot
        self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(self.file, slot * WIDTH, WIDTH)  # a disk that is full later changes nothing
        except OSError:
            os.close(self.file)
            raise

    def write(self, beat: Heartbeat) -> None:
        os.pwrite(self.file, _line(beat), self.slot * WIDTH)

    def read(self) -> list[Heartbeat]:
        return _beats(os.pread(self.file, os.fstat(self.file).st_size, 0))

    def claim(self, number: int) -> bool:
        """Take a number that no other process has; it is free again when this one ends."""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError:
            return False
        return True

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep the machine's other ranks out."""
        fcntl.flock(self.file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self.file, fcntl.LOCK_UN)


def local_board(run: str, host: str, rank: int) -> Board:
    """The board of this machine's ranks of a run, where files are in memory; ranks that see another memory have another."""
    name = f"manyrank-{run}-{host}"
    with contextlib.suppress(OSError):  # a container without it, or with little of it
        return Board(Path("/dev/shm", name), rank)
    return Board(Path(tempfile.gettempdir(), name), rank)


class HeartbeatWriter:
    """This rank's sign of life: in the process, and on its machine's board once it is attached to a run's folder."""

    def __init__(self, rank: int) -> None:
        self.rank, self.host, self.count = rank, socket.gethostname(), 0
        self.folder: Path | None = None
        self.board: Board | None = None
        self.machine: Path | None = None  # the copy of the board
        self.lock = threading.Lock()  # the watch reads and publishes while this thread may end
        self.last, self.since = self._beat(0, "starting"), time.monotonic()
        # What a phase before the first step waits for, where it can be looked up; None: nothing to add.
        self.explain: Callable[[], str | None] = lambda: None

    def attach(self, output_dir: Path, *, run: str | None = None, meet: Callable[[], object] | None = None) -> None:
        """Write the signs where others see them too. On SIGUSR2 the process then writes its main thread's stack.

        Args:
            run: a name from `new_run`, the same on all ranks; None writes a file for this rank alone.
            meet: waits for all ranks; with `run`.

        Raises:
            UserError: there is no room for it.
        """
        folder = output_dir / HEARTBEATS
        with writable(output_dir):
            folder.mkdir(parents=True, exist_ok=True)
            self.stacks = (folder / f"stacks-{self.rank:05d}.txt").open("a")
            own = folder / f"rank-{self.rank:05d}.jsonl"
            self.board = local_board(run, self.host, self.rank) if run else Board(own, 0)
        # Of the main thread alone: the handler runs without the GIL, and reading a thread that just ends is a crash
        # (seen with Python 3.11).
        faulthandler.register(signal.SIGUSR2, file=self.stacks, all_threads=False)
        self.board.write(self.last)
        if meet:
            meet()
            self._share(self.board, output_dir, folder)
        self.folder = folder

    def _share(self, board: Board, output_dir: Path, folder: Path) -> None:
        """Take the board's name away, and make its copy in the run's folder."""
        ranks = [beat.rank for beat in board.read()]
        board.path.unlink(missing_ok=True)
        self.machine = folder / f"machine-{min(ranks):05d}.jsonl"
        with writable(output_dir):
            self.copy = os.open(self.machine, os.O_WRONLY | os.O_CREAT, 0o644)
            os.posix_fallocate(self.copy, 0, len(ranks) * WIDTH)
            if self.rank == min(ranks):
                self._copy_board({})

    def beat(self, step: int, phase: str) -> None:
        self.count += 1
        self.last, self.since = self._beat(step, phase), time.monotonic()
        if self.board:
            self.board.write(self.last)

    def beats(self) -> list[Heartbeat]:
        """The last signs of this machine's ranks, as far as they can be seen from here."""
        with self.lock:
            return self.board.read() if self.board else [self.last]

    def first_to_speak(self, least: Heartbeat) -> bool:
        """Whether this is the first of the machine's ranks to look into a wait for that sign."""
        with self.lock:
            return self.board is None or self.board.claim((least.count << 24) + least.rank)

    def publish(self, quiet: dict[int, float]) -> str | None:
        """Copy the board to the shared folder.

        Args:
            quiet: seconds for which a rank's sign is the same.

        Returns:
            Why it cannot be written: a run that needs the disk no more does not end for that.
        """
        try:
            self._copy_board(quiet)
        except OSError as error:
            return f"WARNING: other machines see no signs of life of this one: {error}"
        return None

    def _copy_board(self, quiet: dict[int, float]) -> None:
        with self.lock:
            if self.board and self.machine:
                with self.board.alone():  # so that the last to end copies the last of all
                    lines = [_line(replace(b, quiet=quiet.get(b.rank, 0.0))) for b in self.board.read()]
                    os.pwrite(self.copy, b"".join(lines), 0)

    @contextlib.contextmanager
    def waiting(self, phase: str, explain: Callable[[], str | None]) -> Iterator[None]:
        """A phase of the start whose wait can be explained while it lasts."""
        self.beat(0, phase)
        self.explain, before = explain, self.explain
        try:
            yield
        finally:
            self.explain = before

    def stop(self) -> None:
        """Say that this rank has ended well or in an error that it tells itself."""
        self.beat(0, DONE)
        if problem := self.publish({}):
            print(problem, file=sys.stderr, flush=True)
        self._detach()

    def withdraw(self) -> None:
        """Remove this rank's files again: the run has not begun, and leaves nothing behind."""
        folder, machine = self.folder, self.machine
        self._detach()
        self.beat(0, DONE)
        if folder:
            for file in (folder / f"stacks-{self.rank:05d}.txt", folder / f"rank-{self.rank:05d}.jsonl", machine):
                if file:
                    file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others' files are still there
                for empty in (folder, folder.parent, folder.parent.parent):
                    empty.rmdir()

    def _detach(self) -> None:
        """Close the files; SIGUSR2 stays registered, since one that another rank sends now would end this process."""
        with self.lock:
            if self.board:
                os.close(self.board.file)
            if self.machine:
                os.close(self.copy)
            self.folder = self.board = self.machine = None

    def _beat(self, step: int, phase: str) -> Heartbeat:
        return Heartbeat(self.count, self.rank, self.host, os.getpid(), step, phase, time.time())


def new_run(output_dir: Path) -> str:
    """Remove the signs of life of earlier runs in a folder, and return a name for those of this one. On one rank alone.

    Raises:
        UserError: they cannot be removed.
    """
    with writable(output_dir):
        for file in (output_dir / HEARTBEATS).glob("*.jsonl"):
            file.unlink(missing_ok=True)
    return secrets.token_hex(8)


def beats(folder: Path) -> list[Heartbeat]:
    """The last sign of life of each rank that is published in a folder, by rank."""
    found = []
    for file in folder.glob("*.jsonl"):
        with contextlib.suppress(OSError):  # removed meanwhile
            found += _beats(file.read_bytes())
    return sorted(found, key=lambda beat: beat.rank)


def _line(beat: Heartbeat) -> bytes:
    text = json.dumps(asdict(replace(beat, phase=beat.phase[:LONGEST], quiet=round(beat.quiet, 1))))
    return text.ljust(WIDTH - 1).encode() + b"\n"


def _beats(content: bytes) -> list[Heartbeat]:
    heartbeats = []
    for start in range(0, len(content), WIDTH):
        with contextlib.suppress(ValueError, TypeError):  # an empty slot, or one that is being written
            heartbeats.append(Heartbeat(**json.loads(content[start : start + WIDTH])))
    return heartbeats
