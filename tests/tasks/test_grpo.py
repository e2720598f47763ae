"""GRPO in real runs: what is learned from, the reference, every strategy, resuming, signals, and what is refused."""

import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import warm
from launches import ROOT, Run, launch, nightly
from safetensors.torch import load_file

from manyrank.api import _as_it_was
from manyrank.chat_template.render import RenderOptions, prompt_ids, stop_ids
from manyrank.config.resolve import Setting, resolve
from manyrank.errors import UserError
from manyrank.models.inference import load_model
from manyrank.project_files import asset
from manyrank.runs.logs import read_completions, read_metrics
from manyrank.tasks.grpo.task import GRPO
from manyrank.topology import ranks
from manyrank.topology.precision import Precision
from manyrank.training.build import build_run

SUMS = ROOT / "data" / "stories" / "sums.jsonl"
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
SMALL = (
    "--task=grpo",
    "--model=embedded",
    f"--data_path={SUMS}",
    "--rewards={f1: 1.0, numeric: 0.5}",
    "--num_generations=4",
    "--max_completion_length=12",
    "--bf16=no",
    "--lr=1e-3",
    "--lr_scheduler_type=constant",
)
BATCH = ("--per_device_train_batch_size=4", "--global_batch_size=16")


def last_wins(*args: str) -> list[str]:
    """Each option once, as it was given last."""
    return list({arg.partition("=")[0]: arg for arg in args}.values())


def grpo(folder: Path, *args: str, **env: str) -> Run:
    return launch(folder, *last_wins(*SMALL, *args), recipe="--config=fast_test", **env)


@pytest.fixture(scope="module")
def sft(embedded_model, tmp_path_factory) -> Run:
    """Adapters that are somewhere else than the base."""
    more = (
        "--model=embedded",
        f"--data_path={SUMS}",
        "--max_steps=8",
        "--lr=3e-3",
        "--lora_r=4",
        "--max_length=64",
        "--bf16=no",
    )
    run = launch(tmp_path_factory.mktemp("sft") / "run", *more, recipe="--config=fast_test")
    assert run.code == 0, run.stderr
    return run


@pytest.fixture(autouse=True)
def nothing_left_by_others():
    """accelerate keeps what came up in a process, and its environment."""
    with _as_it_was():
        yield


def session_of(folder: Path, *args: str, precision: Precision = Precision.FLOAT32):
    entries = [
        Setting(name, value, "test") for name, _, value in (a.partition("=") for a in last_wins(*SMALL, *BATCH, *args))
    ]
    config = resolve(None, entries).config
    return build_run(config, ranks.from_environment(), GRPO, output_dir=folder, precision=precision)


def log_probs(model, ids: torch.Tensor, mask: torch.Tensor, keep: int) -> torch.Tensor:
    """Of the last `keep` tokens, by plain transformers."""
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[:, -keep:, 0]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_reference_is_the_sft_model(method, sft, tmp_path):
    session = session_of(tmp_path, f"--sft_model={sft.folder}", f"--method={method}")
    try:
        assert session.config.model_name_or_path and session.config.lora_r == 4
        policy = session.trainer.task.trl
        with torch.no_grad():  # the policy has gone somewhere else since
            for parameter in session.engine.trainable.values():
                parameter.add_(0.02 * torch.randn_like(parameter))
        part = policy.complete(session.trainer.loader.step(0).numbers, step=0)[0]
        ids = torch.cat([part["prompt_ids"], part["completion_ids"]], 1)
        mask = torch.cat([part["prompt_mask"], part["completion_mask"]], 1)
        said = part["completion_mask"].bool()
        quantization = "4bit" if method == "qlora" else None
        own, _ = load_model(str(sft.folder), quantization=quantization, dtype="float32")
        base, _ = load_model("embedded", quantization=quantization, dtype="float32")
        # bitsandbytes repacks 4-bit weights in evaluation mode: these are compared in training mode, as they have no dropout.
        expected, bare = (log_probs(m.train(), ids, mask, said.shape[1]) for m in (own, base))
        found = part["ref_per_token_logps"]
        tolerance = 1e-4 if method == "lora" else 2e-2
        assert (found - expected)[said].abs().max() < tolerance
        assert (found - bare)[said].abs().max() > 0.5
        assert not [name for name in session.engine.trainable if ".ref." in name]
    finally:
        session.close()


