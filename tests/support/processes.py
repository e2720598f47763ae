"""Runs that are under way, and the processes of their ranks."""

import sys
import time
from contextlib import contextmanager, suppress

import psutil
import warm
from launches import ROOT

from manyrank.runs import heartbeats


@contextmanager
def running(folder, *args, steps=2):
    """`manyrank train` after its first steps."""
    argv = [sys.executable, "-m", "manyrank.cli", "train", "verify", f"--output_dir={folder}", "--logging_steps=1"]
    process = warm.start([*argv, "--max_steps=5000", *args], cwd=ROOT)
    log = folder / "logs" / "metrics.jsonl"
    try:
        wait_until(lambda: (log.exists() and log.read_text().count("\n") >= steps) or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            child.kill()
        process.kill()
        process.communicate()


def wait_until(true, seconds=90):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def workers(folder) -> dict[int, psutil.Process]:
    """The processes of a run by rank, as their signs of life name them; those that are there."""
    found = {beat.rank: process_of(beat.pid) for beat in heartbeats.beats(folder / "logs" / "heartbeats")}
    return {rank: process for rank, process in found.items() if process}


def workers_alive(folder) -> list[psutil.Process]:
    return [process for process in workers(folder).values() if is_running(process.pid)]


def process_of(pid: int) -> psutil.Process | None:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid)
    return None


def is_running(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):  # it may end at any moment
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
