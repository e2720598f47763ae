"""What the facts of one machine mean: each function makes a `Check` of them. No torch, and nothing is looked up here.

ok        as it should be, or not needed here, and then it says so
warning   the training may suffer, or it cannot be known
failed    the training would not work
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from ...plan.planner import Plan, Verdict
from ...plan.view import summary
from ...rules.rule import Violation
from ...runs.versions import Software
from .probe import GpuState, Graphics, Network, Space
from .recipe import Data, Hub, Wandb

TESTED_PYTHON = "3.11"
# The oldest driver for a torch that was built for CUDA 11.x, 12.x, 13.x (NVIDIA's minor version compatibility).
LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
FREE = 0.9  # of a GPU's memory: less is free when somebody else uses it
PROCESS_BYTES = 2 << 30  # of host memory: torch and the libraries, and what a step needs beside the weights
SHARED_BYTES = 256 << 20  # of /dev/shm for each process: what NCCL's channels between GPUs of one machine take at most
SPARE_BYTES = 2 << 30  # of a disk on which a run or the hub's cache grows by an amount that is not known


class State(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        fix: what to do about it; empty when it is ok.
        figures: what was measured, as numbers and short texts.
        machine: whose it is; empty for what all ranks did together.
    """

    name: str
    state: State
    seen: str
    fix: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    machine: str = ""

    @classmethod
    def read(cls, values: dict[str, Any]) -> Check:
        """What `asdict` made of one, also by way of JSON."""
        return cls(**{**values, "state": State(values["state"])})


def ok(name: str, seen: str, **figures) -> Check:
    return Check(name, State.OK, _one_line(seen), figures=figures)


def warning(name: str, seen: str, fix: str, **figures) -> Check:
    return Check(name, State.WARNING, _one_line(seen), _one_line(fix), figures)


def failed(name: str, seen: str, fix: str, **figures) -> Check:
    return Check(name, State.FAILED, _one_line(seen), _one_line(fix), figures)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def counted(number: int, what: str) -> str:
    """1 rank, 2 ranks."""
    return f"{number} {what}{'' if number == 1 else 'es' if what.endswith('s') else 's'}"


def gib(count: float) -> str:
    """Bytes, in GiB, or in MiB where that would be next to nothing."""
    return f"{count / 2**30:,.1f} GiB" if count >= 0.1 * 2**30 else f"{count / 2**20:,.1f} MiB"


def speed(bytes_a_second: float) -> str:
    return f"{bytes_a_second / 1e9:,.3g} GB/s"


# Software


