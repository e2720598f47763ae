"""Bytes of one GPU while a recipe runs, from arithmetic alone.

    always there    CUDA context, weights, adapters, optimizer states
    loss            + all activations, the head's chunk, gathered embedding and head
    backward        + all activations, one layer computed again and its gradients, gathered layers, a dequantised matrix
    end of backward + all gradients, one layer and its gradients, gathered layers
    step            + all gradients, what the optimizer needs for a moment
    answers         of grpo: + the key-value cache of a process's answers, and the weights that it does not hold itself

The peak is the greatest of these moments. Its parts are derived from what each strategy allocates (see `parallel.engine` and
the files in accelerate_configs/ and ds_configs/), not fitted to measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from ..models.spec import Layer
from ..topology import strategies as strategy_files
from . import activations
from .planned_run import FSDP, OFFLOADED, SHARDED, ZERO, Setup

MiB, GiB = 2**20, 2**30
FLOAT, ADAM = 4, 8  # bytes of an element: of float32, of AdamW's two moments
# What a process holds on a GPU before its first tensor: context and kernels of CUDA, cuBLAS's workspace; with several
# processes NCCL's channels, too.
CONTEXT, NCCL = 600 * MiB, 400 * MiB
# The caching allocator rounds up, and keeps blocks that do not fit the next request.
SLACK = 0.1
LOGITS_CHUNK = 256 * MiB  # see head.CHUNK
NF4_BLOCK, NF4_NESTED = 64, 256  # elements that share a constant; constants that share another
BNB_SMALL, BNB_BLOCK = 4096, 256  # elements, of bitsandbytes' 8-bit optimizers
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
        """What a GPU must have."""
        return max(self.peak, self.loading)


def estimate(setup: Setup) -> Memory:
    """What a setup needs."""
    lasting = _lasting(setup)
    moments = {name: {**lasting, **moment} for name, moment in _moments(setup).items()}
    name = max(moments, key=lambda key: sum(moments[key].values()))
    parts = {key: value for key, value in moments[name].items() if value}
    parts["slack"] = int(SLACK * sum(value for key, value in parts.items() if key not in (*lasting, "gradients")))
    context = _context(setup)
    return Memory(
        parts={"context": context, **parts} if context else parts,
        moment=name,
        loading=context + _loading(setup),
        host=setup.nproc * (HOST_PROCESS + _offloaded(setup)),
        host_loading=setup.nproc * HOST_PROCESS + _host_loading(setup),
    )


def _context(setup: Setup) -> int:
    return (CONTEXT + (NCCL if setup.world > 1 else 0)) if setup.gpu else 0


# Weights


def linear_bytes(weights: int, method: str, *, element: int) -> int:
    """Bytes of a matrix's weights as a method stores them, constants of its quantisation not counted.

    Args:
        element: bytes of an element that is not quantised.
    """
    return {"qlora": weights // 2, "int8": weights}.get(method, weights * element)


def constant_bytes(weights: int, outputs: int, method: str) -> int:
    """Bytes of the constants with which a quantised matrix is read, that no strategy shards."""
    if method == "int8":
        return FLOAT * outputs
    if method != "qlora":
        return 0
    blocks = math.ceil(weights / NF4_BLOCK)
    codes = FLOAT * (16 + 256 + 1)  # both tables, and the mean
    return blocks + FLOAT * math.ceil(blocks / NF4_NESTED) + codes


def _element(setup: Setup) -> int:
    """Bytes of a weight that is not quantised, as it lasts; full fine-tuning keeps float32 but under DeepSpeed."""
    if setup.full and setup.strategy not in ZERO:
        return FLOAT
    return setup.compute


def layer_weights(setup: Setup, layer: Layer) -> int:
    """Bytes of one layer's base weights, constants not counted."""
    element, method = _element(setup), setup.config.method
    linears = sum(
        linear_bytes(linear.weights, method, element=element) + linear.bias * linear.outputs * element
        for linear in layer.linears.values()
    )
    experts = layer.experts.parameters if layer.experts else 0
    return linears + (experts + layer.rest) * element


def outside_weights(setup: Setup) -> int:
    """Bytes of embedding, final norm and head."""
    return setup.shape.outside * _element(setup)


