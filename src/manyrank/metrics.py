"""What a run has written down about itself, and how much memory it took. No torch unless a GPU is asked about."""

from __future__ import annotations

import json
from pathlib import Path


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
        # A killed run may have left half a line, without its end.
        kept = [
            line for line in file.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step
        ]
        file.write_text("".join(f"{line}\n" for line in kept))
