"""What a launch decides by itself, and what it does when the memory does not suffice."""

import random

import pytest
from launches import launch

from manyrank.config.args import parse
from manyrank.data.packing import step_layout
from manyrank.errors import EXIT_MEMORY, UserError
from manyrank.launch.main import resolve_launch
from manyrank.topology.gpus import Gpu, Hardware, find_kind


def machine(gpu: str | None = None, count: int = 1) -> Hardware:
    gpus = (Gpu(gpu, find_kind(gpu).memory, (9, 0)),) * count if gpu else ()
    return Hardware(gpus=gpus, cpu_cores=8, cpu_bf16=True, memory=2**41)


def decided(here: Hardware, *argv: str):
    return resolve_launch(parse(["--data_path=x", *argv], prog="test", launch=True), here)


BIG = ("--model=llama-3.1-70b", "--max_length=4096")


def test_on_gpus_the_plan_chooses_the_strategy():
    many = decided(machine("H100-80GB", 8), *BIG)
    assert (many.context.strategy.name, many.context.nproc) == ("fsdp", 8) and "ddp needs" in many.summary()
    small = decided(machine("H100-80GB", 8), "--model=qwen2.5-1.5b")
    assert small.context.strategy.name == "ddp" and "planned:" in small.summary() and "tokens/s" in small.summary()
    assert decided(machine("H100-80GB"), "--model=qwen2.5-1.5b").context.strategy.name == "single"


def test_auto_is_the_default_and_a_name_stands():
    assert decided(machine("H100-80GB", 8), *BIG, "--strategy=auto").context.strategy.name == "fsdp"
    named = decided(machine("H100-80GB", 8), *BIG, "--strategy=zero3")
    assert named.context.strategy.name == "zero3" and named.plan.chosen.strategy.name == "zero3"


def test_on_cpus_nothing_is_planned():
    here = decided(machine(), "--model=llama-3.1-8b")
    assert (here.context.strategy.name, here.plan, here.notes) == ("single", None, ())
    assert decided(machine(), "--model=llama-3.1-8b", "--nproc=2").context.strategy.name == "ddp"


def test_a_model_that_is_not_known_here_is_not_planned_and_that_is_said():
    found = decided(machine("H100-80GB", 8), "--model=someone/a-model-of-mine")
    assert found.context.strategy.name == "ddp" and found.plan is None and "nothing is planned" in found.summary()


def test_what_a_step_comes_to_is_shown():
    told = decided(machine("H100-80GB", 8), "--model=qwen2.5-7b", "--micro_batch=2", "--global_batch_size=64").summary()
    assert "a step: 64 examples (micro-batch 2 x accumulation 4 x world 8)" in told


@pytest.mark.parametrize(("batch", "largest"), [(8, 1), (4096, 8)])
def test_an_automatic_micro_batch_is_the_largest_that_fits_or_is_needed(batch, largest):
    found = decided(
        machine("H100-80GB", 8),
        "--model=llama-3.1-8b",
        "--micro-batch=auto",
        f"--global_batch_size={batch}",
        "--max_length=1024",
    )
    assert batch > 8 or found.config.per_device_train_batch_size == largest
    assert found.plan.chosen.verdict == "fits"
    assert (
        found.config.per_device_train_batch_size >= largest
        and found.config.global_batch_size == batch
        and found.retries
    )
    assert f"--per_device_train_batch_size={found.config.per_device_train_batch_size}" in found.line.argv
    assert not any("auto" in word for word in found.line.argv)


def test_an_automatic_micro_batch_needs_a_global_batch_and_a_model():
    with pytest.raises(UserError, match="no global batch"):
        decided(machine("H100-80GB"), "--model=llama-3.1-8b", "--micro_batch=auto")
    with pytest.raises(UserError, match="nothing is known here"):
        decided(machine("H100-80GB"), "--model=a/b", "--micro_batch=auto", "--global_batch_size=8")


OPEN = ("--global_batch_size=64", "--max_length=1024")


