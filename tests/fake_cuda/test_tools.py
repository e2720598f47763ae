"""The doctor's step, save and load, and GRPO, on stand-in GPUs of which a process sees more than it uses."""

import json
import sys

import pytest
import warm
from launches import ROOT, launch

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3"])
def test_doctor(strategy, embedded_model, tmp_path):
    argv = [sys.executable, "-m", "manyrank.cli", "doctor", "verify", f"--strategy={strategy}", "--nproc=2"]
    argv += ["--bf16=true", "--json", "--limit=250", f"--output_dir={tmp_path}"]
    done = warm.run(argv, cwd=ROOT)
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    wrong = {name: check for name, check in checks.items() if check["state"] == "failed"}
    assert done.returncode == 0 and not wrong, f"{wrong}{done.stderr}"
    assert {"GPU 0", "GPU 1", "process group", "all-reduce", "step", "save and load"} <= checks.keys()


@pytest.mark.parametrize(("strategy", "nproc"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_grpo(strategy, nproc, embedded_model, tmp_path):
    args = ["--task=grpo", f"--strategy={strategy}", f"--nproc={nproc}", "--max_steps=2", "--save_steps=1"]
    args += ["--rewards={length: {max: 10}}", "--num_generations=2", "--global_batch_size=4", "--bf16=true"]
    args += ["--per_device_train_batch_size=2", "--max_completion_length=4", "--packing=none", "--sample_questions=[]"]
    run = launch(tmp_path / "run", *args)
    assert run.code == 0, run.stdout + run.stderr
    assert len(run.metrics("loss")) == 2 and run.facts()["world_size"] == nproc
    assert (run.folder / "checkpoint-2" / "manifest.json").is_file()
