"""The plan inside a run: settle what the recipe leaves open, and compare planned with measured memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers.utils import logging

from ..config.resolve import ResolvedConfig, TrainConfig
from ..errors import OutOfMemory, UserError
from ..models.spec import from_config
from ..plan import memory, planner
from ..plan.memory import GiB
from ..plan.planned_run import PlannedRun
from ..rules.context import RunContext
from ..topology import gpus, strategy_files
from ..topology.precision import Precision
from ..topology.ranks import Topology
from ..topology.strategies import EngineKind, Strategy, find_strategy, named_strategy

logger = logging.get_logger(__name__)


def plan_run(
    config: TrainConfig, accelerator: Accelerator, place: Topology, model_config: dict, *, precision: Precision
) -> PlannedRun | None:
    """Plan this run; None where the model's config cannot be read.

    Args:
        model_config: the content of the model's config.json.
    """
    try:
        shape = from_config(model_config, name=config.model_name_or_path)
    except UserError as error:
        logger.warning("nothing is planned: %s", error.what)
        return None
    strategy = named_strategy(config.strategy) or _active_strategy(accelerator)
    resolved = ResolvedConfig(
        config.model_copy(update={"bf16": precision is Precision.BF16, "fp16": precision is Precision.FP16})
    )
    nproc, launched = place.local_world_size, strategy_files.from_environment()
    context = RunContext(resolved, strategy, nproc, place.world_size, gpus.probe(), launched=launched)
    run = PlannedRun(context, shape)
    return planner.settled(run, _least_memory(accelerator) if run.gpu else None)


def _active_strategy(accelerator: Accelerator) -> Strategy:
    """The strategy of what came up, where nobody named one."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return find_strategy(EngineKind.DEEPSPEED, zero_stage=accelerator.deepspeed_plugin.zero_stage)
    return find_strategy(
        {DistributedType.FSDP: EngineKind.FSDP, DistributedType.NO: EngineKind.SINGLE}.get(kind, EngineKind.DDP)
    )


def _least_memory(accelerator: Accelerator) -> int:
    """Bytes of the smallest GPU: all ranks must decide alike."""
    memory = torch.tensor([torch.cuda.mem_get_info(accelerator.device)[1]], device=accelerator.device)
    return int(accelerator.gather(memory).min())


def take_peaks() -> dict[str, int]:
    """Most bytes on this rank's GPU until now; from here on peaks are counted anew, without blocks that torch keeps unused."""
    if not torch.cuda.is_available():
        return {}
    peaks = {"allocated_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peaks


def compare_with_measured(run: PlannedRun, folder: Path, loading: dict[str, int]) -> str | None:
    """Planned against measured memory of this rank's GPU, also written to logs/memory.json; None without a GPU.

    Args:
        loading: `take_peaks` after the model was loaded.
    """
    if not run.gpu:
        return None
    planned = memory.estimate(run)
    reserved, free, total = torch.cuda.max_memory_reserved(), *torch.cuda.mem_get_info()
    facts = {
        "planned_bytes": planned.peak,
        "parts": dict(planned.parts),
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": reserved,
        "in_use_bytes": total - free,
        "loading": {"planned_bytes": planned.loading, **loading},
    }
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "logs" / "memory.json").write_text(json.dumps(facts, indent=1))
    around = planned.parts.get("context", 0)
    return (
        f"memory of a GPU, of which {around / GiB:.1f} GiB are planned for CUDA itself: "
        f"training planned {planned.peak / GiB:.1f} GiB, measured {reserved / GiB:.1f} held by torch and "
        f"{(total - free) / GiB:.1f} in use at the end; "
        f"loading planned {planned.loading / GiB:.1f}, measured {loading['reserved_bytes'] / GiB:.1f} held by torch"
    )


def out_of_memory(run: PlannedRun, *, step: int, measured: int) -> OutOfMemory:
    """Make the error of a run that is out of memory: what was planned, what was used, and what to change.

    Args:
        measured: bytes that this process held at most.
    """
    planned, config = memory.estimate(run), run.config
    return OutOfMemory(
        f"out of memory in step {step}: planned were {planned.peak / GiB:.2f} GiB, most of it for {_most(planned)}; "
        f"this process held {measured / GiB:.2f} GiB",
        where=f"micro-batch {config.per_device_train_batch_size} x {config.max_length} tokens, gradient_checkpointing "
        f"{config.gradient_checkpointing}, strategy {run.strategy}",
        fix="; or ".join(_ways(run)) or "take a smaller model, a shorter max_length or more GPUs",
    )


def _most(planned: memory.Memory) -> str:
    return max(planned.parts, key=planned.parts.__getitem__)


def _ways(run: PlannedRun) -> list[str]:
    """List changes that need less memory, with their planned memory."""
    config, here = run.config, memory.estimate(run).peak
    changes = {}
    if config.per_device_train_batch_size > 1:
        half = config.per_device_train_batch_size // 2
        changes[f"--per_device_train_batch_size {half}"] = run.with_options(per_device_train_batch_size=half)
    if run.checkpointed < run.shape.depth:
        changes["--gradient_checkpointing full"] = run.with_options(gradient_checkpointing="full")
    if run.world > 1 and not run.sharded and config.method not in ("int8", "fp8"):
        sharded = find_strategy(EngineKind.FSDP)
        changes[f"--strategy {sharded}"] = run.on(sharded)
    if config.method == "lora":
        changes["--method qlora"] = run.with_options(method="qlora")
    needs = {name: memory.estimate(other).peak for name, other in changes.items()}
    return [f"{name} (about {need / GiB:.2f} GiB)" for name, need in needs.items() if need < here]
