"""Check the machine itself: versions, GPUs and driver, memory, disks, compiler, network. No torch.

A function looks and judges in one place. Sizes are in bytes.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import resource
import shutil
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...parallel import compile_locks
from ...rules.context import RunContext
from ...runs.versions import Software
from ...topology.gpus import Gpu, Hardware
from ...topology.strategies import EngineKind
from ...topology.torch_gpus import fitting_build, torch_fix
from .checks import Check, counted, failed, gib, ok, warning

TESTED_PYTHON = "3.11"
EXTRAS = ("trl", "vllm", "lm_eval", "flash-linear-attention", "causal-conv1d", "flash-attn-3", "flash-attn-4")
PROCESS_BYTES = 2 << 30  # of host memory: torch and the libraries, and what a step needs beside the weights
SHARED_BYTES = 256 << 20  # of /dev/shm for each process: what NCCL's channels between GPUs of one machine take at most
SPARE_BYTES = 2 << 30  # of a disk on which a run or the hub's cache grows by an amount that is not known
PCI = Path("/sys/bus/pci/devices")
INFINIBAND = Path("/sys/class/infiniband")
MEMORY_LIMITS = (  # of a container: limit, use
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


# Software


def tested_versions(constraints: Path) -> dict[str, str]:
    """Read the versions in a file of `name==version` lines."""
    lines = (line.split("#")[0].strip() for line in constraints.read_text(encoding="utf-8").splitlines())
    return dict(line.split("==") for line in lines if "==" in line)


def needed_versions() -> dict[str, str]:
    """Read what this package says that it needs, such as {"torch": ">=2.11"}."""
    from packaging.requirements import Requirement

    needed = map(Requirement, importlib.metadata.requires("manyrank") or ())
    return {entry.name: str(entry.specifier) for entry in needed if not entry.marker}


def libraries(software: Software, *, tested: dict[str, str], needed: dict[str, str]) -> Check:
    """Compare versions with those that the tests ran with, and with what the package asks for."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    name, versions = "libraries", {"python": software.python, **software.libraries}
    seen = ", ".join(f"{library} {version or 'missing'}" for library, version in versions.items())
    wrong = [
        f"{library}{needed.get(library, '')}"
        for library, version in software.libraries.items()
        if not version or not SpecifierSet(needed.get(library, "")).contains(version, prereleases=True)
    ]
    if wrong:
        return failed(name, seen, f"pip install {' '.join(map(repr, wrong))}", **versions)
    other = [
        f"{library}=={tested[library]}"
        for library, version in software.libraries.items()
        if library in tested and Version(version).base_version != Version(tested[library]).base_version
    ]
    if other:
        fix = f"if something is odd, install what was tested: pip install {' '.join(other)}"
        return warning(name, f"{seen}; not as tested", fix, **versions)
    if not software.python.startswith(f"{TESTED_PYTHON}."):
        return warning(
            name,
            f"{seen}; tested with Python {TESTED_PYTHON}",
            f"if something is odd, use Python {TESTED_PYTHON}",
            **versions,
        )
    return ok(name, f"{seen}: as tested", **versions)


def extras() -> Check:
    """List the optional packages, for GRPO, benchmarks and kernels of attention."""
    versions: dict[str, str | None] = dict.fromkeys(EXTRAS)
    for name in EXTRAS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return ok("extras", ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items()), **versions)


# GPUs


def gpus(hardware: Hardware, cuda: str | None) -> list[Check]:
    """Check the driver and the kinds of GPUs; the ranks look at kernels and at the memory of theirs.

    Args:
        cuda: the CUDA version that torch was built for; None: for the CPU.
    """
    version, problem = _driver_version()
    if hardware.gpus:
        return [_driver(version or f"version not known ({problem})", cuda, hardware), _kinds(hardware.gpus)]
    if version:
        return [ok("driver", f"{version}; CUDA gives this process no GPU: the CPU trains", driver=version)]
    return [_without_driver(problem)]


