"""What a run does and leaves behind, seen from outside through real launches."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import warm
from launches import ROOT, Run, accelerate_launch, launch, nightly
from small_models import made, plain_loss, recipe

from manyrank.config.resolve import Setting, resolve
from manyrank.launch.command import LaunchPlan
from manyrank.project_files import asset
from manyrank.topology import gpus
from manyrank.training.callbacks import steps_between_saves


@pytest.mark.parametrize(("strategy", "method"), [("single", "lora"), ("zero3", "lora"), ("fsdp", "full")])
def test_final_model_loads_plainly_and_gives_the_loss_of_the_run(strategy, method, embedded_model, tokenizer, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = launch(
        tmp_path / "run",
        f"--strategy={strategy}",
        f"--nproc={1 if strategy == 'single' else 2}",
        f"--method={method}",
        "--max_steps=4",
        "--eval_data_path=data/validation.jsonl",
        "--eval_steps=4",
    )
    assert run.code == 0, run.stderr
    final = run.folder / "final_model"
    if method == "lora":
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(embedded_model), final)
    else:
        model = AutoModelForCausalLM.from_pretrained(final)
    assert plain_loss(model.eval(), tokenizer, "data/validation.jsonl") == pytest.approx(
        run.metrics("eval_loss")[-1], abs=1e-5
    )
    assert (final / "chat_template.jinja").is_file() and (final / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    "layout",
    [
        ("--per_device_train_batch_size=8",),
        ("--per_device_train_batch_size=1", "--gradient_checkpointing"),
        ("--per_device_train_batch_size=4", "--packing=none"),
        (
            "--per_device_train_batch_size=2",
            "--packing=none",
            "--strategy=ddp",
            "--nproc=2",
            "--gradient_accumulation_steps=2",
        ),
        ("--per_device_train_batch_size=1", "--strategy=fsdp", "--nproc=2", "--gradient_checkpointing"),
        ("--per_device_train_batch_size=1", "--strategy=zero3", "--nproc=2"),
        pytest.param(("--per_device_train_batch_size=1", "--strategy=zero2", "--nproc=2"), marks=pytest.mark.nightly),
    ],
    ids=" ".join,
)
def test_the_layout_does_not_change_the_losses(layout, whole_run, tmp_path):
    run = launch(tmp_path / "run", "--max_steps=6", "--global_batch_size=8", *layout)
    assert run.code == 0, run.stderr
    assert run.metrics() == pytest.approx(whole_run.metrics(), abs=1e-5)
    assert run.metrics("grad_norm") == pytest.approx(whole_run.metrics("grad_norm"), abs=1e-5)


def test_packs_of_the_data_set_give_the_same_losses_everywhere(embedded_model, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(Path("data/sample.jsonl").read_text().splitlines(keepends=True)[:60]))
    given = (f"--data_path={data}", "--packing=dataset", "--global_batch_size=4", "--num_train_epochs=2")
    given += ("--learning_rate=1e-3",)
    single, three = (
        launch(tmp_path / name, *given, *more)
        for name, more in (("single", ("--strategy=single",)), ("three", ("--strategy=fsdp", "--nproc=3")))
    )
    assert single.code == three.code == 0, single.stderr + three.stderr
    assert len(single.metrics()) > 5 and single.metrics()[-1] < single.metrics()[0]
    assert three.metrics() == pytest.approx(single.metrics(), abs=1e-5)
    assert three.metrics("grad_norm") == pytest.approx(single.metrics("grad_norm"), abs=1e-5)


def test_bad_rows_are_put_aside_and_the_split_is_validated(embedded_model, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = Path("data/sample.jsonl").read_text().splitlines()
    file.write_text("\n".join([*rows[:60], '{"question": "c"}', "not json", *rows[60:]]) + "\n")
    run = launch(
        tmp_path / "run",
        f"--data_path={file}",
        "--on_bad_row=skip",
        "--eval_split=0.2",
        "--eval_steps=3",
        "--max_steps=6",
        "--strategy=ddp",
        "--nproc=2",
    )
    assert run.code == 0, run.stderr
    assert "2 bad, quarantined" in run.stdout and "\nvalidation   " in run.stdout
    assert "between the longest rank and the mean" in run.stdout
    aside = [json.loads(line) for line in (run.folder / "logs" / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["place"].split(", ")[1], row["reason"]) for row in aside] == [
        ("line 61", "missing field"),
        ("line 62", "not JSON"),
    ]
    assert len(run.metrics("eval_loss")) == 2


def test_a_run_validates_once_an_epoch_and_saves_and_logs_its_end(embedded_model, tmp_path):
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "run"
    rows.write_text("".join(f"{line}\n" for line in Path("data/sample.jsonl").read_text().splitlines()[:24]))
    argv = [sys.executable, "-m", "manyrank.cli", "train", "verify", f"--data_path={rows}", f"--output_dir={folder}"]
    argv += ["--eval_data_path=data/validation.jsonl", "--save_steps=auto", "--num_train_epochs=2", "--strategy=single"]
    done = warm.run(argv, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
    assert [line["step"] for line in lines if "loss" in line] == [6]
    shown = [line.split("  ") for line in done.stdout.splitlines() if line.startswith("step ")]
    assert [line[0] for line in shown] == ["step 3/6", "step 6/6", "step 6/6"] and shown[0][1].startswith("eval_loss ")
    assert [part.split()[0] for part in shown[1][1:]] == [
        "loss",
        "grad_norm",
        "lr",
        "tokens/s",
        "GiB",
        "epoch",
        "0:00:00",
    ]
    assert "step/s" not in done.stderr and "s/step" not in done.stderr and "OMP_NUM_THREADS" not in done.stdout
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-6"], "epochs are short"


@pytest.mark.parametrize(
    ("steps_per_epoch", "save_steps"), [(3, 51), (30, 60), (49, 98), (50, 50), (400, 400), (500, 500), (1200, 500)]
)
def test_checkpoints_are_epochs_apart_and_neither_few_steps_nor_many(steps_per_epoch, save_steps):
    config = resolve("verify", [Setting("save_steps", "auto", "test")]).config
    assert steps_between_saves(config, steps_per_epoch, 10_000) == save_steps


def test_a_run_begins_by_saying_what_it_does(whole_run):
    command, block, *_ = whole_run.stdout.split("\n\n")
    lines = {line[:15].strip(): line[15:] for line in block.splitlines()}
    assert list(lines) == ["model", "method", "training data", "strategy", "batch", "steps", "folder"]
    facts = whole_run.facts()
    assert lines["model"].endswith(f" ({facts['trained_parameters'] / facts['parameters']:.2%}) trained")
    assert lines["method"] == "lora, rank 16, alpha 32, on all-linear; float32"
    assert lines["training data"].startswith("68 examples of 160 rows (as many as max_steps needs)")
    assert lines["batch"] == "8 examples to a step: micro-batch 2 x accumulation 4 x world 1"
    assert lines["folder"] == f"{whole_run.folder}: a checkpoint every 3 steps and at the end, the newest 3 kept"
    assert not [word for word in ("OMP_", "MALLOC_", "{") if word in command + block]


def test_run_folder(whole_run, tmp_path):
    folder = whole_run.folder
    launched = json.loads((folder / "launch.json").read_text())
    (argv,) = launched["nodes"]
    assert argv[1:4] == ["-m", "manyrank.train", "verify"]
    plan = LaunchPlan((tuple(argv),), launched["env"], launched["files"])
    assert (folder / "launch" / "plan.txt").read_text() == plan.text()
    assert launched["files"] == {"accelerate_configs/single.yaml": asset("accelerate_configs/single.yaml").read_text()}
    config = (folder / "config.yaml").read_text()
    assert "max_steps: 6  # command line, --max_steps" in config and "seed: 42  # default" in config
    assert (folder / "logs" / "training_log.txt").read_text().count("loss") == 6
    assert whole_run.metrics("tokens_per_second")[0] > 0
    again = launch(tmp_path / "again", recipe=str(folder / "config.yaml"))
    assert again.code == 0 and again.metrics() == whole_run.metrics()


def test_dry_run_reports_and_leaves_nothing(embedded_model, tmp_path):
    run = launch(tmp_path / "run", "--dry-run", "--strategy=zero3", "--nproc=2")
    assert run.code == 0 and "DeepSpeedEngine (DEEPSPEED) on 2 process(es)" in run.stdout and "loss" in run.stdout
    assert not run.folder.exists()


def test_early_stopping_and_the_best_model(embedded_model, tokenizer, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = launch(
        tmp_path / "run",
        "--max_steps=40",
        "--learning_rate=0.05",
        "--lr_scheduler_type=constant",
        "--eval_data_path=data/validation.jsonl",
        "--eval_steps=2",
        "--early_stopping_patience=2",
        "--load_best_model_at_end",
    )
    assert run.code == 0, run.stderr
    losses = run.metrics("eval_loss")
    best = losses.index(min(losses))
    assert len(losses) < 20 and best == len(losses) - 3
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(embedded_model), run.folder / "final_model")
    assert plain_loss(model.eval(), tokenizer, "data/validation.jsonl") == pytest.approx(min(losses), abs=1e-5)


def test_steps_as_shares_of_the_run_and_a_validation_before_it(embedded_model, tmp_path):
    args = ("--max_steps=8", "--eval_split=20", "--eval_steps=0.5", "--save_steps=0.25", "--save_total_limit=9")
    args += ("--eval_on_start", "--logging_steps=0.3", "--logging_first_step", "--warmup_ratio=0.25", "--lr=1e-3")
    run = launch(tmp_path / "run", *args, "--lr_scheduler_type=constant_with_warmup")
    assert run.code == 0, run.stderr
    lines = [json.loads(line) for line in (run.folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 4, 8]
    assert [line["step"] for line in lines if "loss" in line] == [1, 3, 6, 8]
    assert [line["learning_rate"] for line in lines if "loss" in line] == [0, 1e-3, 1e-3, 1e-3]
    assert sorted(path.name for path in run.folder.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 4, 6, 8)]
    resumed = launch(
        tmp_path / "again",
        *args,
        "--lr_scheduler_type=constant_with_warmup",
        f"--resume_from_checkpoint={run.folder / 'checkpoint-4'}",
    )
    assert resumed.code == 0 and resumed.metrics("loss") == run.metrics("loss")[2:]
    assert resumed.metrics("eval_loss") == run.metrics("eval_loss")[2:]  # none at the start of a resume
    assert resumed.metrics("eval_loss")[0] < run.metrics("eval_loss")[0]


def test_the_order_of_the_data_has_a_seed_of_its_own(whole_run, embedded_model, tmp_path):
    args = ("--max_steps=6", "--strategy=single")
    same, other = (launch(tmp_path / seed, *args, f"--data_seed={seed}") for seed in ("42", "7"))
    assert same.code == other.code == 0, same.stderr + other.stderr
    assert same.metrics() == pytest.approx(whole_run.metrics(), abs=1e-5)
    assert other.metrics()[0] != pytest.approx(same.metrics()[0], abs=1e-3)


def test_a_threshold_of_the_early_stop(embedded_model, tmp_path):
    args = ("--max_steps=8", "--eval_split=20", "--eval_steps=1", "--early_stopping_patience=2")
    run = launch(tmp_path / "run", *args, "--early_stopping_threshold=100")
    assert run.code == 0 and len(run.metrics("eval_loss")) == 3, (
        run.stderr
    )  # the first is the best, two are not 100 better
    assert len(launch(tmp_path / "free", *args).metrics("eval_loss")) > 3


def test_the_steps_before_an_early_stop_are_logged(embedded_model, tmp_path):
    given = (
        "base: verify\nmax_steps: 8\nlogging_steps: 50\neval_steps: 1\nearly_stopping_patience: 1\nlearning_rate: 0\n"
    )
    (tmp_path / "recipe.yaml").write_text(f"{given}eval_data_path: data/validation.jsonl\n")
    argv = ["train", str(tmp_path / "recipe.yaml"), f"--output_dir={tmp_path / 'run'}", "--strategy=single"]
    done = warm.run([sys.executable, "-m", "manyrank.cli", *argv], cwd=ROOT)
    run = Run(done.returncode, done.stdout, done.stderr, tmp_path / "run")
    assert run.code == 0, run.stderr
    assert len(run.metrics("eval_loss")) == 2 and len(run.metrics()) == 1


CALLBACK = """
import json, os
import torch
from transformers import TrainerCallback