def base_weights(setup: Setup) -> tuple[int, int]:
    """Bytes of the whole base: what can be sharded, and constants that every process keeps."""
    method, layers = setup.config.method, setup.shape.layers
    constants = sum(
        layer.count * sum(constant_bytes(linear.weights, linear.outputs, method) for linear in layer.linears.values())
        for layer in layers
    )
    return sum(layer.count * layer_weights(setup, layer) for layer in layers) + outside_weights(setup), constants


# What lasts


def _lasting(setup: Setup) -> dict[str, int]:
    """Bytes by part that are there all the time."""
    weights, constants = base_weights(setup)
    shards = setup.shards if setup.strategy in SHARDED else 1
    off = setup.strategy in OFFLOADED
    return {
        "weights": constants + (0 if off else weights // shards),
        "adapters": 0 if setup.full or off else _adapters(setup, shards),
        "optimizer": 0 if off else _optimizer(setup),
    }


def _adapters(setup: Setup, shards: int) -> int:
    # float32 masters; DeepSpeed works on 16-bit ones and keeps its masters with the optimizer. Of grpo a frozen copy.
    copies = 2 if setup.config.is_grpo and setup.config.beta else 1
    return copies * setup.trainable * (setup.compute if setup.strategy in ZERO else FLOAT) // shards


def _optimizer(setup: Setup) -> int:
    """Bytes of optimizer states of one process (for DeepSpeed also of float32 masters)."""
    spread = setup.shards if setup.strategy in (*SHARDED, *ZERO) else 1
    masters = FLOAT * setup.trainable if setup.strategy in ZERO and setup.bf16 else 0
    return (states(setup, setup.config.optim) + masters) // spread


def states(setup: Setup, optim: str) -> int:
    """Bytes of an optimizer's states for all that is trained; paged ones live in host memory.

    bitsandbytes keeps two bytes an element and a constant for 256, and states of small tensors in float32.
    """
    if optim in ("adamw_torch", "sgd"):
        return (ADAM if optim == "adamw_torch" else 0) * setup.trainable
    if optim != "adamw_8bit":
        return 0

    def of_tensor(size: int) -> int:
        return ADAM * size if size < BNB_SMALL else 2 * (size + FLOAT * math.ceil(size / BNB_BLOCK))

    if setup.full:
        return of_tensor(setup.trainable)
    return sum(layer.count * sum(map(of_tensor, setup.adapters(layer))) for layer in setup.shape.layers)


def _gradients(setup: Setup) -> int:
    """Bytes of all gradients of one process between backward and step."""
    if setup.strategy in OFFLOADED:
        return 0
    element = setup.compute if setup.strategy in ZERO else FLOAT
    return setup.trainable * element // (setup.shards if setup.strategy in (*SHARDED, *ZERO) else 1)


def _earlier_gradients(setup: Setup) -> int:
    """Bytes of gradients beside a micro-batch's activations: of the step's earlier ones, or that are never given back."""
    if setup.strategy in ("ddp", "zero3"):  # views of DDP's buckets, of ZeRO-3's flat buffer
        return _gradients(setup)
    if not accumulates(setup):
        return 0
    if setup.strategy in FSDP and not setup.full:  # adapters are reduced once a step, and whole until then
        return setup.trainable * FLOAT
    return _gradients(setup)


# Moments of a step


def _moments(setup: Setup) -> dict[str, dict[str, int]]:
    kept, gradients, before = activations.saved(setup), _gradients(setup), _earlier_gradients(setup)
    layers = setup.shape.layers
    one = max(activations.again(setup, layer) for layer in layers)
    working = max(_working(setup, layer) for layer in layers) + _dequantised(setup)
    gathered = _gathered_layers(setup)
    return {
        "loss": {
            "activations": kept + activations.cached_casts(setup),
            "gradients": before,
            "head and loss": _head(setup),
            "gathered": _gathered_outside(setup),
        },
        "backward": {
            "activations": kept + (one if setup.checkpointed else 0),
            "gradients": before + _buckets(setup),
            "head and loss": _head_gradient(setup),
            "working": working,
            "gathered": _gathered_outside(setup) + _reduced_outside(setup) + gathered,
        },
        # The first layer's backward: all others have given their gradients.
        "end of backward": {
            "activations": one,
            "gradients": max(before, gradients) + _buckets(setup),
            "head and loss": setup.shape.embedding * FLOAT if setup.full and setup.strategy not in SHARDED else 0,
            "working": working,
            "gathered": gathered,
        },
        "step": {"gradients": gradients, "working": _step(setup)},
        **({"answers": _answers(setup)} if setup.config.is_grpo else {}),
    }


def _answers(setup: Setup) -> dict[str, int]:
    """Prompt and answer have max_length tokens together; all of a process's answers grow at once."""
    answers, shape = setup.config.batch(setup.world) // setup.world, setup.shape
    token = sum(layer.count * (layer.attention.key + layer.attention.value) for layer in shape.layers) * setup.compute
    weights = base_weights(setup)[0] if setup.strategy in SHARDED else 0
    return {
        "cache": answers * setup.config.max_length * token,
        "gathered": weights - weights // setup.shards,
        "head and loss": answers * shape.vocabulary * (setup.compute + FLOAT),
    }


def accumulates(setup: Setup) -> bool:
    """Whether a step has several micro-batches."""
    return setup.config.batch(setup.world) > setup.config.per_device_train_batch_size * setup.world


def _fused(setup: Setup) -> bool:
    return setup.shape.head_as_is and "head" not in setup.config.plain_parts


def _head_gradient(setup: Setup) -> int:
    """What the head leaves behind in the forward: the gradient of hidden states, and of its own weights if trained."""
    if not _fused(setup):
        # The probabilities in float32, their gradient, and what a change of the logits keeps.
        changed = 0 if setup.shape.head_as_is else setup.compute
        return setup.tokens * setup.shape.vocabulary * (2 * FLOAT + changed)
    hidden = setup.tokens * setup.shape.hidden * setup.compute
    return hidden + (setup.shape.embedding * FLOAT if setup.full else 0)


def _head(setup: Setup) -> int:
    """Bytes of head and loss at their peak, every token taken for a supervised one."""
    logits = setup.tokens * setup.shape.vocabulary
    if not _fused(setup):
        return logits * (setup.compute + FLOAT) + _head_gradient(setup)  # and the logits in both types
    chunk = min(LOGITS_CHUNK, logits * setup.compute)
    weight = setup.shape.embedding * setup.compute
    # Logits and their softmax; of a trained head also a chunk's share of its gradient, and its weights cast.
    trained = max(0, weight - chunk) if setup.full else 0
    return 2 * chunk + trained + (weight if setup.autocast else 0) + _head_gradient(setup)


def _working(setup: Setup, layer: Layer) -> int:
    """Bytes of gradients between the operations of one layer's backward."""
    attention, experts = layer.attention, layer.experts
    inner = max((linear.inputs for name, linear in layer.linears.items() if name in ("down_proj", "c_proj")), default=0)
    inner = max(inner, experts.intermediate * experts.per_token if experts else 0)
    gated = bool(experts) or "c_fc" not in layer.linears
    widths = max((3 if gated else 2) * inner, attention.query + attention.key + attention.value + attention.output)
    # Of the residual, and of a norm in float32 that is not one operation.
    hidden = setup.shape.hidden * (2 * setup.compute + (0 if setup.shape.norm == "layer" else 2 * FLOAT))
    return setup.tokens * (widths * setup.compute + hidden)


def _dequantised(setup: Setup) -> int:
    """A matrix of 4 or 8 bits is written out in 16 for each product."""
    if setup.config.method not in ("qlora", "int8"):
        return 0
    largest = max(linear.weights for layer in setup.shape.layers for linear in layer.linears.values())
    return largest * setup.compute


def _step(setup: Setup) -> int:
    """What an optimizer needs for a moment: DeepSpeed's float32 copy of its gradients."""
    if setup.strategy not in ZERO or not setup.bf16 or setup.strategy in OFFLOADED:
        return 0
    mine = setup.trainable // setup.shards
    return FLOAT * min(mine, 10**9 if setup.strategy == "zero3" else mine)  # ZeRO-3 steps in groups of 1e9


# What sharding gathers


def _bits(setup: Setup, layer: Layer) -> int:
    """Bytes of one layer as it is gathered: as stored where it is quantised, else in the type of computation."""
    adapters = sum(setup.adapters(layer)) * setup.compute
    if setup.full and setup.strategy not in ZERO:
        return layer.parameters * setup.compute
    return layer_weights(setup, layer) + adapters


def _gathered_outside(setup: Setup) -> int:
    """The head and its norm, which stay gathered from the forward to the backward."""
    return setup.shape.embedding * setup.compute if setup.strategy in SHARDED else 0


def _reduced_outside(setup: Setup) -> int:
    """Gradients of a trained head while they are reduced in float32."""
    return setup.shape.embedding * (setup.compute + FLOAT) if setup.full and setup.strategy in FSDP else 0


def _gathered_layers(setup: Setup) -> int:
    """Layers in full at one time, and the buffers that gather them or spread their gradients."""
    if setup.strategy not in SHARDED:
        return 0
    largest = max(_bits(setup, layer) for layer in setup.shape.layers)
    if setup.strategy in ZERO:
        settings = zero_settings(setup.strategy)
        # Weights that come back within so many elements are kept: those around the turn from forward to backward.
        live = min(settings["stage3_max_live_parameters"], settings["stage3_max_reuse_distance"] // 2) * setup.compute
        trained = 2 * largest if setup.full else 0  # gradients of a layer, and the buffer that reduces them
        bucket = setup.shape.hidden**2 * setup.compute  # accelerate's size of it
        return max(2 * largest, min(base_weights(setup)[0], live)) + trained + bucket
    # This layer and the next one; of several processes the buffer of the gathering, of shards on the host their copies.
    gathered = (3 if setup.shards > 1 else 2) * largest
    gathered += 2 * largest // setup.shards if setup.strategy in OFFLOADED else 0
    if setup.full:  # gradients of a layer, and their float32 copy to be reduced
        gathered += max(layer.parameters for layer in setup.shape.layers) * (setup.compute + FLOAT)
    return gathered


def _buckets(setup: Setup) -> int:
    """Buffers in which ZeRO-2 reduces gradients, two of them in turns."""
    return 2 * zero_settings("zero2")["reduce_bucket_size"] * setup.compute if setup.strategy == "zero2" else 0


@cache  # a plan asks for it hundreds of times
def zero_settings(strategy: str) -> dict:
    """`zero_optimization` of a strategy's DeepSpeed file."""
    return strategy_files.read(strategy).part("zero_optimization")


# Loading and the host


def _loading(setup: Setup) -> int:
    """Bytes on a GPU while the model is loaded."""
    weights, constants = base_weights(setup)
    shards = setup.shards if setup.strategy in SHARDED else 1
    kept = 0 if setup.strategy in OFFLOADED else weights // shards
    if setup.config.method in ("qlora", "int8"):
        # A quantised base comes whole to each GPU, and accelerate (1.15) keeps it while FSDP makes the shards beside it.
        return weights + constants + (kept if setup.strategy in FSDP else 0) + _dequantised(setup)
    largest = max(
        setup.shape.embedding * _element(setup), *(layer_weights(setup, layer) for layer in setup.shape.layers)
    )
    return kept + (largest if setup.strategy in SHARDED else 0)


def _offloaded(setup: Setup) -> int:
    """Bytes in host memory for one process: what an offloading strategy keeps there, or a paged optimizer."""
    if setup.strategy in OFFLOADED:
        weights, _ = base_weights(setup)
        adapters = 0 if setup.full else _adapters(setup, 1)
        states = setup.trainable * (ADAM + FLOAT + (FLOAT if setup.strategy in ZERO else 0))
        return (weights + adapters + states) // setup.shards
    return {"paged_adamw_32bit": ADAM, "paged_adamw_8bit": 2}.get(setup.config.optim, 0) * setup.trainable


def _host_loading(setup: Setup) -> int:
    """Bytes that reading the weights takes in host memory; 16-bit weights are mapped from their file."""
    if not setup.full:
        return 0
    whole = setup.shape.parameters * FLOAT
    return whole if setup.strategy in SHARDED else whole * setup.nproc
