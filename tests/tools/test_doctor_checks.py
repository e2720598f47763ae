"""The doctor's checks of one machine, of a recipe and of what ranks have measured. Real examinations: test_doctor.py."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from planned import planned_context

from manyrank.config.resolve import Setting, resolve
from manyrank.models.catalog import read
from manyrank.plan.command import read_model
from manyrank.plan.planner import make_plan
from manyrank.project_files import asset
from manyrank.rules.context import RunContext
from manyrank.runs.versions import Software, software
from manyrank.tools.doctor import machine, ranks, recipe
from manyrank.tools.doctor.checks import Check, State
from manyrank.tools.doctor.launch import Ended, blame
from manyrank.tools.doctor.machine import Space
from manyrank.topology.gpus import Gpu, Hardware, find_kind
from manyrank.topology.strategies import STRATEGIES

GIB = 1 << 30


def config(recipe: str = "verify", **values):
    return resolve(recipe, [Setting(key, value, "test") for key, value in values.items()]).config


def situation(strategy: str = "single", nproc: int = 1, **values) -> RunContext:
    resolved = resolve("verify", [Setting(key, value, "test") for key, value in values.items()])
    return RunContext(resolved, STRATEGIES[strategy], nproc, nproc, Hardware((), 2, False), output_dir=Path("output"))


# Software


SOFTWARE = Software("3.11.7", {"torch": "2.13.0+cpu", "peft": "0.21.2"}, None)
TESTED = {"torch": "2.13.0", "peft": "0.21.2"}


@pytest.mark.parametrize(
    ("found", "tested", "needed", "state", "fix"),
    [
        (SOFTWARE, TESTED, {"torch": ">=2.11"}, State.OK, ""),
        (SOFTWARE, {**TESTED, "peft": "0.22.0"}, {}, State.WARNING, "peft==0.22.0"),
        (SOFTWARE, TESTED, {"torch": ">=2.14"}, State.FAILED, "pip install 'torch>=2.14'"),
        (replace(SOFTWARE, libraries={"torch": None}), TESTED, {}, State.FAILED, "pip install 'torch'"),
        (replace(SOFTWARE, python="3.13.1"), TESTED, {}, State.WARNING, "if something is odd"),
    ],
)
def test_libraries(found, tested, needed, state, fix):
    check = machine.libraries(found, tested=tested, needed=needed)
    assert check.state == state and fix in check.fix
    assert check.figures["python"] == found.python


def test_the_software_of_this_process():
    """The real versions are those of the constraints, and CUDA is read without torch."""
    import torch

    here = software()
    assert here.cuda == torch.version.cuda and here.libraries["torch"].split("+")[0] == torch.__version__.split("+")[0]
    tested = machine.tested_versions(asset("constraints.txt"))
    needed = machine.needed_versions()
    assert "torch" in needed and machine.libraries(here, tested=tested, needed=needed).state == State.OK
    assert "peft==0.0.1" in machine.libraries(here, tested=tested | {"peft": "0.0.1"}, needed=needed).fix
    assert machine.extras().figures["trl"] == tested["trl"]


# GPUs


class Nvml:
    """NVML's Python module, with a driver or with the reason why none answers."""

    class NVMLError(Exception):
        pass

    def __init__(self, driver: str | None, problem: str = "") -> None:
        self.driver, self.problem = driver, problem

    def nvmlInit(self):
        if not self.driver:
            raise self.NVMLError(self.problem)

    def nvmlShutdown(self):
        if not self.driver:
            raise self.NVMLError("Uninitialized")

    def nvmlSystemGetDriverVersion(self):
        if self.problem:
            raise self.NVMLError(self.problem)
        return self.driver


H100, V100 = Gpu("H100", 80 * GIB, (9, 0)), Gpu("V100", 32 * GIB, (7, 0))
B200 = Gpu("B200", 178 * GIB, (10, 0))


def with_gpus(*found: Gpu, cuda: tuple[int, int] | None = (13, 0)) -> Hardware:
    return Hardware(found, 2, False, cuda=cuda)


