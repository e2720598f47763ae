"""Bind a process to the CPUs of its GPU's NUMA node: memory it touches first is then on that node, too. No torch.

    /sys/devices/system/node/node0/cpulist           0-31,64-95
    /sys/bus/pci/devices/0000:17:00.0/numa_node      0; -1 where the machine does not tell

The same under each launcher. torchrun has `--numa-binding` (torch 2.13), for which numactl must be installed; accelerate
1.15 binds once the process group's threads run, counts GPUs past CUDA_VISIBLE_DEVICES and widens a narrower binding. It
does so where ACCELERATE_CPU_AFFINITY is 1; with that variable set, to 0 for none, nothing is bound here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "ACCELERATE_CPU_AFFINITY"
SYS = Path("/sys")


def bind(gpu: str, *, sys: Path = SYS, environ: Mapping[str, str] = os.environ) -> str | None:
    """Bind this process and its threads to the CPUs near a GPU. Never to ones that it may not use now.

    Args:
        gpu: its PCI address, as 0000:17:00.0.

    Returns:
        A line about it; None where nothing is to be bound.
    """
    before = os.sched_getaffinity(0)
    cpus = None if VARIABLE in environ else cpus_near(gpu, before, sys=sys)
    if not cpus:
        return None
    for thread in [0, *(int(task.name) for task in Path("/proc/self/task").iterdir())]:
        with contextlib.suppress(ProcessLookupError):  # a thread that has just ended
            if os.sched_getaffinity(thread) == before:  # else somebody has bound it already
                os.sched_setaffinity(thread, cpus)
    return f"{len(cpus)} of {len(before)} CPUs, those of the NUMA node of GPU {gpu} ({VARIABLE}=0 leaves all)"


def cpus_near(gpu: str, allowed: set[int], *, sys: Path = SYS) -> set[int] | None:
    """The allowed CPUs of a GPU's node; None with one node, a binding to one already, or a GPU that tells none."""
    nodes = {
        int(folder.name.removeprefix("node")): _cpus((folder / "cpulist").read_text())
        for folder in (sys / "devices" / "system" / "node").glob("node[0-9]*")
    }
    file = sys / "bus" / "pci" / "devices" / gpu / "numa_node"
    if not file.is_file() or any(allowed <= cpus for cpus in nodes.values()):
        return None
    return allowed & nodes.get(int(file.read_text()), set()) or None


def _cpus(ranges: str) -> set[int]:
    """Read 0-31,64-95; a node with memory alone has none."""
    parts = [part.partition("-") for part in ranges.strip().split(",") if part]
    return {cpu for first, _, last in parts for cpu in range(int(first), int(last or first) + 1)}
