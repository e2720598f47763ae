"""What the doctor finds on a machine, and what it makes of facts. Its real examinations are in test_doctor.py."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
from planned import planned_context

from manyrank.config.resolve import Entry, resolve
from manyrank.models.catalog import read
from manyrank.plan.planner import make_plan
from manyrank.project_files import asset
from manyrank.rules.rule import Rule, Violation
from manyrank.runs.versions import Software, software
from manyrank.tools.doctor import checks, rank_checks
from manyrank.tools.doctor import probe as doctor_probe
from manyrank.tools.doctor import recipe as doctor_recipe
from manyrank.tools.doctor.checks import Check, State
from manyrank.tools.doctor.launch import Ended, How
from manyrank.tools.doctor.main import lines
from manyrank.tools.doctor.probe import GpuState, Graphics, Network, Space
from manyrank.tools.doctor.recipe import Data, Hub, HubAnswer, Wandb
from manyrank.topology.gpus import find_kind

GIB = 1 << 30
H100 = GpuState(0, "H100", 80 * GIB, 79 * GIB, (9, 0), nvlinks=18, nvlink_speed=450e9, pcie=(5, 16, 16))
GPUS = (H100, replace(H100, index=1))


def config(recipe: str = "verify", **values):
    return resolve(recipe, [Entry(key, value, "test") for key, value in values.items()]).config


# Software


SOFTWARE = Software("3.11.7", {"torch": "2.13.0+cpu", "peft": "0.21.2"}, None)
TESTED = {"torch": "2.13.0", "peft": "0.21.2"}


@pytest.mark.parametrize(
    ("found", "tested", "needed", "state", "fix"),
    [
        (SOFTWARE, TESTED, {"torch": ">=2.11"}, State.OK, ""),
        (SOFTWARE, {**TESTED, "peft": "0.22.0"}, {}, State.WARNING, "peft==0.22.0"),
        (SOFTWARE, TESTED, {"torch": ">=2.14"}, State.FAILED, "'torch>=2.14'"),
        (replace(SOFTWARE, libraries={"torch": None}), TESTED, {}, State.FAILED, "pip install 'torch'"),
        (replace(SOFTWARE, python="3.13.1"), TESTED, {}, State.WARNING, "use Python 3.11"),
    ],
)
def test_libraries(found, tested, needed, state, fix):
    check = checks.libraries(found, tested=tested, needed=needed)
    assert check.state == state and fix in check.fix
    assert check.figures["python"] == found.python


def test_another_version_than_in_the_constraints(tmp_path):
    """The real versions against a file of constraints that has one of them otherwise."""
    text = asset("constraints.txt").read_text()
    here = software()
    (tmp_path / "same.txt").write_text(text)
    (tmp_path / "other.txt").write_text(f"# a comment\n{text}\npeft==0.0.1\n")
    needed = doctor_probe.needed_versions()
    assert "torch" in needed
    same, other = (
        checks.libraries(here, tested=doctor_probe.tested_versions(tmp_path / name), needed=needed)
        for name in ("same.txt", "other.txt")
    )
    assert same.state == State.OK
    assert other.state == State.WARNING and "pip install peft==0.0.1" in other.fix


def test_the_software_of_this_process():
    import torch

    found = software()
    assert found.libraries["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found.cuda == torch.version.cuda


# GPUs


@pytest.mark.parametrize(
    ("found", "cuda", "state", "said"),
    [
        (Graphics(problem="no library"), None, State.OK, "no GPU here"),
        (Graphics(problem="version mismatch", devices=8), "13.0", State.WARNING, "8 NVIDIA devices"),
        (Graphics((), "580.65", devices=1), "13.0", State.OK, "CUDA_VISIBLE_DEVICES hides"),
        (Graphics(GPUS, "580.65"), None, State.FAILED, "built for the CPU"),
        (Graphics(GPUS, "575.51.03"), "13.0", State.FAILED, "too old for CUDA 13.0"),
        (Graphics(GPUS, "575.51.03"), "12.8", State.OK, "575.51.03, for torch's CUDA 12.8"),
        (Graphics(GPUS, "700.1"), "14.1", State.WARNING, "not known"),
    ],
)
def test_driver(found, cuda, state, said):
    check = checks.driver(found, cuda)
    assert check.state == state and said in check.seen
    assert bool(check.fix) == (state != State.OK)


def test_good_gpus_are_one_line():
    (line,) = checks.gpus(GPUS)
    assert line.state == State.OK
    assert line.figures == {"gpus": 2, "kinds": ["H100, compute 9.0"], "memory": [80 * GIB] * 2, "free": [79 * GIB] * 2}
    assert "18 NVLinks" in line.seen


@pytest.mark.parametrize(
    ("bad", "state", "said"),
    [
        ({"free": 20 * GIB, "users": (4321,)}, State.WARNING, "60.0 GiB of its memory are in use (processes 4321)"),
        ({"errors": 3}, State.WARNING, "3 uncorrected memory errors"),
        ({"broken_rows": True, "errors": 3}, State.FAILED, "rows of its memory are broken"),
        ({"slowed": ("heat",)}, State.WARNING, "its clocks are held down by heat"),
        ({"pcie": (5, 4, 16)}, State.WARNING, "4 of its 16 PCIe lanes"),
    ],
)
def test_a_bad_gpu_is_a_line_more(bad, state, said):
    first, line = checks.gpus((H100, replace(H100, index=1, **bad)))
    assert first.state == State.OK
    assert (line.name, line.state) == ("GPU 1", state) and said in line.seen and line.fix


def test_different_gpus():
    assert checks.gpus((H100, replace(H100, index=1, name="A100")))[0].state == State.WARNING
    assert [check.seen for check in checks.gpus(())] == ["no GPU here"]


class Nvml:
    """NVML's Python module for cards that know only what is in their dictionaries; all else is "Not Supported"."""

    class NVMLError(Exception):
        pass

    def __init__(self, *cards: dict, problem: str | None = None) -> None:
        self.cards, self.problem = cards, problem

    def __getattr__(self, name: str):
        return self._teller(name) if name.startswith("nvmlDeviceGet") else getattr(pynvml, name)

    def _teller(self, name: str):
        def tell(card: dict, *more):
            if name not in card:
                raise self.NVMLError("Not Supported")
            return card[name](*more) if callable(card[name]) else card[name]

        return tell

    def nvmlInit(self):
        if self.problem:
            raise self.NVMLError(self.problem)

    def nvmlShutdown(self):
        pass

    def nvmlSystemGetDriverVersion(self):
        return "580.65.06"

    def nvmlDeviceGetCount(self):
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index):
        if index >= len(self.cards):
            raise self.NVMLError("Invalid Argument")
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, name):
        found = [card for card in self.cards if card["uuid"] == name]
        if not found:
            raise self.NVMLError("Not Found")
        return found[0]