def test_prompts_are_those_of_the_evaluation(tokenizer, tmp_path):
    """Also where a user's words are special tokens, or a turn before has thinking that is stripped."""
    end = tokenizer.convert_ids_to_tokens(sorted(stop_ids(tokenizer, RenderOptions()))[-1])
    thought = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>hm</think>Two."},
        {"role": "user", "content": f"What is {end}?"},
    ]
    data = tmp_path / "talks.jsonl"
    rows = [[*thought, {"role": "assistant", "content": f"{number}."}] for number in range(4)]
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    session = session_of(tmp_path / "run", f"--data_path={data}", "--thinking=strip")
    try:
        policy = session.trainer.task.trl
        part = policy.complete(session.trainer.loader.step(0).numbers, step=0)[0]
        expected = prompt_ids(tokenizer, thought, options=RenderOptions(thinking="strip"))
        for ids, mask in zip(part["prompt_ids"], part["prompt_mask"]):
            assert ids[mask.bool()].tolist() == expected
        assert "hm" not in tokenizer.decode(expected) and tokenizer.decode(expected).count(end) > 3
    finally:
        session.close()


def test_every_row_is_asked_in_an_epoch(tmp_path):
    session = session_of(tmp_path, "--global_batch_size=24", "--num_train_epochs=1")
    try:
        loader = session.trainer.loader
        assert loader.steps_per_epoch == 17 == session.trainer.total_steps  # of 6 prompts; 100 rows
        steps = [loader.step(number).numbers for number in range(17)]
        assert sorted({number for step in steps for number in step}) == list(range(100))
        assert all(len(step) == 24 and len(set(step)) == 6 for step in steps)
        assert loader.step(17).numbers != steps[0]  # another order
    finally:
        session.close()


@pytest.mark.parametrize(
    ("strategy", "method", "wrapper"),
    [
        ("fsdp", "lora", "FSDPPeftModelForCausalLM"),
        *nightly(  # by day one process and ddp resume in the tests of metrics and of a signal
            ("zero3", "lora", "DeepSpeedEngine"),
            ("single", "lora", "PeftModelForCausalLM"),
            ("ddp", "lora", "DistributedDataParallel"),
            ("fsdp", "qlora", "FSDPPeftModelForCausalLM"),
        ),
    ],
)
def test_resumes_exactly(strategy, method, wrapper, sft, tmp_path):
    nproc = 1 if strategy == "single" else 2
    common = (
        *BATCH,
        f"--strategy={strategy}",
        f"--nproc={nproc}",
        f"--method={method}",
        f"--sft_model={sft.folder}",
        "--max_steps=4",
        "--save_steps=2",
    )
    whole = grpo(tmp_path / "a", *common)
    assert whole.code == 0, whole.stderr
    assert whole.facts()["wrapper"] == wrapper and len(whole.metrics("reward")) == 4
    assert whole.metrics("kl")[0] == pytest.approx(0, abs=1e-3) and whole.metrics("kl")[-1] > 0
    part = grpo(tmp_path / "b", *common, f"--resume_from_checkpoint={whole.folder / 'checkpoint-2'}")
    assert part.code == 0, part.stderr
    for key in ("loss", "reward", "grad_norm", "kl", "completions/mean_length"):
        assert part.metrics(key) == whole.metrics(key)[2:], key
    adapter = "final_model/adapter_model.safetensors"
    assert (part.folder / adapter).read_bytes() == (whole.folder / adapter).read_bytes()
    names = set(load_file(whole.folder / adapter))
    assert names == set(load_file(sft.folder / adapter)) and not (whole.folder / "final_model" / "ref").exists()
    assert [said["step"] for said in read_completions(whole.folder)] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4


