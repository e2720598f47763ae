"""Copies of the model, each in shards: what came up, what travels between the copies, and what is refused."""

import json

import pytest
from launches import ROOT, Run, accelerate_launch, launch, nightly

TWO_BY_TWO = ("--strategy=hsdp", "--nproc=4", "--hsdp_shard_size=2")
# 24 examples to a step, of which a process holds one at a time.
MICRO_BATCHES = ("--global_batch_size=24", "--per_device_train_batch_size=1", "--max_length=96", "--max_steps=3")

COUNTER = """
import json, os
import torch.distributed as dist
from manyrank.training.trainer import Trainer
from transformers import TrainerCallback

sums = []
all_reduce = dist.all_reduce
def counted(tensor, op=dist.ReduceOp.SUM, group=None, **kwargs):
    if group is not None and dist.get_world_size(group) == 2:
        sums.append(dist.get_process_group_ranks(group))
    return all_reduce(tensor, op=op, group=group, **kwargs)
dist.all_reduce = counted

train_step = Trainer.train_step
def told(self, step):
    sums.clear()
    result = train_step(self, step)
    entry = {"sums": list(sums), "micro_batches": len(step.micro_batches)}
    with open(f"{os.environ['COUNTED']}-{self.engine.accelerator.process_index}", "a") as file:
        file.write(json.dumps(entry) + chr(10))
    return result
Trainer.train_step = told

class Count(TrainerCallback):
    pass
"""


# The embedded model has 4 layers; full trains also its embedding, and its last norm with its head.
@pytest.mark.parametrize(("method", "units"), [("lora", 4), *nightly(("full", 6))])
def test_copies_exchange_gradients_once_a_step(method, units, embedded_model, tmp_path):
    (tmp_path / "counting.py").write_text(COUNTER)
    common = (f"--method={method}", *MICRO_BATCHES)
    single = launch(tmp_path / "single", *common, "--strategy=single")
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}", "COUNTED": str(tmp_path / "counted")}
    run = launch(tmp_path / "hsdp", *common, *TWO_BY_TWO, "--callbacks=counting:Count", **env)
    assert run.code == 0, run.stderr
    assert run.metrics() == pytest.approx(single.metrics(), abs=1e-5)
    assert run.metrics("grad_norm") == pytest.approx(single.metrics("grad_norm"), rel=1e-5, abs=1e-5)
    assert run.facts()["mesh"] == [2, 2]
    for rank in range(4):
        steps = [json.loads(line) for line in (tmp_path / f"counted-{rank}").read_text().splitlines()]
        assert len(steps) == 3 and min(step["micro_batches"] for step in steps) > 2
        for step in steps:
            assert step["sums"] == [[rank % 2, rank % 2 + 2]] * units


def test_plain_accelerate_launch(whole_run, tmp_path):
    args = ("--strategy=hsdp", "--hsdp_shard_size=2", "--max_steps=6", "--logging_steps=1")
    done = accelerate_launch("hsdp", *args, f"--output_dir={tmp_path / 'run'}", nproc=4)
    assert done.returncode == 0, done.stderr
    run = Run(0, "", "", tmp_path / "run")
    assert (run.facts()["distributed_type"], run.facts()["mesh"]) == ("FSDP", [2, 2])
    assert run.metrics() == pytest.approx(whole_run.metrics(), abs=1e-5)


@pytest.mark.parametrize(
    ("config", "nproc", "args", "problem"),
    [
        ("hsdp", 2, [], "it has a parallelism_config"),
        ("hsdp", 2, ["--strategy=fsdp"], "it has a parallelism_config"),
        (
            "fsdp",
            4,
            ["--strategy=hsdp", "--hsdp_shard_size=2"],
            "accelerate started mesh of processes (), but the recipe asks for (2, 2)",
        ),
        ("hsdp", 2, ["--strategy=hsdp"], "hsdp with one copy of the model, on 2 processes"),
    ],
)
def test_another_strategy_than_the_config_is_refused(config, nproc, args, problem, embedded_model, tmp_path):
    done = accelerate_launch(config, *args, f"--output_dir={tmp_path / 'run'}", nproc=nproc)
    assert done.returncode != 0 and problem in done.stderr
    assert not (tmp_path / "run").exists()
