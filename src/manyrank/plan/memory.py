"""Bytes of one GPU while a recipe runs, from arithmetic alone.

    always there    CUDA context, weights, adapters, optimizer states
    loss            + all activations, the head's chunk, gathered embedding and head
    backward        + all activations, one recomputed layer and its gradients, gathered layers, a dequantised matrix
    end of backward + all gradients, one layer and its gradients, gathered layers
    step            + all gradients, what the optimizer needs for a moment
    answers         of grpo: + the key-value cache of a process's answers, and the weights that it does not hold itself

The peak is the greatest of these moments. Its parts are derived from what each strategy allocates (see `parallel` and
the files in accelerate_configs/ and ds_configs/), not fitted to measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from ..models.spec import Layer
from ..topology import strategy_files
from ..topology.strategies import EngineKind
from . import activations
from .planned_run import PlannedRun

MiB, GiB = 2**20, 2**30
FLOAT, ADAM = 4, 8  # bytes of an element: of float32, of AdamW's two moments
# What a process holds on a GPU before its first tensor: context and kernels of CUDA, cuBLAS's workspace; with several
# processes NCCL's channels, too.
CONTEXT, NCCL = 600 * MiB, 400 * MiB
# The caching allocator rounds up, and keeps blocks that do not fit the next request.
SLACK = 0.1
LOGITS_CHUNK = 256 * MiB  # see fused_head.CHUNK
NF4_BLOCK, NF4_NESTED = 64, 256  # elements that share a constant; constants that share another
NF4_ON_CPU = 14  # bytes of an element while bitsandbytes 0.50 quantises it on a CPU, in float32
BNB_SMALL, BNB_BLOCK = 4096, 256  # elements, of bitsandbytes' 8-bit optimizers
# Bytes of an element's moments in host memory.
PAGED = {"paged_adamw_32bit": ADAM, "paged_adamw_8bit": 2, "paged_lion_32bit": FLOAT, "paged_lion_8bit": 1}
ZERO_DEFAULTS = {
    "reduce_bucket_size": 5 * 10**8,
    "stage3_max_live_parameters": 10**9,
    "stage3_max_reuse_distance": 10**9,
}
HOST_PROCESS = 3 * GiB  # libraries, CUDA's host side, the data's buffers


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at its peak, and of one machine's host memory.

    Attributes:
        parts: bytes by what they are for; together the peak.
        moment: of a step, when the peak comes: loss, backward, end of backward or step.
        loading: peak while the model is loaded.
        host: of all processes of a machine while they train.
        host_loading: the same while the model is loaded, files of weights that are only mapped left out.
    """

    parts: Mapping[str, int]
    moment: str
    loading: int
    host: int
    host_loading: int

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """Bytes that a GPU must have."""
        return max(self.peak, self.loading)


def estimate(run: PlannedRun) -> Memory:
    """Estimate the memory of a run."""
    lasting = _lasting(run)
    moments = {name: {**lasting, **moment} for name, moment in _moments(run).items()}
    name = max(moments, key=lambda key: sum(moments[key].values()))
    parts = {key: value for key, value in moments[name].items() if value}
    parts["slack"] = int(SLACK * sum(value for key, value in parts.items() if key not in (*lasting, "gradients")))
    context = _context(run)
    return Memory(
        parts={"context": context, **parts} if context else parts,
        moment=name,
        loading=context + _loading(run),
        host=run.nproc * (HOST_PROCESS + _offloaded(run)),
        host_loading=run.nproc * HOST_PROCESS + _host_loading(run),
    )


def _context(run: PlannedRun) -> int:
    return (CONTEXT + (NCCL if run.world > 1 else 0)) if run.gpu else 0


# Weights