def test_a_signal_saves_and_ends_with_75(sft, tmp_path):
    common = (
        *SMALL,
        *BATCH,
        f"--sft_model={sft.folder}",
        "--strategy=ddp",
        "--nproc=2",
        "--max_steps=6",
        "--logging_steps=1",
    )
    command = [sys.executable, "-m", "manyrank.cli", "train", "fast_test", *common]
    whole = grpo(tmp_path / "a", *BATCH, f"--sft_model={sft.folder}", "--strategy=ddp", "--nproc=2", "--max_steps=6")
    assert whole.code == 0, whole.stderr
    folder = tmp_path / "b"
    metrics = folder / "logs" / "metrics.jsonl"
    job = warm.start([*command, f"--output_dir={folder}"], cwd=ROOT)
    end = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text()):
        assert time.monotonic() < end and job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 75
    assert [
        entry["event"] for entry in map(json.loads, (folder / "logs" / "history.jsonl").read_text().splitlines())
    ] == [
        "started",
        "preempted",
    ]
    again = warm.run([*command, f"--output_dir={folder}", "--resume_from_checkpoint=auto"], cwd=ROOT)
    assert again.returncode == 0
    assert Run(0, "", "", folder).metrics("reward") == whole.metrics("reward")
    adapter = "final_model/adapter_model.safetensors"
    assert (folder / adapter).read_bytes() == (whole.folder / adapter).read_bytes()


def test_layers_that_are_computed_again_change_nothing(sft, tmp_path):
    common = (*BATCH, f"--sft_model={sft.folder}", "--max_steps=2")
    plain = grpo(tmp_path / "a", *common, "--gradient_checkpointing=off")
    again = grpo(tmp_path / "b", *common, "--gradient_checkpointing=1")
    assert plain.code == again.code == 0, plain.stderr + again.stderr
    for key in ("loss", "reward", "grad_norm", "kl"):
        assert again.metrics(key) == pytest.approx(plain.metrics(key), abs=1e-6), key