def libraries(found: Software, *, tested: dict[str, str], needed: dict[str, str]) -> Check:
    """Versions against those that the tests ran with, and against what the package asks for."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    name, versions = "libraries", {"python": found.python, **found.libraries}
    seen = ", ".join(f"{library} {version or 'missing'}" for library, version in versions.items())
    missing = [library for library, version in found.libraries.items() if version is None]
    old = [
        f"{library}{needed[library]}"
        for library, version in found.libraries.items()
        if version and library in needed and not SpecifierSet(needed[library]).contains(version, prereleases=True)
    ]
    if missing or old:
        return failed(name, seen, f"pip install {' '.join(repr(entry) for entry in (*missing, *old))}", **versions)
    other = [
        f"{library}=={tested[library]}"
        for library, version in found.libraries.items()
        if library in tested and Version(version).base_version != Version(tested[library]).base_version
    ]
    if other:
        fix = f"if something is odd, install what was tested: pip install {' '.join(other)}"
        return warning(name, f"{seen}; not as tested", fix, **versions)
    if not found.python.startswith(f"{TESTED_PYTHON}."):
        fix = f"if something is odd, use Python {TESTED_PYTHON}"
        return warning(name, f"{seen}; tested with Python {TESTED_PYTHON}", fix, **versions)
    return ok(name, f"{seen}: as tested", **versions)


# GPUs


def driver(found: Graphics, cuda: str | None) -> Check:
    """The driver against the CUDA version that torch was built for (None: for the CPU)."""
    name = "driver"
    if found.driver is None and not found.devices:
        return ok(name, f"no GPU here ({found.problem}): the CPU trains", devices=0)
    if found.driver is None:
        what = f"{found.devices} NVIDIA devices are here, and no driver answers: {found.problem}"
        fix = "install the driver, restart after it was replaced, or start the container with --gpus all"
        return warning(name, what, fix, devices=found.devices)
    figures = {"driver": found.driver, "cuda_of_torch": cuda}
    if not found.gpus:
        return ok(name, f"{found.driver}; CUDA_VISIBLE_DEVICES hides every GPU: the CPU trains", **figures)
    if cuda is None:
        what = f"{found.driver}, and torch is built for the CPU"
        return failed(name, what, "install a torch that is built for CUDA", **figures)
    least, have = LEAST_DRIVER.get(int(cuda.split(".")[0])), int(found.driver.split(".")[0])
    if least is None:
        what = f"{found.driver}, and torch is built for CUDA {cuda}, whose oldest driver is not known here"
        return warning(name, what, "see NVIDIA's table of CUDA and drivers", **figures)
    if have < least:
        what = f"{found.driver} is too old for CUDA {cuda}, which torch is built for"
        return failed(name, what, f"a driver of {least} or newer, or a torch for an older CUDA", **figures)
    return ok(name, f"{found.driver}, for torch's CUDA {cuda} ({least} or newer)", **figures)


def gpus(found: Sequence[GpuState]) -> list[Check]:
    """One line for all, and one for each GPU that something is wrong with."""
    name = "GPUs"
    if not found:
        return [ok(name, "no GPU here", gpus=0)]
    kinds = sorted({f"{gpu.name}, compute {gpu.compute_capability[0]}.{gpu.compute_capability[1]}" for gpu in found})
    least = min(gpu.free for gpu in found)
    figures = {"gpus": len(found), "kinds": kinds, "memory": [g.memory for g in found], "free": [g.free for g in found]}
    seen = (
        f"{len(found)} x {' and '.join(kinds)}, {gib(found[0].memory)}; at least {gib(least)} free; {found[0].link[0]}"
    )
    if len({(gpu.name, gpu.memory) for gpu in found}) > 1:
        alike = warning(name, seen, "the slowest sets the pace: choose alike ones by CUDA_VISIBLE_DEVICES", **figures)
        return [alike, *_gpu_problems(found)]
    return [ok(name, seen, **figures), *_gpu_problems(found)]


def _gpu_problems(found: Iterable[GpuState]) -> Iterable[Check]:
    for gpu in found:
        name = f"GPU {gpu.index}"
        if gpu.broken_rows:
            fix = "reset the GPU (nvidia-smi --gpu-reset) or restart; have it replaced if that does not help"
            yield failed(name, "rows of its memory are broken and not yet replaced", fix)
        elif gpu.errors:
            what = f"{gpu.errors} uncorrected memory errors since the driver was loaded"
            yield warning(name, what, "reset the GPU; have it replaced if they come back", errors=gpu.errors)
        if gpu.free < FREE * gpu.memory:
            by = f" (processes {', '.join(map(str, gpu.users))})" if gpu.users else ""
            what = f"{gib(gpu.memory - gpu.free)} of its memory are in use{by}"
            yield warning(name, what, "end them, or choose others by CUDA_VISIBLE_DEVICES", free=gpu.free)
        if gpu.slowed:
            fix = "see to the cooling and the power supply"
            yield warning(name, f"its clocks are held down by {' and '.join(gpu.slowed)}", fix)
        if gpu.pcie and gpu.pcie[1] < gpu.pcie[2]:
            what = f"{gpu.pcie[1]} of its {gpu.pcie[2]} PCIe lanes are in use"
            yield warning(name, what, "seat it well, in a slot with as many lanes", lanes=gpu.pcie[1])


# Memory and disks


def host_memory(found: Space, *, processes: int, weights: int | None, gpus: int) -> Check:
    """Free host memory against a rough need: the libraries, and the weights of each process that trains on the CPU.

    Args:
        weights: bytes in memory; None: not known.
    """
    name = "host memory"
    need = processes * PROCESS_BYTES + (weights or 0) * (1 if gpus else processes)
    seen = f"{gib(found.free)} of {gib(found.size)} free; about {gib(need)} needed for {counted(processes, 'process')}"
    seen += "" if weights is not None else " and the weights, whose size is not known"
    figures = {"size": found.size, "free": found.free, "need": need}
    if found.free < need:
        return warning(name, seen, "end what uses it, or start fewer processes", **figures)
    return ok(name, seen, **figures)


def cores(count: int, *, processes: int) -> Check:
    seen = f"{count} for {counted(processes, 'process')}"
    if count < processes:
        return warning("CPU cores", seen, "start fewer processes, or allow them more cores", cores=count)
    return ok("CPU cores", seen, cores=count)


def shared_memory(found: Space | None, *, processes: int, gpus: int) -> Check:
    """/dev/shm, through which NCCL sends between the GPUs of one machine."""
    name, need = "shared memory", processes * SHARED_BYTES
    fix = "give the container more: docker run --ipc=host, or --shm-size=8g"
    if found is None:
        return warning(name, "/dev/shm is not there", fix)
    figures = {"size": found.size, "free": found.free}
    seen = f"{gib(found.free)} of {gib(found.size)} free in /dev/shm"
    if not gpus or processes == 1:
        return ok(name, f"{seen}; not needed by {'one process' if processes == 1 else 'gloo'}", **figures)
    if found.free < need:
        return warning(name, f"{seen}; NCCL may need {gib(need)} for {processes} processes", fix, **figures)
    return ok(name, f"{seen}; NCCL needs at most {gib(need)}", **figures)


def run_disk(folder: Path, found: Space | None, *, need: int | None, one: int = 0) -> Check:
    """Free space where the run's folder is.

    Args:
        need: about what the run will write; None: not known.
        one: what one checkpoint takes.
    """
    name, fix = "disk", "free some, or choose another --output_dir, or lower save_total_limit"
    if found is None:
        return warning(name, f"{folder} does not tell", "see that it is there")
    seen, figures = f"{gib(found.free)} free at {folder}", {"free": found.free, "need": need}
    if need is None:
        state = ok if found.free >= SPARE_BYTES else warning
        rest = {} if state is ok else {"fix": fix}
        return state(name, f"{seen}; what the run needs is not known", **rest, **figures)
    seen += f"; the run needs about {gib(need)}"
    if found.free < one:
        return failed(name, f"{seen}, one checkpoint {gib(one)}", fix, **figures)
    return warning(name, seen, fix, **figures) if found.free < need else ok(name, seen, **figures)


def cache_disk(folder: Path, found: Space | None, answers: Hub) -> Check:
    """Free space where the hub's files go, against what is not there yet."""
    name, fix = "hub cache", "free some, or set HF_HOME to a larger disk"
    if found is None:
        return warning(name, f"{folder} does not tell", "see that it is there")
    missing = [answer for answer in answers.answers if not answer.cached]
    seen, figures = f"{gib(found.free)} free at {folder}", {"free": found.free}
    if not missing:
        return ok(name, f"{seen}; nothing is to come", **figures)
    sizes = [answer.size for answer in missing]
    if None in sizes:
        rest = f"{seen}; the size of {missing[sizes.index(None)].name} is not known"
        return warning(name, rest, "see that there is room for it", **figures)
    rest = f"{seen}; {gib(sum(sizes))} are to come"
    return (
        failed(name, rest, fix, **figures, need=sum(sizes))
        if found.free < sum(sizes)
        else ok(name, rest, **figures, need=sum(sizes))
    )


