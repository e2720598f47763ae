"""Hardware of this machine, found without torch so that errors come at once."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import cuda_driver

# Instruction sets that multiply bf16 matrices natively; elsewhere torch emulates them.
CPU_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that hide all GPUs; the last one is SLURM's
DEVICES = Path("/dev")
DRIVER_FIX = (
    "see `nvidia-smi` for GPUs and driver; a replaced driver needs a restart, a container "
    "NVIDIA_DRIVER_CAPABILITIES=compute,utility; or use the CPU: CUDA_VISIBLE_DEVICES=''"
)


@dataclass(frozen=True)
class GpuKind:
    """A kind of GPU, by its maker's figures.

    Attributes:
        memory: bytes, as nvidia-smi has them; CUDA offers up to 4% less.
        flops: of dense 16-bit matrix products with float32 sums, a second.
        float32_flops: the same in float32, without TF32.
        bandwidth: of its memory, bytes a second.
        link: to the other GPUs of its machine, bytes a second in one direction (NVLink, else PCIe).
        network: its share of the machine's network, bytes a second, in the machines it is usually sold in.
        price: about what an hour costs to rent, in dollars.
        compute_capability: as CUDA counts what the hardware can do.
    """

    name: str
    memory: int
    flops: float
    float32_flops: float
    bandwidth: float
    link: float
    network: float
    price: float
    compute_capability: tuple[int, int] = (8, 0)


@dataclass(frozen=True)
class Gpu:
    """One GPU. `memory` in bytes, 0 where it is not known; `planned` is the kind of a GPU that is not here."""

    name: str
    memory: int
    compute_capability: tuple[int, int]
    planned: GpuKind | None = None

    @property
    def has_bf16(self) -> bool:
        return self.compute_capability >= (8, 0)

    @property
    def has_tf32(self) -> bool:
        return self.compute_capability >= (8, 0)

    @property
    def has_float8(self) -> bool:
        """Whether its tensor cores multiply float8: Ada, Hopper, and what came after."""
        return self.compute_capability >= (8, 9)

    @property
    def kind(self) -> GpuKind | None:
        """The maker's figures; None: not known."""
        return self.planned or find_kind(self.name, self.memory or None)


@dataclass(frozen=True)
class Hardware:
    """The visible GPUs, the CPU, the memory (bytes) and the driver's CUDA version of one machine; None: not known."""

    gpus: tuple[Gpu, ...]
    cpu_cores: int
    cpu_bf16: bool
    memory: int | None = None
    cuda: tuple[int, int] | None = None

    @property
    def has_bf16(self) -> bool:
        """Return whether bf16 matrix products are native on what a run would use."""
        return all(gpu.has_bf16 for gpu in self.gpus) if self.gpus else self.cpu_bf16

    @property
    def smallest_gpu(self) -> Gpu | None:
        """The one with the least memory, which decides what fits."""
        return min(self.gpus, key=lambda gpu: gpu.memory, default=None)


def _kind(
    name: str,
    mib: int,
    bf16: float,
    float32: float,
    gb_s: float,
    link: float,
    gbit: float,
    price: float,
    capability: float = 8.0,
) -> GpuKind:
    major, _, minor = str(capability).partition(".")
    sizes = (bf16 * 1e12, float32 * 1e12, gb_s * 1e9, link * 1e9, gbit / 8 * 1e9)
    return GpuKind(name, mib * 2**20, *sizes, price, (int(major), int(minor)))


