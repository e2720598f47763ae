"""The plan: what it answers, against published figures, and what it chooses."""

import json
import re
import subprocess
import sys

import pytest
from launches import ROOT
from planned import planned_context, planned_run

from manyrank import cli
from manyrank.config.args import parse
from manyrank.config.resolve import resolve
from manyrank.errors import UserError
from manyrank.models import catalog
from manyrank.plan import memory, planner, speed
from manyrank.plan.command import _nodes
from manyrank.plan.memory import GiB
from manyrank.plan.planner import Verdict, make_plan
from manyrank.plan.view import in_words, summary
from manyrank.topology import gpus
from manyrank.topology.gpus import GPU_KINDS, find_kind
from manyrank.topology.strategies import STRATEGIES


def config(*argv: str):
    line = parse(["--model=x", "--data_path=x", *argv], prog="test", launch=False)
    return resolve(line.recipe, line.overrides).config


def planned(model: str, gpu: str, *argv: str, nproc: int = 1, nnodes: int = 1, host=None) -> planner.Plan:
    context = planned_context(config(*argv), nproc=nproc, nnodes=nnodes, gpu=find_kind(gpu), host=host)
    return make_plan(context, catalog.read(model))


QLORA = ("--method=qlora", "--gradient_checkpointing=full")
SEVENTY = (*QLORA, "--lora_r=8", "--lora_dropout=0.1", "--max_length=2048", "--micro_batch=2")
PUBLISHED = [  # model, strategy, processes, recipe, GB as published, how far off
    ("llama-2-70b", "fsdp", 2, SEVENTY, 35.6, 0.1),
    ("llama-2-70b", "zero3", 2, SEVENTY, 36.6, 0.15),
    ("llama-2-70b", "fsdp_offload", 2, SEVENTY, 19.6, 0.3),
    ("llama-2-7b", "single", 1, (*QLORA, "--max_length=1024", "--micro_batch=4"), 8, 0.1),
    ("deepseek-r1-distill-qwen-32b", "single", 1, (*QLORA, "--max_length=2048", "--micro_batch=1"), 27.5, 0.15),
]


@pytest.mark.parametrize(("model", "strategy", "nproc", "recipe", "gigabytes", "off"), PUBLISHED)
def test_published_figures(model, strategy, nproc, recipe, gigabytes, off):
    found = memory.estimate(planned_run(config(*recipe), catalog.read(model), strategy, nproc))
    assert found.peak / 1e9 == pytest.approx(gigabytes, rel=off)


def test_the_parts_are_the_peak_and_the_peak_is_the_greatest_moment():
    for option in planned("llama-3.1-8b", "H100", "--max_length=4096", nproc=8).options:
        assert sum(option.memory.parts.values()) == option.memory.peak
        assert option.memory.moment in ("loss", "backward", "step") and min(option.memory.parts.values()) > 0


def test_more_of_anything_needs_more():
    shape = catalog.read("qwen2.5-7b")

    def peak(*argv: str, strategy: str = "fsdp", nproc: int = 4) -> int:
        return memory.estimate(planned_run(config(*argv), shape, strategy, nproc)).peak

    assert peak("--max_length=2048") > peak("--max_length=1024")
    assert peak("--micro_batch=8") > peak("--micro_batch=4")
    assert (
        peak("--gradient_checkpointing=off")
        > peak("--gradient_checkpointing=14")
        > peak("--gradient_checkpointing=full")
    )
    assert peak("--method=full") > peak("--method=lora") > peak("--method=qlora")
    assert peak(nproc=2) > peak(nproc=8)
    assert peak(strategy="ddp") > peak(strategy="fsdp") > peak(strategy="fsdp_offload")
    assert (
        peak("--optim=adamw_torch", strategy="ddp")
        > peak("--optim=adamw_8bit", strategy="ddp")
        > peak("--optim=paged_adamw_8bit", strategy="ddp")
    )