def links(*speeds: int):
    """What a card answers about its NVLinks, in MB/s."""
    state = {"nvmlDeviceGetNvLinkState": lambda link: int(link < len(speeds))}
    value = lambda speed: SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=speed))  # noqa: E731
    return state | {"nvmlDeviceGetFieldValues": lambda asked: [value(speeds[link]) for _, link in asked]}


PLAIN = {
    "uuid": "GPU-plain",
    "nvmlDeviceGetName": "T4",
    "nvmlDeviceGetCudaComputeCapability": [7, 5],
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=16 * GIB, free=15 * GIB),
}
RICH = {
    "uuid": "GPU-rich",
    "nvmlDeviceGetName": "H100",
    "nvmlDeviceGetCudaComputeCapability": [9, 0],
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 * GIB, free=79 * GIB),
    "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=77)],
    "nvmlDeviceGetCurrentClocksEventReasons": pynvml.nvmlClocksEventReasonSwPowerCap
    | pynvml.nvmlClocksEventReasonHwThermalSlowdown,
    "nvmlDeviceGetTotalEccErrors": 2,
    "nvmlDeviceGetRemappedRows": (0, 0, 1, 0),
    "nvmlDeviceGetMaxPcieLinkGeneration": 5,
    "nvmlDeviceGetCurrPcieLinkWidth": 8,
    "nvmlDeviceGetMaxPcieLinkWidth": 16,
    **links(*[26562] * 18),
}


