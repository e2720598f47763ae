"""One run in a folder, workers that end with their launcher, and a start that says what it waits for and can be stopped."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
import warm
from launches import ROOT, nightly
from processes import is_running, running, wait_until, workers, workers_alive

from manyrank.errors import UserError
from manyrank.parallel import compile_locks
from manyrank.runs import run_folder, run_lock
from manyrank.runs.heartbeats import HeartbeatWriter
from manyrank.runs.watchdog import Watchdog

# Workers and their launcher


@pytest.mark.parametrize("args", [("--via=accelerate",), ("--via=torchrun", "--max_restarts=2")])
def test_workers_end_with_a_launcher_that_is_killed(embedded_model, tmp_path, args):
    folder = tmp_path / "run"
    with running(folder, "--strategy=ddp", "--nproc=2", *args) as process:
        assert len(workers(folder)) == 2
        process.kill()
        wait_until(lambda: not workers_alive(folder), seconds=10)
    steps = (folder / "logs" / "metrics.jsonl").read_text().count("\n")
    time.sleep(1)
    assert (folder / "logs" / "metrics.jsonl").read_text().count("\n") == steps


def by_command_line(folder: Path) -> list[psutil.Process]:
    """The workers of a run, also before they give signs of life."""
    found = [p for p in psutil.process_iter(["cmdline"]) if f"--output_dir={folder}" in (p.info["cmdline"] or [])]
    return [p for p in found if "manyrank.train" in p.info["cmdline"] and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    ("via", "seconds"), [("torchrun", 0.0), ("accelerate", 0.2), *nightly(("torchrun", 0.1), ("accelerate", 0.05))]
)
def test_workers_that_have_just_been_started_end_with_their_launcher(embedded_model, tmp_path, via, seconds):
    """While they still import."""
    folder = tmp_path / "run"
    argv = [sys.executable, "-m", "manyrank.cli", "train", "verify", f"--output_dir={folder}", "--max_steps=5000"]
    options = ["--strategy=ddp", "--nproc=2"] if via == "torchrun" else ["--strategy=single"]
    process = subprocess.Popen([*argv, *options, f"--via={via}"], cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_until(lambda: by_command_line(folder))
    time.sleep(seconds)
    process.kill()
    process.wait()
    wait_until(lambda: not by_command_line(folder), seconds=10)


@pytest.mark.parametrize(
    ("number", "code", "seconds"),
    [*((signal.SIGUSR1, 75, wait) for wait in (0.0, 0.1, 0.4)), *((signal.SIGINT, 130, wait) for wait in (0.05, 0.2))],
)
def test_a_signal_while_the_command_becomes_the_worker(embedded_model, tmp_path, seconds, number, code):
    argv = [
        sys.executable,
        "-m",
        "manyrank.cli",
        "train",
        "verify",
        f"--output_dir={tmp_path / 'run'}",
        "--max_steps=5000",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*argv, "--strategy=single"], cwd=ROOT, **pipes)
    assert process.stdout.readline().startswith(sys.executable)
    time.sleep(seconds)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in said, said
    assert run_folder.is_new(tmp_path / "run")


BARE = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "accelerate": [
        "-m",
        "accelerate.commands.launch",
        "--config_file=accelerate_configs/ddp.yaml",
        "--num_processes=2",
    ],
    "accelerate, one process": ["-m", "accelerate.commands.launch", "--config_file=accelerate_configs/single.yaml"],
}


@pytest.mark.parametrize("launcher", ["torchrun", *nightly("accelerate", "accelerate, one process")])
def test_workers_end_with_a_launcher_that_the_user_called(embedded_model, tmp_path, launcher):
    folder = tmp_path / "run"
    options = [f"--output_dir={folder}", "--logging_steps=1", "--max_steps=5000"]
    # Not a warm process: a worker looks at the command line of what started it.
    process = subprocess.Popen([sys.executable, *BARE[launcher], "-m", "manyrank.train", "verify", *options], cwd=ROOT)
    try:
        wait_until(lambda: (folder / "logs" / "metrics.jsonl").exists() or process.poll() is not None)
        assert process.poll() is None and workers_alive(folder)
        process.kill()
        wait_until(lambda: not workers_alive(folder), seconds=10)
    finally:
        for left in workers_alive(folder):
            left.kill()
        process.kill()
        process.wait()


POOL = """
import os, sys, time
from pathlib import Path
from datasets import Dataset, Features, Value
from manyrank.data.tokenize import _cached
def make(shards):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(600)
    yield {"x": 1}