# MiB, TFLOP/s in 16 and in 32 bits, GB/s of memory, GB/s of the link, Gbit/s of network for each GPU, $ an hour, compute capability.
GPU_KINDS = (
    _kind("B200", 183359, 2250, 75, 8000, 900, 400, 5.5, 10.0),
    _kind("H200", 143771, 989, 67, 4800, 450, 400, 3.5, 9.0),
    _kind("H100-80GB", 81559, 989, 67, 3350, 450, 400, 2.9, 9.0),
    _kind("H100-NVL", 95830, 835, 60, 3900, 300, 200, 2.8, 9.0),
    _kind("H100-PCIe", 81559, 756, 51, 2000, 50, 100, 2.4, 9.0),
    _kind("GH200", 97871, 989, 67, 4000, 50, 200, 2.5, 9.0),
    _kind("A100-80GB", 81920, 312, 19.5, 2039, 300, 200, 1.8),
    _kind("A100-40GB", 40960, 312, 19.5, 1555, 300, 100, 1.3),
    _kind("L40S", 46068, 362, 91.6, 864, 25, 50, 1.0, 8.9),
    _kind("L40", 46068, 181, 90.5, 864, 25, 50, 0.9, 8.9),
    _kind("L4", 23034, 121, 30.3, 300, 25, 12.5, 0.7, 8.9),
    _kind("A40", 46068, 150, 37.4, 696, 25, 25, 0.5, 8.6),
    _kind("A30", 24576, 165, 10.3, 933, 25, 25, 0.6),
    _kind("A10G", 23028, 70, 31.5, 600, 25, 12.5, 1.0, 8.6),
    _kind("A10", 23028, 125, 31.2, 600, 25, 25, 0.75, 8.6),
    _kind("RTX-PRO-6000", 97887, 503, 125, 1792, 50, 25, 1.8, 12.0),
    _kind("RTX6000-Ada", 49140, 364, 91.1, 960, 25, 12.5, 0.8, 8.9),
    _kind("A6000", 49140, 155, 38.7, 768, 25, 12.5, 0.5, 8.6),
    _kind("A5000", 24564, 111, 27.8, 768, 25, 12.5, 0.3, 8.6),
    _kind("RTX5090", 32607, 209, 105, 1792, 50, 12.5, 0.7, 12.0),
    _kind("RTX4090", 24564, 165, 82.6, 1008, 25, 12.5, 0.4, 8.9),
    _kind("RTX4080", 16376, 97, 48.7, 717, 25, 12.5, 0.3, 8.9),
    _kind("RTX4060Ti", 16380, 44, 22, 288, 12, 12.5, 0.15, 8.9),
    _kind("RTX3090", 24576, 71, 35.6, 936, 25, 12.5, 0.25, 8.6),
    _kind("RTX3080", 10240, 60, 29.8, 760, 25, 12.5, 0.2, 8.6),
    _kind("RTX3060", 12288, 25, 12.7, 360, 12, 12.5, 0.1, 8.6),
    _kind("V100-32GB", 32768, 125, 15.7, 900, 150, 25, 0.6, 7.0),
    _kind("V100-16GB", 16384, 125, 15.7, 900, 150, 25, 0.4, 7.0),
    _kind("T4", 15360, 65, 8.1, 320, 12, 12.5, 0.35, 7.5),
)


def planned_hardware(
    count: int, kind: GpuKind | None = None, *, memory: int | None = None, bf16: bool = True, host: int | None = None
) -> Hardware:
    """A machine that is not here, with `count` GPUs of one kind, or with none.

    Args:
        kind: of the GPUs; None: only their memory in bytes is known, or nothing.
        bf16: of GPUs without a kind, or of the CPU.
        host: bytes of the machine's own memory.
    """
    capability = kind.compute_capability if kind else (9, 0) if bf16 else (7, 0)
    gpu = Gpu(kind.name if kind else "planned", memory or (kind.memory if kind else 0), capability, planned=kind)
    return Hardware((gpu,) * count, cpu_cores=max(1, count), cpu_bf16=bf16, memory=host)


def find_kind(name: str, memory: int | None = None) -> GpuKind | None:
    """A kind by its name in any spelling, also as the driver tells it (`NVIDIA H100 80GB HBM3`); None: not known.

    Args:
        memory: bytes, which tell kinds of one name apart.
    """

    words = _words(name)
    better = {end for end in ("ti", "super") if any(re.fullmatch(f"[0-9]*{end}", word) for word in words)}
    candidates = []
    for order, kind in enumerate(GPU_KINDS):
        model, *rest = _words_of_kind(kind.name)
        missing = [word for word in rest if word not in words and not re.fullmatch("[0-9]+gb", word)]
        if model in words and not missing and better == {end for end in ("ti", "super") if model.endswith(end)}:
            near = abs(kind.memory - memory) if memory else 0
            candidates.append((-sum(word in words for word in rest), near, order, kind))
    best = min(candidates)[-1] if candidates else None
    far = best and memory and abs(best.memory - memory) > 0.12 * memory
    return None if far else best