@pytest.fixture
def graphics(monkeypatch, tmp_path):
    """What is found on a machine with these cards."""

    def find(*cards: dict, visible: str | None = None, problem: str | None = None, devices: int = 0) -> Graphics:
        for number in range(devices):
            device = tmp_path / f"0000:{number:02}"
            device.mkdir()
            (device / "vendor").write_text("0x10de\n")
            (device / "class").write_text("0x030200\n")
        monkeypatch.setattr(doctor_probe, "PCI", tmp_path)
        monkeypatch.setitem(sys.modules, "pynvml", Nvml(*cards, problem=problem))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return doctor_probe.graphics()

    return find


def test_a_card_that_tells_all(graphics):
    (gpu,) = graphics(RICH).gpus
    assert gpu == GpuState(
        0,
        "H100",
        80 * GIB,
        79 * GIB,
        (9, 0),
        users=(77,),
        slowed=("heat, by the card",),
        errors=2,
        broken_rows=True,
        nvlinks=18,
        nvlink_speed=18 * 26562e6,
        pcie=(5, 8, 16),
    )
    assert gpu.link == ("18 NVLinks", 18 * 26562e6)


def test_a_card_that_tells_little(graphics):
    (gpu,) = graphics(PLAIN).gpus
    assert gpu == GpuState(0, "T4", 16 * GIB, 15 * GIB, (7, 5))
    assert gpu.link == ("PCIe", None)
    assert replace(gpu, pcie=(4, 8, 16)).link == ("PCIe 4.0 x8", 8 * 1.969e9)


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, ["T4", "H100"]), ("1", ["H100"]), ("GPU-rich,0", ["H100", "T4"]), ("", []), ("0,7,1", ["T4"])],
)
def test_only_visible_cards(graphics, visible, names):
    assert [gpu.name for gpu in graphics(PLAIN, RICH, visible=visible).gpus] == names


def test_devices_without_a_driver(graphics):
    found = graphics(problem="Driver/library version mismatch", devices=2)
    assert found == Graphics(problem="Driver/library version mismatch", devices=2)


# Memory, disks, network


def test_host_memory():
    check = checks.host_memory(Space(64 * GIB, 10 * GIB), processes=2, weights=2 * GIB, gpus=0)
    assert (check.state, check.figures["need"]) == (State.OK, 8 * GIB)
    assert checks.host_memory(Space(64 * GIB, 7 * GIB), processes=2, weights=2 * GIB, gpus=0).state == State.WARNING
    assert checks.host_memory(Space(64 * GIB, 7 * GIB), processes=2, weights=2 * GIB, gpus=2).state == State.OK
    assert "not known" in checks.host_memory(Space(64 * GIB, 7 * GIB), processes=1, weights=None, gpus=0).seen


def test_a_container_has_less_memory_than_its_machine(tmp_path, monkeypatch):
    whole = doctor_probe.host_memory()
    (tmp_path / "max").write_text(f"{256 << 20}\n")
    (tmp_path / "now").write_text(f"{56 << 20}\n")
    monkeypatch.setattr(doctor_probe, "MEMORY_LIMITS", ((str(tmp_path / "max"), str(tmp_path / "now")),))
    assert doctor_probe.host_memory() == Space(256 << 20, 200 << 20)
    (tmp_path / "max").write_text("max\n")
    assert doctor_probe.host_memory().size == whole.size


def test_cores():
    assert checks.cores(2, processes=2).state == State.OK
    assert checks.cores(2, processes=3).state == State.WARNING


@pytest.mark.parametrize(
    ("found", "processes", "gpus", "state", "said"),
    [
        (Space(64 << 20, 64 << 20), 2, 2, State.WARNING, "NCCL may need 0.5 GiB"),
        (Space(8 * GIB, 8 * GIB), 8, 8, State.OK, "NCCL needs at most 2.0 GiB"),
        (Space(64 << 20, 64 << 20), 2, 0, State.OK, "not needed by gloo"),
        (Space(64 << 20, 64 << 20), 1, 1, State.OK, "not needed by one process"),
        (None, 2, 2, State.WARNING, "is not there"),
    ],
)
def test_shared_memory(found, processes, gpus, state, said):
    check = checks.shared_memory(found, processes=processes, gpus=gpus)
    assert check.state == state and said in check.seen


