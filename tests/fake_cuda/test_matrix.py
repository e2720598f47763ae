"""Every strategy with every method on stand-in GPUs: train, validate, save, sample, resume, final model.

Values are not computed there (README.md), so losses say nothing; files, wrappers, shapes and collectives do.
"""

import json
import os

import pytest
from launches import ROOT, Run, launch
from safetensors import safe_open

from manyrank.tools.verify import WRAPPERS
from manyrank.topology.strategies import STRATEGIES, EngineKind, Strategy

pytestmark = pytest.mark.cuda
METHODS = ("lora", "qlora", "int8", "fp8", "full")
# What the rules refuse: 8-bit weights in shards.
REFUSED = {
    (method, name)
    for method in ("int8", "fp8")
    for name, strategy in STRATEGIES.items()
    if "parameters" in strategy.shards
}
CASES = [(method, name) for method in METHODS for name in STRATEGIES]


def ranks(strategy: Strategy) -> int:
    return 1 if strategy.engine is EngineKind.SINGLE else 4 if strategy.replicas else 2


def train(folder, method: str, strategy: Strategy, *more: str, bf16: bool = True) -> Run:
    """Four steps with validation, checkpoints and sample questions."""
    nproc = ranks(strategy)
    args = [f"--method={method}", f"--strategy={strategy}", f"--nproc={nproc}", "--max_steps=4", "--warmup_steps=1"]
    args += ["--eval_steps=2", "--save_steps=2", f"--bf16={bf16}", "--sample_max_new_tokens=3"]
    args += ["--hsdp_shard_size=2"] if strategy.replicas else []
    return launch(folder, *args, *more, recipe="quickstart")