def _words(name: str) -> set[str]:
    """`NVIDIA GeForce RTX 4060 Ti` has the words rtx, 4060, ti and 4060ti, among others."""
    words = re.findall("[a-z0-9]+", re.sub("rtx(?=[0-9])", "rtx ", name.lower()))
    return {*words, *(a + b for a, b in pairwise(words))}


def _words_of_kind(name: str) -> list[str]:
    words = re.findall("[a-z0-9]+", re.sub("rtx-?", "", name.lower()).replace("6000ada", "6000-ada"))
    return words[::-1] if words[0] == "pro" else words


def with_network(kind: GpuKind, *, gbit: float, gpus: int) -> GpuKind:
    """The kind in machines with `gbit` Gbit/s of network for `gpus` GPUs."""
    return replace(kind, network=gbit / 8 * 1e9 / gpus)


def probe() -> Hardware:
    """Look at this machine: the CUDA driver for GPUs, in CUDA's order, and /proc for the CPU.

    Raises:
        UserError: there are GPUs for this process, and CUDA cannot use them.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in HIDDEN:
        return probe_host()
    gpus, cuda = _read_driver(visible, os.environ.get("CUDA_DEVICE_ORDER"))
    return replace(probe_host(), gpus=gpus, cuda=cuda)


def probe_host() -> Hardware:
    """Look at this machine without its GPUs."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware((), cpu_cores=len(os.sched_getaffinity(0)), cpu_bf16=_cpu_bf16(), memory=memory)


@cache  # a run asks several times, and a driver may take seconds
def _read_driver(visible: str | None, order: str | None) -> tuple[tuple[Gpu, ...], tuple[int, int] | None]:
    """The GPUs and the driver's CUDA version; the driver itself reads these values, CUDA_VISIBLE_DEVICES and _DEVICE_ORDER."""
    try:
        ctypes.CDLL(cuda_driver.LIBRARY)
    except OSError as error:
        _refuse_own_gpus(str(error), "nvidia[0-9]*")
        return (), None
    answer = _ask_driver()
    if "problem" in answer:
        _refuse_own_gpus(answer["problem"], "nvidia[0-9]*", "dxg")  # WSL's, for GPUs of any maker
        return (), None
    gpus = (Gpu(gpu["name"], gpu["memory"], tuple(gpu["compute_capability"])) for gpu in answer["gpus"])
    return tuple(gpus), tuple(answer["cuda"])


def _refuse_own_gpus(problem: str, *device_files: str) -> None:
    if any(_is_allowed(file) for pattern in device_files for file in DEVICES.glob(pattern)):
        raise _unusable(problem)


def _ask_driver() -> dict[str, Any]:
    """Run `cuda_driver`, which lists the GPUs."""
    argv, pipe = [sys.executable, "-I", "-S", cuda_driver.__file__, str(cuda_driver.SECONDS)], subprocess.PIPE
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
    with contextlib.suppress(subprocess.TimeoutExpired):  # where its alarm cannot end it: it hangs in the kernel
        answer, errors = process.communicate(timeout=cuda_driver.SECONDS + 5)
        if process.returncode == 0:
            return json.loads(answer.splitlines()[-1])
        if process.returncode != -signal.SIGALRM:
            return {"problem": f"the driver ended a process with {process.returncode}: {errors.strip()[-200:]}"}
    raise _unusable(f"the driver has not answered for {cuda_driver.SECONDS} s")


def _unusable(problem: str) -> UserError:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    where = f"the CUDA driver, CUDA_VISIBLE_DEVICES={visible}" if visible else "the CUDA driver"
    return UserError(f"CUDA cannot use the GPUs of this machine: {problem}", where=where, fix=DRIVER_FIX)


def _is_allowed(file: Path) -> bool:
    """Return whether this process may use a GPU, as far as permissions and its job's cgroup say."""
    try:
        os.close(os.open(file, os.O_RDWR))
    except OSError as error:
        return not isinstance(error, PermissionError)
    return True


def _cpu_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and not CPU_BF16_FLAGS.isdisjoint(cpuinfo.read_text().split())
