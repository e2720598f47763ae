"""Real examinations by the doctor: of one process and of several, of what is broken, and of ranks that die or hang."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import warm
from launches import ROOT

from manyrank import cli
from manyrank.config.args import parse_with
from manyrank.config.resolve import Setting, resolve
from manyrank.errors import UserError
from manyrank.runs.heartbeats import beats
from manyrank.tools.doctor import main as doctor
from manyrank.tools.doctor.ranks import _small_config
from manyrank.topology import gpus

GPUS = len(gpus.probe().gpus)


def examine(tmp_path: Path, *args: str, visible: str = "", **env: str) -> subprocess.CompletedProcess:
    """Run `manyrank doctor --json` with a temporary folder of its own, on the CPU unless told which GPUs."""
    (tmp_path / "temporary").mkdir(exist_ok=True)
    argv = [sys.executable, "-m", "manyrank.cli", "doctor", "verify", "--json", "--limit=250", *args]
    env = {**os.environ, "TMPDIR": str(tmp_path / "temporary"), "PYTHONPATH": str(ROOT / "src"), **env}
    run = subprocess.run if visible else warm.run
    env["CUDA_VISIBLE_DEVICES"] = visible
    return run(argv, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=400)


def begin(tmp_path: Path, *args: str) -> tuple[Future, list[psutil.Process]]:
    """Begin an examination with two ranks.

    Returns:
        What `examine` will give, and the ranks, which have begun by now.
    """
    running = ThreadPoolExecutor(1).submit(examine, tmp_path, "--nproc=2", *args)
    end = time.monotonic() + 120
    while time.monotonic() < end and not running.done():
        found = [beat for folder in tmp_path.rglob("heartbeats") for beat in beats(folder)]
        if len(found) == 2:
            return running, [psutil.Process(beat.pid) for beat in found]
        time.sleep(0.05)
    raise AssertionError(f"the ranks did not start: {running.result()}")


def report(done: subprocess.CompletedProcess, tmp_path: Path, code: int) -> dict[str, dict]:
    """The checks by name, of an examination that has ended so and left nothing behind."""
    assert done.returncode == code, done.stderr + done.stdout
    assert done.stderr == ""
    assert list((tmp_path / "temporary").iterdir()) == []
    assert list(tmp_path.rglob(".manyrank-doctor*")) == []
    document = json.loads(done.stdout)
    assert document["ok"] == (code == 0)
    return {check["name"]: check for check in document["checks"]}


def failures(found: dict[str, dict]) -> list[str]:
    return [name for name, check in found.items() if check["state"] == "failed"]


def test_one_process(tmp_path):
    found = report(examine(tmp_path, f"--output_dir={tmp_path / 'run'}"), tmp_path, 0)
    assert {"libraries", "compiler", "recipe", "model", "output folder", "step", "save and load"} <= set(found)
    assert not {"process group", "all-reduce", "same on all"} & set(found)
    assert found["step"]["figures"]["distributed_type"] == "NO"
    assert found["save and load"]["figures"] == {"tensors": 56, "loss": found["step"]["figures"]["losses"][1]}
    assert not (tmp_path / "run").exists()


def test_what_nobody_gave_is_said_and_is_no_recipe_that_is_ok(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("assumed, as not given: model_name_or_path embedded, method lora, strategy single, data")
    assert not [line for line in lines if " recipe " in line]

    def assumed(*argv: str) -> dict[str, str]:
        line, _ = parse_with(argv, doctor.DoctorOptions, prog="", launch=True)
        return doctor._assumed(doctor._resolve(line, gpus.probe_host()), named=bool(line.recipe))

    assert list(assumed("--model", "org/none", "--method", "qlora")) == ["strategy", "data_path"]
    assert assumed("verify", "--use_4bit", "--nproc=2", "--strategy=ddp") == {}
    assert assumed("verify") == {"method": "lora", "strategy": "single"}


@pytest.mark.parametrize(("strategy", "type_"), [("ddp", "MULTI_CPU"), ("fsdp", "FSDP"), ("zero3", "DEEPSPEED")])
def test_two_processes(strategy, type_, tmp_path):
    found = report(examine(tmp_path, "--nproc=2", f"--strategy={strategy}"), tmp_path, 0)
    assert found["process group"]["figures"] == {"backend": "gloo", "ranks": 2}
    small, large = found["all-reduce"]["figures"]["sizes"]
    assert (small["bytes"], large["bytes"], large["ranks"], large["wrong"]) == (4 << 10, 64 << 20, 2, 0)
    assert large["bus_bandwidth"] == pytest.approx(large["bytes"] / large["seconds"])
    assert found["step"]["figures"]["distributed_type"] == type_
    assert found["step"]["figures"]["world_size"] == 2
    loss = pytest.approx(found["step"]["figures"]["losses"][1])
    assert found["save and load"]["figures"] == {"tensors": 56, "loss": loss}


def test_the_small_run_has_what_the_recipe_says_of_how_to_train(tmp_path):
    options = {"strategy": "hsdp", "hsdp_shard_size": "2", "method": "full", "bf16": "true", "optim": "adamw_torch"}
    config = resolve("verify", [Setting(key, value, "test") for key, value in options.items()]).config
    small = _small_config(config, "hsdp", tmp_path, 4)
    assert {key: getattr(small, key) for key in options} == {key: getattr(config, key) for key in options}
    assert small.global_batch_size == 8 and small.model_name_or_path == str(tmp_path)


@pytest.mark.skipif(not GPUS, reason="there is no GPU")
def test_the_gpus_of_this_machine(tmp_path):
    found = report(examine(tmp_path, visible=",".join(map(str, range(GPUS)))), tmp_path, 0)
    assert sum(found["GPUs"]["figures"]["kinds"].values()) == GPUS
    assert {f"GPU {number}" for number in range(GPUS)} <= set(found)
    assert found["step"]["figures"]["world_size"] == GPUS
    if GPUS > 1:
        assert found["process group"]["figures"]["backend"] == "nccl"
        assert found["all-reduce"]["figures"]["sizes"][1]["wrong"] == 0


def test_a_broken_driver(tmp_path, monkeypatch, capsys):
    """It is a failed line, and the rest is examined on the CPU."""

    def broken():
        raise UserError("CUDA cannot use the GPUs", where="the CUDA driver", fix="restart")

    monkeypatch.setattr(doctor, "probe", broken)
    monkeypatch.chdir(tmp_path)
    assert doctor.main(["verify", "--json", "--limit=250"]) == 1
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert failures(found) == ["driver"] and found["driver"]["fix"] == "restart"
    assert found["step"]["state"] == "ok"


def test_what_is_wrong_with_a_recipe(tmp_path):
    """All of it is told at once, each with its fix, and the exit code is 1."""
    (tmp_path / "file").touch()
    done = examine(
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
    assert set(failures(report(done, tmp_path, 1))) == {"recipe", "model", "output folder"}
    failed = [check for check in json.loads(done.stdout)["checks"] if check["state"] == "failed"]
    assert all(check["fix"] for check in failed)
    seen = " ".join(check["seen"] for check in failed)
    assert "none.jsonl" in seen and "eval_steps without validation data" in seen and "no login" in seen


def test_a_rank_that_dies(tmp_path):
    running, ranks = begin(tmp_path)
    ranks[1].kill()
    found = report(running.result(), tmp_path, 1)
    (name,) = failures(found)
    assert found[name]["seen"] == "rank 1 was killed" and "memory" in found[name]["fix"]
    assert found["libraries"]["state"] == "ok" and "step" in found["not reached"]["seen"]
    assert not any(rank.is_running() for rank in ranks)


def test_a_launcher_that_dies(tmp_path):
    """Its ranks end with it."""
    running, ranks = begin(tmp_path)
    ranks[0].parent().kill()
    found = report(running.result(), tmp_path, 1)
    (name,) = failures(found)
    assert found[name]["seen"] == "the launcher was killed"
    assert not any(rank.is_running() for rank in ranks)


def test_a_rank_that_hangs(tmp_path):
    running, ranks = begin(tmp_path, "--limit=12")
    ranks[1].send_signal(signal.SIGSTOP)
    found = report(running.result(), tmp_path, 1)
    (name,) = failures(found)
    assert found[name]["seen"].startswith("the time was over: rank ")
    assert f"rank 1 (host {socket.gethostname()}) in " in found[name]["seen"]
    assert "--limit" in found[name]["fix"]
    assert not any(rank.is_running() for rank in ranks)


def test_an_examination_that_is_ended(tmp_path):
    running, ranks = begin(tmp_path)
    ranks[0].parent().parent().terminate()
    assert running.result().returncode == 128 + signal.SIGTERM
    assert not any(rank.is_running() for rank in ranks)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_machine_that_does_not_come(tmp_path):
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    alone = ("--nnodes=2", "--nproc=1", f"--rdzv_endpoint=localhost:{port}", "--rdzv_timeout=3")
    found = report(examine(tmp_path, *alone), tmp_path, 1)
    assert failures(found) == ["start"] and found["network"]["figures"]["device"] == "lo"
    assert "the machines did not meet" in found["start"]["seen"] and "--rdzv_endpoint" in found["start"]["fix"]


# The command line


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["nothing"], "there is no recipe 'nothing'"),
        (["--learning_rat=1"], "there is no option '--learning_rat'"),
        (
            ["--limit=soon"],
            "limit: 'soon' is invalid: input should be a valid integer, unable to parse string as an integer",
        ),
        (["--max_restarts=2"], "max_restarts"),
        (["--nnodes=2"], "2 machines, and no address of machine 0"),
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
    with pytest.raises(SystemExit, match="0"):
        cli.main(["doctor", "--help"])
    shown = capsys.readouterr().out
    assert "--json" in shown and "--limit" in shown and "--nnodes" in shown and "--learning_rate" not in shown
    with pytest.raises(SystemExit, match="0"):
        cli.main(["doctor", "--help", "all"])
    assert "--learning_rate" in capsys.readouterr().out
