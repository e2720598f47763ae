"""A resumed run goes on exactly where it was; what is not complete or not the same is refused."""

import json
import shutil
import signal
import sys
import time

import pytest
import warm
from launches import ROOT, launch, nightly

from manyrank.runs import run_folder


@pytest.mark.parametrize("strategy", ["single", *nightly("ddp", "fsdp", "zero2", "zero3")])
def test_resume_on_the_same_strategy_is_exact(strategy, whole_run, tmp_path):
    """Also across strategies for losses: each must continue the losses of the one-process run."""
    common = (
        f"--strategy={strategy}",
        f"--nproc={1 if strategy == 'single' else 2}",
        "--max_steps=6",
        "--save_steps=3",
    )
    first = launch(tmp_path / "a", *common)
    assert first.code == 0, first.stderr
    assert first.metrics() == pytest.approx(whole_run.metrics(), abs=1e-5)
    # The folder of a run that was killed after its checkpoint.
    shutil.rmtree(first.folder / "checkpoint-6")
    shutil.rmtree(first.folder / "final_model")
    again = launch(first.folder, *common, "--resume_from_checkpoint=auto")
    assert again.code == 0, again.stderr
    assert f"resumed from {first.folder / 'checkpoint-3'}, step 3" in again.stdout
    assert again.metrics()[3:] == pytest.approx(whole_run.metrics()[3:], abs=1e-5)
    assert again.metrics("grad_norm") == pytest.approx(whole_run.metrics("grad_norm"), abs=1e-5)
    assert len(again.metrics()) == 6  # lines after the checkpoint were written anew, not twice


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        ("single", ["--nproc=1"]),
        *((strategy, ["--nproc=2"]) for strategy in ("ddp", "zero3")),
        *nightly(("fsdp", ["--nproc=2"]), ("zero2", ["--nproc=2"]), ("hsdp", ["--nproc=4", "--hsdp_shard_size=2"])),
    ],
)
def test_dropout_resumes_bit_identically(strategy, more, embedded_model, tmp_path):
    common = (f"--strategy={strategy}", *more, "--max_steps=4", "--save_steps=2", "--lora_dropout=0.1")
    whole = launch(tmp_path / "a", *common)
    part = launch(tmp_path / "b", *common, f"--resume_from_checkpoint={whole.folder / 'checkpoint-2'}")
    assert part.code == 0, part.stderr
    assert part.metrics() == whole.metrics()[2:]
    adapter = "final_model/adapter_model.safetensors"
    assert (part.folder / adapter).read_bytes() == (whole.folder / adapter).read_bytes()


@pytest.mark.parametrize("strategy", ["zero2", *nightly("ddp", "fsdp", "zero3")])  # by day fsdp resumes on hsdp
def test_full_fine_tuning_resumes(strategy, embedded_model, tmp_path):
    """Matrices and vectors are two groups of the optimizer; DeepSpeed gave out the moments of the first alone."""
    common = (f"--strategy={strategy}", "--nproc=2", "--max_steps=4", "--save_steps=2", "--method=full")
    whole = launch(tmp_path / "a", *common)
    assert whole.code == 0, whole.stderr
    part = launch(tmp_path / "b", *common, f"--resume_from_checkpoint={whole.folder / 'checkpoint-2'}")
    assert part.code == 0, part.stderr
    assert part.metrics() == pytest.approx(whole.metrics()[2:], abs=1e-5)


def test_a_save_after_a_validation(embedded_model, tmp_path):
    """A validation left what FSDP2 had gathered last, and rank 0 gave it back alone when it saved: ranks then differed."""
    common = ("--strategy=fsdp", "--nproc=2", "--max_steps=2", "--method=full", "--sample_questions=[]")
    both = launch(
        tmp_path / "both", *common, "--save_steps=1", "--eval_steps=1", "--eval_data_path=data/validation.jsonl"
    )
    assert both.code == 0, both.stderr
    saved = launch(tmp_path / "saved", *common, "--save_steps=1")
    assert both.metrics() == saved.metrics() and len(both.metrics("eval_loss")) == 2
    files = sorted((both.folder / "checkpoint-2").glob("*.safetensors"))
    assert files and all(f.read_bytes() == (saved.folder / "checkpoint-2" / f.name).read_bytes() for f in files)


