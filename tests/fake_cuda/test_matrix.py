"""Every strategy with every method on stand-in GPUs: train, validate, save, sample, resume, final model.

Values are not computed there (README.md), so losses say nothing; files, wrappers, shapes and collectives do.
"""

import json

import pytest
from launches import Run, launch
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
    memory = json.loads((run.folder / "logs" / "memory.json").read_text())
    assert 0 < memory["allocated_bytes"] <= memory["reserved_bytes"]
    saved = tensors(run.folder / "final_model", method)
    assert len(saved) >= facts["trainable_tensors"] and all(all(shape) for shape in saved.values())

    resumed = train(tmp_path / "resumed", method, strategy, f"--resume_from_checkpoint={run.folder / 'checkpoint-2'}")
    assert resumed.code == 0, resumed.stdout + resumed.stderr
    assert len(resumed.metrics("loss")) == 2
    assert tensors(resumed.folder / "final_model", method) == saved


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp", "zero2", "zero3"])
def test_float32(name, embedded_model, tmp_path):
    run = train(tmp_path / "run", "lora", STRATEGIES[name], bf16=False)
    assert run.code == 0, run.stdout + run.stderr
    assert "FAKECUDA refused" not in run.stderr and "FAKENCCL" not in run.stderr
    assert run.facts()["precision"] == "no" and len(run.metrics("loss")) == 4
