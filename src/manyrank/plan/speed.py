"""Estimated time of a step: products, memory traffic and communication, from the figures of a kind of GPU.

    compute        products of matrices at a share of the GPU's rate, attention, what is bound by its memory
    communication  bytes of gathering weights and reducing gradients over the slowest link; hidden behind compute
    host           launching the kernels of a micro-batch, whatever its tokens; a small one leaves the GPU waiting
    step           micro-batches x the longest of these, then reduction and optimizer

LoRA needs 4 operations a weight and token (forward, and the gradient of the input), full fine-tuning 6, and 2 more where
activations are recomputed. These are estimates for comparing strategies: no constant is fitted to a measurement of
this project.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..topology.gpus import GpuKind
from ..topology.strategies import EngineKind
from . import activations, memory
from .planned_run import PlannedRun

# Shares of the maker's figures that large kernels usually reach.
MATMUL, ATTENTION, TRAFFIC, LINK = 0.7, 0.5, 0.8, 0.8
# An activation that is kept is written, read again in backward, and so are the gradients beside it and what is not kept:
# of a step of Llama-3.1-8B with LoRA 173 GB were counted beside products and attention, where 36 GB are kept.
PASSES = 5
SUPERVISED = 0.6  # of all tokens, as in GSM8K; the head runs on these alone
LAUNCH, HOP = 20e-6, 3e-6  # seconds of a collective, and for each rank of its ring
# Kernels of a layer, forward and backward, and more where it is recomputed, as counted for Llama with LoRA before the
# rotary embedding was fused, which spares the host little (docs/performance.md); seconds of the host for one. Two cores
# without a GPU needed 24 us; a GPU's host is taken to be twice as fast.
KERNELS, KERNELS_AGAIN, ISSUE = 130, 40, 12e-6
# Of float8: products at twice the rate; kernels of a layer's rows that are scaled and cast, forward and backward; passes
# over a row in 16 bits that these take (largest, times scale, cast; in backward also times the weight's scales).
FLOAT8, KERNELS_FLOAT8, CASTS, CASTS_BACK = 2, 110, 4, 6
BUSY = 2  # times as long as the host a GPU should take, for both are estimates
BUCKET = 25 * 2**20  # bytes, of DistributedDataParallel
HOST_LINK, HOST_ADAM = 25e9, 4e8  # bytes a second over PCIe, elements a second of AdamW on a CPU


@dataclass(frozen=True)
class Speed:
    """Estimated cost of one optimizer step. Times are in seconds; `flops` counts one process, LoRA-aware.

    Attributes:
        compute: all micro-batches of a process.
        communication: the same, wherever it is hidden.
        host: launching the kernels of all micro-batches; `compute` is never less.
        exposed: what of the communication compute does not hide.
        tokens: of all processes. examples: of one process.
    """

    compute: float
    host: float
    communication: float
    exposed: float
    optimizer: float
    flops: float
    tokens: int
    peak_flops: float
    world: int
    examples: float

    @property
    def step(self) -> float:
        return self.compute + self.exposed + self.optimizer

    @property
    def busy(self) -> bool:
        """Whether the GPU sets the pace and not the host: larger micro-batches would not be faster."""
        return self.compute >= BUSY * self.host

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step

    @property
    def mfu(self) -> float:
        """Share of the GPU's rate that goes into needed operations; what is recomputed does not count."""
        return self.flops / self.step / self.peak_flops


def micro_batches(run: PlannedRun) -> int:
    """Count the operations of one process in a step."""
    return math.ceil(run.config.batch(run.world) / (run.config.micro_batch * run.world))


def estimate(run: PlannedRun, kind: GpuKind) -> Speed:
    """Estimate the speed of a run on a kind of GPU."""
    count, share = micro_batches(run), run.config.batch(run.world) / run.world
    # A step with fewer examples than micro-batches hold is cut into smaller ones, down to one example.
    run = run.with_options(per_device_train_batch_size=min(run.config.micro_batch, max(1, math.ceil(share))))
    host = count * _launching(run)
    compute = max(count * _micro_batch(run, kind), host)
    each, once = _communication(run, kind)
    # Gathering runs beside compute; the first layers' and the reduction of the last gradients cannot hide.
    hidden = min(count * each * 0.9, compute) + min(once * 0.8, compute / count / 2)
    total = count * each + once
    return Speed(
        compute=compute,
        host=host,
        communication=total,
        exposed=total - hidden,
        optimizer=_optimizer(run, kind),
        flops=share * run.config.max_length * needed(run),
        tokens=run.config.batch(run.world) * run.config.max_length,
        peak_flops=rate(run, kind),
        world=run.world,
        examples=share,
    )