_cached(make, Features({"x": Value("int64")}), "sleeping", 2, shards=[(0, 2), (1, 2)])
"""


def test_processes_that_tokenise_end_with_their_worker(tmp_path):
    """Those of the pool, and the one that passes their progress on."""
    env = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen([sys.executable, "-c", POOL, str(tmp_path)], env=env)
    wait_until(lambda: sum(path.name.isdigit() for path in tmp_path.iterdir()) == 2)
    helpers = psutil.Process(process.pid).children(recursive=True)
    assert {int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()} < {helper.pid for helper in helpers}
    process.kill()
    process.wait()
    wait_until(lambda: not any(is_running(helper.pid) for helper in helpers), seconds=10)


# One run in a folder


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]


def test_of_two_identical_commands_one_trains(embedded_model, tmp_path):
    folder = tmp_path / "run"
    argv = [sys.executable, "-m", "manyrank.cli", "train", "verify", f"--output_dir={folder}", "--logging_steps=1"]
    argv += ["--strategy=ddp", "--nproc=2", "--max_steps=4", "--save_steps=1"]
    both = [warm.start(argv, cwd=ROOT) for _ in "12"]
    errors = [process.communicate(timeout=200)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    (refused,) = [error for process, error in zip(both, errors) if process.returncode == 2]
    what, where, fix = refused.strip().splitlines()[-3:]
    assert what.startswith("error: another run works in this folder (host ") and "pid" in what
    assert where == f"where: output_dir {folder}" and "choose another --output_dir" in fix
    assert [entry["step"] for entry in lines(folder)] == [1, 2, 3, 4]
    assert all(run_folder.damage(saved) is None for saved in run_folder.checkpoints(folder))
    assert (folder / "final_model").is_dir() and not (folder / run_folder.LOCK).exists()


def test_a_resume_beside_a_running_run_is_refused_at_the_launch(embedded_model, tmp_path):
    folder = tmp_path / "run"
    with running(folder, "--strategy=single"):
        owner = json.loads((folder / run_folder.LOCK).read_text())
        argv = [sys.executable, "-m", "manyrank.cli", "train", "verify", f"--output_dir={folder}"]
        again = warm.run([*argv, "--resume_from_checkpoint=auto"], cwd=ROOT, timeout=60)
        assert again.returncode == 2 and f"pid {owner['pid']}" in again.stderr
        assert is_running(owner["pid"])


def test_a_folder_is_given_back_and_the_lock_of_a_dead_owner_is_taken_over(tmp_path, capsys):
    folder = tmp_path / "output" / "run"
    with run_lock.claimed(folder):
        assert (folder / run_folder.LOCK).exists()
        with pytest.raises(UserError, match="another run works in this folder"):
            run_lock.refuse_if_held(folder)
        with pytest.raises(UserError, match=f"pid {os.getpid()}"), run_lock.claimed(folder):
            pass
    assert not folder.parent.exists()  # nothing was put into it
    left = claim_and_die(folder)
    run_lock.refuse_if_held(folder)
    with run_lock.claimed(folder):
        assert f"from a run that is gone (host {os.uname().nodename}, pid {left}" in capsys.readouterr().err
        (folder / "logs").mkdir()
    assert [path.name for path in folder.iterdir()] == ["logs"]


def claim_and_die(folder: Path) -> int:
    """The process id of an owner that was killed while it had the folder."""
    code = f"import os; from pathlib import Path; from manyrank.runs import run_lock\nwith run_lock.claimed(Path({str(folder)!r})): os.kill(os.getpid(), 9)"
    process = subprocess.Popen([sys.executable, "-c", code])
    process.wait()
    assert (folder / run_folder.LOCK).exists()
    return process.pid


@pytest.mark.parametrize("text", ["", "no JSON", "[]", '{"pid": 1}', "wrong pid", "wrong start"])
def test_a_lock_that_names_no_owner_is_taken_over(tmp_path, text, capsys):
    owner = asdict(run_lock._this_process())
    owner |= {"pid": "abc"} if text == "wrong pid" else {"started": "x"} if text == "wrong start" else {}
    (tmp_path / run_folder.LOCK).write_text(json.dumps(owner) if text.startswith("wrong") else text)
    run_lock.refuse_if_held(tmp_path)
    with run_lock.claimed(tmp_path):
        assert "took over" in capsys.readouterr().err


def test_a_lock_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "a" / run_folder.LOCK).mkdir(parents=True)
    with pytest.raises(UserError, match="is a folder"), run_lock.claimed(tmp_path / "a"):
        pass
    assert [path.name for path in (tmp_path / "a").iterdir()] == [run_folder.LOCK]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"), run_lock.claimed(tmp_path / "b"):
        pass
    assert not (tmp_path / "b").exists()


def test_a_process_number_that_went_to_another_process_is_no_owner(tmp_path):
    owner = run_lock._this_process()
    assert owner.is_alive() and replace(owner, started=owner.started - 1000).is_alive() is False


@pytest.mark.parametrize("beats", [True, False])
def test_an_owner_on_another_machine_is_told_by_its_beats(tmp_path, monkeypatch, beats):
    """The process table says nothing of it."""
    monkeypatch.setattr(run_lock, "DEAD", 2.0)
    far = replace(run_lock._this_process(), host="far", machine="another kernel")
    lock = tmp_path / run_folder.LOCK
    lock.touch()
    run_lock._write(lock, far)
    run_lock.refuse_if_held(tmp_path)  # the launch does not wait; the run does
    later = threading.Timer(0.5, lambda: run_lock._write(lock, replace(far, beat=1)))
    if beats:
        later.start()
        with pytest.raises(UserError, match="host far"), run_lock.claimed(tmp_path):
            pass
        assert json.loads(lock.read_text())["host"] == "far"
    else:
        with run_lock.claimed(tmp_path):
            assert json.loads(lock.read_text())["host"] == os.uname().nodename


def contend(folder: Path, start, results) -> None:
    start.wait()
    try:
        with run_lock.claimed(folder):
            results.put("has it")
            time.sleep(2)
    except UserError as error:
        results.put(error.what)


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_want_a_folder_at_once_one_has_it(tmp_path, stale):
    folder = tmp_path / "run"
    if stale:
        claim_and_die(folder)
    spawn = multiprocessing.get_context("fork")
    start, results = spawn.Event(), spawn.Queue()
    processes = [spawn.Process(target=contend, args=(folder, start, results)) for _ in range(6)]
    for process in processes:
        process.start()
    start.set()
    found = [results.get(timeout=30) for _ in processes]
    assert found.count("has it") == 1, found
    assert all("another run works in this folder" in text for text in found if text != "has it")


def test_an_owner_that_lost_its_lock_ends_itself(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from manyrank.runs import run_lock; run_lock.BEAT = 0.1\n"
        "with run_lock.claimed(Path(sys.argv[1])): print('has it', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "has it\n"
    wait_until(lambda: json.loads((tmp_path / run_folder.LOCK).read_text())["beat"] > 1)  # it is alive
    other = replace(run_lock._this_process(), host="thief")
    partial = tmp_path / "partial"
    partial.write_text(json.dumps(asdict(other)))
    partial.replace(tmp_path / run_folder.LOCK)
    assert process.wait(20) == 1 and "was taken over by another run (host thief" in process.stderr.read()
    assert json.loads((tmp_path / run_folder.LOCK).read_text())["host"] == "thief"


def test_what_a_start_writes_makes_a_folder_no_run(tmp_path):
    folder = tmp_path / "run"
    assert run_folder.is_new(folder)
    for file in (run_folder.LOCK, "launch/plan.txt", "logs/heartbeats/rank-00000.json"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    assert run_folder.is_new(folder)
    (folder / "logs" / "metrics.jsonl").touch()
    assert not run_folder.is_new(folder)


def test_a_start_that_fails_leaves_nothing(embedded_model, tmp_path):
    """Also where the fault is found after the ranks have met and written their signs of life."""
    rows = tmp_path / "rows.jsonl"
    good = '{"question": "a", "answer": "b"}\n'
    rows.write_text(good * 1200 + '{"question": "c"}\n')
    argv = [
        sys.executable,
        "-m",
        "manyrank.cli",
        "train",
        "verify",
        f"--data_path={rows}",
        f"--output_dir={tmp_path / 'run'}",
    ]
    for options in (["--strategy=single"], ["--strategy=ddp", "--nproc=2"]):
        done = warm.run([*argv, *options], cwd=ROOT, timeout=120)
        assert done.returncode == 2 and "1 of 1,201 rows cannot be used" in done.stderr, done.stderr
        assert not (tmp_path / "run").exists() or run_folder.is_new(tmp_path / "run")


# Before the first step


@pytest.fixture
def stale_lock(tmp_path, monkeypatch) -> Path:
    """What a killed first compile leaves."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    return lock


