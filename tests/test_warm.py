"""Processes that are forked from a warm one give what new interpreters give, and end as these do."""

import os
import signal
import subprocess
import sys
import time

import pytest
import warm
from launches import launch, nightly
from processes import is_running

from manyrank.runs.heartbeats import beats

COMMAND = [sys.executable, "-m", "manyrank.cli"]


@pytest.mark.parametrize("args", [("--strategy=fsdp", "--nproc=2"), *nightly((("--strategy=single",),))])
def test_losses_and_adapters_are_those_of_new_interpreters(embedded_model, tmp_path, args):
    both = [launch(tmp_path / f"{cold}", "--max_steps=3", *args, cold=cold) for cold in (True, False)]
    assert [run.code for run in both] == [0, 0], both[0].stderr + both[1].stderr
    assert both[0].metrics() == both[1].metrics() and both[0].metrics("grad_norm") == both[1].metrics("grad_norm")
    adapters = [(run.folder / "final_model" / "adapter_model.safetensors").read_bytes() for run in both]
    assert adapters[0] == adapters[1]


def test_exit_codes_output_and_environment_are_its_own(tmp_path):
    done = warm.run([*COMMAND, "--version"])
    cold = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (cold.returncode, cold.stdout, cold.stderr)
    done = warm.run([*COMMAND, "train", "verify", "--learnin_rate=1"], cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and not done.stdout
    shown = warm.run([*COMMAND, "train", "--print", "verify"], env={**os.environ, "OMP_NUM_THREADS": "7"}).stdout
    assert (
        "OMP_NUM_THREADS=7" in shown
        and "OMP_NUM_THREADS=7" not in warm.run([*COMMAND, "train", "--print", "verify"]).stdout
    )


def test_what_takes_too_long_is_ended_with_its_ranks(embedded_model, tmp_path):
    folder = tmp_path / "run"
    options = ("--max_steps=100000", "--strategy=ddp", "--nproc=2", f"--output_dir={folder}")
    with pytest.raises(subprocess.TimeoutExpired):
        warm.run([*COMMAND, "train", "verify", *options], timeout=20)
    ranks = [beat.pid for beat in beats(folder / "logs" / "heartbeats")]
    end = time.monotonic() + 10
    while any(map(is_running, ranks)) and time.monotonic() < end:
        time.sleep(0.1)
    assert len(ranks) == 2 and not any(map(is_running, ranks))
    assert warm.run([*COMMAND, "--version"]).returncode == 0


KILLED_IN_A_BAR = """
import os, signal
from datasets.utils import tqdm as of_datasets
from tqdm import tqdm
from transformers import TrainerCallback
class Bar(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        for bar in (tqdm, of_datasets):
            bar.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_one_that_is_killed_holds_no_lock_of_the_next(embedded_model, tmp_path):
    (tmp_path / "killed.py").write_text(KILLED_IN_A_BAR)
    killed = launch(tmp_path / "a", "--callbacks=killed:Bar", "--strategy=single", PYTHONPATH=str(tmp_path))
    assert killed.code == -signal.SIGKILL
    rows = tmp_path / "rows.jsonl"  # which are tokenised in a bar
    rows.write_text(8 * '{"question": "a", "answer": "b"}\n')
    assert launch(tmp_path / "b", f"--data_path={rows}", "--max_steps=1", "--strategy=single").code == 0


def test_what_needs_an_interpreter_of_its_own_is_refused(tmp_path):
    with pytest.raises(ValueError, match="HOME is read by imports"):
        warm.run([*COMMAND, "--version"], env={**os.environ, "HOME": str(tmp_path)})
    with pytest.raises(ValueError, match="cannot run"):
        warm.run([sys.executable, "-c", "print(1)"])