# Operations


def needed(run: PlannedRun, *, supervised: float = SUPERVISED, length: float | None = None) -> float:
    """Floating-point operations of a token, forward and backward, without what is recomputed.

    Args:
        supervised: share of the tokens that the head runs on.
        length: of the document that a token is in, on average over tokens; max_length where it is not known.
    """
    shape, full = run.shape, run.full
    backward = 1 - run.first_learned / shape.depth  # the share of the layers that a gradient comes to
    layers = shape.active * (2 + 2 * backward + (2 * run.trainable / shape.parameters if full else 0))
    adapters = 0 if full else 6 * run.active_adapters
    head = (6 if full else 4) * shape.embedding * supervised
    return layers + adapters + head + _attention(run, length) * (1 + 2.5 * backward)


def rate(run: PlannedRun, kind: GpuKind) -> float:
    """Operations a second of the kind, in the type of computation; in TF32 half of those in 16 bits."""
    exact = kind.flops if run.half else kind.float32_flops
    return kind.flops / 2 if run.config.tf32 and not run.half else exact


def _attention(run: PlannedRun, length: float | None = None) -> float:
    """Operations of a token's causal attention, forward, in documents of a length, or of max_length."""
    total = 0.0
    for layer in run.shape.layers:
        seen = (length or run.config.max_length) / 2
        if layer.attention.window:
            seen = min(seen, layer.attention.window)
        total += layer.count * 2 * seen * (layer.attention.query + layer.attention.output)
    return total


def _micro_batch(run: PlannedRun, kind: GpuKind) -> float:
    """Seconds of forward and backward of one micro-batch."""
    shape, tokens = run.shape, run.tokens
    again = run.checkpointed / shape.depth
    attention = _attention(run)
    products = needed(run) - 3.5 * attention + again * 2 * shape.active
    seconds = tokens * products / (rate(run, kind) * MATMUL) + tokens * attention * (3.5 + again) / (
        rate(run, kind) * ATTENTION
    )
    saved = activations.saved(run.with_options(gradient_checkpointing="off"))
    seconds += PASSES * (1 + again / 2) * saved / (kind.bandwidth * TRAFFIC) + _adapters(run, kind, again)
    if run.config.method in (
        "qlora",
        "int8",
    ):  # each pass reads the packed weights and writes them in 16 bits, and reads these
        quantised = sum(layer.count * sum(x.weights for x in layer.linears.values()) for layer in shape.layers)
        seconds += (2 + again) * quantised * (2 * 2 + 0.5) / (kind.bandwidth * TRAFFIC)
    return seconds + (_float8(run, kind, again) if run.config.method == "fp8" else 0)


def _adapters(run: PlannedRun, kind: GpuKind, again: float) -> float:
    """Seconds of the adapters' products in a micro-batch: of a small rank, they are bound by memory.

    Forward they read the input, and read and write the output; backward they read the output's gradient twice and the
    input once, and read and write the input's gradient.
    """
    linears = [(layer.count, linear) for layer in run.shape.layers for linear in run.adapted(layer).values()]
    elements = sum(count * ((4 + again) * x.inputs + (4 + 2 * again) * x.outputs) for count, x in linears)
    return run.tokens * elements * run.compute / (kind.bandwidth * TRAFFIC)


def _float8(run: PlannedRun, kind: GpuKind, again: float) -> float:
    """Seconds that float8 adds to a micro-batch; usually fewer than none."""
    linears = [(layer.count, linear) for layer in run.shape.layers for linear in layer.linears.values()]
    weights = sum(count * linear.weights for count, linear in linears)
    saved = run.tokens * (4 + 2 * again) * weights * (1 - 1 / FLOAT8) / (rate(run, kind) * MATMUL)
    rows = sum(count * ((1 + again) * CASTS * linear.inputs + CASTS_BACK * linear.outputs) for count, linear in linears)
    # The backward's matrix is turned: read and written.
    return (run.tokens * rows * run.compute + 2 * weights) / (kind.bandwidth * TRAFFIC) - saved


