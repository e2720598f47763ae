"""What a run writes down about itself: logs/metrics.jsonl and logs/training_log.txt, on rank 0."""

from __future__ import annotations

import json
import time
from pathlib import Path

from transformers import TrainerCallback


class RunLog(TrainerCallback):
    """Appends every logged dictionary to metrics.jsonl (for machines) and training_log.txt (for people)."""

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / "logs"

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.folder.mkdir(parents=True, exist_ok=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "time": round(time.time(), 3), **logs}) + "\n")
        shown = "  ".join(f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in logs.items())
        with (self.folder / "training_log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  step {state.global_step}/{state.max_steps}  {shown}\n")


def read_metrics(output_dir: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, oldest first."""
    return [json.loads(line) for line in (output_dir / "logs" / "metrics.jsonl").read_text().splitlines()]


def peak_memory(device_type: str) -> int:
    """Most bytes this process has held: of the GPU's memory, or resident memory on a CPU."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rewind(output_dir: Path, step: int) -> None:
    """Forget the lines after `step`: a resumed run writes them again."""
    file = output_dir / "logs" / "metrics.jsonl"
    if file.exists():
        kept = [line for line in file.read_text().splitlines() if json.loads(line)["step"] <= step]
        file.write_text("".join(f"{line}\n" for line in kept))
