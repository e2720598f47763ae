"""Rules about strategies, their files, and the machine."""

from __future__ import annotations

import os

from ..runs.versions import torch_build
from ..topology.precision import Precision
from ..topology.strategies import EngineKind
from ..topology.strategy_files import is_on
from .context import RunContext
from .rule import error, unless, warning

# What a YAML may not say beside a DeepSpeed JSON (accelerate 1.15, DeepSpeedPlugin._deepspeed_config_checks).
BESIDE_JSON = (
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_stage",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_param_nvme_path",
    "offload_optimizer_nvme_path",
    "zero3_save_16bit_model",
    "mixed_precision",
)
NODE_FACTS = (
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "rdzv_backend",
    "same_network",
    "gpu_ids",
)
OWNED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
ROUNDED = 5e-5  # updates that are lost on weights of more than 0.025, the size of most
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


def _precision(s: RunContext) -> str | None:
    wanted = str(s.files.accelerate.get("mixed_precision") or "no").lower()
    if wanted not in ("no", s.precision):
        return f"mixed_precision {wanted} in {s.files.accelerate_file}, and the recipe computes in {s.precision.label}"
    for name in (Precision.BF16, Precision.FP16):
        enabled = s.files.part(name).get("enabled", "auto")
        if enabled != "auto" and is_on(enabled) != (s.precision is name):
            state = "on" if is_on(enabled) else "off"
            return f"{name} is {state} in {s.files.deepspeed_file}, and the recipe computes in {s.precision.label}"
    return None


