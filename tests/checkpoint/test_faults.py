"""Whatever goes wrong with a save or a checkpoint: the next start has a complete one, and ends as if nothing had been."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import warm
from launches import ROOT, launch
from safetensors.torch import load_file, save_file

from manyrank.runs import run_folder

KILLS = int(os.environ.get("MANYRANK_KILLS", "4"))  # `make test-faults` has 50


def adapter(folder) -> dict:
    return load_file(folder / "final_model" / "adapter_model.safetensors")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def test_a_save_that_is_killed_anywhere(embedded_model, tmp_path):
    """At every write, fsync, rename and removal of it."""
    argv = [sys.executable, str(ROOT / "tests" / "support" / "fault_worker.py"), str(tmp_path / "run")]
    done = warm.run(argv, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    points = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    operations = [line.split()[0] for line in done.stderr.splitlines()]
    assert {"mkdir", "write", "fsync", "rename", "unlink", "rmdir"} <= set(operations)
    assert len(points) > 30 and [point["killed"] for point in points] == [True] * (len(points) - 1) + [False]
    for point in points:
        assert point["same"], point
        assert point["from"] in (2, 3) and not [name for name in point["after"] if "." in name], point
    # The manifest is the moment from which the new one counts.
    assert [point["from"] for point in points] == sorted(point["from"] for point in points)


@pytest.mark.nightly
def test_a_run_that_is_killed_at_random_moments(embedded_model, tmp_path):
    """Two processes that save at every step; each start goes on from a complete checkpoint."""
    steps = 30 + 25 * KILLS
    common = ("--strategy=ddp", "--nproc=2", f"--max_steps={steps}", "--lora_dropout=0.1", "--max_length=64")
    whole = launch(tmp_path / "whole", *common)
    assert whole.code == 0, whole.stderr
    folder, chance, killed, moments = tmp_path / "run", random.Random(int(time.time())), 0, []
    argv = [sys.executable, "-m", "manyrank.cli", "train", "verify", f"--output_dir={folder}", "--logging_steps=1"]
    argv += [*common, "--save_steps=1", "--resume_from_checkpoint=auto"]
    while True:
        process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if killed < KILLS:
            moments.append(chance.uniform(0, 3) if chance.random() < 0.9 else chance.uniform(-6, 0))
            wait_for_a_step(folder, process, moments[-1])
            kill_all(process)
        said = process.communicate(timeout=400)[0]
        if process.returncode == 0:
            break
        assert killed < KILLS and process.returncode < 0, (moments, said)
        killed += 1
        complete = [path for path in run_folder.checkpoints(folder) if run_folder.damage(path) is None]
        assert complete or not run_folder.checkpoints(folder), moments
    assert killed == KILLS, (killed, "the run ended before it was killed often enough", moments)
    assert same(adapter(folder), adapter(whole.folder)), moments
    assert [path.name for path in folder.iterdir() if path.suffix in (".partial", ".removed")] == []
    steps_logged = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps_logged] == list(range(1, steps + 1))


def wait_for_a_step(folder, process, seconds: float) -> None:
    """Until a while after the next step; before it where `seconds` is negative."""
    if seconds < 0:
        time.sleep(8 + seconds)
        return
    log = folder / "logs" / "metrics.jsonl"
    seen = log.stat().st_mtime_ns if log.exists() else 0
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        if log.exists() and log.stat().st_mtime_ns != seen and log.stat().st_size:
            break
        time.sleep(0.02)
    time.sleep(seconds)


def kill_all(process) -> None:
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            os.kill(one.pid, signal.SIGKILL)


# Disks


@pytest.fixture
def small_disk(tmp_path):
    """A disk of a size that the test chooses."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: str) -> str:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("a disk cannot be mounted here")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


DISKS = """
import os
from pathlib import Path
from transformers import TrainerCallback
disk = Path(os.environ["DISK"])
class Fill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        filler = disk / "filler"
        if state.global_step == 2:
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
        if state.global_step == 4 and os.environ.get("EMPTY"):
            filler.unlink()
"""


@pytest.fixture
def on_disk(tmp_path, small_disk, embedded_model):
    def run(*args: str, **env: str):
        (tmp_path / "disks.py").write_text(DISKS)
        disk = small_disk("60m")
        given = {"PYTHONPATH": str(tmp_path), "DISK": str(disk), **env}
        common = ("--strategy=single", "--callbacks=disks:Fill", *args)
        return launch(disk / "run", *common, **given)

    return run


@pytest.mark.hosts
def test_a_full_disk_that_is_emptied_in_time(on_disk, whole_run, tmp_path):
    """One failed save is a warning; the run ends as it would have, and no line of its log is lost."""
    run = on_disk("--save_steps=3", "--max_steps=6", EMPTY="1")
    assert run.code == 0, run.stderr
    assert "WARNING: checkpoint-3 could not be written: rank 0: " in run.stderr and "Training continues" in run.stderr
    assert run.metrics() == pytest.approx(whole_run.metrics(), abs=1e-5)
    assert [path.name for path in run_folder.checkpoints(run.folder)] == ["checkpoint-6"]
    assert same(adapter(run.folder), adapter(whole_run.folder))