class Recorder(TrainerCallback):
    def __init__(self):
        self.events = []
    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        self.events.append([state.global_step, args.learning_rate, lr_scheduler.get_last_lr()[0]])
        control.should_training_stop = state.global_step == 2
    def on_train_end(self, args, state, control, **kwargs):
        json.dump(self.events, open(os.path.join(args.output_dir, "events.json"), "w"))

class Poison(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            for name, module in model.named_modules():
                if name.endswith("q_proj"):
                    module.register_forward_hook(self.poison)

    def poison(self, module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("inf"))
"""


def test_a_users_callback_is_driven(embedded_model, tmp_path):
    (tmp_path / "mine.py").write_text(CALLBACK)
    run = launch(tmp_path / "run", "--max_steps=9", "--callbacks=mine:Recorder", PYTHONPATH=str(tmp_path))
    assert run.code == 0, run.stderr
    events = json.loads((run.folder / "events.json").read_text())
    assert [event[0] for event in events] == [1, 2] and events[0][1] == 1e-3 and events[1][2] < events[0][2]
    bad = launch(tmp_path / "bad", "--callbacks=mine:Nobody", PYTHONPATH=str(tmp_path))
    assert bad.code == 2 and "cannot import mine:Nobody" in bad.stderr


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3", *nightly("single", "zero2")])
def test_a_non_finite_gradient_stops_before_the_optimizer(strategy, embedded_model, tmp_path):
    (tmp_path / "mine.py").write_text(CALLBACK)
    nproc = 1 if strategy == "single" else 2
    run = launch(
        tmp_path / "run",
        f"--strategy={strategy}",
        f"--nproc={nproc}",
        "--max_steps=4",
        "--callbacks=mine:Poison",
        PYTHONPATH=str(tmp_path),
    )
    assert run.code == 1
    assert "stopped before the optimizer used it: the gradient's norm is" in run.stderr
    assert "in step 2 (" in run.stderr and "rank 0: rows [" in run.stderr
    assert len(run.metrics()) == 1 and not (run.folder / "final_model").exists()
    told = json.loads((run.folder / "logs" / "non_finite.json").read_text())
    assert told["step"] == 2 and [entry["rank"] for entry in told["ranks"]] == list(range(nproc))
    assert all(0 < row <= 160 and path.endswith(".jsonl") for entry in told["ranks"] for path, row in entry["rows"])


def test_a_non_finite_loss_names_its_rows(embedded_model, tmp_path):
    run = launch(
        tmp_path / "run", "--max_steps=4", "--learning_rate=1e30", "--max_grad_norm=0", "--strategy=ddp", "--nproc=2"
    )
    assert run.code == 1
    assert (
        "stopped before the optimizer used it: the loss is nan in step 2" in run.stderr
        and "rank 1: rows [" in run.stderr
    )


def test_a_bad_row_in_the_middle_is_three_lines_from_two_processes(embedded_model, tmp_path):
    file = tmp_path / "rows.jsonl"
    good = '{"question": "a", "answer": "b"}\n'
    file.write_text(good * 3 + '{"question": "c"}\n' + good)
    run = launch(tmp_path / "run", f"--data_path={file}", "--strategy=ddp", "--nproc=2")
    assert run.code == 2
    assert [line.split(":")[0] for line in run.stderr.strip().splitlines()] == ["error", "where", "fix"]
    assert f"{file}, line 4" in run.stderr and not run.folder.exists()


def test_a_run_replaces_an_earlier_one_when_nothing_can_be_refused_any_more(embedded_model, tmp_path):
    args = ("--save_steps=2", "--overwrite_output_dir")
    first = launch(tmp_path / "run", "--max_steps=4", *args)
    assert first.code == 0 and "removed" not in first.stdout, first.stderr
    (first.folder / "notes.txt").write_text("mine")
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 1200 + '{"question": "c"}\n')
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.name != "run.lock"}
    refused = launch(tmp_path / "run", "--max_steps=-1", *args, f"--data_path={tmp_path / 'bad.jsonl'}")
    assert refused.code == 2, refused.stdout
    files = {path for path in before if path.is_file() and "heartbeats" not in path.parts}
    assert all(path.stat().st_mtime_ns == before[path] for path in files)
    again = launch(tmp_path / "run", "--max_steps=2", "--strategy=ddp", "--nproc=2", *args)
    assert again.code == 0, again.stderr
    assert (
        f"overwrite_output_dir: removed the run in {again.folder} (adapter_config.json, adapter_model.safetensors, checkpoint-2, checkpoint-4, "
        in again.stdout
    )
    assert [path.name for path in sorted(again.folder.glob("checkpoint-*"))] == ["checkpoint-2"]
    assert (again.folder / "notes.txt").read_text() == "mine" and len(again.metrics()) == 2
    assert again.facts()["world_size"] == 2
    plain = launch(tmp_path / "run", "--max_steps=2")
    assert plain.code == 2 and "or replace it with --overwrite_output_dir" in plain.stderr


@pytest.mark.skipif(not gpus.probe().cpu_bf16 or gpus.probe().gpus, reason="no native bf16 on this CPU")
@pytest.mark.parametrize("strategy", ["single", "fsdp", "zero2"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_bf16_follows_float32(strategy, method, whole_run, tmp_path):
    run = launch(
        tmp_path / "run",
        f"--strategy={strategy}",
        f"--nproc={1 if strategy == 'single' else 2}",
        f"--method={method}",
        "--max_steps=6",
        "--bf16",
    )
    assert run.code == 0, run.stderr
    assert run.facts()["precision"] == "bf16"
    assert run.metrics() == pytest.approx(whole_run.metrics(), abs=0.1 if method == "qlora" else 0.03)


@pytest.mark.parametrize("strategy", ["single", "zero2", *nightly("ddp")])
def test_int8(strategy, whole_run, tmp_path):
    run = launch(
        tmp_path / "run",
        f"--strategy={strategy}",
        f"--nproc={1 if strategy == 'single' else 2}",
        "--use_8bit",
        "--max_steps=6",
    )
    assert run.code == 0, run.stderr
    assert run.metrics() == pytest.approx(whole_run.metrics(), abs=0.05)
    assert 0.3 < run.facts()["base_bytes"] / whole_run.facts()["base_bytes"] < 0.7


@pytest.mark.parametrize("strategy", ["single", "zero2", *nightly("ddp")])
def test_fp8(strategy, whole_run, tmp_path):
    run = launch(
        tmp_path / "run",
        f"--strategy={strategy}",
        f"--nproc={1 if strategy == 'single' else 2}",
        "--fp8",
        "--max_steps=6",
    )
    assert run.code == 0, run.stderr
    assert run.metrics() == pytest.approx(whole_run.metrics(), abs=0.05)
    assert run.metrics() != pytest.approx(whole_run.metrics(), abs=1e-4)
    assert 0.2 < run.facts()["base_bytes"] / whole_run.facts()["base_bytes"] < 0.7


def test_bitsandbytes_optimizer_resumes(embedded_model, tmp_path):
    common = ("--max_steps=4", "--save_steps=2", "--optim=paged_adamw_8bit", "--method=qlora")
    whole = launch(tmp_path / "a", *common)
    part = launch(tmp_path / "b", *common, f"--resume_from_checkpoint={whole.folder / 'checkpoint-2'}")
    assert part.code == 0, part.stderr
    assert part.metrics() == whole.metrics()[2:]


def test_trackers_write_real_runs(embedded_model, tmp_path):
    run = launch(tmp_path / "run", "--max_steps=2", "--report_to=wandb,tensorboard", "--wandb_project=tests")
    assert run.code == 0, run.stderr
    assert list(run.folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert list(run.folder.rglob("events.out.tfevents*"))


def test_plain_accelerate_launch(whole_run, tmp_path):
    done = accelerate_launch("fsdp", "--max_steps=6", "--logging_steps=1", f"--output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "run" / "logs" / "strategy.json").read_text())
    assert facts["distributed_type"] == "FSDP" and facts["world_size"] == 2


def test_another_strategy_than_the_config_is_refused(embedded_model, tmp_path):
    done = accelerate_launch("ddp", "--strategy=fsdp", f"--output_dir={tmp_path / 'run'}")
    assert done.returncode != 0 and "accelerate started type MULTI_" in done.stderr
    assert "but the recipe asks for FSDP" in done.stderr
    assert not (tmp_path / "run").exists()


def test_recomputed_layers_give_the_same_losses(whole_run, tmp_path):
    run = launch(tmp_path / "run", "--max_steps=6", "--strategy=single", "--gradient_checkpointing=2")
    assert run.code == 0, run.stderr
    assert run.metrics() == pytest.approx(whole_run.metrics(), abs=1e-5)


def test_each_layer_is_compiled_and_nothing_else():
    config = recipe("--method=lora", "--torch_compile")
    model, _ = made("qwen3", config, torch.float32)
    compiled = {name for name, module in model.named_modules() if module._compiled_call_impl is not None}
    assert compiled == {name for name, module in model.named_modules() if type(module).__name__ == "Qwen3DecoderLayer"}
    assert len(compiled) == 4


@pytest.mark.nightly
def test_compiled_layers_give_the_same_losses(whole_run, tmp_path):
    """Minutes of tracing and of the C++ compiler when nothing of it is cached."""
    run = launch(tmp_path / "run", "--max_steps=6", "--strategy=single", "--torch_compile")
    assert run.code == 0, run.stderr
    assert run.metrics() == pytest.approx(whole_run.metrics(), abs=1e-5)


def test_more_layers_than_there_are(tmp_path):
    run = launch(tmp_path / "run", "--max_steps=1", "--strategy=single", "--gradient_checkpointing=9")
    assert run.code == 2 and "gradient_checkpointing 9, and embedded has 4 layers" in run.stderr


def test_one_process_under_torchrun_is_single(embedded_model, tmp_path):
    """As in a job of one process."""
    common = ("--max_steps=2", "--strategy=single")
    plain, under = launch(tmp_path / "plain", *common), launch(tmp_path / "run", *common, "--via=torchrun", "--nproc=1")
    assert under.code == 0, under.stderr
    assert under.metrics() == pytest.approx(plain.metrics(), abs=1e-5) and under.facts()["world_size"] == 1


def test_weights_that_do_not_fit_their_config_are_an_error(embedded_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(embedded_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 100}))
    run = launch(tmp_path / "run", "--max_steps=1", "--strategy=single", f"--model_name_or_path={folder}")
    assert run.code == 2 and "cannot load the model" in run.stderr and "Traceback" not in run.stderr, run.stderr


def test_clipping_is_the_same_everywhere(embedded_model, tmp_path):
    """With SGD, where the length of a step is that of the clipped gradient."""
    common = ("--optim=sgd", "--learning_rate=2.0", "--lr_scheduler_type=constant", "--max_steps=3")

    def losses(name: str, *args: str) -> list[float]:
        run = launch(tmp_path / name, *common, *args)
        assert run.code == 0, run.stderr
        return run.metrics()

    clipped = losses("single", "--strategy=single", "--max_grad_norm=0.05")
    free = losses("free", "--strategy=single", "--max_grad_norm=0")
    assert clipped[0] == free[0] and abs(clipped[2] - free[2]) > 0.01
    for strategy in ("fsdp", "zero3"):
        other = losses(strategy, f"--strategy={strategy}", "--nproc=2", "--max_grad_norm=0.05")
        assert other == pytest.approx(clipped, abs=1e-5)


@pytest.mark.parametrize("strategy", ["single", "fsdp", "zero3", *nightly("ddp", "zero2")])
def test_dft_weighs_tokens_by_their_probability(strategy, whole_run, tmp_path):
    """The losses are those of the plain lm_head, on every strategy, and the validation's stay cross-entropies."""
    args = ("--max_steps=3", "--eval_split=8", "--eval_on_start", "--eval_steps=3")
    common = (*args, f"--strategy={strategy}", f"--nproc={1 if strategy == 'single' else 2}")
    run = launch(tmp_path / "run", *common, "--loss_type=dft")
    assert run.code == 0, run.stderr
    plain = launch(tmp_path / "plain", *args, "--strategy=single", "--dft_loss", "--disable_fused=lm_head")
    assert run.metrics() == pytest.approx(plain.metrics(), abs=1e-5)
    assert run.metrics()[0] < 0.5 * whole_run.metrics()[0]
    other = launch(tmp_path / "other", *args, "--strategy=single")
    assert run.metrics("eval_loss")[0] == pytest.approx(other.metrics("eval_loss")[0], abs=1e-5)
    assert run.metrics("eval_loss")[1] != pytest.approx(other.metrics("eval_loss")[1], abs=1e-5)
