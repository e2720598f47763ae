"""Full fine-tuning of a part of the weights, and with all that is trained in bf16."""

import itertools

import pytest
import torch
from launches import Run, launch, nightly
from safetensors.torch import load_file
from small_models import LAUNCHED, plain_loss, save_for_launch
from transformers import AutoConfig, AutoModelForCausalLM

RECIPE = ("--method=full", "--eval_data_path=data/validation.jsonl", "--max_steps=4", "--save_steps=2", "--lr=1e-3")
PART = "--unfrozen_parameters=[layers.3, 'model.norm']"
TRAINED = ("model.layers.3.", "model.norm.")
STRATEGIES = ["fsdp", "zero2", *nightly("ddp", "zero3")]


def started(folder, *args: str) -> Run:
    run = launch(folder, *RECIPE, *args)
    assert run.code == 0, run.stderr
    return run


@pytest.fixture(scope="module")
def alone(embedded_model, tmp_path_factory):
    """The runs of one process, made once for each set of options."""
    runs = {}

    def run(*args: str) -> Run:
        if args not in runs:
            runs[args] = started(tmp_path_factory.mktemp("alone") / "run", "--strategy=single", *args)
        return runs[args]

    return run


@pytest.mark.parametrize("strategy", ["single", *STRATEGIES])
def test_only_unfrozen_parameters_change(strategy, alone, embedded_model, tmp_path):
    if strategy == "single":
        run = alone(PART)
    else:
        run = started(tmp_path / "run", f"--strategy={strategy}", "--nproc=2", PART)
        assert run.metrics() == pytest.approx(alone(PART).metrics(), abs=1e-5)
        assert run.metrics("grad_norm") == pytest.approx(alone(PART).metrics("grad_norm"), rel=1e-4)
    assert "of the weights are not trained, as the recipe says" in run.stdout
    before, after = (load_file(folder / "model.safetensors") for folder in (embedded_model, run.folder / "final_model"))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name].to(tensor.dtype))}
    assert changed == {name for name in before if name.startswith(TRAINED)}
    assert run.facts()["trained_parameters"] == sum(before[name].numel() for name in changed)
    states = load_file(run.folder / "checkpoint-4" / "optimizer-00001.safetensors")
    assert {name.split("|")[0] for name in states} == changed


def test_a_part_is_resumed_on_another_strategy(alone, tmp_path):
    run = alone(PART)
    again = f"--resume_from_checkpoint={run.folder / 'checkpoint-2'}"
    resumed = started(tmp_path / "run", "--strategy=fsdp", "--nproc=2", PART, again)
    assert resumed.metrics() == pytest.approx(run.metrics()[2:], abs=1e-5)
    other = launch(tmp_path / "other", *RECIPE, "--strategy=single", again)
    assert other.code == 2 and "unfrozen_parameters" in other.stderr, other.stderr


def test_frozen_and_unfrozen_parameters_say_the_same_from_two_sides(alone):
    frozen = alone("--frozen_parameters=['layers.[0-2]', embed_tokens, lm_head]")
    assert frozen.metrics() == alone(PART).metrics()


def test_frozen_parameters_are_kept_in_the_type_of_the_computation(alone, tmp_path):
    whole, part = alone("--bf16"), alone("--bf16", PART)
    sharded = started(tmp_path / "run", "--strategy=fsdp", "--nproc=2", "--bf16", PART)
    facts = part.facts()
    left = facts["parameters"] - facts["trained_parameters"]
    assert facts["base_bytes"] == whole.facts()["base_bytes"] - 2 * left
    assert sharded.facts()["base_bytes"] == facts["base_bytes"]
    assert part.metrics()[0] == pytest.approx(whole.metrics()[0], abs=0.01)
    assert sharded.metrics() == pytest.approx(part.metrics(), abs=0.01)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--frozen_parameters=layers.9"], "no parameter of the model fits 'layers.9'"),
        (["--unfrozen_parameters=layers.3", "--frozen_parameters=layers"], "no parameter is left to be trained"),
        (["--frozen_parameters=("], "not a regular expression"),
        (
            ["--model=TIED", "--unfrozen_parameters=[layers.1, lm_head]", "--frozen_parameters=embed_tokens"],
            "are one weight",
        ),
        (["--pure_bf16", "--bf16=false"], "pure_bf16, and the run computes in float32"),
    ],
)
def test_what_does_not_go_is_refused(args, says, embedded_model, tmp_path):
    plain = AutoConfig.for_model("qwen3", **LAUNCHED, tie_word_embeddings=True)
    save_for_launch(AutoModelForCausalLM.from_config(plain), tmp_path / "tied", embedded_model)
    args = [arg.replace("TIED", str(tmp_path / "tied")) for arg in args]
    run = launch(tmp_path / "run", "--method=full", "--strategy=single", "--max_steps=1", *args)
    assert run.code == 2 and says in run.stderr, run.stderr
    assert not run.folder.exists() and "manyrank.train" not in run.stdout  # before any process