def _driver_version() -> tuple[str | None, str]:
    """The driver's version by NVML; None and the reason where NVML does not tell, as on Jetson or with a broken driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion(), ""
    except pynvml.NVMLError as error:
        return None, str(error)
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _without_driver(problem: str) -> Check:
    kinds = [(_text(device / "vendor"), _text(device / "class") or "") for device in PCI.glob("*")]
    devices = sum(vendor == "0x10de" and kind.startswith("0x03") for vendor, kind in kinds)  # NVIDIA; display and 3D
    if not devices:
        return ok("driver", f"no GPU here ({problem}): the CPU trains", devices=0)
    what = f"{counted(devices, 'NVIDIA device')} here, and no driver answers: {problem}"
    fix = "install the driver, restart after it was replaced, or start the container with --gpus all"
    return warning("driver", what, fix, devices=devices)


def _driver(version: str, cuda: str | None, hardware: Hardware) -> Check:
    """Compare the driver's version of CUDA with torch's."""
    own, build, fix = ".".join(map(str, hardware.cuda or ())), fitting_build(hardware), torch_fix(hardware)
    seen = f"{version}, CUDA {own}, for which torch's build is {build or 'none'}"
    figures = {"driver": version, "cuda": own, "cuda_of_torch": cuda, "build": build}
    if cuda is None:
        return failed("driver", f"{seen}; torch is built for the CPU", fix, **figures)
    if hardware.cuda and hardware.cuda[0] < int(cuda.split(".")[0]):
        return failed("driver", f"{seen}; it is too old for this torch, built for CUDA {cuda}", fix, **figures)
    return ok("driver", f"{seen}; this torch is built for CUDA {cuda}", **figures)


def _kinds(visible: Sequence[Gpu]) -> Check:
    kinds = Counter(
        f"{gpu.name}, {gib(gpu.memory)}, compute {'.'.join(map(str, gpu.compute_capability))}" for gpu in visible
    )
    seen = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
    if len(kinds) > 1:
        fix = "the slowest sets the pace: choose alike ones by CUDA_VISIBLE_DEVICES"
        return warning("GPUs", seen, fix, kinds=dict(kinds))  # of a Counter asdict makes one that counts its items
    return ok("GPUs", seen, kinds=dict(kinds))


# Memory and disks


@dataclass(frozen=True)
class Space:
    size: int
    free: int


def host_memory() -> Space:
    """Look at what this process and its children can have, of the machine or of the container."""
    import psutil

    memory = psutil.virtual_memory()
    size, free = memory.total, memory.available
    for limit, used in MEMORY_LIMITS:
        most, now = _text(Path(limit)), _text(Path(used))
        if most and now and most.isdecimal() and int(most) < size:
            size, free = int(most), min(free, int(most) - int(now))
    return Space(size, free)


def memory(space: Space, *, processes: int, weights: int, gpus: int) -> Check:
    """Compare free host memory with a rough need: the libraries, and the weights of each process that trains on the CPU."""
    need = processes * PROCESS_BYTES + weights * (1 if gpus else processes)
    seen = f"{gib(space.free)} of {gib(space.size)} free; about {gib(need)} needed for {counted(processes, 'process')}"
    figures = {"size": space.size, "free": space.free, "need": need}
    if space.free < need:
        return warning("host memory", seen, "end what uses it, or start fewer processes", **figures)
    return ok("host memory", seen, **figures)


def space_at(folder: Path) -> Space | None:
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(folder)
        return Space(usage.total, usage.free)
    return None


def shared_memory(space: Space | None, *, processes: int) -> Check:
    """Check /dev/shm, through which NCCL sends between the GPUs of one machine."""
    name, need = "shared memory", processes * SHARED_BYTES
    fix = "give the container more: docker run --ipc=host, or --shm-size=8g"
    if space is None:
        return warning(name, "/dev/shm is not there", fix)
    figures = {"size": space.size, "free": space.free}
    seen = f"{gib(space.free)} of {gib(space.size)} free in /dev/shm; NCCL needs at most {gib(need)}"
    return warning(name, seen, fix, **figures) if space.free < need else ok(name, seen, **figures)


def disk(name: str, folder: Path, space: Space | None, fix: str, *, need: int | None, least: int = 0) -> Check:
    """Check free space.

    Args:
        need: about what will be written; None: not known.
        least: without so much nothing works.
    """
    if space is None:
        return warning(name, f"the space at {folder} is not known", "see that it is there")
    seen = f"{gib(space.free)} free at {folder}; {'what it needs is not known' if need is None else f'needs about {gib(need)}'}"
    figures = {"free": space.free, "need": need}
    if space.free < least:
        return failed(name, f"{seen}, and at least {gib(least)}", fix, **figures)
    if space.free < (SPARE_BYTES if need is None else need):
        return warning(name, seen, fix, **figures)
    return ok(name, seen, **figures)


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


# Compiler


def compiler(context: RunContext) -> Check:
    """Check what DeepSpeed needs for what it compiles at its first use, and remove locks that killed compilers left.

    torch's FileBaton waits without end for such a lock.
    """
    removed = compile_locks.remove_stale()
    missing = [tool for tool in (os.environ.get("CXX", "g++"), "ninja") if shutil.which(tool) is None]
    needed = context.files.kind == EngineKind.DEEPSPEED and (not context.gpus or context.files.offloads_optimizer)
    seen = "; ".join([f"missing: {', '.join(missing)}" if missing else "g++ and ninja are here", *removed])
    if missing and needed:
        fix = "apt-get install g++, and pip install ninja; or choose another strategy"
        return failed("compiler", f"{seen}; {context.strategy} compiles at its first use", fix)
    return ok("compiler", seen if needed else f"{seen}; not needed by {context.strategy}")


# Network


def network(endpoint: str) -> Check:
    """Check the way to HOST:PORT of machine 0."""
    device = _device_to(endpoint)
    ports = sum("ACTIVE" in (_text(state) or "") for state in INFINIBAND.glob("*/ports/*/state"))
    if device is None and not ports:
        return warning("network", f"no way to {endpoint}", "see that --rdzv_endpoint is right and can be reached")
    seen = f"{device or 'no device'} to {endpoint}, {counted(ports, 'active InfiniBand port')}"
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if ports and limit != resource.RLIM_INFINITY:
        what = f"{seen}; a process may lock only {gib(limit)}, and NCCL locks its buffers"
        return warning("network", what, "ulimit -l unlimited, or docker run --ulimit memlock=-1")
    return ok("network", seen, device=device, infiniband=ports)


def _device_to(endpoint: str) -> str | None:
    """Find the device whose address is used to reach HOST:PORT. Nothing is sent."""
    import psutil

    host, _, port = endpoint.rpartition(":")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        with contextlib.closing(socket.socket(family, kind, protocol)) as probing:
            probing.connect(address)
            own = probing.getsockname()[0]
    except OSError:
        return None
    devices = psutil.net_if_addrs().items()
    return next((name for name, addresses in devices if own in (entry.address for entry in addresses)), None)


def _text(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except OSError:
        return None
