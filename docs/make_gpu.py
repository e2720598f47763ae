"""Writes docs/gpu.md from docs/gpu.json, which `make gpu-check` makes on a GPU: `python docs/make_gpu.py`. A test compares the two."""

from __future__ import annotations

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent / "benchmarks"))

from gpu_check import PARTS  # noqa: E402

INTRO = """# What was measured on a GPU

`make gpu-check` measures what would hurt most first, and writes `docs/gpu.json` as it goes; this page is made from it by
`python docs/make_gpu.py`. A part that is done is not run again. Limits of the parts down to FSDP2 and ZeRO-3 add up to a quarter of an
hour, those of all to about half an hour.
"""
ONLY_A_GPU = """
## What only a GPU can tell

On a CPU every strategy and method trains with the losses of one process, and `make cuda-dry` runs the CUDA path on libraries that count
and check and do not compute. Open until the parts above are measured:

- values of kernels: flash attention, bitsandbytes' CUDA kernels, float8 products, the SwiGLU and the rotary embedding that are compiled on the card, fused optimizers;
  races and illegal accesses; whether a GPU quantises a base to the very bits of the cache;
- speed: tokens a second, MFU, the host's time for a launch, how much of the communication is hidden, what NVLink, PCIe and a network give;
- what `torch_compile` and FlashAttention 3 or 4 gain, and how long compiling takes; until then it is off by default;
- GRPO: values of completions, rewards and losses (its course is run on the stand-in, with tokens that are all the same);
- memory beside tensors: CUDA contexts, NCCL's buffers, fragments;
- NCCL between real GPUs and machines: time-outs, a rank that is lost, NUMA nodes;
- drivers and kinds of GPUs other than the one measured.
"""


def page(results: dict | None) -> str:
    """The page, for the content of the JSON file or without one."""
    lines = [INTRO, "| part | result |", "|---|---|"]
    for part in PARTS:
        lines.append(f"| {part.what} | {_cell((results or {}).get(part.name))} |")
    return "\n".join(lines) + "\n" + ONLY_A_GPU


def _cell(entry: dict | None) -> str:
    if entry is None:
        return "not measured"
    result = _text(entry.get("result", {}))
    if entry["state"] == "done":
        return result
    return ": ".join(filter(None, (entry["state"], entry.get("error"), result))).replace("\n", " ")


def _text(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_text(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    file = FOLDER / "gpu.json"
    (FOLDER / "gpu.md").write_text(page(json.loads(file.read_text()) if file.exists() else None), encoding="utf-8")
