"""Files in a run's logs/, and the memory of this process. Imports torch only for a GPU.

metrics.jsonl   a line for each logged step and each validation
training_log.txt   the same for people, and warnings
history.jsonl   started, resumed, preempted, failed, finished
samples.json    the recipe's questions, with the answers before and after the training
completions.jsonl   some completions of each logged step, with their rewards
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

COMPLETIONS = "completions.jsonl"
WARNING = "WARNING: "


def read_metrics(output_dir: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, oldest first, without the half line that a killed run may have left."""
    return read_lines(output_dir / "logs" / "metrics.jsonl")


def read_history(output_dir: Path) -> list[dict]:
    """Read the run's history, oldest first; empty where there is none."""
    file = output_dir / "logs" / "history.jsonl"
    return read_lines(file) if file.is_file() else []


def read_completions(output_dir: Path) -> list[dict]:
    """Completions with their rewards, oldest first; empty where the run has none."""
    file = output_dir / "logs" / COMPLETIONS
    return read_lines(file) if file.is_file() else []


def note(output_dir: Path, event: str, *, step: int, **facts: object) -> None:
    """Add a line to the run's history."""
    line = json.dumps({"time": round(time.time(), 3), "event": event, "step": step, **facts})
    file = output_dir / "logs" / "history.jsonl"
    # What a killed run left of a line must not run into this one.
    torn = file.is_file() and not file.read_bytes().endswith(b"\n")
    with file.open("a", encoding="utf-8") as stream:
        stream.write("\n" * torn + line + "\n")


def read_lines(file: Path) -> list[dict]:
    """The objects of a file with one in each line; what is no whole object is left out."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return [value for line in lines if (value := _object(line)) is not None]


def _object(line: str) -> dict | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_samples(output_dir: Path) -> list[dict] | None:
    """Entries of question, before and after (None until the end); None where the run has none."""
    try:
        return json.loads((output_dir / "logs" / "samples.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_samples(output_dir: Path, questions: list[str], before: list[str], after: list[str] | None = None) -> None:
    """Keep the answers to the recipe's questions."""
    entries = [
        {"question": question, "before": old, "after": new}
        for question, old, new in zip(questions, before, after or [None] * len(before))
    ]
    file = output_dir / "logs" / "samples.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(entries, indent=1, ensure_ascii=False), encoding="utf-8")


def peak_memory(device_type: str) -> int:
    """Most bytes this process has held: of the GPU's memory since `take_peaks`, or resident memory on a CPU."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def warn(output_dir: Path, text: str) -> None:
    """Print a warning, and add it to the run's log; a file that cannot be written costs nothing else."""
    print(f"{WARNING}{text}", file=sys.stderr, flush=True)
    keep_warning(output_dir, f"{WARNING}{text}")


def keep_warning(output_dir: Path, line: str) -> None:
    """Add a warning that has been printed to the run's log."""
    with contextlib.suppress(OSError):
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        append_lines(output_dir / "logs" / "training_log.txt", [f"{now}  {' '.join(line.split())}"])


def read_warnings(output_dir: Path) -> list[str]:
    """The warnings of the run's log, oldest first."""
    file = output_dir / "logs" / "training_log.txt"
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ()
    return [line for line in lines if WARNING in line]


def append_lines(file: Path, lines: Iterable[str]) -> None:
    """Add lines to a file of a run."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in lines)


def rewind(output_dir: Path, step: int) -> None:
    """Forget the lines after `step`: a resumed run writes them again."""
    for file in (output_dir / "logs" / "metrics.jsonl", output_dir / "logs" / COMPLETIONS):
        if file.exists():
            lines = [line for line in read_lines(file) if line.get("step", 0) <= step]
            partial = file.with_suffix(".partial")  # a signal may end the start here
            partial.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            partial.replace(file)


@contextlib.contextmanager
def warn_on_write_error() -> Iterator[None]:
    """A file for the report that cannot be written, on a full disk for instance, is told, and costs nothing else."""
    try:
        yield
    except OSError as error:
        print(f"WARNING: the report will lack something: {error}", file=sys.stderr, flush=True)
