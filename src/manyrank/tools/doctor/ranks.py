"""Go through the doctor's stages on every rank: python -m manyrank.tools.doctor.ranks FOLDER, started as the training is.

Each rank writes its checks into FOLDER (see `launch`) after every stage, so that they stay when a later one ends it.
"""

from __future__ import annotations

import hashlib
import json
import math
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...config.args import parse
from ...config.resolve import Setting, TrainConfig, resolve
from ...errors import EXIT_FAILED, UserError, in_one_line
from ...project_files import EMBEDDED
from ...runs import hub
from ...runs.heartbeats import HeartbeatWriter
from ...runs.logs import read_metrics
from ...runs.versions import software
from ...signals import end_with_parent
from ...topology import gpus, ranks
from ...topology.precision import Precision, find_precision
from ...topology.ranks import Topology
from ...topology.torch_gpus import use_gpu
from ...training.exits import exit_now
from .checks import Check, counted, failed, gib, ok, speed, warning

if TYPE_CHECKING:
    import torch

SMALL, LARGE, LARGE_GPU = 4 << 10, 64 << 20, 256 << 20  # bytes of an all-reduce
REPEATS = 5
HEAD_BYTES = 1 << 20  # of a data file that are compared between machines
FREE = 0.9  # of a GPU's memory: less is free when somebody else uses it
EXCHANGE_SECONDS = 4.0  # that one size may take, on a slow network
PART_OF_LINK = 0.4  # of a link's figure that an all-reduce of large messages reaches at least
STEPS = 2
SMALL_RUN = {"max_length": 256, "save_steps": 1, "logging_steps": 1, "max_steps": STEPS}
_KEPT: list[object] = []  # for the reason that train keeps its run


class Notes:
    """The checks of this rank, in a file; and the stage that it is in, as its sign of life."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.file = folder / f"rank-{rank:05d}.json"
        self.content: dict[str, Any] = {"checks": [], "problem": None}
        self.heartbeat = HeartbeatWriter(rank)
        self.heartbeat.attach(folder)

    def begin(self, stage: str) -> None:
        self.heartbeat.beat(0, stage)

    def add(self, *checks: Check) -> None:
        self.content["checks"] += map(asdict, checks)
        self._write()

    def fail(self, error: Exception) -> None:
        """Say in which way the stage has failed; the fix may be empty."""
        self.content["problem"] = {"what": in_one_line(error), "fix": error.fix if isinstance(error, UserError) else ""}
        self._write()

    def _write(self) -> None:
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.content))
        partial.replace(self.file)


def main(argv: Sequence[str] | None = None) -> int:
    """Go through the stages.

    Returns:
        The exit code: 0 when all stages are through, whatever they have found.
    """
    end_with_parent()
    folder = Path((argv or sys.argv[1:])[0])
    place = ranks.from_environment()
    notes = Notes(folder, place.rank)
    try:
        _examine(json.loads((folder / "job.json").read_text()), place, folder, notes)
    except Exception as error:  # whatever it is, it is a line of the report
        traceback.print_exc()
        notes.fail(error)
        return EXIT_FAILED
    notes.heartbeat.stop()
    return 0


def _examine(job: dict[str, Any], place: Topology, folder: Path, notes: Notes) -> None:
    notes.begin("start")
    line = parse(job["argv"], prog="manyrank doctor", launch=False)
    config = resolve(line.recipe, line.overrides).config
    device = use_gpu(gpus.probe(), place)
    if device.type == "cuda":
        notes.add(_gpu_memory(device))
    notes.begin("model")  # on all, so that a rank with fewer signs of life is one that is behind
    if place.local_rank == 0:
        from ...models.tiny import build

        notes.add(_model(config))
        build(folder / "model", steps=0)
    if place.world_size > 1:
        notes.begin("process group")
        notes.add(_meet(place, device, timeout=job["timeout"]))
    if place.nnodes > 1:
        notes.begin("same on all")
        notes.add(same(_gathered((socket.gethostname(), _facts(config)))[:: place.local_world_size]))
    if place.world_size > 1:
        notes.begin("all-reduce")
        sizes = [_exchange(size, device) for size in (SMALL, LARGE_GPU if device.type == "cuda" else LARGE)]
        notes.add(all_reduce(sizes, link=job["link"] if place.nnodes == 1 else None))
    run = _from_rank_0(job["run"])
    if run:
        _train(config, job["strategy"], place, folder, Path(run), notes)


def _gpu_memory(device: torch.device) -> Check:
    import torch

    free, size = torch.cuda.mem_get_info(device)
    facts = torch.cuda.get_device_properties(device)
    place = f"{facts.pci_domain_id:08X}:{facts.pci_bus_id:02X}:{facts.pci_device_id:02X}.0"
    name, seen = f"GPU {device.index}", f"{gib(free)} of {gib(size)} free; in CUDA's order, at {place}"
    if free < FREE * size:
        fix = f"see `nvidia-smi -i {place}` for who uses it, and end that, or choose others by CUDA_VISIBLE_DEVICES"
        return warning(name, seen, fix, free=free, size=size)
    return ok(name, seen, free=free, size=size)


def _model(config: TrainConfig) -> Check:
    """Read the recipe's config, tokenizer and the headers of its weights, as this machine can."""
    from safetensors import safe_open
    from transformers import AutoConfig

    from ...models.tokenizer import load_tokenizer

    name = config.model_name_or_path
    if name == EMBEDDED:
        return ok("model", f"{name}: made when it is first used")
    files = sorted(Path(name).expanduser().glob("*.safetensors"))
    try:
        hub.check_model(name)
        kind = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code).model_type
        tokens = len(load_tokenizer(config))
        for file in files:
            with safe_open(file, "pt"):
                pass
    except Exception as error:  # of any library: it is the model's line, and the rest goes on
        fix = error.fix if isinstance(error, UserError) else "give a whole model, of a kind that transformers knows"
        return failed("model", f"{name}: {in_one_line(error)}", fix)
    size = sum(file.stat().st_size for file in files)
    return ok("model", f"{name}: {kind}, {tokens:,} tokens, {gib(size)} of safetensors in its folder", bytes=size)


