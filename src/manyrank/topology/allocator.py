"""Settings of torch's GPU allocator: expandable segments, where the run works with them.

Micro-batches of different lengths fragment the default segments: Llama-3.1-8B with LoRA held 79.1 GiB for 50.1
allocated, and 50.2 with segments that grow. vLLM in the same process does not work with them (see
`TrainConfig.expandable_segments`).
"""

from __future__ import annotations

import os

from .gpus import Hardware

NAME, OLD_NAME = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"  # torch before 2.9 knows the second only
EXPANDABLE = "expandable_segments:True"


def allocator(machine: Hardware, *, expandable: bool) -> dict[str, str]:
    """The allocator's variable on a machine; empty without GPUs, and where the user has set it by its older name."""
    return {NAME: EXPANDABLE} if machine.gpus and expandable and OLD_NAME not in os.environ else {}