@pytest.mark.parametrize(
    ("nvml", "found", "cuda", "state", "said"),
    [
        (Nvml(None, "no library"), with_gpus(cuda=None), None, State.OK, "no GPU here (no library)"),
        (Nvml("580.65.06"), with_gpus(cuda=None), "13.0", State.OK, "CUDA gives this process no GPU"),
        (Nvml(None, "Not Supported"), with_gpus(H100), "13.0", State.OK, "version not known (Not Supported)"),
        (Nvml("580.65.06", "No Permission"), with_gpus(H100), "13.0", State.OK, "version not known (No Permission)"),
        (
            Nvml("580.65.06"),
            with_gpus(H100),
            "13.0",
            State.OK,
            "580.65.06, CUDA 13.0, for which torch's build is cu130",
        ),
        (Nvml("610.10"), with_gpus(B200, cuda=(14, 1)), "13.0", State.OK, "torch's build is cu130"),
        (Nvml("550.54"), with_gpus(H100, cuda=(12, 4)), "12.6", State.OK, "torch's build is cu126"),
    ],
)
def test_driver(monkeypatch, tmp_path, nvml, found, cuda, state, said):
    monkeypatch.setattr(machine, "PCI", tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    check = machine.gpus(found, cuda)[0]
    assert check.name == "driver" and check.state == state and said in check.seen and check.fix == ""


@pytest.mark.parametrize(
    ("driver", "own", "gpu", "cuda", "fix"),
    [
        ("580.65", (13, 0), H100, None, "make setup TORCH_INDEX=cu130"),
        ("580.65", (13, 0), V100, None, "make setup TORCH_INDEX=cu126"),
        ("570.86", (12, 8), H100, "13.0", "make setup TORCH_INDEX=cu126"),
        ("550.54", (12, 4), H100, "13.0", "make setup TORCH_INDEX=cu126"),
        ("535.54", (12, 2), V100, "13.0", "make setup TORCH_INDEX=cu126"),
        ("570.86", (12, 8), B200, "13.0", "install a driver of 580 or newer, for CUDA 13"),
        ("470.82", (11, 4), H100, "13.0", "install a driver of 580 or newer, for CUDA 13"),
    ],
)
def test_a_torch_that_does_not_fit_the_driver(monkeypatch, driver, own, gpu, cuda, fix):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(driver))
    check = machine.gpus(with_gpus(gpu, cuda=own), cuda)[0]
    assert (check.name, check.state, check.fix) == ("driver", State.FAILED, fix)
    assert check.seen.startswith(f"{driver}, CUDA {own[0]}.{own[1]}, ")


def test_devices_without_a_driver(monkeypatch, tmp_path):
    (tmp_path / "0000:01").mkdir()
    (tmp_path / "0000:01" / "vendor").write_text("0x10de\n")
    (tmp_path / "0000:01" / "class").write_text("0x030200\n")
    monkeypatch.setattr(machine, "PCI", tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(None, "Driver/library version mismatch"))
    (check,) = machine.gpus(with_gpus(), "13.0")
    assert check.state == State.WARNING and "1 NVIDIA device here" in check.seen and "version mismatch" in check.seen


def test_kinds_of_gpus(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml("580.65.06"))
    check = machine.gpus(with_gpus(H100, H100), "13.0")[1]
    assert (check.state, check.seen) == (State.OK, "2 x H100, 80.0 GiB, compute 9.0")
    assert machine.gpus(with_gpus(H100, V100), "12.8")[1].state == State.WARNING
    (kind,) = json.loads(json.dumps(asdict(check)))["figures"]["kinds"].items()  # as --json prints it
    assert kind == (check.seen.removeprefix("2 x "), 2)


def test_a_gpu_that_somebody_else_uses(monkeypatch):
    import torch

    facts = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    for free, state in ((79, State.OK), (20, State.WARNING)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free * GIB, 80 * GIB))
        check = ranks._gpu_memory(torch.device("cuda", 3))
        assert (check.name, check.state) == ("GPU 3", state)
        assert check.seen == f"{free}.0 GiB of 80.0 GiB free; in CUDA's order, at 00000000:C1:00.0"
        assert ("nvidia-smi -i 00000000:C1:00.0" in check.fix) == (state == State.WARNING)


# Memory and disks


def test_host_memory():
    check = machine.memory(Space(64 * GIB, 10 * GIB), processes=2, weights=2 * GIB, gpus=0)
    assert (check.state, check.figures["need"]) == (State.OK, 8 * GIB)
    assert machine.memory(Space(64 * GIB, 7 * GIB), processes=2, weights=2 * GIB, gpus=0).state == State.WARNING
    assert machine.memory(Space(64 * GIB, 7 * GIB), processes=2, weights=2 * GIB, gpus=2).state == State.OK


def test_a_container_has_less_memory_than_its_machine(tmp_path, monkeypatch):
    whole = machine.host_memory()
    (tmp_path / "max").write_text(f"{256 << 20}\n")
    (tmp_path / "now").write_text(f"{56 << 20}\n")
    monkeypatch.setattr(machine, "MEMORY_LIMITS", ((str(tmp_path / "max"), str(tmp_path / "now")),))
    assert machine.host_memory() == Space(256 << 20, 200 << 20)
    (tmp_path / "max").write_text("max\n")
    assert machine.host_memory().size == whole.size