def test_hsdp_shards_over_one_machine():
    shape = catalog.read("llama-3-8b")
    one, four = (
        memory.estimate(planned_run(config("--method=full"), shape, "hsdp", 8, nodes)).parts["weights"]
        for nodes in (1, 4)
    )
    assert one == four == memory.estimate(planned_run(config("--method=full"), shape, "fsdp", 8, 1)).parts["weights"]


def test_auto_takes_the_simplest_of_the_fastest_that_fit():
    assert planned("qwen2.5-7b", "H100", nproc=8).chosen.strategy.name == "ddp"
    big = planned("llama-3.1-70b", "H100", "--gradient_checkpointing=full", nproc=8)
    assert big.chosen.strategy.name == "fsdp" and "ddp needs" in big.why
    assert planned("qwen2.5-0.5b", "RTX4090").chosen.strategy.name == "single"


def test_auto_passes_over_what_the_rules_refuse():
    plan = planned("llama-3.1-70b", "H100", "--method=int8", "--gradient_checkpointing=full", nproc=8)
    assert {option.strategy.name for option in plan.options if option.refused} >= {"fsdp", "zero3"}
    assert not plan.chosen.refused


def test_where_all_is_refused_nothing_is_called_the_fastest():
    plan = planned("llama-3.1-8b", "A100-80GB", "--method=fp8")
    assert all(option.refused for option in plan.options) and plan.why.startswith("refused, as all are: method fp8")


def test_host_memory_counts_where_it_is_known():
    argv = ("--method=full", "--max_length=2048", "--micro_batch=1", "--gradient_checkpointing=full")
    enough = planned("llama-3.1-8b", "RTX4090", *argv)
    assert enough.chosen.strategy.name in ("fsdp_offload", "zero3_offload") and enough.chosen.usable
    short = planned("llama-3.1-8b", "RTX4090", *argv, host=64 * GiB)
    assert short.chosen.verdict == Verdict.TOO_BIG
    needs = max(short.chosen.memory.host, short.chosen.memory.host_loading)
    assert f" GiB a GPU, host memory {needs / GiB:.1f} of 64.0 GiB (does not fit)" in summary(short)


@pytest.mark.parametrize("nproc", [2, 4, 8])
def test_a_4_bit_base_loads_in_shards(nproc):
    """70B in 24 GB: a rank holds its part, the constants and one matrix, and not the 37 GiB of the whole."""
    plan = planned("llama-3.1-70b", "RTX4090", "--method=qlora", "--max_length=2048", nproc=nproc)
    assert plan.chosen.usable and plan.chosen.strategy.offload and plan.chosen.memory.loading < 5 * GiB
    sharded = next(option.memory for option in plan.options if option.strategy.name == "fsdp")
    weights, constants = memory.base_weights(next(o.run for o in plan.options if o.strategy.name == "fsdp"))
    assert weights > 34 * GiB
    assert weights / nproc + constants < sharded.loading < weights / nproc + constants + 4 * GiB


def test_where_nothing_fits_it_says_so():
    plan = planned("llama-3.1-405b", "T4", nproc=2)
    assert plan.why.startswith("none fits") and plan.chosen.verdict == Verdict.TOO_BIG
    assert plan.chosen.largest_micro_batch == 0 and plan.chosen.largest_max_length == 0


def test_the_largest_micro_batch_and_length_fit_and_more_do_not():
    chosen = planned("llama-3.1-8b", "A100-80GB", "--gradient_checkpointing=full").chosen
    room = planner.ROOMY * find_kind("A100-80GB").memory
    for key, largest, step in (
        ("per_device_train_batch_size", chosen.largest_micro_batch, 1),
        ("max_length", chosen.largest_max_length, 64),
    ):
        assert largest > 0
        assert memory.estimate(chosen.run.with_options(**{key: largest})).needed <= room
        assert memory.estimate(chosen.run.with_options(**{key: largest + step})).needed > room


