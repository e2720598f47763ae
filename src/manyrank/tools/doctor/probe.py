"""What `manyrank doctor` finds on one machine: versions, GPUs, memory, disks, network. `checks` judges it. No torch.

Every function looks and gives facts; None stands for what the machine does not tell. Sizes are bytes, speeds bytes a second.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import resource
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LANE = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}  # of a PCIe generation, each way
NVIDIA = "0x10de"  # PCI vendor
PCI = Path("/sys/bus/pci/devices")
INFINIBAND = Path("/sys/class/infiniband")
MEMORY_LIMITS = (  # of a container: limit, use
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


# Software


def tested_versions(constraints: Path) -> dict[str, str]:
    """The versions in a file of `name==version` lines."""
    lines = (line.split("#")[0].strip() for line in constraints.read_text(encoding="utf-8").splitlines())
    return dict(line.split("==") for line in lines if "==" in line)


def needed_versions() -> dict[str, str]:
    """What this package says that it needs, such as {"torch": ">=2.11"}."""
    from packaging.requirements import Requirement

    needed = map(Requirement, importlib.metadata.requires("manyrank") or ())
    return {entry.name: str(entry.specifier) for entry in needed if not entry.marker}


# GPUs


@dataclass(frozen=True)
class GpuState:
    """One visible GPU. None: the card or the driver does not tell.

    Attributes:
        users: process ids of others that compute on it.
        slowed: why its clocks are held down now.
        errors: uncorrected memory errors since the driver was loaded.
        broken_rows: memory rows wait for a reset to be replaced, or cannot be replaced.
        nvlinks: active ones; nvlink_speed is of all of them, each way.
        pcie: generation, lanes in use, lanes of the card.
    """

    index: int
    name: str
    memory: int
    free: int
    compute_capability: tuple[int, int]
    users: tuple[int, ...] = ()
    slowed: tuple[str, ...] = ()
    errors: int | None = None
    broken_rows: bool | None = None
    nvlinks: int = 0
    nvlink_speed: float | None = None
    pcie: tuple[int, int, int] | None = None

    @property
    def link(self) -> tuple[str, float | None]:
        """The way to the other GPUs of the machine: its name, and its speed."""
        if self.nvlinks:
            return f"{self.nvlinks} NVLinks", self.nvlink_speed
        if self.pcie is None:
            return "PCIe", None
        generation, lanes, _ = self.pcie
        return f"PCIe {generation}.0 x{lanes}", LANE[generation] * lanes if generation in LANE else None


@dataclass(frozen=True)
class Graphics:
    """The visible GPUs and their driver.

    Attributes:
        driver: its version; None where there is none that answers, and `problem` is what it said.
        devices: NVIDIA devices on the PCI bus.
    """

    gpus: tuple[GpuState, ...] = ()
    driver: str | None = None
    problem: str | None = None
    devices: int = 0


def graphics() -> Graphics:
    """Ask NVML. To be called before processes of our own use the GPUs."""
    import pynvml

    devices = _nvidia_devices()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Graphics(problem=str(error), devices=devices)
    try:
        gpus = tuple(_gpu(pynvml, index, handle) for index, handle in enumerate(_visible(pynvml)))
        return Graphics(gpus, pynvml.nvmlSystemGetDriverVersion(), devices=devices)
    finally:
        pynvml.nvmlShutdown()


def _nvidia_devices() -> int:
    """Display and 3D controllers (class 0x03...) of NVIDIA."""
    found = [(_text(device / "vendor"), _text(device / "class")) for device in PCI.glob("*")]
    return sum(vendor == NVIDIA and (kind or "").startswith("0x03") for vendor, kind in found)


def _visible(pynvml) -> Iterator[object]:
    """Handles in the order of CUDA_VISIBLE_DEVICES; the list ends at its first invalid entry, as for CUDA."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(pynvml.nvmlDeviceGetCount())) if chosen is None else chosen.split(",")
    for name in (name.strip() for name in names):
        try:
            by_index = name.isdecimal()
            yield pynvml.nvmlDeviceGetHandleByIndex(int(name)) if by_index else pynvml.nvmlDeviceGetHandleByUUID(name)
        except pynvml.NVMLError:
            return


