"""FSDP2 on CPUs, so that every strategy can be tried and tested without a GPU.

torch's `fully_shard` runs on gloo. accelerate 1.15 does not offer it: `AcceleratorState.__init__` (accelerate/state.py)
turns a distributed type into FSDP for MULTI_GPU, MULTI_XPU, ... but not for MULTI_CPU, and so an FSDP config trains as
DDP, silently. This does after construction what that branch does for GPUs. A `ParallelismConfig` comes in here, too:
given to `Accelerator.__init__`, it would be refused there, since that knows it with FSDP or GPUs only.

It can go when that branch lists MULTI_CPU; tests/topology/test_strategy.py fails on that day.
"""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig


def promote_to_fsdp(
    accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin, parallelism: ParallelismConfig | None
) -> None:
    """Make a MULTI_CPU accelerator an FSDP one, before anything is prepared with it.

    Args:
        parallelism: the sizes of shards and replicas; None where all processes share one copy of the model.
    """
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if parallelism:
        accelerator.state.parallelism_config = parallelism
        accelerator.state.device_mesh = parallelism.get_device_mesh("cpu")