def test_a_lock_that_no_compiler_holds_is_removed(stale_lock):
    assert compile_locks.remove_stale() == [f"removed {stale_lock}: the process that compiled there was killed"]
    assert not stale_lock.exists() and compile_locks.remove_stale() == [] and compile_locks.explain() is None


def test_a_lock_that_this_process_does_not_wait_for_is_left_alone(stale_lock):
    """That of another run, and the one under which this process compiles itself."""
    assert compile_locks.explain() is None and stale_lock.exists()
    own = os.open(stale_lock, os.O_RDONLY)
    assert compile_locks.explain() == "deepspeed_shm_comm is compiled" and compile_locks.remove_stale() == []
    os.close(own)
    assert stale_lock.exists()


HOLD = "import os, sys, time; os.open(sys.argv[1], os.O_RDONLY); print(flush=True); time.sleep(60)"
WORK = "import os, sys, time; os.chdir(os.path.dirname(sys.argv[1])); print(flush=True); time.sleep(60)"


@pytest.mark.parametrize("code", [HOLD, WORK])
def test_a_lock_that_a_compiler_holds_stays(stale_lock, code):
    """Also where only the compiler that a killed process had started is still at work there."""
    process = subprocess.Popen([sys.executable, "-c", code, str(stale_lock)], stdout=subprocess.PIPE)
    process.stdout.readline()
    assert compile_locks.remove_stale() == [] and stale_lock.exists()
    waiting = subprocess.Popen(
        [sys.executable, "-c", WAIT, str(stale_lock)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert f"deepspeed_shm_comm is compiled by pid {process.pid} (lock" in waiting.stdout.readline()
    process.kill()  # while the other waits
    process.wait()
    assert waiting.wait(20) == 1 and "start the same command again" in waiting.stderr.read()
    assert not stale_lock.exists()


WAIT = """
import sys, threading, time
from manyrank.parallel import compile_locks
from torch.utils.file_baton import FileBaton
def watch():
    while True:
        time.sleep(0.5)
        print(compile_locks.explain(), flush=True)
threading.Thread(target=watch, daemon=True).start()
FileBaton(sys.argv[1]).wait()
"""


def test_a_lock_on_a_shared_folder_stays_until_it_is_old(stale_lock, monkeypatch):
    monkeypatch.setattr(compile_locks, "_file_system", lambda path: "nfs4")
    assert compile_locks.remove_stale() == [] and stale_lock.exists()
    os.utime(stale_lock, (0, time.time() - compile_locks.OLD - 5))
    assert compile_locks.remove_stale() and not stale_lock.exists()


def test_a_start_says_what_it_waits_for(capsys, monkeypatch):
    monkeypatch.setattr("manyrank.runs.watchdog.NOTICE", 0.5)
    heartbeat = HeartbeatWriter(0)
    with Watchdog(heartbeat, patience=1.2, notices=True):
        with heartbeat.waiting("distributing the model", lambda: "somebody compiles"):
            time.sleep(2.6)
        heartbeat.beat(0, "loading the model")
        time.sleep(0.3)
        heartbeat.beat(1, "callbacks")  # in a step nothing is said before the patience is over
        time.sleep(0.9)
    said = capsys.readouterr().err
    assert "still distributing the model after 0 s: somebody compiles" in said or "after 1 s: somebody compiles" in said
    assert "after 2 s: somebody compiles" in said or said.count("somebody compiles") >= 2
    assert "WARNING: rank 0" in said and "before the first step, distributing the model" in said
    assert said.count("WARNING") == 1 and "loading" not in said and "callbacks" not in said


def test_a_launch_that_waits_says_so_and_can_be_stopped(embedded_model, tmp_path):
    """Before there is a worker, here for a reader of rows."""
    (tmp_path / "slow.py").write_text("import time\ndef read(row):\n    time.sleep(600)\n")
    argv = [sys.executable, "-m", "manyrank.cli", "train", "verify", f"--output_dir={tmp_path / 'run'}"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([*argv, "--format_type=slow:read"], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline().startswith("still checking the recipe, the model's files and the data after 1")
    process.terminate()
    assert process.wait(5) == 75 and not (tmp_path / "run").exists()


HANG = """
import os, sys, time
import manyrank.parallel.compile_locks
def hang():
    open(os.environ["REACHED"], "w").close()
    while True:
        time.sleep(0.1) if os.environ["HOW"] == "python" else __import__("ctypes").CDLL(None).sleep(1000)
manyrank.parallel.compile_locks.remove_stale = hang
from manyrank.train import exit_now, main
exit_now(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("how", "number", "code"),
    [("python", signal.SIGTERM, 75), ("C", signal.SIGUSR1, 75), *nightly(("python", signal.SIGINT, 130))],
)
def test_a_signal_ends_a_start_that_hangs(embedded_model, tmp_path, how, number, code):
    """In Python at once; in C++, where Python hears no signal, some seconds later."""
    reached, folder = tmp_path / "reached", tmp_path / "run"
    options = ["verify", f"--output_dir={folder}", "--strategy=zero2", "--hang_timeout=3"]
    env = {"REACHED": str(reached), "HOW": how, "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_WORLD_SIZE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", HANG, *options], cwd=ROOT, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True
    )
    wait_until(reached.exists)
    time.sleep(4)
    process.send_signal(number)
    assert process.wait(15) == code
    said = process.stderr.read()
    assert "has given no sign of life" in said and "before the first step, waiting for all 1 processes to meet" in said
    assert run_folder.is_new(folder)
    assert "stopped before the first step" in said and (how == "C" or not folder.exists())


def test_a_run_ends_with_the_verify_that_started_it(embedded_model, tmp_path):
    argv = [sys.executable, "-m", "manyrank.cli", "verify", "--steps=5000", "--strategies=ddp", "--nproc=2"]
    process = subprocess.Popen(argv, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.DEVNULL)

    def ranks() -> list[int]:
        found = psutil.process_iter(["cmdline"])
        return [p.pid for p in found if str(tmp_path) in " ".join(p.info["cmdline"] or []) and is_running(p.pid)]

    wait_until(lambda: any("manyrank.train" in psutil.Process(pid).cmdline() for pid in ranks()))
    process.kill()
    process.wait()
    wait_until(lambda: not ranks(), seconds=15)


POOLS = """
import multiprocess, os
from manyrank.signals import STOP, mortal_children

STOP.listen(lambda number: os._exit(3))
for _ in range(25):
    with mortal_children(), multiprocess.Pool(12) as pool:
        list(pool.imap_unordered(abs, range(12)))
os._exit(0)
"""


def test_helpers_that_end_at_once_neither_hang_nor_end_the_run():
    """The pool of dataset_num_proc ends its helpers by SIGTERM, some before they have begun."""
    assert subprocess.run([sys.executable, "-c", POOLS], timeout=120).returncode == 0
