"""FSDP2 on CPUs, so that every strategy can be tried and tested without a GPU.

torch's `fully_shard` runs on gloo. accelerate 1.15 does not offer it: `AcceleratorState.__init__` (accelerate/state.py)
turns a distributed type into FSDP for MULTI_GPU, MULTI_XPU, ... but not for MULTI_CPU, and so an FSDP config trains as
DDP, silently. This does after construction what that branch does for GPUs.

It can go when that branch lists MULTI_CPU; tests/test_strategy.py fails on that day.
"""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def promote_to_fsdp(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Make a MULTI_CPU accelerator an FSDP one, before anything is prepared with it."""
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