def _gpu(pynvml, index: int, handle) -> GpuState:
    def ask(name: str, *more):
        try:
            return getattr(pynvml, name)(handle, *more)
        except pynvml.NVMLError:  # not every card and driver knows everything
            return None

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    rows = ask("nvmlDeviceGetRemappedRows")
    pcie = [ask(f"nvmlDeviceGet{what}") for what in ("MaxPcieLinkGeneration", "CurrPcieLinkWidth", "MaxPcieLinkWidth")]
    nvlinks, speed = _nvlinks(pynvml, handle, ask)
    return GpuState(
        index=index,
        name=pynvml.nvmlDeviceGetName(handle),
        memory=memory.total,
        free=memory.free,
        compute_capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
        users=tuple(process.pid for process in ask("nvmlDeviceGetComputeRunningProcesses") or ()),
        slowed=_slowed(pynvml, ask("nvmlDeviceGetCurrentClocksEventReasons") or 0),
        errors=ask("nvmlDeviceGetTotalEccErrors", pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC),
        broken_rows=None if rows is None else bool(rows[2] or rows[3]),
        nvlinks=nvlinks,
        nvlink_speed=speed,
        pcie=None if None in pcie else tuple(pcie),
    )


def _nvlinks(pynvml, handle, ask) -> tuple[int, float | None]:
    """The active links, and the speed of all of them; NVML gives it in MB/s of one link."""
    links = [link for link in range(pynvml.NVML_NVLINK_MAX_LINKS) if ask("nvmlDeviceGetNvLinkState", link)]
    if not links:
        return 0, None
    asked = [(pynvml.NVML_FI_DEV_NVLINK_GET_SPEED, link) for link in links]
    values = ask("nvmlDeviceGetFieldValues", asked) or ()
    speeds = [value.value.uiVal for value in values if value.nvmlReturn == 0]
    return len(links), sum(speeds) * 1e6 if len(speeds) == len(links) and all(speeds) else None


def _slowed(pynvml, reasons: int) -> tuple[str, ...]:
    """Heat and power brakes; a power cap is how cards work at full load."""
    known = {
        "SwThermalSlowdown": "heat",
        "HwThermalSlowdown": "heat, by the card",
        "HwPowerBrakeSlowdown": "the power supply",
    }
    return tuple(text for name, text in known.items() if reasons & getattr(pynvml, f"nvmlClocksEventReason{name}"))


# Memory and disks


@dataclass(frozen=True)
class Space:
    """size and free: bytes. None: it is not there."""

    size: int
    free: int


def host_memory() -> Space:
    """What this process and its children can have: of the machine, or of the container."""
    import psutil

    memory = psutil.virtual_memory()
    size, free = memory.total, memory.available
    for limit, used in MEMORY_LIMITS:
        most, now = _text(Path(limit)), _text(Path(used))
        if most and now and most.isdecimal() and int(most) < size:
            size, free = int(most), min(free, int(most) - int(now))
    return Space(size, free)


def space(folder: Path) -> Space | None:
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return Space(usage.total, usage.free)


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


# Network


@dataclass(frozen=True)
class Network:
    """The way to other machines.

    Attributes:
        name: of the network device that reaches the endpoint.
        speed: of it; None where it does not tell.
        infiniband: active ports of InfiniBand or RoCE.
        infiniband_speed: of all of them.
        locked_memory: bytes that a process may lock; None: any.
    """

    name: str | None = None
    speed: float | None = None
    infiniband: int = 0
    infiniband_speed: float | None = None
    locked_memory: int | None = None


def network(endpoint: str) -> Network:
    """The way to HOST:PORT."""
    import psutil

    name = _device_to(endpoint)
    stats = psutil.net_if_stats().get(name) if name else None
    ports = list(_infiniband())
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Network(
        name=name,
        speed=stats.speed * 1e6 / 8 if stats and stats.speed > 0 else None,
        infiniband=len(ports),
        infiniband_speed=sum(ports) or None,
        locked_memory=None if limit == resource.RLIM_INFINITY else limit,
    )


def _device_to(endpoint: str) -> str | None:
    """The device whose address is used to reach HOST:PORT. Nothing is sent."""
    import psutil

    host, _, port = endpoint.rpartition(":")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        with contextlib.closing(socket.socket(family, kind, protocol)) as asked:
            asked.connect(address)
            own = asked.getsockname()[0]
    except OSError:
        return None
    devices = psutil.net_if_addrs().items()
    return next((name for name, addresses in devices if own in (entry.address for entry in addresses)), None)


def _infiniband() -> Iterator[float]:
    """The speed of each active port; the kernel writes "200 Gb/sec (4X HDR)"."""
    for port in INFINIBAND.glob("*/ports/*"):
        if "ACTIVE" in (_text(port / "state") or ""):
            yield float((_text(port / "rate") or "0").split()[0]) * 1e9 / 8


def _text(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except OSError:
        return None
