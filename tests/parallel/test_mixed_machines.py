"""Ranks on machines that are not alike."""

import socket

import pytest
from launches import ROOT, launch, nightly

from manyrank.errors import EXIT_USER
from manyrank.parallel import accelerator

# Only rank 1's CPU has bf16.
UNLIKE = """
import os
from manyrank.topology import gpus
gpus._cpu_bf16 = lambda: os.environ.get("RANK") == "1"
"""


@pytest.mark.parametrize("strategy", ["ddp", *nightly("fsdp")])
def test_ranks_that_would_compute_in_other_types(strategy, tmp_path, embedded_model):
    """They would train apart, or wait for each other: both end, and say what to set."""
    (tmp_path / "sitecustomize.py").write_text(UNLIKE)
    argv = ("--nproc=2", f"--strategy={strategy}", "--max_steps=1")
    env = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}"}
    run = launch(tmp_path / "run", *argv, "--bf16=auto", cold=True, **env)
    assert run.code == EXIT_USER, run.stderr
    host = socket.gethostname()
    assert (
        f"error: bf16 auto is bf16 on {host}, and float32 on {host}\nwhere: bf16\nfix:   give --bf16 false"
        in run.stderr
    )
    assert "Traceback" not in run.stderr
    assert launch(tmp_path / "run", *argv, "--bf16=false", CUDA_VISIBLE_DEVICES="").code == 0


def test_machines_are_named():
    ranks = [("node0", True)] * 4 + [("node1", False)] * 4 + [("node2", True)]
    assert accelerator.unlike(ranks) == "bf16 auto is bf16 on node0, node2, and float32 on node1"
    assert accelerator.unlike(ranks[:4]) is accelerator.unlike(ranks[4:8]) is None
