"""A watch that names what a start waits for, and the rank that hangs.

A rank that hangs makes all others wait for it in a collective. All give the same signs of life (`heartbeats`) in the same
order, so the one that has given the fewest is the culprit. Every rank has a thread that watches its machine's ranks; the
first one to notice that they wait looks at the other machines and speaks for its own. How long a rank is silent is measured
by the clock of who watches it, from the moment when its count was first seen; clocks of machines, and one that is set back,
do not matter. The watch ends nothing: a slow rank may come back, and a dead one ends with the collective's time-out.

Before the first step a rank may wait for something outside of the run: a download, a compiler, another machine. After
NOTICE seconds in one phase the watch says which.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Hashable, Iterable

from . import logs
from .heartbeats import DONE, PUBLISHED, Heartbeat, HeartbeatWriter, beats

NOTICE = (
    10.0  # seconds in one phase before the first step, after which the watch says what it is; then at each doubling
)


class Silence:
    """How long each rank's sign has been the same, by this process's clock."""

    def __init__(self) -> None:
        self.seen: dict[Hashable, tuple[Hashable, float]] = {}

    def of(self, beat: Heartbeat) -> float:
        """Seconds for which a rank has given no other sign: as published, and since that was first seen here."""
        now, sign = time.monotonic(), (beat.pid, beat.count, beat.quiet)
        before, since = self.seen.get(beat.rank, (None, now))
        since = since if before == sign else now
        self.seen[beat.rank] = sign, since
        return beat.quiet + now - since


class Watchdog(threading.Thread):
    """Watches the heartbeats of all ranks.

    Args:
        patience: seconds without a sign of life after which a rank is named.
        notices: whether this rank says what its start waits for, and publishes its machine's signs; one on each machine.
    """

    def __init__(self, heartbeat: HeartbeatWriter, *, patience: float, notices: bool = False) -> None:
        super().__init__(daemon=True, name="watchdog")
        self.heartbeat, self.patience, self.notices = heartbeat, patience, notices
        self.over = threading.Event()
        self.noticed = heartbeat.last, NOTICE  # the phase of the last notice, and the seconds to the next
        self.here, self.elsewhere = Silence(), Silence()
        self.published = 0.0
        self.unpublished: str | None = None  # why the last copy could not be written
        self.speaks_of: tuple[int, int] | None = None  # the wait of this machine that this rank looks into
        self.named: list[tuple[int, int]] = []

    def __enter__(self) -> Watchdog:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join(5)

    def run(self) -> None:
        while not self.over.wait(min(1.0 if self._starting else 5.0, self.patience / 4)):
            local = [(beat, self.here.of(beat)) for beat in self.heartbeat.beats()]
            if self.notices:
                self._say(self._notice() if self._starting else None)
                self._say(self._publish({beat.rank: quiet for beat, quiet in local}))
            hang = self._report([(beat, quiet) for beat, quiet in local if beat.phase != DONE])
            self._say(hang)
            if hang and self.heartbeat.folder:
                logs.keep_warning(self.heartbeat.folder.parents[1], hang)

    def _say(self, text: str | None) -> None:
        if text:
            print(text, file=sys.stderr, flush=True)

    @property
    def _starting(self) -> bool:
        return self.heartbeat.last.step == 0 and self.heartbeat.last.phase != DONE

    def _publish(self, quiet: dict[int, float]) -> str | None:
        """Copy this machine's signs for the others; say once why it cannot be done."""
        if time.monotonic() - self.published < min(PUBLISHED, self.patience / 4):
            return None
        self.published, before = time.monotonic(), self.unpublished
        self.unpublished = self.heartbeat.publish(quiet)
        return self.unpublished if self.unpublished != before else None

    def _notice(self) -> str | None:
        """Name what the start waits for, at NOTICE seconds in a phase and at each doubling."""
        beat, (before, due) = self.heartbeat.last, self.noticed
        due = due if before == beat else NOTICE
        waited = time.monotonic() - self.heartbeat.since
        if waited < due:
            self.noticed = beat, due
            return None
        self.noticed = beat, 2 * due
        reason = self.heartbeat.explain()
        return f"still {beat.phase} after {waited:.0f} s{f': {reason}' if reason else ''}"

    def _report(self, local: list[tuple[Heartbeat, float]]) -> str | None:
        """Describe a rank that hangs, once on each machine, and ask for its stacks."""
        if not local or _silent(_least(local)) < self.patience:
            return None
        if not self._looks_into(_least(local)[0][0]):
            return None
        every = [*local, *self._others({beat.rank for beat, _ in local})]
        least = _least(every)  # of several none can be told from the others
        culprit = [(beat.rank, beat.count) for beat, _ in least]
        if _silent(least) < self.patience or culprit == self.named:
            return None
        self.named = culprit
        return self._described(every, [beat for beat, _ in least], _silent(least))

    def _looks_into(self, least: Heartbeat) -> bool:
        """Whether this rank speaks for its machine about a wait: the first that asks does."""
        wait = least.rank, least.count
        if self.speaks_of != wait and self.heartbeat.first_to_speak(least):
            self.speaks_of = wait
        return self.speaks_of == wait

    def _others(self, ranks: set[int]) -> list[tuple[Heartbeat, float]]:
        """The signs of the other machines."""
        folder = self.heartbeat.folder
        published = beats(folder) if folder and self.heartbeat.machine else []
        others = [beat for beat in published if beat.rank not in ranks and beat.phase != DONE]
        return [(beat, self.elsewhere.of(beat)) for beat in others]

    def _described(self, every: list[tuple[Heartbeat, float]], named: list[Heartbeat], silent: float) -> str:
        who = " or ".join(f"rank {beat.rank} (host {beat.host}, pid {beat.pid})" for beat in named)
        last = named[-1]
        where = f"step {last.step}" if last.step else "before the first step"
        said = f"\nWARNING: {who} has given no sign of life for {silent:.0f} s: {where}, {last.phase}."
        if not self.heartbeat.folder:
            return said
        waiting = _by_phase(beat for beat, _ in every if beat not in named)
        return f"{said} Waiting: {waiting or 'none'}. {self._ask_for_stacks()}"

    def _ask_for_stacks(self) -> str:
        for beat in self.heartbeat.beats():
            if beat.phase != DONE:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(beat.pid, signal.SIGUSR2)
        return f"Stacks: {self.heartbeat.folder}/stacks-*.txt"


def _least(heartbeats: list[tuple[Heartbeat, float]]) -> list[tuple[Heartbeat, float]]:
    least = min(beat.count for beat, _ in heartbeats)
    return [(beat, quiet) for beat, quiet in heartbeats if beat.count == least]


def _silent(heartbeats: list[tuple[Heartbeat, float]]) -> float:
    """Seconds of the last that came there: one that has just come holds nobody up."""
    return min(quiet for _, quiet in heartbeats)


def _by_phase(heartbeats: Iterable[Heartbeat]) -> str:
    ranks: dict[str, list[int]] = {}
    for beat in heartbeats:
        ranks.setdefault(beat.phase, []).append(beat.rank)
    return ", ".join(f"rank {', '.join(map(str, numbers))} in {phase}" for phase, numbers in ranks.items())
