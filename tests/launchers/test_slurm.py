"""A real SLURM job over two nodes: the signal before the time limit, the requeue, the resume, the right losses."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster
from launches import ROOT, Run, launch

from manyrank.runs import run_folder

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(bool(slurm_cluster.available()), reason=str(slurm_cluster.available())),
]
STEPS = 12
SLOWLY = """
import time
from transformers import TrainerCallback
class Slowly(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        time.sleep(0.5)
"""


def wait(true, what: str, log: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, (what, log.read_text() if log.exists() else "no log")
        time.sleep(0.2)


def tools(env: dict[str, str]):
    """Runs a command in an environment and returns what it says."""

    def tool(*argv: str) -> str:
        done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return tool


def test_a_job_is_signalled_requeued_and_resumed(embedded_model, tmp_path):
    whole = launch(tmp_path / "whole", f"--max_steps={STEPS}", "--strategy=single")
    (tmp_path / "slowly.py").write_text(SLOWLY)
    folder, log = tmp_path / "run", tmp_path / "job.log"
    with slurm_cluster.cluster() as env:
        path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
        env |= {"NPROC": "1", "PYTHONPATH": path, "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
        tool = tools(env)
        # Both nodes are this machine, where accelerate's look at the port finds the other node's agent.
        options = ("--via=torchrun", f"--max_steps={STEPS}", "--logging_steps=1", "--callbacks=slowly:Slowly")
        said = tool(
            "sbatch",
            "--nodes=2",
            "--time=10",
            "--gpus-per-node=0",
            f"--output={log}",
            "launch/slurm.sbatch",
            "verify",
            "ddp",
            f"--output_dir={folder}",
            *options,
        )
        job = re.search(r"\d+", said)[0]
        metrics = folder / "logs" / "metrics.jsonl"
        wait(lambda: metrics.exists() and metrics.read_text().count("\n") >= 4, "the first steps", log)
        assert "Signal" not in tool("scontrol", "show", "job", job)  # what is sent here is what the limit would send
        tool("scancel", "--signal=USR1", job)
        wait(lambda: "Restarts=1" in tool("scontrol", "show", "job", job), "the requeue", log)
        wait(lambda: "JobState=PENDING" in tool("scontrol", "show", "job", job), "the second turn", log)
        (saved,) = run_folder.checkpoints(folder)
        assert run_folder.damage(saved) is None and run_folder.step_of(saved) < STEPS
        assert not (folder / "final_model").exists()
        # SLURM waits two minutes before it tries again. At once would be too soon: the nodes still refuse the job's old credential.
        tool("scontrol", "update", f"JobId={job}", "StartTime=now+10")
        wait(lambda: "JobState=COMPLETED" in tool("scontrol", "show", "job", job), "the end", log, seconds=240)
    assert f"resumed from {saved}" in log.read_text()
    run = Run(0, "", "", folder)
    assert run.facts()["world_size"] == 2
    assert run.metrics() == pytest.approx(whole.metrics(), abs=1e-5)


def test_a_job_is_written_submitted_and_trained(embedded_model, whole_run, tmp_path):
    folder = tmp_path / "a run"  # SLURM must understand how its script quotes
    where = (
        "--via=slurm",
        "--nnodes=2",
        "--nproc=1",
        "--gpus=0",
        "--cpus=1",
        "--time=10",
        "--partition=all",
    )
    train = (sys.executable, "-m", "manyrank.cli", "train", "verify", *where, "--submit", "--strategy=ddp")
    with slurm_cluster.cluster() as env:
        tool = tools(env)
        said = tool(*train, "--max_steps=6", "--logging_steps=1", f"--output_dir={folder}")
        job = re.fullmatch(r"SLURM job (\d+)", said.splitlines()[-1])[1]
        log = folder / "launch" / f"job-{job}.log"
        asked = tool("scontrol", "show", "job", job)
        wait(lambda: "JobState=COMPLETED" in tool("scontrol", "show", "job", job), "the end", log, seconds=240)
    for fact in ("JobName=a-run", "NumNodes=2", "CPUs/Task=1", "TimeLimit=00:10:00", "Requeue=1", f"StdOut={log}"):
        assert fact in asked
    run = Run(0, "", "", folder)
    assert run.facts()["world_size"] == 2 and run.facts()["wrapper"] == "DistributedDataParallel"
    assert run.metrics() == pytest.approx(whole_run.metrics(), abs=1e-5)
    plan = (folder / "launch" / "plan.txt").read_text()
    endpoint = re.search(r"--rdzv_endpoint (\S+)", plan)[1]
    assert endpoint == f"{slurm_cluster.NODES[0]}:{29500 + int(job)}"
    assert (folder / "launch" / "submitted").read_text() == f"SLURM job {job}\n"
