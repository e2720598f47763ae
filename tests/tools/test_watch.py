"""`manyrank watch` on the files of a real run: what a frame shows, a run that grows, and ranks that are silent."""

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from manyrank import cli
from manyrank.runs import logs, run_lock
from manyrank.runs.heartbeats import HeartbeatWriter
from manyrank.tools import watch


@pytest.fixture
def growing(whole_run, tmp_path):
    """A real run's folder with three of its six steps, which this process holds."""
    folder = tmp_path / "run"
    shutil.copytree(
        whole_run.folder, folder, ignore=shutil.ignore_patterns("checkpoint-*", "final_model*", "heartbeats")
    )
    for name, kept in (("metrics.jsonl", 3), ("history.jsonl", 1)):
        file = folder / "logs" / name
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:kept]))
    with run_lock.claimed(folder):
        yield folder


def grow(folder: Path, source: Path) -> None:
    """What the run has written after its third step."""
    for name in ("metrics.jsonl", "history.jsonl"):
        shutil.copy(source / "logs" / name, folder / "logs" / name)


def test_a_frame_of_a_run_that_has_ended(whole_run, capsys):
    assert cli.main(["watch", str(whole_run.folder)]) == 0
    text = capsys.readouterr().out
    losses = whole_run.metrics()
    assert text.startswith("run: finished, step 6 of 6 (100%)\nlora, rank ")
    assert f"\nloss {losses[-1]:.4f}\n" in text and "\n" + f"{max(losses):.4g}".rjust(watch.LABEL) + " │" in text
    assert f"learning rate {whole_run.metrics('learning_rate')[-1]:.2e}" in text
    assert f"{whole_run.metrics('tokens_per_second')[-1]:,.0f} tokens/s" in text
    assert f"memory {whole_run.metrics('memory_gib')[-1]:.2f} GiB" in text
    assert " left" not in text and "signs of life" not in text
    assert max(map(len, text.splitlines())) <= watch.WIDTH