def test_full_training_validation_and_a_report(embedded_model, tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_text("".join(SUMS.read_text().splitlines(keepends=True)[:5]))
    run = grpo(
        tmp_path / "run",
        *BATCH,
        "--method=full",
        "--lr=1e-5",
        "--max_steps=2",
        f"--eval_data_path={held}",
        "--eval_steps=1",
        "--rewards={numeric: 1, format: {final: true, weight: 0.1}, length: {max: 8, weight: 0.1}, repetition: 0.1}",
        "--load_best_model_at_end",
    )
    assert run.code == 0, run.stderr
    assert len(run.metrics("eval_reward")) == 2 and len(run.metrics("kl")) == 2
    names = ("numeric", "format", "length", "repetition")
    weights = (1, 0.1, 0.1, 0.1)
    for line in map(json.loads, (run.folder / "logs" / "metrics.jsonl").read_text().splitlines()):
        start = "eval_rewards" if "eval_reward" in line else "rewards"
        total = sum(weight * line[f"{start}/{name}/mean"] for name, weight in zip(names, weights))
        assert line["eval_reward" if start == "eval_rewards" else "reward"] == pytest.approx(total, abs=1e-5)
    page = (run.folder / "report.html").read_text()
    for sign in ('id="chart-reward"', 'id="chart-kl"', 'id="completions"', "reward, last", "What is "):
        assert sign in page


def test_a_step_that_overflows_is_measured_once(embedded_model, tmp_path):
    """It is taken again with the same completions."""
    trainer = session_of(tmp_path / "run", "--fp16=true", precision=Precision.FP16).trainer
    trainer.engine.loss_scale.value = 2.0**60
    result = trainer.train_step(trainer.loader.step(0))
    assert trainer.engine.loss_scale.value < 2.0**50 and math.isfinite(result.grad_norm)
    counts = {key: len(values) for key, values in trainer.task.state().items()}
    assert counts["reward"] == 1 and counts["entropy"] == counts["kl"] == 4  # micro-batches


def test_a_line_of_metrics_over_a_resume(sft, tmp_path):
    """What was measured between the last line and the checkpoint is not lost; validation draws nothing from the training."""
    common = [
        *last_wins(*SMALL, *BATCH, f"--sft_model={sft.folder}", "--max_steps=3", "--save_steps=2"),
        "--logging_steps=3",
    ]
    lines = []
    for name, more in (
        ("a", []),
        ("b", [f"--resume_from_checkpoint={tmp_path / 'a' / 'checkpoint-2'}"]),
        ("c", ["--eval_split=0.1", "--eval_steps=1"]),
    ):
        command = [
            sys.executable,
            "-m",
            "manyrank.cli",
            "train",
            "fast_test",
            *common,
            *more,
            f"--output_dir={tmp_path / name}",
        ]
        assert warm.run(command, cwd=ROOT).returncode == 0
        lines.append([line for line in read_metrics(tmp_path / name) if "reward" in line])
    (whole,), (part,), _ = lines
    for key in ("loss", "reward", "kl", "entropy", "rewards/f1/mean"):
        assert part[key] == pytest.approx(whole[key], abs=1e-9), key
    again = [*command[:-1], f"--output_dir={tmp_path / 'd'}", "--eval_split=0.1"]
    again[again.index("--eval_steps=1")] = "--eval_steps=3"
    again.pop()
    assert warm.run(again, cwd=ROOT).returncode == 0
    (rarely,) = [line for line in read_metrics(tmp_path / "d") if "reward" in line]
    assert rarely["reward"] == lines[2][0]["reward"] and rarely["grad_norm"] == lines[2][0]["grad_norm"]


def test_a_whole_model_of_sft(embedded_model, tokenizer, tmp_path):
    """Its template is kept, and what came of it can be used."""
    more = (
        "--model=embedded",
        f"--data_path={SUMS}",
        "--method=full",
        "--max_steps=2",
        "--lr=1e-4",
        "--max_length=64",
        "--bf16=no",
        "--chat_template=plain",
    )
    whole = launch(tmp_path / "sft", *more, recipe="--config=fast_test")
    assert whole.code == 0, whole.stderr
    run = launch(
        tmp_path / "run",
        *(option for option in last_wins(*SMALL, *BATCH, "--max_steps=1") if not option.startswith("--model=")),
        f"--sft_model={whole.folder}",
        recipe="--config=fast_test",
    )
    assert run.code == 0, run.stderr
    assert run.metrics("kl") == [pytest.approx(0, abs=1e-4)]
    _, own = load_model(str(run.folder), dtype="float32")
    assert own.chat_template == asset("data", "templates", "plain.jinja").read_text() != tokenizer.chat_template
    again = resolve(str(run.folder / "config.yaml")).config
    assert again.model_name_or_path == str(whole.folder / "final_model") and again.is_grpo


@pytest.mark.parametrize("option", ["--trainable_token_indices=1,16,200", "--use_dora", "--modules_to_save=lm_head"])
def test_the_reference_is_the_adapter_with_all_its_options(option, embedded_model, tmp_path):
    more = ("--model=embedded", f"--data_path={SUMS}", "--max_steps=4", "--lr=0.05", "--max_length=64", "--bf16=no")
    sft = launch(tmp_path / "sft", *more, option, recipe="--config=fast_test")
    assert sft.code == 0, sft.stderr
    run = launch(
        tmp_path / "run",
        *last_wins(
            *(a for a in SMALL if not a.startswith("--model")), *BATCH, "--max_steps=2", f"--sft_model={sft.folder}"
        ),
        recipe="--config=fast_test",
    )
    assert run.code == 0, run.stderr
    kl = run.metrics("kl")
    assert kl[0] == pytest.approx(0, abs=1e-7) and kl[1] > 1e-6


def test_adapters_that_no_recipe_makes_are_refused(sft, tmp_path):
    shutil.copytree(sft.folder / "final_model", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    known = json.loads(file.read_text())
    for change in ({"peft_type": "LOHA"}, {"target_modules": None}, {"bias": "all"}):
        file.write_text(json.dumps(known | change))
        with pytest.raises(UserError, match="not one that manyrank makes"):
            resolve(
                "grpo_from_sft", [Setting("sft_model", str(tmp_path / "adapter"), ""), Setting("data_path", "x", "")]
            )


def test_answering_leaves_no_hooks(tmp_path):
    session = session_of(tmp_path, "--gradient_checkpointing=2")
    try:
        trainer, modules = session.trainer, list(session.engine.model.modules())
        flags, counts = [getattr(module, "gradient_checkpointing", None) for module in modules], []
        for number in range(3):
            trainer.task.trl.complete(trainer.loader.step(number).numbers, step=number)
            counts.append(sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules))
        assert len(set(counts)) == 1
        assert flags == [getattr(module, "gradient_checkpointing", None) for module in modules] and True in flags
    finally:
        session.close()


def test_gradients_do_not_depend_on_the_layout(sft, tmp_path):
    """Of the same answers: one process, one or four micro-batches; two processes under each strategy. The reference, too."""
    found = {}
    for name, nproc, micro in (("single", 1, 16), ("single", 1, 4), ("ddp", 2, 4), ("fsdp", 2, 8), ("zero3", 2, 4)):
        out = tmp_path / f"{name}{micro}.json"
        argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
        options = last_wins(*SMALL, *BATCH, f"--sft_model={sft.folder}", f"--per_device_train_batch_size={micro}")
        argv += [
            ROOT / "tests" / "support" / "grpo_worker.py",
            out,
            sft.folder,
            "fast_test",
            *options,
            f"--strategy={name}",
        ]
        done = warm.run([str(part) for part in argv], cwd=ROOT)
        assert done.returncode == 0, done.stderr
        found[name, micro] = json.loads(out.read_text())
    first = found["single", 16]
    assert all(norm > 0.01 for norm in first["norms"].values())
    for layout, values in found.items():
        assert values["reference"] < 1e-4, layout
        for loss_type, norm in values["norms"].items():
            assert norm == pytest.approx(first["norms"][loss_type], rel=1e-4), (layout, loss_type)


def test_a_reward_model(embedded_model, tokenizer, tmp_path):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(embedded_model, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    judge = AutoModelForSequenceClassification.from_config(config).float()
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    rewards = f"--rewards={{judge: {{reward: model, model: {tmp_path / 'judge'}}}}}"
    run = grpo(tmp_path / "run", *BATCH, "--max_steps=1", "--strategy=zero3", "--nproc=2", rewards)
    assert run.code == 0, run.stderr
    said = read_completions(run.folder)[0]
    talk = [{"role": "user", "content": said["prompt"]}, {"role": "assistant", "content": said["answer"]}]
    inputs = tokenizer(
        tokenizer.apply_chat_template(talk, tokenize=False), add_special_tokens=False, return_tensors="pt"
    )
    with torch.no_grad():
        expected = judge.eval()(**inputs).logits.item()
    assert said["rewards"]["judge"] == pytest.approx(expected, abs=1e-4)


def test_a_reward_that_fails_names_the_row(embedded_model, tmp_path):
    (tmp_path / "judge.py").write_text("def broken(answer, reference, row):\n    return row['nothing']\n")
    more = (*BATCH, "--max_steps=1", "--rewards={'judge:broken': 1}")
    run = grpo(tmp_path / "run", *more, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert run.code == 2 and "Traceback" not in run.stderr
    assert "judge:broken fails with KeyError" in run.stderr and "sums.jsonl, line" in run.stderr
    run = grpo(
        tmp_path / "scored", *more, "--on_reward_error=-1", PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    )
    assert run.code == 0 and run.metrics("reward") == [-1.0]
    assert run.metrics("frac_reward_zero_std") == [1.0]


def test_a_reference_that_cannot_be_compared_is_told_at_the_start(embedded_model, tmp_path):
    data = tmp_path / "words.jsonl"
    data.write_text(json.dumps({"question": "Say it.", "answer": "It."}) + "\n")
    run = grpo(tmp_path / "run", *BATCH, "--max_steps=1", f"--data_path={data}", "--rewards={numeric: 1}")
    assert run.code == 2 and "the reference has no number" in run.stderr and "line 1" in run.stderr
    run = grpo(tmp_path / "b", *BATCH, "--max_steps=1", "--max_completion_length=100000")
    assert run.code == 2 and "do not fit into the model's" in run.stderr


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (["--rewards={}"], "grpo without rewards"),
        (["--rewards={numerics: 1}"], "did you mean numeric"),
        (["--global_batch_size=18"], "are not whole groups of 4"),
        (["--global_batch_size=12", "--per_device_train_batch_size=8"], "do not divide into 1 processes x 8"),
        (["--packing=step"], "packing: step with grpo"),
        (["--use_vllm"], "on a machine without GPUs"),
        (["--method=full", "--strategy=fsdp", "--nproc=2"], "with beta 0.04 on fsdp"),
        (["--strategy=zero3_offload", "--nproc=2"], "grpo on zero3_offload"),
        (
            ["--eval_split=0.1", "--eval_steps=1", "--load_best_model_at_end", "--metric_for_best_model=eval_loss"],
            "metric_for_best_model is eval_loss",
        ),
        (["--sft_model=nowhere"], "there is no folder 'nowhere'"),
        (["--task=sft", f"--sft_model={ROOT}"], "neither a model, an adapter nor a run"),
        (["--torch_compile"], "torch_compile with grpo"),
    ],
)
def test_what_is_refused(more, what, embedded_model, tmp_path):
    run = grpo(tmp_path / "run", *BATCH, "--max_steps=1", *more)
    assert run.code == 2 and what in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "run").exists()