@pytest.mark.parametrize(
    ("found", "processes", "state", "said"),
    [
        (Space(64 << 20, 64 << 20), 2, State.WARNING, "NCCL needs at most 0.5 GiB"),
        (Space(8 * GIB, 8 * GIB), 8, State.OK, "NCCL needs at most 2.0 GiB"),
        (None, 2, State.WARNING, "is not there"),
    ],
)
def test_shared_memory(found, processes, state, said):
    check = machine.shared_memory(found, processes=processes)
    assert check.state == state and said in check.seen


@pytest.mark.parametrize(
    ("free", "need", "state"),
    [(20, 10, State.OK), (8, 10, State.WARNING), (2, 10, State.FAILED), (20, None, State.OK), (1, None, State.WARNING)],
)
def test_disk(free, need, state):
    need, least = need and need * GIB, 3 * GIB if need else 0
    check = machine.disk("disk", Path("/run"), Space(100 * GIB, free * GIB), "free some", need=need, least=least)
    assert (check.state, check.figures) == (state, {"free": free * GIB, "need": need})


def test_the_disk_that_a_run_needs(whole_run, embedded_model):
    """The estimate is what the embedded model's checkpoint really has in tensors."""
    from safetensors import safe_open

    saved = 0
    for file in (whole_run.folder / "checkpoint-3").glob("[ao]*.safetensors"):
        with safe_open(file, "pt") as opened:
            saved += sum(opened.get_tensor(name).nbytes for name in opened.keys() if not name.endswith("|step"))
    shape = read_model("embedded")
    assert recipe.checkpoint_bytes(situation(), shape) == saved
    assert recipe.run_bytes(situation(save_steps=10, save_total_limit=2), saved) == 3 * saved + saved // 3
    assert recipe.run_bytes(situation(save_steps=None), saved) == saved // 3
    assert recipe.checkpoint_bytes(situation(method="full"), shape) == 12 * shape.parameters


# Compiler and network


def test_the_compiler_that_deepspeed_needs(tmp_path, monkeypatch):
    """And a lock that a killed compiler has left is removed: torch would wait for it without end."""
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    check = machine.compiler(situation("zero3", 2))
    assert check.state == State.OK and f"removed {lock}" in check.seen and not lock.exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    check = machine.compiler(situation("zero3", 2))
    assert check.state == State.FAILED and "missing: g++, ninja" in check.seen and check.fix
    assert machine.compiler(situation("ddp", 2)).state == State.OK


def test_network(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "INFINIBAND", tmp_path)
    assert machine.network("no-such-host.invalid:29500").state == State.WARNING
    check = machine.network("localhost:29500")
    assert (check.state, check.figures) == (State.OK, {"device": "lo", "infiniband": 0})
    for number, state in enumerate(("4: ACTIVE", "1: DOWN", "4: ACTIVE")):
        port = tmp_path / f"mlx5_{number}" / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state)
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (64 << 10, 64 << 10))
    check = machine.network("localhost:29500")
    assert check.state == State.WARNING and "2 active InfiniBand ports" in check.seen and "may lock only" in check.seen


# The recipe and the hub


def test_a_recipe_is_checked_as_train_checks_it(tmp_path):
    """What is on the hub is not downloaded for it."""
    assert [check.state for check in recipe.rules_and_files(situation())] == [State.OK]
    wrong = situation(data_path=[str(tmp_path / "none.jsonl"), "some/name"], learning_rate=100.0)
    found = recipe.rules_and_files(wrong)
    assert [check.state for check in found] == [State.FAILED, State.WARNING] and all(check.fix for check in found)
    assert "none.jsonl" in found[0].seen and "learning_rate" in found[1].seen


@pytest.mark.parametrize(("gpu", "state"), [("H100-80GB", "ok"), ("RTX3060", "failed")])
def test_the_plan_of_a_recipe_is_a_check(gpu, state):
    kind = find_kind(gpu)
    model = read("llama-3.1-405b" if state == "failed" else "qwen2.5-0.5b")
    found = recipe.planned(make_plan(planned_context(config(method="full"), gpu=kind), model))
    assert found.state == state and "planned:" in found.seen and bool(found.fix) == (state != "ok")
    assert recipe.planned(None).state == "ok"


NAMES = [("org/model", "model"), ("org/rows", "dataset")]


def test_what_the_hub_is_needed_for():
    assert recipe.hub_names(situation(model_name_or_path="org/model", data_path="org/rows")) == NAMES
    assert recipe.hub_names(situation()) == []
    assert recipe.hub_names(situation(model_name_or_path="/not/here")) == []