# All ranks together


def _meet(place: Topology, device: torch.device, *, timeout: float) -> Check:
    """Start the process group, as the training would.

    Args:
        timeout: seconds that a rank waits for the others.
    """
    import torch.distributed as dist

    gpu = device.type == "cuda"
    # With GPUs gloo, too: FSDP and offload send from host memory, and facts need no GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(seconds=timeout))
    dist.barrier(device_ids=[place.local_rank] if gpu else None)
    backend = "nccl" if gpu else "gloo"
    return ok("process group", f"{place.world_size} ranks over {backend}", ranks=place.world_size, backend=backend)


def _gathered(value: Any) -> list[Any]:
    """The value of every rank, by rank."""
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _from_rank_0(value: Any) -> Any:
    import torch.distributed as dist

    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def _facts(config: TrainConfig) -> dict[str, str | None]:
    """Collect what must be the same on every machine: versions, recipe, model, and the data, whose path may differ."""
    import torch

    from ...runs.artifact import base_fingerprint

    name, sources = config.model_name_or_path, [*config.data_path, *(config.eval_data_path or ())]
    return {
        **software().libraries,
        **{key: str(value) for key, value in config.plain().items() if not key.endswith("data_path")},
        **{f"data {number}": _digest(Path(source.path)) for number, source in enumerate(sources, 1)},
        "manyrank": __version__,
        "nccl": str(torch.cuda.nccl.version()) if torch.cuda.is_available() else None,
        "model": base_fingerprint(name, None) if (Path(name).expanduser() / "config.json").is_file() else None,
    }


