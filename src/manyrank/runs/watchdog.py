"""Signs of life of every rank from its first line on, and a watch that names what a start waits for and the rank that hangs.

    OUTPUT_DIR/logs/heartbeats/rank-00001.json      where the rank is: step, phase, time; written over at each change
    OUTPUT_DIR/logs/heartbeats/stacks-00001.txt     its main thread's Python stack, when it or another rank hangs

A rank that hangs makes all others wait for it in a collective. All give the same signs in the same order, so the one that
has given the fewest is the culprit. Every rank has a thread that watches; the first one on a machine to notice speaks for
it. It ends nothing: a slow rank may come back, and a dead one ends with the collective's time-out.

Before the first step a rank may wait for something outside of the run: a download, a compiler, another machine. After
NOTICE seconds in one phase the watch says which. Until the run's folder is certainly this run's, signs are kept in memory.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .run_folder import HEARTBEATS, writable

WIDTH = 512  # bytes of a heartbeat, so that one write replaces all of the one before
DONE = "done"
NOTICE = (
    10.0  # seconds in one phase before the first step, after which the watch says what it is; then at each doubling
)


@dataclass(frozen=True)
class Heartbeat:
    """A rank's phase at `time`, in seconds since 1970; `count` numbers its heartbeats."""

    count: int
    rank: int
    host: str
    pid: int
    step: int
    phase: str
    time: float