@pytest.mark.parametrize(
    ("answers", "state", "said"),
    [
        (["", ""], State.OK, "org/model, org/rows"),
        (["gated", ""], State.FAILED, "org/model: gated"),
        (["", None], State.WARNING, "it does not answer; needed from it: org/model, org/rows"),
    ],
)
def test_hub(monkeypatch, answers, state, said):
    monkeypatch.setattr(recipe, "_ask_hub", lambda name, kind: dict(zip(NAMES, answers))[name, kind])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    check = recipe.hub(NAMES)
    assert check.state == state and said in check.seen
    assert bool(check.fix) == (state != State.OK)
    assert check.figures["reached"] == (state != State.WARNING)


def test_a_hub_that_cannot_be_reached(tmp_path):
    """In a process of its own, since the hub's client reads its address once: nobody listens there."""
    program = f"from manyrank.tools.doctor import recipe; print(recipe.hub({NAMES}).seen)"
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout == "it does not answer; needed from it: org/model, org/rows\n", done.stderr


# The ranks


def exchange(bus: float, wrong: int = 0) -> list[dict]:
    large = {"bytes": 256 << 20, "ranks": 8, "seconds": 1e-3, "bus_bandwidth": bus}
    return [{**large, "bytes": 4 << 10, "seconds": 3e-5, "wrong": 0}, {**large, "wrong": wrong}]


def test_all_reduce():
    good = ranks.all_reduce(exchange(300e9), link=450e9)
    assert good.state == State.OK and "67% of the GPUs' link, 450 GB/s" in good.seen
    assert ranks.all_reduce(exchange(20e9), link=450e9).state == State.WARNING
    assert ranks.all_reduce(exchange(20e9), link=None).state == State.OK
    wrong = ranks.all_reduce(exchange(300e9, wrong=2), link=450e9)
    assert wrong.state == State.FAILED and "wrong on 2 ranks" in wrong.seen


def test_machines_that_differ(tmp_path):
    rows = tmp_path / "rows.jsonl"
    shutil.copy(asset("data", "sample.jsonl"), rows)
    one = ranks._facts(config(data_path=[str(rows)]))
    assert ranks.same([("a", one), ("b", dict(one))]).state == State.OK
    check = ranks.same([("a", one), ("b", one | {"torch": "2.12.0"})])
    assert check.state == State.FAILED and check.seen.endswith("on a and 2.12.0 on b") and check.fix
    rows.write_text(rows.read_text().replace("mean", "MEAN", 1))
    other = ranks._facts(config(data_path=[str(rows)], learning_rate=0.5))
    assert {name for name in one if one[name] != other[name]} == {"data 1", "learning_rate"}


FACTS = {
    "wrapper": "DDP",
    "distributed_type": "MULTI_GPU",
    "world_size": 2,
    "precision": "no",
    "trainable_tensors": 56,
}


def test_the_step_and_its_checkpoint():
    assert ranks.step([2.0, 1.5], FACTS, "lora, ddp").state == State.OK
    assert ranks.step([2.0], FACTS, "lora, ddp").state == State.FAILED
    assert ranks.step([2.0, float("nan")], FACTS, "lora, ddp").state == State.FAILED
    assert ranks.save_and_load(1.5, 1.5, 56, FACTS).state == State.OK
    assert "0 of 56 tensors" in ranks.save_and_load(1.5, 1.5, 0, FACTS).seen
    assert "loss 1.6000, and had 1.5000" in ranks.save_and_load(1.5, 1.6, 56, FACTS).seen
    assert ranks.save_and_load(1.5, float("nan"), 56, FACTS).state == State.FAILED


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        (Ended(-9, 1), "rank 1 was killed"),
        (Ended(-11, 1), "rank 1 ended by SIGSEGV"),
        (Ended(1, 0), "rank 0 ended with 1"),
        (Ended(-9), "the launcher was killed"),
        (Ended(None), "the time was over"),
        (Ended(1, apart="timed out"), "the machines did not meet: timed out"),
    ],
)
def test_how_ranks_end(ended, said):
    assert str(ended) == said


def test_a_line_of_the_report():
    check = Check("disk", State.WARNING, "full", "free some")
    assert str(check) == "warning  disk             full\n         fix: free some"


def test_a_rank_that_was_killed_is_to_blame_for_others_that_lose_it():
    ends = {0: (1, 1700000000), 1: (-9, 1700000001), 2: (1, 1699999999)}
    assert min(ends, key=lambda rank: blame(*ends[rank])) == 1
    assert min([0, 2], key=lambda rank: blame(*ends[rank])) == 2