def test_a_micro_batch_that_nobody_gave_keeps_a_small_model_from_waiting_for_the_host():
    """And its steps have fewer micro-batches, with every example once."""
    found = decided(machine("H100-80GB"), "--model=qwen2.5-0.5b", *OPEN)
    speeds = {}
    for size in (4, found.config.micro_batch // 2, found.config.micro_batch):
        speeds[size] = decided(
            machine("H100-80GB"), "--model=qwen2.5-0.5b", *OPEN, f"--micro_batch={size}"
        ).plan.chosen.speed
    assert found.config.micro_batch > 4 and [speed.busy for speed in speeds.values()] == [False, False, True]
    assert speeds[found.config.micro_batch].tokens_per_second > 1.4 * speeds[4].tokens_per_second
    assert found.config.global_batch_size == 64 and found.plan.chosen.verdict == "fits" and found.retries
    assert f"--per_device_train_batch_size={found.config.micro_batch}" in found.line.argv

    lengths = random.Random(0).choices(range(50, 1025), k=64)
    before, now = (step_layout(lengths, ranks=1, token_budget=size * 1024)[0] for size in (4, found.config.micro_batch))
    assert len(now) <= len(before) / 3
    for layout in (before, now):
        assert sorted(example for micro_batch in layout for example in micro_batch) == list(range(64))


def test_a_micro_batch_that_nobody_gave_follows_model_gpu_and_processes():
    def size(gpu: str, model: str, count: int = 1) -> int:
        return decided(machine(gpu, count), f"--model={model}", *OPEN).config.micro_batch

    assert size("H100-80GB", "llama-3.1-8b") == 4 == size("RTX4090", "qwen2.5-0.5b")
    assert size("H100-80GB", "qwen2.5-1.5b") > 4 > size("RTX4090", "llama-3.1-8b")
    assert size("H100-80GB", "qwen2.5-0.5b", 8) == 64 // 8  # no larger than a process's share of the step


@pytest.mark.parametrize(
    "argv",
    [
        ("--micro_batch=4",),
        ("--packing=none",),
        ("--gradient_accumulation_steps=16",),
        ("--nnodes=2", "--node_rank=0", "--rdzv_endpoint=a:1"),
    ],
)
def test_a_micro_batch_stays_where_it_is_given_or_others_depend_on_it(argv):
    here = machine("H100-80GB")
    found = decided(here, "--model=qwen2.5-0.5b", *OPEN, *argv)
    assert found.config.micro_batch == 4 and not found.retries
    assert decided(here, "--model=qwen2.5-0.5b").config.micro_batch == 4  # the batch would be another one
    assert decided(machine(), "--model=qwen2.5-0.5b", *OPEN).config.micro_batch == 4  # no speeds are known
    assert decided(here, "--model=a/b", *OPEN).config.micro_batch == 4


# Asks before a step, the third unless the environment has another, for more memory than any machine has while the
# micro-batch is larger than 2.
GREEDY = """
import os
import torch
from transformers import TrainerCallback
class Greedy(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == int(os.environ.get("STEPS_BEFORE", 2)) and args.per_device_train_batch_size > 2:
            torch.empty(2**50)
"""


@pytest.fixture
def greedy(tmp_path):
    (tmp_path / "greedy.py").write_text(GREEDY)
    return {"PYTHONPATH": str(tmp_path)}


def test_out_of_memory_says_what_was_planned_and_what_to_change(embedded_model, tmp_path, greedy):
    run = launch(
        tmp_path / "run",
        "--strategy=single",
        "--max_steps=4",
        "--per_device_train_batch_size=8",
        "--callbacks=greedy:Greedy",
        **greedy,
    )
    assert run.code == EXIT_MEMORY and "Traceback" not in run.stderr
    assert "out of memory in step 3: planned were" in run.stderr and "this process held" in run.stderr
    assert (
        "--per_device_train_batch_size 4 (about" in run.stderr and "--gradient_checkpointing full (about" in run.stderr
    )


@pytest.mark.parametrize("strategy", [("--strategy=single",), ("--strategy=ddp", "--nproc=2")])
def test_an_automatic_micro_batch_gets_smaller_until_it_fits(embedded_model, tmp_path, greedy, strategy):
    common = ("--max_steps=4", "--global_batch_size=8", *strategy)
    run = launch(tmp_path / "run", *common, "--per_device_train_batch_size=auto", "--callbacks=greedy:Greedy", **greedy)
    assert run.code == 0, run.stderr
    assert "trying again with micro-batch 2" in run.stderr
    whole = launch(tmp_path / "whole", *common, "--per_device_train_batch_size=2")
    assert run.metrics() == pytest.approx(whole.metrics(), abs=1e-5)


@pytest.mark.parametrize("saved", [False, True], ids=["nothing saved", "saved"])
def test_a_retry_begins_at_its_own_checkpoint_or_at_the_named_one(saved, embedded_model, tmp_path, greedy):
    common = ("--max_steps=4", "--global_batch_size=8", "--strategy=single")
    whole = launch(tmp_path / "whole", *common, "--per_device_train_batch_size=2", "--save_steps=2")
    named, own = whole.folder / "checkpoint-2", tmp_path / "run" / "checkpoint-3"
    more = ("--per_device_train_batch_size=auto", "--callbacks=greedy:Greedy", "--save_steps=1")
    env = greedy | {"STEPS_BEFORE": "3" if saved else "2"}
    run = launch(tmp_path / "run", *common, *more, f"--resume_from_checkpoint={named}", **env)
    assert run.code == 0, run.stderr
    assert [line for line in run.stderr.splitlines() if line.startswith("trying again")] == [
        "trying again with micro-batch 4",
        "trying again with micro-batch 2",
    ]
    starts = [line for line in run.stdout.splitlines() if line.startswith("resumed from")]
    retries = [f"resumed from {own}, step 3" if saved else f"resumed from {named}, step 2"] * 2
    assert starts == [f"resumed from {named}, step 2", *retries]
    assert run.metrics() == pytest.approx(whole.metrics()[2:], abs=1e-5)
