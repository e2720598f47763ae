"""Real examinations by the doctor: of one process and of several, of what is broken, and of ranks that die or hang."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

from manyrank import cli
from manyrank.errors import UserError
from manyrank.project_files import asset
from manyrank.tools.doctor import main as doctor
from manyrank.tools.doctor import rank_checks
from manyrank.topology import gpus as hardware

GPUS = len(hardware.probe().gpus)


def start(tmp_path: Path, *args: str, gpus: str = "", **env: str) -> subprocess.Popen:
    """`manyrank doctor --json` with temporary files of its own, on the CPU unless told which GPUs."""
    (tmp_path / "temporary").mkdir(exist_ok=True)
    argv = [sys.executable, "-m", "manyrank.cli", "doctor", "verify", "--json", "--limit=250", *args]
    env = {**os.environ, "TMPDIR": str(tmp_path / "temporary"), "PYTHONPATH": str(ROOT / "src"), **env}
    env["CUDA_VISIBLE_DEVICES"] = gpus
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path)


def report(running: subprocess.Popen, tmp_path: Path, code: int) -> dict[str, dict]:
    """The checks by name, of an examination that has ended so and left nothing behind."""
    out, err = running.communicate(timeout=300)
    assert running.returncode == code, err + out
    assert err == ""
    assert list((tmp_path / "temporary").iterdir()) == []
    assert list(tmp_path.rglob(".manyrank-doctor*")) == []
    document = json.loads(out)
    assert document["ok"] == (code == 0)
    return {check["name"]: check for check in document["checks"]}


def test_one_process(tmp_path):
    found = report(start(tmp_path, f"--output_dir={tmp_path / 'run'}"), tmp_path, 0)
    assert set(rank_checks.STAGES[1:]) <= {name for name, check in found.items() if check["state"] == "ok"}, found
    assert found["all-reduce"]["seen"] == "one rank: not needed"
    assert found["step"]["figures"]["distributed_type"] == "NO"
    assert found["save and load"]["figures"]["tensors"] == 56
    assert found["save and load"]["figures"]["loss"] == found["step"]["figures"]["losses"][1]
    assert found["data"]["figures"]["size"] == asset("data", "sample.jsonl").stat().st_size
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("strategy", "type_"), [("ddp", "MULTI_CPU"), ("fsdp", "FSDP"), ("zero3", "DEEPSPEED")])
def test_two_processes(strategy, type_, tmp_path):
    found = report(start(tmp_path, "--nproc=2", f"--strategy={strategy}"), tmp_path, 0)
    assert found["process group"]["figures"]["backend"] == "gloo"
    small, large = found["all-reduce"]["figures"]["sizes"]
    assert (small["bytes"], large["bytes"], large["ranks"], large["wrong"]) == (4 << 10, 64 << 20, 2, 0)
    assert large["bus_bandwidth"] == pytest.approx(large["bytes"] / large["seconds"])
    assert found["step"]["figures"]["distributed_type"] == type_
    assert found["step"]["figures"]["world_size"] == 2
    assert found["save and load"]["figures"] == {
        "tensors": 56,
        "bytes": pytest.approx(2.85e6, rel=0.02),
        "loss": pytest.approx(found["step"]["figures"]["losses"][1]),
        "drift": pytest.approx(0, abs=1e-3),
    }


@pytest.mark.skipif(not GPUS, reason="there is no GPU")
def test_the_gpus_of_this_machine(tmp_path):
    found = report(start(tmp_path, gpus=",".join(map(str, range(GPUS)))), tmp_path, 0)
    assert found["GPUs"]["figures"]["gpus"] == GPUS
    assert found["step"]["figures"]["world_size"] == GPUS
    if GPUS > 1:
        assert found["process group"]["figures"]["backend"] == "nccl"
        assert found["all-reduce"]["figures"]["sizes"][1]["wrong"] == 0


def test_what_is_wrong_with_a_recipe(tmp_path):
    """All of it is told at once, each with its fix, and the exit code is 1."""
    (tmp_path / "file").touch()
    running = start(
        tmp_path,
        f"--data_path={tmp_path}/none.jsonl",
        f"--model={tmp_path}/none",
        f"--output_dir={tmp_path}/file/run",
        "--report_to=wandb",
        "--eval_steps=5",
        WANDB_MODE="online",
        NETRC=str(tmp_path / "netrc"),
        WANDB_API_KEY="",
    )
    found = report(running, tmp_path, 1)
    failed = {name for name, check in found.items() if check["state"] == "failed"}
    assert failed == {"recipe", "data", "model", "output folder", "W&B"}
    assert all(found[name]["fix"] for name in failed)
    assert "none.jsonl" in found["data"]["seen"] and "eval_steps without validation data" in found["recipe"]["seen"]
    assert [name for name, check in found.items() if check["state"] == "warning"] == ["step", "save and load"]


def ranks_of(running: subprocess.Popen, count: int) -> list[psutil.Process]:
    """The rank processes, once so many have begun."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        family = psutil.Process(running.pid).children(recursive=True)
        found = [child for child in family if is_rank(child)]
        if len(found) == count:
            return found
        time.sleep(0.1)
    raise AssertionError("the ranks did not start")