def _quantised_twice(s: RunContext) -> str | None:
    zero = s.files.part("zero_optimization")
    keys = [key for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights") if is_on(zero.get(key))]
    return f"method qlora with {keys[0]} in {s.files.deepspeed_file}" if keys and s.config.method == "qlora" else None


def _fp16(s: RunContext) -> str | None:
    if not s.config.fp16:
        return None
    if not s.gpus:
        return "fp16 on a CPU"
    if s.hardware.has_bf16 and s.config.bf16 is False:
        return "fp16 on GPUs that have bf16"
    return f"fp16, and {s.model.name} is stored in bf16" if s.model and s.model.dtype == "bfloat16" else None


def _beside_json(s: RunContext) -> str | None:
    if not s.files.section("deepspeed_config").get("deepspeed_config_file"):
        return None
    # In a process that accelerate has launched, its own default stands there.
    top = [] if s.launched else [key for key in BESIDE_JSON if key in s.files.accelerate]
    keys = top + [key for key in BESIDE_JSON if key in s.files.section("deepspeed_config")]
    return f"{', '.join(keys)} beside deepspeed_config_file in {s.files.accelerate_file}" if keys else None


def _node_facts(s: RunContext) -> str | None:
    keys = [key for key in NODE_FACTS if key in s.files.accelerate]
    return f"{', '.join(keys)} in {s.files.accelerate_file}" if keys else None


def _owned(s: RunContext) -> str | None:
    values = [f"{key}: {s.files.deepspeed[key]}" for key in OWNED if s.files.deepspeed.get(key, "auto") != "auto"]
    return f"{', '.join(values)} in {s.files.deepspeed_file}" if values else None


def _own_optimizer(s: RunContext) -> str | None:
    keys = [key for key in ("optimizer", "scheduler") if key in s.files.deepspeed]
    return f"{' and '.join(keys)} in {s.files.deepspeed_file}" if keys else None


def _stage(s: RunContext) -> str | None:
    """Compare the strategy's files; a config of accelerate launch is compared later (see `parallel.accelerator`)."""
    engine = s.strategy.engine
    if not s.launched and s.files.kind not in (engine, "MULTI_CPU"):
        return f"strategy {s.strategy}, and distributed_type {s.files.kind} in {s.files.accelerate_file}"
    if s.files.kind != engine or s.files.zero_stage == s.strategy.zero_stage:
        return None
    place = s.files.deepspeed_file or "the accelerate config"
    return f"strategy {s.strategy}, and stage {s.files.zero_stage} in {place}"


def _fsdp(key: str, value: str):
    return lambda s: s.files.kind == EngineKind.FSDP and str(s.files.section("fsdp_config").get(key)).lower() == value


def _spreads(s: RunContext) -> bool:
    return s.files.kind in (EngineKind.FSDP, EngineKind.DEEPSPEED)


def _of_matrices(s: RunContext) -> str | None:
    under_fsdp = s.config.optim == "muon" and s.files.kind == EngineKind.FSDP and not s.files.offloads_parameters
    refused = s.config.optim in ("adafactor", "muon") and _spreads(s) and not under_fsdp
    return f"{s.config.optim} under {s.strategy}" if refused else None


ONE_PROCESS = error(
    "processes-of-single",
    ("strategy",),
    unless(
        lambda s: s.strategy.engine is EngineKind.SINGLE and s.world_size > 1,
        "strategy single with {s.world_size} processes",
    ),
    reason="It has no process group: each process would train by itself and write the same folder.",
    fix="use ddp, or one process",
)
FLOAT8_NATIVE = error(
    "float8-not-native",
    ("method",),
    unless(
        lambda s: s.config.method == "fp8" and not all(gpu.has_float8 for gpu in s.hardware.gpus),
        "method fp8 on GPUs without float8 products ({s.hardware.smallest_gpu.name})",
    ),
    reason="Tensor cores multiply float8 from compute capability 8.9 on: Ada, Hopper, Blackwell.",
    fix="use method int8, qlora or lora",
)
MACHINE_RULES = (
    ONE_PROCESS,
    error(
        "processes-beyond-gpus",
        ("nproc",),
        unless(lambda s: bool(s.gpus) and s.nproc > s.gpus, "{s.nproc} processes on a machine with {s.gpus} GPUs"),
        reason="Each process needs a GPU of its own: NCCL refuses two on one.",
        fix="start at most one process for each GPU (--nproc)",
    ),
    error(
        "bf16-not-native",
        ("bf16",),
        unless(lambda s: s.config.bf16 is True and not s.hardware.has_bf16, "bf16 is not supported by this machine"),
        reason="GPUs before Ampere, and CPUs without AVX512-BF16 or AMX, emulate it: slower than float32.",
        fix="set bf16: false, or fp16: true on GPUs",
    ),
    warning(
        "float32-on-gpus",
        ("bf16",),
        unless(lambda s: bool(s.gpus) and not s.precision.half, "the GPUs compute in float32"),
        reason="It takes twice the memory of 16 bits and much more time, and attention over packed rows has no fast kernel "
        "for it.",
        fix="set bf16: auto, or fp16: true on GPUs before Ampere",
    ),
    error(
        "fp16-where-bf16-is",
        ("fp16", "bf16"),
        unless(
            lambda s: s.config.fp16 and s.config.bf16 == "auto" and bool(s.gpus) and s.hardware.has_bf16,
            "fp16 on GPUs that have bf16",
        ),
        reason="fp16 ends at 65504, needs a loss scale, and is not faster there.",
        fix="set bf16: true in its place, or insist on fp16 with bf16: false beside it",
    ),
    warning(
        "fp16",
        ("fp16",),
        _fp16,
        reason="fp16 ends at 65504, and models that were trained in bf16 may go beyond it: the loss is inf or nan, and the run "
        "stops. It is for GPUs before Ampere (T4, V100), where bf16 is emulated.",
        fix="leave fp16 out where the machine has bf16; elsewhere bf16: false computes in float32",
        upstream="https://github.com/QwenLM/Qwen3/issues/868",
    ),
    error(
        "pure-bf16-elsewhere",
        ("pure_bf16", "bf16", "fp16"),
        unless(
            lambda s: s.config.pure_bf16 and s.precision is not Precision.BF16,
            "pure_bf16, and the run computes in {s.precision.label}",
        ),
        reason="Weights that are kept in bf16 are computed in bf16.",
        fix="set bf16: true, or leave pure_bf16 out",
    ),
    error(
        "pure-bf16-offloaded",
        ("pure_bf16", "strategy"),
        unless(
            lambda s: s.config.pure_bf16 and s.strategy.offload and s.strategy.engine is EngineKind.DEEPSPEED,
            "pure_bf16 under {s.strategy}",
        ),
        reason="DeepSpeed's AdamW on the host keeps float32.",
        fix="use fsdp_offload, or leave pure_bf16 out",
    ),
    warning(
        "pure-bf16-rounds",
        ("pure_bf16", "learning_rate"),
        unless(
            lambda s: s.config.pure_bf16 and s.config.optim != "sgd" and s.config.learning_rate < ROUNDED,
            "pure_bf16 with learning_rate {c.learning_rate}",
        ),
        reason="bf16 has 8 bits: an update below 1/512 of a weight is rounded away, and updates are about as large as the learning rate.",
        fix="raise learning_rate, or leave pure_bf16 out; optim: adamw_8bit takes 10 bytes of a weight",
    ),
    FLOAT8_NATIVE,
    error(
        "float8-on-rocm",
        ("method",),
        unless(
            lambda s: s.config.method == "fp8" and not s.gpus and bool(torch_build().get("hip")),
            "method fp8 with a torch for AMD's GPUs",
        ),
        reason="Under ROCm an MI300 multiplies another float8 type, e4m3fnuz; fp8 is for NVIDIA's GPUs and for CPUs.",
        fix="use method lora or full",
    ),
    error(
        "float8-in-float32",
        ("method", "bf16"),
        unless(
            lambda s: s.config.method == "fp8" and bool(s.gpus) and s.precision is not Precision.BF16,
            "method fp8 on GPUs, and not in bf16",
        ),
        reason="Products of float8 rows with scales of their own come out in bf16 on CUDA.",
        fix="set bf16: auto, or use method lora",
    ),
    error(
        "accumulation-in-environment",
        (f"environment:{ACCUMULATION}",),
        unless(
            lambda s: os.environ.get(ACCUMULATION, "1") not in ("", "1"),
            f"{ACCUMULATION} is set",
        ),
        reason="accelerate divides every loss by it, without a word: gradients would be that much too small.",
        fix=f"unset {ACCUMULATION}; the recipe's gradient_accumulation_steps or global_batch_size says it",
        upstream="https://huggingface.co/docs/accelerate/package_reference/accelerator",
    ),
)

SHARDING_RULES = (
    error(
        "offload-without-gpu",
        ("strategy",),
        unless(
            lambda s: s.files.kind == EngineKind.FSDP and s.files.offloads_parameters and not s.gpus,
            "{s.strategy} without GPUs",
        ),
        reason="FSDP's offload moves shards between host and GPU memory.",
        fix="use fsdp on CPUs",
    ),
    warning(
        "shards-of-one",
        ("strategy",),
        unless(
            lambda s: s.files.sharded and s.world_size == 1 and not s.files.offloads_parameters,
            "strategy {s.strategy} with one process",
        ),
        reason="The only shard is the whole model: it costs time and saves no memory.",
        fix="use strategy single, or more processes",
    ),
    error(
        "int8-in-shards",
        ("method", "strategy"),
        unless(lambda s: s.config.method == "int8" and s.files.sharded, "method int8 under {s.strategy}"),
        reason="FSDP and ZeRO-3 shard floating-point parameters; 8-bit weights are integers, with statistics beside them.",
        fix="use method qlora, or strategy ddp or zero2",
        upstream="https://github.com/huggingface/peft/issues/2833",
    ),
    error(
        "qlora-with-quantised-weights",
        ("method", "json:zero_optimization"),
        _quantised_twice,
        reason="DeepSpeed would round the bytes of the 4-bit base as if they were numbers.",
        fix="take it out of the file",
    ),
    error(
        "float8-in-shards",
        ("method", "strategy"),
        unless(lambda s: s.config.method == "fp8" and s.files.sharded, "method fp8 under {s.strategy}"),
        reason="A base in float8 is bytes, with scales beside them, and FSDP and ZeRO-3 shard floating-point parameters.",
        fix="use method lora or qlora, or strategy ddp or zero2",
    ),
    error(
        "optimizer-in-shards",
        ("optim", "strategy"),
        unless(
            lambda s: _spreads(s) and ("8bit" in s.config.optim or "paged" in s.config.optim),
            "{c.optim} under {s.strategy}",
        ),
        reason="bitsandbytes' optimizers keep 8-bit or paged state that FSDP and DeepSpeed cannot shard: under FSDP2 they "
        "end in illegal memory accesses.",
        fix="use optim adamw_torch: sharding makes its state small already",
        upstream="https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1633",
    ),
    error(
        "matrices-in-shards",
        ("optim", "strategy"),
        _of_matrices,
        reason="Adafactor and Muon look at whole matrices. DeepSpeed hands pieces of a flat row to its optimizer, and Adafactor "
        "takes no sharded tensors.",
        fix="use optim adamw_torch; or muon under fsdp, adafactor under ddp",
    ),
    error(
        "sgd-under-offload",
        ("optim", "strategy"),
        unless(
            lambda s: s.config.optim in ("sgd", "lion_32bit") and s.files.offloads_optimizer,
            "{c.optim} under {s.strategy}",
        ),
        reason="DeepSpeed steps on the CPU with an AdamW of its own, and knows no other optimizer there.",
        fix="use optim adamw_torch",
    ),
    warning(
        "qlora-under-zero-offload",
        ("method", "strategy"),
        unless(
            lambda s: s.config.method == "qlora" and s.files.zero_stage == 3 and s.files.offloads_parameters,
            "qlora under {s.strategy}",
        ),
        reason="With a 4-bit base, ZeRO-3 takes more GPU memory with offload than without.",
        fix="use strategy zero3 or fsdp",
        upstream="https://huggingface.co/docs/peft/accelerate/deepspeed#caveats",
    ),
)

HSDP_RULES = (
    error(
        "shard-size-without-hsdp",
        ("hsdp_shard_size", "strategy"),
        unless(
            lambda s: bool(s.config.hsdp_shard_size) and not s.strategy.replicas, "hsdp_shard_size under {s.strategy}"
        ),
        reason="It says how many processes share one copy of the model, and only hsdp has several copies of shards.",
        fix="give --strategy hsdp, or leave hsdp_shard_size out",
    ),
    error(
        "hsdp-without-shards",
        ("strategy",),
        unless(lambda s: s.strategy.replicas and s.shards == 1, "hsdp with one process on a machine"),
        reason="A copy of the model lies on one machine, and there is nothing to shard.",
        fix="use ddp, or more processes on each machine (--nproc)",
    ),
    error(
        "hsdp-copies-in-machines",
        ("hsdp_shard_size", "strategy"),
        unless(
            lambda s: s.strategy.replicas and bool(s.nproc % s.shards or s.world_size % s.shards),
            "the {s.nproc} processes of this machine, or all {s.world_size}, do not divide into copies of {s.shards}",
        ),
        reason="The shards of a copy are gathered for every layer, which is what the links inside a machine are for.",
        fix="let every machine have as many processes, and hsdp_shard_size divide them",
    ),
    error(
        "hsdp-of-one-copy",
        ("strategy", "hsdp_shard_size"),
        unless(
            lambda s: s.strategy.replicas and s.world_size < 2 * s.shards and not s.world_size % s.shards,
            "hsdp with one copy of the model, on {s.world_size} processes",
        ),
        reason="With one copy accelerate takes plain FSDP, without a word.",
        fix="use fsdp, or several machines (--nnodes), or copies on a part of the machine (--hsdp_shard_size)",
    ),
    error(
        "elastic-hsdp",
        ("elastic", "strategy", "hsdp_shard_size"),
        unless(
            lambda s: s.strategy.replicas and s.config.elastic and s.nproc < 2 * s.shards,
            "an elastic run under hsdp",
        ),
        reason="It may end on one machine, and hsdp needs two copies of the model.",
        fix="use fsdp, or leave elastic out",
    ),
)

FILE_RULES = (
    error(
        "precision-against-recipe",
        ("yaml:mixed_precision", "json:bf16.enabled", "json:fp16.enabled", "bf16", "fp16"),
        _precision,
        reason="Two places say the precision, and differently.",
        fix="leave it to the recipe: mixed_precision: 'no' in the YAML, \"auto\" in the JSON",
    ),
    error(
        "fsdp-checkpointing",
        ("yaml:fsdp_config.fsdp_activation_checkpointing", "gradient_checkpointing"),
        unless(
            _fsdp("fsdp_activation_checkpointing", "true"),
            "fsdp_activation_checkpointing in {s.files.accelerate_file}",
        ),
        reason="accelerate wraps each layer, and saved tensors carry the wrapper's name (_checkpoint_wrapped_module): no "
        "library finds them again, and an adapter loads as if it were not trained. With gradient_checkpointing every layer "
        "is gathered and recomputed twice.",
        fix="set it to false, and gradient_checkpointing: full in the recipe",
        upstream="https://github.com/huggingface/transformers/issues/30404",
    ),
    error(
        "fsdp-version",
        ("yaml:fsdp_config.fsdp_version",),
        unless(
            lambda s: s.files.kind == EngineKind.FSDP and not _fsdp("fsdp_version", "2")(s),
            "FSDP version 1 in {s.files.accelerate_file}",
        ),
        reason="Version 1 takes parameters their names and shapes, and checkpoints here go by both: a resumed adapter would "
        "start from its first values. It is also what accelerate takes where the file says nothing.",
        fix="set fsdp_version: 2",
    ),
    warning(
        "one-fsdp-unit",
        ("yaml:fsdp_config.fsdp_auto_wrap_policy",),
        unless(_fsdp("fsdp_auto_wrap_policy", "no_wrap"), "fsdp_auto_wrap_policy NO_WRAP in {s.files.accelerate_file}"),
        reason="The whole model is one unit: every rank gathers all of it in each forward and backward.",
        fix="set TRANSFORMER_BASED_WRAP",
    ),
    error(
        "processes-of-multi-cpu",
        ("yaml:distributed_type",),
        unless(lambda s: s.files.kind == "MULTI_CPU", "distributed_type MULTI_CPU in {s.files.accelerate_file}"),
        reason="accelerate launch then starts one process, without a word.",
        fix="set MULTI_GPU; the train module uses the CPU where there is no GPU",
        upstream="https://github.com/huggingface/accelerate/issues/2741",
    ),
    error(
        "cpu-beside-gpus",
        ("yaml:use_cpu",),
        unless(
            lambda s: bool(s.gpus) and is_on(s.files.accelerate.get("use_cpu")),
            "use_cpu in {s.files.accelerate_file}, and {s.gpus} GPUs",
        ),
        reason="The train module uses GPUs wherever there are some, and so does all that was checked here.",
        fix="set use_cpu: false; to train on the CPU hide the GPUs: CUDA_VISIBLE_DEVICES=''",
    ),
    warning(
        "node-facts-in-config",
        ("yaml:num_processes",),
        _node_facts,
        reason="They are flags here (--nproc, --nnodes, --node_rank, --rdzv_endpoint), and the flags win; several of the "
        "keys are ignored by accelerate itself.",
        fix="take them out of the file",
    ),
    error(
        "compiled-twice",
        ("yaml:dynamo_config.dynamo_backend", "torch_compile"),
        unless(
            lambda s: (
                s.config.torch_compile
                and str(s.files.section("dynamo_config").get("dynamo_backend") or "NO").upper() != "NO"
            ),
            "dynamo_config in {s.files.accelerate_file} and torch_compile together",
        ),
        reason="The recipe compiles each layer; accelerate would compile the model around them once more.",
        fix="keep torch_compile, and take dynamo_config out of the file",
    ),
    error(
        "keys-beside-deepspeed-json",
        ("yaml:deepspeed_config.deepspeed_config_file",),
        _beside_json,
        reason="accelerate refuses to start where both files say such a thing.",
        fix="say it in the JSON, or leave it to the recipe",
    ),
    error(
        "batch-in-deepspeed-json",
        ("json:train_micro_batch_size_per_gpu", "global_batch_size", "max_grad_norm"),
        _owned,
        reason="The recipe owns batch, accumulation and clipping. The train module overwrites them, all but "
        "train_batch_size, with which DeepSpeed then refuses to start.",
        fix='write "auto", or leave it out',
    ),
    error(
        "optimizer-in-deepspeed-json",
        ("json:optimizer", "json:scheduler", "optim", "lr_scheduler_type"),
        _own_optimizer,
        reason="The recipe owns both. accelerate refuses a second optimizer, and a second schedule changes the learning "
        "rate behind the first.",
        fix="take it out of the JSON; optim, learning_rate and lr_scheduler_type say it",
    ),
    error(
        "files-of-another-name",
        ("strategy", "yaml:distributed_type"),
        _stage,
        reason="The plan, the rules and the run's record go by a strategy's name.",
        fix="choose the strategy of those files, or fix them",
    ),
)
STRATEGY_RULES = (*MACHINE_RULES, *SHARDING_RULES, *HSDP_RULES, *FILE_RULES)