def linear_bytes(weights: int, method: str, *, element: int) -> int:
    """Bytes of a matrix's weights as a method stores them, constants of its quantisation not counted.

    Args:
        element: bytes of an element that is not quantised.
    """
    return {"qlora": weights // 2, "int8": weights, "fp8": weights}.get(method, weights * element)


def constant_bytes(weights: int, outputs: int, method: str, *, nested: bool) -> int:
    """Bytes of the constants with which a quantised matrix is read, that no strategy shards."""
    if method in ("int8", "fp8"):
        return FLOAT * outputs
    if method != "qlora":
        return 0
    blocks = math.ceil(weights / NF4_BLOCK)
    if not nested:
        return FLOAT * (blocks + 16)  # and the table
    codes = FLOAT * (16 + 256 + 1)  # both tables, and the mean
    return blocks + FLOAT * math.ceil(blocks / NF4_NESTED) + codes


def _element(run: PlannedRun) -> int:
    """Bytes of a weight that is not quantised, as it lasts; what full fine-tuning trains is float32 but under DeepSpeed."""
    return run.kept if run.full and run.strategy.engine is not EngineKind.DEEPSPEED else run.compute


def layer_weights(run: PlannedRun, layer: Layer) -> int:
    """Bytes of one layer's base weights, constants not counted."""
    element, method = _element(run), run.config.method
    linears = sum(
        linear_bytes(linear.weights, method, element=element) + linear.bias * linear.outputs * element
        for linear in layer.linears.values()
    )
    experts = layer.experts.parameters if layer.experts else 0
    return linears + (experts + layer.rest) * element


def outside_weights(run: PlannedRun) -> int:
    """Bytes of embedding, final norm and head."""
    return run.shape.outside * _element(run)


def base_weights(run: PlannedRun) -> tuple[int, int]:
    """Bytes of the whole base: what can be sharded, and constants that every process keeps."""
    method, layers, nested = run.config.method, run.shape.layers, run.config.bnb_4bit_use_double_quant is not False
    constants = sum(
        layer.count * constant_bytes(linear.weights, linear.outputs, method, nested=nested)
        for layer in layers
        for linear in layer.linears.values()
    )
    weights = sum(layer.count * layer_weights(run, layer) for layer in layers) + outside_weights(run)
    if run.full:  # what is frozen is in the type of the computation
        weights -= (run.shape.parameters - run.trainable) * (_element(run) - run.compute)
    return weights, constants


# What lasts


def _lasting(run: PlannedRun) -> dict[str, int]:
    """Bytes by part that are there all the time."""
    weights, constants = base_weights(run)
    shards = run.shards if run.sharded else 1
    off, whole = run.strategy.offload, run.strategy.zero_stage == 3  # see parallel.zero3_preparation
    return {
        "weights": constants + (0 if off else weights // shards),
        "adapters": 0 if run.full or (off and not whole) else _adapters(run, 1 if whole else shards),
        "optimizer": 0 if off else _optimizer(run),
    }


def _adapters(run: PlannedRun, shards: int) -> int:
    # float32 masters; DeepSpeed works on 16-bit ones and keeps its masters with the optimizer. Of grpo a frozen copy.
    copies = 2 if run.config.is_grpo and run.config.beta else 1
    held = copies * run.trainable + run.frozen_adapters
    masters = held * (run.compute if run.strategy.engine is EngineKind.DEEPSPEED else FLOAT) // shards
    return masters + (run.compute * (run.trainable - run.whole_outside) if _casts_adapters(run) else 0)


def _casts_adapters(run: PlannedRun) -> bool:
    """Whether the process keeps a copy of its adapters in 16 bits, see `lora.AdapterCasts`."""
    whole = run.strategy.engine in (EngineKind.SINGLE, EngineKind.DDP)
    return run.half and whole and "lora" not in run.config.disable_fused


def _optimizer(run: PlannedRun) -> int:
    """Bytes of optimizer states of one process (for DeepSpeed also of float32 masters)."""
    spread = run.shards if run.strategy.shards else 1
    masters = run.kept * run.trainable if run.strategy.engine is EngineKind.DEEPSPEED and run.half else 0
    return (states(run, run.config.optim) + masters) // spread


def states(run: PlannedRun, optim: str) -> int:
    """Bytes of an optimizer's states for all that is trained; paged ones live in host memory.

    bitsandbytes keeps a byte of an element's moment and a constant for 256, and moments of small tensors in float32.
    """
    options, moments = run.config.optim_args, 1 if "lion" in optim else 2
    if optim.startswith("paged"):
        return 0
    if optim == "adafactor":
        return FLOAT * (_factors(run) + (run.trainable if options.get("beta1") is not None else 0))
    if optim == "muon":  # one moment of matrices, two of the rest
        return run.kept * (run.trainable + (_beside_matrices(run) if run.full else 0))
    if optim == "sgd":
        return run.kept * run.trainable if options.get("momentum") else 0
    if "8bit" not in optim:
        return moments * run.kept * run.trainable

    def of_tensor(size: int) -> int:
        small = size < options.get("min_8bit_size", BNB_SMALL)
        return moments * (FLOAT * size if small else size + FLOAT * math.ceil(size / BNB_BLOCK))

    return int(sum(count * of_tensor(size) for count, size in run.tensors))


def _factors(run: PlannedRun) -> int:
    """Elements of Adafactor's second moments: a row and a column of each matrix, and vectors whole."""
    shape, rank = run.shape, run.config.lora_r
    if not run.full:
        return int(sum(count * (size // rank + rank) for count, size in run.tensors))
    total = (1 if shape.tied else 2) * (shape.vocabulary + shape.hidden) + shape.final_norm
    for layer in shape.layers:
        linears = sum(x.inputs + x.outputs + x.bias * x.outputs for x in layer.linears.values())
        experts = layer.experts
        stacked = experts.number * (3 * experts.intermediate + 2 * experts.hidden) if experts else 0
        total += layer.count * (linears + stacked + layer.rest)
    return _trained(run, total)


def _beside_matrices(run: PlannedRun) -> int:
    """Elements that AdamW has beside Muon: embedding, lm_head, stacked experts, vectors."""
    matrices = sum(layer.count * sum(x.weights for x in layer.linears.values()) for layer in run.shape.layers)
    return _trained(run, run.shape.parameters - matrices)


def _trained(run: PlannedRun, size: int) -> int:
    """The part of a size of the whole model that full fine-tuning trains."""
    return size * run.trainable // run.shape.parameters


def _gradients(run: PlannedRun) -> int:
    """Bytes of all gradients of one process between backward and step."""
    if run.strategy.offload:
        return 0
    element = run.compute if run.strategy.engine is EngineKind.DEEPSPEED else run.kept
    return run.trainable * element // (run.shards if "gradients" in run.strategy.shards else 1)


def _earlier_gradients(run: PlannedRun) -> int:
    """Bytes of gradients beside a micro-batch's activations: of the step's earlier ones, or that are never given back."""
    if (
        run.strategy.engine is EngineKind.DDP or run.strategy.zero_stage == 3
    ):  # views of DDP's buckets, of a flat buffer
        return _gradients(run)
    if not accumulates(run):
        return 0
    if (
        run.strategy.engine is EngineKind.FSDP and not run.full
    ):  # adapters are reduced once a step, and whole until then
        return run.trainable * FLOAT
    return _gradients(run)


# Moments of a step


def _moments(run: PlannedRun) -> dict[str, dict[str, int]]:
    saved, gradients, before = activations.saved(run), _gradients(run), _earlier_gradients(run)
    layers = run.shape.layers
    recomputed = max(activations.again(run, layer) for layer in layers)
    working = max(_working(run, layer) for layer in layers) + _dequantised(run)
    gathered = _gathered_layers(run)
    return {
        "loss": {
            "activations": saved + activations.cached_casts(run),
            "gradients": before,
            "head and loss": _head(run),
            "gathered": _gathered_outside(run),
        },
        "backward": {
            "activations": saved + (recomputed if run.checkpointed else 0),
            "gradients": before + _buckets(run),
            "head and loss": _head_gradient(run),
            "working": working,
            "gathered": _gathered_outside(run) + _reduced_outside(run) + gathered,
        },
        # The first layer's backward: all others have given their gradients.
        "end of backward": {
            "activations": recomputed,
            "gradients": max(before, gradients) + _buckets(run),
            "head and loss": run.shape.embedding * run.kept if run.full and run.trains_head and not run.sharded else 0,
            "working": working,
            "gathered": gathered,
        },
        "step": {"gradients": gradients, "working": _step(run)},
        **({"answers": _answers(run)} if run.config.is_grpo else {}),
    }


def _answers(run: PlannedRun) -> dict[str, int]:
    """Prompt and answer have max_length tokens together; all of a process's answers grow at once."""
    answers, shape = run.config.batch(run.world) // run.world, run.shape
    token = sum(layer.count * (layer.attention.key + layer.attention.value) for layer in shape.layers) * run.compute
    weights = base_weights(run)[0] if run.sharded else 0
    return {
        "cache": answers * run.config.max_length * token,
        "gathered": weights - weights // run.shards,
        "head and loss": answers * shape.vocabulary * (run.compute + FLOAT),
    }


def accumulates(run: PlannedRun) -> bool:
    """Whether a step has several micro-batches."""
    return run.config.batch(run.world) > run.config.micro_batch * run.world


def _fused(run: PlannedRun) -> bool:
    return run.shape.head_as_is and "lm_head" not in run.config.disable_fused and not run.adapts_head


def _head_gradient(run: PlannedRun) -> int:
    """Bytes that the lm_head keeps from the forward: gradients of hidden states, and of its own weights if trained."""
    if not _fused(run):
        # The probabilities in float32, their gradient, and what a change of the logits keeps.
        changed = 0 if run.shape.head_as_is else run.compute
        copied = run.shape.embedding * run.compute if run.head_rows else 0
        return run.tokens * run.shape.vocabulary * (2 * FLOAT + changed) + copied
    hidden = run.tokens * run.shape.hidden * run.compute
    return hidden + FLOAT * (run.shape.embedding if run.trains_head else run.head_rows * run.shape.hidden)


def _head(run: PlannedRun) -> int:
    """Bytes of head and loss at their peak, every token taken for a supervised one."""
    logits = run.tokens * run.shape.vocabulary
    if not _fused(run):
        return logits * (run.compute + FLOAT) + _head_gradient(run)  # and the logits in both types
    chunk = min(LOGITS_CHUNK, logits * run.compute)
    weight = run.shape.embedding * run.compute
    shares = min(LOGITS_CHUNK, logits * FLOAT)
    # Logits and their softmax; of a trained head also a chunk's share of its gradient, and its weights cast.
    trained = max(0, weight - shares) if run.trains_head else 0
    cast = run.head_rows or run.autocast or (run.trains_head and not run.full and run.half)
    return chunk + shares + trained + (weight if cast else 0) + _head_gradient(run)


def _working(run: PlannedRun, layer: Layer) -> int:
    """Bytes of gradients between the operations of one layer's backward."""
    attention, experts = layer.attention, layer.experts
    inner = max((linear.inputs for name, linear in layer.linears.items() if name in ("down_proj", "c_proj")), default=0)
    inner = max(inner, experts.intermediate * experts.per_token if experts else 0)
    gated = bool(experts) or "c_fc" not in layer.linears
    widths = max((3 if gated else 2) * inner, attention.query + attention.key + attention.value + attention.output)
    # Of the residual, and of a norm in float32 that is not one operation.
    hidden = run.shape.hidden * (2 * run.compute + (0 if run.shape.norm == "layer" else 2 * FLOAT))
    return run.tokens * (widths * run.compute + hidden)


def _dequantised(run: PlannedRun) -> int:
    """A matrix of 4 or 8 bits is written out in 16 for each product; one in float8 is transposed for the backward's.

    Rows in float8 come when other gradients of the layer are gone.
    """
    element = {"qlora": run.compute, "int8": run.compute, "fp8": 1}.get(run.config.method, 0)
    element += 3 * FLOAT if run.config.use_dora else 0  # the matrix, its adapter written out, and their sum
    return _largest_matrix(run) * element


def _largest_matrix(run: PlannedRun) -> int:
    return max(linear.weights for layer in run.shape.layers for linear in layer.linears.values())


def _step(run: PlannedRun) -> int:
    """Bytes that an optimizer needs temporarily: DeepSpeed's float32 copy of its gradients, an update of the largest matrix."""
    if run.full and run.config.optim in ("adafactor", "muon"):
        outside = run.shape.embedding if run.config.optim == "adafactor" else 0
        return 3 * FLOAT * max(outside, _largest_matrix(run))
    if run.strategy.engine is not EngineKind.DEEPSPEED or not run.half or run.strategy.offload:
        return 0
    own = run.trainable // run.shards
    return run.kept * min(own, 10**9 if run.sharded else own)  # ZeRO-3 steps in groups of 1e9


# What sharding gathers


def _bits(run: PlannedRun, layer: Layer) -> int:
    """Bytes of one layer as it is gathered: as stored where it is quantised, else in the type of computation."""
    adapters = sum(run.adapters(layer)) * run.compute
    if run.full and run.strategy.engine is not EngineKind.DEEPSPEED:
        return layer.parameters * run.compute
    return layer_weights(run, layer) + adapters


def _gathered_outside(run: PlannedRun) -> int:
    """The head and its norm, which stay gathered from the forward to the backward."""
    return run.shape.embedding * run.compute if run.sharded else 0


def _reduced_outside(run: PlannedRun) -> int:
    """Gradients of a trained head while they are reduced in float32."""
    reduces = run.full and run.trains_head and run.strategy.engine is EngineKind.FSDP
    return run.shape.embedding * (run.compute + FLOAT) if reduces else 0


def _gathered_layers(run: PlannedRun) -> int:
    """Layers in full at one time, and the buffers that gather them or spread their gradients."""
    if not run.sharded:
        return 0
    largest = max(_bits(run, layer) for layer in run.shape.layers)
    if run.strategy.engine is EngineKind.DEEPSPEED:
        settings = zero_settings(run)
        # Weights that come back within so many elements are kept: those around the turn from forward to backward.
        live = min(settings["stage3_max_live_parameters"], settings["stage3_max_reuse_distance"] // 2) * run.compute
        trained = 2 * largest if run.full else 0  # gradients of a layer, and the buffer that reduces them
        bucket = run.shape.hidden**2 * run.compute  # accelerate's size of it
        return max(2 * largest, min(base_weights(run)[0], live)) + trained + bucket
    # This layer and the next one; of several processes the buffer of the gathering, of shards on the host their copies.
    gathered = (3 if run.shards > 1 else 2) * largest
    gathered += 2 * largest // run.shards if run.strategy.offload else 0
    if run.full:  # gradients of a layer, and their float32 copy to be reduced
        gathered += max(layer.parameters for layer in run.shape.layers) * (run.compute + FLOAT)
    return gathered


def _buckets(run: PlannedRun) -> int:
    """Buffers in which ZeRO-2 reduces gradients, two of them in turns."""
    if run.strategy.zero_stage != 2:
        return 0
    return 2 * zero_settings(run)["reduce_bucket_size"] * run.compute


def zero_settings(run: PlannedRun) -> dict:
    """`zero_optimization` of the run's DeepSpeed file, with DeepSpeed's defaults for what it leaves open."""
    files = run.context.launched or _read_files(run.strategy.name)
    numbers = {key: value for key, value in files.part("zero_optimization").items() if isinstance(value, int | float)}
    return ZERO_DEFAULTS | numbers


_read_files = cache(strategy_files.read)  # a plan asks for them hundreds of times


# Loading and the host


def _loading(run: PlannedRun) -> int:
    """Bytes on a GPU while the model is loaded (models/shards.py): what lasts, and the largest piece beside it."""
    weights, constants = base_weights(run)
    deepspeed = run.strategy.engine is EngineKind.DEEPSPEED
    if run.full and run.sharded and deepspeed:  # in float32 until DeepSpeed has it in the type of the computation
        weights = run.shape.parameters * run.kept
    held = 0 if run.strategy.offload else weights // (run.shards if run.sharded else 1)
    held += constants + (0 if run.full else FLOAT * run.trainable)
    embedding = run.shape.embedding * _element(run) if run.sharded else 0
    if run.sharded and deepspeed:  # which makes room for a whole weight before it has its part
        embedding += embedding // run.shards
    if run.config.method in ("qlora", "int8", "fp8"):
        # A matrix in 16 bits, and quantised where only a part of it lasts; float8 has another one, times its scales.
        matrix = _largest_matrix(run) * run.compute
        matrix += matrix // 4 if run.sharded else matrix if run.config.method == "fp8" else 0
        if run.config.method == "qlora" and not run.gpu:
            matrix = _largest_matrix(run) * NF4_ON_CPU
        return held + max(matrix, embedding)
    if not run.sharded or not (deepspeed or run.full):
        return held
    layers = (layer_weights(run, layer) for layer in run.shape.layers)
    return held + max(embedding, *layers)


def _offloaded(run: PlannedRun) -> int:
    """Bytes in host memory for one process: what an offloading strategy keeps there, or a paged optimizer."""
    if run.strategy.offload:
        weights, _ = base_weights(run)
        adapters = 0 if run.full else _adapters(run, 1)
        kept = run.trainable * run.kept * (2 if run.strategy.engine is EngineKind.DEEPSPEED else 1)
        return (weights + adapters + states(run, run.config.optim) + kept) // run.shards
    return PAGED.get(run.config.optim, 0) * run.trainable


def _host_loading(run: PlannedRun) -> int:
    """Bytes that reading the weights takes in host memory; 16-bit weights are mapped from their file."""
    if run.full and not (run.sharded and run.strategy.engine is EngineKind.DEEPSPEED and not run.strategy.offload):
        return run.nproc * run.shape.parameters * run.kept // (run.shards if run.sharded else 1)
    if run.sharded and run.strategy.offload:
        return run.nproc * base_weights(run)[0] // run.shards
    return 0