def tensors(folder, method: str) -> dict[str, tuple[int, ...]]:
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    with safe_open(folder / name, "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}


@pytest.mark.parametrize(("method", "name"), CASES)
def test_run_and_resume(method, name, embedded_model, tmp_path):
    strategy = STRATEGIES[name]
    run = train(tmp_path / "run", method, strategy)
    if (method, name) in REFUSED:
        assert run.code == 2 and f"method {method}" in run.stderr
        return
    assert run.code == 0, run.stdout + run.stderr
    assert "FAKECUDA refused" not in run.stderr and "FAKENCCL" not in run.stderr
    facts = run.facts()
    assert facts["world_size"] == ranks(strategy)
    assert WRAPPERS[strategy.engine] in facts["wrapper"]
    if "parameters" in strategy.shards:
        assert max(facts["base_bytes_here"]) <= 0.55 * facts["base_bytes"]
    assert len(run.metrics("loss")) == 4 and len(run.metrics("eval_loss")) == 2
    samples = json.loads((run.folder / "logs" / "samples.json").read_text())
    assert len(samples) == 3 and all(sample.keys() >= {"question", "before", "after"} for sample in samples)
    memory = json.loads((run.folder / "logs" / "memory.json").read_text())
    assert 0 < memory["allocated_bytes"] <= memory["reserved_bytes"]
    saved = tensors(run.folder / "final_model", method)
    assert len(saved) >= facts["trainable_tensors"] and all(all(shape) for shape in saved.values())

    resumed = train(tmp_path / "resumed", method, strategy, f"--resume_from_checkpoint={run.folder / 'checkpoint-2'}")
    assert resumed.code == 0, resumed.stdout + resumed.stderr
    assert len(resumed.metrics("loss")) == 2
    assert tensors(resumed.folder / "final_model", method) == saved


@pytest.mark.parametrize("name", STRATEGIES)
def test_full_in_part_and_in_bf16(name, embedded_model, tmp_path):
    for number, options in enumerate([["--unfrozen_parameters=[layers.3, model.norm]"], ["--pure_bf16"]]):
        run = train(tmp_path / f"{number}", "full", STRATEGIES[name], *options)
        if (name, options) == ("zero3_offload", ["--pure_bf16"]):
            assert run.code == 2 and "pure_bf16 under zero3_offload" in run.stderr
            continue
        assert run.code == 0, run.stdout + run.stderr
        assert "FAKECUDA refused" not in run.stderr and "FAKENCCL" not in run.stderr
        assert len(run.metrics("loss")) == 4
        facts = run.facts()
        if options == ["--pure_bf16"]:
            assert facts["base_bytes"] == 2 * facts["parameters"]
        else:
            assert facts["trained_parameters"] < facts["parameters"] / 4


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp", "zero2", "zero3"])
def test_float32(name, embedded_model, tmp_path):
    run = train(tmp_path / "run", "lora", STRATEGIES[name], bf16=False)
    assert run.code == 0, run.stdout + run.stderr
    assert "FAKECUDA refused" not in run.stderr and "FAKENCCL" not in run.stderr
    assert run.facts()["precision"] == "no" and len(run.metrics("loss")) == 4


@pytest.mark.parametrize(
    ("method", "name"),
    [("lora", name) for name in ("single", "ddp", "fsdp", "zero2", "zero3")] + [("qlora", "fsdp"), ("full", "zero3")],
)
def test_fp16(method, name, embedded_model, tmp_path):
    """accelerate's own scaler is not there, and its scale is in the checkpoint."""
    run = train(tmp_path / "run", method, STRATEGIES[name], "--fp16", bf16=False)
    assert run.code == 0, run.stdout + run.stderr
    assert "FAKECUDA refused" not in run.stderr and "FAKENCCL" not in run.stderr
    assert run.facts()["precision"] == "fp16" and len(run.metrics("loss")) == 4
    state = json.loads((run.folder / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["loss_scale"] == {"value": 2.0**16, "steps": 4}


@pytest.mark.parametrize(
    ("method", "name"),
    [("lora", name) for name in ("single", "ddp", "fsdp", "hsdp", "zero2", "zero3")]
    + [("qlora", "fsdp"), ("full", "zero3")],
)
def test_grpo(method, name, embedded_model, tmp_path):
    """Completions, rewards, losses, validation, a checkpoint and its resume: integers are computed (patches/integers.py).

    Under single the process sees more GPUs than it uses, which trl would refuse.
    """
    strategy = STRATEGIES[name]
    batch = 4 * ranks(strategy)
    args = [f"--method={method}", f"--strategy={strategy}", f"--nproc={ranks(strategy)}", "--task=grpo", "--bf16=true"]
    args += ["--hsdp_shard_size=2"] if strategy.replicas else []
    args += ["--rewards={length: {max: 10}}", "--num_generations=2", "--packing=none", "--max_completion_length=4"]
    args += [f"--global_batch_size={batch}", "--per_device_train_batch_size=2", "--sample_questions=[]"]
    args += ["--max_steps=2", "--save_steps=1", "--eval_steps=1", "--eval_split=0.04"]
    args += ["--beta=0"] if method == "full" else []
    run = launch(tmp_path / "run", *args)
    assert run.code == 0, run.stdout + run.stderr
    assert "FAKECUDA refused" not in run.stderr and "FAKENCCL" not in run.stderr
    assert WRAPPERS[strategy.engine] in run.facts()["wrapper"] and run.facts()["world_size"] == ranks(strategy)
    assert len(run.metrics("loss")) == len(run.metrics("eval_reward")) == 2
    assert all(rate > 0 for rate in run.metrics("supervised_tokens_per_second"))  # of completions, each of 4 tokens
    completions = (run.folder / "logs" / "completions.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in completions] == [1] * 4 + [2] * 4
    resumed = launch(tmp_path / "resumed", *args, f"--resume_from_checkpoint={run.folder / 'checkpoint-1'}")
    assert resumed.code == 0, resumed.stdout + resumed.stderr
    assert len(resumed.metrics("loss")) == 1
    assert tensors(resumed.folder / "final_model", method) == tensors(run.folder / "final_model", method)


LIMITS = """
import json, os, pathlib
import torch
from torch.distributed import distributed_c10d
from transformers import TrainerCallback
class Limits(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        groups = list(distributed_c10d._world.pg_map)
        backends = [group._get_backend(torch.device("cuda")) for group in groups]
        seconds = [backend.options._timeout.total_seconds() for backend in backends]
        pathlib.Path(os.environ["LIMITS"], os.environ["RANK"]).write_text(json.dumps(seconds))
"""


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero3"])
def test_the_limit_of_collectives_is_that_of_nccl(name, embedded_model, tmp_path):
    """`ddp_timeout` in steps, in every process group of the run."""
    (tmp_path / "limits.py").write_text(LIMITS)
    env = {"PYTHONPATH": f"{tmp_path}:{os.environ['PYTHONPATH']}", "LIMITS": str(tmp_path)}
    args = [f"--strategy={name}", "--nproc=2", "--max_steps=2", "--bf16=true", "--ddp_timeout=77"]
    run = launch(tmp_path / "run", *args, "--callbacks=limits:Limits", **env)
    assert run.code == 0, run.stdout + run.stderr
    for rank in range(2):
        limits = json.loads((tmp_path / str(rank)).read_text())
        assert limits and set(limits) == {77}


WAITS = """
import json, os, pathlib
import cuda_counters
from transformers import TrainerCallback
class Waits(TrainerCallback):
    def __init__(self):
        self.counts = []
    def on_step_begin(self, args, state, control, **kwargs):
        cuda_counters.reset()
    def on_step_end(self, args, state, control, **kwargs):
        self.counts.append(cuda_counters.waits(cuda_counters.read()))
        pathlib.Path(os.environ["WAITS"], os.environ.get("RANK", "0")).write_text(json.dumps(self.counts))
"""


# DeepSpeed's own: all but two in its clipping and stepping, and under zero3 one for each micro-batch's gradients.
HOST_WAITS = {"single": 1, "ddp": 1, "fsdp": 1, "hsdp": 1, "zero2": 10, "zero3": 7}


@pytest.mark.parametrize("name", HOST_WAITS)
def test_waits_of_a_step(name, embedded_model, tmp_path):
    """Of whole steps of a run, on each rank. In the first ten DDP measures itself, with events that are over (logger.cpp)."""
    (tmp_path / "waits.py").write_text(WAITS)
    (tmp_path / "counts").mkdir()
    strategy = STRATEGIES[name]
    args = [
        f"--strategy={strategy}",
        f"--nproc={ranks(strategy)}",
        "--max_steps=14",
        "--bf16=true",
    ]
    args += ["--hsdp_shard_size=2"] if strategy.replicas else []
    env = {
        "PYTHONPATH": f"{tmp_path}:{ROOT / 'benchmarks'}:{os.environ['PYTHONPATH']}",
        "WAITS": str(tmp_path / "counts"),
    }
    run = launch(tmp_path / "run", *args, "--callbacks=waits:Waits", **env)
    assert run.code == 0, run.stdout + run.stderr
    waits = [json.loads(file.read_text())[11:] for file in (tmp_path / "counts").iterdir()]
    assert len(waits) == ranks(strategy)
    assert waits == [[HOST_WAITS[name]] * 3] * len(waits)