def test_the_shape_of_the_adapter_is_that_of_sft(sft, tmp_path):
    run = grpo(tmp_path / "run", *BATCH, "--max_steps=1", f"--sft_model={sft.folder}", "--lora_r=32")
    assert run.code == 2 and "lora_r is 32, and that of" in run.stderr
    resolved = resolve(
        "grpo_from_sft", [Setting("--sft_model", str(sft.folder), "x"), Setting("--data_path", str(SUMS), "x")]
    )
    assert resolved.config.lora_r == 4 and resolved.config.is_grpo and resolved.config.packing == "none"
    assert (
        resolved.config.model_name_or_path
        == json.loads((sft.folder / "final_model" / "adapter_config.json").read_text())["base_model_name_or_path"]
    )


def test_the_command_and_its_presets(capsys):
    from manyrank.cli import main

    for name, samples in (("default", 4), ("from_sft", 4), ("low_memory", 2)):
        assert main(["grpo", "--config", name, "--model=embedded", f"--train-data={SUMS}", "--print"]) == 0
        shown = capsys.readouterr().out
        assert f"grpo_{name} --task=grpo" in shown
        assert (
            resolve(
                f"grpo_{name}", [Setting("model", "embedded", ""), Setting("data_path", "x", "")]
            ).config.num_generations
            == samples
        )
    assert (
        main(
            [
                "grpo",
                "--model=embedded",
                f"--train-data={SUMS}",
                "--rewards={f1: 1}",
                "--num-samples=2",
                "--max-new-tokens=9",
                "--beta=0.1",
                "--print",
            ]
        )
        == 0
    )
    assert "--num_samples=2" in capsys.readouterr().out


def test_a_dry_run(embedded_model, tmp_path):
    run = grpo(tmp_path / "run", *BATCH, "--max_steps=1", "--dry-run")
    assert run.code == 0 and "dry run: one step" in run.stdout and not run.folder.exists()


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not here")
@pytest.mark.nightly
def test_gsm8k(embedded_model, tmp_path):
    run = grpo(
        tmp_path / "run",
        *BATCH,
        f"--data_path={GSM8K}",
        "--rewards={numeric: 1, format: {final: true, weight: 0.1}}",
        "--max_completion_length=32",
        "--max_steps=2",
    )
    assert run.code == 0, run.stderr
    assert (
        len(run.metrics("rewards/numeric/mean")) == 2
        and "gsm8k_train.jsonl, line" in read_completions(run.folder)[0]["place"]
    )
