"""Start the strategy that the recipe asks for, and check that it is what accelerate started.

`accelerate_configs/NAME.yaml` is the one truth. `accelerate launch` applies it to the environment; under torchrun and
srun `start` applies the same file, with accelerate's own code. What differs on CPUs (gloo, FSDP2, DeepSpeed's
accelerator) is decided here, from what the machine has. `engine` then runs the steps.
"""

from __future__ import annotations

import os
import socket
import sys
import warnings
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ParallelismConfig,
    gather_object,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from ..config.resolve import TrainConfig
from ..errors import UserError
from ..project_files import asset
from ..topology import numa
from ..topology.precision import Precision
from ..topology.ranks import Topology
from ..topology.strategies import EngineKind, Strategy, default_strategy, named_strategy
from . import compile_locks
from .fsdp_on_cpu import promote_to_fsdp
from .timeouts import UNHURRIED

# Of the environment, through which `accelerate launch` tells its processes what a config says.
PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


def launched_by_accelerate(environ=os.environ) -> bool:
    """Return whether `accelerate launch` has already applied a config."""
    return "ACCELERATE_MIXED_PRECISION" in environ


def config_environment(strategy: Strategy, world_size: int) -> dict[str, str]:
    """The variables of PREFIXES that `accelerate launch --config_file` would set, by accelerate's own code."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import launch

    config = asset("accelerate_configs", f"{strategy}.yaml")
    argv = ["--config_file", str(config), "--num_processes", str(world_size), "--num_machines", "1"]
    argv += ["--main_process_port", "0", "-m", "manyrank.train"]
    if strategy.engine is EngineKind.DEEPSPEED:
        argv[2:2] = ["--deepspeed_config_file", str(asset("ds_configs", f"{strategy}.json"))]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(argv))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environment = launch.prepare_deepspeed_cmd_env(args)
    elif args.use_fsdp or args.multi_gpu:
        environment = launch.prepare_multi_gpu_env(args)
    else:
        _, environment = launch.prepare_simple_launcher_cmd_env(args)
    return {key: value for key, value in environment.items() if key.startswith(PREFIXES)}


def start_accelerator(config: TrainConfig, topology: Topology, *, precision: Precision) -> Accelerator:
    """Start the process group and the Accelerator, and check that they are what the recipe asks for.

    Raises:
        UserError: the strategy needs a launcher or a GPU, another one was started than asked for, or only some of the
            machines have bf16, and the recipe leaves it to them. All ranks raise that together.
    """
    strategy = named_strategy(config.strategy)
    if not launched_by_accelerate():
        strategy = strategy or default_strategy(topology.world_size)
        os.environ.update(config_environment(strategy, topology.world_size))
    _needs_launcher(strategy)
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # before deepspeed is imported, which other packages do, too
    elif topology.local_world_size > 1:  # a process that is alone keeps the cores of both NUMA nodes
        _bind(topology)
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        for line in compile_locks.remove_stale():
            print(line, file=sys.stderr, flush=True)
    accelerator = _accelerator(config, _parallelism(config, strategy, topology), precision=precision, on_cpu=on_cpu)
    if precision is Precision.FP16:
        accelerator.scaler = None  # the engine scales the loss; accelerate's scaler would skip steps
        accelerator.native_amp = accelerator.deepspeed_plugin is None  # accelerate 1.15 computes in float32 on CPUs
    _check(accelerator, config, strategy, topology, precision=precision)
    if (
        config.bf16 == "auto"
        and not config.fp16
        and (what := unlike(gather_object([(socket.gethostname(), precision is Precision.BF16)])))
    ):
        fix = "give --bf16 false to all, or start it on machines that are alike"
        raise UserError(what, where="bf16", fix=fix)
    return accelerator


def unlike(ranks: Sequence[tuple[str, bool]]) -> str | None:
    """Say which machines would compute in another type than the others.

    Args:
        ranks: of each its host, and whether it computes in bf16.
    """
    in_bf16, in_float32 = (
        ", ".join(dict.fromkeys(host for host, has in ranks if has is bf16)) for bf16 in (True, False)
    )
    return f"bf16 auto is bf16 on {in_bf16}, and float32 on {in_float32}" if in_bf16 and in_float32 else None


def _bind(topology: Topology) -> None:
    """Run near this rank's GPU, before the process group and the readers of data have threads."""
    gpu = torch.cuda.get_device_properties(topology.local_rank % torch.cuda.device_count())
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    if (line := numa.bind(address)) and topology.is_main:
        print(f"each process runs on CPUs near its GPU: rank 0 on {line}", flush=True)


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def _needs_launcher(strategy: Strategy | None) -> None:
    if "LOCAL_RANK" not in os.environ and (_flag("ACCELERATE_USE_DEEPSPEED") or _flag("ACCELERATE_USE_FSDP")):
        raise UserError(
            f"strategy {strategy} needs a launcher",
            where="python -m manyrank.train",
            fix=f"start it with `manyrank train ... --strategy {strategy}`, torchrun or accelerate launch",
        )


