"""Measurements in processes of their own: run one, read its result or say why it failed, train a few steps.

A process prints its result as a line of JSON, and again when it knows more, so that a limit costs the rest alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from manyrank.runs.logs import read_metrics
from manyrank.signals import die_with_parent

MARK = "RESULT "
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m")
USER_ERROR = re.compile(r"(^RuntimeError: [^\n]*\n)?^error: .*^fix: [^\n]*", re.M | re.S)
# The line in which torchrun says that a worker failed, before a traceback of its own.
FAILED_WORKER = re.compile(r"^.*failed \(exitcode: -?\d+\).*$", re.M)
LAST_LINES = 12


def run(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None, seconds: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command that dies with this process, however that ends; torchrun's workers do so by themselves.

    Raises:
        subprocess.TimeoutExpired: it took longer than `seconds`, and is killed.
    """
    return subprocess.run(argv, capture_output=True, text=True, env=env, timeout=seconds, preexec_fn=die_with_parent)


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """Say why a command failed: all lines of a user's error, else the last ones that are not torchrun's."""
    text = done.stderr.strip()
    if error := USER_ERROR.search(text):
        text = error[0]
    elif report := FAILED_WORKER.search(text):
        text = text[: report.end()]
    return "\n".join([f"exit code {done.returncode}", *text.splitlines()[-LAST_LINES:]])


def result(done: subprocess.CompletedProcess[str]) -> dict:
    """The result of a process that has ended.

    Raises:
        RuntimeError: it failed, and why.
    """
    if done.returncode:
        raise RuntimeError(reason(done))
    return last_result(done.stdout)


def last_result(stdout: str) -> dict:
    """The last whole result in what a process has printed; empty: there is none."""
    lines = [line for line in stdout.splitlines(keepends=True) if line.startswith(MARK) and line.endswith("\n")]
    return json.loads(lines[-1].removeprefix(MARK)) if lines else {}


def print_result(figures: dict) -> None:
    """Print the result of this process; a library may have left a line without an end."""
    print(f"\n{MARK}{json.dumps(figures)}", flush=True)


def each(cases: Mapping[str, Callable[[], dict]]) -> dict:
    """Measure cases one after the other, and print the results so far after each; one that fails says why."""
    results = {}
    for name, measure in cases.items():
        try:
            results[name] = measure()
        except Exception as error:  # whatever a kernel or a library raises
            results[name] = {"error": f"{type(error).__name__}: {error}", "right": False}
        print_result(results)
    return results


def train(*more: str, hidden: bool, launcher: Sequence[str] = ()) -> list[float]:
    """The losses of four steps of the recipe verify, which is in float32.

    Args:
        hidden: whether it sees no GPU.
        launcher: a module that starts it, with its options.

    Raises:
        RuntimeError: it fails, and why.
    """
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-m", *launcher, "manyrank.train", "verify", f"--output_dir={folder}/run"]
        argv += ["--max_steps=4", "--logging_steps=1", "--report_to=none", "--sample_questions=[]", *more]
        done = run(argv, env=os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if hidden else {}))
        if done.returncode:
            raise RuntimeError(f"manyrank.train verify {' '.join(more)}: {reason(done)}")
        return [line["loss"] for line in read_metrics(Path(folder, "run")) if "loss" in line]
