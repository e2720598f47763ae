"""What a machine has, by a stand-in for the CUDA driver, and where a process stands among the others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cuda_drivers
import pytest

from manyrank.topology import cuda_driver, gpus, ranks
from manyrank.topology.gpus import Gpu, Hardware, find_kind, planned_hardware
from manyrank.topology.ranks import Topology

A100 = Gpu("A100", 80 << 30, (8, 0))
V100 = Gpu("V100", 32 << 30, (7, 0))
PROBE = """
import dataclasses, json, pathlib, sys
from manyrank.errors import UserError
from manyrank.topology import cuda_driver, gpus
gpus.DEVICES, cuda_driver.SECONDS = pathlib.Path(sys.argv[1]), 1
gpus.probe_host()
assert not any(name in sys.modules for name in ("torch", "pynvml"))
try:
    print(json.dumps([dataclasses.astuple(gpu) for gpu in gpus.probe().gpus]))
except UserError as error:
    sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return cuda_drivers.build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def probe(library, tmp_path):
    """Look at a machine in a new process: its GPUs, or the error.

    Args:
        files: of its GPUs in /dev.
        driver: whether the driver's library is there.
    """

    def look(*devices: Gpu, files: tuple[str, ...] = (), driver: bool = True, **env: str) -> list[Gpu] | str:
        for name in files:
            (tmp_path / name).touch()
        found = [(gpu.name, gpu.memory, gpu.compute_capability) for gpu in devices]
        env = cuda_drivers.environment(library if driver else None, *found, **env)
        argv = [sys.executable, "-c", PROBE, str(tmp_path)]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
        assert "Traceback" not in done.stderr, done.stderr
        if done.returncode:
            return done.stderr
        return [Gpu(name, memory, tuple(capability)) for name, memory, capability, _ in json.loads(done.stdout)]

    return look


def test_this_machine():
    found = gpus.probe()
    assert found.cpu_cores == len(os.sched_getaffinity(0))
    assert found.memory == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert all(gpu.memory > 1 << 30 and gpu.name for gpu in found.gpus)


def test_gpus_stand_in_the_order_of_the_driver(probe):
    """It knows which are visible, and in which order; torch counts them so."""
    assert probe(V100, A100, files=("nvidia0", "nvidia1"), CUDA_VISIBLE_DEVICES="GPU-3c,GPU-1a") == [V100, A100]


@pytest.mark.parametrize(
    "gpu",
    [
        Gpu("NVIDIA GB10", 119 << 30, (12, 1)),  # shares the machine's memory
        Gpu("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4864 << 20, (8, 0)),
        Gpu("Orin", 61 << 30, (8, 7)),  # there is no NVML
    ],
)
def test_memory_is_what_cuda_offers(probe, gpu):
    assert probe(gpu) == [gpu]


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_hidden_gpus(probe, hidden):
    """The driver is not asked, so that this is the way to a CPU also where it is broken."""
    assert probe(A100, files=("nvidia0",), CUDA_VISIBLE_DEVICES=hidden, FAKE_CUINIT="803") == []


@pytest.mark.parametrize("driver", [True, False])
def test_a_machine_without_gpus(probe, driver):
    assert probe(driver=driver) == []
    assert probe(A100, driver=driver, FAKE_CUINIT="999") == []  # a container's library, and no device


@pytest.mark.parametrize(
    ("env", "problem"),
    [
        ({"FAKE_CUINIT": "803"}, "unsupported display driver / cuda driver combination (803)"),
        ({"FAKE_CUINIT": "999"}, "cuInit: unknown error (999)"),
        ({"FAKE_GPUS": ""}, "cuInit: unknown error (100)"),
        ({"FAKE_GPUS": "A100,0,8,0"}, "cuDeviceTotalMem_v2: unknown error (101)"),  # was lost meanwhile
        ({"FAKE_CRASH": "1"}, "ended a process with -6"),
        ({"FAKE_HANG": "1"}, "the driver has not answered for "),
        ({"CUDA_VISIBLE_DEVICES": "7", "FAKE_CUINIT": "100"}, "CUDA_VISIBLE_DEVICES=7"),
        ({"driver": False}, "libcuda.so.1: cannot open shared object file"),  # a container without `compute`
    ],
)
def test_gpus_that_cuda_cannot_use(probe, env, problem):
    """A run on the CPU in their place would take weeks, and nobody asked for it."""
    error = probe(A100, files=("nvidia0", "nvidiactl"), **env)
    assert error.startswith("error: CUDA cannot use the GPUs") and problem in error and "fix: " in error


@pytest.mark.parametrize(
    ("version", "capability", "build"),
    [("13000", (9, 0), "cu130"), ("12080", (9, 0), "cu126"), ("13010", (7, 0), "cu126"), ("12080", (10, 0), "")],
)
def test_the_build_of_torch_for_a_machine(library, version, capability, build):
    """`make setup TORCH_INDEX=auto` asks before anything is installed."""
    env = cuda_drivers.environment(library, ("GPU", 80 << 30, capability), FAKE_CUDA=version)
    done = subprocess.run([sys.executable, cuda_driver.__file__], env=env, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == (build, 0 if build else 1)
    assert build or "update the driver" in done.stderr


def test_the_version_of_the_driver(library):
    program = "from manyrank.topology import gpus; print(gpus.probe().cuda)"
    env = cuda_drivers.environment(library, ("GPU", 80 << 30, (9, 0)), FAKE_CUDA="12080")
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.stdout == "(12, 8)\n", done.stderr


def test_gpus_of_others(tmp_path, monkeypatch):
    """Those that a job's cgroup keeps from it are none of its own."""
    file = tmp_path / "nvidia0"
    file.touch()
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    assert not gpus._is_allowed(file)
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    assert gpus._is_allowed(file)  # it fell off the bus


@pytest.mark.parametrize(
    ("name", "mib", "kind"),
    [  # total_memory as torch prints it
        ("NVIDIA H100 80GB HBM3", 81089, "H100-80GB"),
        ("NVIDIA H100 PCIe", 81081, "H100-PCIe"),
        ("NVIDIA A100-SXM4-40GB", 40326, "A100-40GB"),
        ("NVIDIA A100-SXM4-40GB MIG 7g.40gb", 40192, "A100-40GB"),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 20096, None),
        ("Tesla V100-SXM2-16GB", 16144, "V100-16GB"),
        ("Tesla T4", 14910, "T4"),
        ("NVIDIA GeForce RTX 4090", 24081, "RTX4090"),
        ("NVIDIA GeForce RTX 3060", 12044, "RTX3060"),
        ("NVIDIA B200", 182642, "B200"),
    ],
)
def test_kinds_by_the_memory_that_cuda_offers(name, mib, kind):
    found = find_kind(name, mib << 20)
    assert (found.name if found else None) == kind


@pytest.mark.parametrize(
    "devices, cpu_bf16, expected",
    [((A100,), False, True), ((V100,), True, False), ((A100, V100), True, False), ((), True, True), ((), False, False)],
)
def test_bf16(devices, cpu_bf16, expected):
    assert Hardware(devices, cpu_cores=4, cpu_bf16=cpu_bf16).has_bf16 is expected


@pytest.mark.parametrize(
    "name, expected",
    [("H100-80GB", True), ("L4", True), ("RTX4090", True), ("B200", True), ("A100-80GB", False), ("T4", False)],
)
def test_float8(name, expected):
    (gpu,) = planned_hardware(1, find_kind(name)).gpus
    assert gpu.has_float8 is expected


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