@pytest.mark.parametrize(
    ("free", "need", "state"),
    [(20, 10, State.OK), (8, 10, State.WARNING), (2, 10, State.FAILED), (20, None, State.OK), (1, None, State.WARNING)],
)
def test_disk(free, need, state):
    need = need and need * GIB
    check = checks.run_disk(Path("/run"), Space(100 * GIB, free * GIB), need=need, one=3 * GIB)
    assert (check.state, check.figures) == (state, {"free": free * GIB, "need": need})


def test_the_disk_that_a_run_needs(tmp_path):
    """The adapters of a model whose tensors are known to the last number, against its real checkpoint."""
    import torch
    from safetensors.torch import save_file

    tensors = {
        "model.embed_tokens.weight": torch.zeros(100, 8),
        "model.norm.weight": torch.zeros(8),
        "model.layers.0.q_proj.weight": torch.zeros(16, 8),
        "model.layers.0.down_proj.weight": torch.zeros(8, 32),
        "lm_head.weight": torch.zeros(100, 8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    lora = config(model_name_or_path=str(tmp_path), lora_r=4, save_steps=10, save_total_limit=2)
    shapes = doctor_recipe.weights(lora)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    one = 12 * 4 * (16 + 8 + 8 + 32)
    assert doctor_recipe.checkpoint_bytes(lora, shapes) == one
    assert doctor_recipe.run_bytes(lora, shapes) == 3 * one + one // 3
    only_q = lora.model_copy(update={"lora_target_modules": ["q_proj"], "save_steps": None})
    assert doctor_recipe.run_bytes(only_q, shapes) == 4 * 4 * (16 + 8)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert doctor_recipe.checkpoint_bytes(lora.model_copy(update={"method": "full"}), shapes) == 12 * numbers
    (tmp_path / "model.safetensors").write_text("no tensors")
    assert doctor_recipe.weights(lora) is None


def test_the_need_of_a_real_checkpoint(whole_run, embedded_model):
    """The estimate is what the embedded model's checkpoint really has in tensors."""
    from safetensors import safe_open

    saved = 0
    for file in (whole_run.folder / "checkpoint-3").glob("[ao]*.safetensors"):
        with safe_open(file, "pt") as opened:
            saved += sum(opened.get_tensor(name).nbytes for name in opened.keys() if not name.endswith("|step"))
    lora = config(model_name_or_path=str(embedded_model))
    assert doctor_recipe.checkpoint_bytes(lora, doctor_recipe.weights(lora)) == saved


@pytest.mark.parametrize(
    ("found", "state", "said"),
    [
        (None, State.OK, "one machine"),
        (Network(), State.WARNING, "no way to the endpoint"),
        (Network("eth0", 1.25e9), State.OK, "eth0, 1.25 GB/s; no InfiniBand"),
        (Network("eth0", None), State.OK, "of a speed that it does not tell"),
        (Network("eth0", 1.25e9, 8, 400e9, None), State.OK, "8 InfiniBand ports, 400 GB/s"),
        (Network("eth0", 1.25e9, 8, 400e9, 64 << 10), State.WARNING, "may lock only"),
    ],
)
def test_network(found, state, said):
    check = checks.network(found)
    assert check.state == state and said in check.seen


def test_the_device_to_an_endpoint(tmp_path, monkeypatch):
    for number, state in enumerate(("4: ACTIVE", "1: DOWN", "4: ACTIVE")):
        port = tmp_path / f"mlx5_{number}" / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state)
        (port / "rate").write_text("200 Gb/sec (4X HDR)")
    monkeypatch.setattr(doctor_probe, "INFINIBAND", tmp_path)
    found = doctor_probe.network("localhost:29500")
    assert (found.name, found.infiniband, found.infiniband_speed) == ("lo", 2, 50e9)
    assert doctor_probe.network("no-such-host.invalid:29500").name is None


# The recipe, the hub, W&B


def test_every_broken_rule_is_told():
    def broken(name: str, severity: str) -> Violation:
        return Violation(Rule(name, severity, ("optim",), lambda s: name, "so", f"mend {name}"), name, "optim")

    check = checks.recipe([broken("one", "warning"), broken("two", "error")])
    assert (check.state, check.seen, check.fix) == (State.FAILED, "one; two", "mend one; mend two")
    assert checks.recipe([broken("one", "warning")]).state == State.WARNING
    assert checks.recipe([]).state == State.OK


def test_data_of_this_machine(tmp_path):
    shutil.copy(asset("data", "sample.jsonl"), tmp_path / "rows.jsonl")
    sources = [str(tmp_path / "rows.jsonl"), str(tmp_path / "none.jsonl"), "some/name"]
    good, missing, hub = doctor_recipe.data(config(data_path=sources))
    assert (good.format_type, good.size) == ("question_answer", (tmp_path / "rows.jsonl").stat().st_size)
    assert missing.problem and missing.fix and hub.on_hub
    states = [check.state for check in checks.data([good, missing, hub], Hub(False, None, False, ()))]
    assert states == [State.OK, State.FAILED, State.WARNING]
    (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text().replace("mean", "MEAN", 1))
    assert doctor_recipe.data(config(data_path=sources))[0].digest != good.digest


def test_what_the_hub_is_needed_for():
    own = config(model_name_or_path="org/model", data_path="org/rows")
    assert doctor_recipe.hub_names(own, [Data("org/rows", on_hub=True)]) == [
        ("org/model", "model"),
        ("org/rows", "dataset"),
    ]
    assert doctor_recipe.hub_names(config(), doctor_recipe.data(config())) == []
    assert doctor_recipe.hub_names(config(model_name_or_path="/not/here"), []) == []


ANSWER = HubAnswer("org/model", "model", reached=True, size=2 * GIB)


@pytest.mark.parametrize(
    ("found", "state", "said"),
    [
        (Hub(False, None, False, ()), State.OK, "not needed"),
        (Hub(True, "me", False, (ANSWER,)), State.OK, "answers as me: org/model"),
        (Hub(False, None, False, (replace(ANSWER, problem="gated"),)), State.FAILED, "org/model: gated"),
        (Hub(True, None, False, (replace(ANSWER, reached=False),)), State.WARNING, "needed from it"),
        (Hub(True, None, True, (replace(ANSWER, reached=False, cached=True),)), State.WARNING, "in the cache"),
    ],
)
def test_hub(found, state, said):
    check = checks.hub_login(found)
    assert check.state == state and said in check.seen
    assert bool(check.fix) == (state != State.OK)


def test_room_for_what_the_hub_sends():
    def state(free: int, answer: HubAnswer) -> State:
        return checks.cache_disk(Path("/cache"), Space(9 * GIB, free), Hub(False, None, False, (answer,))).state

    assert state(3 * GIB, ANSWER) == State.OK
    assert state(1 * GIB, ANSWER) == State.FAILED
    assert state(1 * GIB, replace(ANSWER, cached=True)) == State.OK
    assert state(3 * GIB, replace(ANSWER, size=None)) == State.WARNING


def test_a_hub_that_cannot_be_reached(tmp_path):
    """In a process of its own, since the hub's client reads its address once: nobody listens there."""
    program = (
        "from dataclasses import asdict; import json; from manyrank.tools.doctor import recipe as doctor_recipe\n"
        "print(json.dumps(asdict(doctor_recipe.hub([('org/model', 'model'), ('org/rows', 'dataset')]))))"
    )
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_none"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=60)
    found = json.loads(done.stdout)
    assert (found["has_token"], found["user"]) == (True, None)
    assert [(answer["name"], answer["reached"]) for answer in found["answers"]] == [
        ("org/model", False),
        ("org/rows", False),
    ]


def test_wandb(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert checks.wandb_login(doctor_recipe.wandb()).state == State.FAILED
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert checks.wandb_login(doctor_recipe.wandb()).state == State.OK
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {'a' * 40}\n")
    assert doctor_recipe.wandb() == Wandb("netrc", "https://api.wandb.ai", "online")
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    check = checks.wandb_login(doctor_recipe.wandb())
    assert (check.state, check.figures["key"]) == (State.OK, "WANDB_API_KEY")
    assert "aaaa" not in str(check)
    assert checks.wandb_login(None).state == State.OK


# The ranks


def machine(
    host: str, *, network: float | None = 25e9, model: str = "m", device: str = "H100", **software: str
) -> dict:
    link = {"local": {"name": "18 NVLinks", "speed": 450e9}, "network": {"name": "eth0", "speed": network}}
    versions = {"torch": "2.13.0", "datasets": "5.2.0", **software}
    facts = {"software": versions, "recipe": {"learning_rate": "0.1"}, "links": link, "checks": []}
    return {"host": host, "device": device, "machine": facts, "model": {"name": "x", "digest": model}}


def exchange(bus: float, wrong: int = 0) -> list[dict]:
    large = {"bytes": 256 << 20, "ranks": 8, "seconds": 1e-3, "algorithm_bandwidth": bus / 2, "bus_bandwidth": bus}
    small = {**large, "bytes": 4 << 10, "seconds": 3e-5}
    return [{**small, "wrong": 0}, {**large, "wrong": wrong}]


def test_all_reduce_on_one_machine():
    (good,) = rank_checks.all_reduce({"all": exchange(300e9)}, machines=[machine("a")])
    assert good.state == State.OK and good.figures["part_of_link"] == pytest.approx(300 / 450)
    (slow,) = rank_checks.all_reduce({"all": exchange(20e9)}, machines=[machine("a")])
    assert slow.state == State.WARNING and "4% of 18 NVLinks, 450 GB/s" in slow.seen
    (wrong,) = rank_checks.all_reduce({"all": exchange(300e9, wrong=2)}, machines=[machine("a")])
    assert wrong.state == State.FAILED and "wrong on 2 ranks" in wrong.seen


def test_all_reduce_between_machines_goes_by_the_slowest_network():
    pair = [machine("a"), machine("b", network=12.5e9)]
    across, inside = rank_checks.all_reduce({"all": exchange(10e9), "machine": exchange(100e9)}, machines=pair)
    assert (across.name, across.state, across.figures["part_of_link"]) == ("all-reduce", State.OK, 0.8)
    assert (inside.name, inside.state) == ("local all-reduce", State.WARNING)
    (unknown,) = rank_checks.all_reduce({"all": exchange(1e9)}, machines=[machine("a"), machine("b", network=None)])
    assert unknown.state == State.OK and "no figure" in unknown.seen


@pytest.mark.parametrize(
    ("other", "software", "recipe"),
    [
        (machine("b"), State.OK, State.OK),
        (machine("b", torch="2.12.0"), State.FAILED, State.OK),
        (machine("b", datasets="5.1.0"), State.WARNING, State.OK),
        (machine("b", device="A100"), State.WARNING, State.OK),
        (machine("b", model="other"), State.OK, State.FAILED),
    ],
)
def test_machines_that_differ(other, software, recipe):
    found = rank_checks.same([machine("a"), other])
    assert [check.state for check in found] == [software, recipe]
    assert all(("on a" in check.seen and "on b" in check.seen) for check in found if check.state != State.OK)


@pytest.mark.parametrize(("offset", "state"), [(0.2, State.OK), (-5.0, State.WARNING), (90.0, State.FAILED)])
def test_clocks(offset, state):
    told = [{"host": "b", "offset": 0.01, "error": 1e-3}, {"host": "c", "offset": offset, "error": 1e-3}]
    check = rank_checks.clocks(told)
    assert check.state == state and check.seen.startswith("c is") and ("behind" in check.seen) == (offset < 0)


def test_the_output_folder():
    facts = {"folder": "/runs", "problem": None, "blind": []}
    assert rank_checks.folder(facts).state == State.OK
    assert "read-only" in rank_checks.folder({**facts, "problem": "read-only"}).seen
    blind = rank_checks.folder({**facts, "blind": ["b"]})
    assert blind.state == State.FAILED and "share" in blind.fix


STEP = {
    "losses": [2.0, 1.5],
    "strategy": "ddp",
    "wrapper": "DDP",
    "distributed_type": "MULTI_GPU",
    "world_size": 2,
    "precision": "no",
    "method": "lora",
    "trainable_tensors": 56,
}
LOADED = {"loss": 1.5, "tensors": 56, "bytes": 1000, "drift": 1e-3}


def test_the_step():
    assert rank_checks.step(STEP).state == State.OK
    assert rank_checks.step({**STEP, "losses": [2.0]}).state == State.FAILED
    assert rank_checks.step({**STEP, "losses": [2.0, float("nan")]}).state == State.FAILED


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tensors": 0}, "0 of 56 tensors"),
        ({"loss": 1.6}, "loss 1.6000, and had 1.5000"),
        ({"drift": 0.76}, "off by 76% of a step"),
        ({"drift": None}, "has not changed the weights"),
    ],
)
def test_save_and_load(wrong, said):
    assert rank_checks.save_and_load(LOADED, STEP).state == State.OK
    check = rank_checks.save_and_load({**LOADED, **wrong}, STEP)
    assert check.state == State.FAILED and said in check.seen