# Network


def network(found: Network | None) -> Check:
    """The device to the other machines; None: there is one machine."""
    name = "network"
    if found is None:
        return ok(name, "one machine: not needed")
    figures = {"device": found.name, "speed": found.speed, "infiniband": found.infiniband}
    if found.name is None and not found.infiniband:
        fix = "see that the host of --rdzv_endpoint is right and can be reached"
        return warning(name, "there is no way to the endpoint", fix, **figures)
    seen = f"{found.name}, {speed(found.speed) if found.speed else 'of a speed that it does not tell'}"
    if not found.infiniband:
        return ok(name, f"{seen}; no InfiniBand", **figures)
    seen += f"; {found.infiniband} InfiniBand ports, {speed(found.infiniband_speed or 0)}"
    if found.locked_memory is not None:
        what = f"{seen}; a process may lock only {gib(found.locked_memory)}, and NCCL locks its buffers"
        return warning(name, what, "ulimit -l unlimited, or docker run --ulimit memlock=-1", **figures)
    return ok(name, seen, **figures)


# The recipe


def planned(plan: Plan | None) -> Check:
    """What the recipe needs of a GPU, by the plan."""
    name = "memory plan"
    if plan is None:
        return ok(name, "made for GPUs alone, and for models that are known here")
    seen, needed = summary(plan), plan.chosen.memory.needed
    if plan.chosen.verdict == Verdict.FITS:
        return ok(name, seen, needed=needed)
    fix = "see `manyrank plan` for what fits: fewer tokens, gradient_checkpointing, qlora, more GPUs"
    make = failed if plan.chosen.verdict == Verdict.TOO_BIG else warning
    return make(name, seen, fix, needed=needed)