def copies(config: TrainConfig, topology: Topology) -> tuple[int, int]:
    """Under hsdp, the copies of the model, and the processes that share one; `rules` keep each on one machine."""
    shards = config.hsdp_shard_size or topology.local_world_size
    return topology.world_size // shards, shards


def _parallelism(config: TrainConfig, strategy: Strategy | None, topology: Topology) -> ParallelismConfig | None:
    """The sizes of replicas and shards, where the accelerate config asks for them.

    Raises:
        UserError: accelerate was told other sizes, or nobody said hsdp, and `rules` has not looked at them.
    """
    if not _flag("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return None
    where = "the accelerate config"
    if strategy is None or not strategy.replicas:
        raise UserError("it has a parallelism_config", where=where, fix="give --strategy hsdp with it")
    replicas, shards = copies(config, topology)
    sizes = {"dp_replicate": replicas, "dp_shard": shards, "tp": 1, "cp": 1, "sp": 1}
    for key, size in sizes.items():
        value = os.environ.get(f"PARALLELISM_CONFIG_{key.upper()}_SIZE", "1")
        if value not in ("1", str(size)):  # 1 is also what accelerate says where nobody said anything
            fix = "leave the sizes out; --hsdp_shard_size is the one there is"
            raise UserError(f"{key}_size is {value}, not {size}", where=where, fix=fix)
    # accelerate 1.15 takes the flattened dimension dp_shard_cp out of the mesh (fsdp2_prepare_model), on every rank.
    warnings.filterwarnings("ignore", "Slicing a flattened dim from root mesh", category=UserWarning)
    return ParallelismConfig(**{f"{key}_size": size for key, size in sizes.items()})


def _accelerator(
    config: TrainConfig, parallelism: ParallelismConfig | None, *, precision: Precision, on_cpu: bool
) -> Accelerator:
    # Names that torch 2.13 calls old: accelerate 1.15's for ddp, and DeepSpeed 0.19's, 5 times a micro-batch and rank.
    warnings.filterwarnings(
        "ignore", "`broadcast_buffers` is deprecated|`torch.distributed.* is deprecated", FutureWarning
    )
    options = {"mixed_precision": precision.value}
    options["kwargs_handlers"] = [InitProcessGroupKwargs(timeout=UNHURRIED)]
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        if on_cpu:
            options["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo", timeout=UNHURRIED)]
        return Accelerator(deepspeed_plugin=_deepspeed_plugin(config, precision), **options)
    if _flag("ACCELERATE_USE_FSDP"):
        # Without an accelerator the plugin cannot pin host memory.
        if on_cpu and _flag("FSDP_OFFLOAD_PARAMS"):
            raise UserError("fsdp_offload needs a GPU", where="strategy", fix="use fsdp on CPUs")
        # accelerate would give the loss and the sum of gradients in 16 bits, too.
        dtypes = {"param_dtype": getattr(torch, precision.dtype), "reduce_dtype": torch.float32}
        policy = MixedPrecisionPolicy(**dtypes) if precision.half else None
        # Each rank reads its own part of the weights (models/shards.py); nobody waits for those of rank 0.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        plugin = FullyShardedDataParallelPlugin(mixed_precision_policy=policy, cpu_ram_efficient_loading=False)
        if plugin.fsdp_version != 2:
            raise UserError("FSDP version 1 is not supported", where="the accelerate config", fix="set fsdp_version: 2")
        if not on_cpu:
            return Accelerator(fsdp_plugin=plugin, parallelism_config=parallelism, **options)
        accelerator = Accelerator(fsdp_plugin=plugin, cpu=True, **options)
        promote_to_fsdp(accelerator, plugin, parallelism)
        return accelerator
    ddp = DistributedDataParallelKwargs(
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # the tables of rotary embeddings; they are the same everywhere
    )
    options["kwargs_handlers"].append(ddp)
    return Accelerator(cpu=on_cpu, **options)