THERE = {"start": {}, "model": {}, "process group": {}}


@pytest.mark.parametrize(
    ("ended", "places", "problem", "said", "fix"),
    [
        (
            Ended(How.DIED, 1, -signal.SIGKILL),
            [(1, "all-reduce"), (0, "all-reduce")],
            None,
            "rank 1 was killed",
            "memory",
        ),
        (Ended(How.DIED, 1, -signal.SIGSEGV), [(1, "all-reduce")], None, "ended by SIGSEGV", "NCCL_DEBUG"),
        (Ended(How.DIED, 1, 1), [(1, "all-reduce")], {"what": "no route", "fix": ""}, "rank 1: no route", "NCCL_DEBUG"),
        (Ended(How.DIED, 1, 1), [(1, "all-reduce")], {"what": "no route", "fix": "dig"}, "rank 1: no route", "dig"),
        (
            Ended(How.LATE),
            [(1, "all-reduce"), (0, "clocks")],
            None,
            "rank 1 in all-reduce; rank 0 in clocks",
            "NCCL_DEBUG",
        ),
        (Ended(How.APART, words="timed out"), [(1, "all-reduce")], None, "did not meet. timed out", "--rdzv_endpoint"),
    ],
)
def test_ranks_that_end_too_early(ended, places, problem, said, fix):
    first, *rest = rank_checks.not_reached(THERE, ended, places, ranks=2, problem=problem)
    assert (first.name, first.state) == ("all-reduce", State.FAILED)
    assert said in first.seen and fix in first.fix
    assert [check.name for check in rest] == ["same software", "clocks", "output folder", "step", "save and load"]
    assert {check.state for check in rest} == {State.WARNING}


def test_no_step_without_a_folder():
    found = {stage: {} for stage in rank_checks.STAGES[:7]}
    rest = rank_checks.not_reached(found, Ended(How.DONE), [], ranks=2)
    assert [(check.name, check.state) for check in rest] == [("step", State.WARNING), ("save and load", State.WARNING)]


def test_lines():
    check = Check("disk", State.WARNING, "full", "free some", machine="b")
    assert lines(check, several=False) == ["warning  disk             full", "         fix: free some"]
    assert lines(check, several=True)[0] == "warning  b              disk             full"


@pytest.mark.parametrize(("gpu", "state"), [("H100-80GB", "ok"), ("RTX3060", "failed")])
def test_the_plan_of_a_recipe_is_a_check(gpu, state):
    kind = find_kind(gpu)
    model = "llama-3.1-405b" if state == "failed" else "qwen2.5-0.5b"
    plan = make_plan(planned_context(config(method="full"), gpu=kind), read(model))
    found = checks.planned(plan)
    assert found.state == state and "planned:" in found.seen and bool(found.fix) == (state != "ok")
    assert checks.planned(None).state == "ok"
