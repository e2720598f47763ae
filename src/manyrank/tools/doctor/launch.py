"""Start the doctor's ranks of one machine through the launcher, wait for them, and end those that take too long.

    python -m manyrank.tools.doctor.launch FOLDER      runs the launcher of FOLDER/argv.json

The ranks write into FOLDER, a temporary folder of this machine:

    logs/heartbeats/          which stage each is in         rank-00001.json  the checks of each
    launcher.txt              what all printed               ended.json       how the launcher's first worker failed
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import in_one_line
from ...launch.command import LaunchPlan, run_in_process
from ...runs.heartbeats import beats
from ...runs.run_folder import HEARTBEATS
from ...signals import die_with_parent

if TYPE_CHECKING:
    import psutil

LAUNCHER_LOG = "launcher.txt"
GONE = 10.0  # seconds that killed processes may take to end


@dataclass(frozen=True)
class Ended:
    """The end of this machine's ranks.

    Attributes:
        code: the exit code of the first that failed, or minus its signal; None: the time was over.
        rank: that failed first; None: the launcher itself failed.
        apart: why the machines did not meet, where they did not.
    """

    code: int | None
    rank: int | None = None
    apart: str = ""

    def __str__(self) -> str:
        who = "the launcher" if self.rank is None else f"rank {self.rank}"
        if self.code is None:
            return "the time was over"
        if self.apart:
            return f"the machines did not meet: {self.apart}"
        if self.code == -signal.SIGKILL:
            return f"{who} was killed"
        return f"{who} ended " + (f"by {signal.Signals(-self.code).name}" if self.code < 0 else f"with {self.code}")


def run(plan: LaunchPlan, folder: Path, *, seconds: float, env: dict[str, str]) -> Ended:
    """Start the ranks, and wait for their end. Nothing of them outlives this call."""
    (folder / "argv.json").write_text(json.dumps(plan.argv))
    alone = plan.argv[0] == sys.executable  # one rank, without a launcher
    argv = plan.argv if alone else (sys.executable, "-m", "manyrank.tools.doctor.launch", str(folder))
    env = {**os.environ, **plan.env, **env, "TMPDIR": str(folder)}  # launchers and libraries leave folders there
    with (folder / LAUNCHER_LOG).open("w") as log:
        process = subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return Ended(None)
    finally:
        _end(process, folder)
    if code and (folder / "ended.json").exists():
        return Ended(**json.loads((folder / "ended.json").read_text()))
    return Ended(code, 0 if alone else None)


def _end(process: subprocess.Popen, folder: Path) -> None:
    """Kill what still runs: the ranks have sessions of their own, and compilers outlive them."""
    import psutil

    family = [*_tree(process.pid), *(member for beat in beats(folder / HEARTBEATS) for member in _tree(beat.pid))]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=GONE)


def _tree(pid: int) -> list[psutil.Process]:
    """A process and all below it, as far as they are still there."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def main(folder: Path) -> int:
    """Run the launcher in this process, and write how its first worker failed."""
    logging.disable(logging.ERROR)  # the agents' report of a failure, which the doctor tells in its own words
    ended = _launched(tuple(json.loads((folder / "argv.json").read_text())))
    (folder / "ended.json").write_text(json.dumps(asdict(ended)))
    return 1 if ended.code else 0


def _launched(argv: tuple[str, ...]) -> Ended:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    try:
        run_in_process(argv)
    except ChildFailedError as failed:
        rank, failure = min(failed.failures.items(), key=lambda pair: blame(pair[1].exitcode, pair[1].timestamp))
        return Ended(failure.exitcode, rank)
    except (RendezvousError, ConnectionError) as error:  # accelerate looks for the port before it starts anything
        return Ended(1, apart=in_one_line(error))
    return Ended(0)


def blame(code: int, seconds: int) -> tuple[bool, int]:
    """Order the ranks that the agent saw end together: one that was killed comes first, since the others lost it.

    torch 2.13 orders by whole seconds, those of an exception against those at which the agent looked.
    """
    return code != -signal.SIGKILL, seconds


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
