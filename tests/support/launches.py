"""Real launches, as a user makes them: the root of the project, `launch` and what it returns."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).parents[2]


def nightly(*cases: object) -> list:
    """Cases of `pytest.mark.parametrize` for the nightly tier; tuples are several arguments."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.nightly) for case in cases]


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
    argv = [sys.executable, "-m", "manyrank.cli", "train", recipe, f"--output_dir={folder}", *args]
    argv += [] if any(arg.startswith("--logging_steps=") for arg in args) else ["--logging_steps=1"]
    run = subprocess.run if cold else warm.run
    done = run(argv, capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, timeout=400)
    return Run(done.returncode, done.stdout, done.stderr, folder)


def accelerate_launch(config, *args, nproc=2):
    argv = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file=accelerate_configs/{config}.yaml"]
    argv += [
        f"--num_processes={nproc}",
        "--num_machines=1",
        "--main_process_port=0",
        "-m",
        "manyrank.train",
        "verify",
        *args,
    ]
    return warm.run(argv, cwd=ROOT)