@pytest.mark.parametrize(
    ("gpu", "argv", "some"),
    [("H100", (), False), ("A100-80GB", ("--max_length=4096",), True), ("RTX4090", ("--max_length=8192",), True)],
)
def test_auto_checkpoints_as_few_layers_as_fit(gpu, argv, some):
    run = planned_run(config("--gradient_checkpointing=auto", *argv), catalog.read("llama-3.1-8b"), "single")
    room = planner.ROOMY * find_kind(gpu).memory
    found = planner.settled(run, find_kind(gpu).memory)
    assert (found.config.gradient_checkpointing != "off") == some
    if isinstance(found.config.gradient_checkpointing, int):
        assert memory.estimate(found).needed <= room
        assert memory.estimate(found.with_options(gradient_checkpointing=found.checkpointed - 1)).needed > room
    elif some:
        assert memory.estimate(found.with_options(gradient_checkpointing=found.shape.depth - 1)).needed > room


def test_operations_are_4n_for_lora_and_6n_for_full():
    shape = catalog.read("llama-3.1-8b")
    short = ("--max_length=16",)  # next to no attention
    lora, full = (
        speed.needed(planned_run(config(f"--method={method}", *short), shape, "single")) for method in ("lora", "full")
    )
    weights = shape.active + speed.SUPERVISED * shape.embedding
    assert full == pytest.approx(6 * weights, rel=0.01)
    assert lora == pytest.approx(4 * weights, rel=0.02)


def test_a_batch_of_fewer_examples_than_gpus_stops_scaling():
    argv = ("--global_batch_size=64", "--micro_batch=1", "--max_length=2048")
    context = planned_context(config(*argv), nproc=8, gpu=find_kind("H100"))
    rows = planner.scaling(context, catalog.read("llama-3.1-8b"), [1, 8, 16, 32])
    ddp = {row.nnodes: row for row in rows if row.option.strategy.name == "ddp"}
    assert ddp[8].efficiency > 0.9 and ddp[16].efficiency < 0.6 and "batch" in ddp[16].waits_for
    assert "hsdp" in {row.option.strategy.name for row in rows}


ALL_KEPT = ("--max_length=2048", "--micro_batch=1", "--gradient_checkpointing=off")


def test_the_scores_of_eager_attention_are_kept(capsys):
    peaks = {
        chosen: planned("qwen2.5-7b", "H100", *ALL_KEPT, f"--attn_implementation={chosen}").chosen.memory.peak
        for chosen in ("none", "sdpa", "eager")
    }
    assert peaks["none"] <= peaks["sdpa"] < peaks["eager"]
    text = run(capsys, "--model=qwen2.5-7b", "--gpu=H100", "--attn_implementation=eager")
    assert "; attention eager\n" in text


def test_tf32_has_half_the_rate_of_16_bits():
    def planned_speed(*argv: str, bf16: bool):
        context = planned_context(config("--max_length=2048", *argv), gpu=find_kind("A100-80GB"), bf16=bf16)
        return make_plan(context, catalog.read("qwen2.5-7b")).chosen.speed

    exact, fast = planned_speed(bf16=False), planned_speed("--tf32=true", bf16=False)
    half = planned_speed(bf16=True)
    assert (exact.peak_flops, fast.peak_flops, half.peak_flops) == (19.5e12, 156e12, 312e12)
    assert half.compute < fast.compute < exact.compute


def test_float8_pays_where_products_are_large():
    def rate(model: str, method: str) -> float:
        return planned(model, "H100", f"--method={method}", "--max_length=2048").chosen.tokens_per_second

    assert 1.1 * rate("llama-3.1-8b", "lora") < rate("llama-3.1-8b", "fp8") < 2 * rate("llama-3.1-8b", "lora")
    assert rate("qwen2.5-0.5b", "fp8") < rate("qwen2.5-0.5b", "lora")  # more kernels than are worth it
    plan = planned("llama-3.1-8b", "H100", "--method=fp8", nproc=2)
    sharded = {
        name for name, strategy in STRATEGIES.items() if "parameters" in strategy.shards and not strategy.replicas
    }
    assert {option.strategy.name for option in plan.options if option.refused} == sharded


