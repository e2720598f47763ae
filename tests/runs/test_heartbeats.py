"""Signs of life on a machine's board, their copies in the run's folder, and whom a watch names."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from manyrank.runs import heartbeats
from manyrank.runs.heartbeats import HeartbeatWriter, beats, new_run
from manyrank.runs.run_folder import HEARTBEATS
from manyrank.runs.watchdog import Watchdog


class Clock:
    """In place of `time`: seconds pass when a test says so."""

    def __init__(self):
        self.now, self.wall = 100.0, 1e9

    def monotonic(self):
        return self.now

    def time(self):
        return self.wall


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in ("heartbeats", "watchdog"):
        monkeypatch.setattr(f"manyrank.runs.{module}.time", clock)
    return clock


def attached(folder: Path, machines: dict[str, list[int]], run: str = "") -> dict[int, HeartbeatWriter]:
    """The ranks of a run on machines by name, once they have met."""
    run, writers = run or new_run(folder), {}
    barrier = threading.Barrier(sum(map(len, machines.values())))
    for host, ranks in machines.items():
        for rank in ranks:
            writers[rank] = HeartbeatWriter(rank)
            writers[rank].host = host
            writers[rank].beat(0, "meeting")
    threads = [
        threading.Thread(target=writer.attach, args=[folder], kwargs={"run": run, "meet": barrier.wait})
        for writer in writers.values()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return writers


def local_files() -> list[Path]:
    return sorted(Path("/dev/shm").glob("manyrank-*"))


def watched(writers: dict[int, HeartbeatWriter]) -> dict[int, Watchdog]:
    return {rank: Watchdog(writer, patience=60, notices=True) for rank, writer in writers.items()}


def look(watch: Watchdog) -> str | None:
    """One round of a watch, without its thread."""
    local = [(beat, watch.here.of(beat)) for beat in watch.heartbeat.beats()]
    assert watch._publish({beat.rank: quiet for beat, quiet in local}) is None
    return watch._report([(beat, quiet) for beat, quiet in local if beat.phase != "done"])


MACHINES = {"first": [0, 1], "second": [2, 3]}


def test_a_machine_has_one_file_that_its_ranks_do_not_write_at_each_phase(tmp_path):
    before = local_files()
    writers, folder = attached(tmp_path, MACHINES), tmp_path / HEARTBEATS
    assert local_files() == before  # nothing that a killed run could leave
    assert sorted(path.name for path in folder.glob("*.jsonl")) == ["machine-00000.jsonl", "machine-00002.jsonl"]
    assert [(beat.rank, beat.host, beat.phase) for beat in beats(folder)] == [
        (rank, host, "meeting") for host, ranks in MACHINES.items() for rank in ranks
    ]
    files = {path: path.read_bytes() for path in folder.iterdir()}
    for writer in writers.values():
        writer.beat(7, "optimizer")
    assert files == {path: path.read_bytes() for path in folder.iterdir()}
    assert [beat.step for beat in writers[0].beats()] == [7, 7]
    writers[1].publish({})
    assert [beat.step for beat in beats(folder)] == [7, 7, 0, 0]
    for writer in writers.values():
        writer.stop()
    assert [(beat.rank, beat.phase) for beat in beats(folder)] == [(rank, "done") for rank in range(4)]


def test_a_rank_of_another_machine_is_named_by_what_its_machine_has_seen(tmp_path, clock):
    writers = attached(tmp_path, MACHINES)
    watches = watched(writers)
    for step in (1, 2):
        for writer in writers.values():
            writer.beat(step, "callbacks")
        clock.now += 5
        assert [look(watch) for watch in watches.values()] == [None] * 4
    for rank in (0, 1, 2):
        writers[rank].beat(2, "waiting for the others")
    said = {rank: "" for rank in watches}
    for _ in range(6):
        clock.now += 25
        clock.wall -= 3600  # somebody sets the clock back, hour after hour
        for rank, watch in watches.items():
            said[rank] += look(watch) or ""
    name = "WARNING: rank 3 (host second, pid"
    assert said[2].count(name) == said[2].count("WARNING") == 1  # once
    assert "has given no sign of life for 75 s: step 2, callbacks. Waiting: rank 2, 0, 1 in waiting" in said[2]
    assert said[0].count(name) == said[0].count("WARNING") == 1 and "for 75 s" in said[0]


def test_a_machine_that_publishes_no_more_is_named(tmp_path, clock):
    writers = attached(tmp_path, MACHINES)
    for rank in (0, 1):
        writers[rank].beat(1, "waiting for the others")
    watch, said = Watchdog(writers[0], patience=60), []
    for _ in range(8):  # the other machine's processes are stopped: its file stays as it is
        said.append(look(watch))
        clock.now += 25
    assert said[:6] == [None] * 6  # it was first looked at after 75 s, when this machine had waited for long
    assert said[6] and "WARNING: rank 2 (host second, pid" in said[6] and " or rank 3 (host second, pid" in said[6]
    assert "for 75 s: before the first step, meeting. Waiting: rank 0, 1 in waiting for the others." in said[6]


def test_a_slow_rank_that_gives_signs_is_not_named(tmp_path, clock):
    writers = attached(tmp_path, {"first": [0, 1]})
    watches = watched(writers)
    for _ in range(9):
        writers[0].beat(1, "waiting for the others")
    for index in range(6):
        writers[1].beat(1, f"step {index} of the validation")
        clock.now += 50
        assert [look(watch) for watch in watches.values()] == [None, None]


CLAIMS = """
import sys
from pathlib import Path
from manyrank.runs.heartbeats import Board, Heartbeat, HeartbeatWriter
writer = HeartbeatWriter(0)
writer.board = Board(Path(sys.argv[1]), 0)
print(writer.first_to_speak(Heartbeat(5, 1, "", 0, 0, "", 0)), writer.first_to_speak(Heartbeat(6, 1, "", 0, 0, "", 0)))
"""


def test_one_rank_of_a_machine_speaks_about_a_wait(tmp_path):
    writer = HeartbeatWriter(0)
    writer.board = heartbeats.Board(tmp_path / "board", 0)
    assert writer.first_to_speak(heartbeats.Heartbeat(5, 1, "", 0, 0, "", 0))
    done = subprocess.run([sys.executable, "-c", CLAIMS, tmp_path / "board"], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_signs_of_an_earlier_run_are_removed_and_those_of_a_withdrawn_one_too(tmp_path):
    folder = tmp_path / "run" / HEARTBEATS
    attached(tmp_path / "run", {"first": [0, 1, 2]})
    later = attached(tmp_path / "run", {"first": [0]})
    assert [beat.rank for beat in beats(folder)] == [0]
    later[0].withdraw()
    assert beats(folder) == []
    alone = attached(tmp_path / "other", {"first": [0]})
    alone[0].withdraw()
    assert not (tmp_path / "other").exists()


def test_a_machine_without_shared_memory_uses_the_temporary_folder(tmp_path, monkeypatch):
    real, places = os.open, []

    def refuse(path, *args, **kwargs):
        if str(path).startswith("/dev/shm"):
            raise OSError(28, "No space left on device")
        places.append(str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(heartbeats.os, "open", refuse)
    monkeypatch.setattr(heartbeats.tempfile, "tempdir", str(tmp_path))
    writers = attached(tmp_path / "run", {"first": [0, 1]})
    assert sum(place.startswith(str(tmp_path / "manyrank-")) for place in places) == 2
    assert [beat.rank for beat in writers[1].beats()] == [0, 1] and list(tmp_path.glob("manyrank-*")) == []


def test_a_long_phase_fits_into_its_slot(tmp_path):
    writers = attached(tmp_path, {"first": [0, 1]})
    writers[0].beat(0, "resuming from " + "\N{PILE OF POO}" * 500)
    assert [beat.rank for beat in writers[1].beats()] == [0, 1]
