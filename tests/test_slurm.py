"""A real SLURM job over two nodes: the signal before the time limit, the requeue, the resume, the right losses."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster
from conftest import ROOT, Run, launch

from manyrank import run_folder

pytestmark = pytest.mark.skipif(bool(slurm_cluster.available()), reason=str(slurm_cluster.available()))
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


def test_a_job_is_signalled_requeued_and_resumed(embedded_model, tmp_path):
    whole = launch(tmp_path / "whole", f"--max_steps={STEPS}", "--strategy=single")
    (tmp_path / "slowly.py").write_text(SLOWLY)
    folder, log = tmp_path / "run", tmp_path / "job.log"
    with slurm_cluster.cluster() as env:
        env |= {"NPROC": "1", "PYTHONPATH": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}

        def tool(*argv: str) -> str:
            done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout

        # Both nodes are this machine, where accelerate's look at the port finds the other node's agent.
        options = ("--via=torchrun", f"--max_steps={STEPS}", "--logging_steps=1", "--callbacks=slowly:Slowly")
        said = tool("sbatch", "--nodes=2", "--time=10", "--gpus-per-node=0", f"--output={log}", "launch/slurm.sbatch", "verify", "ddp",
                    f"--output_dir={folder}", *options)  # fmt: skip
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
