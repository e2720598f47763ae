"""What a machine has, with a stand-in for NVML, and where a process stands among the others."""

import os
import sys
from types import SimpleNamespace

import pytest

from manyrank.topology import gpus, ranks
from manyrank.topology.gpus import Gpu, Hardware
from manyrank.topology.ranks import Topology

A100 = Gpu("A100", 80 << 30, (8, 0))
V100 = Gpu("V100", 32 << 30, (7, 0))


class NVMLError(Exception):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


def nvml(*devices: Gpu, driver: bool = True) -> SimpleNamespace:
    """The part of NVML's Python module that a probe uses; a GPU of 0 bytes tells no figures of its memory."""

    def init():
        if not driver:
            raise NVMLError

    def memory(gpu):
        if not gpu.memory:
            raise NVMLError_NotSupported
        return SimpleNamespace(total=gpu.memory)

    return SimpleNamespace(
        NVMLError=NVMLError,
        NVMLError_NotSupported=NVMLError_NotSupported,
        nvmlInit=init,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(devices),
        nvmlDeviceGetHandleByIndex=lambda index: devices[index],
        nvmlDeviceGetName=lambda gpu: gpu.name,
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetCudaComputeCapability=lambda gpu: list(gpu.compute_capability),
    )


@pytest.fixture
def machine(monkeypatch):
    """Give this machine other GPUs."""

    def install(*devices: Gpu, visible: str | None = None, driver: bool = True):
        monkeypatch.setitem(sys.modules, "pynvml", nvml(*devices, driver=driver))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return gpus.probe().gpus

    return install


def test_this_machine():
    found = gpus.probe()
    assert found.cpu_cores == len(os.sched_getaffinity(0))
    assert all(gpu.memory > 1 << 30 and gpu.name for gpu in found.gpus)


def test_gpus_in_order(machine):
    assert machine(A100, V100) == (A100, V100)


def test_a_gpu_that_shares_the_machine_s_memory(machine):
    """NVML has no figure for it; one without memory would be planned as one whose memory is not known, or fail."""
    (found,) = machine(Gpu("NVIDIA GB10", 0, (12, 1)))
    assert found.memory == gpus.probe().memory == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_no_driver(machine):
    assert machine(A100, driver=False) == ()


@pytest.mark.parametrize(
    "visible, expected",
    [
        ("0,1", (A100, V100)),
        ("1", (V100,)),
        ("1, 0", (V100, A100)),
        ("-1", ()),
        ("", ()),
        ("0,-1,1", (A100,)),
        ("0,7,1", (A100,)),
    ],
)
def test_visible_devices(machine, visible, expected):
    assert machine(A100, V100, visible=visible) == expected


def test_devices_by_uuid_are_counted(machine):
    assert len(machine(A100, A100, A100, visible="GPU-1a2b,GPU-3c4d")) == 2


@pytest.mark.parametrize(
    "devices, cpu_bf16, expected",
    [((A100,), False, True), ((V100,), True, False), ((A100, V100), True, False), ((), True, True), ((), False, False)],
)
def test_bf16(devices, cpu_bf16, expected):
    assert Hardware(devices, cpu_cores=4, cpu_bf16=cpu_bf16).has_bf16 is expected


# Topology


def test_one_process():
    place = ranks.from_environment({})
    assert place == Topology(rank=0, local_rank=0, world_size=1, local_world_size=1)
    assert (place.is_main, place.nnodes) == (True, 1)


def test_a_rank_on_the_second_machine():
    environ = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    place = ranks.from_environment(environ)
    assert place == Topology(rank=5, local_rank=1, world_size=8, local_world_size=4)
    assert (place.is_main, place.nnodes) == (False, 2)


def test_one_machine_where_the_launcher_tells_no_local_world_size():
    assert ranks.from_environment({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}).nnodes == 1