def test_few_tokens_take_as_long_as_the_host_needs_for_their_kernels():
    small = planned("qwen2.5-0.5b", "H100", "--max_length=128", "--micro_batch=1").chosen.speed
    twice = planned("qwen2.5-0.5b", "H100", "--max_length=256", "--micro_batch=1").chosen.speed
    assert small.compute == small.host == twice.compute and "the host" in speed.why_slow(small)
    recomputed = planned("qwen2.5-0.5b", "H100", "--max_length=128", "--micro_batch=1", "--gradient_checkpointing=full")
    assert recomputed.chosen.speed.host > small.host
    large = planned("llama-3.1-8b", "H100", "--max_length=4096").chosen.speed
    assert large.busy and large.compute > 2 * large.host


def test_slow_links_are_named():
    row = planned(
        "llama-3.1-70b",
        "RTX4090",
        "--method=full",
        "--max_length=512",
        "--micro_batch=1",
        "--strategy=fsdp",
        nproc=8,
        nnodes=4,
    ).chosen
    assert row.speed.exposed > 0.5 * row.speed.step and "links" in speed.why_slow(row.speed)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("h100", "H100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("4090", "RTX4090"),
        ("Tesla T4", "T4"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX6000-Ada"),
        ("RTX 4060 Ti", "RTX4060Ti"),
        ("A100", "A100-80GB"),
    ],
)
def test_kinds_by_the_names_that_drivers_give(name, kind):
    assert find_kind(name).name == kind
    assert len({kind.name for kind in GPU_KINDS}) == len(GPU_KINDS)


@pytest.mark.parametrize(
    "name", ["foo", "H", "GPU", "", "4", "A1", "T400", "NVIDIA H20", "RTX 4060", "RTX 3060 Ti", "NVIDIA RTX A4000"]
)
def test_what_is_no_kind(name):
    assert find_kind(name) is None


def test_lists_of_machines():
    assert _nodes("1,2,4,...,128") == [1, 2, 4, 8, 16, 32, 64, 128] and _nodes("3") == [3]
    for wrong in ("", "0", "2,1", "...,4", "1,...", "a", "1,,2"):
        with pytest.raises(ValueError, match="rising list"):
            _nodes(wrong)


# The command


def run(capsys, *argv: str) -> str:
    assert cli.main(["plan", *argv]) == 0
    return capsys.readouterr().out


def test_json_has_the_values(capsys):
    out = json.loads(
        run(
            capsys,
            "--model",
            "meta-llama/Llama-3.1-8B",
            "--method",
            "qlora",
            "--strategy",
            "fsdp",
            "--nproc",
            "2",
            "--gpu-memory",
            "24GiB",
            "--json",
            "--micro-batch",
            "1",
        )
    )
    assert (
        out["per_gpu_bytes"] == sum(out["parts"].values()) and out["strategy"] == "fsdp" and len(out["strategies"]) == 1
    )
    assert out["fits"] is True and out["gpu_memory_bytes"] == 24 * GiB and out["tokens_per_second"] is None
    assert out["largest_micro_batch"] >= 1 and out["parameters"] == 8_030_261_248


def test_a_plan_shows_the_micro_batch_that_a_launch_would_take(capsys):
    argv = ("--model", "qwen2.5-0.5b", "--gpu", "H100", "--max_length", "1024")
    assert "micro-batch 4 x 1,024 tokens" in run(capsys, *argv)
    assert "micro-batch 16 x 1,024 tokens" in run(capsys, *argv, "--global_batch_size", "64")
    assert "micro-batch 4 x 1,024 tokens" in run(capsys, *argv, "--global_batch_size", "64", "--nnodes", "1,2")


def test_the_tables(capsys):
    out = run(
        capsys,
        "--model",
        "llama-3.1-70b",
        "--gpu",
        "H100-80GB",
        "--nproc",
        "8",
        "--nnodes",
        "1,2,...,8",
        "--gradient-checkpointing",
        "full",
        "--tokens",
        "10M",
    )
    assert "*fsdp" in out and "fsdp: the simplest of the fastest that fit; ddp needs" in out
    assert re.search(r"30 M tokens: \d\d minutes, about \$\d\d\n", out)
    rows = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit()]
    assert [row[:2] for row in rows] == [["1", "8"], ["2", "16"], ["4", "32"], ["8", "64"]]