def _launching(run: PlannedRun) -> float:
    """Seconds in which the host launches the kernels of one micro-batch."""
    layer = KERNELS + (KERNELS_FLOAT8 if run.config.method == "fp8" else 0)
    return (run.shape.depth * layer + run.checkpointed * KERNELS_AGAIN) * ISSUE


def _optimizer(run: PlannedRun, kind: GpuKind) -> float:
    own = run.trainable / (run.shards if run.strategy.shards else 1)
    if run.strategy.offload:
        return own / HOST_ADAM + 2 * own * run.compute / HOST_LINK
    if run.config.optim.startswith("paged"):
        return own * 28 / HOST_LINK
    seconds = own * 7 * run.kept / (kind.bandwidth * TRAFFIC)  # reads and writes of weights, moments and gradients
    return seconds + (_newton_schulz(run) / (kind.flops * MATMUL) if run.full and run.config.optim == "muon" else 0)


def _newton_schulz(run: PlannedRun) -> int:
    """Operations in which each process makes Muon's updates orthogonal: products of whole matrices, in bf16."""
    total, steps = 0, run.config.optim_args.get("ns_steps", 5)
    for layer in run.shape.layers:
        sides = [sorted((linear.inputs, linear.outputs)) for linear in layer.linears.values()]
        total += layer.count * steps * sum(4 * short**2 * long + 2 * short**3 for short, long in sides)
    return total


# Communication


def _communication(run: PlannedRun, kind: GpuKind) -> tuple[float, float]:
    """Seconds of each micro-batch, and of the end of a step."""
    if run.world == 1:
        return _offload(run), 0.0
    trained, layers = run.trainable * memory.FLOAT, run.shape.depth
    if run.strategy.zero_stage == 2:  # reduces each micro-batch into shards, and gathers the new weights
        size = run.trainable * run.compute
        calls = math.ceil(run.trainable / memory.zero_settings(run)["reduce_bucket_size"])
        return _ring(run, kind, size, calls=calls), _ring(run, kind, size, calls=calls)
    if not run.sharded:  # an all-reduce is a reduce-scatter and an all-gather, in trees of NCCL
        calls = math.ceil(trained / BUCKET)
        return 0.0, 2 * _ring(run, kind, trained, calls=0) + calls * (LAUNCH + HOP * math.log2(run.world))
    weights = memory.base_weights(run)[0]
    if run.full:
        weights = run.shape.parameters * run.compute
    gather = 2 * _ring(run, kind, weights, calls=layers)
    reduce = _ring(run, kind, trained, calls=layers)
    if run.shards < run.world:  # the copies of hsdp add up their gradients
        size = trained / run.shards
        reduce += 2 * size / (kind.network * LINK) + layers * (LAUNCH + HOP * run.world / run.shards)
    each = gather + _offload(run)
    every = run.full or run.strategy.engine is EngineKind.DEEPSPEED  # reduced in each micro-batch
    return (each + reduce, 0.0) if every else (each, reduce)


def _ring(run: PlannedRun, kind: GpuKind, size: float, *, calls: int) -> float:
    """Seconds of gathering or scattering `size` bytes over the processes that share shards, in so many calls."""
    ranks = run.shards
    across = ranks > run.nproc
    slowest = min(kind.link, kind.network * run.nproc) if across else kind.link
    return size * (ranks - 1) / ranks / (slowest * LINK) + calls * (LAUNCH + HOP * ranks)


def _offload(run: PlannedRun) -> float:
    """Seconds of a micro-batch in which weights come from host memory."""
    if not run.strategy.offload:
        return 0.0
    return 2 * memory.base_weights(run)[0] / run.shards / HOST_LINK


def why_slow(speed: Speed) -> str:
    """Name what a run's step waits for."""
    if speed.examples < 1:
        return "the batch: it has fewer examples than there are GPUs"
    if speed.compute == speed.host:
        return "the host: micro-batches are too small for the GPU"
    if speed.exposed > 0.25 * speed.step:
        return "the links: weights and gradients take longer than the products"
    if speed.optimizer > 0.25 * speed.step:
        return "the optimizer"
    return "products and memory traffic"
