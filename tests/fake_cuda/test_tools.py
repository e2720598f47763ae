"""The doctor's step, save and load, parts without NVML's figures, and CPUs near a GPU, on stand-in GPUs."""

import functools
import json
import os
import sys

import pytest
import torch
import warm
from launches import ROOT, launch

from manyrank.parallel import accelerator
from manyrank.topology import numa, ranks

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp", "zero2", "zero3"])
def test_doctor(strategy, embedded_model, tmp_path):
    nproc = 4 if strategy == "hsdp" else 2
    argv = [sys.executable, "-m", "manyrank.cli", "doctor", "verify", f"--strategy={strategy}", f"--nproc={nproc}"]
    argv += ["--hsdp_shard_size=2"] if strategy == "hsdp" else []
    argv += ["--bf16=true", "--json", "--limit=250", f"--output_dir={tmp_path}"]
    done = warm.run(argv, cwd=ROOT)
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    wrong = {name: check for name, check in checks.items() if check["state"] == "failed"}
    assert done.returncode == 0 and not wrong, f"{wrong}{done.stderr}"
    assert {"GPU 0", "GPU 1", "process group", "all-reduce", "step", "save and load"} <= checks.keys()


def test_nvml_without_memory_figures(embedded_model, tmp_path):
    """A part that shares the machine's memory, such as GB10, has none there; CUDA's own are taken."""
    env = os.environ | {"FAKENVML_WITHOUT_MEMORY": "1"}
    argv = [sys.executable, "-m", "manyrank.cli", "plan", "verify", "--json"]
    planned = warm.run(argv, cwd=ROOT, env=env)
    assert planned.returncode == 0, planned.stderr
    memory_of_cuda = torch.cuda.get_device_properties(0).total_memory
    assert json.loads(planned.stdout)["gpu_memory_bytes"] == memory_of_cuda > 79 * 2**30
    run = launch(tmp_path / "run", "--strategy=single", "--max_steps=1", "--bf16=true", FAKENVML_WITHOUT_MEMORY="1")
    assert run.code == 0, run.stdout + run.stderr
    memory = json.loads((run.folder / "logs" / "memory.json").read_text())
    assert 0 < memory["allocated_bytes"] <= memory["reserved_bytes"] and memory["planned_bytes"]
    argv = [sys.executable, "-m", "manyrank.cli", "doctor", "verify", "--strategy=single", "--json", "--limit=250"]
    examined = warm.run([*argv, f"--output_dir={tmp_path / 'doctor'}"], cwd=ROOT, env=env)
    checks = {check["name"]: check for check in json.loads(examined.stdout)["checks"]}
    assert checks["GPU 0"]["state"] == "ok" and "79.2 GiB" in checks["GPU 0"]["seen"], checks["GPU 0"]


def test_a_rank_runs_near_its_own_gpu(tmp_path, monkeypatch, capsys):
    """On a machine of two NUMA nodes, of one CPU each; the second GPU is at the second."""
    for node, cpu in enumerate(("0", "1")):
        (folder := tmp_path / "devices" / "system" / "node" / f"node{node}").mkdir(parents=True)
        (folder / "cpulist").write_text(cpu)
        gpu = torch.cuda.get_device_properties(node)
        address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
        (folder := tmp_path / "bus" / "pci" / "devices" / address).mkdir(parents=True)
        (folder / "numa_node").write_text(str(node))
    monkeypatch.setattr(numa, "bind", functools.partial(numa.bind, sys=tmp_path, environ={}))
    before = os.sched_getaffinity(0)
    try:
        for rank in (0, 1):
            os.sched_setaffinity(0, {0, 1})
            accelerator._bind(ranks.Topology(rank=rank, local_rank=rank, world_size=2, local_world_size=2))
            assert os.sched_getaffinity(0) == {rank}
    finally:
        os.sched_setaffinity(0, before)
    assert capsys.readouterr().out.count("each process runs on CPUs near its GPU: rank 0 on 1 of 2 CPUs") == 1
