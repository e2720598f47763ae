"""The shell scripts pass everything on, and two machines (two launches on loopback) train like one process."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launches import ROOT, Run, nightly

BIN = str(Path(sys.executable).parent)
PATH = f"{BIN}:{os.environ['PATH']}"


def script(name: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    argv = [str(ROOT / "launch" / name), *args]
    return subprocess.run(
        argv, capture_output=True, text=True, cwd=ROOT, timeout=300, env={**os.environ, "PATH": PATH, **env}
    )


@pytest.mark.parametrize("name", ["local.sh", *nightly("torchrun.sh")])
def test_one_machine(name, whole_run, tmp_path):
    folder = tmp_path / "a folder with blanks"
    done = script(name, "verify", "ddp", "2", "--max_steps=6", "--logging_steps=1", "--output_dir", str(folder))
    assert done.returncode == 0, done.stderr
    run = Run(0, done.stdout, done.stderr, folder)
    assert run.facts()["wrapper"] == "DistributedDataParallel"
    assert run.metrics() == pytest.approx(whole_run.metrics(), abs=1e-5)


@pytest.mark.parametrize("name", ["local.sh", "torchrun.sh", "multinode.sh", "slurm.sbatch"])
def test_without_a_recipe_a_script_says_how_it_is_called(name):
    done = script(name)
    assert done.returncode == 2 and f"launch/{name} RECIPE STRATEGY" in done.stderr and not done.stdout


def test_multinode_shows_the_command_of_its_machine():
    place = {"NNODES": "2", "NODE_RANK": "1", "ENDPOINT": "first:29501", "NPROC": "4"}
    done = script("multinode.sh", "verify", "fsdp", "--print", "--output_dir=a b", **place)
    assert "# node 1\n" in done.stdout
    assert "--num_processes 8 --num_machines 2 --machine_rank 1 --main_process_ip first" in done.stdout
    assert "'--output_dir=a b'" in done.stdout
    missing = script("multinode.sh", "verify", "fsdp", NNODES="2", NODE_RANK="1")
    assert missing.returncode != 0 and "ENDPOINT" in missing.stderr


def slurm(folder: Path, *args: str, hosts: str, nodes: int) -> list[list[str]]:
    """launch/slurm.sbatch with an srun that runs its command once for each machine, as SLURM's does.

    Returns:
        The command of each machine.
    """
    said = 'printf "%s\\0" "$@" >> "$COMMANDS"; printf "\\n\\0" >> "$COMMANDS"'
    tools = {
        "scontrol": f"printf '{hosts}'",
        "srun": f'for node in {" ".join(map(str, range(nodes)))}; do SLURM_NODEID=$node "$@"; done',
        "manyrank": said,
    }
    for name, body in tools.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    place = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": str(nodes), "NPROC": "2"}
    done = script("slurm.sbatch", *args, PATH=f"{folder}:{PATH}", COMMANDS=str(folder / "commands"), **place)
    assert done.returncode == 0, done.stderr
    return [command.split("\0")[:-1] for command in (folder / "commands").read_text().split("\n\0")[:-1]]


def test_slurm_expands_the_rank_on_each_machine(tmp_path):
    commands = slurm(tmp_path, "verify", "zero3", "--output_dir", "a b", hosts="first\\nsecond\\n", nodes=2)
    train = ["train", "verify", "--strategy", "zero3", "--nproc", "2", "--output_dir", "a b"]
    train += ["--resume_from_checkpoint", "auto", "--nnodes=2", "--rdzv_endpoint=first:29542"]
    assert commands == [[*train, "--node_rank=0"], [*train, "--node_rank=1"]]


def test_slurm_on_one_machine(tmp_path):
    args = ("verify", "ddp", "--resume_from_checkpoint=c", "--output_dir=o")
    commands = slurm(tmp_path, *args, hosts="only\\n", nodes=1)
    assert commands == [["train", "verify", "--strategy", "ddp", "--nproc", "2", *args[2:]]]


@pytest.mark.hosts
@pytest.mark.parametrize(("via", "port"), [("accelerate", 29711), ("torchrun", 29712)])
def test_two_machines_on_loopback(via, port, whole_run, tmp_path):
    def machine(rank: int) -> subprocess.Popen:
        argv = [sys.executable, "-m", "manyrank.cli", "train", "verify", "--strategy=ddp", "--nproc=1", "--nnodes=2"]
        argv += [f"--node_rank={rank}", f"--rdzv_endpoint=127.0.0.1:{port}", f"--via={via}", "--max_steps=6"]
        argv += ["--logging_steps=1", f"--output_dir={tmp_path / 'run'}"]
        return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    machines = [machine(0)]
    try:
        # On one host the second machine could open the first one's port before it.
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        machines.append(machine(1))
        outputs = [process.communicate(timeout=200)[0] for process in machines]
    finally:
        for process in machines:
            process.kill()
    assert [process.returncode for process in machines] == [0, 0], outputs
    run = Run(0, "", "", tmp_path / "run")
    assert run.facts()["world_size"] == 2
    assert run.metrics() == pytest.approx(whole_run.metrics(), abs=1e-5)