class HeartbeatWriter:
    """This rank's sign of life: in memory, and in the run's folder once it is attached to one."""

    def __init__(self, rank: int) -> None:
        self.rank, self.host, self.count = rank, socket.gethostname(), 0
        self.folder: Path | None = None
        self.last = self._beat(0, "starting")
        # What a phase before the first step waits for, where it can be looked up; None: nothing to add.
        self.explain: Callable[[], str | None] = lambda: None

    def attach(self, output_dir: Path) -> None:
        """Write the signs into the run's folder too. On SIGUSR2 the process then writes its main thread's stack.

        Raises:
            UserError: there is no room for it.
        """
        folder = output_dir / HEARTBEATS
        with writable(output_dir):
            folder.mkdir(parents=True, exist_ok=True)
            self.file = os.open(folder / f"rank-{self.rank:05d}.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            self.stacks = (folder / f"stacks-{self.rank:05d}.txt").open("a")
            os.posix_fallocate(self.file, 0, WIDTH)  # a disk that is full later changes nothing
        # Of the main thread alone: the handler runs without the GIL, and reading a thread that just ends is a crash
        # (seen with Python 3.11).
        faulthandler.register(signal.SIGUSR2, file=self.stacks, all_threads=False)
        self.folder = folder
        self._write()

    def beat(self, step: int, phase: str) -> None:
        self.count += 1
        self.last = self._beat(step, phase)
        if self.folder:
            self._write()

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
        self._detach()

    def withdraw(self) -> None:
        """Remove this rank's files again: the run has not begun, and leaves nothing behind."""
        folder = self.folder
        self.stop()
        if folder:
            for own in (f"rank-{self.rank:05d}.json", f"stacks-{self.rank:05d}.txt", f"hang-{self.host}-*"):
                for file in folder.glob(own):
                    file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others' files are still there
                for empty in (folder, folder.parent, folder.parent.parent):
                    empty.rmdir()

    def _detach(self) -> None:
        if self.folder:  # SIGUSR2 stays registered: one that another rank sends now would end this process
            self.folder = None
            os.close(self.file)

    def _beat(self, step: int, phase: str) -> Heartbeat:
        return Heartbeat(self.count, self.rank, self.host, os.getpid(), step, phase, time.time())

    def _write(self) -> None:
        os.pwrite(self.file, json.dumps(asdict(self.last)).ljust(WIDTH).encode(), 0)


class Watchdog(threading.Thread):
    """Watches the heartbeats of all ranks.

    Args:
        patience: seconds without a sign of life after which a rank is named.
        notices: whether this rank says what its start waits for; one on each machine is enough.
    """

    def __init__(self, heartbeat: HeartbeatWriter, *, patience: float, notices: bool = False) -> None:
        super().__init__(daemon=True, name="watchdog")
        self.heartbeat, self.patience, self.notices = heartbeat, patience, notices
        self.over = threading.Event()
        self.started = heartbeat.last.time
        self.noticed = heartbeat.last, NOTICE  # the phase of the last notice, and the seconds to the next
        self.named: Heartbeat | None = None

    def __enter__(self) -> Watchdog:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join(5)

    def run(self) -> None:
        while not self.over.wait(min(1.0 if self._starting else 5.0, self.patience / 4)):
            if self.notices and self._starting and (notice := self._notice()):
                print(notice, file=sys.stderr, flush=True)
            folder = self.heartbeat.folder
            heartbeats = beats(folder) if folder else [self.heartbeat.last]
            heartbeats = [beat for beat in heartbeats if beat.phase != DONE and beat.time >= self.started]
            if heartbeats and (report := self._report(heartbeats)):
                print(report, file=sys.stderr, flush=True)

    @property
    def _starting(self) -> bool:
        return self.heartbeat.last.step == 0 and self.heartbeat.last.phase != DONE

    def _notice(self) -> str | None:
        """Name what the start waits for, at NOTICE seconds in a phase and at each doubling."""
        beat, (before, due) = self.heartbeat.last, self.noticed
        due = due if before == beat else NOTICE
        waited = time.time() - beat.time
        if waited < due:
            self.noticed = beat, due
            return None
        self.noticed = beat, 2 * due
        reason = self.heartbeat.explain()
        return f"still {beat.phase} after {waited:.0f} s{f': {reason}' if reason else ''}"

    def _report(self, heartbeats: list[Heartbeat]) -> str | None:
        """Describe a rank that hangs, once on each machine, and ask for its stacks."""
        least, now = min(beat.count for beat in heartbeats), time.time()
        named = [beat for beat in heartbeats if beat.count == least]  # of several none can be told from the others
        last = max(named, key=lambda beat: beat.time)  # one that has just come there holds nobody up
        if now - last.time < self.patience or not self._first_to_say(last):
            return None
        who = " or ".join(f"rank {beat.rank} (host {beat.host}, pid {beat.pid})" for beat in named)
        others = ", ".join(f"rank {beat.rank} in {beat.phase}" for beat in heartbeats if beat not in named)
        where = f"step {last.step}" if last.step else "before the first step"
        return f"\nWARNING: {who} has given no sign of life for {now - last.time:.0f} s: {where}, {last.phase}." + (
            f" Waiting: {others or 'none'}. {self._ask_for_stacks(heartbeats)}" if self.heartbeat.folder else ""
        )

    def _ask_for_stacks(self, heartbeats: list[Heartbeat]) -> str:
        for beat in heartbeats:
            if beat.host == self.heartbeat.host:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(beat.pid, signal.SIGUSR2)
        return f"Stacks: {self.heartbeat.folder}/stacks-*.txt"

    def _first_to_say(self, last: Heartbeat) -> bool:
        if not self.heartbeat.folder:
            first, self.named = self.named != last, last
            return first
        name = f"hang-{self.heartbeat.host}-{last.rank}-{last.step}-{last.time:.3f}"
        try:
            os.close(os.open(self.heartbeat.folder / name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:  # a full disk: rather said twice than not at all
            return True
        return True


def beats(folder: Path) -> list[Heartbeat]:
    """The last sign of life of each rank."""
    heartbeats = []
    for file in sorted(folder.glob("rank-*.json")):
        try:
            heartbeats.append(Heartbeat(**json.loads(file.read_text())))
        except (OSError, ValueError, TypeError):  # being written for the first time
            continue
    return heartbeats