def _deepspeed_plugin(config: TrainConfig, precision: Precision) -> DeepSpeedPlugin:
    plugin = DeepSpeedPlugin()
    # The recipe owns these. Accumulation stays 1: the loop itself says which micro-batch is the last of a step.
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    plugin.deepspeed_config["gradient_accumulation_steps"] = 1
    plugin.deepspeed_config["gradient_clipping"] = config.max_grad_norm
    if precision is Precision.FP16:
        plugin.deepspeed_config["fp16"] = {"enabled": True, "loss_scale": 1.0}  # a fixed one, which the engine sets
    if config.pure_bf16:
        kept = dict.fromkeys(("bf16_master_weights_and_grads", "bf16_optimizer_states"), True)
        plugin.deepspeed_config["bf16"] = {"enabled": True, **kept}
    return plugin


def _check(
    accelerator: Accelerator,
    config: TrainConfig,
    strategy: Strategy | None,
    topology: Topology,
    *,
    precision: Precision,
) -> None:
    """Compare what accelerate started with what the recipe asks for; several of the libraries fall back without a word."""
    active = {"processes": accelerator.num_processes, "precision": _precision(accelerator)}
    expected = {"processes": topology.world_size, "precision": precision}
    if strategy:
        active |= {"type": accelerator.distributed_type.value, "ZeRO stage": _zero_stage(accelerator)}
        expected |= {"type": _types(strategy.engine, topology), "ZeRO stage": strategy.zero_stage}
        active |= {"mesh of processes": _mesh(accelerator)}
        expected |= {"mesh of processes": copies(config, topology) if strategy.replicas else ()}
        expected["type"] = active["type"] if active["type"] in expected["type"] else expected["type"][0]
    differ = [
        f"{key} {active[key]}, but the recipe asks for {expected[key]}"
        for key in expected
        if active[key] != expected[key]
    ]
    if differ:
        raise UserError(
            f"accelerate started {'; '.join(differ)}",
            where=f"strategy {strategy}" if strategy else "the accelerate config",
            fix="give accelerate launch the --config_file of the same strategy, or leave --strategy away",
        )


def _types(engine: EngineKind, topology: Topology) -> list[str]:
    if engine is EngineKind.DDP:
        return [EngineKind.DDP, "MULTI_CPU"] + ([EngineKind.SINGLE] if topology.world_size == 1 else [])
    if engine is EngineKind.SINGLE and topology.world_size == 1:  # of one process, but started by torchrun
        return [EngineKind.SINGLE, EngineKind.DDP, "MULTI_CPU"]
    return [engine]


def _mesh(accelerator: Accelerator) -> tuple[int, ...]:
    mesh = accelerator.torch_device_mesh
    return () if mesh is None else tuple(mesh.shape)


def _precision(accelerator: Accelerator) -> str:
    if accelerator.deepspeed_plugin is not None:
        enabled = (name for name in ("bf16", "fp16") if accelerator.deepspeed_plugin.get_value(f"{name}.enabled"))
        return next(enabled, "no")
    return accelerator.mixed_precision


def _zero_stage(accelerator: Accelerator) -> int:
    return accelerator.deepspeed_plugin.zero_stage if accelerator.deepspeed_plugin is not None else 0