PURE = ("--bf16", "--pure_bf16")


@pytest.mark.parametrize("strategy", ["single", *STRATEGIES])
def test_what_is_trained_is_kept_in_bf16(strategy, alone, tmp_path):
    """The weights and both moments; the losses are those of float32 weights but for rounding."""
    run = alone(*PURE)
    if strategy != "single":
        run = started(tmp_path / "run", f"--strategy={strategy}", "--nproc=2", *PURE)
        assert run.metrics() == pytest.approx(alone(*PURE).metrics(), abs=0.02)
    facts, wide = run.facts(), alone("--bf16")
    assert facts["precision"] == "bf16" and facts["base_bytes"] == 2 * facts["parameters"]
    assert run.metrics() == pytest.approx(wide.metrics(), abs=0.03)
    for file in ("model", "optimizer-00001"):
        values = load_file(run.folder / "checkpoint-4" / f"{file}.safetensors")
        values = {name: value for name, value in values.items() if not name.endswith("|step")}
        assert all(torch.equal(value.float(), value.bfloat16().float()) for value in values.values())
    kept = load_file(wide.folder / "checkpoint-4" / "model.safetensors").values()
    assert not all(torch.equal(value, value.bfloat16().float()) for value in kept)


@pytest.mark.parametrize("strategy", ["single", "fsdp", *nightly("ddp", "zero2", "zero3")])
def test_a_run_in_bf16_is_resumed_exactly(strategy, alone, tmp_path):
    def on(name: str, *args: str) -> Run:
        return started(tmp_path / name, f"--strategy={strategy}", f"--nproc={1 if strategy == 'single' else 2}", *args)

    run = alone(*PURE) if strategy == "single" else on("run", *PURE)
    resumed = on("resumed", *PURE, f"--resume_from_checkpoint={run.folder / 'checkpoint-2'}")
    assert resumed.metrics() == run.metrics()[2:]
    one, two = (load_file(each.folder / "final_model" / "model.safetensors") for each in (run, resumed))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize("options", [(), PURE])
def test_the_best_checkpoint_is_loaded_after_a_validation_under_zero3(options, tmp_path):
    """DeepSpeed fetches ahead in a forward without a backward, and cannot partition what is in flight."""
    common = (
        "--method=full",
        "--eval_data_path=data/validation.jsonl",
        "--max_steps=4",
        "--strategy=zero3",
        "--nproc=2",
    )
    best = (
        "--load_best_model_at_end",
        "--eval_steps=1",
        "--save_steps=1",
        "--greater_is_better",
        "--save_total_limit=9",
    )
    run = launch(tmp_path / "run", *common, *best, *options)
    assert run.code == 0, run.stderr
    losses = run.metrics("eval_loss")
    number = 1 + losses.index(max(losses))
    assert number < 4
    final, kept = (
        load_file(run.folder / name / "model.safetensors") for name in ("final_model", f"checkpoint-{number}")
    )
    assert all(torch.equal(tensor, kept[name].to(tensor.dtype)) for name, tensor in final.items())


@pytest.mark.parametrize(("before", "after"), itertools.pairwise(("single", "fsdp", "zero3", "single")))
def test_a_run_in_bf16_is_resumed_on_another_strategy(before, after, alone, tmp_path):
    def on(strategy: str, *args: str) -> Run:
        return started(tmp_path / f"{strategy}{len(args)}", f"--strategy={strategy}", "--nproc=2", *PURE, *args)

    run = alone(*PURE) if before == "single" else on(before)
    resumed = launch(
        tmp_path / "resumed",
        *RECIPE,
        *PURE,
        f"--strategy={after}",
        f"--nproc={1 if after == 'single' else 2}",
        f"--resume_from_checkpoint={run.folder / 'checkpoint-2'}",
    )
    assert resumed.code == 0, resumed.stderr
    assert resumed.metrics() == pytest.approx(run.metrics()[2:], abs=0.02)


def test_the_final_model_is_the_one_that_was_trained(alone, tokenizer):
    run = alone(*PURE)
    model = AutoModelForCausalLM.from_pretrained(run.folder / "final_model", dtype=torch.float32).eval()
    assert plain_loss(model, tokenizer, "data/validation.jsonl") == pytest.approx(
        run.metrics("eval_loss")[-1], abs=0.01
    )
