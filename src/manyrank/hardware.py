"""What this machine has, found without torch so that errors come at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

# Instruction sets that multiply bf16 matrices natively; elsewhere torch emulates them.
CPU_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int  # bytes
    compute_capability: tuple[int, int]

    @property
    def has_bf16(self) -> bool:
        return self.compute_capability >= (8, 0)


@dataclass(frozen=True)
class Hardware:
    """The visible GPUs and the CPU of one machine."""

    gpus: tuple[Gpu, ...]
    cpu_cores: int
    cpu_bf16: bool

    @property
    def has_bf16(self) -> bool:
        """Whether bf16 matrix products are native on what a run would use."""
        return all(gpu.has_bf16 for gpu in self.gpus) if self.gpus else self.cpu_bf16


def probe() -> Hardware:
    """Look at this machine: NVML for GPUs (as narrowed by CUDA_VISIBLE_DEVICES), /proc for the CPU."""
    return Hardware(gpus=_gpus(), cpu_cores=len(os.sched_getaffinity(0)), cpu_bf16=_cpu_bf16())


def _gpus() -> tuple[Gpu, ...]:
    import pynvml  # slow to import, and not needed for --help

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        every = [_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(every)
    chosen = []
    for name in (part.strip() for part in visible.split(",")):
        # A UUID also names one GPU; which one does not matter here.
        index = int(name) if name.isdecimal() else 0 if name.startswith(("GPU-", "MIG-")) else -1
        if not 0 <= index < len(every):
            break  # CUDA, too, ends the list at the first invalid entry
        chosen.append(every[index])
    return tuple(chosen)


def _gpu(pynvml, index: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    return Gpu(
        name=pynvml.nvmlDeviceGetName(handle),
        memory=pynvml.nvmlDeviceGetMemoryInfo(handle).total,
        compute_capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
    )


def _cpu_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and not CPU_BF16_FLAGS.isdisjoint(cpuinfo.read_text().split())