def is_rank(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[1:3] == ["-u", "-m"] and process.cmdline()[3] == "manyrank.tools.doctor.ranks"
    except (psutil.NoSuchProcess, IndexError):
        return False


def test_a_rank_that_dies(tmp_path):
    running = start(tmp_path, "--nproc=2")
    ranks = ranks_of(running, 2)
    ranks[1].kill()
    found = report(running, tmp_path, 1)
    (name,) = (name for name, check in found.items() if check["state"] == "failed")
    assert "was killed" in found[name]["seen"] and "memory" in found[name]["fix"]
    assert found["libraries"]["state"] == "ok" and found["step"]["state"] == "warning"
    assert not any(rank.is_running() for rank in ranks)


def test_a_launcher_that_dies(tmp_path):
    """Its ranks are found and ended without it."""
    running = start(tmp_path, "--nproc=2")
    ranks = ranks_of(running, 2)
    (launcher,) = psutil.Process(running.pid).children()
    launcher.kill()
    found = report(running, tmp_path, 1)
    (failed,) = (check for check in found.values() if check["state"] == "failed")
    assert failed["seen"] == "the launcher was killed"
    assert not any(rank.is_running() for rank in ranks)


def test_a_rank_that_hangs(tmp_path):
    running = start(tmp_path, "--nproc=2", "--limit=12")
    ranks = ranks_of(running, 2)
    ranks[1].send_signal(signal.SIGSTOP)
    found = report(running, tmp_path, 1)
    (name,) = (name for name, check in found.items() if check["state"] == "failed")
    assert "the time was over" in found[name]["seen"] and found[name]["fix"]
    assert not any(rank.is_running() for rank in ranks)


def test_an_examination_that_is_ended(tmp_path):
    running = start(tmp_path, "--nproc=2")
    ranks = ranks_of(running, 2)
    running.terminate()
    running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM
    assert not any(rank.is_running() for rank in ranks)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_machine_that_does_not_come(tmp_path):
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    alone = ("--nnodes=2", "--nproc=1", f"--rdzv_endpoint=localhost:{port}", "--rdzv_timeout=3")
    found = report(start(tmp_path, *alone), tmp_path, 1)
    assert found["start"]["state"] == "failed"
    assert "the machines did not meet" in found["start"]["seen"] and "--rdzv_endpoint" in found["start"]["fix"]


# The command line


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["nothing"], "there is no recipe 'nothing'"),
        (["--learning_rat=1"], "there is no option '--learning_rat'"),
        (["--limit=soon"], "argument --limit: 'soon' is not a number of seconds"),
        (["--max_restarts=2"], "max_restarts"),
        (["--nnodes=2"], "2 machines, and rdzv_endpoint is None"),
    ],
)
def test_wrong_input(argv, error):
    with pytest.raises(UserError) as raised:
        doctor.main(argv)
    assert raised.value.what == error


def test_the_command_of_the_ranks(capsys):
    assert cli.main(["doctor", "--nproc=2", "--print"]) == 0
    command = capsys.readouterr().out
    assert "torchrun --nproc_per_node 2 --nnodes 1 --standalone -m manyrank.tools.doctor.ranks" in command


def test_help(capsys):
    assert cli.main(["doctor", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--json" in shown and "--limit" in shown and "--nnodes" in shown and "--learning_rate" in shown
