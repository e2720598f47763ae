"""Signs of life of every rank, and a watch on each machine that names the rank which gives none.

    OUTPUT_DIR/logs/heartbeats/rank-00001.json      where the rank is: step, phase, time; written over at each change
    OUTPUT_DIR/logs/heartbeats/stacks-00001.txt     its main thread's Python stack, when it or another rank hangs

A rank that hangs makes all others wait for it in a collective. All give the same signs in the same order, so the one that
has given the fewest is the culprit.
Every rank has a thread that watches; the first one on a machine to notice speaks for it. It ends nothing: a slow rank may
come back, and a dead one ends with the collective's time-out.
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
from dataclasses import asdict, dataclass
from pathlib import Path

from .run_folder import writable

WIDTH = 512  # bytes of a heartbeat, so that one write replaces all of the one before
DONE = "done"


@dataclass(frozen=True)
class Beat:
    """Where a rank was at `time`, in seconds since 1970; `count` of the signs that it has given."""

    count: int
    rank: int
    host: str
    pid: int
    step: int
    phase: str
    time: float


class Heart:
    """This rank's sign of life. On SIGUSR2 the process writes its main thread's stack.

    Raises:
        UserError: there is no room for it.
    """

    def __init__(self, output_dir: Path, rank: int) -> None:
        self.folder, self.rank, self.host = output_dir / "logs" / "heartbeats", rank, socket.gethostname()
        with writable(output_dir):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = os.open(self.folder / f"rank-{rank:05d}.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            self.stacks = (self.folder / f"stacks-{rank:05d}.txt").open("a")
            os.posix_fallocate(self.file, 0, WIDTH)  # a disk that is full later changes nothing
        self.count = 0
        # Of the main thread alone: the handler runs without the GIL, and reading a thread that just ends is a crash
        # (seen with Python 3.11).
        faulthandler.register(signal.SIGUSR2, file=self.stacks, all_threads=False)

    def beat(self, step: int, phase: str) -> None:
        self.count += 1
        told = Beat(self.count, self.rank, self.host, os.getpid(), step, phase, time.time())
        os.pwrite(self.file, json.dumps(asdict(told)).ljust(WIDTH).encode(), 0)

    def stop(self) -> None:
        self.beat(0, DONE)
        faulthandler.unregister(signal.SIGUSR2)
        os.close(self.file)
        self.stacks.close()


class Watchdog(threading.Thread):
    """Watches the heartbeats of all ranks.

    Args:
        patience: seconds without a sign of life after which a rank is named.
    """

    def __init__(self, heart: Heart, *, patience: float) -> None:
        super().__init__(daemon=True, name="watchdog")
        self.heart, self.patience = heart, patience
        self.over = threading.Event()
        self.started = time.time()

    def run(self) -> None:
        while not self.over.wait(min(5.0, self.patience / 4)):
            found = [beat for beat in beats(self.heart.folder) if beat.phase != DONE and beat.time > self.started]
            if found and (report := self._report(found)):
                print(report, file=sys.stderr, flush=True)

    def stop(self) -> None:
        self.over.set()

    def _report(self, found: list[Beat]) -> str | None:
        """What to say of a rank that hangs, once on each machine; its stacks are asked for."""
        last, now = min(found, key=lambda beat: (beat.count, beat.time)), time.time()
        if now - last.time < self.patience or not self._first_to_say(last):
            return None
        for beat in found:
            if beat.host == self.heart.host:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(beat.pid, signal.SIGUSR2)
        named = [beat for beat in found if beat.count == last.count]  # of several none can be told from the others
        who = " or ".join(f"rank {beat.rank} (host {beat.host}, pid {beat.pid})" for beat in named)
        others = ", ".join(f"rank {beat.rank} in {beat.phase}" for beat in found if beat not in named)
        return (
            f"\nWARNING: {who} has given no sign of life for {now - last.time:.0f} s: step {last.step}, {last.phase}. "
            f"Waiting: {others or 'nobody'}. Stacks: {self.heart.folder}/stacks-*.txt"
        )

    def _first_to_say(self, last: Beat) -> bool:
        name = f"hang-{self.heart.host}-{last.rank}-{last.step}-{last.time:.3f}"
        try:
            os.close(os.open(self.heart.folder / name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:  # a full disk: rather said twice than not at all
            return True
        return True


def beats(folder: Path) -> list[Beat]:
    """The last sign of life of each rank."""
    found = []
    for file in sorted(folder.glob("rank-*.json")):
        try:
            found.append(Beat(**json.loads(file.read_text())))
        except (OSError, ValueError, TypeError):  # being written for the first time
            continue
    return found
