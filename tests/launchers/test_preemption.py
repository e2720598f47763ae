"""A run that is asked to stop saves at the step's end and says so with its exit code, whoever gets the signal."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launches import ROOT, launch, nightly
from processes import running, wait_until, workers, workers_alive

from manyrank.runs import heartbeats, run_folder


def saved_step(folder) -> int:
    (saved,) = run_folder.checkpoints(folder)
    assert run_folder.damage(saved) is None
    return json.loads((saved / "trainer_state.json").read_text())["global_step"]


@pytest.mark.parametrize(
    ("number", "receiver", "args"),
    [
        (signal.SIGTERM, "launcher", ("--strategy=ddp", "--nproc=2")),
        (signal.SIGUSR1, "launcher", ("--strategy=zero3", "--nproc=2", "--via=torchrun")),
        (signal.SIGINT, "launcher", ("--strategy=fsdp", "--nproc=2")),
        (signal.SIGUSR1, "rank 1", ("--strategy=ddp", "--nproc=2")),
        (signal.SIGINT, "launcher", ("--strategy=single",)),
    ],
)
def test_a_signal_saves_and_exits_with_75(embedded_model, tmp_path, number, receiver, args):
    folder = tmp_path / "run"
    with running(folder, *args) as process:
        if receiver == "launcher":
            process.send_signal(number)
        else:
            workers(folder)[1].send_signal(number)
        assert process.wait(60) == 75, process.communicate()
        wait_until(lambda: not workers_alive(folder), seconds=5)
    lines = (folder / "logs" / "metrics.jsonl").read_text().splitlines()
    assert saved_step(folder) == len(lines) == json.loads(lines[-1])["step"]
    assert not (folder / "final_model").exists()


SLEEPER = """
import os, time
from transformers import TrainerCallback
class Sleep(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and os.environ.get("RANK", "0") == os.environ["SLEEPER"]:
            time.sleep(float(os.environ["SECONDS"]))
"""


@pytest.fixture
def sleeper(tmp_path, monkeypatch):
    """A callback in which one rank sleeps at the third step."""

    def make(rank: int, seconds: float) -> str:
        (tmp_path / "sleeping.py").write_text(SLEEPER)
        for name, value in {"PYTHONPATH": tmp_path, "SLEEPER": rank, "SECONDS": seconds}.items():
            monkeypatch.setenv(name, str(value))
        return "--callbacks=sleeping:Sleep"

    return make


STUCK = """
import os
import torch
from transformers import TrainerCallback
class Stuck(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and os.environ["RANK"] == "1":
            torch.distributed.recv(torch.zeros(1), src=0)
"""


def test_a_second_interrupt_stops_at_once(embedded_model, tmp_path, monkeypatch):
    """Also ranks that wait in C++, where Python hears no signal."""
    folder = tmp_path / "run"
    (tmp_path / "stuck.py").write_text(STUCK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with running(folder, "--strategy=ddp", "--nproc=2", "--callbacks=stuck:Stuck") as process:
        process.send_signal(signal.SIGINT)
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert not run_folder.checkpoints(folder)
    wait_until(lambda: not workers_alive(folder), seconds=5)


@pytest.mark.parametrize("seconds", [0.3, 2.0])
def test_a_signal_that_comes_early_is_not_lost(embedded_model, tmp_path, seconds):
    """Before there are workers nothing was begun; workers that do not listen yet get it when they do."""
    folder = tmp_path / "run"
    argv = [sys.executable, "-m", "manyrank.cli", "train", "verify", f"--output_dir={folder}", "--max_steps=5000"]
    process = subprocess.Popen(
        [*argv, "--strategy=ddp", "--nproc=2"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: listens(process.pid))
    time.sleep(seconds)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(90) == 75, process.communicate()
    for checkpoint in run_folder.checkpoints(folder):
        assert run_folder.damage(checkpoint) is None


def listens(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line for line in status if line.startswith("SigCgt")).split()[1]
    return bool(int(caught, 16) >> (signal.SIGUSR1 - 1) & 1)


def test_a_rank_that_hangs_is_named_with_its_stacks(embedded_model, tmp_path, sleeper):
    run = launch(tmp_path / "run", "--strategy=ddp", "--nproc=2", "--max_steps=4", "--hang_timeout=3", sleeper(1, 9))
    assert run.code == 0, run.stderr  # a slow rank may come back, and did
    (named,) = [line for line in run.stderr.splitlines() if "no sign of life" in line and "step 3" in line]
    assert re.search(r"WARNING: rank 1 \(host .*\) has given no sign of life for \d+ s: step 3, callbacks", named)
    assert "rank 0 in waiting for the others" in named or "rank 0 in forward and backward" in named
    stacks = (run.folder / "logs" / "heartbeats" / "stacks-00001.txt").read_text()
    assert "sleeping.py" in stacks and "in on_step_begin" in stacks
    assert [beat.phase for beat in heartbeats.beats(run.folder / "logs" / "heartbeats")] == ["done", "done"]


@pytest.mark.parametrize("strategy", ["ddp", *nightly("fsdp", "zero2", "zero3")])
def test_a_rank_that_stays_away_ends_the_run(strategy, embedded_model, tmp_path, sleeper):
    """It is named before the others end; with its own groups of processes under fsdp and DeepSpeed."""
    limits = ("--ddp_timeout=20", "--max_steps=4")
    run = launch(tmp_path / "run", f"--strategy={strategy}", "--nproc=2", *limits, sleeper(1, 300))
    assert run.code == 1 and len(run.metrics()) == 2
    assert "another rank did not come to a collective within ddp_timeout (20 s)" in run.stderr
    assert re.search(r"WARNING: rank 1 \(host .*\) has given no sign of life for \d+ s: step 3, callbacks", run.stderr)


SLOW = """
import os, time
from manyrank.checkpoint import state
from transformers import TrainerCallback
seal = state._seal
def slow(*args):
    time.sleep(20)
    seal(*args)
state._seal = slow
if os.environ.get("RANK") == "1":
    time.sleep(20)
class Slow(TrainerCallback):
    pass
"""


def test_loads_and_saves_may_take_longer_than_a_step(embedded_model, tmp_path):
    (tmp_path / "slowly.py").write_text(SLOW)
    args = ("--strategy=ddp", "--nproc=2", "--ddp_timeout=10", "--max_steps=2", "--save_steps=1")
    run = launch(tmp_path / "run", *args, "--callbacks=slowly:Slow", PYTHONPATH=f"{tmp_path}:{ROOT / 'src'}")
    assert run.code == 0, run.stderr
    assert len(run_folder.checkpoints(run.folder)) == 2


ASKED = """
import os, signal, sys, threading, time
from pathlib import Path
from manyrank.runs.heartbeats import HeartbeatWriter
heartbeat = HeartbeatWriter(0)
heartbeat.attach(Path(sys.argv[1]))
def start_and_end():
    while True:
        thread = threading.Thread(target=time.time)
        thread.start()
        thread.join()
for _ in range(2):
    threading.Thread(target=start_and_end, daemon=True).start()
for _ in range(500):
    os.kill(os.getpid(), signal.SIGUSR2)
    time.sleep(0.002)
heartbeat.stop()
os._exit(0)
"""


def test_asking_for_stacks_does_not_end_a_rank_whose_threads_come_and_go(tmp_path):
    assert subprocess.run([sys.executable, "-c", ASKED, str(tmp_path)], timeout=120).returncode == 0
    stacks = (tmp_path / "logs" / "heartbeats" / "stacks-00000.txt").read_text()
    assert 250 < stacks.count("Stack (most recent call first)") <= 500  # one asked for during another is lost
    assert "hread 0x" not in stacks  # those of other threads may end while they are read


def test_save_now_saves_at_the_next_step(embedded_model, tmp_path):
    folder = tmp_path / "run"
    with running(folder, "--strategy=ddp", "--nproc=2"):
        (folder / "SAVE_NOW").touch()
        wait_until(lambda: run_folder.checkpoints(folder) and not (folder / "SAVE_NOW").exists())
        step = saved_step(folder)
        log = folder / "logs" / "metrics.jsonl"
        wait_until(lambda: log.read_text().count("\n") > step)  # and goes on


def test_a_preempted_run_ends_as_the_uninterrupted_one(whole_run, tmp_path):
    """The stop comes from a callback that sends the signal, so that it is the same step every time."""
    (tmp_path / "stopping.py").write_text(
        "import os, signal\nfrom transformers import TrainerCallback\n"
        "class Stop(TrainerCallback):\n"
        "    def on_step_begin(self, args, state, control, **kwargs):\n"
        "        if state.global_step == 3:\n            os.kill(os.getpid(), signal.SIGUSR1)\n"
    )
    common = ("--max_steps=6", "--strategy=ddp", "--nproc=2")
    env = {"PYTHONPATH": str(tmp_path)}
    first = launch(tmp_path / "run", *common, "--callbacks=stopping:Stop", **env)
    assert first.code == 75, first.stderr
    assert "checkpoint-4 is complete" in first.stdout
    assert f"--output_dir {first.folder} --resume_from_checkpoint auto" in first.stdout
    assert [path.name for path in run_folder.checkpoints(first.folder)] == ["checkpoint-4"]
    again = launch(tmp_path / "run", *common, "--resume_from_checkpoint=auto")
    assert again.code == 0, again.stderr
    assert again.metrics() == pytest.approx(whole_run.metrics(), abs=1e-5)


CRASH = """
import os
from transformers import TrainerCallback
class Crash(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os._exit(9)
"""


def test_workers_that_are_started_anew_resume_by_themselves(whole_run, tmp_path):
    (tmp_path / "crashing.py").write_text(CRASH)
    common = ("--strategy=ddp", "--nproc=2", "--max_steps=6", "--save_steps=2", "--max_restarts=1")
    refused = launch(tmp_path / "run", *common, "--via=accelerate")
    assert refused.code == 2 and "use --via torchrun" in refused.stderr
    run = launch(tmp_path / "run", *common, "--callbacks=crashing:Crash", PYTHONPATH=str(tmp_path))
    assert run.code == 0, run.stderr
    assert f"resumed from {run.folder / 'checkpoint-2'}, step 2" in run.stdout
    assert run.metrics() == pytest.approx(whole_run.metrics(), abs=1e-5)


# Ends a rank before the first step, in its first start alone.
EARLY = """
import os
from transformers import TrainerCallback
class Early(TrainerCallback):
    def __init__(self):
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os._exit(9)
"""


def test_a_run_that_replaces_another_does_not_resume_from_that_one_when_it_is_started_anew(whole_run, tmp_path):
    (tmp_path / "early.py").write_text(EARLY)
    folder = shutil.copytree(whole_run.folder, tmp_path / "run", symlinks=True)
    options = ("--strategy=ddp", "--nproc=2", "--max_steps=6", "--overwrite_output_dir", "--max_restarts=1")
    run = launch(folder, *options, "--callbacks=early:Early", PYTHONPATH=str(tmp_path))
    assert run.code == 0, run.stderr
    assert "resumed from" not in run.stdout and "removed the run in" in run.stdout
    assert len(run.metrics()) == 6 and not (folder / "launch" / "remove-run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_asked_to_stop_is_not_started_anew(embedded_model, tmp_path, number):
    folder = tmp_path / "run"
    with running(folder, "--strategy=ddp", "--nproc=2", "--max_restarts=3") as process:
        process.send_signal(number)
        assert process.wait(60) == 75, process.communicate()
    log = folder / "logs" / "metrics.jsonl"
    assert saved_step(folder) == log.read_text().count("\n")


def test_a_users_error_is_not_tried_again(embedded_model, tmp_path):
    good = '{"question": "a", "answer": "b"}\n' * 1200  # the launch looks at the first 1,000 rows
    (tmp_path / "rows.jsonl").write_text(good + '{"question": "c"}\n')
    options = (f"--data_path={tmp_path / 'rows.jsonl'}", "--strategy=ddp", "--nproc=2", "--max_restarts=3")
    run = launch(tmp_path / "run", *options)
    assert run.code == 2 and run.stderr.count("error: 1 of 1,201 rows cannot be used") == 1, run.stderr


# Rank 1 is at its start when rank 0 ends, and torch's agent sends it a SIGTERM that asks no run to stop.
ONE_IS_SLOW = """
import os, time
from transformers import TrainerCallback
from manyrank.errors import UserError
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    time.sleep(30 * int(os.environ["RANK"]))
    END
class Slow(TrainerCallback):
    pass
"""


def test_after_a_sigterm_that_the_launcher_has_not_sent_the_run_continues(whole_run, tmp_path):
    """torch's agent sends it when a machine comes or leaves; the workers save, and are started anew."""
    (tmp_path / "leaving.py").write_text(LEAVING)
    common = ("--strategy=ddp", "--nproc=2", "--max_steps=6", "--max_restarts=1", "--callbacks=leaving:Leaving")
    run = launch(tmp_path / "run", *common, PYTHONPATH=str(tmp_path))
    assert run.code == 0, run.stderr
    assert "checkpoint-4 is complete" in run.stdout and "to continue" not in run.stdout
    assert f"resumed from {run.folder / 'checkpoint-4'}, step 4" in run.stdout
    assert run.metrics() == pytest.approx(whole_run.metrics(), abs=1e-5)


LEAVING = """
import os, signal
from transformers import TrainerCallback
class Leaving(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize(
    ("end", "code", "steps"),
    [("os._exit(9)", 0, 2), ("raise UserError('a wrong option', where='here', fix='another')", 2, 0)],
)
def test_how_a_rank_ends_holds_where_another_has_not_come_so_far(embedded_model, tmp_path, end, code, steps):
    (tmp_path / "slow.py").write_text(ONE_IS_SLOW.replace("END", end))
    options = ("--strategy=ddp", "--nproc=2", "--max_steps=2", "--max_restarts=1", "--callbacks=slow:Slow")
    run = launch(tmp_path / "run", *options, PYTHONPATH=str(tmp_path))
    assert run.code == code, run.stderr
    if steps:
        assert len(run.metrics()) == steps
    else:
        assert not (run.folder / "logs" / "metrics.jsonl").exists()


def test_started_anew_from_a_named_checkpoint_it_goes_on_from_its_own(whole_run, tmp_path):
    (tmp_path / "crashing.py").write_text(CRASH.replace("== 3", "== 5"))
    common = ("--strategy=ddp", "--nproc=2", "--max_steps=6", "--save_steps=1", "--max_restarts=1")
    named = whole_run.folder / "checkpoint-3"
    options = ("--callbacks=crashing:Crash", f"--resume_from_checkpoint={named}")
    run = launch(tmp_path / "run", *common, *options, PYTHONPATH=str(tmp_path))
    assert run.code == 0, run.stderr
    assert f"resumed from {named}, step 3" in run.stdout
    assert f"resumed from {run.folder / 'checkpoint-5'}, step 5" in run.stdout
    assert run.metrics() == pytest.approx(whole_run.metrics()[3:], abs=1e-5)


NAN = """
from transformers import TrainerCallback
class Nan(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
"""


def test_a_loss_that_is_not_finite_is_not_tried_again(embedded_model, tmp_path):
    (tmp_path / "nan.py").write_text(NAN)
    common = ("--strategy=ddp", "--nproc=2", "--max_steps=6", "--save_steps=1", "--max_restarts=2")
    run = launch(tmp_path / "run", *common, "--callbacks=nan:Nan", PYTHONPATH=str(tmp_path))
    assert run.code == 1 and run.stderr.count("stopped before the optimizer used it") == 1, run.stderr