def recipe(problems: Sequence[Violation]) -> Check:
    """What the table of rules says of it."""
    if not problems:
        return ok("recipe", "no rule is against it")
    make = failed if any(found.rule.severity == "error" for found in problems) else warning
    return make("recipe", "; ".join(found.what for found in problems), "; ".join(found.rule.fix for found in problems))


def data(found: Sequence[Data], answers: Hub) -> list[Check]:
    """A line for each source."""
    return [_data(entry, next((a for a in answers.answers if a.name == entry.path), None)) for entry in found]


def _data(entry: Data, answer) -> Check:
    if entry.problem:
        return failed("data", f"{entry.path}: {entry.problem}", entry.fix or "give a path that every machine can read")
    if not entry.on_hub:
        seen = f"{entry.path}, {entry.format_type}, {entry.size:,} bytes"
        return ok("data", seen, path=entry.path, size=entry.size, digest=entry.digest)
    if answer is not None and answer.problem:
        return failed("data", f"{entry.path}: {answer.problem}", "check the name; for a private one, hf auth login")
    if answer is None or not answer.reached:
        fix = "connect to the hub, or give a file"
        return warning("data", f"{entry.path} is on the hub, which does not answer", fix)
    return ok("data", f"{entry.path} is on the hub; its rows were not read")


def hub_login(found: Hub) -> Check:
    """Whether the hub lets the recipe have what it needs."""
    name = "hub"
    token = "with a token" if found.has_token else "without a token"
    if not found.answers:
        return ok(name, f"not needed: model and data are here ({token})", token=found.has_token)
    figures = {"token": found.has_token, "user": found.user, "offline": found.offline}
    refused = [answer for answer in found.answers if answer.problem]
    if refused:
        what = "; ".join(f"{answer.name}: {answer.problem}" for answer in refused)
        return failed(name, what, "check the name, accept the terms on its page, and run: hf auth login", **figures)
    silent = ", ".join(answer.name for answer in found.answers if not answer.reached)
    if silent:
        why = "HF_HUB_OFFLINE is set" if found.offline else "it does not answer"
        cached = all(answer.cached for answer in found.answers if not answer.reached)
        here = "in the cache" if cached else "needed from it"
        fix = "set HF_HUB_OFFLINE=1 to not wait for it" if cached else "connect, or load it before: hf download"
        return warning(name, f"{why}; {silent}: {here}", fix, **figures)
    who = f"as {found.user}" if found.user else token
    return ok(name, f"answers {who}: {', '.join(answer.name for answer in found.answers)}", **figures)


def wandb_login(found: Wandb | None) -> Check:
    """None: the recipe does not report to it."""
    name = "W&B"
    if found is None:
        return ok(name, "not needed: report_to does not name it")
    figures = {"mode": found.mode, "key": found.key_in}
    if found.mode in ("offline", "disabled", "dryrun"):
        return ok(name, f"no login needed: WANDB_MODE={found.mode}", **figures)
    if found.key_in is None:
        fix = "run: wandb login; or set WANDB_API_KEY, or WANDB_MODE=offline"
        return failed(name, f"there is no key for {found.server}", fix, **figures)
    return ok(name, f"a key for {found.server} is there ({found.key_in}; not tried)", **figures)
