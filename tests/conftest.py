"""Shared pieces of the tests: the embedded model, real launches, and the runs that several tests look at."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import warm

os.environ["OMP_WAIT_POLICY"] = "passive"  # before torch is imported; spinning threads starve the launched runs
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "offline"

ROOT = Path(__file__).parents[1]


@dataclass
class Run:
    """A finished launch: its exit code, what it printed, and its folder."""

    code: int
    stdout: str
    stderr: str
    folder: Path

    def metrics(self, key: str = "loss") -> list[float]:
        lines = (self.folder / "logs" / "metrics.jsonl").read_text().splitlines()
        return [entry[key] for entry in map(json.loads, lines) if key in entry]

    def facts(self) -> dict:
        return json.loads((self.folder / "logs" / "strategy.json").read_text())


def launch(folder: Path, *args: str, recipe: str = "verify", cwd: Path = ROOT, cold: bool = False, **env: str) -> Run:
    """`manyrank train` as a user runs it, with every step logged.

    Args:
        cold: in a new interpreter, see `warm`.
    """
    argv = [sys.executable, "-m", "manyrank.cli", "train", recipe, f"--output_dir={folder}", "--logging_steps=1", *args]
    run = subprocess.run if cold else warm.run
    done = run(argv, capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, timeout=400)
    return Run(done.returncode, done.stdout, done.stderr, folder)


@pytest.fixture(scope="module", autouse=True)
def accelerate_as_it_was():
    """accelerate keeps the precision of a process's first Accelerator; the next file of tests may want another."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The embedded model's folder."""
    from manyrank.models.tiny import ensure

    return ensure()


@pytest.fixture(scope="session")
def tokenizer(embedded_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_model)


@pytest.fixture(scope="session")
def whole_run(embedded_model, tmp_path_factory) -> Run:
    """Six uninterrupted steps of one process with a checkpoint after three; many tests compare with it."""
    run = launch(tmp_path_factory.mktemp("whole") / "run", "--max_steps=6", "--save_steps=3", "--strategy=single")
    assert run.code == 0, run.stderr
    return run