def test_a_run_grows_between_frames(growing, whole_run):
    first = watch.look(growing)
    losses = whole_run.metrics()
    line = logs.read_metrics(growing)[-1]
    left = replace(first, now=line["time"] + 0.01).seconds_left
    assert left == pytest.approx(max(0.0, line["eta_seconds"] - 0.01), abs=0.01)
    text = watch.frame(first)
    assert (
        text.startswith("run: running, step 3 of 6 (50%), ")
        and f"\nloss {losses[2]:.4f}\n" in text
        and " left\n" in text
    )
    with (growing / "logs" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # the line is being written
    assert watch.frame(replace(watch.look(growing), now=first.now)) == text
    grow(growing, whole_run.folder)
    text = watch.frame(watch.look(growing))
    assert text.startswith("run: running, step 6 of 6 (100%), ") and f"\nloss {losses[-1]:.4f}\n" in text


def met(folder: Path, count: int) -> list[HeartbeatWriter]:
    """Ranks of a run that have met in its folder."""
    ranks, barrier = [HeartbeatWriter(rank) for rank in range(count)], threading.Barrier(count)
    threads = [
        threading.Thread(
            target=rank.attach, args=[folder], kwargs={"run": str(folder).replace("/", "-"), "meet": barrier.wait}
        )
        for rank in ranks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ranks


def test_a_silent_rank_is_named(growing):
    ranks = met(growing, 2)
    for rank in ranks:
        rank.beat(5, "forward")
    ranks[0].publish({})
    text = watch.frame(watch.look(growing))
    assert "2 of 2 ranks give signs of life: 2 in step 5, forward" in text and "SILENT" not in text
    assert "step 4 of 6" in text  # they are in the fifth
    ranks[0].beat(5, "waiting for the others")
    ranks[0].publish({1: 75.0})
    text = watch.frame(watch.look(growing))
    assert "1 of 2 ranks give signs of life: 1 in step 5, waiting for the others" in text
    assert re.search(rf"SILENT rank 1 \(host \S+, pid {os.getpid()}\) for 0:01:15: in step 5, forward", text)
    later = watch.look(growing)
    later = replace(later, now=later.now + 120)  # nothing is published any more
    assert [beat.rank for beat in later.silent] == [0, 1]
    for rank in ranks:
        rank.stop()
    assert watch.look(growing).silent == []


def test_a_run_that_starts_is_watched_before_it_has_files(tmp_path):
    folder = tmp_path / "run"
    with run_lock.claimed(folder):
        (rank,) = met(folder, 1)
        rank.beat(0, "loading the model")
        rank.publish({})
        text = watch.frame(watch.look(folder))
        assert (
            text.startswith("run: starting, step 0\n")
            and "1 of 1 ranks give signs of life: 1 loading the model" in text
        )
        rank.withdraw()


def test_a_killed_run_is_no_running_one(growing):
    lock = growing / "run.lock"
    owner = json.loads(lock.read_text())
    lock.write_text(
        json.dumps(owner | {"token": owner["token"], "started": owner["started"] - 999})
    )  # its pid is another's
    assert watch.frame(watch.look(growing)).startswith(
        "run: killed: no process has the folder, and no end is written down, "
    )
    lock.write_text(json.dumps(owner | {"machine": "another"}))
    assert watch.look(growing).held  # its beat is new
    os.utime(lock, (time.time() - 60,) * 2)
    assert not watch.look(growing).held
    lock.write_text(json.dumps(owner))


def test_warnings_and_oddities_are_shown(growing, capsys):
    logs.warn(growing, "checkpoint-3 could not be\nwritten: the disk is \x1b[31mfull")
    assert "WARNING: checkpoint-3" in capsys.readouterr().err
    file = growing / "logs" / "metrics.jsonl"
    lines = [json.dumps({"step": step, "time": 1.0, "loss": 2.0}) for step in range(4, 20)]
    file.write_text("\n".join(lines) + "\n")
    text = watch.frame(watch.look(growing))
    assert "WARNING: checkpoint-3 could not be written: the disk is \\x1b[31mfull" in text and "\x1b" not in text
    assert "odd so far: the loss is flat: 2 in the first lines, 2 in the last" in text


def test_a_curve_goes_through_its_points():
    rows = watch.plot([(0, 0.0), (9, 1.0)], [(5, 0.5), (9, float("nan"))], width=10, height=3)
    assert len(rows) == 4 and rows[0].startswith("        1 │") and rows[2].startswith("        0 │")
    assert rows[3].split() == ["step", "0", "9"]
    curve = [row.partition("│")[2] for row in rows[:3]]
    assert curve[2][0] > "\u2800" and curve[0][9] > "\u2800" and curve[1][5] == "●"
    assert curve[0][:6].strip() == "" and len(curve[2]) < 5  # it rises from the left to the right
    flat = watch.plot([(1, 2.0)], width=10, height=3)
    assert sum(character > "\u2800" for row in flat[:3] for character in row.partition("│")[2]) == 1


class Terminal:
    """A `manyrank watch` in a terminal of its own."""

    def __init__(self, *args: str) -> None:
        self.end, other = pty.openpty()
        argv = [sys.executable, "-m", "manyrank.cli", "watch", *args]
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "90", "LINES": "40"}
        self.process = subprocess.Popen(
            argv,
            stdin=other,
            stdout=other,
            stderr=other,
            env=env,
            # What a shell starts in the background ignores Ctrl-C, and so do these tests there.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(other)
        self.shown = ""

    def wait_for(self, text: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, self.shown
            if select.select([self.end], [], [], 0.2)[0]:
                self.shown += os.read(self.end, 1 << 16).decode(errors="replace")

    def close(self) -> int:
        code = self.process.wait(30)
        os.close(self.end)
        return code


def test_a_terminal_is_drawn_anew_until_the_run_ends(growing, whole_run):
    terminal = Terminal(str(growing), "--every=0.2")
    terminal.wait_for("step 3 of 6")
    grow(growing, whole_run.folder)
    terminal.wait_for("step 6 of 6")
    assert terminal.process.poll() is None  # the run has the folder still
    (growing / "run.lock").rename(growing / "lock")
    terminal.wait_for("run: finished, step 6 of 6")
    assert terminal.close() == 0
    (growing / "lock").rename(growing / "run.lock")


def test_ctrl_c_ends_it(growing):
    terminal = Terminal(str(growing), "--every=60")
    terminal.wait_for("step 3 of 6")
    time.sleep(0.5)
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.close() == 130 and "Traceback" not in terminal.shown


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["{tmp}"], "not the folder of a run"),
        (["{tmp}/none"], "there is no such folder"),
        ([], "RUN must be given"),
        (["{tmp}", "--every=0"], "every"),
    ],
)
def test_wrong_use_is_the_users_error(tmp_path, capsys, args, what):
    assert cli.main(["watch", *(arg.format(tmp=tmp_path) for arg in args)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert what in lines[0] and [line.split(":")[0] for line in lines] == ["error", "where", "fix"]
