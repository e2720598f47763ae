"""Start the doctor's ranks of one machine, wait for them, and end those that take too long.

The ranks leave in a folder of this machine, which is empty before and gone after:

    job.json                  what they are to do            machine.json     what the command has found here meanwhile
    logs/heartbeats/          which stage each is in         rank-00001.json  what each has found, by stage
    log-00001.txt             what each printed              ended.json       how the launcher's first worker failed

python -m manyrank.tools.doctor.launch FOLDER     runs the launcher of FOLDER/argv.json
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import EXIT_FAILED
from ...launch.command import LaunchPlan, run_in_process
from ...signals import die_with_parent
from ...training.watchdog import DONE, Beat, beats

if TYPE_CHECKING:
    import psutil

LAUNCHER_LOG = "launcher.txt"
BEATS = Path("logs", "heartbeats")


class How(StrEnum):
    DONE = "done"
    DIED = "died"  # a rank ended with an error or by a signal
    LATE = "late"  # the time was over
    APART = "apart"  # the machines did not meet


@dataclass(frozen=True)
class Ended:
    """How the ranks of this machine came to their end.

    Attributes:
        rank: that failed first; None: it was the launcher that failed.
        code: its exit code, or minus the signal that ended it.
        words: what the launcher said, where no rank can.
    """

    how: How
    rank: int | None = None
    code: int = 0
    words: str = ""


@dataclass(frozen=True)
class Patience:
    """Seconds: for the machines to meet, and then for the ranks to come to their end."""

    meeting: float
    ranks: float


class Ranks:
    """The ranks of this machine, from their start to their end. A context: nothing of them outlives it."""

    def __init__(self, launch: LaunchPlan, folder: Path) -> None:
        self.folder = folder
        (folder / "argv.json").write_text(json.dumps(launch.argv))
        self.alone = launch.argv[0] == sys.executable  # one rank, without a launcher
        argv = launch.argv if self.alone else (sys.executable, "-m", "manyrank.tools.doctor.launch", str(folder))
        env = {**os.environ, **launch.env, "TMPDIR": str(folder)}  # launchers and libraries leave folders there
        with (folder / LAUNCHER_LOG).open("w") as log:
            self.process = subprocess.Popen(
                argv,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self.started = time.monotonic()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error) -> None:
        self.end()

    def wait(self, patience: Patience) -> Ended:
        """Wait until they are done, or their time is over."""
        deadline, met = self.started + patience.meeting + patience.ranks, False
        while self.process.poll() is None and time.monotonic() < deadline:
            if not met and beats(self.folder / BEATS):
                met, deadline = True, time.monotonic() + patience.ranks
            time.sleep(0.1)
        if self.process.poll() is None:
            self.end()
            return Ended(How.LATE if met else How.APART)
        return self._ended(self.process.returncode)

    def end(self) -> None:
        """End what still runs: the workers have sessions of their own, and may have lost their launcher."""
        import psutil

        family = self._family()
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=10)
        self.process.wait()

    def _family(self) -> list[psutil.Process]:
        """The launcher and all below it; and the ranks, who have this folder's name as an argument."""
        import psutil

        named = [
            found for found in psutil.process_iter(["cmdline"]) if str(self.folder) in (found.info["cmdline"] or ())
        ]
        below = []
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(self.process.pid).children(recursive=True)
        return list({*named, *below})

    def _ended(self, code: int) -> Ended:
        if code == 0:
            return Ended(How.DONE)
        told = self.folder / "ended.json"
        if told.exists():
            content = json.loads(told.read_text())
            return Ended(**{**content, "how": How(content["how"])})
        words = (self.folder / LAUNCHER_LOG).read_text().strip().splitlines()
        return Ended(How.DIED, 0 if self.alone else None, code, words[-1] if words else "")


def unfinished(folder: Path) -> list[Beat]:
    """The last sign of each rank of this machine that did not come to its end, those first that have come least far."""
    here = [beat for beat in beats(folder / BEATS) if beat.phase != DONE]
    return sorted(here, key=lambda beat: (beat.count, beat.rank))


def last_words(folder: Path, rank: int, lines: int = 20) -> str:
    """The end of what a rank printed."""
    log = folder / f"log-{rank:05d}.txt"
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""


def main(folder: Path) -> int:
    """Run the launcher in this process, and write how its first worker failed."""
    logging.disable(logging.ERROR)  # the agents' report of a failure; it is told in the doctor's words
    argv = tuple(json.loads((folder / "argv.json").read_text()))
    ended = _launched(argv)
    if ended.how == How.DONE:
        return 0
    (folder / "ended.json").write_text(json.dumps(asdict(ended)))
    return EXIT_FAILED


def _launched(argv: tuple[str, ...]) -> Ended:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    ended = Ended(How.DIED)
    try:
        run_in_process(argv)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        return replace(ended, rank=rank, code=failure.exitcode)
    except (RendezvousError, ConnectionError) as error:  # accelerate looks for the port before it starts anything
        return Ended(How.APART, words=" ".join(str(error).split()))
    return Ended(How.DONE)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