def _digest(path: Path) -> str:
    """Sizes of a source's files, and a digest of their beginnings."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(b"%d" % file.stat().st_size + stream.read(HEAD_BYTES))
    return f"{sum(file.stat().st_size for file in files):,} bytes, {digest.hexdigest()[:12]}"


def same(machines: Sequence[tuple[str, dict[str, str | None]]]) -> Check:
    """Compare the facts of all machines, whose ranks run one program together."""
    (host, first), *others = machines
    differ = [
        f"{name} is {fact} on {host} and {facts.get(name)} on {other}"
        for other, facts in others
        for name, fact in first.items()
        if fact != facts.get(name)
    ]
    if differ:
        fix = "give every machine the same versions, recipe, data and model"
        return failed("same on all", "; ".join(differ), fix)
    seen = f"versions, recipe, data and model on {len(machines)} machines"
    return ok("same on all", seen, machines=[host for host, _ in machines])


def _exchange(size: int, device: torch.device) -> dict[str, Any]:
    """All-reduce one size: checked once, then timed; the least time of the slowest rank counts.

    Returns:
        bytes, ranks, wrong (ranks with a wrong sum), seconds, and bus_bandwidth: bytes a second that each rank sends
        and receives in a ring.
    """
    import torch
    import torch.distributed as dist

    count, least, end = dist.get_world_size(), math.inf, EXCHANGE_SECONDS
    pattern = torch.arange(size // 4, device=device, dtype=torch.float32) % 251
    values = pattern + dist.get_rank()
    dist.all_reduce(values)
    wrong = sum(_of_all_ranks(not torch.equal(values, count * pattern + count * (count - 1) / 2)))
    values.zero_()
    for _ in range(REPEATS):
        took = max(_of_all_ranks(_timed(values, device)))
        least, end = min(least, took), end - took
        if end < 0:  # on all ranks alike
            break
    bus = size / least * 2 * (count - 1) / count
    return {"bytes": size, "ranks": count, "wrong": wrong, "seconds": least, "bus_bandwidth": bus}


def _of_all_ranks(value: object) -> list:
    import torch.distributed as dist

    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _timed(values: torch.Tensor, device: torch.device) -> float:
    import torch
    import torch.distributed as dist

    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
    started = time.perf_counter()
    dist.all_reduce(values)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def all_reduce(sizes: Sequence[dict[str, Any]], *, link: float | None) -> Check:
    """Check sums and bandwidth.

    Args:
        link: bytes a second of the link between the GPUs of this machine, by its maker; None: nothing to compare with.
    """
    name, (small, large), figures = "all-reduce", sizes, {"sizes": list(sizes), "link": link}
    wrong = max(small["wrong"], large["wrong"])
    if wrong:
        fix = "try NCCL_P2P_DISABLE=1, then NCCL_IB_DISABLE=1, to find the link that is broken; test that hardware"
        return failed(name, f"the sum is wrong on {wrong} ranks", fix, **figures)
    bus = large["bus_bandwidth"]
    seen = f"{large['ranks']} ranks, {large['bytes'] >> 20} MiB: {speed(bus)} on the bus"
    seen += f"; {small['bytes'] >> 10} KiB: {small['seconds'] * 1e6:,.0f} us"
    if not link:
        return ok(name, seen, **figures)
    seen += f"; {bus / link:.0%} of the GPUs' link, {speed(link)}"
    if bus < PART_OF_LINK * link:
        fix = "see with NCCL_DEBUG=INFO which way it takes, in `nvidia-smi topo -m` how the GPUs are linked, and who else uses them"
        return warning(name, seen, fix, **figures)
    return ok(name, seen, **figures)


# A real training, as small as it can be


def _train(config: TrainConfig, strategy: str, place: Topology, folder: Path, run: Path, notes: Notes) -> None:
    """Take two steps with a checkpoint after each, and the second step once more from the first checkpoint."""
    from ...checkpoint.resume import broadcast_from_rank0
    from ...runs import run_folder
    from ...tasks import find_task
    from ...training.build import build_run

    notes.begin("step")
    small = _small_config(config, strategy, folder / "model", place.world_size)
    precision = find_precision(small.bf16, small.fp16, gpus.probe())
    trained = build_run(small, place, find_task(small), output_dir=run, precision=precision)
    _KEPT.append(trained)
    trained.run()
    facts, main = trained.engine.facts().as_dict(), trained.accelerator
    losses = broadcast_from_rank0(main, lambda: [entry["loss"] for entry in read_metrics(run)])
    notes.add(step(losses, facts, f"{small.method}, {strategy}"))
    notes.begin("save and load")
    first = run_folder.find(run, str(run / "checkpoint-1")).folder
    main.wait_for_everyone()  # the next save replaces what every rank has just read
    trained.trainer.control.should_training_stop = False
    trained.trainer.resume(first)
    trained.trainer.train()
    again, tensors = broadcast_from_rank0(main, lambda: (read_metrics(run)[-1]["loss"], _tensors(first)))
    notes.add(save_and_load(losses[-1], again, tensors, facts))


def _small_config(config: TrainConfig, strategy: str, model: Path, world_size: int) -> TrainConfig:
    """The recipe's way of training, on the small model and the project's sample."""
    values = SMALL_RUN | {key: getattr(config, key) for key in ("method", "bf16", "fp16", "optim", "hsdp_shard_size")}
    values |= {"model_name_or_path": str(model), "strategy": strategy}
    values |= {"per_device_train_batch_size": 2, "global_batch_size": 2 * world_size}
    settings = [Setting(key, value, "the doctor's step") for key, value in values.items() if value is not None]
    return resolve("verify", settings).config


def _tensors(checkpoint: Path) -> int:
    from safetensors import safe_open

    return sum(len(safe_open(file, "pt").keys()) for file in checkpoint.glob("*model*.safetensors"))


def step(losses: Sequence[float], facts: dict[str, Any], what: str) -> Check:
    """Check that two steps were taken, and say what came up."""
    precision = Precision(facts["precision"]).label
    seen = f"{what} as {facts['wrapper']} on {counted(facts['world_size'], 'rank')}, {precision}: loss "
    seen += ", then ".join(f"{loss:.4f}" for loss in losses)
    figures = {key: facts[key] for key in ("wrapper", "distributed_type", "world_size", "precision")}
    if len(losses) < STEPS or not all(map(math.isfinite, losses)):
        return failed("step", seen, "compare with one process: manyrank verify", losses=list(losses), **figures)
    return ok("step", seen, losses=list(losses), **figures)


def save_and_load(loss: float, again: float, tensors: int, facts: dict[str, Any]) -> Check:
    """Check that the checkpoint has every tensor, and that the step from it has the loss that it had before."""
    name, fix, expected = "save and load", "compare with one process: manyrank verify", facts["trainable_tensors"]
    figures = {"tensors": tensors, "loss": again}
    if tensors != expected:
        return failed(name, f"the checkpoint has {tensors} of {expected} tensors", fix, **figures)
    if not abs(again - loss) / max(1.0, loss) <= Precision(facts["precision"]).tolerance:
        what = f"the step from the checkpoint has loss {again:.4f}, and had {loss:.4f} before it"
        return failed(name, what, fix, **figures)
    return ok(name, f"{tensors} tensors; the step from them gives the same loss", **figures)


if __name__ == "__main__":
    exit_now(main())