def test_a_recipe_and_the_embedded_model(capsys, embedded_model):
    out = run(capsys, "quickstart", "--gpu", "L4")
    assert out.startswith("embedded: 2.36 M parameters") and "*single" in out and "\nno rule refuses it\n" in out
    assert re.search(r"k tokens: 0\.\d+ seconds, less than \$1\n", out)


def test_what_nobody_gave_is_said(capsys):
    argv = ("Qwen2.5-7B", "--gpu", "L4")
    out = run(capsys, *argv)
    assert "\nassumed, as not given: method lora, max_length 1,024, per_device_train_batch_size 4, nproc 1\n" in out
    given = ("--method=qlora", "--max_length=2048", "--micro-batch=2", "--nproc=2")
    assert "assumed" not in run(capsys, *argv, *given)
    assert json.loads(run(capsys, *argv, *given[:-1], "--json"))["assumed"] == {"nproc": "1"}
    assert "data_path the bundled sample" in run(capsys, "embedded", "--gpu", "L4")


@pytest.mark.parametrize("memory", ["1TiB", "1024 GiB", "1.1T", "1099GB"])
def test_units_of_memory(capsys, memory):
    assert "1 x GPU of 10" in run(capsys, "Qwen2.5-7B", "--gpu-memory", memory)


@pytest.mark.parametrize(
    ("hours", "shown"), [(8.1e-05, "0.29 seconds"), (0.2, "12 minutes"), (4.41, "4.4 hours"), (75, "3.1 days")]
)
def test_times_are_in_the_unit_that_suits_them(hours, shown):
    assert in_words(hours) == shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "nothing-7b"], "nothing is known here"),
        (["--model", "qwen3-8b", "--gpu", "X1"], "no GPU 'X1' is known"),
        (["--model", "qwen3-8b", "--gpu-memory", "big"], "units are KiB, MiB, GiB, TiB"),
        (["--model", "qwen3-8b", "--nnodes", "2,1"], "rising list"),
        (["--model", "qwen3-8b", "--nnodes", "1,2"], "speeds need a kind"),
        (["--model", "qwen3-8b", "--stratgy", "ddp"], "did you mean"),
        (["--model", "qwen3-8b", "--strategy", "ddpp"], "strategy"),
        ([], "manyrank plan Qwen2.5-7B"),
    ],
)
def test_wrong_command_lines(capsys, argv, message):
    assert cli.main(["plan", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error():
    argv = f"{sys.executable} -m manyrank.cli plan --model qwen3-8b --gpu L4 --json | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", argv], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")


def test_a_broken_driver_does_not_matter_to_a_plan_for_other_gpus(capsys, monkeypatch):
    def broken():
        raise UserError("CUDA cannot use the GPUs", where="the CUDA driver", fix="restart")

    monkeypatch.setattr(gpus, "probe", broken)
    assert "8 x H100" in run(capsys, "--model", "qwen3-8b", "--gpu", "H100", "--nproc", "8")
    assert cli.main(["plan", "--model", "qwen3-8b"]) == 2  # it would be for the GPUs that are here
    assert "CUDA cannot use the GPUs" in capsys.readouterr().err


def test_no_torch_is_imported():
    program = (
        "import sys\nfrom manyrank import cli\n"
        "assert cli.main(['plan', '--model', 'llama-3.1-8b', '--gpu', 'H100', '--nproc', '8']) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True)


def test_choosing_is_what_the_planner_says():
    program = "import make_choosing; print(make_choosing.text(), end='')"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "docs", capture_output=True, text=True, check=True
    )
    assert done.stdout == (ROOT / "docs" / "choosing.md").read_text(), "python docs/make_choosing.py writes it anew"
