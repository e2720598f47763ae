"""What a line of metrics says beside the loss: counts of a step against its tensors, rates and MFU against plain arithmetic."""

import math

import pytest
import torch
from planned import planned_run

from manyrank.config.resolve import Setting, resolve
from manyrank.data.dataset import prepare
from manyrank.data.loader import Step, StepLoader
from manyrank.models.spec import from_config
from manyrank.plan import speed
from manyrank.topology.gpus import find_kind
from manyrank.training.metrics import Meter, kind_of

SHAPE = from_config(
    {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "vocab_size": 1000,
        "tie_word_embeddings": False,
    },
    name="tiny",
)


def config(**values):
    values = {"data_path": "data/sample.jsonl", "max_length": 256, **values}
    return resolve("verify", [Setting(key, value, "the test") for key, value in values.items()]).config


def step(**counts) -> Step:
    counts = {
        "examples": 4,
        "supervised": 300,
        "tokens": 600,
        "computed_tokens": 800,
        "sum_squared_lengths": 120_000,
    } | counts
    return Step(micro_batches=[], **counts)


@pytest.mark.parametrize(
    ("packing", "ranks", "batch"), [("none", 2, 8), ("step", 2, 8), ("none", 3, 2), ("dataset", 1, 3)]
)
def test_the_counts_of_a_step_are_those_of_its_tensors(tokenizer, packing, ranks, batch):
    found = config(packing=packing)
    examples = prepare(found.data_path, tokenizer, found)
    loaders = [
        StepLoader(
            examples=examples,
            batch_size=batch,
            micro_batch_size=2,
            max_length=256,
            packing=packing,
            pad_token=tokenizer.pad_token_id,
            rank=rank,
            ranks=ranks,
            seed=1,
        )
        for rank in range(ranks)
    ]
    steps = [loader.step(1) for loader in loaders]
    micros = [micro for step in steps for micro in step.micro_batches]
    assert {(s.examples, s.tokens, s.computed_tokens, s.sum_squared_lengths) for s in steps} == {
        (steps[0].examples, steps[0].tokens, steps[0].computed_tokens, steps[0].sum_squared_lengths)
    }
    assert steps[0].computed_tokens == sum(micro.inputs["input_ids"].numel() for micro in micros)
    if packing == "none" and batch >= ranks:
        lengths = torch.cat([micro.inputs["attention_mask"].sum(1) for micro in micros])
        assert steps[0].examples == len(lengths) and steps[0].tokens == lengths.sum() < steps[0].computed_tokens
        assert steps[0].sum_squared_lengths == lengths.square().sum()
    if packing != "none":
        lengths = torch.cat([micro.inputs["cu_seq_lens_q"].diff() for micro in micros])
        assert steps[0].tokens == steps[0].computed_tokens == lengths.sum() and steps[0].examples == len(lengths)
        assert steps[0].sum_squared_lengths == lengths.square().sum()


def test_rates_are_counts_over_seconds_and_begin_anew():
    meter = Meter("cpu")
    meter.add(step(), 2.0, 0.5)
    meter.add(step(tokens=400, computed_tokens=400, supervised=100), 4.0, 1.5)
    assert meter.loss == 3.0
    rates = meter.rates(steps_left=10)
    memory = rates.pop("memory_gib")
    assert 0.1 < memory < 64
    assert rates == {
        "tokens_per_second": 500.0,
        "supervised_tokens_per_second": 200.0,
        "samples_per_second": 4.0,
        "padding": round(1 - 1000 / 1200, 4),
        "step_seconds": 1.0,
        "eta_seconds": 10.0,
    }
    meter.add(step(computed_tokens=600), 1.0, 2.0)
    rates = meter.rates(steps_left=0)
    assert (rates["tokens_per_second"], rates["padding"], rates["eta_seconds"]) == (300.0, 0.0, 0.0)


def test_a_window_goes_on_from_a_checkpoint():
    whole, part = Meter("cpu"), Meter("cpu")
    for meter in (whole, part):
        meter.add(step(), 2.0, 0.5)
    after = Meter("cpu")
    state = part.state()
    former = {"computed_tokens": "slots", "sum_squared_lengths": "squares"}  # as checkpoints had them until 0.1
    after.restore({former.get(key, key): value for key, value in state.items()})
    for meter in (whole, after):
        meter.add(step(tokens=1), 4.0, 0.25)
    assert whole.loss == after.loss and whole.window == after.window


def test_mfu_is_needed_operations_over_the_gpus_rate():
    kind = find_kind("NVIDIA H100 80GB HBM3")
    found = {}
    for method in ("lora", "full"):
        run = planned_run(config(method=method), SHAPE, "ddp", nproc=2)
        meter = Meter("cpu", run, kind)
        meter.add(step(), 1.0, 0.25)
        meter.add(step(), 1.0, 0.25)
        window = meter.window
        needed = speed.needed(run, supervised=0.5, length=200.0)
        found[method] = meter._mfu(window)["mfu"], needed
        assert found[method][0] == pytest.approx(1200 * needed / 0.5 / (2 * kind.flops), abs=5e-5)
    # By hand: frozen weights take 4 operations a token, learned ones 6, the head on half of the tokens.
    layer = 4 * 512 * 512 + 3 * 512 * 1024
    attention = 3.5 * 4 * 2 * 100 * (512 + 512)
    assert found["full"][1] == pytest.approx(6 * 4 * layer + 6 * 1000 * 512 * 0.5 + attention, rel=0.01)
    adapters = 6 * planned_run(config(), SHAPE, "ddp", nproc=2).trainable
    assert found["lora"][1] == pytest.approx(4 * 4 * layer + 4 * 1000 * 512 * 0.5 + attention + adapters, rel=0.01)


def test_float32_is_held_against_the_rate_of_float32():
    kind = find_kind("A100-80GB")
    run = planned_run(config(method="full"), SHAPE, "single", bf16=False)
    meter = Meter("cpu", run, kind)
    meter.add(step(tokens=6_000_000, supervised=3_000_000, sum_squared_lengths=1_200_000_000), 1.0, 1.0)
    expected = 6_000_000 * speed.needed(run, supervised=0.5, length=200.0) / kind.float32_flops
    assert meter.rates(steps_left=0)["mfu"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("run", [None, planned_run(config(), SHAPE, "single")])
def test_there_is_no_mfu_where_the_rate_is_not_known(run):
    meter = Meter("cpu", run, None)
    meter.add(step(), 1.0, 1.0)
    assert "mfu" not in meter.rates(steps_left=0)
    assert kind_of(torch.device("cpu")) is None


def test_shorter_documents_need_fewer_operations():
    run = planned_run(config(max_length=256), SHAPE, "single")
    assert speed.needed(run) == speed.needed(run, supervised=speed.SUPERVISED, length=256)
    assert speed.needed(run, length=64) < speed.needed(run)
    assert math.isclose(
        speed.needed(run) - speed.needed(run, length=128),
        speed.needed(run, length=128) - speed.needed(run, length=0.0001),
        rel_tol=1e-4,
    )
