"""Torch's build against the driver and the GPUs."""

import subprocess
import sys

import cuda_drivers
import pytest
import torch
from launches import ROOT

from manyrank.errors import EXIT_USER, UserError
from manyrank.topology import torch_gpus
from manyrank.topology.gpus import Gpu, Hardware
from manyrank.topology.ranks import Topology

PYPI = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # torch 2.13 for CUDA 13.0, without PTX
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
V100, A100, H100 = (
    Gpu(name, 80 << 30, capability) for name, capability in (("V100", (7, 0)), ("A100", (8, 0)), ("H100", (9, 0)))
)


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (PYPI, (7, 0), False),
        (CU126, (7, 0), True),
        (PYPI, (8, 9), True),  # by sm_86
        (PYPI, (8, 7), True),
        (["sm_86"], (8, 0), False),
        (PYPI, (12, 1), True),  # GB10
        (PYPI, (11, 0), False),
        (CU126, (12, 0), False),
        ([*CU126, "compute_90"], (12, 0), True),  # from PTX
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_100f"], (10, 3), True),
        (["compute_90a"], (10, 0), False),
        ([], (9, 0), False),
    ],
)
def test_kernels(built, capability, runs):
    assert torch_gpus.has_kernels(built, capability) is runs


@pytest.fixture
def cuda(monkeypatch):
    """A torch that is built for these architectures; None: for the CPU."""
    chosen = []

    def install(built):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: built is not None)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built or [])
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    return install


def machine(*gpus: Gpu) -> Hardware:
    return Hardware(gpus, 8, False, cuda=(13, 0))


def test_a_rank_takes_its_gpu(cuda):
    chosen = cuda(PYPI)
    device = torch_gpus.use_gpu(machine(H100, A100), Topology(3, 1, 4, 2))
    assert device == torch.device("cuda", 1) and chosen == [device]
    assert torch_gpus.use_gpu(machine(), Topology()) == torch.device("cpu") and chosen == [device]


def test_a_gpu_that_no_rank_uses_does_not_matter(cuda):
    cuda(PYPI)
    assert torch_gpus.use_gpu(machine(H100, V100), Topology()) == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("built", "gpus", "what", "build"),
    [
        (PYPI, (V100,), "torch has no kernels for V100, compute capability 7.0", "cu126"),
        (None, (H100,), "there are GPUs that torch cannot use", "cu130"),
    ],
)
def test_gpus_that_torch_cannot_use(cuda, built, gpus, what, build):
    cuda(built)
    with pytest.raises(UserError, match=what) as raised:
        torch_gpus.use_gpu(machine(*gpus), Topology())
    assert f"make setup TORCH_INDEX={build}" in raised.value.fix


def test_every_rank_of_a_machine_refuses_alike(cuda):
    cuda(PYPI)
    for rank in (0, 1):
        with pytest.raises(UserError, match="no kernels for V100"):
            torch_gpus.use_gpu(machine(H100, V100), Topology(rank, rank, 2, 2))


PROGRAMS = {
    "train": ["-m", "manyrank.train", "verify", "--output_dir=run"],
    "evaluate": ["-m", "manyrank.cli", "evaluate", "embedded", "--data", str(ROOT / "data" / "sample.jsonl")],
    "load": [
        "-c",
        "import manyrank\ntry: manyrank.load_model('embedded')\nexcept manyrank.UserError as e: exit(f'{e}')",
    ],
}


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA")
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_torch_for_the_cpu_beside_gpus(name, tmp_path, embedded_model):
    """Nothing is loaded, and what is wrong takes three lines."""
    env = cuda_drivers.environment(cuda_drivers.build(tmp_path), ("NVIDIA H100", 80 << 30, (9, 0)))
    argv = [sys.executable, *PROGRAMS[name]]
    done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == (1 if name == "load" else EXIT_USER), done.stderr
    first, second, third = done.stderr.splitlines()[-3:]
    assert first == "error: there are GPUs that torch cannot use" and "torch" in second
    assert "make setup TORCH_INDEX=cu130" in third and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