def test_damage_is_found(whole_run, tmp_path):
    good = whole_run.folder / "checkpoint-3"
    assert run_folder.damage(good) is None
    for name in ("adapter_model.safetensors", "optimizer-00001.safetensors", "trainer_state.json"):
        folder = tmp_path / name / "checkpoint-3"
        shutil.copytree(good, folder)
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        assert run_folder.damage(folder) == f"{folder / name} is damaged"
        (folder / name).unlink()
        assert run_folder.damage(folder) == f"{folder / name} is missing"
    shutil.copytree(good, tmp_path / "run" / "checkpoint-3")
    shutil.copytree(good, tmp_path / "run" / "checkpoint-6")
    (tmp_path / "run" / "checkpoint-6" / "manifest.json").unlink()
    assert run_folder.find(tmp_path / "run", "auto").folder == tmp_path / "run" / "checkpoint-3"
    run = launch(tmp_path / "new", f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-6'}", "--max_steps=6")
    assert run.code == 2 and "manifest.json" in run.stderr and "Traceback" not in run.stderr


def test_a_changed_recipe_is_refused(whole_run, tmp_path):
    folder = whole_run.folder / "checkpoint-3"
    run = launch(tmp_path / "new", f"--resume_from_checkpoint={folder}", "--max_steps=6", "--learning_rate=5e-4")
    assert run.code == 2
    assert "learning_rate: 0.001 -> 0.0005" in run.stderr and "Traceback" not in run.stderr
    assert not run.folder.exists()


def test_retention_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    run_folder.retain(tmp_path, 2, keep=[tmp_path / "checkpoint-1", tmp_path / "checkpoint-4"])
    assert [path.name for path in run_folder.checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-4"]


def test_nothing_in_a_checkpoint_is_pickled(whole_run):
    kinds = {path.suffix for path in (whole_run.folder / "checkpoint-3").iterdir()}
    assert kinds <= {".safetensors", ".json", ".md"}


def test_sigterm_saves_and_exits_with_75(embedded_model, tmp_path):
    folder = tmp_path / "run"
    argv = [
        sys.executable,
        "-m",
        "manyrank.train",
        "verify",
        f"--output_dir={folder}",
        "--max_steps=5000",
        "--logging_steps=1",
    ]
    process = warm.start(argv, cwd=ROOT)
    log = folder / "logs" / "metrics.jsonl"
    for _ in range(600):
        if log.exists() and log.read_text().count("\n") >= 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    (saved,) = run_folder.checkpoints(folder)
    assert run_folder.damage(saved) is None
    state = json.loads((saved / "trainer_state.json").read_text())
    assert state["global_step"] == len(log.read_text().splitlines())


ONE_SIDED = """
import os
from transformers import TrainerCallback
class OneSided(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        if os.environ["RANK"] == "1":
            control.should_save = True
    def on_save(self, args, state, control, **kwargs):
        if os.environ["RANK"] == "0" and state.global_step == 4:
            control.should_training_stop = True
"""


def test_what_one_ranks_callback_asks_for_all_do(embedded_model, tmp_path):
    """Two epochs of two steps: rank 1 wants to save at the end of each, and rank 0 to stop after the second."""
    (tmp_path / "sided.py").write_text(ONE_SIDED)
    sources = "[{path: data/sample.jsonl, max_rows: 16}]"
    common = ("--strategy=ddp", "--nproc=2", "--num_train_epochs=5", f"--data_path={sources}")
    run = launch(tmp_path / "run", *common, "--callbacks=sided:OneSided", PYTHONPATH=str(tmp_path))
    assert run.code == 0, run.stderr
    assert [path.name for path in run_folder.checkpoints(run.folder)] == ["checkpoint-2", "checkpoint-4"]
    assert len(run.metrics()) == 4


BEST = """
from pathlib import Path
from transformers import TrainerCallback
class Block(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / "checkpoint-1.partial"
        folder.write_text("in the way") if state.global_step == 0 else folder.unlink(missing_ok=True)
"""
EVAL = ("--eval_data_path=data/validation.jsonl", "--eval_steps=1", "--max_steps=3", "--strategy=single")


def test_a_best_checkpoint_that_could_not_be_written_is_not_the_best(embedded_model, tmp_path):
    (tmp_path / "best.py").write_text(BEST)
    options = (
        "--load_best_model_at_end",
        "--greater_is_better",
        "--callbacks=best:Block",
    )  # the first loss is the greatest
    run = launch(tmp_path / "run", *EVAL, *options, PYTHONPATH=str(tmp_path))
    assert run.code == 0, run.stderr
    assert "WARNING: checkpoint-1 could not be written" in run.stderr
    assert [path.name for path in run_folder.checkpoints(run.folder)] == ["checkpoint-2"]


def test_a_best_that_the_run_did_not_keep(embedded_model, tmp_path):
    first = launch(tmp_path / "run", *EVAL, "--save_steps=3", "--greater_is_better")
    assert first.code == 0, first.stderr
    shutil.rmtree(first.folder / "final_model")
    options = ("--load_best_model_at_end", "--greater_is_better", "--resume_from_checkpoint=auto", "--save_steps=3")
    run = launch(tmp_path / "run", *EVAL, *options)
    assert run.code == 0 and (run.folder / "final_model").is_dir(), run.stderr


STOPPING = """
import os, signal
from transformers import TrainerCallback
class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            control.should_training_stop = control.should_save = True
"""


def test_a_run_that_has_ended_early_stays_ended(embedded_model, tmp_path):
    (tmp_path / "stopping.py").write_text(STOPPING)
    common = ("--max_steps=5", "--strategy=single", "--callbacks=stopping:Stop")
    first = launch(tmp_path / "run", *common, PYTHONPATH=str(tmp_path))
    assert first.code == 0 and len(first.metrics()) == 2, first.stderr
    shutil.rmtree(first.folder / "final_model")
    again = launch(tmp_path / "run", *common, "--resume_from_checkpoint=auto", PYTHONPATH=str(tmp_path))
    assert again.code == 0 and len(again.metrics()) == 2 and (again.folder / "final_model").is_dir(), again.stderr


def test_a_changed_batch_is_refused(embedded_model, tmp_path):
    common = ("--max_steps=4", "--global_batch_size=none", "--per_device_train_batch_size=2")
    first = launch(tmp_path / "run", *common, "--save_steps=2", "--strategy=single")
    assert first.code == 0, first.stderr
    resume = f"--resume_from_checkpoint={first.folder / 'checkpoint-2'}"
    run = launch(tmp_path / "new", *common, resume, "--gradient_accumulation_steps=8")
    assert run.code == 2 and "batch_per_process: 2 -> 16" in run.stderr
    run = launch(tmp_path / "new", *common, resume, "--strategy=ddp", "--nproc=2")
    assert run.code == 0, run.stderr  # more processes, the same batch
    assert run.metrics() == pytest.approx(first.metrics()[2:], abs=1e-5)


def test_more_steps_than_before(embedded_model, tmp_path):
    """The rows stay those that the shorter run had chosen."""
    first = launch(tmp_path / "run", "--max_steps=2", "--save_steps=2", "--strategy=single")
    assert first.code == 0, first.stderr
    resume = ("--max_steps=4", "--strategy=single", "--resume_from_checkpoint=auto")
    run = launch(tmp_path / "run", *resume)
    assert run.code == 2 and "total_steps: 2 -> 4" in run.stderr
    run = launch(tmp_path / "run", *resume, "--resume_changes=max_steps")
    assert run.code == 0 and len(run.metrics()) == 4, run.stderr
    assert "changed, as allowed: total_steps: 2 -> 4" in run.stdout


def test_only_what_a_run_has_left_is_cleared_away(tmp_path):
    for name in (
        "mydata.partial",
        "old.removed",
        "checkpoint-3.partial",
        "checkpoint-1.removed",
        "final_model.partial",
    ):
        (tmp_path / name).mkdir()
    assert len(run_folder.tidy(tmp_path)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mydata.partial", "old.removed"]


def test_a_manifest_that_names_nothing_is_damaged(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "manifest.json").write_text("{}")
    assert "is damaged" in run_folder.damage(tmp_path / "checkpoint-1")
