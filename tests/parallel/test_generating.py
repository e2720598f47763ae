"""Completions and validations of sharded models: how often a layer is gathered.

A completion of 12 tokens took 60 gathers of 4 layers. A validation under fsdp took 7 in a micro-batch after completions and
5 before: the root and lm_head, which keep what they gathered, had been told to give it back.
"""

import json

import pytest
from launches import ROOT, launch

LAYERS, TOKENS = 4, 12  # of the embedded model; of a completion

COUNTER = """
import importlib, json, os, sys
import torch.distributed as dist
import manyrank.training.run as run
from manyrank.models import generate
from manyrank.tasks.sft import SFT
from transformers import TrainerCallback

importlib.import_module("deepspeed.comm.torch")
backend, gathers, tokens = sys.modules["deepspeed.comm.torch"].TorchBackend, [], []

def counted(owner, name):
    real = getattr(owner, name)
    def gather(*args, **kwargs):
        gathers.append(name)
        return real(*args, **kwargs)
    setattr(owner, name, gather)

counted(dist, "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor")  # of FSDP2
for name in ("all_gather_into_tensor", "all_gather"):
    counted(backend, name)
broadcast = generate.broadcast
generate.broadcast = lambda value: tokens.append(1) or broadcast(value)

def noted(owner, name, micro_batches):
    real = getattr(owner, name)
    def method(self, *args, **kwargs):
        gathers.clear()
        tokens.clear()
        result = real(self, *args, **kwargs)
        entry = {"what": name, "gathers": len(gathers), "tokens": len(tokens), "micro_batches": micro_batches(args)}
        with open(os.environ["COUNTED"], "a") as file:
            file.write(json.dumps(entry) + chr(10))
        return result
    setattr(owner, name, method)

if os.environ.get("RANK") == "1":
    noted(run.TrainingRun, "_answers", lambda args: 0)
    loader = lambda args: args[0]
    noted(SFT, "evaluate", lambda args: sum(len(loader(args).step(i).micro_batches) for i in range(loader(args).steps_per_epoch)))

class Count(TrainerCallback):
    pass
"""
ARGS = (
    "--max_steps=1",
    "--global_batch_size=4",
    "--max_length=96",
    "--sample_questions=How many beads are on the string?",
    f"--sample_max_new_tokens={TOKENS}",
    "--eval_split=0.1",
    "--eval_steps=1",
    "--per_device_eval_batch_size=1",
)


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_layers_are_gathered_once_for_completions_and_once_for_a_micro_batch(strategy, embedded_model, tmp_path):
    (tmp_path / "counting.py").write_text(COUNTER)
    single = launch(tmp_path / "single", *ARGS, "--strategy=single")
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}", "COUNTED": str(tmp_path / "counted")}
    args = (f"--strategy={strategy}", "--nproc=2", "--callbacks=counting:Count")
    run = launch(tmp_path / "run", *ARGS, *args, **env)
    assert run.code == 0, run.stderr
    lines = [json.loads(line) for line in (tmp_path / "counted").read_text().splitlines()]
    before, after = (line for line in lines if line["what"] == "_answers")
    for line in (before, after):
        assert line["tokens"] > 1 and LAYERS <= line["gathers"] <= LAYERS + 6, line
    for line in (line for line in lines if line["what"] == "evaluate"):
        assert line["micro_batches"] * LAYERS <= line["gathers"] <= line["micro_batches"] * (LAYERS + 2), (
            line
        )  # embedding, head
    assert run.metrics("eval_loss") == pytest.approx(single.metrics("eval_loss"), abs=1e-5)
    samples = [(folder / "logs" / "samples.json").read_text() for folder in (run.folder, single.folder)]
    assert samples[0] == samples[1]