@pytest.mark.hosts
def test_a_disk_that_stays_full(on_disk):
    """Two failures in a row end the run; what was saved before is whole."""
    run = on_disk("--max_steps=8", "--save_steps=1")
    assert run.code == 1 and "Traceback" not in run.stderr
    assert "WARNING: checkpoint-3 could not be written: rank 0: " in run.stderr
    assert "stopped: checkpoint-4 could not be written, nor the one before it: rank 0: " in run.stderr
    found = run_folder.find(run.folder, "auto")
    assert found.folder.name == "checkpoint-2" and not found.passed_over


@pytest.mark.hosts
def test_a_folder_that_can_only_be_read(small_disk, embedded_model):
    disk = small_disk("1m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    run = launch(disk / "run", "--max_steps=2")
    assert run.code == 2 and "cannot be written: Read-only file system" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.hosts
def test_a_disk_that_is_full_before_the_first_step(small_disk, tmp_path, embedded_model):
    """Whichever file of the start finds no room: config.yaml, what is in logs/, a heartbeat."""
    disk = small_disk("1m")
    with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    for pages in (0, 1, 3, 5):  # that are free
        os.truncate(disk / "filler", (disk / "filler").stat().st_size // 4096 * 4096 - 4096 * pages)
        run = launch(disk / "run", "--max_steps=2", "--strategy=single")
        assert run.code == 2 and "Traceback" not in run.stderr, (pages, run.stderr)
        assert "error: cannot write" in run.stderr and f"where: output_dir {disk / 'run'}" in run.stderr, pages
        shutil.rmtree(disk / "run", ignore_errors=True)
        with (disk / "filler").open("ab", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))


# Checkpoints


@pytest.mark.parametrize("how", ["a flipped byte", "a missing file"])
def test_any_file_of_a_checkpoint(how, whole_run, tmp_path):
    good = whole_run.folder / "checkpoint-3"
    for number, file in enumerate(sorted(path.name for path in good.iterdir())):
        folder = tmp_path / str(number) / "checkpoint-3"
        shutil.copytree(good, folder)
        if how == "a missing file":
            (folder / file).unlink()
        else:
            content = bytearray((folder / file).read_bytes())
            content[len(content) // 3] ^= 0x20
            (folder / file).write_bytes(content)
        problem = run_folder.damage(folder)
        assert problem, file
        assert str(folder / file) in problem or file == run_folder.MANIFEST, (file, problem)


def test_auto_says_which_checkpoints_it_passes_over(whole_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_run.folder, folder)
    weights = folder / "checkpoint-6" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (folder / "checkpoint-9.partial").mkdir()
    run = launch(folder, "--strategy=single", "--max_steps=6", "--save_steps=3", "--resume_from_checkpoint=auto")
    assert run.code == 0, run.stderr
    assert f"passed over: {weights} is damaged" in run.stdout
    assert f"removed {folder / 'checkpoint-9.partial'}, which a killed run left" in run.stdout
    assert f"resumed from {folder / 'checkpoint-3'}, step 3" in run.stdout
    assert run_folder.damage(folder / "checkpoint-6") is None  # written anew
    assert run.metrics() == pytest.approx(whole_run.metrics(), abs=1e-5)


def test_a_checkpoint_of_another_model(whole_run, embedded_model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(embedded_model, other)
    (file,) = other.glob("*.safetensors")
    tensors = {name: tensor * 1.01 for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    resume = ("--max_steps=6", "--strategy=single", f"--resume_from_checkpoint={whole_run.folder / 'checkpoint-3'}")
    run = launch(tmp_path / "run", *resume, f"--model_name_or_path={other}")
    assert run.code == 2 and "would not be the same: model: " in run.stderr
    # Another folder with the same model is the same model.
    same_model = tmp_path / "same"
    shutil.copytree(embedded_model, same_model)
    run = launch(tmp_path / "run", *resume, f"--model_name_or_path={same_model}")
    assert run.code == 0, run.stderr
    assert run.metrics() == pytest.approx(whole_run.metrics()[3:], abs=1e-5)


def test_changes_that_are_allowed(whole_run, tmp_path):
    resume = ("--max_steps=6", "--strategy=single", f"--resume_from_checkpoint={whole_run.folder / 'checkpoint-3'}")
    run = launch(tmp_path / "a", *resume, "--learning_rate=5e-4", "--resume_changes=learning_rate")
    assert run.code == 0, run.stderr
    assert "changed, as allowed: learning_rate: 0.001 -> 0.0005" in run.stdout
    assert run.metrics("learning_rate")[0] < whole_run.metrics("learning_rate")[3]
    for key, what in {"lora_r": "cannot change", "output_dir": "nothing that a resume compares"}.items():
        run = launch(tmp_path / "b", *resume, f"--resume_changes={key}")
        assert run.code == 2 and what in run.stderr, run.stderr
