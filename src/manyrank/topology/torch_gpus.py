"""Do torch's build, the driver and the GPUs fit each other? Torch is imported when a function is called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..errors import UserError
from .cuda_driver import torch_build
from .gpus import Gpu, Hardware
from .ranks import Topology

if TYPE_CHECKING:
    import torch


def use_gpu(machine: Hardware, place: Topology) -> torch.device:
    """Make this rank's GPU torch's current device; without GPUs it is the CPU.

    Raises:
        UserError: torch cannot compute on the GPUs of this machine's ranks, alike on each of them.
    """
    import torch

    if not machine.gpus:
        return torch.device("cpu")
    check_torch(machine, machine.gpus[: place.local_world_size])
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    return device


def check_torch(machine: Hardware, used: Sequence[Gpu]) -> None:
    """Refuse GPUs that torch cannot compute on.

    Raises:
        UserError: torch is built for the CPU or for a CUDA that the driver does not know, or has no kernels for a GPU.
    """
    import torch

    where, fix = f"torch {torch.__version__}", torch_fix(machine)
    if used and not torch.cuda.is_available():
        fix += ", or hide the GPUs: CUDA_VISIBLE_DEVICES=''"
        raise UserError("there are GPUs that torch cannot use", where=where, fix=fix)
    for gpu in used:
        built = torch.cuda.get_arch_list()
        if not has_kernels(built, gpu.compute_capability):
            what = (
                f"torch has no kernels for {gpu.name}, compute capability {'.'.join(map(str, gpu.compute_capability))}"
            )
            raise UserError(what, where=f"{where}, built for {' '.join(built)}", fix=fix)


def has_kernels(built: Iterable[str], capability: tuple[int, int]) -> bool:
    """Return whether a GPU runs one of the architectures that torch was built for, such as sm_90, sm_90a or compute_120.

    Machine code (sm) runs on the same major version from its minor version on, PTX (compute) on all that is newer; with an
    `a` both run on that GPU alone, with an `f` on its family.
    """
    for form, major, minor, limit in re.findall(r"\b(sm|compute)_(\d+)(\d)([af]?)\b", " ".join(built)):
        own = (int(major), int(minor))
        same_major = own <= capability and own[0] == capability[0]
        if (
            own == capability
            or (limit != "a" and same_major)
            or (not limit and form == "compute" and own <= capability)
        ):
            return True
    return False


def fitting_build(machine: Hardware) -> str | None:
    """The build of torch for the driver and the GPUs of a machine; None: there is none."""
    return torch_build(machine.cuda or (), [gpu.compute_capability for gpu in machine.gpus])


def torch_fix(machine: Hardware) -> str:
    """The command that installs torch's build for a machine."""
    build = fitting_build(machine)
    return f"make setup TORCH_INDEX={build}" if build else "install a driver of 580 or newer, for CUDA 13"
